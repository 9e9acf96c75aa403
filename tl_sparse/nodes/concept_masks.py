"""``concept_masks``: which nodes are active where a concept occurs?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tl_sparse.ablation.recording import each_batch
from tl_sparse.node.names import BY_OPENAI
from tl_sparse.nodes.chosen_nodes import channel_values
from tl_sparse.nodes.concept_results import ConceptMasks
from tl_sparse.nodes.rows import ConceptPrompts, prompt_rows
from tl_sparse.progress import progress_bar
from tl_sparse.sites import NodeIndex, site
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.storage.finite import NotFinite

BLOCK = 64  # batches whose prompts are sorted by length, so that little is padding


def concept_masks(
    model: nn.Module,
    prompts: Mapping[str | tuple[str, ...], ConceptPrompts],
    *,
    sites: Sequence[str] = ("mlp_neuron",),
    eps: float = 0.0,
    share: float = 0.9,
    position: str | int = "last",
    token_only: Mapping[str, ConceptPrompts] | None = None,
    writes: bool = False,
    prepend_bos: bool | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> ConceptMasks:
    """The nodes that are active in a concept's prompts, for any number of concepts in one pass.

    A node is active in a prompt if its value's size is above ``eps`` at the position looked at. It
    belongs to a set of prompts if it is active in at least ``share`` of them. Where prompts join
    several concepts, their key is a tuple of names (a concept and its partners), and a concept's
    mask is the intersection over all sets that its name is in: what is active whatever the partner.

    Only counts are kept: 4 bytes for each set and node, and one batch's activations at one hook.

    Works on a SparseTransformer and on any causal TransformerLens model. Padding may be on either
    side: it is moved to the right, where no token sees it, and the last position is that of the
    prompt's own last token.

    Args:
        model: The model.
        prompts: Concept, or tuple of the concepts that occur together → prompts: texts, token ids
            [prompt, pos], these with their attention mask (as ``to_padded_tokens`` returns them),
            or rows of ids.
        sites: Sites whose nodes are looked at, by our names or OpenAI's (``"mlp.post_act"``).
        eps: Size above which a node is active. 0 suits models with AbsTopK, whose nodes are mostly
            exactly zero; in a dense model nearly all are active then.
        share: Share of a set's prompts, above 0 and up to 1.
        position: ``"last"``; ``"any"``: active at any token; or a number, from the end if negative.
        token_only: Concept → prompts with its word and without its meaning (a keyword in a
            comment): what is active there too is driven by the token.
        writes: Whether sites may be what attention and MLPs write (``attn_out``, ``mlp_out``).
            These are channels of the residual stream, and are easily taken for neurons.
        prepend_bos: Of texts: whether they begin with the BOS token; None: as the model says.
        batch_size: ConceptPrompts of one forward pass.
        progress: Whether to show how far it is.

    Raises:
        ValueError: an unknown site, writes that were not asked for, a number out of range, a
            position that a prompt does not have, no prompts, or token_only of an unknown concept.
        NotFinite: weights or activations are NaN or infinite.
    """
    if not prompts:
        raise ValueError("no concepts: give prompts of at least one")
    if not eps >= 0 or not 0 < share <= 1:
        raise ValueError(f"eps={eps} must be 0 or more, and share={share} above 0 and at most 1")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not isinstance(position, int) and position not in ("last", "any"):
        raise ValueError(f"position={position!r} must be 'last', 'any' or a number")
    names = [checked_site(model, name, writes) for name in ([sites] if isinstance(sites, str)
                                                            else sites)]  # fmt: skip
    index = NodeIndex.of(model, tuple(names))
    sets = [(key,) if isinstance(key, str) else tuple(key) for key in prompts]
    concepts = tuple(dict.fromkeys(name for key in sets for name in key))
    token_only = {} if token_only is None else token_only
    if unknown := [name for name in token_only if name not in concepts]:
        raise ValueError(
            f"token_only of {', '.join(unknown)}: the concepts are {', '.join(concepts)}"
        )
    groups = [*prompts.values(), *token_only.values()]
    counts, n_prompts, ever = active_counts(
        model, index, groups, eps, position, prepend_bos, batch_size, progress, len(sets)
    )
    return ConceptMasks(
        index, concepts, tuple(sets), counts[: len(sets)], n_prompts[: len(sets)],
        tuple(token_only), counts[len(sets) :], n_prompts[len(sets) :], ever, eps, share, position,
        fingerprint(model),
    )  # fmt: skip


def checked_site(model: nn.Module, name: str, writes: bool) -> str:
    """A site by our name or OpenAI's.

    Raises:
        ValueError: unknown, or a site of writes that were not asked for.
    """
    row = BY_OPENAI[name] if name in BY_OPENAI else site(name)
    if row.writes and not writes:
        cfg: Any = model.cfg
        instead = site("mlp_neuron" if row.part == "mlp" else "attn_v")
        raise ValueError(
            f"{row.name} is what {row.label} to the residual stream ({row.width(cfg)} channels of "
            f"it); the {instead.label}s are {instead.name} ({instead.width(cfg)}). If the writes "
            "are meant, pass writes=True"
        )
    return row.name


@torch.no_grad()
def active_counts(
    model: nn.Module, index: NodeIndex, groups: Sequence[ConceptPrompts], eps: float,
    position: str | int, prepend_bos: bool | None, batch_size: int, progress: bool, n_sets: int,
) -> tuple[Int[Tensor, "group node"], Int[Tensor, " group"], Bool[Tensor, " node"]]:  # fmt: skip
    """In how many prompts of each group each node is active, the prompts of each group, and which
    nodes are active in any prompt of the first ``n_sets`` groups."""
    device = next(model.parameters()).device
    counts = torch.zeros(len(groups), index.n_nodes, dtype=torch.int32, device=device)
    n_prompts = torch.zeros(len(groups), dtype=torch.int64)
    now: dict[str, Tensor] = {}
    seen: set[str] = set()

    def batches() -> Iterator[tuple[int, Tensor]]:
        with progress_bar(
            total=len(groups), desc="concepts", unit="set", disable=not progress
        ) as bar:
            for block in blocks(model, groups, prepend_bos, batch_size * BLOCK, bar):
                block.sort(key=lambda item: len(item[1]))
                for first in range(0, len(block), batch_size):
                    which, rows = zip(*block[first : first + batch_size], strict=True)
                    n_prompts.index_add_(0, torch.tensor(which), torch.ones(len(which)).long())
                    lengths = torch.tensor([len(row) for row in rows])
                    now["group"], now["lengths"] = (
                        torch.tensor(which).to(device),
                        lengths.to(device),
                    )
                    now["at"] = positions(lengths, position).to(device)
                    seen.clear()
                    yield 0, pad_sequence(list(rows), batch_first=True)

    def look(hook: str, x: Tensor, first: int) -> None:
        if hook in seen:  # a HookedTransformer's norm fires for queries, keys and values
            return
        seen.add(hook)
        piece = index.slices[hook]
        x = channel_values(hook, x, piece.stop - piece.start)
        active = active_at(x, now["at"], now["lengths"], eps, position == "any", hook)
        counts[:, piece].index_add_(0, now["group"], active.int())

    each_batch(model, batches(), index, look, hooks=set(index.slices))
    counts = counts.cpu()
    return counts, n_prompts, (counts[:n_sets] > 0).any(0)


def active_at(
    x: Float[Tensor, "prompt pos channel"], at: Int[Tensor, " prompt"],
    lengths: Int[Tensor, " prompt"], eps: float, anywhere: bool, hook: str,
) -> Bool[Tensor, "prompt channel"]:  # fmt: skip
    """Where a node's size is above ``eps``: at one position of each prompt, or anywhere."""
    if anywhere:
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        values = x.abs().masked_fill(~real[..., None], 0.0).amax(1)
    else:
        values = x[torch.arange(len(x), device=x.device), at].abs()
    if not bool(values.sum(dtype=torch.float64).isfinite()):
        raise NotFinite(f"activations at {hook} are NaN or infinite on these prompts")
    return values > eps


