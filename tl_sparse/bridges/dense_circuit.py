"""What a circuit of the sparse model names in the dense one: subspaces that are read and written.

It comes as a :class:`~tl_sparse.circuits.Circuit` of :class:`~tl_sparse.bridges.BridgedDense`, so
that the faithfulness suite judges it like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparse.ablation import activation_means
from tl_sparse.ablation.recording import each_activation
from tl_sparse.bridges.bridged_dense import BridgedDense
from tl_sparse.bridges.directions import Pair
from tl_sparse.circuits import Circuit, circuit_of_nodes
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import Task
from tl_sparse.views import PageCircuit
from tl_sparse.views.display import frame_html

POINTS = {"attn_in": ("attn", "in"), "attn_out": ("attn", "out"),
          "mlp_in": ("mlp", "in"), "mlp_out": ("mlp", "out")}  # fmt: skip
"""Sites of the nodes that have a place in the dense model → sublayer and side there."""
DRAWN_BY = ("steps", "batch_pairs", "selection_pairs", "seed")
"""Settings of pruning that decide which prompts a circuit is found on."""


@dataclass(frozen=True, eq=False)
class DenseCircuit:
    """A circuit of the sparse model, in the dense model."""

    model: BridgedDense
    """The dense model, hooked in the sparse model's channels: what ``circuit`` is a circuit of."""
    circuit: Circuit
    """Its nodes are the sparse circuit's, as they are read in the dense model; all else that the
    dense model's sublayers read (and write) is set to its mean."""
    subspaces: pd.DataFrame
    """A row per sublayer's read or write: layer, part, side, dense_hook; nodes (kept ones), dims
    (of the subspace that they span in the dense activation), explained (share of the dense
    activation's variance over the text that the kept nodes' decoded values account for; below zero
    where decoding them is worse than the mean), random (the same of as many random other nodes)."""
    without: tuple[str, ...]
    """Nodes of the sparse circuit that are none of ``circuit``: queries, keys, values and neurons,
    as bridges do not say what happens inside a sublayer, and writes if these were left out."""

    def to_dataframe(self) -> pd.DataFrame:
        """The subspaces."""
        return self.subspaces

    @property
    def line(self) -> str:
        """The facts in one line."""
        shown = self.subspaces[self.subspaces["nodes"] > 0]
        return (
            f"{int(shown['nodes'].sum())} nodes at {len(shown)} reads and writes of the dense "
            f"model, {self.circuit.n_nodes} of them in its circuit; {len(self.without)} of the "
            "sparse circuit's nodes are not"
        )

    def write_page(
        self,
        path: str | Path,
        task: Task | None = None,
        tokens: Int[Tensor, "sequence pos"] | None = None,
        beside: Sequence[PageCircuit] = (),
    ) -> Path:
        """Write the circuit as one self-contained page to click through; returns its path.

        See :meth:`Circuit.write_page <tl_sparse.circuits.Circuit.write_page>`; ``beside`` it may
        stand the sparse model's, from ``circuits.page_circuit``.
        """
        return self.circuit.write_page(
            path, self.model, task, tokens, beside=beside, label="in the dense model"
        )

    def __repr__(self) -> str:
        return f"DenseCircuit({self.circuit.task}: {self.line})"

    def _repr_html_(self) -> str:
        return frame_html(f"In the dense model: {self.circuit.task}", self.line, self.subspaces)


def dense_circuit(
    pair: Pair,
    circuit: Circuit,
    tokens: Int[Tensor, "sequence pos"],
    *,
    writes: bool = True,
    errors: bool = True,
    draws: int = 10,
    seed: int = 0,
) -> DenseCircuit:
    """A circuit of the sparse model as a circuit of the dense one.

    ``evaluate(found.model, found.circuit, task, tokens=tokens)`` judges it.

    Args:
        pair: The models and their bridges.
        circuit: A circuit of ``pair.sparse``.
        tokens: Text over which means, the ratio of the streams' sizes and shares of variance are
            taken.
        writes: Whether what the dense model's sublayers write goes through the bridges as well;
            else only what they read.
        errors: Whether what the bridges miss of a dense activation passes as it is. Else it is
            removed (a component at every place), and the dense model runs on decoded nodes alone,
            as no fitted bridge is good enough for.
        draws: Random sets of other nodes for ``subspaces``.
        seed: Theirs.

    Raises:
        ValueError: a circuit of another model, or without any node in the residual stream.
    """
    circuit.check_model(pair.sparse)
    model = BridgedDense(pair, tokens)
    index = model.index(errors=not errors, writes=writes)
    means = activation_means(model, tokens, index=index)
    every_place = model.index(errors=False)
    shown, _ = dense_nodes(pair, circuit, every_place)
    kept, without = dense_nodes(pair, circuit, index)
    if not any(bool(mask.any()) for mask in kept.values()):
        raise ValueError(
            f"the circuit of {circuit.task} has no node that the bridges reach: they reach "
            f"{', '.join(POINTS)}"
        )
    every: dict[str, Tensor] = {}
    groups, start = [], 0
    for name, piece in index.slices.items():
        width = piece.stop - piece.start
        apart = torch.arange(width)
        if "error" in name:  # what is missed at a place is one thing
            apart, every[name] = torch.zeros_like(apart), torch.zeros(width, dtype=torch.bool)
        else:
            every[name] = kept[name]
        groups.append(start + apart)
        start = int(groups[-1].max()) + 1
    found = circuit_of_nodes(model, circuit.task, index.flat(every), means, torch.cat(groups))
    drawn_by = {name: circuit.config[name] for name in DRAWN_BY if name in circuit.config}
    # the prompts that the sparse circuit was found on are none to test this one on
    found = replace(found, config=drawn_by, seed=circuit.seed)
    subspaces = subspaces_of(model, shown, tokens, draws, seed)
    return DenseCircuit(model, found, subspaces, without)


