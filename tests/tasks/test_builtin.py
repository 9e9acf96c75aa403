import ast
import hashlib
import re
from functools import cache

import pytest

from tl_sparse import tasks
from tl_sparse.data import (
    HELD_OUT_WORDS,
    REQUIRED_WORDS,
    TRAIN_WORDS,
    build_tokenizer,
    idiom_documents,
)
from tl_sparse.data.idioms import MIXES
from tl_sparse.tasks import SPLITS, builtin, phrases
from tl_sparse.tasks.contexts import Snippets, shape, snippets

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
    "class_init": ("", ""),
    "var_swap": ("", ""),
    "with_open": ("')", "')"),
    "else_elif": ("\n        pass", "(x):\n        pass"),
    "fstring_brace": ('x}")', ")"),
    "indent_for": ("pass", "pass"),
}
OPENED = {"with_open": "'", "fstring_brace": '"'}  # ends a string that the answer leaves open

# Hashes of the prompts of the first release, with the quoted code held fixed.
PUBLISHED = {
    "bracket_brace": "8a89b2924beec8bd",
    "bracket_counting": "794955bd31a0c6dc",
    "enumerate_range": "12f816034e5038f1",
    "final_kwarg": "514b4ba639a33b28",
    "for_while": "f0e1ec7e3bc955a4",
    "if_equals": "06a1309598d6aead",
    "if_ternary": "c1e5dccd9386d134",
    "lambda_func": "f06abd7f8a4c68a8",
    "set_or_string": "640275be1cf7c1a3",
    "set_or_string_fixedvarname": "9e861034a79634fa",
    "single_double_quote": "08b2b7ad30edb5eb",
    "var_if": "1f5a0990f6e8ebe7",
    "while_return_true": "2ebb2ab80d5dec56",
    "with_as": "a2bc42c11753f73c",
}


@cache
def quoted_lines(split):
    code = snippets(split).lines + snippets(split).functions
    return {line for part in code for line in part.split("\n")}


@cache
def idiom_text(mix):
    return "".join(idiom_documents(7, 150_000, mix))


@cache
def idiom_shapes(mix="first"):
    lines = idiom_text(mix).split("\n")
    return "\n" + "\n".join(shape(line.strip()) for line in lines) + "\n"


@pytest.fixture(scope="module")
def bare():
    """A tokenizer of bytes and the required words."""
    return build_tokenizer(["x"], 512)


def batch(tokenizer, name, split, n_pairs=50, max_tokens=LONG):
    return tasks.get(name, tokenizer, max_tokens).batch(n_pairs, split=split, seed=3)


def prompts(tokenizer, name, split, n_pairs=50):
    return batch(tokenizer, name, split, n_pairs).prompts


def own_part(prompt, split):
    """The prompt without the lines quoted from real code, as they are or further indented."""
    known = quoted_lines(split)
    return "\n".join(x for x in prompt.split("\n") if x not in known and x.strip() not in known)


def begins_a_word(part, text):
    """Whether a part stands in a text other than behind a letter: port, but not in passport."""
    return part in text and re.search(rf"(?<!\w){re.escape(part)}", text) is not None


