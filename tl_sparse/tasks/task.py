"""The nouns of a task: its specification, the task bound to a tokenizer, and batches of prompts."""

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_sparse.tasks.contexts import Split, check_split

MakePair = Callable[[random.Random, Split], tuple[str, str]]

_TRIES: Final = 50  # draws per wanted pair before repeats are accepted or a failure is reported
_CHECKED: Final = 8  # prompts of a batch whose boundary with the answer is verified


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Prompts in pairs: rows 2i and 2i+1 are members A and B of pair i."""

    tokens: Int[Tensor, "prompt pos"]
    """Ids, the beginning-of-sequence token first, padded on the right."""
    last: Int[Tensor, " prompt"]
    """Index of each prompt's last real token, whose next token is asked for."""
    answer: Int[Tensor, " prompt"]
    """Id of the correct next token."""
    other: Int[Tensor, " prompt"]
    """Id of the answer that is wrong here and right for the other member of the pair."""
    prompts: tuple[str, ...]
    """The texts, without the beginning-of-sequence token."""

    def __len__(self) -> int:
        """The number of prompts, twice the number of pairs."""
        return len(self.prompts)

    def to(self, device: torch.device | str) -> "TaskBatch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            last=self.last.to(device),
            answer=self.answer.to(device),
            other=self.other.to(device),
        )

    def pairs(self, start: int, stop: int) -> "TaskBatch":
        """The pairs `start` to `stop - 1` as a batch of the same padded length."""
        rows = slice(2 * start, 2 * stop)
        return replace(
            self,
            tokens=self.tokens[rows],
            last=self.last[rows],
            answer=self.answer[rows],
            other=self.other[rows],
            prompts=self.prompts[rows],
        )


@dataclass(frozen=True)
class TaskSpec:
    """A task before it meets a tokenizer; made by the decorator `task`."""

    name: str
    """The name of the decorated function."""
    description: str
    """Its docstring: what decides the answer."""
    answers: tuple[str, str]
    """The correct next token of member A and of member B."""
    source: str
    """Where the task comes from."""
    make: MakePair
    """Draws one pair of prompts (A, B) for a split."""


def task(*, answers: tuple[str, str], source: str) -> Callable[[MakePair], TaskSpec]:
    """Turn a function `(rng, split) -> (prompt A, prompt B)` into a task specification.

    The function's name and docstring become the task's; a missing docstring or two equal answers
    are a `ValueError`. All randomness must come from `rng`.
    """

    def specify(make: MakePair) -> TaskSpec:
        description = inspect.getdoc(make)
        name = getattr(make, "__name__", repr(make))
        if not description:
            raise ValueError(f"task {name!r} needs a docstring that says what decides the answer")
        if answers[0] == answers[1]:
            raise ValueError(f"task {name!r} has twice the answer {answers[0]!r}")
        return TaskSpec(name, description, answers, source, make)

    return specify


