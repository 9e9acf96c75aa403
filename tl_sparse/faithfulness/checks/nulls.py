"""Nulls: tasks and models for which there should be no small circuit (part F).

If nonsense gets circuits as small as the real task's, a small circuit says nothing (Drori 2026).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation import activation_means
from tl_sparse.faithfulness.checks.searches import Found, n_units, row, search, search_config
from tl_sparse.faithfulness.measure import Measure, PartResult
from tl_sparse.faithfulness.subject import Subject
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.tasks import SPLITS, Pair, Split, Task
from tl_sparse.tasks.task import MakePair, StoredPairs

CHECKED = 32  # pairs of each split that an arbitrary token must fit
MEANS = 64  # sequences over which the means of a null model are taken

# --------------------------------------------------------------------------------------------------
# tasks


def label_swap(task: Task) -> Task:
    """The task with its answers swapped: A's answer is B's, and the reverse.

    The model does the opposite, so a circuit that answers so is none of the model's.
    """
    return replace(
        task,
        name=f"{task.name}:label_swap",
        description=f"{task.description}\n\nNull: the other member's answer is the right one.",
        answers=None if task.answers is None else task.answers[::-1],
        answer_ids=None if task.answer_ids is None else task.answer_ids[::-1],
        incorrect_ids=None if task.incorrect_ids is None else task.incorrect_ids[::-1],
        make=answered(task.make, lambda pair: pair.answers[::-1]),
    )


def arbitrary_map(task: Task, seed: int = 0) -> Task:
    """The task with two random tokens for answers, the same for all prompts.

    The nonsense task of Drori 2026. Where the members of a pair differ by chance alone, as in tasks
    whose pairs have answers of their own, nothing tells A from B, and no circuit can do it.

    Raises:
        ValueError: no two tokens of the vocabulary fit.
    """
    (first, first_id), (second, second_id) = arbitrary_tokens(task, seed)
    return replace(
        task,
        name=f"{task.name}:arbitrary_map:{seed}",
        description=f"{task.description}\n\nNull: the answers are {first!r} and {second!r}.",
        answers=(first, second),
        answer_ids=(first_id, second_id),
        incorrect_ids=None,
        make=answered(task.make, lambda _: (first, second)),
    )


def constant_answer(task: Task, seed: int = 0) -> Task:
    """The task in which a random token follows both members, against another random one.

    Raises:
        ValueError: no two tokens of the vocabulary fit.
    """
    (right, right_id), (wrong, incorrect_id) = arbitrary_tokens(task, seed)
    return replace(
        task,
        name=f"{task.name}:constant_answer:{seed}",
        description=f"{task.description}\n\nNull: {right!r} always follows, {wrong!r} never.",
        answers=(right, right),
        answer_ids=(right_id, right_id),
        incorrect_ids=(incorrect_id, incorrect_id),
        make=answered(task.make, lambda _: (right, right)),
    )


def answered(
    make: MakePair | StoredPairs, answers: Callable[[Pair], tuple[str, str]]
) -> MakePair | StoredPairs:
    """The same prompts; pairs that have answers of their own get others."""

    def again(pair: Pair) -> Pair:
        return Pair(pair.prompts, answers(pair))

    if isinstance(make, StoredPairs):
        return StoredPairs(
            train=tuple(map(again, make.train)), held_out=tuple(map(again, make.held_out))
        )

    def draw(rng: random.Random, split: Split) -> tuple[str, str] | Pair:
        drawn = make(rng, split)
        return again(drawn) if isinstance(drawn, Pair) else drawn

    return draw


def arbitrary_tokens(task: Task, seed: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """Two random tokens that the prompts say nothing about, as texts and ids.

    They are no special tokens, stand in none of the sampled prompts, are no answers of theirs, and
    are not joined to their ends by the tokenizer.

    Raises:
        ValueError: the vocabulary has no two such tokens.
    """
    prompts: list[list[int]] = []
    taken = set(task.tokenizer.all_special_ids)
    for split in SPLITS:
        batch = task.batch(CHECKED, split=split, seed=0)
        rows = zip(batch.tokens.tolist(), batch.last.tolist(), strict=True)
        prompts += [ids[1 : last + 1] for ids, last in rows]
        taken |= {*batch.correct_token.tolist(), *batch.incorrect_token.tolist()}
    taken |= {token for ids in prompts for token in ids}
    order = list(range(len(task.tokenizer)))
    random.Random(f"{task.name} arbitrary {seed}").shuffle(order)
    fitting = (
        (text, token)
        for token in order
        if token not in taken and (text := follows(task, prompts, token)) is not None
    )
    chosen = [pair for pair, _ in zip(fitting, range(2), strict=False)]
    if len(chosen) < 2:
        raise ValueError(f"the vocabulary has no two tokens that can follow all of {task.name}")
    return chosen[0], chosen[1]


def follows(task: Task, prompts: list[list[int]], token: int) -> str | None:
    """A token's text if it can follow every prompt as a token of its own, else None."""
    plain = str(task.tokenizer.decode([token]))
    # a tokenizer of words divided by blanks shows its tokens without the blank
    for text in (f" {plain}", plain):
        if task.tokenizer.encode(text, add_special_tokens=False) != [token]:
            continue
        whole = [str(prompt) + text for prompt in task.tokenizer.batch_decode(prompts)]
        encoded = task.tokenizer(whole, add_special_tokens=False)["input_ids"]
        if all(a == [*b, token] for a, b in zip(encoded, prompts, strict=True)):
            return text
    return None


