"""Do the kept nodes carry what the answer depends on, and no more? (Part J.)

Sources: Gao et al. 2025, appendix C (two values a node) and appendix E; Chan et al. 2022 (causal
scrubbing), whose first condition swaps activations between inputs on which a node means the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.ablation import FwdHook, ablation_hooks
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.analyses.binarise import (
    BinariseConfig,
    by_hook,
    first_values,
    observed,
    steps,
    train_values,
)
from tl_sparse.faithfulness.controls import on, tuning
from tl_sparse.faithfulness.measure import Measure, PartResult, measured_mean
from tl_sparse.faithfulness.metrics import normalised
from tl_sparse.faithfulness.subject import Subject
from tl_sparse.tasks import TaskBatch

BINARISE = BinariseConfig(steps=40, batch_pairs=8, lr=0.05)
FIT = 96  # discovery pairs on which the two values of every node are fitted
DRAWS = 4  # donors of every prompt


def meaning(subject: Subject) -> PartResult:
    """Part J: the circuit with two values a node, and with values of other prompts.

    - ``binarised_loss``: two-way cross-entropy (nats) with every kept node's activation replaced by
      one of two values (Gao et al. 2025, appendix C), fitted on discovery prompts. The values are
      trained on the task loss, so it may fall below the circuit's. Null: one value a node instead
      of two, which is the circuit with all nodes removed.
    - ``swap_f``: f = (m - m(∅)) / (m(M) - m(∅)), where m is the mean logit_diff of the circuit when at
      the last token its nodes take their activations from the circuit's run on another test prompt
      with the same answer. Near the circuit's own f, the nodes carry there what prompts of one
      answer share. Null: prompts with the other answer, which should give about -f.
    - ``swap_share``: the same as a share of the circuit's own logit_diff, (m - m(∅)) / (m(C) - m(∅)),
      so that what the circuit lacks for other reasons does not count.
    - Both also ``[independent]``: each unit from a prompt of its own, drawn apart from the others'.
      Nodes that carry more than the answer, and fit together on one prompt only, lose here.

    Each prompt has several donors, none of them of its own pair where there are others; its logit_diff
    is the mean over them.
    """
    if not bool(subject.kept.any()):
        return PartResult("J", (), notes=("the circuit keeps no node",))
    measures = [binarised(subject)]
    swapped, notes = swaps(subject)
    return PartResult("J", (*measures, *swapped), notes=tuple(notes))


# --------------------------------------------------------------------------------------------------
# two values a node


def binarised(subject: Subject) -> Measure:
    """The loss with two values a node."""
    config, index = subject.config, subject.index
    places = torch.nonzero(subject.kept).flatten()
    fit = tuning(subject, FIT).batch
    with eval_mode(subject.model):
        seen = observed(subject.model, index, places, fit, hooks_on(subject, fit))
        first = first_values(seen)
        low, high, _ = train_values(
            subject.model, index, places, fit, first, seen.amax(0) - seen.amin(0), BINARISE,
            lambda batch: hooks_on(subject, batch),
        )  # fmt: skip
        values = steps(index, places, low, high, 0.0)
        with torch.no_grad():
            hooks = [*hooks_on(subject, subject.batch), *values]
            losses = F.softplus(-task_logit_diffs(subject.model, subject.batch, hooks)).cpu()
    none = F.softplus(-subject.empty_logit_diffs).mean()
    return measured_mean(
        "J", "binarised_loss", "", [losses], draws=config.draws, seed=config.seed,
        null=none[None], null_name="one value a node: all of them removed",
    )  # fmt: skip


def hooks_on(subject: Subject, batch: TaskBatch) -> list[FwdHook]:
    """The circuit's hooks for some prompts."""
    return [
        *on(subject, batch).norms,
        *ablation_hooks(subject.index, subject.kept, subject.values),
    ]


# --------------------------------------------------------------------------------------------------
# values of other prompts


def swaps(subject: Subject) -> tuple[list[Measure], list[str]]:
    """What is kept with all nodes from one other prompt, and with each unit from its own."""
    batch, config = subject.batch, subject.config
    groups = {same: candidates(batch, same) for same in (True, False)}
    usable = torch.tensor([bool(a) and bool(b) for a, b in zip(*groups.values(), strict=True)])
    usable = usable.view(-1, 2).all(1).repeat_interleave(2)
    notes = []
    if not bool(usable.any()):
        return [], ["swap_f: no two test prompts have the same answer"]
    if not bool(usable.all()):
        notes.append(f"swap_f: {int((~usable).sum())} prompts share their answer with no other")
    seen = last_activations(subject)
    # the whole batch runs, as what stands side by side does not matter; unusable ones are left out
    empty, model, circuit = (
        logit_diffs[usable]
        for logit_diffs in (
            subject.empty_logit_diffs,
            subject.model_logit_diffs,
            subject.circuit_logit_diffs,
        )
    )
    measures = []
    for variant in ("", "independent"):
        logit_diffs = {
            same: torch.stack(
                [
                    swapped_logit_diffs(subject, seen, donor)[usable]
                    for donor in donors(subject, groups[same], bool(variant))
                ]
            )
            for same in (True, False)
        }
        measures += [
            measured_mean(
                "J", name, variant, [logit_diffs[True].mean(0), empty, whole],
                lambda means: normalised(means[:, 0], means[:, 1], means[:, 2]),
                draws=config.draws, seed=config.seed,
                null=normalised(logit_diffs[False].mean(1), empty.mean(), whole.mean()),
                null_name="values of prompts with the other answer",
            )
            for name, whole in (("swap_f", model), ("swap_share", circuit))
        ]  # fmt: skip
    return measures, notes


