"""What a circuit's files may say: numbers that a search gives, and that fit each other."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.circuits.test_circuit import change_record, change_tensors, hand_made
from tl_sparse.circuits import (
    Calibration,
    Circuit,
    EdgePruningConfig,
    PruningConfig,
    circuit_edges,
)

CONFIG = asdict(PruningConfig(seed=3, report_pairs=3))
EDGES = {**asdict(EdgePruningConfig(seed=4, report_pairs=3)), "minimal": True, "loss_before": 0.1}


@pytest.fixture
def model(small_model):
    return small_model("together", zeros=0.5)


@pytest.fixture
def circuit(model, random_tokens):
    """As a search leaves it: six held-out results, which its config explains."""
    made = hand_made(model, random_tokens)
    return replace(made, config=CONFIG, correct=made.losses < math.log(2))


@pytest.fixture
def stored(circuit, model, tmp_path):
    """(folder, function that loads it)."""
    circuit.save(tmp_path / "c")
    return tmp_path / "c", lambda: Circuit.load(tmp_path / "c", model)


def test_what_a_search_leaves_is_loaded(stored, circuit):
    loaded = stored[1]()
    assert loaded.config == circuit.config
    record = json.loads((stored[0] / "circuit.json").read_text())
    assert (record["n_nodes"], record["n_edges"]) == (circuit.n_nodes, circuit.n_edges)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("selection_pairs", 10**9), ("report_pairs", 10**9), ("batch_pairs", 10**9),
        ("steps", 10**12), ("steps", 0), ("selection_pairs", -1), ("selection_pairs", 1.5),
        ("selection_pairs", "many"), ("selection_pairs", None), ("selection_pairs", True),
        ("target_loss", "inf"), ("target_loss", -0.1), ("target_loss", 0.3), ("lr", "nan"),
        ("lr", 0), ("seed", 2), ("seed", 10**30), ("seed", -1), ("ablation", "noise"),
        ("ablation", ["mean"]), ("freeze_norm", "yes"), ("penalty", "none"), ("report_pairs", 4),
        ("method", 3), ("surprise", 1), ("edge_pruning", 1), ("edge_pruning", {}),
        ("edge_pruning", EDGES | {"steps": 10**12}), ("edge_pruning", EDGES | {"patience": 0}),
        ("edge_pruning", EDGES | {"seed": None}), ("edge_pruning", EDGES | {"surprise": 1}),
        ("edge_pruning", EDGES | {"selection_pairs": 10**9}),
        ("edge_pruning", EDGES | {"minimal": "yes"}), ("edge_pruning", EDGES | {"minimal": None}),
        ("edge_pruning", EDGES | {"loss_before": -1.0}),
        ("edge_pruning", EDGES | {"target_loss": 0.2}),
        ("edge_pruning", EDGES | {"report_pairs": 4}), ("faithful", [1]),
    ],
)  # fmt: skip
def test_a_config_that_no_search_can_have_is_refused(stored, name, value):
    folder, load = stored
    change_record(folder, config=CONFIG | {name: value})
    with pytest.raises(ValueError, match=r"config|results") as caught:
        load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("more", [{}, {"method": "random"}, {"edge_pruning": EDGES},
                                  {"faithful": {"rounds": 3}}])  # fmt: skip
def test_configs_of_every_search_are_loaded(circuit, model, tmp_path, more):
    replace(circuit, config=CONFIG | more).save(tmp_path / "c")
    assert Circuit.load(tmp_path / "c", model).config == CONFIG | more


@pytest.mark.parametrize("name", ["selection_pairs", "steps"])
def test_another_programs_settings_say_nothing_here(circuit, model, tmp_path, name):
    """A released circuit has no seed, and settings whose names may be ours by chance."""
    foreign = {name: 10**9, "lr": "cosine"}
    replace(circuit, config=foreign, seed=-1).save(tmp_path / "c")
    assert Circuit.load(tmp_path / "c", model).config == foreign


@pytest.mark.parametrize(
    "changes",
    [
        {"target_loss": "inf"}, {"target_loss": -0.15}, {"target_loss": 0}, {"target_loss": 0.2},
        {"target_loss": "nan"}, {"selection_loss": "inf"}, {"selection_loss": -1.0},
        {"model_loss": "-inf"}, {"model_loss": -0.1}, {"seconds": -1}, {"seconds": "inf"},
        {"n_active": 10**6}, {"n_active": -2}, {"seed": -2}, {"seed": 10**30}, {"seed": 4},
        {"n_nodes": 1}, {"n_edges": 1}, {"n_edges": -1}, {"n_nodes": "many"}, {"n_edges": 1.5},
        {"size_curve": [[10**6, 0.1]]}, {"calibration": {"scale": "inf", "shift": 0.0}},
    ],
)  # fmt: skip
def test_a_number_that_cannot_be_is_refused(stored, changes):
    folder, load = stored
    change_record(folder, **changes)
    with pytest.raises(ValueError, match="broken"):
        load()


@pytest.mark.parametrize("name", ["losses", "losses_calibrated", "means", "tau"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_results_and_means_that_are_no_numbers_are_refused(stored, name, value):
    folder, load = stored
    tensor = load_file(folder / "circuit.safetensors")[name]
    tensor[1] = value
    change_tensors(folder, **{name: tensor})
    if name == "tau" and not math.isnan(value):
        assert load().tau[1] == value  # a score may be
        return
    with pytest.raises(ValueError, match=name):
        load()


def test_nodes_that_are_other_than_counted_are_refused(stored, circuit, model):
    folder, load = stored
    for other in (~circuit.kept, torch.zeros_like(circuit.kept), torch.ones_like(circuit.kept)):
        change_tensors(folder, kept=other)
        with pytest.raises(ValueError, match="n_nodes is"):
            load()
    outside = torch.nonzero(~circuit.kept)[0]
    for node in torch.nonzero(circuit.kept):  # as many nodes, with other edges between them
        swapped = circuit.kept.clone()
        swapped[node], swapped[outside] = False, True
        if len(circuit_edges(model, circuit.index, swapped)) != circuit.n_edges:
            break
    change_tensors(folder, kept=swapped)
    with pytest.raises(ValueError, match="n_edges is"):
        load()


def test_answers_that_contradict_their_losses_are_refused(stored, circuit):
    folder, load = stored
    change_tensors(folder, correct=~circuit.correct)
    with pytest.raises(ValueError, match="correct contradicts the losses"):
        load()


def test_files_from_before_the_counts_are_loaded(stored):
    folder, load = stored
    record = json.loads((folder / "circuit.json").read_text())
    for name in ("n_nodes", "n_edges"):
        record.pop(name)
    (folder / "circuit.json").write_text(json.dumps(record))
    assert load().n_nodes > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {"edges": pd.concat([c.edges] * 3, ignore_index=True)},
        lambda c: {"edges": c.edges.assign(weight=np.float32("nan"))},
        lambda c: {"target_loss": math.inf},
        lambda c: {"losses": c.losses * math.nan},
        lambda c: {"config": CONFIG | {"selection_pairs": 10**9}},
        lambda c: {"calibration": Calibration(math.nan, 0.0)},
    ],
)
def test_what_could_not_be_loaded_is_not_saved(circuit, tmp_path, change):
    with pytest.raises(ValueError, match=r"edge|target|losses|selection_pairs|Calibration"):
        replace(circuit, **change(circuit)).save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_removed_edges_and_scores_that_are_no_numbers_are_refused(circuit, model, tmp_path):
    edges = circuit.edges.assign(score=np.float32(0.5))
    made = replace(
        circuit, edges=edges[3:].reset_index(drop=True),
        removed_edges=edges[:3].assign(constant=0.25),
    )  # fmt: skip
    for name, kind in (("removed_constants", torch.float64), ("edge_scores", torch.float32)):
        made.save(tmp_path / "c")
        Circuit.load(tmp_path / "c", model)
        tensors = load_file(tmp_path / "c" / "circuit.safetensors")
        tensors[name] = torch.full(tensors[name].shape, math.nan, dtype=kind)
        save_file(tensors, tmp_path / "c" / "circuit.safetensors")
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            Circuit.load(tmp_path / "c", model)
