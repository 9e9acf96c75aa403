"""Weights under TransformerLens' names, circuits of weights, and SVDInterpreter."""

import pytest
import torch
from transformer_lens import SVDInterpreter

from tests.conformance.models import OPTIONS, build, every_option, expressible, reference
from tl_sparse import compat

STACKED = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_out", "b_in", "b_out")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@every_option
def test_weights_are_transformer_lens_weights(claim, option):
    claim("model.W_E, W_U, W_Q … b_out (stacked weights)", option, "unchanged")
    model = build(option)
    heads, d_head = model.cfg.n_heads, model.cfg.d_head
    shapes = {"W_O": (2, heads, d_head, 16), "W_in": (2, 16, 24), "W_out": (2, 24, 16),
              "b_O": (2, 16), "b_in": (2, 24), "b_out": (2, 16)}  # fmt: skip
    for name in STACKED:
        weight = getattr(model, name)
        default = (2, heads, 16, d_head) if name.startswith("W") else (2, heads, d_head)
        assert weight.shape == shapes.get(name, default), name
        for block, layer in zip(model.blocks, weight, strict=True):
            part = block.attn if name[-1] in "QKVO" else block.mlp
            assert torch.equal(getattr(part, name), layer), name
    if expressible(option):
        for name in (*STACKED, "W_E", "W_U", "b_U"):
            close(getattr(model, name), getattr(reference(option), name), 0)
        assert model.W_gate is None


@every_option
def test_positional_weights_exist_only_where_there_are_positions(claim, option):
    kind = OPTIONS[option].get("positional_embedding_type", "none")
    model = build(option)
    if kind == "standard":
        claim("model.W_pos, W_E_pos", option, "unchanged")
        close(model.W_pos, reference(option).W_pos, 0)
        close(model.W_E_pos, reference(option).W_E_pos, 0)
        return
    why = "W_E_pos needs positions that are added to the stream; W_pos, positions of any kind"
    claim("model.W_pos, W_E_pos", option, "refused", why)
    with pytest.raises(AttributeError, match=f"W_E_pos in a model with .*{kind}"):
        _ = model.W_E_pos
    if kind == "none":
        with pytest.raises(AttributeError, match=f"W_pos in a model with .*{kind}"):
            _ = model.W_pos
    else:
        assert model.W_pos.shape == (12, 4)


@every_option
def test_factored_circuits_are_the_products_of_their_weights(claim, option):
    claim("model.QK, model.OV, blocks[i].attn.QK, OV (FactoredMatrix)", option, "unchanged")
    model = build(option)
    products = {
        "QK": model.W_Q.double() @ model.W_K.double().transpose(-2, -1),
        "OV": model.W_V.double() @ model.W_O.double(),
    }
    for name, expected in products.items():
        circuit = getattr(model, name)
        assert isinstance(circuit, compat.FactoredMatrix)
        close(circuit.AB, expected.float())
        close(circuit.norm(), expected.norm(dim=(-2, -1)).float(), 1e-4)
        close(circuit.T.AB, expected.transpose(-2, -1).float())
        close(circuit[1, 2].AB, expected[1, 2].float())
        singular = torch.linalg.svdvals(expected)[..., : circuit.mdim].float()
        close(circuit.S, singular, 1e-4)
        left, values, right = circuit.svd()
        rebuilt = left @ values.diag_embed() @ right.transpose(-2, -1)
        close(rebuilt, expected.float(), 1e-4)
        for layer, block in enumerate(model.blocks):
            close(getattr(block.attn, name).AB, expected[layer].float())
        # the k-th power sum of the eigenvalues is the trace of the k-th power
        for power in (1, 2):
            traces = torch.linalg.matrix_power(expected, power).diagonal(dim1=-2, dim2=-1).sum(-1)
            sums = (circuit.eigenvalues**power).sum(-1)
            close(sums.real, traces.float(), 1e-3)
        if expressible(option):
            close(circuit.AB, getattr(reference(option), name).AB)


