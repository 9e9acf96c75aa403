"""Contrastive datasets by name: the families of prompts, and this package's tasks."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tl_sparse import tasks
from tl_sparse.heads.dataset import ContrastiveDataset
from tl_sparse.heads.families import FAMILIES, Example, Family, Words
from tl_sparse.nodes.prompts import prompts_of
from tl_sparse.tasks.contexts import Split, check_split
from tl_sparse.tasks.task import Pair, Task, TaskSpec

TRIES = 50  # draws for each wanted example
SHOWN = 3  # words in a message


def contrastive_names() -> tuple[str, ...]:
    """Names that :func:`contrastive` knows."""
    return (*FAMILIES, *tasks.names())


def contrastive(
    task: str | Task, model: nn.Module, n: int = 250, *, split: Split = "train", seed: int = 0
) -> ContrastiveDataset:
    """``n`` positive prompts of a task, and as many negative ones that lack what makes it possible.

    Families are ``ioi``, ``greater_than``, ``docstring``, ``induction`` and ``pronoun``. Of any
    other task the positive prompts are members A and the negative ones members B:
    both can be done, and what they differ in decides the answer. Negative prompt i is made from
    positive prompt i. Prompts are distinct as long as there are others.

    Args:
        task: The name of a family or of a task of :mod:`tl_sparse.tasks`, or a task.
        model: The model whose prompts they are; its tokenizer decides which words can be used.
        n: Prompts of each kind.
        split: Which words; ``contrastive_task``'s held-out prompts have the others, where the
            tokenizer has enough of them.
        seed: Seed of the draws.

    Raises:
        ValueError: an unknown name, a model without a tokenizer, or one whose tokenizer splits the
            words that must be one token, or a positive and its negative prompt into different
            numbers of tokens.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    check_split(split)
    if isinstance(task, Task):
        return _of_pairs(model, task, n, split, seed)
    name, tools = task, cast(Any, model)
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(f"this {type(model).__name__} has no tokenizer to write prompts of {name}")
    if name not in FAMILIES:
        of_pairs = contrastive_task(name, tools.tokenizer, tools.cfg.n_ctx)
        return _of_pairs(model, of_pairs, n, split, seed)
    drawn = DrawPair(FAMILIES[name], one_token_words(FAMILIES[name], tools.tokenizer))
    rng = random.Random(f"{name} {split} {seed}")
    examples: dict[str, Example] = {}
    for _ in range(TRIES * n):
        example = drawn.example(rng, split)
        examples.setdefault(example.positive, example)
        if len(examples) == n:
            break
    chosen = list(examples.values())
    chosen += [chosen[i % len(chosen)] for i in range(n - len(chosen))]
    made = ContrastiveDataset.of(
        name, model, [e.positive for e in chosen], [e.negative for e in chosen],
        [e.answers for e in chosen],
    )  # fmt: skip
    return with_roles(made, model, [e.roles for e in chosen])


def contrastive_task(name: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 64) -> Task:
    """The same task for ``prune`` and ``evaluate``: pairs of positive prompts with two answers.

    Raises:
        ValueError: an unknown name, or a tokenizer that cannot express it.
    """
    if name not in FAMILIES:
        if name not in tasks.names():
            raise ValueError(f"{name!r}: choose from {', '.join(contrastive_names())}")
        return tasks.get(name, tokenizer, max_tokens)
    family = FAMILIES[name]
    draw = DrawPair(family, one_token_words(family, tokenizer))
    spec = TaskSpec(name, family.description, None, family.source, draw, may_shorten=False)
    return Task.bind(spec, tokenizer, max_tokens)


@dataclass(frozen=True)
class DrawPair:
    """Draws the examples of a family with words that a tokenizer has."""

    family: Family
    """The family."""
    words: Words
    """Words of one token."""

    def example(self, rng: random.Random, split: Split) -> Example:
        """One, with the words of a split: every other one, where there are enough for both."""
        first = 0 if split == "train" else 1
        mine = {
            kind: words[first::2] if len(words) >= 2 * self.family.needs[kind] else words
            for kind, words in self.words.items()
        }
        return self.family.make(rng, mine)

    def __call__(self, rng: random.Random, split: Split) -> Pair:
        """Two positive prompts; what is right for one is wrong for the other, or for both."""
        drawn = self.example(rng, split)
        wrong = (drawn.answers[1], drawn.other_answers[1])
        return Pair(
            (drawn.positive, drawn.other), (drawn.answers[0], drawn.other_answers[0]), wrong
        )


