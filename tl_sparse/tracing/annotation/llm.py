"""``LLMAnnotator``: a language model behind an OpenAI-compatible endpoint prunes and labels."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from tl_sparse.storage.atomic_write import append_line, write_atomic
from tl_sparse.storage.json_files import parse_json, read_json
from tl_sparse.storage.read_file import read_lines
from tl_sparse.tracing.annotation import questions
from tl_sparse.tracing.annotation.answers import (
    NODES_SCHEMA,
    WHOLE_SCHEMA,
    BadAnswer,
    NodesAnswer,
    WholeAnswer,
    nodes_answer,
    whole_answer,
)
from tl_sparse.tracing.annotation.cards import Example

KEY = "OPENAI_API_KEY"
MAX_ANSWER = 1 << 20  # characters
LOG = "costs.jsonl"
COSTS = ("kind", "model", "prompt_tokens", "completion_tokens", "seconds", "try", "cached", "error")

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class LLMAnnotator:
    """A language model that prunes and labels graphs, and judges labels.

    Every question has a strict JSON schema, and every answer is checked against it and against the
    ids that were asked about; an answer that does not fit is sent back with what is wrong, at most
    ``tries`` times in all. With ``folder`` answers are kept by the content of their question, so
    that the same one is never paid for twice, and a log says what each cost.

    The key is read from the environment variable ``OPENAI_API_KEY`` when the first question is
    asked; it is in no setting, log or file. Needs ``pip install 'tl-sparse[annotate]'``.
    """

    model: str
    """The endpoint's name of the language model."""
    base_url: str | None = None
    """Address of the endpoint, such as ``http://localhost:8000/v1``; by default OpenAI's."""
    folder: str | Path | None = None
    """Where answers and costs are kept; None: nowhere."""
    tries: int = 3
    """How often a question is asked until its answer fits."""
    temperature: float = 0.0
    """0: the likeliest answer."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    log: list[dict[str, Any]] = field(default_factory=list, compare=False)
    """What was asked by this object; the newest last."""

    def __post_init__(self) -> None:
        if self.tries < 1 or not self.timeout > 0 or not self.temperature >= 0:
            raise ValueError(f"tries={self.tries} must be at least 1, timeout={self.timeout} "
                             f"positive, temperature={self.temperature} not negative")  # fmt: skip

    def __repr__(self) -> str:
        return f"LLMAnnotator({self.model!r}, {self.base_url or 'OpenAI'})"

    @property
    def name(self) -> str:
        """The language model's name."""
        return self.model

    def nodes(self, request: dict[str, Any]) -> NodesAnswer:
        """Which nodes to keep, and what they stand for; raises what :meth:`ask` does."""
        ids = [row["id"] for row in request["nodes"]]
        check = partial(nodes_answer, ids=ids)
        return self.ask("nodes", questions.NODES, request, NODES_SCHEMA, check)

    def whole(self, request: dict[str, Any]) -> WholeAnswer:
        """What the nodes do together; raises what :meth:`ask` does."""
        ids = [row["id"] for row in request["nodes"]]
        check = partial(whole_answer, ids=ids)
        return self.ask("whole", questions.WHOLE, request, WHOLE_SCHEMA, check)

    def detects(self, label: str, examples: Sequence[Example]) -> list[bool]:
        """Whether a feature of this label is active in each text; raises what :meth:`ask` does."""
        texts = ["".join(example.words) for example in examples]
        return self._judge("detects", questions.DETECTS, {"label": label, "texts": texts})

    def fits(self, label: str, marked: Sequence[tuple[Example, frozenset[int]]]) -> list[bool]:
        """Whether a feature of this label is active at the marked tokens; raises what :meth:`ask`
        does."""
        texts = [
            "".join(f"<<{w}>>" if i in marks else w for i, w in enumerate(example.words))
            for example, marks in marked
        ]
        return self._judge("fits", questions.FITS, {"label": label, "texts": texts})

    def _judge(self, kind: str, question: str, request: dict[str, Any]) -> list[bool]:
        check = partial(questions.judged, n=len(request["texts"]))
        return self.ask(kind, question, request, questions.JUDGED_SCHEMA, check)

    def ask(
        self,
        kind: str,
        question: str,
        request: dict[str, Any],
        schema: dict[str, Any],
        check: Callable[[Any], T],
    ) -> T:
        """The checked answer to a question.

        Raises:
            ImportError: the official client is not installed.
            ValueError: there is no key in the environment (an own ``base_url`` needs none).
            BadAnswer: no answer fitted, however often it was asked.
            openai.OpenAIError: the endpoint cannot be reached or refuses.
        """
        messages: list[dict[str, str]] = [
            {"role": "system", "content": question},
            {"role": "user", "content": json.dumps(request, ensure_ascii=False, sort_keys=True)},
        ]
        name = digest(self.model, self.temperature, messages, schema)
        kept = self._kept(name, check)
        if kept is not None:
            self._note(kind, 0, 0, 0.0, 0, cached=True)
            return kept[0]
        problem = "nothing was asked"
        for number in range(1, self.tries + 1):
            text = self._complete(kind, messages, schema, number)
            try:
                value = parse_json(text[:MAX_ANSWER], "the answer")
                answer = check(value)
            except ValueError as error:  # BadAnswer is one
                problem = str(error)
                self.log[-1]["error"] = problem
                messages = [*messages[:2], {"role": "assistant", "content": text[:20_000]},
                            {"role": "user", "content": f"{problem}. Answer again."}]  # fmt: skip
                continue
            if self.folder is not None:
                Path(self.folder).mkdir(parents=True, exist_ok=True)
                path = Path(self.folder) / f"{name}.json"
                write_atomic(path, json.dumps({"kind": kind, "answer": value}))
            return answer
        raise BadAnswer(f"{self.model} gave no usable answer in {self.tries} tries: {problem}")

    def _kept(self, name: str, check: Callable[[Any], T]) -> tuple[T] | None:
        """An answer from the folder, if there is one that still fits."""
        if self.folder is None or not (path := Path(self.folder) / f"{name}.json").is_file():
            return None
        try:
            return (check(read_json(path)["answer"]),)
        except (ValueError, KeyError):
            return None  # damaged, or of another version: asked anew

    @cached_property
    def _client(self) -> Any:
        """The official client, made when the first question is asked."""
        try:
            import openai
        except ImportError as error:
            raise ImportError("an LLMAnnotator needs the official client: pip install "
                              "'tl-sparse[annotate]'") from error  # fmt: skip
        key = os.environ.get(KEY)
        if not key and self.base_url is None:
            raise ValueError(f"no key: set the environment variable {KEY}, or give base_url= of an "
                             "endpoint that needs none")  # fmt: skip
        return openai.OpenAI(
            api_key=key or "none", base_url=self.base_url, timeout=self.timeout, max_retries=2
        )

    def _complete(
        self, kind: str, messages: list[dict[str, str]], schema: dict[str, Any], number: int
    ) -> str:
        """One answer's text; empty where there is none."""
        asked: Any = self._client.chat.completions.create
        started = time.perf_counter()
        reply = asked(
            model=self.model, messages=messages, temperature=self.temperature,
            response_format={"type": "json_schema", "json_schema": {
                "name": kind, "strict": True, "schema": schema}},
        )  # fmt: skip
        usage = getattr(reply, "usage", None)
        counts = [getattr(usage, n, None) for n in ("prompt_tokens", "completion_tokens")]
        tokens = [n if isinstance(n, int) else 0 for n in counts]
        self._note(kind, tokens[0], tokens[1], time.perf_counter() - started, number)
        choices = getattr(reply, "choices", None)
        content = choices[0].message.content if choices and choices[0].message else None
        return content if isinstance(content, str) else ""

    def _note(
        self, kind: str, prompt: int, completion: int, seconds: float, number: int,
        cached: bool = False,
    ) -> None:  # fmt: skip
        row = {"kind": kind, "model": self.model, "prompt_tokens": prompt,
               "completion_tokens": completion, "seconds": round(seconds, 3), "try": number,
               "cached": cached}  # fmt: skip
        self.log.append(row | {"error": ""})
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            append_line(Path(self.folder) / LOG, json.dumps(row))

    def costs(self) -> pd.DataFrame:
        """A row per question that this object asked: kind, model, prompt_tokens and
        completion_tokens, seconds, try, cached, and error (why an answer did not fit)."""
        return pd.DataFrame(self.log, columns=list(COSTS))

    def all_costs(self) -> pd.DataFrame:
        """The same of everything that was ever asked with this folder; without ``error``.

        Raises:
            ValueError: there is no folder, or its log is damaged.
        """
        if self.folder is None:
            raise ValueError("without a folder nothing is logged: see costs()")
        path, rows = Path(self.folder) / LOG, []
        if path.is_file():
            for number, line in read_lines(path, 1 << 28, 1 << 22, 10_000):
                rows.append(parse_json(line, f"{path}, line {number}"))
        return pd.DataFrame(rows, columns=list(COSTS[:-1]))


def digest(*parts: Any) -> str:
    """A name for a question, by its content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]
