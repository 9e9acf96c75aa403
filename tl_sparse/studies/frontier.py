"""``frontier``: validation loss against the interpretability metric, over a set of models.

Source: Gao et al. 2025, section 2 and Figure 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_sparse.ablation import ActivationMeans, activation_means
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.pruning import prune_many
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.pruning_run import PruningFailed, set_up
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.finite import check_weights
from tl_sparse.studies.interpretability import (
    InterpretabilityResult,
    Size,
    WhichTasks,
    geometric_mean,
    interpretability,
)
from tl_sparse.tasks import Task, check_names, get, names, table
from tl_sparse.views.display import frame_html
from tl_sparse.views.frontier import frontier_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

BATCH = 64  # sequences of one forward pass


@dataclass(frozen=True, eq=False)
class Frontier:
    """Validation loss and the interpretability metric of a set of models."""

    rows: pd.DataFrame
    """One row per model: model, group, validation_loss (nats per token), nonzeros (parameters that
    are not 0), edges, nodes (geometric means; NaN where there is none), tasks (how many)."""
    interpretability: InterpretabilityResult
    """The metric, task by task, and which tasks it is over."""
    circuits: Mapping[str, tuple[Circuit, ...]]
    """Model → its circuits."""
    failures: Mapping[tuple[str, str], str]
    """(model, task) → why a task that the model does has no circuit."""

    def by_group(self) -> pd.DataFrame:
        """One row per group of models (seeds of one setting), as :func:`grouped` gives them."""
        return grouped(self.rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model, as ``rows``."""
        return self.rows

    def to_plotly(self, size: Size = "edges") -> go.Figure:
        """Loss against the metric, a point per group, with error bars over its models."""
        return frontier_figure(self.by_group(), size, self.interpretability.note)

    def __repr__(self) -> str:
        return f"Frontier({len(self.rows)} models, {len(self.failures)} circuits not found)"

    def __str__(self) -> str:
        shown = self.rows.to_string(index=False, float_format="{:.3f}".format)
        return f"{shown}\n{self.interpretability.note}"

    def _repr_html_(self) -> str:
        return frame_html("Loss and size of circuits", self.interpretability.note, self.rows)


def frontier(
    models: Mapping[str, nn.Module | str | Path],
    tokens: Int[Tensor, "sequence pos"],
    *,
    config: PruningConfig | None = None,
    tasks: WhichTasks = "common",
    groups: Mapping[str, str] | None = None,
    circuits: Mapping[str, Sequence[Circuit]] | None = None,
    pairs: int = 128,
    progress: bool = True,
) -> Frontier:
    """Validation loss on ``tokens`` and the interpretability metric of every model.

    ``models`` are TransformerLens models with one tokenizer, or folders of saved ones, by name.
    Each is pruned by ``config`` on the tasks that it does (held-out loss, over ``pairs`` prompt
    pairs, at most the target) and that ``tasks`` asks for, see
    :func:`~tl_sparse.studies.interpretability.interpretability`; nodes are ablated to their means
    over ``tokens``. ``circuits``, by model, stand in for pruning. Models with the same name in
    ``groups`` are one point of the figure, with error bars: seeds of one setting, say.

    Raises:
        ValueError: fewer than one model or sequence, models without a tokenizer or with different
            ones (losses per token could not be compared), an unknown task, circuits or groups of
            unknown models, circuits of another model than the one they are given for, NaN or
            infinite weights, no task that the models do, or no circuit at all.
    """
    config, given, labels = config or PruningConfig(), circuits or {}, groups or {}
    if not models or not len(tokens):
        raise ValueError("a frontier needs at least one model and one sequence of tokens")
    for what, keys in (("circuits", given), ("groups", labels)):
        if unknown := sorted(set(keys) - set(models)):
            raise ValueError(
                f"{what} of unknown model(s) {', '.join(unknown)}; the models are "
                f"{', '.join(models)}"
            )
    if not isinstance(tasks, str):
        check_names(tasks)
    vocabulary: dict[str, int] | None = None
    facts, solved = {}, {}
    for name, source in models.items():
        model = opened(source)
        check_weights(model)
        for circuit in given.get(name, ()):
            circuit.check_model(model)
        vocabulary = _same_vocabulary(name, model, vocabulary)
        facts[name] = {
            "model": name,
            "group": labels.get(name, name),
            "validation_loss": token_loss(model, tokens),
            "nonzeros": sum(int(torch.count_nonzero(p)) for p in model.parameters()),
        }
        if name in given:
            solved[name] = {circuit.task for circuit in given[name]}
        else:
            asked = names() if isinstance(tasks, str) else tuple(tasks)
            results = table(model, pairs, asked).results
            solved[name] = {t for t, r in results.items() if r.loss <= config.target_loss}
    wanted = set.intersection(*solved.values()) if tasks == "common" else set(names())
    if not any(done & wanted for done in solved.values()):
        told = "; ".join(f"{name}: {', '.join(sorted(solved[name])) or 'none'}" for name in models)
        raise ValueError(
            f"no task is done to a loss of {config.target_loss} by "
            f"{'all models' if tasks == 'common' else 'any model'} ({told}): leave models out, "
            "raise target_loss, or name tasks"
        )
    found: dict[str, tuple[Circuit, ...]] = {}
    failures: dict[tuple[str, str], str] = {}
    for name, source in models.items():
        if name in given:
            found[name] = tuple(given[name])
            continue
        chosen = sorted(solved[name] & wanted)
        found[name], failed = _pruned(opened(source), tokens, chosen, config, progress)
        failures |= {(name, task): why for task, why in failed.items()}
    if not any(found.values()):
        told = "; ".join(f"{task} in {name}: {why}" for (name, task), why in failures.items())
        raise ValueError(f"no circuit was found ({told})")
    return gathered(facts, found, failures, tasks)


