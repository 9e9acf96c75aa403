import ast
import hashlib
import re
from collections import Counter

import pytest

from tl_sparse.data.idioms import MIXES, idiom_documents
from tl_sparse.data.words import FURTHER_WORDS, HELD_OUT_WORDS, TRAIN_WORDS

SAMPLE = list(idiom_documents(seed=0, n_chars=250_000))
TEXT = "\n".join(SAMPLE)
SECOND = list(idiom_documents(seed=0, n_chars=250_000, mix="second"))
SECOND_TEXT = "\n".join(SECOND)


def test_every_document_is_valid_python():
    for text in SAMPLE[::3] + SECOND[::3]:
        compile(text, "idiom", "exec", flags=ast.PyCF_ONLY_AST)
        assert text.endswith("\n")


@pytest.mark.parametrize("mix", MIXES)
def test_the_seed_decides_the_text(mix):
    assert list(idiom_documents(5, 20_000, mix)) == list(idiom_documents(5, 20_000, mix))
    assert list(idiom_documents(5, 20_000, mix)) != list(idiom_documents(6, 20_000, mix))


@pytest.mark.parametrize(
    ("mix", "digest"), [("first", "7f14c1093f125826"), ("second", "a040a80b90d15545")]
)
def test_a_mix_that_models_were_trained_on_stays_as_it_is(mix, digest):
    text = "".join(idiom_documents(7, 100_000, mix))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_the_first_mix_is_the_default_and_an_unknown_one_names_the_choices():
    assert list(idiom_documents(5, 2_000)) == list(idiom_documents(5, 2_000, "first"))
    with pytest.raises(ValueError, match="mix='third' is unknown: choose from first, second"):
        idiom_documents(5, 2_000, "third")


def test_documents_stop_at_the_wanted_length():
    lengths = [len(text) for text in idiom_documents(0, 10_000)]
    assert sum(lengths) >= 10_000 > sum(lengths[:-1])
    assert list(idiom_documents(0, 0)) == []


@pytest.mark.parametrize("text", [TEXT, SECOND_TEXT], ids=MIXES)
def test_held_out_words_never_appear(text):
    used = {word.lower() for word in re.findall(r"[A-Za-z]+", text)}
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


@pytest.mark.parametrize(
    "pattern",
    [
        r"\n +(\w+), (\w+) = \2, \1\n",
        r"\n(\w+), (\w+) = \2, \1\n",
        r"\n\w+\.(\w+) = \1\n",
        r"[(,] ?(\w+)=\1[,)]",
        r"\"(\w+)\": \1[,}]",
        r"\n(\w+) = \1 \+ ",
        r"open\('input\w*\.\w+', 'r'\)",
        r"open\('\w*output\w*\.\w+', 'w'\)",
        r"f\"[A-Za-z ]+[-/#<>@+*|~] ?\{",
        r"[( ]\"[A-Za-z ]+[-/#<>@+*|~] ?\"",
        r"f\"[A-Za-z ]+: \{",
        r"[( ]\"[A-Za-z ]+: \"",
        r"= \w+\[\d+\]\n\w+ = \[",
        r"\[\w+\[\d+\], ",
        r"def \w+\(\w+=\w+, \w+=",
        r"elif ",
        r"while \w+ < \d",
    ],
)
def test_every_idiom_of_the_second_mix_is_frequent(pattern):
    assert len(re.findall(pattern, SECOND_TEXT)) >= 8


def test_files_are_opened_as_their_names_say():
    found = re.findall(r"open\(.\w*(input|output)\w*\.\w+., .(\w).\)", SECOND_TEXT)
    assert set(found) == {("input", "r"), ("output", "w")}
    assert min(Counter(found).values()) > 30


def test_a_mark_in_an_f_string_is_followed_by_a_value_and_in_a_plain_one_by_its_end():
    drawn = re.findall(
        r"[(=] ?(f?)(['\"])[A-Za-z ]+(?:: | - | is | #|/|[$%*~@]|\[)(.)", SECOND_TEXT
    )
    inserts = [end == "{" for f, _, end in drawn if f]
    closes = [end == quote for f, quote, end in drawn if not f]
    assert min(len(inserts), len(closes)) > 40
    assert sum(inserts) > 0.95 * len(inserts)  # a list of texts may stand between two quotes
    assert sum(closes) > 0.9 * len(closes)


def test_a_class_stores_its_arguments_in_any_order():
    orders = []
    for head, stored in re.findall(r"__init__\(self, (.*)\):\n((?:        .*\n)+)", SECOND_TEXT):
        copied = re.findall(r"self\.(\w+) = \1\n", stored)
        places = [head.split(", ").index(name) for name in copied]
        orders.append(places == sorted(places))
    assert len(orders) > 60
    assert 0.3 < sum(orders) / len(orders) < 0.8


def test_the_second_mix_has_more_names_and_changes_them_alike_within_a_block():
    used = set(re.findall(r"[A-Za-z]+", SECOND_TEXT))
    assert set(FURTHER_WORDS) <= used
    assert set(TRAIN_WORDS) <= used
    assert not set(FURTHER_WORDS) & set(re.findall(r"[A-Za-z]+", TEXT))
    swapped = re.findall(r"\n *(\w+), (\w+) = (\w+), (\w+)\n", SECOND_TEXT)
    assert all((a, b) == (d, c) != (c, d) for a, b, c, d in swapped)


def test_two_variables_of_both_kinds_are_each_used_as_what_they_are():
    uses = Counter()
    for text in SECOND:
        kinds = {}
        for line in text.split("\n"):
            if match := re.fullmatch(r"\s*(\w+) = (set\(\)|\"\"|'')", line):
                kinds[match[1]] = match[2] == "set()"
                continue
            match = re.match(r"\s*(\w+)(\.(?:add|update|remove)\(| \+= [a-z'\"])", line)
            if match and match[1] in kinds:
                uses[kinds[match[1]], match[2][0] == "."] += 1
    assert uses[True, True] > 200
    assert uses[False, False] > 200
    # now and then another idiom sets or uses a variable of the same name
    assert uses[True, False] + uses[False, True] < 0.05 * uses.total()


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
