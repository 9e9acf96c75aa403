"""Scores of hand-made codes, against values worked out by hand and plain loops."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tl_sparse.heads import identify, score_edges
from tl_sparse.heads.edges import edge_votes
from tl_sparse.heads.scores import SCORES

CODES = [
    # positives
    [1, 7, 3], [2, 7, 3], [2, 7, 4], [3, 7, 5],
    # negatives
    [3, 7, 3], [4, 7, 3], [4, 7, 4], [4, 7, 5],
]  # fmt: skip


def entropy(values):
    counts = Counter(values)
    return -sum(n / len(values) * math.log(n / len(values)) for n in counts.values())


def scored(codes, score):
    return identify(codes, score=score, permutations=0).scores.tolist()


def test_scores_by_hand(coded):
    codes = coded(CODES, 4)
    assert scored(codes, "unique") == [2, 0, 0]
    assert scored(codes, "normalised") == [2 / 4, 0, 0]
    assert scored(codes, "jaccard") == [3 / 4, 0, 0]
    column, labels = [row[0] for row in CODES], [1] * 4 + [0] * 4
    information = (
        entropy(column) + entropy(labels) - entropy(list(zip(column, labels, strict=True)))
    )
    assert scored(codes, "mi") == pytest.approx([information - 3 / 16, 0, -2 / 16], abs=1e-9)
    assert scored(codes, "jsd") == pytest.approx([information, 0, 0], abs=1e-9)


def test_jensen_shannon_does_not_depend_on_how_many_are_negative(coded):
    codes, more = coded(CODES, 4), coded(CODES + CODES[4:], 4)
    assert scored(codes, "jsd") == pytest.approx(scored(more, "jsd"))
    assert scored(codes, "mi") != pytest.approx(scored(more, "mi"))


@pytest.mark.parametrize("score", SCORES)
def test_the_order_of_prompts_and_the_names_of_codes_do_not_matter(coded, score):
    values = torch.randint(0, 6, (30, 4))
    codes = coded(values, 12)
    order, names = torch.randperm(30), torch.randperm(6)
    other = identify(
        coded(names[values][order], 12), codes.positive[order], score=score, permutations=0
    )
    assert torch.equal(other.scores, identify(codes, score=score, permutations=0).scores)


def test_sets_of_codes_count_each_code(coded):
    sets = [[[1, 2]], [[2, 3]], [[3, -1]], [[3, 4]]]
    assert scored(coded(sets, 2), "unique") == [2]  # 1 and 2
    assert scored(coded(sets, 2), "jaccard") == [3 / 4]  # 3 is in both


def test_softmax_keeps_the_order_and_survives_large_scores(coded):
    found = identify(
        coded(np.arange(2400).reshape(800, 3), 700, n_codes=2400), score="unique", permutations=0
    )
    assert found.scores.tolist() == [700] * 3
    assert found.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    layers = identify(coded(CODES, 4, [0, 0, 1]), score="unique", permutations=0)
    assert layers.probabilities("layers").tolist() == [1, 1, 1]  # three head numbers, each alone
    with pytest.raises(ValueError, match="'all' or 'layers'"):
        layers.probabilities("heads")


def pairs_by_loop(codes, labels):
    """U[h1, h2]: pairs of codes on positive prompts and on no negative one."""
    n = codes.shape[1]
    found, kinds = np.zeros((n, n)), np.zeros((n, n))
    for a in range(n):
        for b in range(n):
            if a != b:
                seen = [
                    {(int(x), int(y)) for x, y in codes[labels == kind][:, [a, b]]}
                    for kind in (True, False)
                ]
                found[a, b] = len(seen[0] - seen[1])
                kinds[a, b] = len(seen[0]) + len(seen[1])
    return found, kinds


def dense_cooccurrence(codes, labels, n_codes):
    """C[h1, h2, c1, c2] of each kind, as the paper's code keeps it."""
    one_hot = np.eye(n_codes)[codes]
    return [
        np.einsum("pax,pby->abxy", one_hot[labels == kind], one_hot[labels == kind])
        for kind in (True, False)
    ]


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_sparse_and_dense_cooccurrence_are_equal(coded, monkeypatch, chunk):
    monkeypatch.setattr("tl_sparse.heads.edges.CHUNK", chunk)  # one component a step, or all
    values = torch.randint(0, 5, (40, 6))
    codes = coded(values, 15, [0, 0, 1, 1, 2, 2])
    labels = codes.positive.numpy()
    positive, negative = dense_cooccurrence(values.numpy(), labels, 5)
    unique = ((positive > 0) & (negative == 0)).sum((2, 3))
    looped, kinds = pairs_by_loop(values.numpy(), labels)
    later = np.add.outer([0, 0, 1, 1, 2, 2], np.zeros(6)) < np.array([0, 0, 1, 1, 2, 2])
    for score, expected in (("unique", unique), ("normalised", looped / np.maximum(kinds, 1))):
        found = score_edges(codes, score).scores.numpy()
        assert np.array_equal(np.isnan(found), ~later)
        np.testing.assert_allclose(found[later], expected[later])
    both = positive + negative
    joint = np.stack([positive, negative], -1) / 40
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.nan_to_num(joint * np.log(joint)).sum((2, 3, 4)) - np.nan_to_num(
            both / 40 * np.log(both / 40)
        ).sum((2, 3))
    expected += entropy(labels.tolist()) - ((both > 0).sum((2, 3)) - 1) / 80
    np.testing.assert_allclose(score_edges(codes, "mi").scores.numpy()[later], expected[later])