def dense_nodes(
    pair: Pair, circuit: Circuit, index: NodeIndex
) -> tuple[dict[str, Bool[Tensor, " channel"]], tuple[str, ...]]:
    """A circuit's kept channels at every bridged hook of an index, and the names of its nodes that
    have none."""
    width = int(pair.sparse.cfg.d_model)  # type: ignore[union-attr, arg-type]
    kept = {
        name: torch.zeros(width, dtype=torch.bool) for name in index.slices if "error" not in name
    }
    without = []
    for row in circuit.nodes.itertuples(index=False):
        part, side = POINTS.get(row.site, ("", ""))
        name = f"blocks.{row.layer}.{part}.hook_bridged_{side}"
        if name in kept and row.channel < width:
            kept[name][row.channel] = True
        else:
            without.append(str(row.name))
    return kept, tuple(without)


def subspaces_of(
    model: BridgedDense,
    kept: Mapping[str, Bool[Tensor, " channel"]],
    tokens: Int[Tensor, "sequence pos"],
    draws: int,
    seed: int,
) -> pd.DataFrame:
    """The columns of :attr:`DenseCircuit.subspaces`."""
    generator = torch.Generator().manual_seed(seed)
    sets = {name: with_random(mask, draws, generator) for name, mask in kept.items()}
    totals: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}
    values: dict[str, Tensor] = {}

    def look(name: str, x: Tensor, first: int) -> None:
        if "error" not in name:
            values[name] = x.flatten(0, 1).double()
            return
        name = name.replace("error", "bridged")
        z, vectors = values.pop(name), model.directions(name).double()
        dense = x.flatten(0, 1).double() + z @ vectors
        left = torch.stack([dense, *(dense - (z * mask) @ vectors for mask in sets[name].to(z))])
        sums = totals.setdefault(name, [torch.zeros(()), torch.zeros(())])
        sums[0] = sums[0].to(left) + left.sum(1)
        sums[1] = sums[1].to(left) + left.pow(2).sum((1, 2))
        counts[name] = counts.get(name, 0) + left.shape[1]

    index = model.index()
    each_activation(model, tokens, index, look, batch_size=32)
    rows = []
    for name, mask in kept.items():
        n = counts[name]
        variance = totals[name][1] / n - (totals[name][0] / n).pow(2).sum(1)
        explained = 1 - variance[1:] / variance[0]
        _, layer, part, point = name.split(".")
        chosen = int(mask.sum())
        dims = int(torch.linalg.matrix_rank(model.directions(name)[mask].double())) if chosen else 0
        rows.append(
            [int(layer), part, "reads" if point.endswith("in") else "writes",
             model.dense_hook(name), chosen, dims, float(explained[0]),
             float(explained[1:].mean()) if draws else math.nan]
        )  # fmt: skip
    columns = ["layer", "part", "side", "dense_hook", "nodes", "dims", "explained", "random"]
    return pd.DataFrame(rows, columns=columns)


def with_random(
    mask: Bool[Tensor, " channel"], draws: int, generator: torch.Generator
) -> Bool[Tensor, "set channel"]:
    """A set of channels, and random ones of as many others."""
    others = torch.nonzero(~mask).flatten()
    found = mask.repeat(1 + draws, 1)
    for row in found[1:]:
        row[:] = False
        row[others[torch.randperm(len(others), generator=generator)[: int(mask.sum())]]] = True
    return found
