import json
import os

import pytest
import torch

from tl_sparse import tasks
from tl_sparse.tasks import SPLITS, evaluate_task, files, from_jsonl, to_jsonl


def line(i, **change):
    row = {"prompts": [f"x = [[{i}]", f"x = [{i}]"], "answers": ["]", "\n"]}
    return json.dumps(row | change)


def written(path, *lines):
    path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lists.jsonl"


def pairs(batch):
    return set(zip(batch.prompts[::2], batch.prompts[1::2], strict=True))


def test_a_line_becomes_a_pair_of_its_split(path, tokenizer):
    written(path, line(1, split="train"), line(2, split="held_out"), line(3, split="train"))
    task = from_jsonl(path, tokenizer)
    assert task.name == "lists"
    train = task.batch(2, split="train", seed=0)
    assert pairs(train) == {("x = [[1]", "x = [1]"), ("x = [[3]", "x = [3]")}
    assert train.answers == ("]", "\n", "]", "\n")
    one, other = tokenizer.encode("]\n")
    assert train.correct_token.tolist() == [one, other] * 2
    assert train.incorrect_token.tolist() == [other, one] * 2
    assert task.batch(1, split="held_out", seed=0).prompts == ("x = [[2]", "x = [2]")


def test_each_pair_has_its_own_answers(path, tokenizer):
    written(
        path, line(1), line(2, answers=[",", "]"]), json.dumps({"prompts": "ab", "answers": "cd"})
    )
    with pytest.raises(ValueError, match=r"lists\.jsonl, line 3: prompts must be a list"):
        from_jsonl(path, tokenizer)
    written(path, line(1), line(2, answers=[",", "]"]))
    batch = from_jsonl(path, tokenizer, held_out_share=0.0).batch(2, split="train", seed=0)
    found = dict(zip(batch.prompts, batch.answers, strict=True))
    assert found == {"x = [[1]": "]", "x = [1]": "\n", "x = [[2]": ",", "x = [2]": "]"}


def test_without_splits_a_fixed_share_is_held_out(path, tokenizer):
    written(path, *map(line, range(40)))
    task, again = from_jsonl(path, tokenizer), from_jsonl(path, tokenizer, name="other")
    train, held_out = (
        pairs(task.batch(n, split=s, seed=0)) for n, s in ((30, "train"), (10, "held_out"))
    )
    assert len(train) == 30
    assert len(held_out) == 10
    assert not train & held_out
    assert pairs(again.batch(10, split="held_out", seed=5)) == held_out
    written(path, *map(line, reversed(range(40))))
    assert pairs(from_jsonl(path, tokenizer).batch(10, split="held_out", seed=0)) == held_out
    half = from_jsonl(path, tokenizer, held_out_share=0.5)
    assert len(pairs(half.batch(20, split="held_out", seed=0))) == 20


def test_pairs_repeat_only_when_all_are_used_and_the_seed_orders_them(path, tokenizer):
    written(path, *(line(i, split="train") for i in range(30)))
    task = from_jsonl(path, tokenizer)
    every = task.batch(30, split="train", seed=0)
    assert len(pairs(every)) == 30
    assert len(pairs(task.batch(70, split="train", seed=0))) == 30
    assert len(task.batch(70, split="train", seed=0)) == 140
    assert task.batch(30, split="train", seed=0).prompts == every.prompts
    assert task.batch(30, split="train", seed=1).prompts != every.prompts


def test_a_split_without_pairs_is_an_error(path, tokenizer):
    task = from_jsonl(written(path, line(1, split="train")), tokenizer)
    with pytest.raises(ValueError, match="'lists' has no pair in the split 'held_out'"):
        task.batch(1, split="held_out", seed=0)


def test_a_task_from_a_file_is_evaluated_like_any_other(path, tokenizer):
    task = from_jsonl(written(path, *map(line, range(8))), tokenizer, held_out_share=0.5)

    def model(tokens, return_type):
        logits = torch.zeros(*tokens.shape, len(tokenizer))
        logits[..., tokenizer.encode("]")[0]] = 3.0
        return logits

    result = evaluate_task(model, task, 4)
    assert result.accuracy == 0.5
    assert result.correct.tolist() == [True, False] * 4
    assert result.to_dataframe()["answer"].tolist() == ["]", "\n"] * 4


def test_long_prompts_lose_lines_and_those_that_cannot_are_errors(path, tokenizer):
    lead = "y = 1\n" * 30
    long = {"prompts": [f"{lead}x = [[1]", f"{lead}x = [1]"]}
    task = from_jsonl(written(path, line(1, **long, split="train")), tokenizer, max_tokens=32)
    assert task.batch(1, split="train", seed=0).tokens.shape[1] <= 32
    wide = {"prompts": ["x = [[" + "1" * 40 + "]", "x = [" + "1" * 40 + "]"]}
    with pytest.raises(ValueError, match="line 2: the prompts do not fit max_tokens=32"):
        from_jsonl(written(path, line(1), line(2, **wide)), tokenizer, max_tokens=32)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompts": ["a", "b"], "prompts": ["c", "d"]}', "'prompts' is there twice"),
        ("9" * 5000, "4300 digits"),
        ("[1]", "not an object with the keys prompts and answers"),
        ('{"answers": ["a", "b"]}', "no key 'prompts'"),
        ('{"prompts": ["a", "b"]}', "no key 'answers'"),
        (line(2, notes=""), "unknown key 'notes': choose from prompts, answers, incorrect, split"),
        (line(2, prompts=["a", "b", "c"]), "prompts must be a list of two texts"),
        (line(2, prompts=["a", 1]), "prompts must be a list of two texts"),
        (line(2, answers=["", "b"]), "answers must be a list of two texts that are not empty"),
        (line(2, prompts=["a", "a"]), "prompts are twice the same"),
        (line(2, answers=["]", "]"]), "answers are twice the same"),
        (line(2, answers=["]", "\udc00"]), "half a surrogate pair"),
        (line(2, split="test"), "unknown split 'test': choose from train, held_out"),
        (line(2, split=None), "unknown split None: choose from train, held_out"),
        (line(2, split=["train"]), r"unknown split \['train'\]"),
        (line(2, answers=["]", "qqqzz"]), r"answer 'qqqzz' as one token; .* splits it into"),
        (line(1), "the same pair as in line 1"),
    ],
)
def test_a_bad_line_is_an_error_with_file_and_line(path, tokenizer, bad, message):
    written(path, line(1), bad, line(3))
    with pytest.raises(ValueError, match=rf"lists\.jsonl, line 2: .*({message})"):
        from_jsonl(path, tokenizer)