# --------------------------------------------------------------------------------------------------
# models


def reinitialised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with every nonzero weight drawn anew and the same ones zero.

    The values of a matrix are drawn from N(0, s²), s being the root mean square of its nonzero
    values. Biases are drawn likewise; norms, attention sinks and the bigram table stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(values: Float[Tensor, " entry"]) -> Float[Tensor, " entry"]:
        nonzero = values != 0
        scale = values[nonzero].square().mean().sqrt() if bool(nonzero.any()) else 0.0
        noise = torch.randn(values.shape, generator=generator)
        return torch.where(nonzero, noise * scale, 0.0)

    return rewritten(model, drawn)


def shuffled_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with the entries of every matrix permuted: the same values, the pattern gone.

    Biases are permuted likewise; norms, attention sinks and the bigram table stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def permuted(values: Float[Tensor, " entry"]) -> Float[Tensor, " entry"]:
        return values[torch.randperm(len(values), generator=generator)]

    return rewritten(model, permuted)


@torch.no_grad()
def rewritten(
    model: nn.Module, change: Callable[[Float[Tensor, " entry"]], Float[Tensor, " entry"]]
) -> nn.Module:
    """A copy of a model with the entries of each matrix changed; values are given on the CPU."""
    other = copy.deepcopy(model)
    for matrix in weight_matrices(other, biases=True):
        values = torch.cat([part.flatten() for part in matrix.parts]).float().cpu()
        changed = change(values).split([part.numel() for part in matrix.parts])
        for part, entries in zip(matrix.parts, changed, strict=True):
            part.copy_(entries.view(part.shape))
    return other


# --------------------------------------------------------------------------------------------------
# part F

TASKS: dict[str, Callable[[Task, int], Task]] = {
    "label_swap": lambda task, seed: label_swap(task),
    "arbitrary_map": arbitrary_map,
    "constant_answer": constant_answer,
}
MODELS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "reinitialised": reinitialised,
    "shuffled_weights": shuffled_weights,
}


