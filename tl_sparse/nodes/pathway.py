"""``Pathway``: is this the way by which the beginning moves the end?

Sources: causal mediation (Vig et al. 2020; Wang et al. 2022); controls by random nodes of the same
site and activity (after Gao et al. 2025, Fig. 32).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from tl_sparse.node import Node, Nodes, resolve
from tl_sparse.nodes.measure import Answers, Measure, measure_of
from tl_sparse.nodes.patching import base_and_sources, named
from tl_sparse.nodes.pathway_report import (
    CRITERIA,
    PathwayMeasure,
    PathwayReport,
    answered,
    measured,
    thresholds_of,
)
from tl_sparse.nodes.pathway_runs import Bank, Runs, Table
from tl_sparse.nodes.prompts import Positions, Prompts, PromptsLike, prompts_of
from tl_sparse.progress import progress_bar
from tl_sparse.storage.finite import check_weights


@dataclass(frozen=True)
class Pathway:
    """Stages of nodes, from the beginning to the end: ``Pathway([["2.attn.v:5"], ["3.mlp..."]])``.

    Every stage is one or more nodes, under any names.
    """

    stages: Sequence[Nodes]
    """In the order in which one is said to move the next."""

    def validate(
        self,
        model: nn.Module,
        base: PromptsLike | Prompts,
        source: PromptsLike | Prompts | None = None,
        *,
        control: PromptsLike | Prompts | None = None,
        positions: Positions = None,
        end: str = "nodes",
        answers: Answers | None = None,
        measure: Measure | None = None,
        draws: int = 20,
        seed: int = 0,
        thresholds: Mapping[str, float] | None = None,
        batch: int | None = None,
        progress: bool = False,
    ) -> PathwayReport:
        """Patch and restore the stages, and compare with random nodes in their place.

        How far a stage moves is a share of the way from base to source: the sum over its nodes and
        the positions of (x - base)(source - base), over that of (source - base)². Measured are

        - ``sensitivity``: how far the end moves when the first stage is put to source. Null: random
          nodes in place of the first stage;
        - ``step``: how far each stage alone moves the next; ``backward``: how far each moves the
          one before it, which is nothing in the right order;
        - ``mediation``: the share of the end's movement that is undone when a middle stage is
          restored to base. Null: random nodes in place of all middle stages;
        - ``remainder``: the share that reaches the end with all middle stages at base;
        - ``control``: how far the end moves when the first stage is put to what it is in control
          prompts, whose content differs in what should not matter.

        Random nodes stand at the same hook and are about as active (mean size) as those that they
        stand in for, and are none of the pathway.

        Args:
            model: A ``SparseTransformer`` or any TransformerLens model.
            base: The prompts; see :func:`~tl_sparse.nodes.patch_nodes`.
            source: Prompts on which the beginning differs; of a task's batch each one's partner.
            control: Prompts on which it should not. Of a task's batch other prompts with the same
                answer and length, where each has one.
            positions: Where nodes are patched and looked at: every position by default.
            end: ``"nodes"``: the last stage; ``"answer"``: the logit difference (or ``measure``).
            answers: Where ``end`` is the answer; see :func:`~tl_sparse.nodes.patch_nodes`.
            measure: Likewise.
            draws: Random sets of nodes for each null.
            seed: Of the nulls and the bootstrap.
            thresholds: Criteria that should ask for other numbers, by name.
            batch: Patched prompts in one forward pass.
            progress: Whether a bar is shown.

        Raises:
            ValueError: fewer than two stages, nodes that are not there or in two stages, or what
                does not fit; see :func:`~tl_sparse.nodes.patch_nodes`.
        """
        asked = thresholds_of(thresholds or {})
        stages = [resolve(model, stage) for stage in self.stages]
        check_stages(stages)
        if end not in ("nodes", "answer"):
            raise ValueError(f"end={end!r}: choose 'nodes' or 'answer'")
        if draws < 0:
            raise ValueError(f"draws={draws} must be at least 0")
        rows, sources = base_and_sources(model, base, source)
        notes = []
        others = same_answers(rows) if control is None else prompts_of(model, control, "control")
        if others is None:
            notes.append("control: no prompts of the same answer and length; give some")
        else:
            sources["control"] = others
        check_weights(model)
        look = measure_of(measure, answers, rows, model)[0] if end == "answer" else None
        bank = Bank(model, rows, sources, positions, look, batch)
        nulls = bank.random_sets(stages, draws, seed)
        if draws and not nulls:
            notes.append("null: no other nodes stand at these sites")
        runs = Runs.of(stages, nulls, with_control=others is not None, to_answer=end == "answer")
        with progress_bar(total=len(rows), desc="pathway", disable=not progress) as bar:
            moved, whole = bank.moved(runs.patches, stages, bar)
        found = Shares(runs, moved, whole, len(stages), paired=rows.paired, seed=seed)
        with np.errstate(divide="ignore", invalid="ignore"):  # where nothing moves at all
            measures = found.measures(end == "answer")
        criteria = tuple(answered(one, measures, asked[one.key]) for one in CRITERIA)
        return PathwayReport(
            tuple(named(stage) for stage in self.stages), measures, criteria, rows.texts,
            "the answer" if end == "answer" else "the last stage", tuple(notes),
        )  # fmt: skip


def check_stages(stages: Sequence[Sequence[Node]]) -> None:
    """ValueError unless there are two stages, none empty, and no node in two of them."""
    if len(stages) < 2 or not all(stages):
        raise ValueError("a pathway has at least two stages, of at least one node each")
    every = [node for stage in stages for node in stage]
    if len(set(every)) < len(every):
        raise ValueError("a node stands twice in this pathway")


def same_answers(rows: Prompts) -> Prompts | None:
    """For each prompt the next one with the same answers and length; None if one has none."""
    if rows.correct is None or rows.incorrect is None:
        return None
    groups: dict[tuple[int, ...], list[int]] = {}
    keys = list(zip(rows.correct.tolist(), rows.incorrect.tolist(), rows.last.tolist(),
                    strict=True))  # fmt: skip
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    if min(map(len, groups.values())) < 2:
        return None
    after = {group[i - 1]: group[i] for group in groups.values() for i in range(len(group))}
    chosen = torch.tensor([after[i] for i in range(len(rows))], device=rows.last.device)
    return rows.rows(chosen)


@dataclass(frozen=True, eq=False)
class Shares:
    """Movements as shares, with intervals and nulls."""

    runs: Runs
    table: Table
    whole: Float[np.ndarray, "prompt stage"]
    n_stages: int
    paired: bool
    seed: int

    def measures(self, answer: bool) -> tuple[PathwayMeasure, ...]:
        """Every number; the end is the last stage, or the answer."""
        end, runs = (self.n_stages if answer else self.n_stages - 1), self.runs
        first, moved = runs.alone[0], self.table[..., end]
        found = [
            self.share(
                "sensitivity", "", moved[first], self.whole[:, end],
                null=moved[runs.null_first].mean(1) / self.whole[:, end].mean(),
            )
        ]  # fmt: skip
        steps = range(self.n_stages - 1)
        for i in steps:
            arrow = f"{i + 1} to {i + 2}"
            there, back = self.table[runs.alone[i], :, i + 1], self.table[runs.alone[i + 1], :, i]
            found.append(self.share("step", arrow, there, self.whole[:, i + 1]))
            found.append(self.share("backward", f"{i + 2} to {i + 1}", back, self.whole[:, i]))
        if answer:
            last = moved[runs.alone[-1]]
            found.append(self.share("step", "to the answer", last, self.whole[:, end]))
        for i, run in enumerate(runs.restored):
            found.append(
                self.share(
                    "mediation", f"stage {i + 2}", moved[run], moved[first], undone=True,
                    null=1 - moved[runs.null_middle].mean(1) / moved[first].mean(),
                )
            )  # fmt: skip
        if runs.restored:
            found.append(self.share("remainder", "", moved[runs.held], moved[first]))
        if runs.control is not None:
            found.append(self.share("control", "", moved[runs.control], self.whole[:, end]))
        return tuple(found)

    def share(
        self,
        name: str,
        variant: str,
        part: Float[np.ndarray, " prompt"],
        whole: Float[np.ndarray, " prompt"],
        undone: bool = False,
        null: Float[np.ndarray, " draw"] | None = None,
    ) -> PathwayMeasure:
        """The mean of one over the mean of the other, or what is missing of it."""

        def statistic(means: Float[np.ndarray, "... 2"]) -> Any:
            ratio = means[..., 0] / means[..., 1]
            return 1 - ratio if undone else ratio

        return measured(
            name, variant, [part, whole], statistic, paired=self.paired, seed=self.seed, null=null
        )
