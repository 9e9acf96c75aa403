"""Contrastive prompts: what they say, that pairs differ as they should, and files of them."""

import json
import re

import pytest
import torch

from tl_sparse.heads import (
    Component,
    ContrastiveDataset,
    agreement,
    contrastive,
    contrastive_from_jsonl,
    contrastive_task,
)
from tl_sparse.heads.families import FAMILIES


def texts(dataset):
    n = dataset.n_positive
    return list(zip(dataset.prompts.texts[:n], dataset.prompts.texts[n:], strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_of_every_family_are_distinct_and_of_one_length(speaker, name):
    dataset = contrastive(name, speaker, 20, seed=1)
    assert len({positive for positive, _ in texts(dataset)}) == 20
    last = dataset.prompts.last
    assert torch.equal(last[:20], last[20:])
    assert dataset.paired
    again, other = (contrastive(name, speaker, 20, seed=s) for s in (1, 2))
    assert again.prompts.texts == dataset.prompts.texts
    assert other.prompts.texts != dataset.prompts.texts
    assert bool((dataset.prompts.correct != dataset.prompts.incorrect).all())


def test_ioi_names_the_giver_twice_and_in_negative_prompts_three_names_once(speaker):
    dataset = contrastive("ioi", speaker, 30)
    tokenizer = speaker.tokenizer
    for i, (positive, negative) in enumerate(texts(dataset)):
        names = [word for word in re.findall(r"\w+", positive) if f" {word}" in NAMES]
        assert len(names) == 3
        assert names[2] in names[:2]
        io = next(name for name in names[:2] if name != names[2])
        assert tokenizer.decode(dataset.prompts.correct[i]) == f" {io}"
        assert tokenizer.decode(dataset.prompts.incorrect[i]) == f" {names[2]}"
        others = [word for word in re.findall(r"\w+", negative) if f" {word}" in NAMES]
        assert len(set(others)) == 3
        assert others[2] == names[2]
        assert io in others[:2]
        for role, name in (("IO", io), ("S1", names[2]), ("S2", names[2])):
            place = int(dataset.roles[role][i])
            assert tokenizer.decode(dataset.prompts.tokens[i, place]) == f" {name}"
        assert dataset.roles["S1"][i] < dataset.roles["S2"][i]
        assert dataset.roles["S2"][i] == dataset.roles["S2"][30 + i]


NAMES = FAMILIES["ioi"].one_token["names"]


def test_greater_than_has_years_that_end_later_and_starts_in_01(speaker):
    dataset = contrastive("greater_than", speaker, 30)
    for i, (positive, negative) in enumerate(texts(dataset)):
        start, century = re.fullmatch(
            r"The \w+ lasted from .* year (\d{4}) to .* (\d\d)", positive
        ).groups()
        correct = speaker.tokenizer.decode(dataset.prompts.correct[i])
        incorrect = speaker.tokenizer.decode(dataset.prompts.incorrect[i])
        assert start[:2] == century
        assert int(incorrect) < int(start[2:]) < int(correct)
        assert negative == positive.replace(start, f"{century}01")


def test_docstring_answers_are_the_next_argument_of_the_head(speaker):
    dataset = contrastive("docstring", speaker, 20)
    for i, (positive, negative) in enumerate(texts(dataset)):
        arguments = re.findall(r"\w+", positive.split("(")[1].split(")")[0])
        described = re.findall(r":param (\w+)", positive)
        at = arguments.index(described[0])
        assert arguments[at + 1] == described[1]
        assert speaker.tokenizer.decode(dataset.prompts.correct[i]) == f" {arguments[at + 2]}"
        head, body = negative.split(")", 1)
        assert body == positive.split(")", 1)[1]
        assert not set(re.findall(r"\w+", head.split("(")[1])) & set(described)


def test_induction_repeats_and_in_negative_prompts_nothing_came_before(speaker):
    dataset = contrastive("induction", speaker, 20)
    for i, (positive, negative) in enumerate(texts(dataset)):
        words, others = positive.split(), negative.split()
        again = len(words) - 12
        assert words[12:] == words[:again] == others[12:]
        assert len({*others[:12], *words[:12]}) == 24
        assert speaker.tokenizer.decode(dataset.prompts.correct[i]) == f" {words[again]}"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_task_of_a_family_has_two_positive_prompts_and_held_out_words(speaker, name):
    task = contrastive_task(name, speaker.tokenizer)
    assert task.name == name
    batch = task.batch(8, split="held_out", seed=0)
    train = contrastive(name, speaker, 30)
    assert not set(batch.prompts) & set(train.prompts.texts)
    assert bool((batch.correct_token != batch.incorrect_token).all())
    if name == "greater_than":
        for row in range(16):
            year = int(re.findall(r"\d{4}", batch.prompts[row])[0][2:])
            assert int(batch.answers[row]) > year
            assert int(speaker.tokenizer.decode(batch.incorrect_token[row])) < year
    else:
        assert torch.equal(batch.correct_token.view(-1, 2).flip(1).flatten(), batch.incorrect_token)


def test_the_pairs_of_any_task_are_positive_and_negative(reader):
    from tl_sparse.tasks import Pair
    from tl_sparse.tasks.files import task_of_pairs

    pairs = [
        Pair((" Mary saw John", " Mary saw Emma"), (" and", " saw")),
        Pair((" Tom saw John", " Tom saw Emma"), (" and", " saw")),
    ]
    task = task_of_pairs(
        "saw", pairs, reader.tokenizer, description="x", source="x", max_tokens=9, held_out_share=0
    )
    dataset = contrastive(task, reader, 2)
    assert set(texts(dataset)) == {pair.prompts for pair in pairs}
    ids = [reader.tokenizer.convert_tokens_to_ids(word) for word in (" and", " saw")]
    assert dataset.prompts.correct.tolist() == ids[:1] * 4
    assert dataset.prompts.incorrect.tolist() == ids[1:] * 4


def test_tokenizers_that_split_the_words_are_told_so(small_model, reader):
    model = reader
    with pytest.raises(
        ValueError, match=r"docstring needs 12 arguments .* one token; of 93 it has 0"
    ):
        contrastive("docstring", model)
    with pytest.raises(ValueError, match="greater_than needs 1 years"):
        contrastive("greater_than", model)
    with pytest.raises(ValueError, match="'ioj': choose from ioi, greater_than"):
        contrastive("ioj", model)
    with pytest.raises(ValueError, match="no tokenizer"):
        contrastive("ioi", small_model())
    with pytest.raises(ValueError, match="answers must be token ids"):
        ContrastiveDataset.of("x", small_model(), [[3]], [[4]], [("a", "b")])


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROW = {
    "positive": " Mary saw John and Mary", "negative": " Mary saw John and Emma",
    "answers": [" John", " Mary"], "roles": {"first": " Mary", "second": [" Mary", 2]},
}  # fmt: skip


@pytest.fixture
def reader(small_model):
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", "<unk>", " Mary", " saw", " John", " and", " Emma", " Tom"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer, core.decoder = Split(Regex(r" ?\w+"), "isolated"), Fuse()
    return small_model(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<bos>", unk_token="<unk>"
        )
    )


def test_a_file_of_pairs_is_read(tmp_path, reader):
    other = ROW | {"positive": " Tom saw Emma and Tom", "negative": " Tom saw Emma and John",
                   "answers": [" Emma", " Tom"],
                   "roles": {"first": " Tom", "second": [" Tom", 2]}}  # fmt: skip
    dataset = contrastive_from_jsonl(lines(tmp_path / "mine.jsonl", ROW, other), reader)
    assert dataset.name == "mine"
    assert texts(dataset) == [(row["positive"], row["negative"]) for row in (ROW, other)]
    assert dataset.roles["first"].tolist() == [1] * 4
    assert dataset.roles["second"].tolist() == [5] * 4
    decoded = [reader.tokenizer.decode(i) for i in dataset.prompts.correct]
    assert decoded == [" John", " Emma"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negative": None}, "negative must be a text"),
        ({"negative": ROW["positive"]}, "are the same"),
        ({"answers": [" John"]}, "answers must be a list of two"),
        ({"answers": [" John", " John"]}, "twice the same"),
        ({"answers": [" John Tom", " Mary"]}, "each answer must be one token"),
        ({"roles": {"first": 3}}, "role 'first' must be a piece"),
        ({"roles": {"first": " Ann", "second": " Mary"}}, "' Ann' is not 1 times in"),
        ({"roles": {"first": " Mary", "second": [" Mary", 3]}}, "' Mary' is not 3 times in"),
        ({"roles": {"first": " Mary"}}, "prompt 1 has the roles first, and prompt 0 first, second"),
        ({"negative": " Mary saw John"}, "1 pairs differ in length"),
        ({"extra": 1}, "unknown key 'extra': choose from positive, negative, answers, roles"),
    ],
)
def test_a_bad_line_is_named(tmp_path, reader, change, message):
    path = lines(tmp_path / "mine.jsonl", ROW, ROW | change)
    with pytest.raises(ValueError, match=message):
        contrastive_from_jsonl(path, reader)


