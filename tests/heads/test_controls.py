"""Controls on a planted head, and what each way to get codes keeps of the outputs."""

import pytest
import torch

from tl_sparse.ground_truth import known_heads
from tl_sparse.heads import controls, dataset_of, extract_head_outputs, identify
from tl_sparse.heads.component import Component
from tl_sparse.heads.controls import CODERS, SHUFFLED, codes_of, hash_around, shuffled
from tl_sparse.heads.outputs import HeadOutputs

EVERY = tuple(CODERS)


@pytest.fixture(scope="module")
def planted():
    """Outputs of 30 + 30 prompts by four heads, of which head 2 alone tells the kinds apart."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(60, 4, 16, generator=generator)
    positive = torch.arange(60) < 30
    outputs[:, 2] = 0.1 * outputs[:, 2] + torch.where(positive[:, None], 4.0, -4.0)
    heads = tuple(Component(0, "head", i) for i in range(4))
    return HeadOutputs(outputs, None, heads, positive, "mean", "planted", 0.0)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "random codes"])
def test_codes_of_every_kind_find_a_planted_head(planted, name):
    codes = CODERS[name](planted, 32, 0)
    found = identify(codes, score="mi", permutations=200)
    assert int(found.scores.argmax()) == 2
    assert str(found.named[0]) == "L0H2"


def test_random_codes_and_shuffled_labels_find_nothing(planted):
    for seed in range(3):
        assert not identify(CODERS["random codes"](planted, 32, seed), permutations=200).named
    codes = CODERS["k-means by head"](planted, 32, 0)
    assert not identify(codes, shuffled(planted.positive, 1), permutations=200).named
    mixed = shuffled(planted.positive, 1)
    assert int(mixed.sum()) == 30
    assert not torch.equal(mixed, planted.positive)


def test_a_hash_is_the_side_of_each_plane(planted):
    """By a plain loop; centred, around each head's mean."""
    planes = torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(4))[0]
    x = planted.factors
    for centred in (False, True):
        found = hash_around(planted, 8, 4, centred).values[..., 0]
        for prompt in (0, 40):
            for head in range(4):
                middle = x[:, head].mean(0) if centred else torch.zeros(16)
                sides = [float((x[prompt, head] - middle) @ planes[:, b]) > 0 for b in range(3)]
                assert int(found[prompt, head]) == sum(2**b for b, side in enumerate(sides) if side)


def test_codes_are_numbered_below_their_count(planted):
    for name in EVERY[2:]:  # of those that train nothing
        codes = CODERS[name](planted, 20, 0)
        assert codes.values.shape == (60, 4, 1)
        assert 0 <= int(codes.values.min()) <= int(codes.values.max()) <= codes.n_codes <= 20
    same = codes_of(planted, torch.zeros(60, 4, dtype=torch.int64), 2)
    assert (identify(same, permutations=0).scores.abs() < 1e-9).all()


@pytest.fixture(scope="module")
def known():
    return known_heads("compiled induction", 0)


def test_one_call_gives_every_control_at_every_position(known):
    dataset = dataset_of(known, 12)
    methods = ["untrained encoder", "hash", "linear probe", "head norm"]
    found = controls(
        known.model, dataset, known.heads, positions=("mean", "last"), methods=methods, n_codes=16
    )
    frame = found.to_dataframe()
    assert len(frame) == 2 * (2 * 2 + 2)
    assert set(frame["position"]) == {"mean", "last"}
    assert frame["auc"].between(0, 1).all()
    assert (frame["seconds"] > 0).all()
    outputs = extract_head_outputs(known.model, dataset, "last")
    again = identify(CODERS["hash"](outputs, 16, 0), score="mi", permutations=0)
    torch.testing.assert_close(found.scores["last", "hash", "mi"], again.scores)
    assert "12 components" in repr(found)
    assert "linear probe" in found._repr_html_()


def test_without_a_truth_methods_are_compared_with_the_trained_codes(known, monkeypatch):
    monkeypatch.setitem(CODERS, "paper", CODERS["untrained encoder"])  # 500 steps less
    dataset = dataset_of(known, 6)
    found = controls(
        known.model, dataset, positions=("mean",), scores=("unique",), n_codes=8,
        methods=["paper", SHUFFLED, "random codes", "head norm"],
    )  # fmt: skip
    frame = found.to_dataframe().set_index("method")
    outputs = extract_head_outputs(known.model, dataset)
    codes = CODERS["paper"](outputs, 8, 0)
    mixed = identify(codes, shuffled(outputs.positive, 0), score="unique", permutations=0)
    torch.testing.assert_close(found.scores["mean", SHUFFLED, "unique"], mixed.scores)
    assert "auc" not in frame
    assert frame["agrees"]["paper"] == pytest.approx(1)
    assert abs(frame["agrees"]["random codes"]) < 0.99


def test_an_unknown_method_is_refused_with_those_that_there_are(known):
    with pytest.raises(ValueError, match="choose from paper, corrected"):
        controls(known.model, dataset_of(known, 2), methods=["magic"])