def positions(lengths: Int[Tensor, " prompt"], position: str | int) -> Int[Tensor, " prompt"]:
    """The position of each prompt that is looked at.

    Raises:
        ValueError: one of the prompts is too short.
    """
    if not isinstance(position, int):
        return lengths - 1
    found = lengths + position if position < 0 else torch.full_like(lengths, position)
    if bool(((found < 0) | (found >= lengths)).any()):
        raise ValueError(f"position {position}: a prompt has only {int(lengths.min())} tokens")
    return found


def blocks(
    model: nn.Module,
    groups: Sequence[ConceptPrompts],
    prepend_bos: bool | None,
    size: int,
    bar: Any,
) -> Iterator[list[tuple[int, Int[Tensor, " pos"]]]]:
    """ConceptPrompts with the number of their group, so many at a time.

    Raises:
        ValueError: a group without prompts, or as :func:`prompt_rows`.
    """
    block: list[tuple[int, Tensor]] = []
    for i, prompts in enumerate(groups):
        rows = prompt_rows(model, prompts, prepend_bos)
        block += [(i, row[:n]) for row, n in zip(rows.tokens, rows.lengths.tolist(), strict=True)]
        bar.update(1)
        while len(block) >= size:
            yield block[:size]
            block = block[size:]
    if block:
        yield block
