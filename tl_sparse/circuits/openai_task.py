"""The prompts of a released circuit as a :class:`Task`: the only ones of the paper's that are
public."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from transformers import PreTrainedTokenizerBase

from tl_sparse.checkpoints.openai_payload import CircuitPayload
from tl_sparse.tasks import Pair, Task
from tl_sparse.tasks.files import task_of_pairs

Answers = tuple[str, str]

GUESSES: Final[dict[str, tuple[str, tuple[Answers, ...]]]] = {
    "bracket_brace": ("{", ((":", ","),)),
    "bracket_counting": ("[", (("]]\n", "]\n"), ("]]", "]"))),
    "else_elif": ("else", ((":", " "),)),
    "enumerate_range": (",", ((" enumerate", " range"),)),
    "for_while": ("for", ((" in", ":"),)),
    "if_equals": ("if", ((" ==", " ="), ("=", " "))),
    "lambda_func": ("lambda", ((":", "("),)),
    "set_or_string": ("set()", ((".add", " +="), (".", " "))),
    "set_or_string_fixedvarname": ("set()", ((".add", " +="), (".", " "))),
    "single_double_quote": ("'", (("')", '")'), ("'", '"'))),
    "var_if": ("if", ((":\n", "\n"), (":", "\n"))),
    "while_return_true": ("while", ((":", "\n"), (":\n", "\n"))),
}
"""Task → what one prompt of a pair has more often than the other, and its answer and the other's:
the first two that are single tokens count.

Source: Gao et al. 2025, Table 1. Of ``else_elif`` the paper says `:` or not `:`; a blank stands for
the latter, as in :mod:`tl_sparse.tasks.builtin`."""


def task_from_payload(
    payload: CircuitPayload,
    tokenizer: PreTrainedTokenizerBase,
    answers: Answers | Sequence[Answers] | None = None,
    *,
    name: str | None = None,
    held_out_share: float = 0.25,
) -> Task:
    """The prompts of a released circuit as a task, for ``prune``, ``evaluate`` and ``to_jsonl``.

    Of n prompts, i and i + n/2 are a pair. They come with a beginning-of-text token if the file's
    do, which all or none must, and are never shortened.

    Args:
        payload: The payload, from ``read_payload``.
        tokenizer: The model's tokenizer.
        answers: The correct next token of the first half's prompts and of the second half's, as
            text; or one such two for each pair. By default they are guessed by the task's name
            (without endings such as ``_beeg``) for the tasks in :data:`GUESSES`.
        name: The task's name; by default the payload's.
        held_out_share: The share of the pairs that is held out, as in ``tasks.from_jsonl``.

    Raises:
        ValueError: there are no prompts, or not in pairs; answers cannot be guessed (the message
            asks for them), or are no single tokens; or a prompt does not come back from its text.
    """
    name = payload.task if name is None else name
    rows, bos = [row.tolist() for row in payload.prompts], tokenizer.bos_token_id
    if not rows or len(rows) % 2 or not all(rows):
        raise ValueError(f"{len(rows)} prompts are no pairs: i and i + n/2 are one")
    begins = {row[0] == bos for row in rows}
    if len(begins) > 1:
        raise ValueError("some prompts begin with the beginning-of-text token, and others do not")
    prepend_bos = begins == {True}
    texts = [str(tokenizer.decode(row[prepend_bos:])) for row in rows]
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if tokenizer(text, add_special_tokens=False)["input_ids"] != row[prepend_bos:]:
            raise ValueError(
                f"prompt {i} does not come back from its text {text!r:.80}: this is not the "
                "model's tokenizer; the tokens themselves are in payload.prompts"
            )
    half = len(texts) // 2
    prompts = list(zip(texts[:half], texts[half:], strict=True))
    if answers is None:
        wanted = [guessed(name, pair, tokenizer) for pair in prompts]
    elif all(isinstance(answer, str) for answer in answers):
        wanted = [answers] * half  # type: ignore[list-item]
    else:
        wanted = list(answers)  # type: ignore[arg-type]
    if len(wanted) != half or any(len(two) != 2 for two in wanted):
        raise ValueError(f"answers must be two texts, or two for each of {half} pairs")
    pairs = [Pair(two, (a, b)) for two, (a, b) in zip(prompts, wanted, strict=True)]
    return task_of_pairs(
        name, pairs, tokenizer,
        description=f"The prompts of OpenAI's released circuit for {payload.task or name}.",
        source="openai/circuit_sparsity, viz_data.pt",
        max_tokens=max(map(len, rows)) + (not prepend_bos),
        held_out_share=held_out_share, prepend_bos=prepend_bos, may_shorten=False,
    )  # fmt: skip


def guessed(name: str, prompts: tuple[str, str], tokenizer: PreTrainedTokenizerBase) -> Answers:
    """The answers of a pair of the task of that name, in the pair's order.

    Raises:
        ValueError: another task, or the pair does not show which of its prompts is which.
    """
    known = [task for task in GUESSES if name == task or name.startswith(f"{task}_")]
    if not known:
        raise ValueError(
            f"the answers of task {name!r} are unknown: give answers=(first half's, second half's)"
            f", such as (\"')\", '\")'); those of {', '.join(GUESSES)} are guessed"
        )
    sign, choices = GUESSES[max(known, key=len)]
    counts = [prompt.count(sign) for prompt in prompts]
    if counts[0] == counts[1]:
        raise ValueError(
            f"both prompts of a pair have {sign!r} {counts[0]} times, so that the answers cannot "
            f"be told: give answers=; the pair is {prompts[0]!r:.200} and {prompts[1]!r:.200}"
        )
    for one, other in choices:
        if all(
            len(ids) == 1 for ids in tokenizer([one, other], add_special_tokens=False)["input_ids"]
        ):
            return (one, other) if counts[0] > counts[1] else (other, one)
    raise ValueError(
        f"this tokenizer has no single tokens for the answers of {name!r}, such as {choices[0]}: "
        "give answers="
    )
