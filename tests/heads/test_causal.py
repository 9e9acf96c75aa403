import pytest
import torch

from tl_sparse.circuits import circuit_of_heads
from tl_sparse.ground_truth import known_heads
from tl_sparse.heads import causal_check, dataset_of


@pytest.fixture(scope="module")
def known():
    return known_heads("compiled induction", 2)


@pytest.fixture(scope="module")
def circuit_of(known):
    """A circuit of heads, the others at their means over hard negatives."""
    dataset = dataset_of(known, 24)
    tokens = dataset.prompts.tokens[dataset.n_positive :]
    return lambda heads: circuit_of_heads(known.model, known.name, heads, tokens)


def test_the_true_heads_do_the_task_alone_and_nothing_is_left_without(known, circuit_of):
    found = causal_check(known.model, circuit_of(known.heads), known.task(), pairs=8, random_sets=6)
    frame = found.to_dataframe().set_index("measure")
    assert frame["value"]["f"] == pytest.approx(1, abs=0.02)
    assert frame["value"]["necessity"] == pytest.approx(1, abs=0.02)
    assert found.f.shape == (7,)
    assert frame["random"]["f"] < 0.6
    assert frame["as_high"]["necessity"] < 0.5
    assert "2 heads, f 1.00" in repr(found)
    assert "as high" in found._repr_html_()


def test_shares_are_those_of_the_mean_logit_differences(known, circuit_of):
    others = [(layer, (head + 1) % 6) for layer, head in known.heads]
    found = causal_check(known.model, circuit_of(others), known.task(), pairs=4, random_sets=1)
    assert set(others).isdisjoint(known.heads)
    means = [float(x.mean()) for x in (found.alone[0], found.empty, found.full)]
    assert float(found.f[0]) == pytest.approx(
        (means[0] - means[1]) / (means[2] - means[1]), abs=1e-5
    )
    assert float(found.f[0]) == pytest.approx(0, abs=0.02)
    assert float(found.necessity[0]) == pytest.approx(0, abs=0.02)
    assert torch.isfinite(found.without).all()


def test_random_sets_are_needed(known, circuit_of):
    with pytest.raises(ValueError, match="random_sets=0"):
        causal_check(known.model, circuit_of(known.heads), known.task(), random_sets=0)
