"""The top-k projection against torch.topk and by hand; schedules against published values."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from tl_sparse import SparseTransformer, SparseTransformerConfig, SparsityConfig, TrainingConfig
from tl_sparse.sparsity.matrices import WeightMatrix, weight_matrices
from tl_sparse.sparsity.projection import (
    check_l0,
    final_budget,
    l0,
    n_kept,
    project,
    project_all,
    top_k_weights,
)


def matrix_of(*parts, fan_dim=0, role="block", name="blocks.0.mlp.W_in"):
    return WeightMatrix(name, role, parts, tuple(nn.Parameter(p) for p in parts), fan_dim)


def tiny_model(**changes):
    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 12, "d_vocab": 30, "d_head": 4, "d_mlp": 24}
    return SparseTransformer(SparseTransformerConfig(**(sizes | changes)))


# ------------------------------------------------------------------------------------------------
# the projection


@pytest.mark.parametrize("density", [0.01, 1 / 16, 0.3, 0.999])
@pytest.mark.parametrize("shape", [(40, 50), (4, 20, 5)])
def test_keeps_what_torch_topk_keeps(density, shape):
    weight = torch.randn(shape)
    (mask,) = top_k_weights(matrix_of(weight), density)
    best = weight.abs().flatten().topk(int(density * weight.numel())).indices
    assert set(mask.flatten().nonzero().squeeze(-1).tolist()) == set(best.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_exactly_k_are_kept_in_every_dtype(dtype):
    weight = torch.randn(64, 96).to(dtype)  # 16-bit values collide: there are many ties
    (mask,) = top_k_weights(matrix_of(weight), 0.1)
    assert int(mask.sum()) == int(0.1 * weight.numel())
    assert weight.abs()[mask].min() >= weight.abs()[~mask].max()


@pytest.mark.parametrize("floor", [0, 2])
def test_exactly_k_are_kept_of_equal_magnitudes(floor):
    constant = torch.full((16, 10), -0.5)
    (mask,) = top_k_weights(matrix_of(constant), 0.3, floor)
    assert int(mask.sum()) == 48
    mostly_zero = torch.zeros(16, 10)
    mostly_zero[3, :5] = 1.0
    (mask,) = top_k_weights(matrix_of(mostly_zero), 0.3, floor)
    assert int(mask.sum()) == 48
    assert mask[3, :5].all()


def test_hand_computed_floor():
    # Columns are neurons. Without a floor the four largest are all of neuron 0 and one of neuron 1;
    # with floor 1, neurons 2 and 3 keep their best (0.3 and 0.2) and two places are left for 9, 8.
    weight = torch.tensor([[9.0, 0.5, 0.1, 0.2], [-8.0, 6.0, -0.3, 0.0], [7.0, -0.4, 0.2, -0.1]])
    plain = torch.tensor([[9.0, 0, 0, 0], [-8.0, 6.0, 0, 0], [7.0, 0, 0, 0]])
    floored = torch.tensor([[9.0, 0, 0, 0.2], [0, 6.0, -0.3, 0], [0, 0, 0, 0]])
    for floor, expected in [(0, plain), (1, floored)]:
        matrix = matrix_of(weight.clone(), fan_dim=0)
        project(matrix, 4 / 12, floor)
        assert torch.equal(matrix.parts[0], expected)


def test_every_neuron_and_channel_of_a_model_keeps_its_floor_and_the_total_stays_exact():
    model = tiny_model()
    # one neuron's worth of huge weights would take the whole budget without a floor
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.W_in[:, 0] *= 1000
            block.mlp.W_out[0] *= 1000
            block.attn.W_Q[0] *= 1000
            block.attn.W_O[0] *= 1000
    config = SparsityConfig(density=0.3, floor=4, embedding_floor=2)
    matrices = weight_matrices(model)
    project_all(matrices, config, 10, 10)
    assert check_l0(matrices, config) == {m.name: int(0.3 * m.numel) for m in matrices}
    for block in model.blocks:
        incoming = [block.attn.W_Q, block.attn.W_K, block.attn.W_V]  # head, d_model, channel
        assert all((w != 0).sum(1).min() >= 4 for w in incoming)
        assert (block.attn.W_O != 0).sum(2).min() >= 4  # outgoing weights of each z channel
        assert (block.mlp.W_in != 0).sum(0).min() >= 4  # incoming weights of each neuron
        assert (block.mlp.W_out != 0).sum(1).min() >= 4  # outgoing weights of each neuron
    assert (model.W_E != 0).sum(1).min() >= 2
    assert (model.W_U != 0).sum(0).min() >= 2


@pytest.mark.parametrize("fan_dim", [0, 1, 2])
@pytest.mark.parametrize("floor", [1, 3])
def test_floors_rank_the_best_of_every_fan_above_all_others(fan_dim, floor):
    scale = torch.randn(8, 10, 12).exp() ** 2  # fans of very different sizes
    weight = torch.randn(8, 10, 12) * scale.mean(fan_dim, keepdim=True) ** 3
    best = weight.abs().topk(floor, dim=fan_dim).indices
    lifted = weight.abs().scatter(fan_dim, best, math.inf).flatten()
    expected = torch.zeros(960, dtype=torch.bool)
    expected[lifted.topk(480).indices] = True
    (mask,) = top_k_weights(matrix_of(weight, fan_dim=fan_dim), 0.5, floor)
    assert torch.equal(mask.flatten(), expected)
    assert not torch.equal(expected, top_k_weights(matrix_of(weight), 0.5)[0].flatten())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_projecting_a_diverged_matrix_comes_to_an_end(value):
    (mask,) = top_k_weights(matrix_of(torch.full((8, 10), value)), 0.5, 2)
    assert int(mask.sum()) >= 40


def test_without_a_floor_small_neurons_die():
    weight = torch.rand(16, 24) + 1.0
    weight[:, 7] = 0.01
    for floor, left in [(0, 0), (4, 4)]:
        matrix = matrix_of(weight.clone(), fan_dim=0)
        project(matrix, 0.5, floor)
        assert int(matrix.parts[0][:, 7].count_nonzero()) == left


def test_budget_below_the_floors_is_one_line_with_the_numbers():
    matrix = matrix_of(torch.randn(32, 100), fan_dim=0)
    with pytest.raises(ValueError, match="floor=4") as caught:
        top_k_weights(matrix, 0.1, 4)
    message = str(caught.value)
    assert "\n" not in message
    for number in ("320 of 3200", "400", "density >= 0.125", "floor <= 3", "blocks.0.mlp.W_in"):
        assert number in message
    assert n_kept(matrix, 0.125, 4) == 400  # what the message advises works
    assert n_kept(matrix, 0.1, 3) == 320


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
def test_density_outside_its_range_is_refused(density):
    matrix = matrix_of(torch.randn(8, 8))
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        project(matrix, density)
    with pytest.raises(ValueError, match=r"density=.* must lie in \(0, 1\]"):
        SparsityConfig(density=density)


def test_a_density_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="keeps 0 of 64"):
        n_kept(matrix_of(torch.randn(8, 8)), 0.01)


def test_density_one_leaves_the_matrix_alone():
    weight = torch.randn(8, 8)
    matrix = matrix_of(weight.clone())
    project(matrix, 1.0, floor=4)
    assert torch.equal(matrix.parts[0], weight)


def test_projection_is_idempotent_and_changes_no_kept_weight():
    weight = torch.randn(20, 30)
    matrix = matrix_of(weight.clone())
    project(matrix, 0.2, 2)
    once = matrix.parts[0].clone()
    kept = once != 0
    assert torch.equal(once[kept], weight[kept])
    project(matrix, 0.2, 2)
    assert torch.equal(matrix.parts[0], once)


def test_nan_weights_are_not_zeroed_into_a_healthy_looking_matrix():
    weight = torch.randn(10, 10)
    weight[2, 3] = math.nan
    matrix = matrix_of(weight)
    project(matrix, 0.1)
    assert matrix.parts[0].isnan().any()
    everywhere = matrix_of(torch.full((10, 10), math.nan))
    project(everywhere, 0.1)
    assert everywhere.parts[0].isnan().any()


def test_rows_that_read_concatenated_positions_compete_in_the_same_budget():
    model = tiny_model(positional_embedding_type="concat", d_pos=8)
    matrices = {m.name: m for m in weight_matrices(model)}
    matrix = matrices["blocks.0.mlp.W_in"]
    assert matrix.numel == (16 + 8) * 24
    assert matrix.n_fans == 24
    with torch.no_grad():
        model.blocks[0].mlp.W_in_pos *= 1000
    project(matrix, 0.25, floor=2)
    mlp = model.blocks[0].mlp
    # 144 places and 192 positional weights that are all larger: they take every one
    assert int(mlp.W_in.count_nonzero()) == 0
    assert int(mlp.W_in_pos.count_nonzero()) == 144
    assert (mlp.W_in_pos != 0).sum(0).min() >= 2
    joint = matrices["blocks.1.attn.W_Q"]
    best = torch.cat([p.abs().flatten() for p in joint.parts]).topk(int(0.25 * joint.numel))
    masks = top_k_weights(joint, 0.25)
    flat = torch.cat([mask.flatten() for mask in masks])
    assert set(flat.nonzero().squeeze(-1).tolist()) == set(best.indices.tolist())
    assert [mask.shape for mask in masks] == [part.shape for part in joint.parts]


def test_positions_themselves_are_sparse_only_where_they_are_added_to_the_stream():
    def names(positions, d_pos):
        model = tiny_model(positional_embedding_type=positions, d_pos=d_pos)
        return {m.name for m in weight_matrices(model)}

    assert "pos_embed.W_pos" in names("standard", 0)
    assert "pos_embed.W_pos" not in names("concat", 8)


def test_tied_embeddings_are_one_matrix_projected_once():
    model = tiny_model(tie_word_embeddings=True)
    matrices = weight_matrices(model)
    assert [m.name for m in matrices].count("embed.W_E") == 1
    assert "unembed.W_U" not in {m.name for m in matrices}
    config = SparsityConfig(density=0.5, embedding_density=0.1, floor=0)
    project_all(matrices, config, 1, 1)
    assert int(model.W_E.count_nonzero()) == int(0.1 * 30 * 16)
    assert torch.equal(model.W_U, model.W_E.T)


def test_which_tensors_are_sparse():
    model = tiny_model(bigram_table="learned", use_attention_sinks=True)
    block = {"attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out"}
    expected = {f"blocks.{i}.{name}" for i in range(2) for name in block}
    expected |= {"embed.W_E", "unembed.W_U"}
    assert {m.name for m in weight_matrices(model)} == expected
    biases = {"attn.b_Q", "attn.b_K", "attn.b_V", "attn.b_O", "mlp.b_in", "mlp.b_out"}
    expected |= {f"blocks.{i}.{name}" for i in range(2) for name in biases}
    assert {m.name for m in weight_matrices(model, biases=True)} == expected


def test_something_that_is_no_model_is_refused():
    with pytest.raises(ValueError, match="Linear is no TransformerLens model"):
        weight_matrices(nn.Linear(2, 2))


def test_a_matrix_with_another_l0_than_its_budget_is_named():
    model = tiny_model()
    config = SparsityConfig(density=0.5, floor=0)
    matrices = weight_matrices(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.W_Q has 256 .* budget is 128"):
        check_l0(matrices, config)
    project_all(matrices, config, 1, 1)
    assert check_l0(matrices, config) == l0(matrices)
    with torch.no_grad():
        model.blocks[1].mlp.W_out[model.blocks[1].mlp.W_out != 0] = 0.0
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.W_out has 0"):
        check_l0(matrices, config)


def test_biases_and_embeddings_have_their_own_budgets():
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    config = SparsityConfig(
        density=0.25, embedding_density=0.5, floor=2, embedding_floor=3, sparse_biases=True
    )
    matrices = weight_matrices(model, biases=True)
    project_all(matrices, config, 5, 5)
    counts = check_l0(matrices, config)
    assert counts["blocks.0.mlp.W_in"] == 96
    assert counts["embed.W_E"] == 240
    assert counts["blocks.0.mlp.b_in"] == 12
    assert counts["blocks.0.attn.b_Q"] == 8
    with torch.no_grad():
        model.blocks[0].mlp.b_in.zero_()  # a bias that never got a gradient is within its budget
        assert check_l0(matrices, config)["blocks.0.mlp.b_in"] == 0
        model.blocks[0].mlp.b_in.fill_(1.0)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.b_in has 24 .* budget is 12"):
        check_l0(matrices, config)
    embedding = next(m for m in matrices if m.name == "embed.W_E")
    with pytest.raises(ValueError, match=r"embed\.W_E.*floor=9"):
        final_budget(embedding, SparsityConfig(density=0.5, embedding_floor=9, floor=0))


# ------------------------------------------------------------------------------------------------
# schedules

STEPS = 10_000
PAPER = SparsityConfig(density=1 / 64, embedding_density=1 / 16)
SCHEDULES = [
    SparsityConfig(density=1 / 64, anneal="linear"),
    SparsityConfig(density=1 / 64, anneal="exponent", anneal_exponent=3.0),
    SparsityConfig(density=1 / 64, anneal="power_law"),
    SparsityConfig(density=1 / 64, embedding_density=1 / 16, embedding_schedule="window"),
    SparsityConfig(density=0.3, embedding_density=0.7, embedding_schedule="window"),
]


@pytest.mark.parametrize("config", SCHEDULES)
def test_density_goes_from_one_to_its_final_value_and_never_rises(config):
    for density_at, final in [
        (config.density_at, config.density),
        (config.embedding_density_at, config.final_embedding_density),
    ]:
        values = [density_at(step, STEPS) for step in range(0, STEPS + 1, 10)]
        assert all(value == 1.0 for value in values[:11])  # dense up to 1 % of training
        assert all(value == final for value in values[500:])  # to the bit from 50 % on
        assert values[499] > final
        assert all(a >= b for a, b in pairwise(values))
    assert config.density_at(110, STEPS) < 1.0
    assert config.density_at(4990, STEPS) == pytest.approx(config.density, rel=0.2)


def test_linear_anneal_is_a_straight_line():
    quarter = PAPER.density_at(100 + 4900 // 4, STEPS)
    assert quarter == pytest.approx(1 - (1 - 1 / 64) / 4)


def test_exponent_anneal_follows_its_power():
    config = SparsityConfig(density=1 / 64, anneal="exponent", anneal_exponent=3.0)
    assert config.density_at(100 + 2450, STEPS) == pytest.approx(1 / 64 + (63 / 64) / 8)


def test_power_law_anneal_is_straight_in_logs():
    config = SparsityConfig(density=1 / 64, anneal="power_law")
    geometric_middle = round(math.sqrt(100 * 5000))
    assert config.density_at(geometric_middle, STEPS) == pytest.approx(1 / 8, rel=1e-3)


def test_power_law_anneal_may_start_at_step_zero():
    config = SparsityConfig(density=0.1, anneal="power_law", anneal_start=0.0)
    values = [config.density_at(step, 100) for step in range(101)]
    assert values[0] == values[1] == 1.0
    assert all(a >= b for a, b in pairwise(values))
    assert values[50] == 0.1


def test_without_annealing_every_step_has_the_final_density():
    config = SparsityConfig(density=0.2, anneal_start=0.0, anneal_end=0.0)
    assert {config.density_at(step, 10) for step in range(11)} == {0.2}


def test_paper_embeddings_become_sparse_in_a_window_from_38_to_50_percent():
    # 4x expansion, pfrac 1/4: blocks 1/64, embeddings 1/16
    window = SparsityConfig(density=1 / 64, embedding_density=1 / 16, embedding_schedule="window")
    dense = [s for s in range(STEPS) if window.embedding_density_at(s, STEPS) == 1.0]
    assert dense == list(range(len(dense)))
    assert len(dense) / STEPS == pytest.approx(0.383, abs=0.001)
    done = [s for s in range(STEPS) if window.embedding_density_at(s, STEPS) == 1 / 16]
    assert done[0] / STEPS == pytest.approx(0.5, abs=1e-9)


def test_released_embeddings_fall_together_with_the_blocks():
    halfway = 100 + 2450
    assert PAPER.embedding_density_at(halfway, STEPS) == pytest.approx((1 + 1 / 16) / 2)


def test_sharkfin_factor_is_one_over_root_l0():
    normalised, plain = PAPER, SparsityConfig(density=1 / 64, lr_factor="unnormalised")
    assert normalised.lr_factor_at(0, STEPS) == pytest.approx(1 / 8)
    assert normalised.lr_factor_at(5000, STEPS) == pytest.approx(1.0)
    assert plain.lr_factor_at(0, STEPS) == pytest.approx(1.0)
    assert plain.lr_factor_at(5000, STEPS) == pytest.approx(8.0)
    without = SparsityConfig(density=1 / 64, lr_factor="none")
    assert {without.lr_factor_at(s, STEPS) for s in (0, 2500, 9999)} == {1.0}


@pytest.mark.parametrize(
    ("expansion", "pfrac"),
    [(4, 1 / 4), (1, 1 / 8), (2, 1 / 2), (8, 1), (16, 2), (16, 1 / 4)],
)
def test_published_labels_follow_from_densities(expansion, pfrac):
    """L0 labels are pfrac x 7.424M, parameter labels expansion² x 7.424M (base: width 256)."""
    width, layers, vocab, context = 256, 8, 2048, 256
    biases = layers * (4 * width + 4 * width + width)
    base = layers * 12 * width**2 + 2 * vocab * width + context * width + biases
    assert base / 1e6 == pytest.approx(7.424, abs=5e-4)
    wide = width * expansion
    blocks = layers * 12 * wide**2
    embeddings = (2 * vocab + context) * wide + biases * expansion
    kept = blocks * pfrac / expansion**2 + embeddings * pfrac / expansion
    assert kept == pytest.approx(pfrac * base)
    assert expansion**2 * base / 1e6 == pytest.approx(expansion**2 * 7.424, rel=1e-4)


def test_released_example_is_a_quarter_of_the_base_model_at_expansion_4():
    config = TrainingConfig.recipe("released").sparsity
    assert config.density == (1 / 4) / 4**2
    assert config.final_embedding_density == (1 / 4) / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anneal_start": 0.6}, "anneal_start <= anneal_end"),
        ({"anneal_end": 1.2}, "anneal_end <= 1"),
        ({"floor": -1}, "floor=-1"),
        ({"embedding_density": 0.0}, "embedding_density=0.0"),
        ({"anneal_exponent": 0.0}, "anneal_exponent=0.0 must be positive"),
        (
            {"density": 0.5, "embedding_density": 0.25, "embedding_schedule": "window"},
            "needs embedding_density >= density",
        ),
    ],
)
def test_bad_settings_are_one_line_errors(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        SparsityConfig(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("anneal", "choose from linear, exponent, power_law"),
        ("embedding_schedule", "choose from linear, window"),
        ("lr_factor", "choose from normalised, unnormalised, none"),
    ],
)
def test_unknown_choices_name_the_known_ones(name, message):
    config = SparsityConfig()
    # set past the type checker that watches calls while the tests run: users have none
    object.__setattr__(config, name, "cosine")
    with pytest.raises(ValueError, match=f"{name}='cosine' is unknown; {message}"):
        config.__post_init__()
