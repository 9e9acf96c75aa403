"""Baselines on TransformerLens' own models: HookedTransformer below 4, TransformerBridge from 4 on,
native and around a GPT-2 that Hugging Face's library saved."""

import pytest
import torch

from tests.conformance.models import theirs
from tl_sparse import compat
from tl_sparse.heads import PromptPairs, baseline, edge_baseline
from tl_sparse.heads.baselines import INTERVENING
from tl_sparse.heads.edge_baselines import EDGE_METHODS

GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 4, "n_positions": 12, "vocab_size": 30}


@pytest.fixture
def both(small_model):
    """One of our models, and TransformerLens' own with the same weights."""
    model = small_model("layer_norm", positional_embedding_type="standard")
    return model, theirs(model)


def pairs_of(model, tokens):
    return PromptPairs.of(model, tokens, tokens.flip(0).clone(), [5, 6], [7, 8])


def refused_on_a_native_bridge(method):
    return method in ("EAP", "EAP-IG") and not compat.HAS_HOOKED_TRANSFORMER


@pytest.mark.parametrize("method", INTERVENING)
def test_heads_have_the_scores_of_the_same_model_of_ours(both, tokens, method, monkeypatch):
    monkeypatch.setattr("tl_sparse.heads.baselines.SP_STEPS", 10)
    if refused_on_a_native_bridge(method):
        with pytest.raises(ValueError, match=r"does not allow .*choose another method"):
            baseline(both[1], pairs_of(both[1], tokens), method)
        return
    ours, other = (baseline(model, pairs_of(model, tokens), method).scores for model in both)
    torch.testing.assert_close(other, ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", EDGE_METHODS)
def test_edges_have_the_scores_of_the_same_model_of_ours(both, tokens, method):
    if refused_on_a_native_bridge(method):
        with pytest.raises(ValueError, match=r"does not allow .*choose another method"):
            edge_baseline(both[1], pairs_of(both[1], tokens), method)
        return
    ours, other = (edge_baseline(model, pairs_of(model, tokens), method).scores for model in both)
    torch.testing.assert_close(other, ours, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.fixture
def gpt2():
    """A TransformerBridge around a GPT-2."""
    if not hasattr(compat.bridge_class(), "boot_transformers"):
        pytest.skip("TransformerLens 2 has no TransformerBridge")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**GPT2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    saved = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return build_bridge_from_module(saved, "GPT2LMHeadModel", hf_config=config)


def test_on_a_bridge_gradients_are_the_slope_of_patching(gpt2, tokens, monkeypatch):
    """With a corrupted prompt that differs by next to nothing, all that ask the model agree."""
    monkeypatch.setattr("tl_sparse.heads.baselines.SP_STEPS", 5)
    with torch.no_grad():
        weight = gpt2.embed.W_E
        weight[9] = weight[8] + 1e-3 * torch.randn(16)
    clean, corrupted = tokens.clone(), tokens.clone()
    clean[:, 3], corrupted[:, 3] = 8, 9
    pairs = PromptPairs.of(gpt2, clean, corrupted, [5, 6], [7, 8])
    exact, slope = (baseline(gpt2, pairs, m).scores for m in ("patching", "attribution"))
    assert float(exact.max()) > 0
    torch.testing.assert_close(slope, exact, rtol=0.1, atol=0.1 * float(exact.max()))
    for method in ("EAP", "EAP-IG", "ACDC", "SP", "HISP"):
        assert baseline(gpt2, pairs, method).scores.isfinite().all()
    one, more = (edge_baseline(gpt2, pairs, m).scores[:4, 4:] for m in ("EAP", "EAP-IG"))
    torch.testing.assert_close(one, more, rtol=0.1, atol=0.1 * float(one.max()))
