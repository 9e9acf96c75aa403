"""``top_examples``: on which tokens are nodes largest, smallest, and what do they do in between?

One pass over the tokens. What is kept does not grow with them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from tl_sparse.ablation.recording import digest, each_activation
from tl_sparse.node import Nodes
from tl_sparse.nodes.chosen_nodes import by_hook, channel_values, chosen_nodes
from tl_sparse.nodes.example_results import KIND, SCHEMA, Examples, TopExamples, node_table
from tl_sparse.nodes.example_state import Settings, State, drawn_positions
from tl_sparse.nodes.leaders import neighbours
from tl_sparse.nodes.rows import Rows, real_first, token_texts
from tl_sparse.nodes.saved_run import (
    RECORD,
    check_same_run,
    own_folder,
    read_state,
    write_state,
)
from tl_sparse.progress import progress_bar
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.finite import NotFinite

CHUNK = 1 << 21  # positions x nodes that are sorted and counted at once


def top_examples(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    nodes: Nodes,
    *,
    k: int = 16,
    quantiles: Sequence[float] = (0.001, 0.01, 0.1, 0.5),
    samples: int = 4,
    bins: int = 64,
    window: tuple[int, int] = (12, 4),
    attention_mask: Shaped[Tensor, "rows columns"] | None = None,
    index: NodeIndex | None = None,
    batch_size: int = 16,
    seed: int = 0,
    folder: str | Path | None = None,
    save_every: float = 300.0,
    progress: bool = True,
) -> TopExamples:
    """Top and bottom examples of nodes over tokens, samples by quantile, and a histogram.

    Both ends are kept, as the sign of a node's value has a meaning. What is found:

    - ``k`` examples with the largest and ``k`` with the smallest values, exactly; of equal values
      the ones that come first.
    - For each quantile q, at both ends: ``samples`` examples, which are the largest (smallest)
      among samples / q positions drawn at random (seeded, the same for all nodes). So they spread
      over about the top q of all positions; the sample's own quantile is exact, and that of all
      positions is known to within about 1 / sqrt(samples) of itself. Where there are fewer than
      samples / q positions, all are drawn, and the examples are the round(q · positions) largest.
    - A histogram with exact counts, in bins that are a power of two wide.

    Works on a SparseTransformer and on any causal TransformerLens model. A node's value is what
    :class:`~tl_sparse.sites.Site` says, after AbsTopK. Padding on either side is skipped, and the
    model never sees it before a token.

    Memory: for each node (k + quantiles · samples) · 2 · (12 + 4 · window tokens) + 8 · bins bytes
    (about 5 kB with the defaults), one batch's activations at one hook, and some 100 MB to sort in;
    nothing grows with the tokens.

    Args:
        model: The model.
        tokens: Token ids.
        nodes: Nodes by any names; a site's name (``"mlp_neuron"``) is all of its nodes.
        k: Examples at each end.
        quantiles: Shares of the positions, above 0 and up to 1.
        samples: Examples of each quantile at each end.
        bins: Bins of the histogram, a power of two.
        window: Tokens before and after each example that are kept with it.
        attention_mask: 1 at real tokens, 0 at padding.
        index: The index that the nodes are of, where they are at no site (features).
        batch_size: Sequences of one forward pass.
        seed: Of the positions that the quantiles are drawn from.
        folder: Where the state is kept, so that the same call goes on after a break, with the same
            outcome; the finished examples stay there for :meth:`TopExamples.load`.
        save_every: Seconds from one state to the next.
        progress: Whether to show how far it is.

    Raises:
        ValueError: no such node, a number out of range, tokens or a mask that do not fit, or a
            folder with another run's state.
        NotFinite: weights or activations are NaN or infinite.
    """
    settings = Settings(k, tuple(quantiles), samples, bins, window, seed)
    rows = real_first(model, tokens, attention_mask)
    index, chosen = chosen_nodes(model, nodes, index)
    place = None if folder is None else Path(folder)
    run = describe(model, rows, index, chosen, settings)
    with own_folder(place):
        state = State.new(len(chosen), settings, next(model.parameters()).device)
        if place is not None and (place / RECORD).exists():
            record, kept = read_state(place, KIND, SCHEMA)
            check_same_run(place, record.get("settings") or {}, run)
            if record.get("finished") is True:
                return TopExamples.load(place)
            state.restore(place, record, kept, len(tokens), tokens.numel())
        pass_over(model, rows, index, chosen, settings, state, batch_size, place, save_every, run,
                  progress)  # fmt: skip
        found = finished(model, rows, index, chosen, settings, state, run)
        if place is not None:
            found.save(place)
        return found


def describe(
    model: nn.Module, rows: Rows, index: NodeIndex, chosen: Int[Tensor, " node"],
    settings: Settings,
) -> dict[str, Any]:  # fmt: skip
    """What a run is: two with equal descriptions have one outcome."""
    hooks = hashlib.sha256(repr(list(index.slices.items())).encode())
    hooks.update(chosen.numpy().tobytes())
    return {
        "model": fingerprint(model), "tokens": digest(rows.tokens),
        "lengths": digest(rows.lengths[:, None]), "nodes": hooks.hexdigest(),
        "k": settings.k, "quantiles": list(settings.quantiles), "samples": settings.samples,
        "bins": settings.bins, "window": list(settings.window), "seed": settings.seed,
    }  # fmt: skip


@torch.no_grad()
def pass_over(
    model: nn.Module, rows: Rows, index: NodeIndex, chosen: Int[Tensor, " node"],
    settings: Settings, state: State, batch_size: int, folder: Path | None, save_every: float,
    run: dict[str, Any], progress: bool,
) -> None:  # fmt: skip
    """Run the model on what the state has not seen, and update it."""
    device = next(model.parameters()).device
    hooks = by_hook(index, chosen, device)
    starts = np.concatenate([[0], rows.lengths.cumsum(0).numpy()])
    lists = settings.lists(int(starts[-1]))
    drawn = [drawn_positions(int(starts[-1]), n, (settings.seed, i))
             for i, (_, n, _) in enumerate(lists)]  # fmt: skip
    width = rows.tokens.shape[1]
    lengths = rows.lengths.to(device)
    offered: list[Tensor] = []
    seen: set[str] = set()

    def begin(first: int) -> None:
        """Which positions of the next batch each list draws from."""
        seen.clear()
        offered.clear()
        stop = min(first + batch_size, len(rows.tokens))
        for positions in drawn:
            low, high = starts[first], starts[stop]
            if positions is None:
                inside = np.arange(low, high)
            else:
                inside = positions[np.searchsorted(positions, low):
                                   np.searchsorted(positions, high)]  # fmt: skip
            sequence = np.searchsorted(starts, inside, side="right") - 1
            place = (sequence - first) * width + inside - starts[sequence]
            offered.append(torch.from_numpy(place).to(device))

    def look(hook: str, x: Tensor, first: int) -> None:
        if hook in seen:  # a HookedTransformer's norm fires for queries, keys and values
            return
        seen.add(hook)
        here = hooks[hook]
        x = channel_values(hook, x, here.width)
        at_once = max(1, CHUNK // max(1, x.shape[0] * x.shape[1]))
        for channels, nodes in zip(
            here.channels.split(at_once), here.nodes.split(at_once), strict=True
        ):
            part = x[..., channels]
            real = part.flatten(0, 1)[offered[0]]
            total = real.double().sum(0)
            if not bool(total.isfinite().all()):
                raise NotFinite(f"activations at {hook} are NaN or infinite on these tokens")
            state.sums[nodes] += total
            state.active[nodes] += (real != 0).sum(0)
            state.histograms.add(nodes, real)
            for i, part_ in enumerate((part, -part)):
                for j, candidates in enumerate(offered):
                    state.leaders[2 * j + i].take(
                        nodes, part_, candidates, lengths[first : first + len(x)],
                        first * width, settings.window[0],
                    )  # fmt: skip

    saved = time.monotonic()

    def after(following: int) -> None:
        nonlocal saved
        bar.update(following - state.done)
        state.done = following
        if following < len(rows.tokens):
            begin(following)
        if folder is not None and time.monotonic() - saved >= save_every:
            record = {"kind": KIND, "schema": SCHEMA, "finished": False, "done": following}
            write_state(folder, record | {"settings": run}, state.tensors())
            saved = time.monotonic()

    if state.done < len(rows.tokens):
        begin(state.done)
    with progress_bar(
        total=len(rows.tokens), initial=state.done, desc="top examples", unit="sequence",
        disable=not progress,
    ) as bar:  # fmt: skip
        each_activation(
            model, rows.tokens, index, look, batch_size, hooks=set(hooks), begin=state.done,
            after=after,
        )  # fmt: skip


def finished(
    model: nn.Module, rows: Rows, index: NodeIndex, chosen: Int[Tensor, " node"],
    settings: Settings, state: State, run: dict[str, Any],
) -> TopExamples:  # fmt: skip
    """What a pass has found, on the CPU."""
    width, n_tokens = rows.tokens.shape[1], int(rows.lengths.sum())
    found = []
    for i, (quantile, _, kept) in enumerate(settings.lists(n_tokens)):
        for side, sign in (("top", 1), ("bottom", -1)):
            part = state.leaders[2 * i + (side == "bottom")]
            values, places, context = (
                x[:, :kept].cpu() for x in (part.values, part.places, part.context)
            )
            there = places >= 0
            sequence, column = places.clamp(min=0) // width, places.clamp(min=0) % width
            columns, inside = neighbours(
                column, rows.lengths[sequence], settings.window[0], settings.width
            )
            tokens = rows.tokens[sequence[..., None], columns.clamp(0, width - 1)].long()
            found.append(
                Examples(
                    side,
                    quantile,
                    (sign * values).masked_fill(~there, torch.nan) + 0.0,
                    torch.where(there, sequence, -1),
                    torch.where(there, rows.given(sequence, column), -1),
                    sign * context + 0.0,
                    torch.where(inside & there[..., None], tokens, -1),
                )
            )
    ids = torch.cat([part.tokens.unique() for part in found])
    return TopExamples(
        node_table(index.nodes().iloc[chosen.numpy()]), tuple(found),
        state.histograms.counts.cpu(), state.histograms.exponents.cpu(),
        (state.sums / n_tokens).float().cpu(), (state.active / n_tokens).float().cpu(), n_tokens,
        settings.window[0], dict(token_texts(model, ids[ids >= 0])), run,
    )  # fmt: skip
