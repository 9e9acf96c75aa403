import ast
import re

import pytest

from tl_sparse import tasks
from tl_sparse.tasks import SPLITS

LONG = 1000
DILUTED = (
    *("bracket_brace", "bracket_counting", "fstring_brace", "set_or_string"),
    *("set_or_string_fixedvarname", "single_double_quote"),
)
ALL = [(task, variant) for task in tasks.names() for variant in tasks.variants(task)]


def batch(tokenizer, task, variant, split="held_out", n_pairs=20, **options):
    bound = tasks.get(task, tokenizer, LONG, variant, **options)
    return bound.batch(n_pairs, split=split, seed=1)


def test_which_tasks_have_variants():
    assert {task for task, variant in ALL if variant == "dilution"} == set(DILUTED)
    assert {task for task, variant in ALL if variant == "distractor"} == set(DILUTED)
    assert tasks.variants("for_while") == {}
    assert all(tasks.variants(task)[variant] for task, variant in ALL)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("task", "variant"), ALL)
def test_a_variant_keeps_answers_and_source_and_changes_prompts(tokenizer, task, variant, split):
    plain, hard = tasks.get(task, tokenizer, LONG), tasks.get(task, tokenizer, LONG, variant)
    assert hard.answers == plain.answers
    assert hard.answer_ids == plain.answer_ids
    assert hard.source == plain.source
    assert hard.name.startswith(f"{task}/{variant}")
    prompts = hard.batch(20, split=split, seed=1).prompts
    assert not set(prompts) & set(plain.batch(20, split=split, seed=1).prompts)
    assert all(a != b for a, b in zip(prompts[::2], prompts[1::2], strict=True))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n", [3, 23, 67])
def test_a_diluted_list_has_n_elements(tokenizer, n, split):
    drawn = batch(tokenizer, "bracket_counting", "dilution", split, n=n)
    for i, (prompt, answer) in enumerate(zip(drawn.prompts, drawn.answers, strict=True)):
        (value,) = [
            node.value for node in ast.parse(prompt + answer).body[-1:] if hasattr(node, "value")
        ]
        elements = ast.literal_eval(value)
        assert len(elements) == (1 if i % 2 == 0 else n)
        assert len(elements[0] if i % 2 == 0 else elements) == n


@pytest.mark.parametrize("task", ["set_or_string", "set_or_string_fixedvarname"])
def test_diluted_types_have_n_lines_between(tokenizer, task):
    for n in (1, 6):
        for prompt in batch(tokenizer, task, "dilution", "train", n=n).prompts:
            assert prompt.count("\n") - ("\nfor " in prompt) == n + 1


@pytest.mark.parametrize("task", ["single_double_quote", "fstring_brace"])
def test_diluted_texts_have_n_words(tokenizer, task):
    for prompt in batch(tokenizer, task, "dilution", n=9).prompts:
        text = re.split("['\"]", prompt.rpartition("\n")[2])[1]
        assert len(re.findall(r"\w+", text)) == 9


def test_a_diluted_dictionary_has_n_entries_before_the_last(tokenizer):
    for prompt in batch(tokenizer, "bracket_brace", "dilution", n=4).prompts[::2]:
        assert prompt.rpartition("{")[2].count(":") == 4


@pytest.mark.parametrize(
    ("task", "marks"),
    [
        ("bracket_counting", "["),
        ("bracket_brace", "[{"),
        ("single_double_quote", "'\""),
        ("fstring_brace", "{"),
    ],
)
def test_a_comment_before_the_probe_is_the_same_in_both_members(tokenizer, task, marks):
    drawn = batch(tokenizer, task, "distractor", n_pairs=30)
    found = set()
    for prompts in zip(drawn.prompts[::2], drawn.prompts[1::2], strict=True):
        comments = [prompt.split("\n")[-2] for prompt in prompts]
        assert comments[0] == comments[1]
        mark = re.fullmatch(r"# \w+ (.) \w+", comments[0])
        found.add(mark[1])
    assert found == set(marks)


def test_the_second_variable_is_of_the_other_kind(tokenizer):
    for i, prompt in enumerate(batch(tokenizer, "set_or_string", "distractor").prompts):
        first, second = prompt.split("\n")[:2]
        kinds = [line.split(" = ")[1] for line in (first, second)]
        assert kinds == (["set()", '""'] if i % 2 == 0 else ['""', "set()"])
        assert first.split()[0] != second.split()[0]
        assert prompt.endswith(first.split()[0])


def test_what_makes_it_hard_is_never_cut_off(tokenizer):
    bound = tasks.get("bracket_counting", tokenizer, 48, "distractor")
    drawn = bound.batch(30, split="train", seed=0)
    assert drawn.tokens.shape[1] <= 48
    assert all("# " in prompt for prompt in drawn.prompts)
    with pytest.raises(ValueError, match=r"no prompt of task .* fits max_tokens=64"):
        tasks.get("bracket_counting", tokenizer, 64, "dilution", n=67).batch(
            1, split="train", seed=0
        )


def test_an_unknown_variant_names_those_of_the_task(tokenizer):
    with pytest.raises(ValueError, match="no variant 'length': choose from dilution, distractor"):
        tasks.get("bracket_counting", tokenizer, variant="length")
    with pytest.raises(ValueError, match="'for_while' has no variant 'dilution': it has none"):
        tasks.get("for_while", tokenizer, variant="dilution")
    with pytest.raises(ValueError, match="unknown task 'lists': choose from"):
        tasks.variants("lists")


def test_unknown_and_unfit_options_are_errors(tokenizer):
    with pytest.raises(ValueError, match="has no option 'm': choose from n"):
        tasks.get("bracket_counting", tokenizer, variant="dilution", m=3)
    with pytest.raises(ValueError, match="has no option 'n': choose from none"):
        tasks.get("bracket_counting", tokenizer, variant="distractor", n=3)
    with pytest.raises(ValueError, match="options are of a variant: choose one with n"):
        tasks.get("bracket_counting", tokenizer, n=3)
    for n in (0, -1, True):
        with pytest.raises(ValueError, match=f"n={n} must be a whole number of at least 1"):
            tasks.get("bracket_counting", tokenizer, variant="dilution", n=n)
    with pytest.raises(ValueError, match="n=100000: there are only"):
        tasks.get("set_or_string", tokenizer, 64, "dilution", n=100000).batch(
            1, split="train", seed=0
        )
