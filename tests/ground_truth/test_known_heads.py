import json
import random
import sys

import pytest
import torch

from tl_sparse.ground_truth import compiled, component_edges, known_heads
from tl_sparse.ground_truth.known_heads import COMPILED, NAMES, repeat_triple, text_of
from tl_sparse.ground_truth.trained import train as training
from tl_sparse.ground_truth.trained.languages import LANGUAGES
from tl_sparse.ground_truth.trained.truth import HeadTruth, Triples, find_truth, triples_of


@pytest.fixture(scope="module")
def known():
    """Every model, made once."""
    return {name: known_heads(name) for name in NAMES}


def logit_diffs(model, triples, hooks=()):
    """By a plain loop: logit(correct) - logit(incorrect) at the end of each clean prompt."""
    found = []
    ids = model.tokenizer.get_vocab()
    for triple in triples:
        tokens = model.to_tokens(text_of(triple.clean))
        logits = model.run_with_hooks(tokens, fwd_hooks=[h(triple) for h in hooks])[0, -1]
        found.append(float(logits[ids[f" {triple.correct}"]] - logits[ids[f" {triple.incorrect}"]]))
    return found


def patched(model, heads):
    """Hooks that set heads to what they are in the broken prompt."""

    def hook_in(layer):
        name = f"blocks.{layer}.attn.hook_z"
        here = [head for at, head in heads if at == layer]

        def of(triple):
            _, cache = model.run_with_cache(model.to_tokens(text_of(triple.broken)))

            def hook(z, hook):
                z = z.clone()
                z[:, :, here] = cache[name][:, :, here]
                return z

            return name, hook

        return of

    return [hook_in(layer) for layer in sorted({layer for layer, _ in heads})]


@pytest.mark.parametrize("name", NAMES)
def test_the_task_is_solved_and_needs_the_true_heads_alone(known, name):
    """Without the true heads nothing is left; without all the others nearly everything is."""
    one = known[name]
    config = one.model.config
    every = {(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)}
    others = every - set(one.heads)
    triples = one.triples(12, seed=7)
    with torch.no_grad():
        full = torch.tensor(logit_diffs(one.model, triples))
        without, alone = (
            torch.tensor(logit_diffs(one.model, triples, patched(one.model, heads)))
            for heads in (one.heads, others)
        )
    assert (full > 0).all()
    assert 0 < len(one.heads) < len(every)
    assert without.mean().abs() < 0.2 * full.mean()
    assert alone.mean() > 0.65 * full.mean()


@pytest.mark.parametrize("name", NAMES)
def test_the_three_versions_of_a_prompt_are_equally_long_and_differ(known, name):
    triples = known[name].triples(60, seed=1)
    assert len(set(triples)) == len(triples) == 60
    words = set(known[name].model.tokenizer.get_vocab())
    for triple in triples:
        assert len(triple.clean) == len(triple.other) == len(triple.broken)
        assert len({triple.clean, triple.other, triple.broken}) == 3
        assert triple.correct != triple.incorrect
        for text in (triple.clean, triple.other, triple.broken):
            assert {f" {word}" for word in text} <= words


def test_hard_negatives_leave_the_answer_open(known):
    for triple in known["trained ioi"].triples(40):
        giver = triple.broken[next(i for i, w in enumerate(triple.clean) if w != triple.broken[i])]
        assert giver not in (triple.correct, triple.incorrect)
        assert triple.broken.count(triple.correct) == triple.broken.count(triple.incorrect) == 1
    for triple in known["trained greater_than"].triples(40):
        assert "01" in triple.broken
        start = int(next(w for w in triple.clean if w.isdigit()))
        assert int(triple.incorrect) < start < int(triple.correct)
    for triple in known["trained induction"].triples(40):
        row, last = triple.broken[:12], triple.broken[-1]
        assert triple.clean[triple.clean.index(last) + 1] == triple.correct
        assert sorted(row) == sorted(triple.clean[:12])
        assert row.index(last) == 11 or row[row.index(last) + 1] != triple.correct
    for triple in known["trained brackets"].triples(40):
        assert sum(map(triple.broken.count, "([{")) == sum(map(triple.broken.count, ")]}"))
    for triple in known["compiled proportion"].triples(40):
        assert 2 * triple.broken.count("x") == len(triple.broken) - 1


