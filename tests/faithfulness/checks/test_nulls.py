import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

from tl_sparse.faithfulness.checks.nulls import nulls, size_measures
from tl_sparse.faithfulness.nulls import (
    arbitrary_map,
    arbitrary_tokens,
    constant_answer,
    label_swap,
    reinitialised,
    shuffled_weights,
)
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.tasks import Pair, Task, task
from tl_sparse.tasks.task import StoredPairs


@task(source="test")
def copied(rng, split):
    """Which word stood first."""
    low, high = (20, 25) if split == "train" else (25, 30)
    one, other = rng.sample(range(low, high), 2)
    filler = " ".join(f"w{rng.randrange(12, 16)}" for _ in range(rng.randint(2, 6)))
    return Pair((f"w{one} {filler}", f"w{other} {filler}"), (f" w{one}", f" w{other}"))


@pytest.fixture
def own_answers(words):
    """A task whose pairs have answers of their own: the word that stood first comes again."""
    return Task.bind(copied, words, max_tokens=12)


@pytest.fixture
def stored(marks):
    """The same kind of pairs from a file."""
    pairs = [
        Pair((f"w{i} w5 w10", f"w{i} w6 w10"), (" w3", " w4") if i % 2 else (" w7", " w8"))
        for i in range(20, 28)
    ]
    make = StoredPairs(train=tuple(pairs[:4]), held_out=tuple(pairs[4:]))
    return replace(marks, answers=None, answer_ids=None, make=make)


# --------------------------------------------------------------------------------------------------
# tasks


def test_null_tasks_go_to_another_process_and_draw_the_same_prompts_there(own_answers, stored):
    for real in (own_answers, stored):
        for null in (label_swap(real), arbitrary_map(real), constant_answer(real)):
            there = pickle.loads(pickle.dumps(null))
            batches = [one.batch(3, split="train", seed=1) for one in (null, there)]
            assert batches[0].prompts == batches[1].prompts
            assert batches[0].answers == batches[1].answers


@pytest.mark.parametrize("which", ["marks", "own_answers", "stored"])
def test_swapped_labels_turn_every_answer_around(request, which):
    real = request.getfixturevalue(which)
    null = label_swap(real)
    assert null.name == f"{real.name}:label_swap"
    batch = null.batch(4, split="train", seed=0)
    rows = batch.tokens.view(len(batch) // 2, 2, -1)
    for i, (prompt, answer) in enumerate(zip(batch.prompts, batch.answers, strict=True)):
        first = prompt.split()[0]
        if which == "own_answers":
            assert answer.strip() == batch.prompts[i ^ 1].split()[0] != first
        else:
            right = (" w3", " w4") if which == "marks" or int(first[1:]) % 2 else (" w7", " w8")
            assert answer == right[0 if "w6" in prompt.split() else 1]
        assert null.tokenizer.decode([int(batch.correct_token[i])]).strip() == answer.strip()
        assert int(batch.incorrect_token[i]) == int(batch.correct_token[i ^ 1])
    assert not torch.equal(rows[:, 0], rows[:, 1])


def test_swapped_twice_is_the_task_itself(marks):
    again = label_swap(label_swap(marks))
    again = replace(again, name=marks.name)
    one, other = (t.batch(6, split="held_out", seed=3) for t in (marks, again))
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.correct_token, other.correct_token)


def test_a_swapped_task_has_the_opposite_logit_diffs(whole, marks):
    swapped = replace(label_swap(marks), name=marks.name)
    batch = swapped.batch(8, split="held_out", seed=1)
    real = marks.batch(8, split="held_out", seed=1)
    logits = whole.model(real.tokens)[torch.arange(16), real.last]
    rows = torch.arange(16)
    logit_diffs = [
        logits[rows, b.correct_token] - logits[rows, b.incorrect_token] for b in (real, batch)
    ]
    torch.testing.assert_close(logit_diffs[0], -logit_diffs[1])


