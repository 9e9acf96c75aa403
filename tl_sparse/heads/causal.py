"""``causal_check``: do the named heads carry the task, more than as many random heads?

The whole suite is :func:`tl_sparse.faithfulness.evaluate`, which takes a circuit of heads like any
other; these are its two central numbers, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.circuits import Circuit
from tl_sparse.faithfulness.config import EvaluationConfig
from tl_sparse.faithfulness.controls import random_components
from tl_sparse.faithfulness.metrics import necessity_of, normalised
from tl_sparse.faithfulness.under_test import under_test
from tl_sparse.tasks import Task
from tl_sparse.views import frame_html


@dataclass(frozen=True, eq=False, repr=False)
class CausalCheck:
    """What a set of heads does alone, and what the model does without it, beside random sets.

    The first row of each tensor is the set itself; the others are random sets with as many heads in
    every layer.
    """

    alone: Float[Tensor, "set prompt"]
    """Logit difference with every other head at its mean."""
    without: Float[Tensor, "set prompt"]
    """Logit difference with the set's heads at their means."""
    full: Float[Tensor, " prompt"]
    """That of the full model."""
    empty: Float[Tensor, " prompt"]
    """That with every head at its mean."""
    n_heads: int
    """Heads in the set."""
    task: str
    """Name of the task."""

    @property
    def f(self) -> Float[Tensor, " set"]:
        """Sufficiency: the share of the logit difference that the heads alone have; 1 is all."""
        return normalised(self.alone.mean(1), *self._ends)

    @property
    def necessity(self) -> Float[Tensor, " set"]:
        """The share that is lost without them."""
        return necessity_of(self.without.mean(1), *self._ends)

    @property
    def _ends(self) -> tuple[Float[Tensor, " set"], Float[Tensor, " set"]]:
        n_sets = len(self.alone)
        return self.empty.mean().expand(n_sets), self.full.mean().expand(n_sets)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per measure: value, the random sets' mean, lowest and highest, and the share of
        them that are at least as high."""
        rows = []
        for name, values in (("f", self.f), ("necessity", self.necessity)):
            own, others = float(values[0]), values[1:]
            rows.append([name, own, float(others.mean()), float(others.min()),
                         float(others.max()), float((others >= own).float().mean())])  # fmt: skip
        columns = ["measure", "value", "random", "random_low", "random_high", "as_high"]
        return pd.DataFrame(rows, columns=columns)

    @property
    def _line(self) -> str:
        f, necessity = self.f, self.necessity
        return (
            f"{self.n_heads} heads, f {float(f[0]):.2f} (random {float(f[1:].mean()):.2f}), "
            f"necessity {float(necessity[0]):.2f} (random {float(necessity[1:].mean()):.2f}), "
            f"{len(self.full)} prompts"
        )

    def __repr__(self) -> str:
        return f"CausalCheck({self.task!r}, {self._line})"

    def _repr_html_(self) -> str:
        return frame_html(
            f"Heads of {self.task}, removed and kept", self._line, self.to_dataframe()
        )


def causal_check(
    model: nn.Module,
    circuit: Circuit,
    task: Task,
    *,
    pairs: int = 64,
    random_sets: int = 50,
    seed: int = 0,
) -> CausalCheck:
    """Keep the heads of a circuit alone, then remove them, on held-out prompts.

    Args:
        model: The circuit's model.
        circuit: Heads, from :meth:`~tl_sparse.heads.IdentifiedHeads.circuit` or
            :func:`~tl_sparse.circuits.circuit_of_heads`; its means are what heads are set to.
        task: What it is a circuit of.
        pairs: Held-out prompt pairs.
        random_sets: Random sets of as many heads in every layer, which may have heads of the
            circuit among them.
        seed: Of prompts and random sets.

    Raises:
        ValueError: whatever ``evaluate`` refuses, or fewer than one random set.
    """
    if random_sets < 1:
        raise ValueError(f"random_sets={random_sets} must be at least 1")
    test = under_test(model, circuit, task, EvaluationConfig(pairs=pairs, seed=seed))
    drawn = random_components(test, "anywhere", random_sets)
    sets: Bool[Tensor, "set component"] = torch.cat([test.kept_components[None], drawn])
    keep = test.nodes(sets)
    return CausalCheck(
        test.logit_diffs(keep), test.logit_diffs(~keep), test.model_logit_diffs,
        test.empty_logit_diffs, int(test.kept_components.sum()), task.name,
    )  # fmt: skip
