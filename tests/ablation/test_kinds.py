import pickle
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch

from tl_sparse.ablation import KINDS, activation_means, positional_means, takes_sources
from tl_sparse.circuits import PruningConfig
from tl_sparse.circuits.pruning_run import set_up


def test_a_kind_is_an_entry_of_the_table():
    """A config's choices are the table's, and each kind says where values come from, one way."""
    assert "ablation" in {field.name for field in fields(PruningConfig)}
    assert get_args(get_type_hints(PruningConfig)["ablation"]) == tuple(KINDS)
    assert all((kind.means is None) != (kind.sources is None) for kind in KINDS.values())
    assert {name for name in KINDS if takes_sources(name)} == {"resample", "positional_mean"}
    assert not takes_sources(None)
    assert not takes_sources("of a later version")
    assert pickle.loads(pickle.dumps(KINDS)) == KINDS  # also for a process that is spawned


@pytest.mark.parametrize("name", list(KINDS))
def test_a_run_sets_removed_nodes_to_what_the_kind_says(planted, marks, random_tokens, name):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    config = PruningConfig(
        headroom=0.0, ablation=name, steps=4, batch_pairs=4, selection_pairs=4, report_pairs=4
    )
    make = KINDS[name].sources
    sources = None if make is None else make(model, random_tokens, index=means.index)
    run = set_up(model, marks, config, means=means, sources=sources)
    if sources is not None:
        hook = next(iter(means.index.slices))
        expected = sources.activations[hook]
        if name == "positional_mean":  # one sequence, the same for every prompt
            assert torch.equal(expected, positional_means(model, random_tokens).activations[hook])
            assert (run.values.activations[hook] == expected).all()
        assert all(any(torch.equal(x, y) for y in expected) for x in run.values.activations[hook])
    else:
        train = run.train
        by_hand = {
            "zero": torch.zeros_like(means.values),
            "mean": means.values,
            "task_mean": activation_means(model, train.tokens, last=train.last).values,
        }[name]
        assert torch.equal(run.values, by_hand)
