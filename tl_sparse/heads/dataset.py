"""``ContrastiveDataset``: prompts on which a task can be done, and prompts on which it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tl_sparse.nodes.prompts import Prompts, prompts_of
from tl_sparse.views.display import fields_html

POSITIONS = ("mean", "last", "max")


@dataclass(frozen=True, eq=False, repr=False)
class ContrastiveDataset:
    """Positive prompts, then negative ones: alike, but that the task cannot be done on these."""

    name: str
    """Name of the task."""
    prompts: Prompts
    """All of them, the positive ones first, padded on the right."""
    n_positive: int
    """How many are positive. Where there are as many negative ones, negative prompt i is made
    from positive prompt i."""
    roles: Mapping[str, Int[Tensor, " prompt"]] = field(default_factory=dict)
    """Name of a role, such as the second subject → where its last token stands in each prompt."""

    def __post_init__(self) -> None:
        if not 0 < self.n_positive < len(self.prompts):
            raise ValueError(
                f"{self.name}: {self.n_positive} positive of {len(self.prompts)} prompts; there "
                "must be positive and negative ones"
            )
        for name, at in self.roles.items():
            if name in POSITIONS:
                raise ValueError(f"{self.name}: a role cannot be called {name!r}")
            if at.shape != self.prompts.last.shape or bool((at > self.prompts.last).any()):
                raise ValueError(f"{self.name}: role {name!r} is not one token of every prompt")

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.prompts)

    def __repr__(self) -> str:
        roles = f", roles {', '.join(self.roles)}" if self.roles else ""
        return (
            f"ContrastiveDataset({self.name!r}, {self.n_positive} positive and "
            f"{len(self) - self.n_positive} negative prompts of up to "
            f"{self.prompts.tokens.shape[1]} tokens{roles})"
        )

    def _repr_html_(self) -> str:
        return fields_html(self)

    @property
    def positive(self) -> Bool[Tensor, " prompt"]:
        """Which prompts are positive."""
        return torch.arange(len(self)) < self.n_positive

    @property
    def paired(self) -> bool:
        """Whether negative prompt i is made from positive prompt i."""
        return len(self) == 2 * self.n_positive

    def at(self, position: str) -> Int[Tensor, " prompt"]:
        """Where in each prompt: its ``last`` token, or that of a role.

        Raises:
            ValueError: no such role.
        """
        if position == "last":
            return self.prompts.last
        if position not in self.roles:
            raise ValueError(
                f"position={position!r}: choose from {', '.join((*POSITIONS, *self.roles))}"
            )
        return self.roles[position]

    def take(self, n_positive: int, n_negative: int | None = None) -> ContrastiveDataset:
        """The first of its positive and of its negative prompts (by default as many).

        Raises:
            ValueError: it has fewer.
        """
        n_negative = n_positive if n_negative is None else n_negative
        if not (0 < n_positive <= self.n_positive) or not (
            0 < n_negative <= len(self) - self.n_positive
        ):
            raise ValueError(
                f"{n_positive} positive and {n_negative} negative prompts of {self!r} were asked "
                "for"
            )
        rows = torch.cat([torch.arange(n_positive), self.n_positive + torch.arange(n_negative)]).to(
            self.prompts.last.device
        )
        return replace(
            self, prompts=self.prompts.rows(rows), n_positive=n_positive,
            roles={name: at[rows] for name, at in self.roles.items()},
        )  # fmt: skip

    @classmethod
    def of(
        cls,
        name: str,
        model: nn.Module,
        positives: Sequence[str] | Sequence[Sequence[int]] | Int[Tensor, "prompt pos"],
        negatives: Sequence[str] | Sequence[Sequence[int]] | Int[Tensor, "prompt pos"],
        answers: Sequence[tuple[str, str]] | Sequence[tuple[int, int]] | None = None,
        roles: Mapping[str, Sequence[int]] | None = None,
    ) -> ContrastiveDataset:
        """The dataset of these prompts: texts, which the model tokenizes, or token ids.

        Args:
            name: Name of the task.
            model: The model whose prompts they are.
            positives: Prompts on which the task can be done.
            negatives: Prompts on which it cannot.
            answers: The correct and the incorrect next token of each positive prompt, as texts or
                ids, for methods that need a task; a negative prompt has those of its positive one.
            roles: Name of a role → its place in each prompt, positive ones first.

        Raises:
            ValueError: no prompts, answers that are not one token each or not one pair for each
                positive prompt, or a role that is not in every prompt.
        """
        parts = [
            prompts_of(model, given, f"{name}, {what}")
            for given, what in ((positives, "positives"), (negatives, "negatives"))
        ]
        width = max(part.tokens.shape[1] for part in parts)
        tokens = torch.cat(
            [nn.functional.pad(p.tokens, (0, width - p.tokens.shape[1])) for p in parts]
        )
        prompts = Prompts(
            tokens, torch.cat([p.last for p in parts]), parts[0].texts + parts[1].texts
        )
        n = len(parts[0])
        if answers is not None:
            if len(answers) != n or len(parts[1]) != n:
                raise ValueError(
                    f"{name}: {len(answers)} pairs of answers for {n} positive and "
                    f"{len(parts[1])} negative prompts; there must be as many of each"
                )
            ids = answer_ids(name, model, answers).repeat(2, 1).to(tokens.device)
            prompts = Prompts(
                tokens, prompts.last, prompts.texts, correct=ids[:, 0], incorrect=ids[:, 1]
            )
        places = {
            role: torch.as_tensor(at, device=tokens.device) for role, at in (roles or {}).items()
        }
        return cls(name, prompts, n, places)


def answer_ids(
    name: str, model: nn.Module, answers: Sequence[tuple[str, str]] | Sequence[tuple[int, int]]
) -> Int[Tensor, "prompt 2"]:
    """Ids of correct and incorrect next tokens.

    Raises:
        ValueError: an answer is not one token of the model's tokenizer, or both are the same.
    """
    tools: Any = model
    texts = {text for pair in answers for text in pair if isinstance(text, str)}
    ids: dict[Any, int] = {}
    split = []
    if texts and getattr(model, "tokenizer", None) is None:
        raise ValueError(f"{name}: the model has no tokenizer, so answers must be token ids")
    for text in sorted(texts):
        pieces = tools.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1:
            split.append(f"{text!r} ({len(pieces)})")
        else:
            ids[text] = pieces[0]
    if split:
        raise ValueError(
            f"{name}: each answer must be one token of the model's tokenizer; it splits "
            f"{', '.join(split[:5])}" + (f" and {len(split) - 5} more" if len(split) > 5 else "")
        )
    rows = torch.tensor([[ids.get(a, a) for a in pair] for pair in answers], dtype=torch.int64)
    if bool((rows[:, 0] == rows[:, 1]).any()):
        first = int((rows[:, 0] == rows[:, 1]).nonzero()[0])
        raise ValueError(f"{name}: pair {first} has twice the answer {answers[first][0]!r}")
    return rows
