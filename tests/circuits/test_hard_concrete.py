from dataclasses import replace

import pytest

from tl_sparse.ablation import activation_means
from tl_sparse.circuits import PruningConfig
from tl_sparse.circuits.hard_concrete import hard_concrete

SEARCH = PruningConfig(
    headroom=0.0, steps=80, batch_pairs=16, selection_pairs=32, report_pairs=24, refine=False
)


def named(circuit):
    return set(circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None))


@pytest.fixture
def posed(planted, marks, random_tokens):
    """The planted model, its chain, the task and the means."""
    model, chain = planted()
    return model, chain, marks, activation_means(model, random_tokens)


def test_hard_concrete_finds_the_planted_chain(posed):
    model, chain, task, means = posed
    search = replace(SEARCH, steps=120, batch_pairs=8, adapt_rate=0.1)
    circuit = hard_concrete(model, task, search, means=means, progress=False)
    assert chain <= named(circuit)
    assert len(named(circuit) - chain) <= 4
    assert circuit.selection_loss <= search.target_loss
    assert circuit.tau.abs().max() <= 1
    assert (circuit.tau[circuit.kept] >= 0).all()


def test_hard_concrete_refuses_what_it_does_not_know(posed):
    model, _, task, means = posed
    for changes in ({"tie_qk": True}, {"ablation": "resample"}):
        with pytest.raises(ValueError, match="know neither tie_qk"):
            hard_concrete(model, task, replace(SEARCH, **changes), means=means)
    with pytest.raises(ValueError, match="lr=0"):
        hard_concrete(model, task, SEARCH, means=means, lr=0.0)