def test_tasks_ask_of_both_prompts_what_their_versions_answer(known):
    for name in ("trained greater_than", "compiled induction"):
        task = known[name].task()
        batch = task.batch(8, split="train", seed=0)
        vocabulary = task.tokenizer.get_vocab()
        assert task.name == name
        assert [vocabulary[answer] for answer in batch.answers] == batch.correct_token.tolist()
        if name == "trained greater_than":
            for i, prompt in enumerate(batch.prompts):
                start = int(next(word for word in prompt.split() if word.isdigit()))
                right, wrong = (
                    int(task.tokenizer.decode(int(ids[i])))
                    for ids in (batch.correct_token, batch.incorrect_token)
                )
                assert wrong < start < right


def test_compiled_edges_lie_between_compiled_heads(known):
    assert known["compiled induction"].edges == {tuple(known["compiled induction"].heads)}
    frame = component_edges(compiled("induction", 0, 6))
    between = frame[frame["sender"].str.startswith("a") & frame["receiver"].str.startswith("a")]
    assert len(between) == 1


def test_stored_effects_are_those_of_patching_one_head_in_a_plain_loop(known):
    """The previous-token head of the induction model, on the prompts that it was measured on."""
    one = known["trained induction"]
    triples = triples_of(LANGUAGES["induction"].triple, training.TRUTH_PROMPTS, training.TRUTH_SEED)
    row = one.effects.set_index(["layer", "head"])["alone"].idxmax()
    with torch.no_grad():
        some = triples[:16]
        full, without = (
            torch.tensor(logit_diffs(one.model, some, hooks))
            for hooks in ([], patched(one.model, [row]))
        )
    share = float((full.mean() - without.mean()) / full.mean())
    assert row == (0, 4)
    assert share == pytest.approx(one.effects.set_index(["layer", "head"])["alone"][row], abs=0.1)


def test_measuring_a_compiled_model_finds_its_heads_and_its_edge():
    truth = compiled("induction", 1)
    triples = Triples.of(triples_of(repeat_triple, 4, 0), truth.model.tokenizer)
    found = find_truth(truth.model, triples, progress=False)
    assert found.heads == truth.heads
    assert found.head_edges == {(truth.heads[0], truth.heads[1])}
    [row] = found.edges[found.edges["receiver"] != "logits"].itertuples()
    assert row.input == "k"
    assert found.accuracy == 1
    assert abs(found.broken_logit_diff) < 0.01 * found.logit_diff
    true = found.effects["true"].astype(float).tolist()
    assert found.effects["alone"].tolist() == pytest.approx(true, abs=0.01)


def test_a_truth_survives_its_file(known):
    one = known["trained brackets"]
    values = json.loads(json.dumps(HeadTruth(
        one.heads, one.effects, one.effects[:0].assign(sender="", receiver="", input="", share=0.0),
        1.0, 1.0, 0.0,
    ).to_values()))  # fmt: skip
    assert HeadTruth.from_values(values).heads == one.heads


def test_the_command_trains_measures_and_writes_what_is_loaded(tmp_path, monkeypatch, known):
    module = sys.modules[known_heads.__module__]
    values = json.loads((module.MODELS / "brackets" / "truth.json").read_text())
    stored = HeadTruth.from_values(values)
    monkeypatch.setattr(training, "find_truth", lambda *args, **options: stored)
    monkeypatch.setattr(training, "BATCH", 2)
    training.main(["--out", str(tmp_path), "--only", "brackets", "--steps", "2"])
    monkeypatch.setattr(module, "MODELS", tmp_path)
    one = known_heads("trained brackets")
    assert one.heads == known["trained brackets"].heads
    assert "7 of 16 heads" in (tmp_path / "brackets" / "README.md").read_text()


def test_training_lowers_the_loss_and_is_repeatable(monkeypatch):
    monkeypatch.setattr(training, "BATCH", 8)
    first, again = (training.train("brackets", steps=15, progress=False) for _ in range(2))
    for name, weight in first.named_parameters():
        assert torch.equal(weight, dict(again.named_parameters())[name])
    language = LANGUAGES["brackets"]
    tokens, following = training.drawn(language, first.tokenizer.get_vocab(), random.Random(5), 16)
    with torch.no_grad():
        losses = [
            float(torch.nn.functional.cross_entropy(
                model(tokens).flatten(0, 1), following.flatten()
            ))
            for model in (training.new_model("brackets"), first)
        ]  # fmt: skip
    assert losses[1] < losses[0] - 0.2


def test_unknown_names_are_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="choose from compiled reversing"):
        known_heads("trained sorting")
    with pytest.raises(ValueError, match="choose from induction"):
        training.train("sorting")
    assert set(COMPILED) == {"reversing", "proportion", "induction"}
