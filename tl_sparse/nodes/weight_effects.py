"""``weight_effects``: what does every single weight do? Each alone is set to zero.

Users of OpenAI's csp_yolo1 did it with two forward passes a weight. Here one forward pass does many
weights, begins at the weights' layer, and leaves out sequences that they do not touch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.recording import digest
from tl_sparse.nodes.effect_files import part_folder, read_part, write_part
from tl_sparse.nodes.effect_results import Sizes, WeightEffects, reduced
from tl_sparse.nodes.effect_runs import Runs
from tl_sparse.nodes.rows import Rows, real_first, token_texts
from tl_sparse.nodes.saved_run import RECORD, own_folder
from tl_sparse.nodes.weight_terms import Entries, chosen_entries, terms_of
from tl_sparse.progress import progress_bar
from tl_sparse.sparsity.weight_masks import Entry
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.finite import check_weights

HELD = 1 << 24  # weights x positions whose KL is held at once
MAX_PART = 1024  # weights of a part at most


def weight_effects(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    entries: Iterable[Entry] | None = None,
    *,
    matrices: Sequence[str] | None = None,
    biases: bool = False,
    attention_mask: Shaped[Tensor, "rows columns"] | None = None,
    k: int = 8,
    bins: int = 56,
    every_position: bool = False,
    max_tokens: int = 4096,
    folder: str | Path | None = None,
    progress: bool = True,
) -> WeightEffects:
    """KL(original || changed) at every position, for each weight set to zero alone.

    No weight is written to: a hook takes the weight's term from the sum that it belongs to, before
    AbsTopK, for another weight in every row of a batch. The outcome is that of the changed model to
    rounding. Where the weight's input is exactly zero in a whole sequence, the KL is exactly zero
    there and nothing is run. Weights of the unembedding take no run at all: only one logit changes.

    For each weight there are the mean and the largest KL, its mean by sequence and by position, a
    histogram over positions in logarithmic bins, the ``k`` positions with the largest KL, and the
    ``k`` tokens whose probability rises and falls most (mean over positions). KL is in nats; below
    about 1e-12 it is rounding.

    Works on a SparseTransformer, and on TransformerLens models with plain MLPs whose matrices
    :func:`~tl_sparse.sparsity.matrices.weight_matrices` lists.

    Memory: 4 bytes for each of at most 2^24 weights · positions a few times over, the logits of
    ``max_tokens`` tokens likewise, and for each weight about
    4 · (sequences + positions + 2 bins + 14 k) bytes of results.

    Args:
        model: The model.
        tokens: Token ids.
        entries: Weights by matrix and index, as in :meth:`WeightMasks.without`; None: all that are
            not zero. The outcome has them matrix by matrix.
        matrices: All weights of these matrices that are not zero, instead.
        biases: Whether biases count as matrices.
        attention_mask: 1 at real tokens, 0 at padding, which is left out.
        k: Positions and tokens that are kept for each weight.
        bins: Bins of the histogram, from 1e-12 to 100 nats (56: four a decade).
        every_position: Whether to keep the KL at every position, too.
        max_tokens: Tokens of one forward pass.
        folder: Where finished parts are kept, so that the same call goes on after a break with the
            same outcome; ``load_effects(folder)`` reads them when all are there.
        progress: Whether to show how far it is.

    Raises:
        ValueError: an unknown matrix or an index outside of it, tokens that do not fit, a number
            out of range, gated MLPs, or a folder with another run's parts.
        NotFinite: weights are NaN or infinite.
    """
    if min(k, bins, max_tokens) < 1:
        raise ValueError(f"k={k}, bins={bins} and max_tokens={max_tokens} must be at least 1")
    if entries is not None and matrices is not None:
        raise ValueError("give entries= or matrices=, not both")
    check_weights(model)
    rows = real_first(model, tokens, attention_mask)
    named = None if entries is None else list(entries)
    names = matrices if named is None else [name for name, _ in named]
    terms = terms_of(model, biases, None if names is None else set(names))
    chosen = chosen_entries(terms, named)
    sizes = Sizes.of(model, rows, k, bins, every_position)
    run = description(model, rows, chosen, sizes)
    place = None if folder is None else Path(folder)
    parts = list(parts_of(chosen, rows.tokens.numel()))
    found: list[WeightEffects] = []
    with (
        own_folder(place),
        eval_mode(model),
        torch.no_grad(),
        progress_bar(total=len(chosen), desc="weights", disable=not progress) as bar,
    ):
        runs = Runs(model, rows, max_tokens)
        for number, part in enumerate(parts):
            where = None if place is None else part_folder(place, number)
            if where is not None and (where / RECORD).exists():
                effects = read_part(where, run, number, len(parts), sizes)
            else:
                term = terms[chosen.matrices[int(chosen.matrix[part.start])]]
                index = chosen.index[part]
                kl, moved = runs.effects(term, index[:, : term.tensor.ndim])
                effects = reduced(kl, moved, term, index, rows, sizes, run)
                effects = effects.with_texts(dict(token_texts(model, effects.ids())))
                if where is not None:
                    write_part(where, effects, number, len(parts))
            found.append(effects)
            bar.update(part.stop - part.start)
    return WeightEffects.joined(found)


def parts_of(chosen: Entries, positions: int) -> Iterator[slice]:
    """Stretches of weights of one matrix, small enough for their KL to be held at once."""
    most = max(1, min(MAX_PART, HELD // positions))
    start = 0
    for n in chosen.matrix.unique_consecutive(return_counts=True)[1].tolist():
        for first in range(start, start + n, most):
            yield slice(first, min(first + most, start + n))
        start += n


def description(model: nn.Module, rows: Rows, chosen: Entries, sizes: Sizes) -> dict[str, Any]:
    """What a run is: two with equal descriptions have one outcome."""
    entries = hashlib.sha256(repr(chosen.matrices).encode())
    entries.update(chosen.matrix.numpy().tobytes() + chosen.index.numpy().tobytes())
    return {
        "model": fingerprint(model), "tokens": digest(rows.tokens),
        "lengths": digest(rows.lengths[:, None]), "entries": entries.hexdigest(),
        "weights": len(chosen), "k": sizes.top, "tokens_moved": sizes.moved, "bins": sizes.bins,
        "every_position": sizes.every_position,
    }  # fmt: skip
