"""The nouns of a task: its specification, the task bound to a tokenizer, and batches of prompts."""

import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter
from typing import Any, Final

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_sparse.tasks.contexts import SPLITS, Split, check_split
from tl_sparse.views import frame_html


class TaskDoesNotFit(ValueError):
    """A tokenizer or a length cannot express a task."""


@dataclass(frozen=True)
class Pair:
    """Two prompts with answers of their own, where a task has no fixed ones."""

    prompts: tuple[str, str]
    """Members A and B."""
    answers: tuple[str, str]
    """The correct next token of each."""
    incorrect: tuple[str, str] | None = None
    """The incorrect next token of each; None if each has the other's correct one."""


MakePair = Callable[[random.Random, Split], tuple[str, str] | Pair]


@dataclass(frozen=True)
class StoredPairs:
    """All pairs of a task with a fixed number of them, as from a file."""

    train: tuple[Pair, ...]
    """Those of the training split."""
    held_out: tuple[Pair, ...]
    """Those of the held-out split."""

    def of(self, split: Split) -> tuple[Pair, ...]:
        """The pairs of a split."""
        return self.train if split == "train" else self.held_out


SPLIT_IS_FOR: Final[dict[Split, str]] = {
    "train": "without train pairs nothing can be pruned on it, but models and circuits measured",
    "held_out": "without held_out pairs nothing can be pruned on it, and losses are those of the "
    "train split (leave `split` out of the lines, and a quarter of them is held out)",
}
"""What a task cannot do without the pairs of a split."""

