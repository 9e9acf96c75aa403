"""The prompts of released circuits as tasks."""

import pytest
import torch

from tests.checkpoints.openai_payloads import write_tinypython
from tl_sparse.checkpoints.openai_payload import CircuitPayload, parse_payload
from tl_sparse.checkpoints.openai_tokenizer import tokenizer_from_openai
from tl_sparse.circuits import task_from_payload
from tl_sparse.tasks import from_jsonl, to_jsonl

WORDS = [f"{a}{b}" for a in "abcd" for b in "wxyz"]
"""Sixteen."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tinypython")
    newline = "Ċ"
    merges = [("'", ")"), ('"', ")"), ("]", newline), ("]", "]"), ("]]", newline)]
    return tokenizer_from_openai(write_tinypython(folder, merges), 300)


def payload_of(first, second, tokenizer, task="single_double_quote", bos=False):
    """A payload whose prompts are these texts, padded with 0 on the right."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*first, *second)]
    rows = [[*([tokenizer.bos_token_id] if bos else []), *row] for row in rows]
    tokens = torch.zeros(len(rows), max(map(len, rows)) + 3, dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    values = {"circuit_data": {}, "importances": {"task_samples": (tokens, {})}}
    return CircuitPayload(**vars(parse_payload(values)) | {"task": task})


def quotes(tokenizer, **options):
    """As released: the first half opens with the double quote. "!" is token 0, the padding's."""
    return payload_of(
        [f'print("{word}! a' for word in WORDS], [f"print('{word}! a" for word in WORDS],
        tokenizer, **options,
    )  # fmt: skip


def all_pairs(task):
    return [*task.make.train, *task.make.held_out]


def test_sixteen_pairs_come_back_as_32_prompts(tokenizer, tmp_path):
    """Row 17."""
    task = task_from_payload(quotes(tokenizer), tokenizer)
    assert task.name == "single_double_quote"
    pairs = all_pairs(task)
    assert {pair.prompts for pair in pairs} == {
        (f'print("{word}! a', f"print('{word}! a") for word in WORDS
    }
    assert {pair.answers for pair in pairs} == {('")', "')")}
    assert (len(task.make.train), len(task.make.held_out)) == (12, 4)
    to_jsonl(task, tmp_path / "quotes.jsonl")
    again = from_jsonl(tmp_path / "quotes.jsonl", tokenizer, prepend_bos=False)
    assert {pair.prompts for pair in all_pairs(again)} == {pair.prompts for pair in pairs}


def test_batches_hold_the_files_own_tokens(tokenizer):
    payload = quotes(tokenizer)
    rows = {tuple(row.tolist()) for row in payload.prompts}
    task = task_from_payload(payload, tokenizer, held_out_share=0)
    batch = task.batch(16, split="train", seed=0)
    found = {
        tuple(row[: last + 1]) for row, last in zip(batch.tokens.tolist(), batch.last, strict=True)
    }
    assert found == rows
    assert 0 in batch.tokens[0].tolist()
    double, single = (tokenizer.convert_tokens_to_ids(token) for token in ('")', "')"))
    assert batch.correct_token.tolist() == [double, single] * 16
    assert batch.incorrect_token.tolist() == [single, double] * 16


def test_a_beginning_of_text_token_comes_with_prompts_that_have_one(tokenizer):
    payload = quotes(tokenizer, bos=True)
    task = task_from_payload(payload, tokenizer, held_out_share=0)
    batch = task.batch(16, split="train", seed=0)
    assert batch.tokens[:, 0].tolist() == [299] * 32
    assert {tuple(r[: i + 1]) for r, i in zip(batch.tokens.tolist(), batch.last, strict=True)} == {
        tuple(row.tolist()) for row in payload.prompts
    }


@pytest.mark.parametrize("suffix", ["", "_beeg", "_beeg3", "_v2_x"])
def test_answers_are_guessed_by_the_tasks_name(tokenizer, suffix):
    payload = quotes(tokenizer, task=f"single_double_quote{suffix}")
    assert all_pairs(task_from_payload(payload, tokenizer))[0].answers == ('")', "')")


@pytest.mark.parametrize(
    ("task", "first", "second", "answers"),
    [
        ("bracket_counting_beeg", "x = [[1, 2", "x = [1, 2", ("]]\n", "]\n")),
        ("bracket_counting_beeg", "x = [1, 2", "x = [[1, 2", ("]\n", "]]\n")),
        ("while_return_true_beeg", "    return True", "    while True", ("\n", ":")),
        ("else_elif_beeg", "    x\nelse", "    x\nelif", (":", " ")),
    ],
)
def test_each_task_knows_which_prompt_is_which(tokenizer, task, first, second, answers):
    task = task_from_payload(payload_of([first], [second], tokenizer, task), tokenizer)
    (pair,) = all_pairs(task)
    assert pair.prompts == (first, second)
    assert pair.answers == answers


def test_without_the_released_tokens_shorter_answers_are_taken(tmp_path):
    plain = tokenizer_from_openai(write_tinypython(tmp_path), 300)
    (pair,) = all_pairs(task_from_payload(payload_of(['f("a'], ["f('a"], plain), plain))
    assert pair.answers == ('"', "'")


def test_an_unknown_task_asks_for_answers(tokenizer):
    """Row 17."""
    payload = payload_of(["a b", "c d"], ["a c", "c e"], tokenizer, "riddle")
    with pytest.raises(ValueError, match=r"answers of task 'riddle' are unknown: give answers="):
        task_from_payload(payload, tokenizer)
    task = task_from_payload(payload, tokenizer, ("!", "?"), name="mine")
    assert task.name == "mine"
    assert {pair.answers for pair in all_pairs(task)} == {("!", "?")}
    task = task_from_payload(payload, tokenizer, [("!", "?"), ("x", "y")])
    assert {p.prompts: p.answers for p in all_pairs(task)}["c d", "c e"] == ("x", "y")


def test_what_is_no_task_is_refused(tokenizer, tmp_path):
    def refused(payload, message, *answers):
        with pytest.raises(ValueError, match=message):
            task_from_payload(payload, tokenizer, *answers)

    refused(parse_payload({"circuit_data": {}}), "0 prompts are no pairs")
    refused(payload_of(["a", "b"], ["c"], tokenizer), "3 prompts are no pairs")
    refused(payload_of(["a"], [""], tokenizer), "no pairs")
    refused(payload_of(["f(a"], ["f(b"], tokenizer), "cannot be told: give answers=")
    refused(payload_of(['f("a'], ["f('a"], tokenizer), "one token", ("no", "yes"))
    refused(payload_of(['f("a'], ["f('a"], tokenizer), "for each of 1 pairs", [("a", "b")] * 2)
    odd = payload_of(['f("a'], ["f('a"], tokenizer)
    odd.task_tokens[0, 1] = 290  # no token has this id
    refused(odd, "prompt 0 does not come back from its text")
    mixed = payload_of(['f("a'], ["f('a"], tokenizer, bos=True)
    mixed.task_tokens[1, 0] = 5
    refused(mixed, "some prompts begin with the beginning-of-text token")