def test_lines_without_answers_and_files_without_lines(tmp_path, reader):
    bare = {"positive": " Mary saw", "negative": " Mary saw John"}
    dataset = contrastive_from_jsonl(lines(tmp_path / "a.jsonl", bare), reader, name="other")
    assert (dataset.name, dataset.prompts.correct) == ("other", None)
    with pytest.raises(ValueError, match="line 2: either every line has answers or none"):
        contrastive_from_jsonl(lines(tmp_path / "a.jsonl", bare, ROW), reader)
    with pytest.raises(ValueError, match="has no prompts"):
        contrastive_from_jsonl(lines(tmp_path / "b.jsonl"), reader)
    with pytest.raises(FileNotFoundError):
        contrastive_from_jsonl(tmp_path / "c.jsonl", reader)


def test_the_first_prompts_of_each_kind(reader):
    dataset = ContrastiveDataset.of(
        "x", reader, [[2, 3], [2, 4], [2, 5, 6]], [[3], [4], [5]], roles={"end": [1, 1, 2, 0, 0, 0]}
    )
    few = dataset.take(2, 1)
    assert few.prompts.tokens.tolist() == [[2, 3], [2, 4], [3, 0]]
    assert few.roles["end"].tolist() == [1, 1, 0]
    assert few.positive.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="4 positive and 4 negative"):
        dataset.take(4)
    with pytest.raises(ValueError, match="role 'end' is not one token"):
        ContrastiveDataset.of("x", reader, [[2]], [[3]], roles={"end": [1, 0]})
    with pytest.raises(ValueError, match="cannot be called 'mean'"):
        ContrastiveDataset.of("x", reader, [[2]], [[3]], roles={"mean": [0, 0]})


