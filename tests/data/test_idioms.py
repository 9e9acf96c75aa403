import ast
import re

import pytest

from tl_sparse.data.idioms import idiom_documents
from tl_sparse.data.words import HELD_OUT_WORDS

SAMPLE = list(idiom_documents(seed=0, n_chars=250_000))
TEXT = "\n".join(SAMPLE)


def test_every_document_is_valid_python():
    for text in SAMPLE:
        compile(text, "idiom", "exec", flags=ast.PyCF_ONLY_AST)
        assert text.endswith("\n")


def test_the_seed_decides_the_text():
    assert list(idiom_documents(5, 20_000)) == list(idiom_documents(5, 20_000))
    assert list(idiom_documents(5, 20_000)) != list(idiom_documents(6, 20_000))


def test_documents_stop_at_the_wanted_length():
    lengths = [len(text) for text in idiom_documents(0, 10_000)]
    assert sum(lengths) >= 10_000 > sum(lengths[:-1])
    assert list(idiom_documents(0, 0)) == []


def test_held_out_words_never_appear():
    used = {word.lower() for word in re.findall(r"[A-Za-z]+", TEXT)}
    assert not used & set(HELD_OUT_WORDS)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\w+\('[a-z ]+'",
        r"\w+\(\"[a-z ]+\"",
        r"= \[\[\d",
        r"= \[\d",
        r"\{[\"']\w+[\"']: ",
        r"\[[\"']\w+[\"'], ",
        r"current = set\(\)\n",
        r"current = \"\"\n",
        r"current\.add\(",
        r"current \+= ",
        r"while True:\n",
        r"return True\n",
        r"for \w+ in ",
        r"while \w+:\n",
        r"= lambda \w+: ",
        r"def \w+\(",
        r"if \w+ == True:",
        r"\n\w+ = True\n",
        r"for \w+, \w+ in enumerate",
        r"for \w+ in range",
        r"with open\(\w+\) as ",
        r"\w+ = open\(\w+\)\n",
        r"= \w+ if \w+ > \d+ else ",
        r"if \w+ > \d+:",
        r"def \w+\(\w+, \w+=\w+, \w+=",
        r"def \w+\(\w+, \w+, \w+\)",
        r"f\"[a-z ]+: \{\w+\}",
        r"self\.(\w+) = \1\n",
        r"\n        \w+ = ",
    ],
)
def test_every_idiom_is_frequent(pattern):
    assert len(re.findall(pattern, TEXT)) >= 15


def test_lists_vary_in_length_and_depth():
    flat = {match.count(",") + 1 for match in re.findall(r"= \[([\d, ]+)\]\n", TEXT)}
    nested = {match.count("[") for match in re.findall(r"= (\[\[.*\]\])\n", TEXT)}
    assert set(range(1, 9)) <= flat
    assert {2, 3, 4} <= nested


def test_a_set_is_used_as_a_set_and_a_string_as_a_string():
    uses = []
    for text in SAMPLE:
        kind = None
        for line in text.split("\n"):
            stripped = line.strip()
            if stripped in ("current = set()", 'current = ""', "current = ''"):
                kind = "set" if "set" in stripped else "string"
            elif stripped.startswith(("current.", "current +=")) and kind:
                uses.append((kind, stripped.startswith("current.")))
    assert len(uses) > 100
    assert all((kind == "set") == dotted for kind, dotted in uses)
