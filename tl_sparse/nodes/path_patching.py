"""``path_patch``: what one node tells another directly, along weights.

Sources: Wang et al. 2022 and Goldowsky-Dill et al. 2023 (path patching), here node to node: the
edges that a sparse model's weights are (Gao et al. 2025, §A.5), and what flows along them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.compat import affine_after
from tl_sparse.node import Node, Nodes, resolve
from tl_sparse.nodes.direct_path import Held, Selection, Way
from tl_sparse.nodes.measure import Answers, Measure, measure_of
from tl_sparse.nodes.patched_runs import (
    BaseRun,
    chunks,
    columns_of,
    entries_of,
    gathered,
    run_once,
    when,
)
from tl_sparse.nodes.patching import (
    SOURCE,
    Patch,
    PatchingResult,
    base_and_sources,
    named,
    patch_nodes,
)
from tl_sparse.nodes.prompts import Positions, Prompts, PromptsLike, at_some, places
from tl_sparse.sites import SITE
from tl_sparse.views.display import frame_html


@dataclass(frozen=True, eq=False)
class PathPatchResult:
    """What a sender's change does to each receiver directly, and by way of it to the answer."""

    sender: Nodes
    """Whose change is carried."""
    receivers: tuple[Nodes, ...]
    """What it is carried to, each on its own."""
    changes: tuple[Float[Tensor, "prompt chosen _node"], ...]
    """How much each receiver's nodes change, at the ``positions``."""
    positions: Int[Tensor, "prompt chosen"]
    """Where: from the sender's first patched position to the end."""
    values: Float[Tensor, "receiver prompt"]
    """The measure where each receiver alone has its change, and everything behind it follows."""
    whole: PatchingResult
    """The sender patched outright: its whole effect, and base and source."""
    attention: Held
    """Whether attention patterns on the way were held at base."""
    abstopk: Selection
    """Whether AbsTopK on the way kept what it keeps in base, or chose anew."""
    norms: Held
    """Whether the norms' scales on the way were held at base."""

    @property
    def effects(self) -> Float[Tensor, "receiver prompt"]:
        """How much each path moves the measure from base."""
        return self.values - self.whole.base

    def to_dataframe(self) -> pd.DataFrame:
        """A row per receiver, means over prompts: its ``change`` at the last token, summed over its
        nodes; the effect by way of it; and that as a share of the sender's whole effect."""
        whole = float(self.whole.effects.double().mean())
        rows = []
        for receiver, change, effect in zip(
            self.receivers, self.changes, self.effects.double().mean(1).tolist(), strict=True
        ):
            at_last = change[:, -1].double().sum(-1).mean()
            rows.append([named(self.sender), named(receiver), float(at_last), effect,
                         effect / whole if whole else float("nan")])  # fmt: skip
        return pd.DataFrame(rows, columns=["sender", "receiver", "change", "effect", "share"])

    @property
    def line(self) -> str:
        """The facts in one line."""
        return (
            f"{named(self.sender)} to {len(self.receivers)} receivers, directly; attention "
            f"{self.attention}, AbsTopK {self.abstopk}, norms {self.norms}"
        )

    def __repr__(self) -> str:
        return f"PathPatchResult({self.line})"

    def _repr_html_(self) -> str:
        return frame_html("Patched paths", self.line, self.to_dataframe())


