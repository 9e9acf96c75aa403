"""Can a circuit run on two values a node? (Gao et al. 2025, appendix C.)

Every kept node's activation x is replaced by ψ_t(x; l, r), a mixture of the identity (t = 1) and of
a step from l to r at their midpoint (t = 0); t falls during training, in which only l and r are
learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.analyses.figures import binarise_figure
from tl_sparse.analyses.runs import CHANCE, accuracy, channels, prompt_logit_diffs
from tl_sparse.circuits import Circuit
from tl_sparse.progress import progress_bar
from tl_sparse.sites import Affine, NodeIndex
from tl_sparse.storage.json_dataclass import check_fields
from tl_sparse.tasks import Task, TaskBatch
from tl_sparse.tasks.padding import real_positions
from tl_sparse.views.brief import brief
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

QUARTERS = (0.25, 0.5, 0.75)  # of a node's observed range: the thresholds tried for the first l, r
HARD = 1e-4  # below this t the mixture is a step to float32
MAX_POOL = 2048  # distinct training pairs
SAMPLES = 128  # training pairs on which the nodes' ranges are observed


@dataclass(frozen=True)
class BinariseConfig:
    """How the two values of every node are trained."""

    steps: int = 200
    """Training steps; 0 leaves the first guess as it is."""
    batch_pairs: int = 32
    """Prompt pairs per step."""
    lr: float = 0.02
    """Adam's learning rate in units of each node's observed range, decayed linearly to 0."""
    power: float = 5.0
    """t = (1 - progress) ** power; the paper's is 5."""
    report_pairs: int = 128
    """Held-out pairs on which losses are reported."""
    seed: int = 0
    """Seed of the prompts."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_pairs < 1 or self.report_pairs < 1:
            raise ValueError("steps must be at least 0, batch_pairs and report_pairs at least 1")
        if not self.lr > 0 or not self.power > 0:
            raise ValueError(f"lr={self.lr} and power={self.power} must be positive")
        check_fields(self)


@dataclass(frozen=True, eq=False)
class Binarisation:
    """A circuit whose nodes take two values each, and what that costs on held-out prompts."""

    task: str
    """Name of the task."""
    circuit: Circuit
    """The circuit that was binarised."""
    places: Int[Tensor, " kept"]
    """The kept nodes' numbers in ``circuit.index``."""
    low: Float[Tensor, " kept"]
    """The smaller value of every node."""
    high: Float[Tensor, " kept"]
    """The larger one; a node takes it from the midpoint of both on."""
    share_high: Float[Tensor, " kept"]
    """Share of the sampled training positions at which the node's input is past the midpoint."""
    losses_before: Float[Tensor, " prompt"]
    """Two-way cross-entropy (nats) of each held-out prompt under the circuit's own hooks."""
    losses_first: Float[Tensor, " prompt"]
    """The same with the untrained values, the best of three thresholds."""
    losses: Float[Tensor, " prompt"]
    """The same with the trained values."""
    prompts: tuple[str, ...]
    """The held-out prompts; rows 2i and 2i+1 are a pair."""
    history: pd.DataFrame
    """Training: step, t, loss."""
    config: BinariseConfig
    """How it was trained."""

    def __repr__(self) -> str:
        return brief(self)

    @property
    def loss_before(self) -> float:
        """The circuit's mean loss in nats."""
        return float(self.losses_before.mean())

    @property
    def loss(self) -> float:
        """The binarised circuit's mean loss in nats."""
        return float(self.losses.mean())

    @property
    def accuracy_before(self) -> float:
        """Share of prompts that the circuit answers right."""
        return accuracy(self.losses_before)

    @property
    def accuracy(self) -> float:
        """Share of prompts that the binarised circuit answers right."""
        return accuracy(self.losses)

    @property
    def nodes(self) -> pd.DataFrame:
        """A row per kept node: the circuit's columns, low, high, share_high."""
        values = {"low": self.low, "high": self.high, "share_high": self.share_high}
        return self.circuit.nodes.assign(**{name: x.numpy() for name, x in values.items()})

    def hooks(self) -> list[FwdHook]:
        """Hooks of the binarised circuit, for ``run_with_hooks``: the circuit's, then the steps."""
        return [
            *self.circuit.hooks(),
            *steps(self.circuit.index, self.places, self.low, self.high, 0.0),
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """A row per held-out prompt: task, prompt, loss_before, loss_first, loss, correct."""
        return pd.DataFrame(
            {
                "task": self.task,
                "prompt": self.prompts,
                "loss_before": self.losses_before.numpy(),
                "loss_first": self.losses_first.numpy(),
                "loss": self.losses.numpy(),
                "correct": (self.losses < CHANCE).numpy(),
            }
        )

    def to_plotly(self) -> go.Figure:
        """Losses before, with the first values, and with the trained ones (compare Figure 34)."""
        return binarise_figure(self.to_dataframe())

    def _repr_html_(self) -> str:
        line = (
            f"{len(self.low)} nodes, loss {self.loss_before:.3f} → {self.loss:.3f}, "
            f"accuracy {self.accuracy_before:.2f} → {self.accuracy:.2f}"
        )
        columns = ["layer", "site", "channel", "low", "high", "share_high"]
        return frame_html(f"Binarised: {self.task}", line, self.nodes[columns])


def binarise(
    model: nn.Module,
    circuit: Circuit,
    task: Task,
    config: BinariseConfig | None = None,
    *,
    progress: bool = False,
) -> Binarisation:
    """Replace every kept node's activation by one of two trained values, and measure the loss.

    The values begin as the means below and above a threshold: of those at 1/4, 1/2 and 3/4 of the
    node's range on training prompts the one with the least squared error (the paper does not say by
    what the best is chosen). They are trained on the task loss while t = (1 - progress)⁵ turns ψ_t
    from the identity into the step. Removed nodes stay as the circuit has them. As the values are
    fitted to the task, the loss may fall below the circuit's: that is no faithfulness.

    Raises:
        ValueError: a circuit of another model, or one without nodes or without plain hooks.
    """
    config = config or BinariseConfig()
    circuit.check_model(model)
    places = torch.nonzero(circuit.kept.cpu()).flatten()
    if not len(places):
        raise ValueError(f"the circuit of {circuit.task} keeps no node: nothing to binarise")
    base, index = circuit.hooks(), circuit.index
    report = task.batch(config.report_pairs, split="held_out", seed=config.seed)
    pool = min(MAX_POOL, max(SAMPLES, config.steps * config.batch_pairs))
    train = task.batch(pool, split="train", seed=config.seed)
    with eval_mode(model):
        seen = observed(model, index, places, train.pairs(0, SAMPLES), base)
        first = first_values(seen)
        low, high, history = train_values(
            model, index, places, train, first, seen.amax(0) - seen.amin(0), config,
            lambda _: base, progress=progress,
        )  # fmt: skip
        losses = [
            F.softplus(-prompt_logit_diffs(model, report, [*base, *extra]))
            for extra in ([], steps(index, places, *first, 0.0),
                          steps(index, places, low, high, 0.0))
        ]  # fmt: skip
    low, high = torch.minimum(low, high).cpu(), torch.maximum(low, high).cpu()
    return Binarisation(
        task=task.name,
        circuit=circuit,
        places=places,
        low=low,
        high=high,
        share_high=(seen.cpu() >= (low + high) / 2).float().mean(0),
        losses_before=losses[0],
        losses_first=losses[1],
        losses=losses[2],
        prompts=report.prompts,
        history=history,
        config=config,
    )


def psi(
    x: Float[Tensor, "*any node"],
    low: Float[Tensor, " node"],
    high: Float[Tensor, " node"],
    t: float,
) -> Float[Tensor, "*any node"]:
    """ψ_t: x at t = 1, low or high at t = 0 (from the midpoint on high); both are fixed points.

    Between, t * x + (1 - t) * (a sigmoid in x of width t * (high - low), moved and stretched so
    that it passes through (low, low) and (high, high)).
    """
    gap = high - low
    apart = torch.where(gap.abs() < 1e-6, torch.full_like(gap, 1e-6), gap)
    u = (x - (low + high) / 2) / apart  # the fixed points are at -1/2 and 1/2
    if t < HARD:
        return torch.where(u >= 0, high, low)
    end = torch.sigmoid(torch.tensor(0.5 / t))
    share = (torch.sigmoid(u / t) - (1 - end)) / (2 * end - 1)
    return t * x + (1 - t) * (low + gap * share)


def first_values(
    seen: Float[Tensor, "sample kept"],
) -> tuple[Float[Tensor, " kept"], Float[Tensor, " kept"]]:
    """Means below and above a threshold in every node's range; the best threshold of three.

    The best is where a step between the two means has the least squared error.
    """
    least, most = seen.amin(0), seen.amax(0)
    best = torch.full_like(least, torch.inf)
    low, high = least.clone(), most.clone()
    for quarter in QUARTERS:
        above = seen >= least + quarter * (most - least)
        n_above = above.sum(0)
        n_below = len(seen) - n_above
        mean_above = (seen * above).sum(0) / n_above.clamp(min=1)
        # a node that never changes is all above: both its values are that one
        mean_below = torch.where(
            n_below > 0, (seen * ~above).sum(0) / n_below.clamp(min=1), mean_above
        )
        error = (psi(seen, mean_below, mean_above, 0.0) - seen).square().mean(0)
        better = error < best
        best = torch.where(better, error, best)
        low = torch.where(better, mean_below, low)
        high = torch.where(better, mean_above, high)
    return low, high


def train_values(
    model: nn.Module,
    index: NodeIndex,
    places: Int[Tensor, " kept"],
    train: TaskBatch,
    first: tuple[Float[Tensor, " kept"], Float[Tensor, " kept"]],
    spread: Float[Tensor, " kept"],
    config: BinariseConfig,
    hooks_of: Callable[[TaskBatch], Sequence[FwdHook]],
    *,
    progress: bool = False,
) -> tuple[Float[Tensor, " kept"], Float[Tensor, " kept"], pd.DataFrame]:
    """Low and high after training on the task loss with t falling, and the training's history.

    ``hooks_of`` are the circuit's hooks for some prompts.
    """
    moves = torch.zeros(2, len(places), device=spread.device, requires_grad=True)
    optimizer = torch.optim.Adam([moves], lr=config.lr)
    pool, rows = len(train) // 2, []
    for step in progress_bar(
        range(config.steps), desc="binarise", leave=False, disable=not progress
    ):
        done = step / config.steps
        t = (1 - done) ** config.power
        optimizer.param_groups[0]["lr"] = config.lr * (1 - done)
        start = (step * config.batch_pairs) % max(1, pool - config.batch_pairs + 1)
        batch = train.pairs(start, start + config.batch_pairs)
        low, high = first[0] + spread * moves[0], first[1] + spread * moves[1]
        hooks = [*hooks_of(batch), *steps(index, places, low, high, t)]
        loss = F.softplus(-task_logit_diffs(model, batch, hooks)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows.append((step, t, float(loss.detach())))
    found = (first[i] + spread * moves[i].detach() for i in (0, 1))
    low, high = found
    return low, high, pd.DataFrame(rows, columns=["step", "t", "loss"])


@torch.no_grad()
def observed(
    model: nn.Module,
    index: NodeIndex,
    places: Int[Tensor, " kept"],
    batch: TaskBatch,
    hooks: Sequence[FwdHook],
) -> Float[Tensor, "sample kept"]:
    """What the nodes are at every real position of the prompts, under hooks."""
    found: list[Tensor] = []
    columns: dict[str, Tensor] = {}
    readers: list[Any] = [
        (hook, Read(columns, hook, channel, index))
        for hook, channel, _ in by_hook(index, places)
    ]  # fmt: skip
    for at in range(0, len(batch) // 2, SAMPLES):
        part = batch.pairs(at, at + SAMPLES)
        task_logit_diffs(model, part, [*hooks, *readers])
        joined = torch.cat([columns[hook] for hook, _, _ in by_hook(index, places)], dim=2)
        found.append(joined[real_positions(joined.shape[1], part.last.to(joined.device))])
    return torch.cat(found)


def by_hook(index: NodeIndex, places: Int[Tensor, " kept"]) -> list[tuple[str, Tensor, Tensor]]:
    """(hook name, channels there, which of ``places`` they are), in the order of ``places``."""
    groups = []
    for hook, piece in index.slices.items():
        here = torch.nonzero((places >= piece.start) & (places < piece.stop)).flatten()
        if len(here):
            groups.append((hook, places[here] - piece.start, here))
    return groups


def steps(
    index: NodeIndex,
    places: Int[Tensor, " kept"],
    low: Float[Tensor, " kept"],
    high: Float[Tensor, " kept"],
    t: float,
) -> list[FwdHook]:
    """Hooks that replace the nodes' activations by ψ_t of them."""
    return [
        (hook, Step(channel, low[which], high[which], t, index.norms.get(hook)))
        for hook, channel, which in by_hook(index, places)
    ]


class Step:
    """Hook function: ψ_t of some channels, the others as they are."""

    def __init__(
        self, channel: Tensor, low: Tensor, high: Tensor, t: float, norm: Affine | None = None
    ) -> None:
        self.channel, self.low, self.high, self.t, self.norm = channel, low, high, t, norm

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The activation with those channels replaced."""
        flat, channel = channels(x), self.channel.to(x.device)
        low, high = (value.to(x.device, x.dtype) for value in (self.low, self.high))
        value = flat[..., channel]
        if self.norm is None:
            value = psi(value, low, high, self.t)
        else:
            norm = self.norm.at(channel)
            value = norm.before(psi(norm.after(value), low, high, self.t)).to(x.dtype)
        return flat.index_copy(2, channel, value).view(x.shape)


class Read:
    """Hook function that keeps some channels under the hook's name, and changes nothing."""

    def __init__(
        self, into: dict[str, Tensor], name: str, channel: Tensor, index: NodeIndex
    ) -> None:
        self.into, self.name, self.channel, self.index = into, name, channel, index

    def __call__(self, x: Tensor, hook: Any = None) -> None:
        """Keep them."""
        x = self.index.read(self.name, x.detach())
        self.into[self.name] = channels(x)[..., self.channel.to(x.device)]