def nulls(subject: Subject) -> PartResult:
    """Part F: are circuits of nonsense tasks, and of random models, as small as the real ones?

    With the quick search of :mod:`~tl_sparse.faithfulness.checks.searches`, all at one budget and to one
    target loss, ``config.null_seeds`` searches of ``config.null_steps`` steps of each kind:

    - ``size``: S, units of the real task's circuits, the mean over seeds that found one. Of this
      budget; the circuit under test had its own. Null: the same over all nulls that were found.
    - ``size_ratio``, per null: the mean over seeds of S / (units of the null's circuit). A null
      without a circuit counts as infinitely large, ratio 0, and one with no unit at all as one.
      Near or above 1, nonsense is as cheap as the task.
    - ``null_success``, per null: share of seeds that found a circuit. Null: that of the real task.

    Null tasks in the same model: ``label_swap``, ``arbitrary_map`` (Drori 2026),
    ``constant_answer``. The real task in random models, whose removed nodes are set to means of
    their own: ``reinitialised``, ``shuffled_weights``. Examples are of searches, not of prompts.
    Nonsense takes longer to find than the real task, so a null that was not found might be with
    more steps: table ``searches`` tells how near each search came (``reached``).
    """
    try:
        target = search_config(subject, subject.config.seed).target_loss
    except ValueError as error:
        return PartResult("F", (), notes=(str(error),))
    seeds = range(subject.config.seed, subject.config.seed + subject.config.null_seeds)
    found: dict[str, list[Found]] = {"real": []}
    jobs = [("real", subject.task, seed) for seed in seeds]
    posed, notes = null_tasks(subject, seeds)
    jobs += posed
    steps = subject.config.null_steps
    results = search(subject, [(task, seed) for _, task, seed in jobs], steps=steps)
    for (kind, _, _), result in zip(jobs, results, strict=True):
        found.setdefault(kind, []).append(result)
    text = text_for_means(subject)
    if text is None:
        notes.append(
            f"{', '.join(MODELS)}: not searched; give tokens=, text on which to take the means "
            "of these models"
        )
    else:
        for kind, seed, model in null_models(subject, seeds):
            means = activation_means(model, text, index=subject.index)
            (result,) = search(
                subject, [(subject.task, seed)], steps=steps, model=model, means=means
            )
            found.setdefault(kind, []).append(result)
    rows = [
        {"search": kind, "seed": seed, "target": target} | row(subject, result)
        for kind, results in found.items()
        for seed, result in zip(seeds, results, strict=True)
    ]
    sizes = {
        kind: torch.tensor([n_units(subject, result) for result in results])
        for kind, results in found.items()
    }
    if not bool(sizes["real"].isfinite().any()):
        notes.append(f"the real task has no circuit at this budget: {found['real'][0]}")
    return PartResult("F", size_measures(sizes), {"searches": pd.DataFrame(rows)}, tuple(notes))


def size_measures(sizes: Mapping[str, Float[Tensor, " seed"]]) -> tuple[Measure, ...]:
    """The numbers of part F from the sizes of circuits, infinite where none was found."""
    real = sizes["real"]
    others = {kind: values for kind, values in sizes.items() if kind != "real"}
    size = mean_of_found(real)
    every = torch.cat([torch.zeros(0), *others.values()])
    measures = [
        Measure(
            "F", "size", "", size, null=mean_of_found(every), examples=real,
            null_name="nulls of which a circuit was found",
        )
    ]  # fmt: skip
    for kind, values in others.items():
        ratios = size / values.clamp(min=1.0)
        measures.append(Measure("F", "size_ratio", kind, float(ratios.mean()), examples=ratios))
    for kind, values in others.items():
        succeeded = values.isfinite().float()
        measures.append(
            Measure(
                "F", "null_success", kind, float(succeeded.mean()), examples=succeeded,
                null=float(real.isfinite().float().mean()), null_name="the real task",
            )
        )  # fmt: skip
    return tuple(measures)


def mean_of_found(sizes: Float[Tensor, " search"]) -> float:
    """Mean size of the circuits that were found; NaN for none."""
    return float(sizes[sizes.isfinite()].mean())


def null_tasks(
    subject: Subject, seeds: Sequence[int]
) -> tuple[list[tuple[str, Task, int]], list[str]]:
    """Kind, null task and seed of every search in the subject's own model, and what is left out."""
    kinds, notes = dict(TASKS), []
    if subject.task.answers is None:
        del kinds["arbitrary_map"]
        notes.append(
            f"arbitrary_map: not searched; pairs of {subject.task.name} have answers of their own, "
            "and nothing in a prompt tells member A from member B"
        )
    jobs = []
    for kind, make in kinds.items():
        try:
            jobs += [(kind, make(subject.task, seed), seed) for seed in seeds]
        except ValueError as error:
            notes.append(f"{kind}: not searched; {error}")
    return jobs, notes


def null_models(subject: Subject, seeds: Sequence[int]) -> Iterator[tuple[str, int, nn.Module]]:
    """Kind, seed and model of every search of the real task in a random model, one at a time."""
    for kind, make in MODELS.items():
        for seed in seeds:
            yield kind, seed, make(subject.model, seed)


def text_for_means(subject: Subject) -> Tensor | None:
    """Tokens on which a null model's means are taken; None if there are none.

    Where removed nodes are not set to means over text, any tokens do.
    """
    if subject.tokens is not None:
        return subject.tokens[:MEANS]
    ablation = search_config(subject, subject.config.seed).ablation
    return subject.discovery.tokens[:MEANS] if ablation in ("zero", "task_mean") else None