@torch.no_grad()
def path_patch(
    model: nn.Module,
    base: PromptsLike | Prompts,
    source: PromptsLike | Prompts | None,
    sender: Nodes,
    receivers: Nodes | Sequence[Nodes],
    *,
    attention: Held = "frozen",
    abstopk: Selection = "rerun",
    norms: Held = "frozen",
    strength: float = 1.0,
    positions: Positions = "last",
    answers: Answers | None = None,
    measure: Measure | None = None,
    batch: int | None = None,
) -> PathPatchResult:
    """Carry a sender's difference between base and source to receivers along weights alone.

    A first run has the sender at base + strength x (source - base), and every other write to the
    residual stream held at base: what reaches a receiver came from the sender's own attention or
    MLP block, through the residual stream, and through what stands before the receiver in its own
    block. A second run has a receiver's new value, and everything behind it follows.

    Works for a ``SparseTransformer`` and for any TransformerLens model whose hooks can set what
    blocks write, the norms' scales and (where attention is on the way) the patterns.

    Args:
        model: The model.
        base: See :func:`~tl_sparse.nodes.patch_nodes`.
        source: Likewise; one.
        sender: Nodes within one layer's attention or MLP.
        receivers: Nodes behind it. A list is one receiver per entry, and each entry may itself be a
            list: nodes that get their changes together.
        attention: ``"frozen"`` holds patterns at base, so that a path leads through values alone;
            ``"free"`` computes them anew where the sender or a receiver is before the pattern.
        abstopk: ``"rerun"`` lets AbsTopK on the way choose again, by the changed values;
            ``"frozen"`` keeps the channels that it keeps in base, which is linear.
        norms: ``"frozen"`` holds the scales of norms on the way at base, which is linear.
        strength: How far the sender is moved.
        positions: Where the sender is patched. Receivers change there and, through attention, at
            later positions.
        answers: See :func:`~tl_sparse.nodes.patch_nodes`.
        measure: Likewise.
        batch: Likewise.

    Raises:
        ValueError: sender or receivers that are not there or not in order, frozen attention for a
            query or key (whose only way is through it), or hooks that the model does not have.
    """
    for name, value, choices in (
        ("attention", attention, ("frozen", "free")),
        ("abstopk", abstopk, ("rerun", "frozen")),
        ("norms", norms, ("frozen", "free")),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose from {', '.join(map(repr, choices))}")
    groups = tuple(receivers) if isinstance(receivers, list) else (receivers,)
    sends = resolve(model, sender)
    receives = [resolve(model, group) for group in groups]
    check_order(sends, receives, attention)
    whole = patch_nodes(
        model, base, source, [Patch(sender, strength)], positions=positions, answers=answers,
        measure=measure, batch=batch,
    )  # fmt: skip
    rows, sources = base_and_sources(model, base, source)
    at, from_there = places(positions, rows, sources[SOURCE])
    look, _ = measure_of(measure, answers, rows, model)
    columns = columns_of(sends)
    ends = reached(rows, at)
    entries = entries_of([[(node, 0, 1.0) for node in group] for group in receives])
    heard = columns_of([node for group in receives for node in group])
    values = torch.empty(len(groups), len(rows), device=at.device)
    carried: list[list[Tensor]] = [[] for _ in groups]
    with eval_mode(model), torch.no_grad():
        for chosen in chunks(model, rows, len(columns) + len(heard)):
            some, there = rows.rows(chosen), sources[SOURCE].rows(chosen)
            here, end = (at_some(x, chosen, some) for x in (at, ends))
            moved = run_once(model, there, at_some(from_there, chosen, there), columns)[0]
            run = BaseRun.of(model, some, end, heard)
            way = Way(model, some, sends, receives, attention, abstopk, norms)
            new = way.carry(here, end, moved, strength, run.columns)
            for i, group in enumerate(receives):
                after, before = (gathered(x, run.columns, group) for x in (new, run.values))
                carried[i].append((after - before) * scale_behind(model, group).to(after))
            for some_groups in run.passes(entries, len(groups), batch):
                logits, _ = run.patched(entries, some_groups, [new])
                numbers = chosen.repeat(len(some_groups))
                outcome = look(logits.flatten(0, 1), numbers).view(len(some_groups), -1)
                values[some_groups.to(at.device)[:, None], chosen] = outcome.to(values)
    width = ends.shape[1]
    changes = tuple(
        torch.cat([nn.functional.pad(x, (0, 0, 0, width - x.shape[1])) for x in parts]).cpu()
        for parts in carried
    )
    return PathPatchResult(
        sender, groups, changes, ends.cpu(), values.cpu(), whole, attention, abstopk, norms
    )  # fmt: skip


def check_order(sends: Sequence[Node], receives: Sequence[Sequence[Node]], attention: Held) -> None:
    """ValueError unless the sender is one part's and stands before every receiver."""
    if not sends or not receives or not all(receives):
        raise ValueError("path_patch needs a sender and receivers of at least one node")
    if len({(node.layer, SITE[node.site].part) for node in sends}) > 1:
        raise ValueError("the sender's nodes must be of one layer's attention or MLP block")
    begin = max(when(node.hook) for node in sends)
    for node in (node for group in receives for node in group):
        if when(node.hook) <= begin:
            raise ValueError(f"{node} does not come after the sender, {sends[-1]}")
    if attention == "frozen" and any(node.site in ("attn_q", "attn_k") for node in sends):
        raise ValueError(
            "with attention frozen a query or key changes nothing: choose attention='free'"
        )


def reached(rows: Prompts, at: Int[Tensor, "prompt chosen"]) -> Int[Tensor, "prompt reached"]:
    """The positions that a change can reach: from the first one on; all where prompts are short."""
    width = int((rows.last - at.min(1).values).max()) + 1
    if width > int(rows.last.min()) + 1:
        return torch.arange(rows.tokens.shape[1], device=at.device).repeat(len(rows), 1)
    return rows.last[:, None] + 1 - width + torch.arange(width, device=at.device)


def scale_behind(model: nn.Module, nodes: Sequence[Node]) -> Float[Tensor, " node"]:
    """What a norm's weight makes of a change at each node's hook: 1 where none follows it."""
    found = []
    for node in nodes:
        affine = affine_after(model, node.hook)
        found.append(1.0 if affine is None else float(affine[0][int(node.channel or 0)]))
    return torch.tensor(found)
