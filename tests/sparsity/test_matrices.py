import pytest
import torch
from torch import nn

from tl_sparse.sparsity.matrices import weight_matrices


def names(model, **options):
    return [matrix.name for matrix in weight_matrices(model, **options)]


def test_six_matrices_a_layer_then_the_embeddings(small_model):
    per_layer = ["attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out"]
    blocks = [f"blocks.{layer}.{name}" for layer in range(2) for name in per_layer]
    assert names(small_model()) == [*blocks, "embed.W_E", "unembed.W_U"]
    assert names(small_model("tied"))[12:] == ["embed.W_E"]
    assert names(small_model("standard"))[12:] == ["embed.W_E", "unembed.W_U", "pos_embed.W_pos"]
    assert names(small_model("bigram_learned")) == [*blocks, "embed.W_E", "unembed.W_U"]


def test_every_parameter_is_a_matrix_a_bias_or_dense_by_the_paper(small_model, option):
    model = small_model(option)
    matrices = weight_matrices(model, biases=True)
    covered = {id(owner) for matrix in matrices for owner in matrix.owners}
    rest = {name for name, p in model.named_parameters() if id(p) not in covered}
    dense = ("ln1", "ln2", "ln_final", "ln1_pos", "ln2_pos", "sinks", "bigram")
    concat = model.config.positional_embedding_type == "concat"
    assert {n for n in rest if not any(d in n.split(".") for d in dense)} == (
        {"pos_embed.W_pos"} if concat else set()
    )
    owners = [id(owner) for matrix in matrices for owner in matrix.owners]
    assert len(owners) == len(set(owners))


def test_views_are_live_and_counts_are_exact(small_model, option):
    model = small_model(option)
    for matrix in weight_matrices(model, biases=True):
        assert matrix.numel == sum(owner.numel() for owner in matrix.owners)
        assert all(not part.requires_grad for part in matrix.parts)
        for part in matrix.parts:
            part.zero_()
        assert all((owner == 0).all() for owner in matrix.owners), matrix.name


def test_positions_join_the_matrix_that_reads_the_stream(small_model):
    found = {matrix.name: matrix for matrix in weight_matrices(small_model("concat"))}
    query, inner, out = (found[f"blocks.0.{n}"] for n in ("attn.W_Q", "mlp.W_in", "mlp.W_out"))
    assert [p.shape for p in query.parts] == [(4, 16, 4), (4, 4, 4)]
    assert [p.shape for p in inner.parts] == [(16, 24), (4, 24)]
    assert len(out.parts) == 1


def test_a_fan_is_one_neuron_channel_or_token(small_model):
    """n_fans per matrix, and the fan dimension runs over what that unit reads or writes."""
    model = small_model("wide_heads")
    found = {matrix.name: matrix for matrix in weight_matrices(model)}
    expected = {
        "blocks.0.attn.W_Q": (24, 16), "blocks.0.attn.W_O": (24, 16), "blocks.0.mlp.W_in": (24, 16),
        "blocks.0.mlp.W_out": (24, 16), "embed.W_E": (30, 16), "unembed.W_U": (30, 16),
    }  # fmt: skip
    for name, (fans, fan_width) in expected.items():
        matrix = found[name]
        assert matrix.n_fans == fans
        assert matrix.parts[0].shape[matrix.fan_dim] == fan_width


def test_biases_only_when_asked_and_only_if_trained(small_model):
    assert not any(".b_" in name for name in names(small_model()))
    assert sum(".b_" in name for name in names(small_model(), biases=True)) == 12
    assert not any(".b_" in name for name in names(small_model("no_bias"), biases=True))


def test_an_attention_only_model_has_four_matrices_a_layer(small_model):
    per_layer = ["attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O"]
    blocks = [f"blocks.{layer}.{name}" for layer in range(2) for name in per_layer]
    assert names(small_model("attn_only")) == [*blocks, "embed.W_E", "unembed.W_U"]
    biases = [name for name in names(small_model("attn_only"), biases=True) if ".b_" in name]
    assert len(biases) == 8


def test_computed_weights_are_refused_by_name(small_model):
    model = small_model()
    original = model.blocks[1].attn
    del original._parameters["W_K"]
    original.W_K = torch.zeros(4, 16, 4)  # as a model with grouped keys computes it
    with pytest.raises(ValueError, match=r"blocks.1.attn.W_K .* computed, not stored"):
        weight_matrices(model)


def test_a_parameter_that_is_a_view_is_traced_to_its_owner(small_model):
    model = small_model()
    owner = nn.Parameter(torch.randn(16, 16))
    attn = model.blocks[0].attn
    attn.register_parameter("joint", owner)
    del attn._parameters["W_Q"]
    attn.W_Q = owner.view(4, 4, 16).transpose(1, 2)
    matrix = weight_matrices(model)[0]
    assert matrix.owners == (owner,)
    matrix.parts[0].zero_()
    assert (owner == 0).all()