def test_text_that_is_not_utf_8_is_an_error(path, tokenizer):
    path.write_bytes(line(1).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"line 2: .*no valid JSON.*utf-8"):
        from_jsonl(path, tokenizer)


def test_an_answer_that_joins_its_prompt_is_an_error(path, tokenizer):
    written(path, line(1, prompts=["x = 1\nfo", "x = 1\ny"], answers=["r", "\n"]))
    with pytest.raises(ValueError, match=r"line 1: .* joins the answer 'r' to the end"):
        from_jsonl(path, tokenizer)


def test_a_file_is_bounded(path, tokenizer, monkeypatch):
    written(path, *map(line, range(5)))
    monkeypatch.setattr(files, "MAX_PAIRS", 4)
    with pytest.raises(ValueError, match="more than 4 lines"):
        from_jsonl(path, tokenizer)
    monkeypatch.undo()
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 150)
    with pytest.raises(ValueError, match="more than 150"):
        from_jsonl(path, tokenizer)
    monkeypatch.undo()
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 20)
    with pytest.raises(ValueError, match="line 1: longer than 20 bytes"):
        from_jsonl(path, tokenizer)


def test_no_file_an_empty_one_and_a_bad_share_are_errors(path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"lists\.jsonl"):
        from_jsonl(path, tokenizer)
    with pytest.raises(ValueError, match="has no pairs"):
        from_jsonl(written(path), tokenizer)
    with pytest.raises(ValueError, match="held_out_share must be from 0 to 1"):
        from_jsonl(path, tokenizer, held_out_share=2.0)


@pytest.mark.parametrize("name", ["bracket_counting", "class_init", "with_as"])
def test_a_task_survives_the_file(path, tokenizer, name):
    task = tasks.get(name, tokenizer)
    to_jsonl(task, path, n_pairs=12, seed=3)
    again = from_jsonl(path, tokenizer)
    for split in SPLITS:
        one, other = task.batch(12, split=split, seed=3), again.batch(12, split=split, seed=0)
        found = set(zip(one.prompts, one.answers, one.correct_token.tolist(), strict=True))
        assert (
            set(zip(other.prompts, other.answers, other.correct_token.tolist(), strict=True))
            == found
        )
        assert pairs(one) == pairs(other)


def test_a_task_from_a_file_is_written_back_with_its_splits_and_no_repeats(
    path, tokenizer, tmp_path
):
    text = [line(i, split="train") for i in range(3)]
    task = from_jsonl(written(path, *text), tokenizer)
    to_jsonl(task, tmp_path / "copy.jsonl", n_pairs=50)
    rows = (tmp_path / "copy.jsonl").read_text().splitlines()
    assert sorted(map(json.loads, rows), key=str) == sorted(map(json.loads, text), key=str)


def test_a_failed_write_leaves_nothing_and_the_old_file(path, tokenizer):
    written(path, line(1))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no prompt of task"):
        to_jsonl(tasks.get("bracket_brace", tokenizer, 5), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_pair_can_have_incorrect_answers_of_its_own(path, tokenizer):
    written(path, line(1, incorrect=[",", ","], split="train"), line(2, split="train"))
    task = from_jsonl(path, tokenizer)
    batch = task.batch(2, split="train", seed=0)
    comma, bracket, newline = tokenizer.encode(",") + tokenizer.encode("]\n")
    found = dict(zip(batch.prompts, batch.incorrect_token.tolist(), strict=True))
    assert found == {
        "x = [[1]": comma, "x = [1]": comma, "x = [[2]": newline, "x = [2]": bracket
    }  # fmt: skip
    to_jsonl(task, path.with_name("again.jsonl"), n_pairs=2)
    again = from_jsonl(path.with_name("again.jsonl"), tokenizer).batch(2, split="train", seed=0)
    assert dict(zip(again.prompts, again.incorrect_token.tolist(), strict=True)) == found
    with pytest.raises(ValueError, match="an incorrect answer is the correct one"):
        from_jsonl(written(path, line(1, incorrect=["]", ","])), tokenizer)


def test_a_task_with_one_split_says_what_it_cannot_do(path, tokenizer):
    task = from_jsonl(written(path, line(1, split="train"), line(2, split="train")), tokenizer)
    assert repr(task).startswith("Task('lists': 2 train and 0 held_out pairs; without held_out ")
    with pytest.raises(ValueError, match=r"no pair in the split 'held_out': .* a quarter of them"):
        task.batch(1, split="held_out", seed=0)
    assert "x = [[" in task._repr_html_()
    task = from_jsonl(written(path, line(1, split="held_out")), tokenizer)
    assert repr(task).endswith("nothing can be pruned on it, but models and circuits measured)")
    assert "these are of the split &#x27;held_out&#x27;" in task._repr_html_() or (
        "these are of the split 'held_out'" in task._repr_html_()
    )