def one_token_words(family: Family, tokenizer: PreTrainedTokenizerBase) -> Words:
    """The family's words that are one token of a tokenizer; of years, both halves are one each.

    Raises:
        ValueError: fewer than it needs.
    """
    found = {}
    for kind, candidates in family.one_token.items():
        texts = list(candidates)
        if kind == "years":  # the last two digits are a token of their own, as is the rest
            texts = [part for year in candidates for part in (year[:-2], year[-2:])]
            joined = _encoded(tokenizer, list(candidates))
        pieces = _encoded(tokenizer, texts)
        if kind == "years":
            halves = [one + two for one, two in zip(pieces[::2], pieces[1::2], strict=True)]
            pieces = [
                half[:1] if len(half) == 2 and half == whole else [*whole, 0]
                for half, whole in zip(halves, joined, strict=True)
            ]
        usable = tuple(
            word
            for word, ids in zip(candidates, pieces, strict=True)
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id
        )
        if len(usable) < family.needs[kind]:
            split = [word for word in candidates if word not in usable][:SHOWN]
            shown = ", ".join(f"{word!r} -> {tokenizer.tokenize(word)}" for word in split)
            form = "a token of two digits after another" if kind == "years" else "one token"
            raise ValueError(
                f"{family.name} needs {family.needs[kind]} {kind} that this tokenizer writes as "
                f"{form}; of {len(candidates)} it has {len(usable)} ({shown})"
            )
        found[kind] = usable
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def with_roles(
    dataset: ContrastiveDataset,
    model: nn.Module,
    roles: Sequence[Mapping[str, tuple[str, int]]],
) -> ContrastiveDataset:
    """The dataset with its roles: pieces of each positive prompt, found among its tokens, and the
    same places in its negative prompt.

    Raises:
        ValueError: a piece that is not in its prompt or ends inside a token, prompts with different
            roles, or a pair of prompts of different lengths.
    """
    names = list(roles[0])
    for i, mine in enumerate(roles):
        if list(mine) != names:
            raise ValueError(
                f"{dataset.name}: prompt {i} has the roles {', '.join(mine) or 'none'}, and prompt "
                f"0 {', '.join(names) or 'none'}"
            )
    if not names:
        return dataset
    last = dataset.prompts.last
    lengths = (last[: dataset.n_positive] + 1, last[dataset.n_positive :] + 1)
    if uneven := (lengths[0] != lengths[1]).nonzero().flatten().tolist():
        i = uneven[0]
        raise ValueError(
            f"{dataset.name}: roles need prompts that differ token by token, and {len(uneven)} "
            f"pairs differ in length: positive prompt {i} has {int(lengths[0][i])} tokens, its "
            f"negative one {int(lengths[1][i])}: {dataset.prompts.texts[i]!r} and "
            f"{dataset.prompts.texts[dataset.n_positive + i]!r}"
        )
    found = {
        name: torch.tensor([_place(dataset, model, i, *mine[name]) for i, mine in enumerate(roles)])
        for name in names
    }
    places = {name: at.repeat(2).to(last) for name, at in found.items()}
    return replace(dataset, roles=places)


def _place(dataset: ContrastiveDataset, model: nn.Module, i: int, piece: str, nth: int) -> int:
    """The token in which the nth occurrence of a piece ends."""
    text = dataset.prompts.texts[i]
    # whole words count first: "Ann" is not meant by "Anna" before it
    for pattern in (re.escape(piece) + r"(?!\w)", re.escape(piece)):
        ends = [found.end() for found in re.finditer(pattern, text)]
        if len(ends) >= nth:
            break
    if not 0 < nth <= len(ends):
        raise ValueError(f"{dataset.name}: {piece!r} is not {nth} times in {text!r}")
    tools: Any = model
    begun = tools.to_tokens(text[: ends[nth - 1]])[0]
    whole = dataset.prompts.tokens[i, : len(begun)]
    if not torch.equal(begun.to(whole), whole):
        raise ValueError(f"{dataset.name}: {piece!r} ends inside a token of {text!r}")
    return len(begun) - 1


def _of_pairs(model: nn.Module, task: Task, n: int, split: Split, seed: int) -> ContrastiveDataset:
    """Members A of a task's pairs, and members B as the negative ones."""
    batch = prompts_of(model, task.batch(n, split=split, seed=seed))
    rows = torch.arange(2 * n, device=batch.last.device).view(n, 2).T.flatten()
    chosen = batch.rows(rows)
    assert chosen.correct is not None
    assert chosen.incorrect is not None
    prompts = replace(
        chosen, paired=False, correct=chosen.correct[:n].repeat(2),
        incorrect=chosen.incorrect[:n].repeat(2),
    )  # fmt: skip
    return ContrastiveDataset(task.name, prompts, n)