def test_agreement_by_hand():
    components = [Component(0, "head", i) for i in range(5)]
    scores = torch.tensor([0.9, 0.8, 0.5, 0.5, 0.1])
    found = agreement(scores, ["L0H0", (0, 2)], components, [(0, 0), (0, 1)])
    # true 0.9 beats all three others; true 0.5 beats one, ties one, loses to one
    assert found.auc == pytest.approx((3 + 1.5) / 6)
    # at recall 1/2 precision 1; at recall 1, the tie included, precision 2/4
    assert found.average_precision == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    assert (found.precision, found.recall, found.f1) == (0.5, 0.5, 0.5)
    assert found.best_f1 == pytest.approx(2 / 3)
    # rates (1/2, 0): 2·(1/2)·1/(3/2); (1, 2/3): 2·1·(1/3)/(4/3)
    assert found.pseudo_f1 == pytest.approx(2 / 3)
    curves = found.curves()
    assert set(curves["curve"]) == {"roc", "precision_recall"}
    assert "AUC 0.750" in repr(found)
    none = agreement(scores, [(0, 0)], components, [])
    assert none.f1 == 0.0
    with pytest.raises(ValueError, match="L0H7: not among the 5 components"):
        agreement(scores, ["L0H7"], components)
    with pytest.raises(ValueError, match="some components must be of the circuit"):
        agreement(scores, [], components)
    with pytest.raises(ValueError, match="'nine' is no component"):
        agreement(scores, ["nine"], components)


@pytest.mark.parametrize("name", ["L9H6", "L0H1.q", "4.mlp"])
def test_a_component_is_read_back_from_its_name(name):
    assert str(Component.of(name)) == name


def test_maps_and_curves_are_drawn(coded):
    from tl_sparse.heads import identify, score_edges

    values = torch.randint(0, 4, (20, 4))
    values[:10, 2], values[10:, 2] = 0, 1
    codes = coded(values, 10, [0, 0, 1, 1])
    found = identify(codes)
    figure = found.to_plotly()
    cells = figure.data[0].z
    assert (len(cells), len(cells[0])) == (2, 4)
    assert len(figure.layout.shapes) == len(found.named) == 1
    assert cells[1][2] == found.scores[2]
    assert len(score_edges(codes).to_plotly().data[0].z) == 4
    judged = agreement(found.scores, ["L1H2"], codes.components)
    assert len(judged.to_plotly().data) == 2
    for shown in (found, score_edges(codes), judged):
        assert "<table" in shown._repr_html_()
