"""Recipes and the learning-rate schedule, against the paper's figures and the released script."""

from dataclasses import asdict, fields, replace
from itertools import pairwise

import pytest

from tl_sparse import SparsityConfig, TrainingConfig
from tl_sparse.training.config import RECIPES

STEPS = 10_000


def figure_11(**changes):
    """The run of the paper's Fig. 11: 4x expansion, 1/64 of the block weights, 1 % warm-up."""
    sparsity = SparsityConfig(density=1 / 64, embedding_density=1 / 16, lr_factor="normalised")
    return replace(TrainingConfig(steps=STEPS, lr=1.0, warmup=0.01, sparsity=sparsity), **changes)


def test_learning_rate_has_the_shape_of_figure_11():
    config = figure_11()
    rates = [config.lr_at(step) for step in range(STEPS)]
    # plateau after the warm-up: sqrt(1/64); the figure reads 0.126
    assert rates[100] == pytest.approx(0.126, rel=0.01)
    assert rates[0] == pytest.approx(0.125 / 100)
    assert all(a < b for a, b in pairwise(rates[:100]))
    # the peak stands at the end of the anneal; the figure reads 0.505 at 50 %
    peak = max(range(STEPS), key=rates.__getitem__)
    assert peak == STEPS // 2
    assert rates[peak] == pytest.approx(0.505, abs=0.001)
    # then a straight line to 0 at the end
    assert config.lr_at(STEPS) == 0.0
    assert rates[3 * STEPS // 4] == pytest.approx(rates[peak] / 2)


def test_unnormalised_factor_has_the_same_shape_with_a_peak_eight_times_as_high():
    plain = figure_11(sparsity=replace(figure_11().sparsity, lr_factor="unnormalised"))
    for step in (0, 50, 2000, 5000, 9000):
        assert plain.lr_at(step) == pytest.approx(8 * figure_11().lr_at(step))


def test_a_dense_run_warms_up_and_decays_linearly():
    config = figure_11(sparsity=None, lr=0.02)
    assert config.lr_at(99) == pytest.approx(0.02)
    assert config.lr_at(0) == pytest.approx(0.0002)
    middle = 100 + 9900 // 2
    assert config.lr_at(middle) == pytest.approx(0.01)
    assert all(config.lr_at(s) == config.base_lr_at(s) for s in range(0, STEPS, 500))


def test_no_warmup_starts_at_the_full_rate():
    config = figure_11(sparsity=None, warmup=0.0)
    assert config.lr_at(0) == 1.0
    assert config.lr_at(STEPS // 2) == 0.5


def test_a_learning_rate_is_positive_at_every_step_of_a_short_run():
    config = TrainingConfig(steps=3)
    assert all(config.lr_at(step) > 0 for step in range(3))


def test_recipes_hold_the_published_values():
    paper, released = TrainingConfig.recipe("paper"), TrainingConfig.recipe("released")
    for config in (paper, released):
        assert (config.beta1, config.beta2) == (0.9, 0.95)
        assert config.weight_decay == 0.1
        assert config.eps == 0.1
        assert config.warmup == 0.01
        assert (config.context, config.batch_size) == (256, 512)
        assert (config.sparsity.anneal_start, config.sparsity.anneal_end) == (0.01, 0.5)
        assert config.sparsity.floor == 4
        assert config.sparsity.embedding_floor == 0
        assert config.sparsity.lr_factor == "normalised"
        # 32e9 tokens
        assert config.steps * config.batch_size * config.context == pytest.approx(32e9, rel=1e-5)
    # where text and script differ
    assert (paper.gradient, released.gradient) == ("clip", "normalise")
    assert (paper.sparsity.sparse_biases, released.sparsity.sparse_biases) == (True, False)
    assert (paper.decay_after_projection, released.decay_after_projection) == (False, True)
    assert paper.sparsity.embedding_schedule == "window"
    assert released.sparsity.embedding_schedule == "linear"
    assert released.lr == 0.0128
    assert released.sparsity.density == 1 / 64
    assert released.sparsity.embedding_density == 1 / 16


def test_recipe_takes_changes_and_leaves_the_recipe_alone():
    before = asdict(RECIPES["cpu"])
    config = TrainingConfig.recipe("cpu", steps=7, sparsity=None)
    assert (config.steps, config.sparsity) == (7, None)
    assert asdict(RECIPES["cpu"]) == before
    assert TrainingConfig.recipe("cpu") == TrainingConfig()


def test_unknown_recipe_names_the_choices():
    with pytest.raises(ValueError, match="'papper'; choose from paper, released, cpu"):
        TrainingConfig.recipe("papper")


def test_unknown_field_names_the_choices():
    with pytest.raises(ValueError, match=r"unknown field.* learning_rate; choose from steps") as e:
        TrainingConfig.recipe("cpu", learning_rate=0.1)
    assert "\n" not in str(e.value)
    assert all(f.name in str(e.value) for f in fields(TrainingConfig))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"lr": float("nan")}, "lr=nan must be positive"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"warmup": 1.0}, "0 <= warmup < 1"),
        ({"beta2": 1.0}, r"beta2=1.0 must lie in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"context": 1}, "context=1 must be at least 2"),
        ({"bigram_smoothing": 0.0}, "bigram_smoothing=0.0"),
    ],
)
def test_bad_settings_are_one_line_errors(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        TrainingConfig(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gradient", "choose from normalise, clip, none"),
        ("precision", "choose from auto, fp32, bf16"),
    ],
)
def test_unknown_choices_name_the_known_ones(name, message):
    config = TrainingConfig()
    # set past the type checker that watches calls while the tests run: users have none
    object.__setattr__(config, name, "fp8")
    with pytest.raises(ValueError, match=f"{name}='fp8' is unknown; {message}"):
        config.__post_init__()
