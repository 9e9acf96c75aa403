"""How much of a task's effect goes through the circuit's nodes, in the dense and the sparse model.

At one read or write of a model everything but some channels is set to its mean over text. Between
nothing left (all at the mean) and everything left the task's logit difference comes back, and the
share that comes back with the circuit's channels alone is what they carry. Beside it: as many
random channels that the circuit does not keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.ablation import activation_means
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.masked_forward import masked_logit_diffs
from tl_sparse.bridges.bridged_dense import BridgedDense
from tl_sparse.bridges.dense_circuit import POINTS, dense_nodes, with_random
from tl_sparse.bridges.directions import Pair
from tl_sparse.circuits import Circuit
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import TaskBatch
from tl_sparse.views.chart import Look, Panel, chart
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

SITE_OF = {point: site for site, point in POINTS.items()}
LEAST = 0.05  # nats of logit difference between all and nothing, below which shares say nothing


@dataclass(frozen=True, eq=False)
class CarriedEffect:
    """The logit difference with parts of one read or write, or of all of them, left alone."""

    task: str
    """Name of the task."""
    runs: pd.DataFrame
    """A row per run: model (dense, sparse), place (``0.attn_in``, ..., or ``all``), kind, draw,
    nodes. Kinds: ``all``, nothing set; ``none``, everything there at its mean; ``kept``, the
    circuit's channels alone left; ``others``, as many random channels alone that it does not keep;
    ``all but kept``; ``all but others``."""
    logit_diffs: Float[Tensor, "run prompt"]
    """logit(correct) - logit(incorrect) of each prompt."""
    prompts: tuple[str, ...]
    """The prompts."""

    def to_dataframe(self) -> pd.DataFrame:
        """A row per model and place: nodes, effect (mean logit difference of all less that of
        none, in nats), carried (the share of it that the kept nodes alone bring back), others and
        others_most (the mean and the most that random ones bring back), lost (the share that goes
        where the kept ones alone are set to their means), lost_others (the mean for random ones).
        Shares are NaN where the effect is below 0.05 nats, also where it is negative.
        """
        frame = self.runs.assign(mean=self.logit_diffs.double().mean(1).tolist())
        rows = []
        for (model, place), same in frame.groupby(["model", "place"], sort=False):
            mean = same.groupby("kind")["mean"].mean()
            most = same.loc[same["kind"] == "others", "mean"].max()
            effect = mean["all"] - mean["none"]
            share = effect if effect >= LEAST else math.nan
            alone = [(value - mean["none"]) / share for value in
                     (mean["kept"], mean["others"], most)]  # fmt: skip
            lost = [(mean["all"] - mean[f"all but {kind}"]) / share for kind in ("kept", "others")]
            rows.append([model, place, int(same["nodes"].iloc[0]), effect, *alone, *lost])
        columns = ["model", "place", "nodes", "effect", "carried", "others", "others_most", "lost",
                   "lost_others"]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def examples(self) -> pd.DataFrame:
        """A row per run and prompt."""
        n = len(self.prompts)
        frame = self.runs.loc[self.runs.index.repeat(n)].reset_index(drop=True)
        return frame.assign(
            prompt=self.prompts * len(self.runs), logit_diff=self.logit_diffs.flatten().tolist()
        )

    def to_plotly(self) -> go.Figure:
        """Both models side by side: the share that the kept nodes carry at each place, and random
        ones."""
        frame = self.to_dataframe()
        panels = []
        for model in ("sparse", "dense"):
            here = frame[(frame["model"] == model) & (frame["nodes"] > 0)]
            series = {"the circuit's nodes alone": "carried", "as many others alone": "others",
                      "lost without the circuit's nodes": "lost",
                      "lost without as many others": "lost_others"}  # fmt: skip
            points = pd.concat(
                [pd.DataFrame({"series": name, "x": here["place"], "y": here[column]})
                 for name, column in series.items()]
            )  # fmt: skip
            panels.append(Panel(points, y_label="share of the effect", title=f"{model} model"))
        return chart(
            f"What the circuit's nodes carry: {self.task}", panels, look=Look("bars"),
            note="Alone: all else at that place is set to its mean, and so much of the logit "
            "difference is left. Lost: the nodes themselves are, and so much of it goes.",
        )  # fmt: skip

    @property
    def line(self) -> str:
        """The facts in one line."""
        every = self.to_dataframe().query("place == 'all'").set_index("model")
        parts = [
            f"{model} {every.loc[model, 'carried']:.2f} of {every.loc[model, 'effect']:.2f} nats "
            f"(random {every.loc[model, 'others']:.2f})"
            for model in every.index
        ]
        return f"all places at once, kept nodes alone: {', '.join(parts)}"

    def __repr__(self) -> str:
        return f"CarriedEffect({self.task}: {self.line})"

    def _repr_html_(self) -> str:
        return frame_html(f"Carried: {self.task}", self.line, self.to_dataframe())


@torch.no_grad()
def carried_effect(
    pair: Pair,
    circuit: Circuit,
    batch: TaskBatch,
    tokens: Int[Tensor, "sequence pos"],
    *,
    writes: bool = False,
    draws: int = 10,
    seed: int = 0,
) -> CarriedEffect:
    """What a sparse circuit's nodes carry of its task's effect, place by place, in both models.

    In the dense model a place is what one of its sublayers reads (or writes): the bridged channels,
    by the encoder's reading, and the rest that the bridges miss, which is set to its mean with all
    the others.

    Args:
        pair: The models and their bridges.
        circuit: A circuit of ``pair.sparse``.
        batch: Prompts of the circuit's task, with answers.
        tokens: Text over which means and the ratio of the streams' sizes are taken.
        writes: Whether places where sublayers write count too.
        draws: Random sets of as many other channels, at each place.
        seed: Theirs.

    Raises:
        ValueError: a circuit of another model, one without any node in the residual stream, or
            fewer than one draw.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1")
    circuit.check_model(pair.sparse)
    bridged = BridgedDense(pair, tokens)
    kept, _ = dense_nodes(pair, circuit, bridged.index(errors=False, writes=writes))
    kept = {name: mask for name, mask in kept.items() if bool(mask.any())}
    if not kept:
        raise ValueError(f"the circuit of {circuit.task} has no node that the bridges reach")
    generator = torch.Generator().manual_seed(seed)
    sets = {name: with_random(mask, draws, generator) for name, mask in kept.items()}
    tables, values = [], []
    every = NodeIndex.of(pair.sparse, tuple(POINTS))
    hooks: dict[str, dict[str, tuple[str, ...]]] = {
        "sparse": {name: (_sparse_hook(every, name),) for name in kept},
        "dense": {name: (name, name.replace("bridged", "error")) for name in kept},
    }
    for side, model, index in (
        ("sparse", pair.sparse, _sparse_index(pair, kept)),
        ("dense", bridged, _dense_index(bridged, kept)),
    ):
        means = activation_means(model, tokens, index=index).values
        table, masks = _masks(side, index, hooks[side], sets)
        with eval_mode(model), torch.no_grad():
            values.append(masked_logit_diffs(model, batch, index, masks, means).cpu())
        tables.append(table)
    return CarriedEffect(
        circuit.task, pd.concat(tables, ignore_index=True), torch.cat(values), batch.prompts
    )