@pytest.mark.parametrize("which", ["marks", "own_answers", "stored"])
def test_arbitrary_answers_are_two_tokens_that_no_prompt_has(request, which):
    real = request.getfixturevalue(which)
    null = arbitrary_map(real, 1)
    assert null.name == f"{real.name}:arbitrary_map:1"
    for split in ("train", "held_out"):
        batch = null.batch(4, split=split, seed=0)
        assert len(set(batch.correct_token.tolist())) == 2
        assert torch.equal(
            batch.correct_token.view(-1, 2), batch.correct_token[:2].expand(len(batch) // 2, 2)
        )
        assert torch.equal(batch.incorrect_token, batch.correct_token.view(-1, 2).flip(1).flatten())
        assert not torch.isin(batch.correct_token, batch.tokens).any()
        assert not torch.isin(
            batch.correct_token, real.batch(4, split=split, seed=0).correct_token
        ).any()


def test_a_constant_answer_is_right_for_both_members(marks, own_answers, stored):
    for real in (marks, own_answers, stored):
        null = constant_answer(real, 2)
        batch = null.batch(4, split="train", seed=0)
        assert batch.correct_token.unique().numel() == batch.incorrect_token.unique().numel() == 1
        assert int(batch.correct_token[0]) != int(batch.incorrect_token[0])
        assert not torch.isin(batch.correct_token, batch.tokens).any()
        assert null.name == f"{real.name}:constant_answer:2"


def test_arbitrary_tokens_are_the_seeds(marks):
    chosen = [arbitrary_tokens(marks, seed) for seed in range(6)]
    assert chosen[0] == arbitrary_tokens(marks, 0)
    assert len(set(chosen)) > 3
    for (text, token), (other, _) in chosen:
        assert text != other
        assert marks.tokenizer.encode(text, add_special_tokens=False) == [token]


def test_a_token_that_the_tokenizer_joins_to_a_prompt_is_not_chosen(marks, monkeypatch):
    import tl_sparse.faithfulness.nulls as module

    free = {token for seed in range(30) for _, token in arbitrary_tokens(marks, seed)}
    assert len(free) > 2
    follows = module.follows
    allowed = sorted(free)[:2]
    monkeypatch.setattr(
        module, "follows", lambda t, p, token: follows(t, p, token) if token in allowed else None
    )
    assert {token for _, token in arbitrary_tokens(marks, 0)} == set(allowed)
    monkeypatch.setattr(module, "follows", lambda *_: None)
    with pytest.raises(ValueError, match="no two tokens that can follow all of marked"):
        arbitrary_map(marks)


def test_tokens_of_real_tokenizers_stay_whole_after_every_prompt():
    from tl_sparse import SparseTransformer, tasks

    tokenizer = SparseTransformer.from_pretrained("python-sparse").tokenizer
    for name in ("single_double_quote", "class_init"):
        real = tasks.get(name, tokenizer)
        for null in (label_swap(real), arbitrary_map(real, 0), constant_answer(real, 0)):
            batch = null.batch(16, split="held_out", seed=5)
            encoded = tokenizer(
                [p + a for p, a in zip(batch.prompts, batch.answers, strict=True)],
                add_special_tokens=False,
            )["input_ids"]
            assert [ids[-1] for ids in encoded] == batch.correct_token.tolist()


# --------------------------------------------------------------------------------------------------
# models


@pytest.fixture(params=["together", "tied", "dense"])
def any_model(request, small_model):
    if request.param == "dense":
        return request.getfixturevalue("dense_model")
    return small_model(request.param, zeros=0.6)


@pytest.mark.parametrize("make", [reinitialised, shuffled_weights])
def test_a_null_model_is_a_copy_with_other_weights(any_model, make, tokens):
    before = copy.deepcopy(any_model.state_dict())
    logits = any_model(tokens)
    null, again, third = make(any_model, 0), make(any_model, 0), make(any_model, 1)
    for name, value in any_model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(null(tokens), again(tokens))
    assert not torch.allclose(null(tokens), logits)
    assert not torch.allclose(null(tokens), third(tokens))


def test_redrawn_weights_have_the_same_zeros_and_the_same_scale(any_model):
    null = reinitialised(any_model, 0)
    pairs = list(
        zip(
            weight_matrices(any_model, biases=True), weight_matrices(null, biases=True), strict=True
        )
    )
    assert len(pairs) > 10
    for old, new in pairs:
        a, b = (torch.cat([part.flatten() for part in m.parts]) for m in (old, new))
        assert torch.equal(a == 0, b == 0), old.name
        if len(a) > 100:
            assert float(b.square().mean().sqrt() / a.square().mean().sqrt()) == pytest.approx(
                1, abs=0.35
            )
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.5


def test_shuffled_weights_are_the_same_values_at_other_places(any_model):
    null = shuffled_weights(any_model, 0)
    moved = 0
    for old, new in zip(
        weight_matrices(any_model, biases=True), weight_matrices(null, biases=True), strict=True
    ):
        a, b = (torch.cat([part.flatten() for part in m.parts]) for m in (old, new))
        assert torch.equal(a.sort().values, b.sort().values), old.name
        moved += not torch.equal(a == 0, b == 0)
    # a dense model has no zeros whose places could change, but for its biases
    assert moved > 5 or not bool((any_model.blocks[0].mlp.W_in == 0).any())


def test_norms_stay_as_they_are(small_model):
    model = small_model("together", zeros=0.5)
    null = reinitialised(model, 0)
    norms = [name for name in model.state_dict() if "ln" in name.split(".")[-2]]
    assert norms
    for name in norms:
        assert torch.equal(model.state_dict()[name], null.state_dict()[name])


# --------------------------------------------------------------------------------------------------
# part F


QUICK = {"null_steps": 30, "search_pairs": 8, "null_seeds": 1, "search_target": 0.3}


@pytest.fixture
def part(chain, tested):
    return nulls(tested(*chain, **QUICK))


def test_the_real_circuit_is_found_and_smaller_than_nonsense(part):
    table = part.tables["searches"]
    assert list(table["search"].unique()) == [
        "real", "label_swap", "arbitrary_map", "constant_answer", "reinitialised",
        "shuffled_weights",
    ]  # fmt: skip
    assert len(table) == 6
    real = table[table["search"] == "real"]
    assert bool(real["found"].all())
    assert part.measure("size").value == pytest.approx(real["n_nodes"].mean())
    assert 5 <= part.measure("size").value < 12
    # the model's channel cannot be turned around by removing nodes
    assert part.measure("size_ratio", "label_swap").value == 0
    assert part.measure("null_success", "label_swap").value == 0
    for kind in table["search"].unique()[1:]:
        here = table[table["search"] == kind]
        assert part.measure("null_success", kind).value == pytest.approx(here["found"].mean())
        assert part.measure("null_success", kind).null == 1
        by_hand = [
            part.measure("size").value / max(n, 1) if found else 0.0
            for n, found in zip(here["n_nodes"], here["found"], strict=True)
        ]
        assert part.measure("size_ratio", kind).value == pytest.approx(sum(by_hand))
        assert part.measure("size_ratio", kind).examples.tolist() == pytest.approx(by_hand)
    failed = table[~table["found"]]
    assert bool(failed["why_not"].str.len().gt(10).all())
    assert bool(failed["n_nodes"].isna().all())


def test_without_text_the_null_models_are_left_out_and_said_so(chain, tested):
    bare = replace(tested(*chain, **QUICK | {"null_seeds": 2}), tokens=None)
    found = nulls(bare)
    assert found.tables["searches"]["seed"].tolist() == [0, 1] * 4
    assert not {"reinitialised", "shuffled_weights"} & set(found.tables["searches"]["search"])
    assert any("reinitialised, shuffled_weights: not searched; give tokens=" in n
               for n in found.notes)  # fmt: skip


def test_where_members_differ_by_chance_alone_nothing_arbitrary_is_searched(whole, own_answers):
    from tl_sparse.faithfulness.checks.nulls import null_tasks

    jobs, notes = null_tasks(replace(whole, task=own_answers), [0, 1])
    assert [kind for kind, _, _ in jobs] == ["label_swap"] * 2 + ["constant_answer"] * 2
    assert "tells member A from member B" in notes[0]


def test_ratios_count_a_null_without_circuit_as_infinite_and_an_empty_one_as_one():
    sizes = {
        "real": torch.tensor([4.0, math.inf, 8.0]),
        "a": torch.tensor([12.0, math.inf, 3.0]),
        "b": torch.tensor([0.0, math.inf, math.inf]),
        "c": torch.tensor([math.inf] * 3),
    }
    found = {(m.name, m.variant): m for m in size_measures(sizes)}
    assert found["size", ""].value == 6
    assert found["size", ""].null == 5
    assert found["size_ratio", "a"].examples.tolist() == [0.5, 0.0, 2.0]
    assert found["size_ratio", "b"].value == 2
    assert found["size_ratio", "c"].value == 0
    assert found["null_success", "a"].value == pytest.approx(2 / 3)
    assert found["null_success", "c"].value == 0
    assert found["null_success", "a"].null == pytest.approx(2 / 3)


def test_where_the_real_task_is_not_found_there_is_no_ratio_and_a_note(chain, tested):
    model, task, circuit = chain
    hopeless = tested(model, task, circuit, **QUICK | {"search_target": 1e-6})
    found = nulls(replace(hopeless, tokens=None))
    assert math.isnan(found.measure("size_ratio", "label_swap").value)
    assert any(note.startswith("the real task has no circuit") for note in found.notes)
    assert not found.tables["searches"]["found"].any()