@every_option
@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_composition_scores_are_ratios_of_norms(claim, option, mode):
    claim("model.all_composition_scores, all_head_labels", option, "unchanged")
    model = build(option)
    scores = model.all_composition_scores(mode)
    heads = model.cfg.n_heads
    qk, ov = model.QK.AB.detach().double(), model.OV.AB.detach().double()
    right = {"Q": qk, "K": qk.transpose(-2, -1), "V": ov}[mode]
    expected = torch.zeros(2, heads, 2, heads)
    for a in range(heads):
        for b in range(heads):
            norm = (ov[0, a] @ right[1, b]).norm()
            expected[0, a, 1, b] = norm / ov[0, a].norm() / right[1, b].norm()
    close(scores, expected)
    labels = model.all_head_labels()
    assert labels == [f"L{layer}H{head}" for layer in range(2) for head in range(heads)]
    if expressible(option):
        theirs = reference(option).all_composition_scores(mode)
        their_labels = reference(option).all_head_labels
        if compat.HAS_HOOKED_TRANSFORMER:
            their_labels = their_labels()
        else:  # a bridge's scores come with the layers that have attention
            theirs = theirs.scores
        close(scores, theirs)
        assert labels == their_labels


@every_option
def test_accumulated_bias_is_the_sum_of_what_was_written(claim, option):
    claim("model.accumulated_bias", option, "unchanged")
    model = build(option)
    b_O, b_out = model.b_O, model.b_out
    close(model.accumulated_bias(0), torch.zeros(16), 0)
    close(model.accumulated_bias(2), (b_O + b_out).sum(0))
    close(model.accumulated_bias(1, mlp_input=True), b_O.sum(0) + b_out[0])
    close(model.accumulated_bias(2, include_mlp_biases=False), b_O.sum(0))
    if expressible(option):
        for layer in (0, 1, 2):
            close(model.accumulated_bias(layer), reference(option).accumulated_bias(layer))


@every_option
@pytest.mark.parametrize("vector_type", ["OV", "w_in", "w_out"])
def test_singular_vectors_are_those_of_the_weights(claim, option, vector_type):
    claim(f"SVDInterpreter.get_singular_vectors({vector_type!r})", option, "unchanged")
    model = build(option)
    head = 1 if vector_type == "OV" else None
    found = SVDInterpreter(model).get_singular_vectors(
        vector_type, layer_index=1, num_vectors=3, head_index=head
    )
    block = model.blocks[1]
    matrix = {
        "OV": block.attn.W_V[1] @ block.attn.W_O[1],
        "w_in": block.mlp.W_in.T * block.ln2.w,
        "w_out": block.mlp.W_out,
    }[vector_type].detach().double()  # fmt: skip
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)  # ascending
    expected = model.W_U.detach().double().T @ vectors[:, -3:].flip(-1)
    assert found.shape == (30, 1, 3)
    close(up_to_sign(found[:, 0].double()), up_to_sign(expected), 1e-4)
    if expressible(option):
        theirs = SVDInterpreter(reference(option)).get_singular_vectors(
            vector_type, layer_index=1, num_vectors=3, head_index=head
        )
        close(up_to_sign(found[:, 0]), up_to_sign(theirs[:, 0]), 1e-4)


def up_to_sign(columns):
    """Columns with their largest entry positive."""
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))
    return columns * largest.sign()


REFUSED = ["fold_layer_norm", "fold_value_biases", "center_writing_weights", "center_unembed",
           "refactor_factored_attn_matrices", "process_weights_", "process_weights",
           "load_and_process_state_dict"]  # fmt: skip


@every_option
@pytest.mark.parametrize("method", REFUSED)
def test_weight_processing_is_refused_and_changes_nothing(claim, option, method):
    why = "processing would fill in zero weights; with AbsTopK or a sink it changes the function"
    claim(f"model.{method}", option, "refused", why)
    model = build(option)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TypeError, match=f"{method} does not apply.*fill in zero weights"):
        getattr(model, method)(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@every_option
def test_directions_of_tokens_are_columns_of_the_unembedding(claim, option):
    claim("model.tokens_to_residual_directions", option, "unchanged")
    model = build(option)
    direction = model.tokens_to_residual_directions
    batch = torch.tensor([[4, 7, 2], [1, 9, 9]])
    close(direction("w4"), model.W_U[:, 4], 0)
    close(direction(7), model.W_U[:, 7], 0)
    close(direction(batch[0]), model.W_U[:, batch[0]].T, 0)
    close(direction(batch), model.W_U.T[batch], 0)
    if expressible(option):
        for tokens in ("w4", 7, torch.tensor(7), batch[0], batch):
            close(direction(tokens), reference(option).tokens_to_residual_directions(tokens), 0)