def _place(name: str) -> str:
    _, layer, part, point = name.split(".")
    return f"{layer}.{SITE_OF[part, point.rpartition('_')[2]]}"


def _dense_index(model: BridgedDense, kept: Mapping[str, Tensor]) -> NodeIndex:
    every = model.index()
    names = [*kept, *(name.replace("bridged", "error") for name in kept)]
    return NodeIndex.over(
        model, {name: _width(every, name) for name in every.slices if name in names}
    )


def _sparse_index(pair: Pair, kept: Mapping[str, Tensor]) -> NodeIndex:
    every = NodeIndex.of(pair.sparse, tuple(POINTS))
    hooks = [_sparse_hook(every, name) for name in kept]
    return NodeIndex.over(pair.sparse, {name: _width(every, name) for name in hooks})


def _sparse_hook(index: NodeIndex, name: str) -> str:
    layer, _, site = _place(name).partition(".")
    return index.hook(int(layer), site)


def _width(index: NodeIndex, name: str) -> int:
    return index.slices[name].stop - index.slices[name].start


def _masks(
    side: str,
    index: NodeIndex,
    hooks: Mapping[str, tuple[str, ...]],
    sets: Mapping[str, Bool[Tensor, "set channel"]],
) -> tuple[pd.DataFrame, Bool[Tensor, "run node"]]:
    """Every run's mask: at each place alone, and at all of them at once.

    ``hooks`` are those of each place, its channels' first; channels behind these (concatenated
    positions) are left alone, and what is at its second hook is set with the channels.
    """
    rows, masks = [], []
    for place, names in {**{_place(name): [name] for name in sets}, "all": list(sets)}.items():
        if place == "all" and len(sets) == 1:
            continue
        draws = len(sets[names[0]])
        chosen: list[tuple[str, int, int | None, bool]]
        chosen = [("all", 0, None, True), ("none", 0, None, False)]
        for row in range(draws):
            whose, number = ("kept", 0) if row == 0 else ("others", row - 1)
            chosen += [(whose, number, row, True), (f"all but {whose}", number, row, False)]
        for kind, number, draw, left in chosen:
            mask = torch.ones(index.n_nodes, dtype=torch.bool)
            for name in names:
                channels, *rest = (index.slices[hook] for hook in hooks[name])
                width = sets[name].shape[1]
                piece = slice(channels.start, channels.start + width)
                if draw is None:
                    mask[piece] = left
                else:
                    mask[piece] = sets[name][draw] == left
                for error in rest:
                    mask[error] = kind.startswith("all")
            masks.append(mask)
            rows.append(
                [side, place, kind, number, sum(int(sets[name][0].sum()) for name in names)]
            )
    return pd.DataFrame(rows, columns=["model", "place", "kind", "draw", "nodes"]), torch.stack(
        masks
    )
