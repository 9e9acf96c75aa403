import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation import activation_means
from tl_sparse.circuits import (
    Circuit,
    PruningConfig,
    PruningFailed,
    circuit_of_heads,
    prune,
    prune_many,
)
from tl_sparse.circuits.components import components
from tl_sparse.faithfulness import EvaluationConfig, under_test
from tl_sparse.faithfulness.nulls import label_swap
from tl_sparse.faithfulness.searches import (
    n_components,
    row,
    search,
    search_config,
    search_target,
)

QUICK = {"search_steps": 30, "search_pairs": 8, "search_target": 0.3}


@pytest.fixture
def quick(chain, tested):
    return tested(*chain, **QUICK)


def test_a_search_is_prune_with_the_suites_budget(quick, marks):
    config = search_config(quick, 3)
    assert (config.steps, config.batch_pairs, config.seed) == (30, 8, 3)
    assert (config.target_loss, config.on_collapse, config.must_solve) == (0.3, "fail", False)
    (found,) = search(quick, [(marks, 3)])
    alone = prune(quick.model, marks, config, means=quick.circuit.means, progress=False)
    assert torch.equal(found.kept, alone.kept)
    assert n_components(quick, found) == found.n_nodes
    assert row(quick, found) == {
        "found": True, "n_nodes": found.n_nodes, "n_edges": found.n_edges, "loss": found.loss,
        "reached": found.selection_loss, "why_not": "",
    }  # fmt: skip


def test_what_a_circuit_is_stays_as_it_was_found(quick):
    settings = dict(quick.circuit.config) | {
        "ablation": "zero", "freeze_norm": True, "tie_qk": True, "steps": 7, "lr": 0.9,
    }  # fmt: skip
    config = search_config(replace(quick, circuit=replace(quick.circuit, config=settings)), 0)
    assert (config.ablation, config.freeze_norm, config.tie_qk) == ("zero", True, True)
    assert (config.steps, config.lr) == (30, search_config(quick, 0).lr)


def test_the_target_is_the_configs_or_the_circuits(quick):
    own = replace(quick, config=replace(quick.config, search_target=None))
    assert search_target(quick) == 0.3
    assert search_target(own) == quick.circuit.target_loss == 0.6


def test_excluded_nodes_are_never_found(quick, marks):
    (found,) = search(quick, [(marks, 0)])
    first = torch.nonzero(found.kept).flatten()[0]
    exclude = torch.arange(quick.index.n_nodes) == first
    (again,) = search(quick, [(marks, 0)], exclude=exclude)
    assert isinstance(again, PruningFailed) or not bool(again.kept[first])


def test_a_task_that_the_model_does_not_do_is_searched_for_all_the_same(quick, marks):
    swapped = label_swap(marks)
    (found,) = search(quick, [(swapped, 0)])
    assert isinstance(found, PruningFailed)
    assert math.isinf(n_components(quick, found))
    assert not row(quick, found)["found"]
    assert math.isnan(row(quick, found)["n_nodes"])
    assert row(quick, found)["reached"] == found.loss > 0.3
    with pytest.raises(ValueError, match="does not solve the task"):
        prune(
            quick.model, swapped, replace(search_config(quick, 0), must_solve=True),
            means=quick.circuit.means, progress=False,
        )  # fmt: skip


def test_circuits_that_resample_are_searched_with_sources_from_the_text(quick, marks):
    settings = dict(quick.circuit.config) | {"ablation": "resample"}
    resampled = replace(
        quick, circuit=replace(quick.circuit, config=settings),
        config=replace(quick.config, search_target=0.5),
    )  # fmt: skip
    (found,) = search(resampled, [(marks, 0)])
    assert isinstance(found, Circuit)
    assert found.config["ablation"] == "resample"
    with pytest.raises(ValueError, match="give tokens="):
        search(replace(resampled, tokens=None), [(marks, 0)])


# --------------------------------------------------------------------------------------------------
# heads: components of several nodes


@pytest.fixture
def heads(planted, marks, random_tokens):
    model, _ = planted()
    circuit = circuit_of_heads(model, "marked", [(0, 0)], random_tokens)
    return under_test(model, circuit, marks, EvaluationConfig(pairs=8, **QUICK), random_tokens)


def test_heads_are_found_whole(heads, marks):
    (found,) = search(heads, [(marks, 0)])
    kept = found.kept.view(2, 2, 4)
    assert torch.equal(kept.any(2), kept.all(2))
    # the planted head, and no other
    assert torch.nonzero(found.kept).flatten().tolist() == [0, 1, 2, 3]
    assert n_components(heads, found) == 1
    assert row(heads, found)["n_nodes"] == 1


def test_a_circuit_without_a_target_has_its_loss_on_discovery_prompts(heads):
    own = replace(heads, config=replace(heads.config, search_target=None))
    batch = own.train_batch.pairs(0, 64)
    logit_diffs = replace(own, batch=batch).circuit_logit_diffs
    assert search_target(own) == pytest.approx(float(F.softplus(-logit_diffs).mean()), abs=1e-5)
    nothing = replace(own, circuit=replace(own.circuit, kept=torch.zeros_like(own.kept)))
    with pytest.raises(ValueError, match="chance or above: give search_target="):
        search_target(nothing)


def test_groups_are_pruned_as_tied_channels_are(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    config = PruningConfig(
        headroom=0.0,
        steps=24,
        batch_pairs=8,
        lr=0.06,
        selection_pairs=16,
        report_pairs=8,
        target_loss=0.3,
    )
    groups = components(means.index, tie_qk=True)
    (grouped,) = prune_many(model, [(marks, config)], means=means, groups=groups, progress=False)
    tied = prune(model, marks, replace(config, tie_qk=True), means=means, progress=False)
    assert torch.equal(grouped.kept, tied.kept)
    for wrong in ({"groups": groups[1:]}, {"groups": groups, "tie": True}):
        broken = replace(config, tie_qk=bool(wrong.pop("tie", False)))
        with pytest.raises(ValueError, match="groups must be one entry for each of"):
            prune_many(model, [(marks, broken)], means=means, progress=False, **wrong)
