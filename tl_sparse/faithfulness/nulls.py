"""Nulls: tasks and models for which there should be no small circuit .

If nonsense gets circuits as small as the real task's, a small circuit says nothing (Drori 2026).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.tasks import SPLITS, Pair, Split, Task
from tl_sparse.tasks.task import MakePair, StoredPairs

CHECKED = 32  # pairs of each split that an arbitrary token must fit


class NoTokensLeft(ValueError):
    """The vocabulary has no tokens that a null task could use for answers."""


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
        make=answered(task.make, None),
    )


def arbitrary_map(task: Task, seed: int = 0) -> Task:
    """The task with two random tokens for answers, the same for all prompts.

    The nonsense task of Drori 2026. Where the members of a pair differ by chance alone, as in tasks
    whose pairs have answers of their own, nothing tells A from B, and no circuit can do it.

    Raises:
        NoTokensLeft: no two tokens of the vocabulary fit.
    """
    (first, first_id), (second, second_id) = arbitrary_tokens(task, seed)
    return replace(
        task,
        name=f"{task.name}:arbitrary_map:{seed}",
        description=f"{task.description}\n\nNull: the answers are {first!r} and {second!r}.",
        answers=(first, second),
        answer_ids=(first_id, second_id),
        incorrect_ids=None,
        make=answered(task.make, (first, second)),
    )


def constant_answer(task: Task, seed: int = 0) -> Task:
    """The task in which a random token follows both members, against another random one.

    Raises:
        NoTokensLeft: no two tokens of the vocabulary fit.
    """
    (right, right_id), (wrong, wrong_id) = arbitrary_tokens(task, seed)
    return replace(
        task,
        name=f"{task.name}:constant_answer:{seed}",
        description=f"{task.description}\n\nNull: {right!r} always follows, {wrong!r} never.",
        answers=(right, right),
        answer_ids=(right_id, right_id),
        incorrect_ids=(wrong_id, wrong_id),
        make=answered(task.make, (right, right)),
    )


@dataclass(frozen=True)
class Answered:
    """Draws the pairs of a task; those that have answers of their own get others."""

    make: MakePair
    """Draws the task's pairs."""
    answers: tuple[str, str] | None
    """The answers; None swaps the pair's own."""

    def __call__(self, rng: random.Random, split: Split) -> tuple[str, str] | Pair:
        """A pair of prompts for a split."""
        drawn = self.make(rng, split)
        return again(drawn, self.answers) if isinstance(drawn, Pair) else drawn


def answered(
    make: MakePair | StoredPairs, answers: tuple[str, str] | None
) -> MakePair | StoredPairs:
    """The same prompts; pairs that have answers of their own get others: None swaps them."""
    if not isinstance(make, StoredPairs):
        return Answered(make, answers)
    return StoredPairs(
        train=tuple(again(pair, answers) for pair in make.train),
        held_out=tuple(again(pair, answers) for pair in make.held_out),
    )


def again(pair: Pair, answers: tuple[str, str] | None) -> Pair:
    """A pair with other answers; None swaps its own, correct and incorrect."""
    if answers is None and pair.incorrect is not None:
        return Pair(pair.prompts, pair.incorrect, pair.answers)
    return Pair(pair.prompts, pair.answers[::-1] if answers is None else answers)


def arbitrary_tokens(task: Task, seed: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """Two random tokens that the prompts say nothing about, as texts and ids.

    They are no special tokens, stand in none of the sampled prompts, are no answers of theirs, and
    are not joined to their ends by the tokenizer.

    Raises:
        NoTokensLeft: the vocabulary has no two such tokens.
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
        raise NoTokensLeft(f"the vocabulary has no two tokens that can follow all of {task.name}")
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


TASKS: dict[str, Callable[[Task, int], Task]] = {
    "label_swap": lambda task, seed: label_swap(task),
    "arbitrary_map": arbitrary_map,
    "constant_answer": constant_answer,
}
"""Null tasks by name, each made from a task and a seed."""
MODELS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "reinitialised": reinitialised,
    "shuffled_weights": shuffled_weights,
}
"""Null models by name, each made from a model and a seed."""
