import ast

import pytest

from tl_sparse.data import CorpusConfig, idiom_documents
from tl_sparse.data.idioms import MIXES
from tl_sparse.data.sources import is_validation, standard_library
from tl_sparse.tasks.contexts import SPLITS, check_split, shape, snippets


def test_the_splits_read_different_files():
    train, held_out = (set(snippets(split).files) for split in SPLITS)
    assert train
    assert held_out
    assert not train & held_out


def test_held_out_files_belong_to_the_default_validation_part():
    texts = {d.name: d.text for d in standard_library()}
    config = CorpusConfig()
    for split in SPLITS:
        for name in snippets(split).files:
            held = is_validation(texts[name], config.seed, config.validation_share)
            assert held == (split == "held_out")


@pytest.mark.parametrize("kind", ["functions", "lines", "texts"])
def test_the_splits_share_no_snippet_and_have_plenty(kind):
    train, held_out = (set(getattr(snippets(split), kind)) for split in SPLITS)
    assert not train & held_out
    assert len(train) >= 30
    assert len(held_out) >= 20


def test_held_out_lines_have_shapes_of_their_own():
    train, held_out = ({shape(line) for line in snippets(split).lines} for split in SPLITS)
    assert not train & held_out


def test_the_idioms_have_next_to_no_line_of_a_held_out_shape():
    held_out = {shape(line) for line in snippets("held_out").lines}
    for mix in MIXES:
        lines = "".join(idiom_documents(3, 150_000, mix)).splitlines()
        found = sum(shape(line.strip()) in held_out for line in lines)
        assert found / len(lines) < 0.001


@pytest.mark.parametrize("split", SPLITS)
def test_functions_can_go_on_with_a_statement(split):
    for start in snippets(split).functions[:200]:
        ast.parse(f"{start}\n    return True\n")
        ast.parse(f"{start}\n    while True:\n        pass\n")
        assert start.startswith("def ")
        assert len(start.split("\n")) <= 9


@pytest.mark.parametrize("split", SPLITS)
def test_lines_are_whole_statements_for_any_place(split):
    for line in snippets(split).lines:
        compile(f"x = 1\n{line}\n", "line", "exec")
        assert "current" not in line


@pytest.mark.parametrize("split", SPLITS)
def test_texts_need_no_escape(split):
    for text in snippets(split).texts:
        assert text.replace(" ", "").isalpha()


def test_snippets_are_the_same_on_every_call():
    first = snippets("held_out")
    snippets.cache_clear()
    assert snippets("held_out") == first


def test_shape_hides_names_numbers_strings_and_repetition():
    assert shape("alpha = [1, 22, 3]") == shape("b_2 = [4]") == "W = [N]"
    assert shape("for x in range(3):") == "for W in W(N):"
    assert shape("f('a', \"b c\")") == "W(S)"
    assert shape("return x.y") == "return W.W"


def test_an_unknown_split_names_the_splits():
    with pytest.raises(ValueError, match="unknown split 'test': choose from train, held_out"):
        check_split("test")
