"""Is a circuit necessary? Its nodes, and no others, ablated in the full model.

Source: Gao et al. 2025, Figure 32 ("inverse pruning").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.analyses.figures import necessity_figure
from tl_sparse.analyses.runs import accuracy
from tl_sparse.circuits import Circuit
from tl_sparse.faithfulness.config import EvaluationConfig
from tl_sparse.faithfulness.controls import CONTROLS, degrees, displacement, random_components
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.tasks import Split, Task
from tl_sparse.views.brief import brief
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go


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

    def __repr__(self) -> str:
        return brief(self)

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
    four kinds (see :class:`Necessity`), all run together. Source: Gao et al. 2025, Figure 32, which
    has random nodes as its control; most nodes of a sparse model are silent on a task, so the
    ``matched`` sets are the harder control.

    Raises:
        ValueError: a circuit of another model, or fewer controls than one.
    """
    if n_controls < 1:
        raise ValueError(f"n_controls={n_controls} must be at least 1")
    circuit.check_model(model)
    index, kept = circuit.index, circuit.kept.cpu()
    batch = task.batch(pairs, split=split, seed=seed)
    test = CircuitUnderTest(model, task, circuit, batch, batch, None, EvaluationConfig())
    values = (test.values if values is None else values).cpu()
    generator = torch.Generator().manual_seed(seed)
    with eval_mode(model):
        moved, degree = displacement(model, index, values, batch), degrees(model, index)
    cut = [("none", 0, torch.zeros_like(kept)), ("circuit", 0, kept)]
    for kind in CONTROLS:
        alike = degree if kind == "degree" else moved
        drawn = random_components(test, kind, n_controls, alike, generator)
        cut += [(kind, draw, mask) for draw, mask in enumerate(drawn)]
    logit_diffs = test.logit_diffs(~torch.stack([mask for _, _, mask in cut]), values, hooks=())
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