@dataclass(frozen=True, eq=False)
class Task:
    """A task bound to a tokenizer: it makes batches of prompts."""

    name: str
    """Name in the registry."""
    description: str
    """What decides the answer."""
    answers: tuple[str, str]
    """The correct next token of member A and of member B, as text."""
    answer_ids: tuple[int, int]
    """The same as token ids."""
    source: str
    """Where the task comes from."""
    max_tokens: int
    """No prompt is longer, its beginning-of-sequence token included."""
    tokenizer: PreTrainedTokenizerBase
    """Turns prompts into ids."""
    make: MakePair
    """Draws one pair of prompts (A, B) for a split."""

    @classmethod
    def bind(
        cls, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 64
    ) -> "Task":
        """The task for a tokenizer; `ValueError` if an answer is not one token of it."""
        if tokenizer.bos_token_id is None:
            raise ValueError(f"task {spec.name!r} needs a tokenizer with a beginning-of-text token")
        if max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, not {max_tokens}")
        ids = []
        for answer in spec.answers:
            encoded = tokenizer.encode(answer, add_special_tokens=False)
            if len(encoded) != 1:
                parts = [tokenizer.decode([i]) for i in encoded]
                raise ValueError(
                    f"task {spec.name!r} needs the answer {answer!r} as one token; "
                    f"this tokenizer splits it into {parts}"
                )
            ids.append(encoded[0])
        return cls(
            name=spec.name,
            description=spec.description,
            answers=spec.answers,
            answer_ids=(ids[0], ids[1]),
            source=spec.source,
            max_tokens=max_tokens,
            tokenizer=tokenizer,
            make=spec.make,
        )

    def batch(self, n_pairs: int, *, split: Split, seed: int) -> TaskBatch:
        """Draw `n_pairs` pairs; the same arguments give the same prompts.

        Pairs are distinct as long as new ones can be found. Prompts that are too long lose whole
        lines at their start, the same ones in both members; a pair that cannot be shortened so is
        drawn again. Raises `ValueError` for an unknown split, when no pair fits `max_tokens`, and
        when the tokenizer would write a prompt's end and its answer as one token.
        """
        check_split(split)
        if n_pairs < 1:
            raise ValueError(f"n_pairs must be at least 1, not {n_pairs}")
        rng = random.Random(f"{self.name} {split} {seed}")
        chosen: list[tuple[list[int], list[int]]] = []
        seen: set[tuple[int, ...]] = set()
        repeats: list[tuple[list[int], list[int]]] = []
        for _ in range(_TRIES):
            drawn = [self.make(rng, split) for _ in range(n_pairs - len(chosen))]
            ids = self._encode([prompt for pair in drawn for prompt in pair])
            for first, second in zip(ids[::2], ids[1::2], strict=True):
                pair = self._shortened(first, second)
                if pair is None:
                    continue
                key = (*pair[0], -1, *pair[1])
                (repeats if key in seen else chosen).append(pair)
                seen.add(key)
            if len(chosen) == n_pairs:
                break
        if not chosen:
            raise ValueError(
                f"no prompt of task {self.name!r} fits max_tokens={self.max_tokens}; raise it"
            )
        pool = chosen + repeats
        chosen += [pool[i % len(pool)] for i in range(n_pairs - len(chosen))]
        members = [member for pair in chosen for member in pair]
        self._check_boundary(members[:_CHECKED])
        return self._collate(members)

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        return self.tokenizer(prompts, add_special_tokens=False)["input_ids"]

    def _shortened(self, first: list[int], second: list[int]) -> tuple[list[int], list[int]] | None:
        """Both members cut at the start of the same line, or None if that cannot make them fit.

        A cut prompt begins with a newline token, which also carries its first line's indent.
        """
        excess = max(len(first), len(second)) + 1 - self.max_tokens
        if excess <= 0:
            return first, second
        for i, (a, b) in enumerate(zip(first, second, strict=False)):
            if a != b:
                return None  # from here on lies what decides the answer
            if i >= excess and str(self.tokenizer.decode([a])).startswith("\n"):
                return first[i:], second[i:]
        return None

    def _check_boundary(self, members: list[list[int]]) -> None:
        for i, ids in enumerate(members):
            prompt, answer = str(self.tokenizer.decode(ids)), self.answers[i % 2]
            if self._encode([prompt + answer])[0] != [*ids, self.answer_ids[i % 2]]:
                raise ValueError(
                    f"this tokenizer cannot pose task {self.name!r}: "
                    f"it joins the answer {answer!r} to the end of {prompt!r}"
                )

    def _collate(self, members: list[list[int]]) -> TaskBatch:
        bos, pad = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
        longest = max(map(len, members)) + 1
        filler = bos if pad is None else pad
        rows = [[bos, *ids, *[filler] * (longest - 1 - len(ids))] for ids in members]
        answer = torch.tensor(self.answer_ids).repeat(len(members) // 2)
        other = torch.tensor(self.answer_ids[::-1]).repeat(len(members) // 2)
        return TaskBatch(
            tokens=torch.tensor(rows),
            last=torch.tensor([len(ids) for ids in members]),
            answer=answer,
            other=other,
            prompts=tuple(self.tokenizer.batch_decode(members)),
        )