def test_the_papers_twenty_tasks_are_there(tokenizer):
    assert len(NAMES) == 20
    assert set(ENDINGS) == set(NAMES)
    sources = [tasks.get(name, tokenizer).source for name in NAMES]
    assert sources == [f"Gao et al. 2025 (arXiv 2511.13653), Table 1: {name}" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_single_tokens_kept_by_every_trained_tokenizer(bare, name):
    for split in SPLITS:
        for answer in set(batch(bare, name, split, 20, max_tokens=1000).answers):
            assert len(answer) == 1 or answer in REQUIRED_WORDS


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_legal_next_text(tokenizer, name, split):
    drawn = batch(tokenizer, name, split)
    for i, (prompt, answer) in enumerate(zip(drawn.prompts, drawn.answers, strict=True)):
        ast.parse(prompt + answer + ENDINGS[name][i % 2] + "\n")


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_the_next_token_of_the_text(tokenizer, name):
    for split in SPLITS:
        drawn = batch(tokenizer, name, split, 30)
        for i, (prompt, answer) in enumerate(zip(drawn.prompts, drawn.answers, strict=True)):
            ids = tokenizer.encode(prompt + answer + ENDINGS[name][i % 2])
            assert ids[len(tokenizer.encode(prompt))] == drawn.correct_token[i]
            assert tokenizer.decode([drawn.correct_token[i]]) == answer
            assert drawn.incorrect_token[i] == drawn.correct_token[i ^ 1] != drawn.correct_token[i]


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
    drawn = batch(tokenizer, name, "held_out")
    for prompt, answer in zip(drawn.prompts, drawn.answers, strict=True):
        for mix in MIXES:
            assert template(prompt + answer + OPENED.get(name, "")) not in idiom_shapes(mix)


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_stands_in_the_idioms(tokenizer, name):
    for split in SPLITS:
        for prompt in prompts(tokenizer, name, split):
            assert not any(prompt in idiom_text(mix) for mix in MIXES)
    if name != "while_return_true":  # all that is its own are two words
        for prompt in prompts(tokenizer, name, "held_out"):
            own = own_part(prompt, "held_out").strip()
            assert not any(begins_a_word(own, idiom_text(mix)) for mix in MIXES)


FIRST_MIX = ("single_double_quote", "bracket_counting", "bracket_brace", "set_or_string")
SECOND_MIX = (
    *FIRST_MIX,
    *("set_or_string_fixedvarname", "class_init", "var_swap", "with_open", "fstring_brace"),
)


@pytest.mark.parametrize(
    ("mix", "name"),
    [*(("first", name) for name in FIRST_MIX), *(("second", name) for name in SECOND_MIX)],
)
def test_of_the_phrasing_around_probes_the_idioms_know_only_the_training_one(tokenizer, mix, name):
    known = {}
    for split in SPLITS:
        drawn = batch(tokenizer, name, split, 100)
        known[split] = sum(
            template(own_part(text, split) + answer + OPENED.get(name, "")) in idiom_shapes(mix)
            for text, answer in zip(drawn.prompts, drawn.answers, strict=True)
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


@pytest.mark.parametrize("name", ["class_init", "var_swap"])
def test_the_copied_names_differ_between_the_splits_and_vary(name):
    words = [f" {word}" for word in (*TRAIN_WORDS, *HELD_OUT_WORDS)]
    tokenizer = build_tokenizer(["x"], 2000, (*REQUIRED_WORDS, *words))
    train, held_out = (set(batch(tokenizer, name, split, 100).answers) for split in SPLITS)
    assert not train & held_out
    assert len(train) >= 20
    assert len(held_out) >= 5


@pytest.mark.parametrize("name", ["else_elif", "indent_for", "while_return_true"])
def test_contexts_are_real_functions(tokenizer, name):
    for split in SPLITS:
        for prompt in prompts(tokenizer, name, split):
            assert prompt.startswith(snippets(split).functions)


def test_the_first_fourteen_tasks_prompts_stay_what_published_numbers_were_measured_on(
    tokenizer, monkeypatch
):
    # what is quoted depends on the interpreter, so something fixed is quoted here
    fixed = {
        split: Snippets(
            (split,),
            tuple(f"def {split}_{i}(a):\n    b = {i}" for i in range(9)),
            tuple(f"{split}_{i} = {i}" for i in range(9)),
            tuple(f"{split[:4]} {'so ' * i}on" for i in range(9)),
        )
        for split in SPLITS
    }
    monkeypatch.setattr(builtin, "snippets", fixed.get)
    monkeypatch.setattr(phrases, "snippets", fixed.get)
    found = {}
    for name in PUBLISHED:
        text = [p for split in SPLITS for p in prompts(tokenizer, name, split, 64)]
        found[name] = hashlib.sha256("\0".join(text).encode()).hexdigest()[:16]
    assert found == PUBLISHED


@pytest.mark.parametrize("name", NAMES)
def test_every_task_says_what_decides_and_where_it_comes_from(tokenizer, name):
    task = tasks.get(name, tokenizer)
    assert task.name == name
    assert len(task.description) > 30
    assert "Gao et al. 2025" in task.source
