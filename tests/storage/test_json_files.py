import json
import math

import pytest

from tl_sparse.storage.json_files import MAX_DEPTH, parse_json, plain, read_json, real


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        ('{"a": {"b": [{"c": 1, "c": 1}]}}', "the key 'c' is there twice"),
        ("NaN", "the number NaN is not finite"), ("[-Infinity]", "the number -Infinity is not"),
        ("1e999", "the number 1e999 is not finite"), ("[1, -2E+400]", "the number -2E"),
        ("[" * 10**6, "nested too deeply"), ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply"),
        ("[" + "{}," * 3_000_000 + "1]", "more than 4,000,000 entries"),
        ("9" * 10**5, "integer string conversion"), ("", "Expecting value"),
        ("[1] 2", "Extra data"), (b"\xff\xfe", "can't decode byte"), ("{'a': 1}", "property name"),
    ],
    ids=lambda text: repr(text)[:20],
)  # fmt: skip
def test_what_is_not_json_to_the_letter_is_refused(text, reason):
    with pytest.raises(ValueError, match=f"^here is no valid JSON: .*{reason}"):
        parse_json(text, "here")


def test_json_is_read_as_the_standard_library_reads_it():
    text = json.dumps({"a": [1, -2.5e-3, 10**30, True, None, "ä \ud83d\ude00"], "b": {}, "": [[]]})
    assert parse_json(text.encode(), "here") == json.loads(text)
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep, "here") == json.loads(deep)


def test_a_file_must_hold_an_object(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json must hold a JSON object, not a list"):
        read_json(path)


def test_numbers_that_json_does_not_have_are_words():
    values = {"a": [math.nan, 1.5, (math.inf, 2)], "b": -math.inf, "c": "x"}
    words = {"a": ["nan", 1.5, ["inf", 2]], "b": "-inf", "c": "x"}
    assert plain(values) == words
    assert real("-inf") == -math.inf
    assert real("inf") == math.inf
    assert math.isnan(real("nan"))
    assert real(3) == 3.0
    for wrong in ("infinity", "1.5", " nan", True, None, 10**400, [1.0], {}):
        with pytest.raises(ValueError, match="is no number"):
            real(wrong)