def candidates(batch: TaskBatch, same: bool) -> list[list[int]]:
    """For every prompt the others whose right answer is its right one, or its wrong one.

    Prompts of other pairs; its own pair's other member only where there is none else. In an order
    that does not depend on the batch's: by their text.
    """
    texts = batch.prompts
    wanted = (batch.correct_token if same else batch.incorrect_token).tolist()
    by_answer: dict[int, list[int]] = {}
    for i in sorted(range(len(batch)), key=texts.__getitem__):
        by_answer.setdefault(int(batch.correct_token[i]), []).append(i)
    found = []
    for i, answer in enumerate(wanted):
        group = [j for j in by_answer.get(answer, []) if j != i]
        found.append([j for j in group if j // 2 != i // 2] or group)
    return found


def donors(
    subject: Subject, groups: Sequence[Sequence[int]], independent: bool
) -> list[Int[Tensor, "prompt unit"]]:
    """Donor of every prompt and unit, ``DRAWS`` times; all units have one donor unless independent.

    Prompts without candidates are their own donors. Drawn by steps from each prompt's rank among
    all texts, so that the order of the batch does not matter.
    """
    generator = torch.Generator().manual_seed(subject.config.seed)
    texts = subject.batch.prompts
    rank = torch.empty(len(texts), dtype=torch.int64)
    rank[torch.tensor(sorted(range(len(texts)), key=texts.__getitem__))] = torch.arange(len(texts))
    sizes = torch.tensor([max(1, len(group)) for group in groups])
    table = torch.arange(len(texts))[:, None].repeat(1, int(sizes.max()))
    for i, group in enumerate(groups):
        table[i, : len(group)] = torch.tensor(group, dtype=torch.int64)
    found = []
    for _ in range(DRAWS):
        shape = (1, subject.n_units if independent else 1)
        step = torch.randint(1 << 30, shape, generator=generator).expand(1, subject.n_units)
        found.append(table.gather(1, (rank[:, None] + step) % sizes[:, None]))
    return found


@torch.no_grad()
def last_activations(subject: Subject) -> Float[Tensor, "prompt node"]:
    """Every node's activation at the last token in the circuit's run."""
    batch, found = subject.batch, dict[str, Tensor]()
    rows = torch.arange(len(batch))

    def record(x: Tensor, hook: Any = None, *, name: str) -> None:
        found[name] = x.detach().flatten(2)[rows, batch.last].float().cpu()

    readers: list[Any] = [(name, partial(record, name=name)) for name in subject.index.slices]
    with eval_mode(subject.model), torch.no_grad():
        task_logit_diffs(subject.model, batch, [*hooks_on(subject, batch), *readers])
    return torch.cat([found[name] for name in subject.index.slices], 1)


@torch.no_grad()
def swapped_logit_diffs(
    subject: Subject, seen: Float[Tensor, "prompt node"], donor: Int[Tensor, "prompt unit"]
) -> Float[Tensor, " prompt"]:
    """Margins of the circuit with its nodes' last activations taken from donors."""
    batch = subject.batch
    values = seen.gather(0, donor[:, subject.unit])
    puts: list[FwdHook] = []
    for name, channel, which in by_hook(subject.index, torch.nonzero(subject.kept).flatten()):
        node = torch.nonzero(subject.kept).flatten()[which]
        puts.append((name, Put(batch.last, channel, values[:, node])))
    with eval_mode(subject.model), torch.no_grad():
        return task_logit_diffs(
            subject.model, batch, [*hooks_on(subject, batch), *puts]
        ).cpu()  # fmt: skip


class Put:
    """Hook function: some channels at each prompt's last token set to given values."""

    def __init__(
        self,
        last: Int[Tensor, " prompt"],
        channel: Int[Tensor, " chosen"],
        values: Float[Tensor, "prompt chosen"],
    ) -> None:
        self.last, self.channel, self.values = last, channel, values

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The activation with them set."""
        flat = x.flatten(2).clone()
        rows = torch.arange(len(flat))[:, None]
        flat[rows, self.last[:, None], self.channel[None]] = self.values.to(flat)
        return flat.view(x.shape)
