import copy
from importlib.util import find_spec

import pytest
import torch

from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.layers import Layer, sinusoids
from tl_sparse.model.transformer import SparseTransformer


def reinitialized(model, seed):
    """TransformerLens' random-init control; where it is not there yet, the same contract."""
    if find_spec("transformer_lens.tools.analysis.interchange"):
        from transformer_lens.tools.analysis.interchange import reinitialized

        return reinitialized(model, seed)
    clone = copy.deepcopy(model)
    torch.manual_seed(seed)
    for module in clone.modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
    return clone


def test_sinusoids_run_from_period_four_to_the_context():
    table = sinusoids(64, 6)
    position = torch.arange(64)
    for column, period in enumerate((4.0, 16.0, 64.0)):
        angle = 2 * torch.pi * position / period
        torch.testing.assert_close(table[:, column], angle.sin(), atol=1e-4, rtol=0)
        torch.testing.assert_close(table[:, 3 + column], angle.cos(), atol=1e-4, rtol=0)


def test_every_parameter_belongs_to_a_part_that_can_draw_it_anew(small_model, option):
    model = small_model(option)
    owned = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Layer)
        for parameter in module.parameters(recurse=False)
    }
    assert {id(parameter) for parameter in model.parameters()} == owned


def test_weights_drawn_again_from_the_seed_are_those_of_a_new_model(small_model, option):
    model = small_model(option)
    new = SparseTransformer(model.config).state_dict()
    frozen = {"bigram.W_B"} if model.config.bigram_table == "frozen" else set()
    drawn = {name for name, _ in model.named_parameters()} - frozen
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (new if name in drawn else before)[name]), name
        assert not torch.equal(before[name], new[name]) or name not in drawn


def test_reset_draws_from_the_distribution_of_the_constructor():
    config = SparseTransformerConfig(
        n_layers=8, d_model=128, d_vocab=200, n_ctx=32, initializer_range=0.05, d_pos=32,
        positional_embedding_type="concat", use_attention_sinks=True, normalization_type="LN",
        bigram_table="learned",
    )  # fmt: skip
    first = SparseTransformer(config)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(9.0)
    second = reinitialized(first, seed=5)
    fresh = dict(SparseTransformer(config).named_parameters())
    for name, parameter in second.named_parameters():
        if (std := float(fresh[name].detach().std())) > 0:
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.05), name
            assert not torch.equal(parameter, fresh[name]), name
        else:
            assert torch.equal(parameter, fresh[name]), name
    assert (first.W_Q == 9.0).all()


def test_reset_without_a_generator_follows_torchs_seed(small_model):
    model = small_model()
    one, same, other = (reinitialized(model, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embed.W_E"], other["embed.W_E"])


def test_reset_keeps_dtype_and_identity(small_model):
    embed = small_model().double().embed
    parameter = embed.W_E
    embed.reset_parameters()
    assert embed.W_E is parameter
    assert parameter.dtype == torch.float64
    assert parameter.requires_grad