def test_votes_are_the_heads_of_the_best_quarter_of_all_pairs(coded):
    values = torch.randint(0, 5, (40, 6))
    codes = coded(values, 15)
    unique, _ = pairs_by_loop(values.numpy(), codes.positive.numpy())
    ranked = sorted(np.ndindex(6, 6), key=lambda pair: -unique[pair])  # stable
    counted = Counter(head for pair in ranked[:9] for head in pair)
    assert edge_votes(codes).tolist() == [counted[i] for i in range(6)]
    assert identify(codes, score="edge_votes").scores.tolist() == edge_votes(codes).tolist()


def composition(n=200, seed=0):
    """Head 1 repeats head 0 on positive prompts, not on negative ones; head 2 tells them apart by
    itself, as does head 3; head 4 tells nothing."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) < n // 2
    bits = rng.integers(0, 2, (n, 5))
    bits[:, 1] = np.where(labels, bits[:, 0], 1 - bits[:, 0])
    flips = rng.random((n, 2)) < 0.1
    bits[:, 2:4] = labels[:, None] ^ flips
    return bits


def test_a_planted_composition_is_the_edge_with_the_most_synergy(coded):
    codes = coded(composition(), 100, [0, 1, 0, 2, 1])
    edges = score_edges(codes).to_dataframe()
    best, second = edges.iloc[0], edges.iloc[1]
    assert (best["source"], best["target"]) == ("L0H0", "L1H1")
    assert best["score"] == pytest.approx(math.log(2), abs=0.03)
    assert second["score"] < 0.05
    alone = identify(codes, permutations=0)
    assert alone.scores[:2].abs().max() < 0.05  # no score of single heads finds the two
    information = score_edges(codes, "mi").to_dataframe().iloc[:2]
    assert "L2H3" in set(information["target"])  # without the difference, single heads win too


def test_edges_point_to_later_layers_alone(coded):
    codes = coded(composition(), 100, [2, 1, 0, 2, 1])  # the same codes, their layers the other way
    edges = score_edges(codes)
    best = edges.to_dataframe().iloc[0]
    assert (best["source"], best["target"]) == ("L1H1", "L2H0")
    layers = [c.layer for c in codes.components]
    for source, target in edges.exists.nonzero().tolist():
        assert layers[source] < layers[target]
    with pytest.raises(ValueError, match="one layer"):
        score_edges(coded(composition(), 100))


def test_shuffled_labels_name_nothing_and_planted_heads_are_named(coded):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 8, (60, 144))
    values[:30, 17] = rng.integers(0, 4, 30)
    values[30:, 17] = rng.integers(4, 8, 30)
    codes = coded(values, 30)
    found = identify(codes)
    assert [str(c) for c in found.named] == ["L0H17"]
    assert found.p_values[17] == pytest.approx(1 / (found.permutations + 1))
    shuffled = identify(codes, torch.from_numpy(rng.permutation(60) < 30))
    assert shuffled.named == []


def test_p_values_are_the_share_of_shuffles_that_score_as_high(coded):
    values = [[0, 1], [0, 1], [0, 0], [1, 0], [1, 1], [1, 0]]
    found = identify(coded(values, 3), permutations=4000)
    # 20 labellings; of these 2 tell the first column apart wholly, and all give the second at
    # least the one third of a bit or less that it has
    assert found.p_values[0] == pytest.approx(2 / 20, rel=0.35)
    assert found.p_values[1] == 1.0
    again = identify(coded(values, 3), permutations=4000)
    assert torch.equal(again.p_values, found.p_values)


def test_p_values_are_uniform_where_there_is_nothing(coded):
    values = torch.randint(0, 4, (40, 300), generator=torch.Generator().manual_seed(5))
    p_values = identify(coded(values, 20), permutations=400).p_values.numpy()
    shares = [float((p_values <= level).mean()) for level in (0.05, 0.25, 0.5)]
    assert shares == pytest.approx([0.05, 0.25, 0.5], abs=0.06)
    assert all(a <= b for a, b in pairwise(shares))


def test_bad_questions_are_refused(coded):
    codes = coded(CODES, 4)
    for wrong, message in (
        ({"score": "best"}, "score='best': choose from unique"),
        ({"fdr": 0.0}, "fdr=0.0"),
        ({"permutations": -1}, "permutations=-1"),
        ({"permutations": 5, "score": "edge_votes"}, "has no null"),
        ({"labels": [True] * 8}, "the same label"),
        ({"labels": [True] * 3}, "for 3 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            identify(codes, **wrong)
    with pytest.raises(ValueError, match="codes from 0 to 60: there are 0 to 50"):
        coded([[0], [60]], 1)
    with pytest.raises(ValueError, match="without a code on any prompt"):
        coded([[0, -1], [0, -1]], 1)
    with pytest.raises(ValueError, match="score='jsd': choose from synergy"):
        score_edges(coded(CODES, 4, [0, 1, 2]), "jsd")


def test_the_planted_composition_alone_is_named(coded):
    codes = coded(composition(), 100, [0, 1, 0, 2, 1])
    edges = score_edges(codes, permutations=60)
    assert [str(edge) for edge in edges.named] == ["L0H0→L1H1"]
    assert edges.p_values[0, 1] == pytest.approx(1 / 61)
    frame = edges.to_dataframe()
    assert frame["named"].tolist() == [True] + [False] * (len(frame) - 1)
    assert len(edges.to_plotly().layout.shapes) == 1
    rng = np.random.default_rng(1)
    shuffled = replace(codes, positive=torch.from_numpy(rng.permutation(200) < 100))
    assert score_edges(shuffled, permutations=60).named == []
    assert "no null" in repr(score_edges(codes))
    assert score_edges(codes).named == []


def test_z_scores_and_p_values_of_edges_by_a_plain_loop(coded):
    values = torch.randint(0, 3, (24, 4))
    codes = coded(values, 12, [0, 0, 1, 1])
    found = score_edges(codes, "mi", permutations=19, seed=5)
    labels = codes.positive.numpy()
    shuffles = np.random.default_rng(5).permuted(np.broadcast_to(labels, (19, 24)), axis=1)
    scores = np.stack(
        [
            score_edges(replace(codes, positive=torch.from_numpy(row)), "mi").scores.numpy()[:2, 2:]
            for row in (labels, *shuffles)
        ]
    )
    z = (scores - scores.mean(0)) / scores.std(0)
    np.testing.assert_allclose(found.z_scores.numpy()[:2, 2:], z[0], rtol=1e-6)
    highest = [row.max() for row in z]
    for a, b in np.ndindex(2, 2):
        share = sum(x >= z[0, a, b] - 1e-6 for x in highest) / 20
        assert found.p_values[a, b + 2] == pytest.approx(share)
    assert bool(found.p_values.isnan()[2:].all())


@pytest.mark.parametrize("score", ["synergy", "mi"])
def test_chance_names_an_edge_as_seldom_as_asked(coded, score):
    """Of 40 data sets in which labels mean nothing, about 8 at alpha = 0.2."""
    rng, named = np.random.default_rng(0), 0
    for seed in range(40):
        codes = coded(rng.integers(0, 4, (30, 5)), 15, [0, 0, 1, 1, 2])
        named += bool(score_edges(codes, score, permutations=19, alpha=0.2, seed=seed).named)
    assert 2 <= named <= 15


def test_edges_are_judged_by_those_that_are_known(coded):
    edges = score_edges(coded(composition(), 100, [0, 1, 0, 2, 1]), permutations=60)
    judged = edges.agreement([((0, 0), "L1H1")])
    assert judged.auc == judged.average_precision == judged.f1 == 1.0
    assert "1 true of 8 edges" in repr(judged)
    assert judged.to_dataframe()["component"][0] == "L0H0→L1H1"
    with pytest.raises(ValueError, match="L1H1→L0H0: edges lead to a later layer"):
        edges.agreement([("L1H1", "L0H0")])
    with pytest.raises(ValueError, match="not among the 5 components"):
        edges.agreement([("L1H7", "L2H3")])
    with pytest.raises(ValueError, match="is no edge"):
        edges.agreement(["L0H0→L1H1"])


def test_codes_of_many_bits_are_told_apart(coded):
    """Pairs of them, on many prompts, would not fit 64 bits as one number."""
    values = composition()
    large = torch.as_tensor(values) * (2**30 - 1)
    few, many = (
        score_edges(coded(x, 100, [0, 1, 0, 2, 1], n_codes=n), "mi").scores
        for x, n in ((values, 2), (large, 2**30))
    )
    torch.testing.assert_close(many, few, equal_nan=True)


def test_sets_of_codes_that_never_meet_have_no_score(coded):
    sets = torch.full((6, 2, 2), -1)
    sets[:3, 0], sets[3:, 1] = torch.tensor([1, 2]), torch.tensor([3, 4])
    edges = score_edges(coded(sets, 2, [0, 1]), "mi", permutations=19)
    assert float(edges.scores[0, 1]) == 0
    assert edges.named == []


def test_shuffles_that_cannot_name_an_edge_are_refused(coded):
    codes = coded(composition(), 100, [0, 1, 0, 2, 1])
    with pytest.raises(ValueError, match=r"at least 19 are needed for alpha=0\.05"):
        score_edges(codes, permutations=18)
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        score_edges(codes, alpha=1.5)
    with pytest.raises(ValueError, match="positive and negative prompts"):
        score_edges(replace(codes, positive=codes.positive | True))