def gathered(
    facts: Mapping[str, Mapping[str, Any]],
    circuits: Mapping[str, Sequence[Circuit]],
    failures: Mapping[tuple[str, str], str],
    tasks: WhichTasks = "common",
) -> Frontier:
    """A frontier of what is known of each model (the columns of ``rows`` but the metric's)."""
    result = interpretability(circuits, tasks)
    sizes = result.summary.set_index("model")[["edges", "nodes", "tasks"]]
    rows = pd.DataFrame([{**facts[name], **sizes.loc[name].to_dict()} for name in facts])
    rows["tasks"] = rows["tasks"].astype(int)
    return Frontier(rows, result, {k: tuple(v) for k, v in circuits.items()}, dict(failures))


def grouped(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per group, in order: group, models, validation_loss, validation_loss_sd, and for
    edges and nodes the geometric mean and ``_factor``.

    Models without a size are left out (``models`` is how many are left), unless all of a group are.
    Spreads are standard deviations over models (n - 1), for sizes of their logarithm: the bar goes
    from mean / factor to mean × factor. NaN of fewer than two models.
    """
    out = []
    for group, same in rows.groupby("group", sort=False):
        known = same.dropna(subset=["edges", "nodes"])
        losses = (same if known.empty else known)["validation_loss"]
        row = {
            "group": group,
            "models": len(known),
            "validation_loss": losses.mean(),
            "validation_loss_sd": losses.std(),
        }
        for size in ("edges", "nodes"):
            row[size] = geometric_mean(known[size])
            positive = len(known) > 1 and bool((known[size] > 0).all())
            row[f"{size}_factor"] = math.exp(np.log(known[size]).std()) if positive else math.nan
        out.append(row)
    return pd.DataFrame(out)


@torch.no_grad()
def token_loss(model: nn.Module, tokens: Int[Tensor, "sequence pos"]) -> float:
    """Mean next-token loss of a TransformerLens model, in nats per predicted token."""
    run: Any = model
    device = next(model.parameters()).device
    losses = [
        run(part.to(device), return_type="loss", loss_per_token=True).double().cpu()
        for part in tokens.split(BATCH)
    ]
    return float(torch.cat(losses).mean())


def opened(source: nn.Module | str | Path) -> nn.Module:
    """The model itself, or the one saved in a folder."""
    return source if isinstance(source, nn.Module) else SparseTransformer.from_pretrained(source)


def _same_vocabulary(name: str, model: Any, known: dict[str, int] | None) -> dict[str, int]:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"model {name!r} has no tokenizer: there are no prompts for it")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if known is not None and vocabulary != known:
        raise ValueError(
            f"model {name!r} has another tokenizer than the models before it: losses per token "
            "cannot be compared"
        )
    return vocabulary


def _pruned(
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    tasks: Sequence[str],
    config: PruningConfig,
    progress: bool,
) -> tuple[tuple[Circuit, ...], dict[str, str]]:
    """A circuit for every task, or the reason why there is none."""
    means = activation_means(model, tokens)
    jobs = [(get(name, model.tokenizer, model.cfg.n_ctx), config) for name in tasks]
    found = attempted(model, jobs, means=means, progress=progress)
    circuits = tuple(circuit for circuit in found if isinstance(circuit, Circuit))
    failures = {
        name: str(error)
        for name, error in zip(tasks, found, strict=True)
        if not isinstance(error, Circuit)
    }
    return circuits, failures


def attempted(
    model: nn.Module,
    jobs: Sequence[tuple[Task, PruningConfig]],
    *,
    means: ActivationMeans,
    progress: bool = True,
) -> list[Circuit | PruningFailed | ValueError]:
    """:func:`prune_many`, where a job that cannot be done leaves its reason and not the others."""
    refused: dict[int, ValueError] = {}
    for i, (task, config) in enumerate(jobs):
        try:
            set_up(model, task, config, means=means)
        except ValueError as error:
            refused[i] = error
    wanted = [job for i, job in enumerate(jobs) if i not in refused]
    found = iter(prune_many(model, wanted, means=means, progress=progress))
    return [refused[i] if i in refused else next(found) for i in range(len(jobs))]
