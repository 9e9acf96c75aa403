"""Baselines on a compiled model, whose heads are known, and on outputs made by hand."""

import pytest
import torch

from tl_sparse.ground_truth import known_heads
from tl_sparse.heads import PromptPairs, agreement, baseline, baseline_of_outputs, dataset_of
from tl_sparse.heads.baselines import INTERVENING, LOOKING, LostShare
from tl_sparse.heads.component import Component


@pytest.fixture(scope="module")
def known():
    """Compiled induction: two of twelve heads."""
    return known_heads("compiled induction", 3)


@pytest.fixture(scope="module")
def pairs(known):
    """Four prompts and their hard negatives."""
    return PromptPairs.from_dataset(dataset_of(known, 4))


@pytest.mark.parametrize("method", INTERVENING)
def test_every_method_that_intervenes_ranks_the_true_heads_first(known, pairs, method):
    found = baseline(known.model, pairs, method)
    components = [Component(layer, "head", head) for layer in range(2) for head in range(6)]
    judged = agreement(found.scores.flatten(), known.heads, components)
    assert found.method == method
    assert found.seconds > 0
    if method in ("attribution", "HISP"):  # a gradient where attention is saturated: not exact
        assert judged.auc > 0.9
        return
    assert judged.auc == 1
    best = found.to_dataframe().head(2)
    assert set(zip(best["layer"], best["head"], strict=True)) == set(known.heads)


def test_patching_is_the_change_by_one_head_in_a_plain_loop(known, pairs):
    model, (layer, head) = known.model, known.heads[0]
    name = f"blocks.{layer}.attn.hook_z"
    changes = []
    for i in range(len(pairs)):
        one = pairs.rows(torch.tensor([i]))
        _, cache = model.run_with_cache(one.corrupted.tokens)

        def put(z, hook, there=cache[name]):
            z = z.clone()
            z[:, :, head] = there[:, :, head]
            return z

        with torch.no_grad():
            full, without = (
                model.run_with_hooks(one.clean.tokens, fwd_hooks=hooks)[0, -1]
                for hooks in ([], [(name, put)])
            )
        right, wrong = int(one.clean.correct[0]), int(one.clean.incorrect[0])
        changes.append(float((without[right] - without[wrong]) - (full[right] - full[wrong])))
    found = baseline(model, pairs, "patching").scores[layer, head]
    assert float(found) == pytest.approx(abs(sum(changes) / len(changes)), rel=1e-4)


def test_the_lost_share_is_none_with_all_heads_and_all_without(known, pairs):
    lost = LostShare.of(known.model, pairs)
    with torch.no_grad():
        assert float(lost.under(torch.ones(12))) == pytest.approx(0, abs=1e-6)
        assert float(lost.under(torch.zeros(12))) == pytest.approx(1, rel=0.02)
        true = torch.zeros(12)
        true[[layer * 6 + head for layer, head in known.heads]] = 1
        assert float(lost.under(true)) < 0.01


def planted():
    """Outputs of 20 + 20 prompts: head 1 has another mean on positive prompts, head 2 is large,
    head 3 differs far less than it varies."""
    generator = torch.Generator().manual_seed(0)
    outputs = 0.1 * torch.randn(40, 4, 5, generator=generator)
    labels = torch.arange(40) < 20
    outputs[labels, 1, 0] += 1
    outputs[:, 2] += 10
    outputs[:, 3] *= 100
    return outputs, labels


def test_methods_that_look_score_what_they_say():
    outputs, labels = planted()
    found = {m: baseline_of_outputs(outputs, labels, (2, 2), m).scores.flatten() for m in LOOKING}
    means = [[sum(row) / 20 for row in outputs[s, 1].T.tolist()] for s in (labels, ~labels)]
    distance = sum((a - b) ** 2 for a, b in zip(*means, strict=True)) ** 0.5
    assert float(found["difference of means"][1]) == pytest.approx(distance, rel=1e-5)
    norms = [sum(x * x for x in row) ** 0.5 for row in outputs[:, 2].tolist()]
    assert float(found["head norm"][2]) == pytest.approx(sum(norms) / 40, rel=1e-5)
    assert int(found["head norm"].argmax()) in (2, 3)
    assert int(found["difference of means"].argmax()) == 3
    assert int(found["standardised difference"].argmax()) == 1
    assert float(found["linear probe"][1]) == 1
    assert found["linear probe"][[0, 2, 3]].max() < 0.8


def test_a_probe_is_scored_on_prompts_that_it_was_not_fitted_on():
    """With more numbers than prompts it fits any labels, and learns nothing by it."""
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(40, 6, 200, generator=generator)
    labels = torch.arange(40) % 2 == 0
    found = baseline_of_outputs(outputs, labels, (1, 6), "linear probe").scores
    assert found.mean() == pytest.approx(0.5, abs=0.12)


def test_what_does_not_fit_is_refused(known, pairs):
    outputs, labels = planted()
    with pytest.raises(ValueError, match="choose from patching"):
        baseline(known.model, pairs, "guess")
    with pytest.raises(ValueError, match="choose from head norm"):
        baseline_of_outputs(outputs, labels, (2, 2), "guess")
    with pytest.raises(ValueError, match="do not fit 40 labels"):
        baseline_of_outputs(outputs, labels, (3, 2), "head norm")
    with pytest.raises(ValueError, match="both needed"):
        baseline_of_outputs(outputs, labels | True, (2, 2), "head norm")
    with pytest.raises(ValueError, match="differ in length"):
        PromptPairs.of(known.model, [[1, 4, 5]], [[1, 4]], [4], [5])
    with pytest.raises(ValueError, match="as many corrupted"):
        PromptPairs.of(known.model, [[1, 4, 5]], [[1, 4, 5]] * 2, [4], [5])
