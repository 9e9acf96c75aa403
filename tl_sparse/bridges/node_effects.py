"""Each node of a sparse circuit, moved in the sparse model and in the dense one, side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.bridges.curves import CONTROLS
from tl_sparse.bridges.dense_circuit import POINTS
from tl_sparse.bridges.directions import Pair, bridged_nodes
from tl_sparse.bridges.steered_runs import steering_curves
from tl_sparse.circuits import Circuit
from tl_sparse.nodes.patching import patch_nodes
from tl_sparse.nodes.prompts import Positions, Prompts, PromptsLike
from tl_sparse.tasks import TaskBatch
from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class NodeEffects:
    """What moving single nodes to what they are on the other prompt does to the logit difference.

    An effect is how far logit(incorrect) - logit(correct) rises, in nats: positive where the node
    speaks for the answer of the prompt that it comes from.
    """

    task: str
    """Name of the task."""
    nodes: tuple[str, ...]
    """The nodes, under OpenAI's names."""
    sparse: Float[Tensor, "node prompt"]
    """The effect in the sparse model, patched."""
    dense: Float[Tensor, "node prompt"]
    """The effect in the dense model, steered at strength 1."""
    controls: pd.DataFrame
    """The effects of each node's controls in the dense model, means over prompts: node, kind, draw,
    effect; kinds as in :class:`~tl_sparse.bridges.SteeringCurves`."""
    gap: tuple[float, float]
    """How far all of it is, in the sparse and in the dense model: twice the mean logit difference
    of the prompts, since a partner's answer is the other one."""
    prompts: tuple[str, ...]
    """The prompts."""

    def to_dataframe(self) -> pd.DataFrame:
        """A row per node: node, sparse, dense (mean effects in nats), sparse_share and dense_share
        (of the gap), same_sign (whether both are positive or both negative), and of its controls
        control (mean) and control_most (the largest in size)."""
        frame = pd.DataFrame(
            {
                "node": self.nodes,
                "sparse": self.sparse.double().mean(1).tolist(),
                "dense": self.dense.double().mean(1).tolist(),
            }
        )
        frame["sparse_share"] = frame["sparse"] / self.gap[0]
        frame["dense_share"] = frame["dense"] / self.gap[1]
        frame["same_sign"] = frame["sparse"] * frame["dense"] > 0
        by_node = self.controls.groupby("node")["effect"]
        frame["control"] = frame["node"].map(by_node.mean())
        return frame.assign(control_most=frame["node"].map(by_node.apply(lambda x: x.abs().max())))

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of the nodes' mean effects in the two models; NaN for fewer
        than three nodes."""
        from scipy.stats import spearmanr

        frame = self.to_dataframe()
        if len(frame) < 3:
            return math.nan
        return float(spearmanr(frame["sparse"], frame["dense"]).statistic)

    def to_plotly(self) -> go.Figure:
        """Every node's effect in the dense model against that in the sparse one, its controls at
        the same place."""
        frame = self.to_dataframe()
        points = pd.DataFrame(
            {"series": "the circuit's nodes", "x": frame["sparse"], "y": frame["dense"],
             "label": frame["node"].where(frame["sparse"].abs() > 0.1 * abs(self.gap[0]), ""),
             "hover": frame["node"]}
        )  # fmt: skip
        low, high = float(frame["sparse"].min()), float(frame["sparse"].max())
        where = frame.set_index("node")["sparse"]
        controls = pd.DataFrame(
            {"series": self.controls["kind"], "x": self.controls["node"].map(where),
             "y": self.controls["effect"], "label": "",
             "hover": self.controls["kind"] + " for " + self.controls["node"]}
        )  # fmt: skip
        panel = Panel(
            pd.concat([points, controls]), y_level=(0.0, ""),
            x_label="effect in the sparse model (nats)", y_label="effect in the dense model (nats)",
            x_range=(low - 0.05 * (high - low), high + 0.2 * (high - low)),
        )  # fmt: skip
        looks = {kind: Look(colour="#9aa3af", symbol=mark, size=6)
                 for kind, mark in zip(CONTROLS, ("circle-open", "x", "diamond-open"),
                                       strict=True)}  # fmt: skip
        return chart(f"Nodes moved in both models: {self.task}", [panel], looks=looks)

    @property
    def line(self) -> str:
        """The facts in one line."""
        frame = self.to_dataframe()
        beats = (frame["dense"].abs() > frame["control_most"]).sum()
        return (
            f"{len(frame)} nodes; rank correlation {self.correlation:.2f}, same sign in "
            f"{int(frame['same_sign'].sum())}, larger in the dense model than all controls in "
            f"{int(beats)}"
        )

    def __repr__(self) -> str:
        return f"NodeEffects({self.task}: {self.line})"

    def _repr_html_(self) -> str:
        return frame_html(
            f"Nodes moved in both models: {self.task}", self.line, self.to_dataframe()
        )


@torch.no_grad()
def node_effects(
    pair: Pair,
    circuit: Circuit,
    batch: TaskBatch,
    *,
    positions: Positions = None,
    reference: PromptsLike | Prompts | None = None,
    draws: int = 3,
    seed: int = 0,
) -> NodeEffects:
    """Move every node of a sparse circuit that bridges reach to what it is on the partner's prompt:
    in the sparse model by patching, in the dense model by steering at strength 1.

    Args:
        pair: The models and their bridges.
        circuit: A circuit of ``pair.sparse``.
        batch: Prompts of its task.
        positions: Where; every position (prompts of equal lengths), ``"last"``, or some.
        reference: Text for the ratio of the streams' sizes; by default the prompts.
        draws: Random directions and shuffled bridges of each node.
        seed: Theirs.

    Raises:
        ValueError: a circuit of another model, without any node in the residual stream, prompts
            that do not fit each other, or fewer than one draw.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1")
    circuit.check_model(pair.sparse)
    names = list(circuit.nodes[circuit.nodes["site"].isin(list(POINTS))]["name"])
    if not names:
        raise ValueError(f"the circuit of {circuit.task} has no node that the bridges reach")
    nodes = [str(node) for node in bridged_nodes(pair, names)]
    sparse = patch_nodes(pair.sparse, batch, None, nodes, positions=positions)
    curves = steering_curves(
        pair, batch, nodes, strengths=(1.0,), positions=positions, reference=reference,
        draws=draws, seed=seed, task=circuit.task,
    )  # fmt: skip
    base = (curves.base_other / curves.base_correct).log()
    effects = (curves.p_other[:, 0] / curves.p_correct[:, 0]).log() - base
    kinds = curves.curves["kind"]
    controls = curves.curves[kinds.isin(CONTROLS) & (curves.curves["of"] != "together")]
    table = controls[["of", "kind", "draw"]].rename(columns={"of": "node"})
    means = effects.double().mean(1)
    mine = effects[torch.tensor((kinds == "node").to_numpy())]
    return NodeEffects(
        circuit.task, tuple(nodes), -sparse.effects, mine,
        table.assign(effect=means[torch.tensor(controls.index.to_numpy())].tolist()),
        (2 * float(sparse.base.mean()), -2 * float(base.mean())), batch.prompts,
    )  # fmt: skip
