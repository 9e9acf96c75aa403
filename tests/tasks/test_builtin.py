import ast
import re
from functools import cache

import pytest

from tl_sparse import tasks
from tl_sparse.data import HELD_OUT_WORDS, REQUIRED_WORDS, TRAIN_WORDS, idiom_documents
from tl_sparse.tasks import SPLITS
from tl_sparse.tasks.contexts import shape, snippets

NAMES = tasks.names()
LONG = 400  # no prompt is cut at this length

# What can stand after member A's and member B's answer to make a complete program.
ENDINGS = {
    "single_double_quote": (")", ")"),
    "bracket_counting": ("", "x = 1"),
    "set_or_string_fixedvarname": ("add(1)", "+= 'a'"),
    "set_or_string": ("add(1)", "+= 'a'"),
    "while_return_true": ("\n        break", ""),
    "bracket_brace": (" 1}", " 1]"),
    "for_while": (" y:\n    pass", "\n    pass"),
    "lambda_func": (" 1", "):\n    pass"),
    "var_if": ("\n    pass", ""),
    "if_equals": (" 1:\n    pass", "1"),
    "enumerate_range": ("(y):\n    pass", "(3):\n    pass"),
    "with_as": (" f:\n    pass", ""),
    "if_ternary": ("\n    pass", " 2"),
    "final_kwarg": ("None):\n    pass", ":\n    pass"),
}


@cache
def quoted_lines(split):
    code = snippets(split).lines + snippets(split).functions
    return {line for part in code for line in part.split("\n")}


@cache
def idiom_shapes():
    lines = "".join(idiom_documents(7, 150_000)).split("\n")
    return "\n" + "\n".join(shape(line.strip()) for line in lines) + "\n"


def prompts(tokenizer, name, split, n_pairs=50):
    return tasks.get(name, tokenizer, LONG).batch(n_pairs, split=split, seed=3).prompts


def own_part(prompt, split):
    """The prompt without the lines quoted from real code."""
    return "\n".join(line for line in prompt.split("\n") if line not in quoted_lines(split))


def test_the_papers_main_tasks_are_there():
    assert {
        "single_double_quote",
        "bracket_counting",
        "set_or_string_fixedvarname",
        "while_return_true",
        "bracket_brace",
    } <= set(NAMES)
    assert set(ENDINGS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_single_tokens_kept_by_every_trained_tokenizer(tokenizer, name):
    for answer in tasks.get(name, tokenizer).answers:
        assert len(answer) == 1 or answer in REQUIRED_WORDS


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_legal_next_text(tokenizer, name, split):
    task = tasks.get(name, tokenizer)
    for i, prompt in enumerate(prompts(tokenizer, name, split)):
        ast.parse(prompt + task.answers[i % 2] + ENDINGS[name][i % 2] + "\n")


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_the_next_token_of_the_text(tokenizer, name):
    task = tasks.get(name, tokenizer)
    for split in SPLITS:
        for i, prompt in enumerate(prompts(tokenizer, name, split, 30)):
            ids = tokenizer.encode(prompt + task.answers[i % 2] + ENDINGS[name][i % 2])
            start = len(tokenizer.encode(prompt))
            assert ids[start] == task.answer_ids[i % 2]


@pytest.mark.parametrize("name", NAMES)
def test_the_splits_share_no_prompt_and_no_template(tokenizer, name):
    train, held_out = (set(prompts(tokenizer, name, split)) for split in SPLITS)
    assert not train & held_out
    assert not {shape(p) for p in train} & {shape(p) for p in held_out}


@pytest.mark.parametrize(
    ("split", "foreign"), [("train", HELD_OUT_WORDS), ("held_out", TRAIN_WORDS)]
)
@pytest.mark.parametrize("name", NAMES)
def test_names_come_from_the_pool_of_the_split(tokenizer, name, split, foreign):
    texts = set(snippets(split).texts)
    for prompt in prompts(tokenizer, name, split):
        if name == "single_double_quote" and re.split("['\"]", prompt)[1] in texts:
            prompt = re.split("['\"]", prompt)[0]  # the text itself is quoted
        assert not set(re.findall(r"[a-z]+", own_part(prompt, split))) & set(foreign)


def template(text):
    """The shapes of a text's lines; a string the prompt leaves open must be closed by then."""
    return "\n" + "\n".join(shape(line.strip()) for line in text.split("\n"))


@pytest.mark.parametrize("name", NAMES)
def test_held_out_templates_are_absent_from_the_idioms(tokenizer, name):
    answers = tasks.get(name, tokenizer).answers
    for i, prompt in enumerate(prompts(tokenizer, name, "held_out")):
        assert template(prompt + answers[i % 2]) not in idiom_shapes()


@pytest.mark.parametrize(
    "name", ["single_double_quote", "bracket_counting", "bracket_brace", "set_or_string"]
)
def test_of_the_phrasing_around_probes_the_idioms_know_only_the_training_one(tokenizer, name):
    answers = tasks.get(name, tokenizer).answers
    known = {}
    for split in SPLITS:
        own = [own_part(p, split) for p in prompts(tokenizer, name, split, 100)]
        known[split] = sum(
            template(text + answers[i % 2]) in idiom_shapes() for i, text in enumerate(own)
        )
    assert known["held_out"] == 0
    assert known["train"] >= 50


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_members_of_a_pair_share_everything_before_and_after_the_probe(tokenizer, name, split):
    texts = prompts(tokenizer, name, split)
    for a, b in zip(texts[::2], texts[1::2], strict=True):
        assert a != b
        before, after = a.split("\n"), b.split("\n")
        assert len(before) == len(after)
        assert sum(x != y for x, y in zip(before, after, strict=True)) == 1
        words = [set(re.findall(r"\w+", text)) for text in (a, b)]
        # one name more in a member, at most, beside the words that make the probe
        assert len(words[0] ^ words[1]) <= 4


@pytest.mark.parametrize("name", NAMES)
def test_every_task_says_what_decides_and_where_it_comes_from(tokenizer, name):
    task = tasks.get(name, tokenizer)
    assert task.name == name
    assert len(task.description) > 30
    assert "Gao et al. 2025" in task.source
