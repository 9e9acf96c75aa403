from dataclasses import replace

import pytest

from tl_sparse.circuits import PruningConfig
from tl_sparse.config import ActivationDensity
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.sparsity.projection import final_budget
from tl_sparse.studies.grid import StudyConfig
from tl_sparse.studies.grid.config import Cell
from tl_sparse.training.config import TrainingConfig


def small(**changes):
    return StudyConfig(**({"out": "o", "widths": (32, 64), "l0": (4000.0, 8000.0)} | changes))


def test_the_grid_has_every_width_at_every_l0():
    assert [cell.name for cell in small().cells()] == [
        "d32-l4000", "d64-l4000", "d32-l8000", "d64-l8000",
    ]  # fmt: skip


def test_the_same_l0_is_the_same_number_of_weights_at_every_width():
    config = small()
    totals = {}
    for cell in config.cells():
        model = SparseTransformer(config.architecture(cell, 0, 100, dense=False))
        sparsity = config.sparsity(cell)
        budgets = {m.name: final_budget(m, sparsity) for m in weight_matrices(model)}
        blocks = [m.name for m in weight_matrices(model) if m.role == "block"]
        totals[cell.name] = sum(budgets[name] for name in blocks)
        # 8 of each of 100 tokens, whatever the width
        assert budgets["embed.W_E"] == budgets["unembed.W_U"] == 800
    # each matrix rounds down: at most one weight of twelve matrices
    assert all(4000 - 12 <= totals[f"d{w}-l4000"] <= 4000 for w in (32, 64))
    assert all(8000 - 12 <= totals[f"d{w}-l8000"] <= 8000 for w in (32, 64))


def test_l0_may_be_a_density():
    config = small(l0=(0.5, 0.125), l0_unit="density")
    assert config.sparsity(Cell(64, 0.125)).density == 0.125


def test_only_compared_settings_have_all_targets():
    config = small(compare=("d32-l8000",), targets=(0.5, 0.05), target_loss=0.15)
    assert config.compared() == (Cell(32, 8000.0),)
    assert config.targets_of(Cell(32, 8000.0)) == (0.5, 0.15, 0.05)
    assert config.targets_of(Cell(64, 8000.0)) == (0.15,)
    assert small(l0=(4000.0, 8000.0, 12000.0)).compared() == (Cell(64, 8000.0),)


def test_dense_partners_are_half_as_wide_unless_told():
    cell = Cell(64, 8000.0)
    dense = small().architecture(cell, 3, 100, dense=True)
    assert (dense.d_model, dense.seed, dense.d_vocab) == (32, 3, 100)
    assert dense.activation_density == ActivationDensity()
    assert small(dense_width=48).architecture(cell, 3, 100, dense=True).d_model == 48
    run = small().dense_run(3, goal=3.5)
    assert (run.stop_at_loss, run.seed, run.sparsity) == (3.5, 3, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": ()}, "widths"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"controls": 0}, "controls=0"),
        ({"l0": (1e7,)}, "must lie in"),
        ({"tasks": ("quotes",)}, "unknown task.*single_double_quote"),
        ({"compare": ("d8-l1",)}, "choose from d32-l4000, d64-l4000"),
        ({"training": TrainingConfig(sparsity=None)}, "needs a sparsity"),
        ({"dense_training": TrainingConfig(sparsity=None, stop_at_loss=3.0)}, "leave it unset"),
        ({"embedding_nonzeros": 33}, "embedding_nonzeros=33"),
        ({"target_loss": 0.9}, "target_loss=0.9"),
        ({"targets": (0.0,)}, "target_loss=0.0"),
    ],
)
def test_bad_settings_are_told_before_anything_runs(changes, words):
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_the_search_is_the_base_config_at_each_target():
    config = small(pruning=replace(PruningConfig(), steps=7, target_loss=0.3))
    assert config.pruning.steps == 7
