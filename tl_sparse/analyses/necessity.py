"""Is a circuit necessary? Its nodes, and no others, ablated in the full model.

Source: Gao et al. 2025, Figure 32 ("inverse pruning").
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import broadcast
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.ablation.masked_forward import masked_logit_diffs
from tl_sparse.analyses.figures import necessity_figure
from tl_sparse.analyses.runs import accuracy
from tl_sparse.circuits import Circuit
from tl_sparse.circuits.edges import input_major
from tl_sparse.sites import SITES, NodeIndex
from tl_sparse.sparsity.matrices import BLOCK_MATRICES
from tl_sparse.tasks import Split, Task, TaskBatch
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

CONTROLS = ("outside", "anywhere", "matched", "degree")
NEAREST = 5  # candidates among which a matched control node is drawn


@dataclass(frozen=True, eq=False)
class Necessity:
    """Losses of the full model with a circuit's nodes ablated, and with random ones."""

    task: str
    """Name of the task."""
    n_nodes: int
    """Nodes of the circuit."""
    sets: pd.DataFrame
    """What was ablated, a row a set: kind, draw, n_nodes, shared (nodes it shares with the
    circuit). Kinds: ``none``; ``circuit``; ``outside``, random nodes outside the circuit, as many
    at every layer and site; ``anywhere``, the same drawn from all nodes; ``matched``, outside and
    each close to a circuit node in how much ablating it changes it (mean |x - value| on the
    prompts); ``degree``, outside and each close to a circuit node in its number of nonzero weights.
    A site with too few nodes outside gives all it has, so ``n_nodes`` may be smaller."""
    losses: Float[Tensor, "set prompt"]
    """Two-way cross-entropy (nats) of every prompt under every ablation."""
    prompts: tuple[str, ...]
    """The prompts; rows 2i and 2i+1 are a pair."""
    split: Split
    """Whose templates and names the prompts have."""
    seed: int
    """Seed of the prompts and of the random sets."""

    @property
    def model_loss(self) -> float:
        """Mean loss with nothing ablated."""
        return self.mean_loss("none")

    @property
    def loss(self) -> float:
        """Mean loss with exactly the circuit's nodes ablated; near ln 2 if they are necessary."""
        return self.mean_loss("circuit")

    def mean_loss(self, kind: str) -> float:
        """Mean loss over prompts and draws of a kind of set.

        Raises:
            ValueError: unknown kind.
        """
        return float(self._of(kind).mean())

    def spread(self, kind: str) -> float:
        """Standard deviation between the draws of a kind of set; NaN for a single one."""
        draws = self._of(kind).mean(1)
        return float(draws.std()) if len(draws) > 1 else math.nan

    def _of(self, kind: str) -> Float[Tensor, "draw prompt"]:
        rows = torch.tensor((self.sets["kind"] == kind).to_numpy())
        if not bool(rows.any()):
            known = ", ".join(self.sets["kind"].unique())
            raise ValueError(f"unknown kind of set {kind!r}: choose from {known}")
        return self.losses[rows]

    def to_dataframe(self) -> pd.DataFrame:
        """A row per ablated set: the columns of ``sets``, loss, accuracy."""
        return self.sets.assign(
            loss=self.losses.mean(1).numpy(), accuracy=[accuracy(row) for row in self.losses]
        )

    def examples(self) -> pd.DataFrame:
        """A row per set and prompt: kind, draw, prompt, loss."""
        n_sets, n_prompts = self.losses.shape
        frame = self.sets[["kind", "draw"]].loc[self.sets.index.repeat(n_prompts)]
        frame = frame.reset_index(drop=True)
        return frame.assign(prompt=self.prompts * n_sets, loss=self.losses.flatten().numpy())

    def to_plotly(self) -> go.Figure:
        """Mean loss of every set against its number of nodes, as in Figure 32."""
        return necessity_figure(self.to_dataframe(), self.n_nodes)

    def _repr_html_(self) -> str:
        frame = self.to_dataframe().groupby("kind", sort=False)
        frame = frame.agg(
            draws=("loss", "size"), n_nodes=("n_nodes", "mean"), shared=("shared", "mean"),
            loss=("loss", "mean"), spread=("loss", "std"), accuracy=("accuracy", "mean"),
        ).reset_index()  # fmt: skip
        line = (
            f"{self.n_nodes} nodes ablated: loss {self.model_loss:.3f} → {self.loss:.3f}; random "
            f"nodes {self.mean_loss('outside'):.3f}"
        )
        return frame_html(f"Necessity: {self.task}", line, frame)