_TRIES: Final = 50  # draws per wanted pair before repeats are accepted or a failure is reported
_CHECKED: Final = 8  # prompts of a batch whose boundary with the answer is verified


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Prompts in pairs: rows 2i and 2i+1 are members A and B of pair i."""

    tokens: Int[Tensor, "prompt pos"]
    """Ids, the beginning-of-sequence token first (but for a task without), padded on the right."""
    last: Int[Tensor, " prompt"]
    """Index of each prompt's last real token, whose next token is asked for."""
    correct_token: Int[Tensor, " prompt"]
    """Id of the correct next token."""
    incorrect_token: Int[Tensor, " prompt"]
    """Id of the incorrect next token; usually the correct one of the other member of the pair."""
    prompts: tuple[str, ...]
    """The texts, without the beginning-of-sequence token."""
    answers: tuple[str, ...]
    """The correct next token of each, as text."""

    def __len__(self) -> int:
        """The number of prompts, twice the number of pairs."""
        return len(self.prompts)

    def __repr__(self) -> str:
        width = self.tokens.shape[1]
        return f"TaskBatch({len(self) // 2:,} pairs of prompts, at most {width} tokens each)"

    def to_dataframe(self) -> pd.DataFrame:
        """A row per prompt: pair, member (A or B), prompt, answer, tokens (its length)."""
        n = len(self)
        return pd.DataFrame(
            {"pair": [i // 2 for i in range(n)], "member": ["AB"[i % 2] for i in range(n)],
             "prompt": self.prompts, "answer": self.answers, "tokens": (self.last + 1).tolist()}
        )  # fmt: skip

    def _repr_html_(self) -> str:
        return prompts_html(f"{len(self) // 2:,} pairs of prompts", "a batch", self)

    def to(self, device: torch.device | str) -> "TaskBatch":
        """The same batch with its tensors on `device`."""
        names = ("tokens", "last", "correct_token", "incorrect_token")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def pairs(self, start: int, stop: int) -> "TaskBatch":
        """The pairs `start` to `stop - 1` as a batch of the same padded length."""
        return self.select(range(len(self) // 2)[start:stop])

    def select(self, pairs: Sequence[int]) -> "TaskBatch":
        """Some of the pairs, in any order, as a batch of the same padded length."""
        rows = [2 * pair + member for pair in pairs for member in (0, 1)]
        return replace(
            self,
            tokens=self.tokens[rows],
            last=self.last[rows],
            correct_token=self.correct_token[rows],
            incorrect_token=self.incorrect_token[rows],
            prompts=tuple(self.prompts[row] for row in rows),
            answers=tuple(self.answers[row] for row in rows),
        )


@dataclass(frozen=True)
class TaskSpec:
    """A task before it meets a tokenizer; made by the decorator `task`."""

    name: str
    """The name of the decorated function."""
    description: str
    """Its docstring: what decides the answer."""
    answers: tuple[str, str] | None
    """The correct next token of member A and of member B; None if every pair has its own."""
    source: str
    """Where the task comes from."""
    make: MakePair
    """Draws one pair of prompts (A, B) for a split."""
    may_shorten: bool = True
    """Whether a long prompt may lose whole lines at its start."""


class Decorated:
    """A function in whose place a decorator put an object that holds this as its ``make``.

    It is called like the function and pickled by name, which no longer leads to the function: so
    tasks go to other processes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.__wrapped__ = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the function returns."""
        return self.__wrapped__(*args, **options)

    def __reduce__(self) -> str | tuple[Any, ...]:
        name = self.__wrapped__.__qualname__
        try:
            found = attrgetter(name)(sys.modules[self.__wrapped__.__module__])
        except (AttributeError, KeyError):
            found = None
        # decorated by a call, the function itself is still there
        return (Decorated, (found,)) if found is self.__wrapped__ else f"{name}.make"


def task(*, answers: tuple[str, str] | None = None, source: str) -> Callable[[MakePair], TaskSpec]:
    """Turn a function `(rng, split) -> (prompt A, prompt B)` into a task specification.

    Without `answers` the function returns a `Pair`, whose answers are its own. The function's name
    and docstring become the task's; a missing docstring or two equal answers are a `ValueError`.
    All randomness must come from `rng`.
    """

    def specify(make: MakePair) -> TaskSpec:
        description = inspect.getdoc(make)
        name = getattr(make, "__name__", repr(make))
        if not description:
            raise ValueError(f"task {name!r} needs a docstring that says what decides the answer")
        if answers is not None and answers[0] == answers[1]:
            raise ValueError(f"task {name!r} has twice the answer {answers[0]!r}")
        return TaskSpec(name, description, answers, source, Decorated(make))

    return specify


@dataclass(frozen=True)
class _Encoded:
    """A pair as token ids."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    answers: tuple[str, str]
    answer_ids: tuple[int, int]
    incorrect_ids: tuple[int, int] | None = None
    """None: as the task has it."""


@dataclass(frozen=True, eq=False)
class Task:
    """A task bound to a tokenizer: it makes batches of prompts."""

    name: str
    """Name in the registry."""
    description: str
    """What decides the answer."""
    answers: tuple[str, str] | None
    """The correct next token of member A and of member B, as text; None if pairs have their own."""
    answer_ids: tuple[int, int] | None
    """The same as token ids."""
    source: str
    """Where the task comes from."""
    max_tokens: int
    """No prompt is longer, its beginning-of-sequence token included."""
    tokenizer: PreTrainedTokenizerBase
    """Turns prompts into ids."""
    make: MakePair | StoredPairs
    """Draws one pair of prompts (A, B) for a split, or holds all there are."""
    may_shorten: bool = True
    """Whether a long prompt may lose whole lines at its start."""
    incorrect_ids: tuple[int, int] | None = None
    """Ids of the incorrect next token of members A and B; None if each is the other's correct
    one."""
    prepend_bos: bool = True
    """Whether prompts begin with the beginning-of-text token; released circuits' may not."""

    @classmethod
    def bind(
        cls, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 64
    ) -> "Task":
        """The task for a tokenizer; `ValueError` if an answer is not one token of it.

        Of a task whose pairs have their own answers, pairs with a split answer are left out; it is
        refused if all of those tried are.
        """
        check_tokenizer(spec.name, tokenizer, max_tokens)
        ids = None
        if spec.answers is not None:
            first, second = spec.answers
            ids = (single(spec.name, first, tokenizer), single(spec.name, second, tokenizer))
        bound = cls(
            name=spec.name,
            description=spec.description,
            answers=spec.answers,
            answer_ids=ids,
            source=spec.source,
            max_tokens=max_tokens,
            tokenizer=tokenizer,
            make=spec.make,
            may_shorten=spec.may_shorten,
        )
        if spec.answers is None:
            for split in SPLITS:
                rng = random.Random(0)
                bound._check_answers([spec.make(rng, split) for _ in range(_TRIES)])
        return bound

    def __repr__(self) -> str:
        return f"Task({self.name!r}: {self.facts})"

    @property
    def facts(self) -> str:
        """What its prompts are, in a line."""
        if isinstance(self.make, StoredPairs):
            numbers = [f"{len(self.make.of(split)):,} {split}" for split in SPLITS]
            missing = [SPLIT_IS_FOR[split] for split in SPLITS if not self.make.of(split)]
            return "; ".join([f"{' and '.join(numbers)} pairs", *missing])
        answers = "answers of their own" if self.answers is None else (
            f"answers {self.answers[0]!r} and {self.answers[1]!r}"
        )  # fmt: skip
        return f"{answers}, prompts of at most {self.max_tokens} tokens"

    def _repr_html_(self) -> str:
        split = next((s for s in SPLITS if not isinstance(self.make, StoredPairs)
                      or self.make.of(s)), SPLITS[0])  # fmt: skip
        line = f"{self.description} {self.facts}; these are of the split {split!r}"
        return prompts_html(self.name, line, self.batch(3, split=split, seed=0))

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
        source = self._pairs(split, seed)
        chosen: list[_Encoded] = []
        seen: set[_Encoded] = set()
        repeats: list[_Encoded] = []
        known: dict[tuple[str, str] | Pair, _Encoded | None] = {}  # few distinct ones, drawn often
        for _ in range(_TRIES):
            drawn = list(islice(source, n_pairs - len(chosen)))
            if not drawn:
                break
            new = [pair for pair in dict.fromkeys(drawn) if pair not in known]
            known.update(zip(new, self._encoded(new) if new else (), strict=True))
            for pair in map(known.__getitem__, drawn):
                if pair is None:
                    continue
                (repeats if pair in seen else chosen).append(pair)
                seen.add(pair)
            if len(chosen) == n_pairs:
                break
        if not chosen:
            raise TaskDoesNotFit(
                f"no prompt of task {self.name!r} fits max_tokens={self.max_tokens}; raise it"
            )
        pool = chosen + repeats
        chosen += [pool[i % len(pool)] for i in range(n_pairs - len(chosen))]
        self._check_boundary(chosen[: _CHECKED // 2])
        return self._collate(chosen)

    def check_pair(self, pair: Pair) -> None:
        """Raise `ValueError` unless this tokenizer and length can express the pair."""
        for answer in (*pair.answers, *(pair.incorrect or ())):
            single(self.name, answer, self.tokenizer)
        encoded = next(self._encoded([pair]))
        if encoded is None:
            raise ValueError(f"the prompts do not fit max_tokens={self.max_tokens}")
        if encoded.first == encoded.second:
            raise ValueError("this tokenizer makes the same tokens of both prompts")
        self._check_boundary([encoded])

    def _pairs(self, split: Split, seed: int) -> Iterator[tuple[str, str] | Pair]:
        """Drawn pairs without end, or the stored ones in an order of the seed's."""
        rng = random.Random(f"{self.name} {split} {seed}")
        if isinstance(self.make, StoredPairs):
            stored = self.make.of(split)
            if not stored:
                raise ValueError(
                    f"task {self.name!r} has no pair in the split {split!r}: {SPLIT_IS_FOR[split]}"
                )
            yield from rng.sample(stored, len(stored))
            return
        while True:
            yield self.make(rng, split)

    def _encoded(self, pairs: Sequence[tuple[str, str] | Pair]) -> Iterator[_Encoded | None]:
        """Each pair as ids; None where it cannot be made to fit or an answer is split."""
        texts = [pair.prompts if isinstance(pair, Pair) else pair for pair in pairs]
        ids = self._encode([prompt for pair in texts for prompt in pair])
        for pair, first, second in zip(pairs, ids[::2], ids[1::2], strict=True):
            answers = pair.answers if isinstance(pair, Pair) else self.answers
            if answers is None:
                raise ValueError(f"task {self.name!r} has no answers: its function returns a Pair")
            answer_ids, incorrect_ids = self.answer_ids, None
            if isinstance(pair, Pair):
                answer_ids = self._two_ids(answers)
                incorrect_ids = None if pair.incorrect is None else self._two_ids(pair.incorrect)
            fitting = self._shortened(first, second)
            split = isinstance(pair, Pair) and pair.incorrect is not None and incorrect_ids is None
            if fitting is None or answer_ids is None or split:
                yield None
            else:
                yield _Encoded(
                    tuple(fitting[0]), tuple(fitting[1]), answers, answer_ids, incorrect_ids
                )

    def _check_answers(self, pairs: Sequence[tuple[str, str] | Pair]) -> None:
        """Raise `ValueError` if the tokenizer splits an answer of every pair."""
        reason = None
        for pair in pairs:
            if not isinstance(pair, Pair):
                raise ValueError(f"task {self.name!r} has no answers: its function returns a Pair")
            try:
                for answer in (*pair.answers, *(pair.incorrect or ())):
                    single(self.name, answer, self.tokenizer)
            except ValueError as error:
                reason = reason or error
            else:
                return
        if reason is not None:
            raise reason

    def _two_ids(self, texts: tuple[str, str]) -> tuple[int, int] | None:
        """Ids of two answers; None if one of them is split."""
        one, other = self._encode(list(texts))
        return (one[0], other[0]) if len(one) == len(other) == 1 else None

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        return self.tokenizer(prompts, add_special_tokens=False)["input_ids"]

    def _shortened(self, first: list[int], second: list[int]) -> tuple[list[int], list[int]] | None:
        """Both members cut at the start of the same line, or None if that cannot make them fit.

        A cut prompt begins with a newline token, which also carries its first line's indent.
        """
        excess = max(len(first), len(second)) + self.prepend_bos - self.max_tokens
        if excess <= 0:
            return first, second
        if not self.may_shorten:
            return None
        for i, (a, b) in enumerate(zip(first, second, strict=False)):
            if a != b:
                return None  # from here on lies what decides the answer
            if i >= excess and self._begins_line(a):
                return first[i:], second[i:]
        return None

    def _begins_line(self, token: int) -> bool:
        """Whether a token's text begins with a newline; decoded once a token."""
        known = self._line_starts
        if token not in known:
            known[token] = str(self.tokenizer.decode([token])).startswith("\n")
        return known[token]

    @functools.cached_property
    def _line_starts(self) -> dict[int, bool]:
        return {}

    def _check_boundary(self, pairs: Sequence[_Encoded]) -> None:
        for pair in pairs:
            members = zip((pair.first, pair.second), pair.answers, pair.answer_ids, strict=True)
            for ids, answer, answer_id in members:
                prompt = str(self.tokenizer.decode(list(ids)))
                if self._encode([prompt + answer])[0] != [*ids, answer_id]:
                    raise TaskDoesNotFit(
                        f"this tokenizer cannot express task {self.name!r}: "
                        f"it joins the answer {answer!r} to the end of {prompt!r}"
                    )

    def _collate(self, pairs: Sequence[_Encoded]) -> TaskBatch:
        bos, pad = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
        members = [list(ids) for pair in pairs for ids in (pair.first, pair.second)]
        longest = max(map(len, members))
        filler = bos if pad is None else pad
        start = [bos] if self.prepend_bos else []
        rows = [[*start, *ids, *[filler] * (longest - len(ids))] for ids in members]
        return TaskBatch(
            tokens=torch.tensor(rows),
            last=torch.tensor([len(start) + len(ids) - 1 for ids in members]),
            correct_token=torch.tensor([i for pair in pairs for i in pair.answer_ids]),
            incorrect_token=torch.tensor(
                [
                    i
                    for p in pairs
                    for i in p.incorrect_ids or self.incorrect_ids or p.answer_ids[::-1]
                ]
            ),
            prompts=tuple(self.tokenizer.batch_decode(members)),
            answers=tuple(answer for pair in pairs for answer in pair.answers),
        )


def prompts_html(title: str, line: str, batch: TaskBatch) -> str:
    """Some prompts for a notebook, at most sixteen."""
    frame = batch.to_dataframe().head(16).drop(columns="tokens")
    if len(batch) > len(frame):
        line = f"{line}; the first {len(frame)} of {len(batch):,} prompts"
    return frame_html(title, line, frame.assign(answer=frame["answer"].map(repr)))


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    """Raise `ValueError` if no task can be set up with the tokenizer and this length."""
    if tokenizer.bos_token_id is None:
        raise ValueError(f"task {name!r} needs a tokenizer with a beginning-of-text token")
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, not {max_tokens}")


def single(name: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of an answer; `ValueError` with the pieces if it is not one token."""
    encoded = tokenizer.encode(answer, add_special_tokens=False)
    if len(encoded) != 1:
        parts = [tokenizer.decode([i]) for i in encoded]
        raise TaskDoesNotFit(
            f"task {name!r} needs the answer {answer!r} as one token; "
            f"this tokenizer splits it into {parts}"
        )
    return encoded[0]