def necessity(
    model: nn.Module,
    circuit: Circuit,
    task: Task,
    *,
    n_controls: int = 20,
    pairs: int = 128,
    split: Split = "held_out",
    seed: int = 0,
    values: Float[Tensor, " node"] | None = None,
) -> Necessity:
    """Inverse pruning: set exactly the circuit's nodes to their values in the full model.

    ``values`` are by default the circuit's means. Beside it ``n_controls`` random sets of each of
    four kinds (see :class:`Necessity`), all run together. Source: Gao et al. 2025, Figure 32,
    which has random nodes as its control; most nodes of a sparse model are silent on a task, so
    the ``matched`` sets are the harder control.

    Raises:
        ValueError: a circuit of another model, or fewer controls than one.
    """
    if n_controls < 1:
        raise ValueError(f"n_controls={n_controls} must be at least 1")
    circuit.check_model(model)
    index, kept = circuit.index, circuit.kept.cpu()
    values = (circuit.means.values if values is None else values).cpu()
    batch = task.batch(pairs, split=split, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with eval_mode(model):
        moved, degree = displacement(model, index, values, batch), degrees(model, index)
        cut = [("none", 0, torch.zeros_like(kept)), ("circuit", 0, kept)]
        for kind in CONTROLS:
            alike = degree if kind == "degree" else moved
            cut += [
                (kind, draw, control(kind, index, kept, alike, generator))
                for draw in range(n_controls)
            ]
        keep = ~torch.stack([mask for _, _, mask in cut])
        logit_diffs = masked_logit_diffs(model, batch, index, keep, values).cpu()
    sets = pd.DataFrame(
        {
            "kind": [kind for kind, _, _ in cut],
            "draw": [draw for _, draw, _ in cut],
            "n_nodes": [int(mask.sum()) for _, _, mask in cut],
            "shared": [int((mask & kept).sum()) for _, _, mask in cut],
        }
    )
    return Necessity(
        task=task.name,
        n_nodes=int(kept.sum()),
        sets=sets,
        losses=F.softplus(-logit_diffs),
        prompts=batch.prompts,
        split=split,
        seed=seed,
    )


def control(
    kind: str,
    index: NodeIndex,
    kept: Bool[Tensor, " node"],
    alike: Float[Tensor, " node"],
    generator: torch.Generator,
) -> Bool[Tensor, " node"]:
    """A random set of nodes with the circuit's numbers at every layer and site.

    ``alike`` is what each node of a ``matched`` or ``degree`` set has in common with a node of the
    circuit: how far ablation moves it (:func:`displacement`), or its number of weights
    (:func:`degrees`).

    Raises:
        ValueError: unknown kind.
    """
    widths = torch.tensor([piece.stop - piece.start for piece in index.slices.values()])
    group = torch.arange(len(widths)).repeat_interleave(widths)
    return control_units(kind, group, kept, alike, generator)


def control_units(
    kind: str,
    group: Int[Tensor, " unit"],
    kept: Bool[Tensor, " unit"],
    alike: Float[Tensor, " unit"],
    generator: torch.Generator,
) -> Bool[Tensor, " unit"]:
    """:func:`control` for any units in groups, of each of which it has as many as ``kept``.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in CONTROLS:
        raise ValueError(f"unknown control {kind!r}: choose from {', '.join(CONTROLS)}")
    mask = torch.zeros_like(kept)
    for number in group.unique().tolist():
        here = torch.nonzero(group == number).flatten()
        inside = here[kept[here]]
        pool = here if kind == "anywhere" else here[~kept[here]]
        if kind in ("matched", "degree"):
            chosen = nearest_values(alike[inside], alike[pool], generator)
        else:
            chosen = torch.randperm(len(pool), generator=generator)[: len(inside)]
        mask[pool[chosen]] = True
    return mask


def nearest_values(
    wanted: Float[Tensor, " wanted"], pool: Float[Tensor, " pool"], generator: torch.Generator
) -> Int[Tensor, " chosen"]:
    """For each wanted value a place in the pool, drawn among the nearest values, none twice.

    A pool that is too small is used up.
    """
    order = torch.randperm(len(pool), generator=generator)  # equal values in random order
    order = order[pool[order].argsort(stable=True)]
    places, values = order.tolist(), pool[order].tolist()
    turns = torch.randperm(len(wanted), generator=generator)[: len(pool)]
    draws = torch.rand(len(turns), generator=generator).tolist()
    chosen = []
    for value, draw in zip(wanted[turns].tolist(), draws, strict=True):
        at = bisect_left(values, value)
        window = range(max(0, at - NEAREST), min(len(values), at + NEAREST))
        apart = sorted((abs(values[i] - value), i) for i in window)[:NEAREST]
        one = apart[int(draw * len(apart))][1]
        chosen.append(places.pop(one))
        values.pop(one)
    return torch.tensor(chosen, dtype=torch.int64)


def degrees(model: nn.Module, index: NodeIndex) -> Float[Tensor, " node"]:
    """Nonzero weights into and out of every node, by the matrices that write and read its site.

    Raises:
        ValueError: nodes at a hook that is no site's, so that no matrix is known to meet them.
    """
    blocks: Any = model.blocks
    rows = {
        name.format(layer=layer): (layer, row)
        for row in SITES
        for name in (row.hook, row.plain_hook)
        for layer in range(len(blocks))
    }
    if unknown := [name for name in index.slices if name not in rows]:
        raise ValueError(f"no weights are known to meet the channels of {', '.join(unknown)}")
    found = {}
    for name in index.slices:
        layer, row = rows[name]
        into = [_nonzero(model, layer, matrix).sum(0) for matrix in row.written_by]
        out = [_nonzero(model, layer, matrix).sum(1) for matrix in row.read_by]
        found[name] = torch.stack([*into, *out]).sum(0).float().cpu()
    return index.flat(found)


def _nonzero(model: nn.Module, layer: int, matrix: str) -> Bool[Tensor, "source target"]:
    """Which entries of a matrix are not zero; of a gated MLP's two reads, where either is not."""
    whole: Any = model
    if matrix not in BLOCK_MATRICES:
        return getattr(whole, matrix).detach() != 0
    mlp: Any = getattr(whole.blocks[layer], "mlp", None)
    if matrix == "W_in" and getattr(mlp, "W_gate", None) is not None:
        return (mlp.W_in.detach() != 0) | (mlp.W_gate.detach() != 0)
    return input_major(model, layer, matrix) != 0


@torch.no_grad()
def displacement(
    model: nn.Module, index: NodeIndex, values: Float[Tensor, " node"], batch: TaskBatch
) -> Float[Tensor, " node"]:
    """Mean |x - value| of every node over the prompts' real positions: what ablation moves."""
    found: dict[str, Tensor] = {}

    def measure(x: Tensor, hook: Any = None, *, name: str, last: Tensor) -> None:
        apart = (x - broadcast(values[index.slices[name]].to(x)[None], x)[0]).abs()
        real = torch.arange(x.shape[1], device=x.device) <= last.to(x.device)[:, None]
        found[name] = apart.flatten(2)[real].double().mean(0).float().cpu()

    hooks: list[Any] = [
        (name, partial(measure, name=name, last=batch.last)) for name in index.slices
    ]
    task_logit_diffs(model, batch, hooks)
    return index.flat(found)
