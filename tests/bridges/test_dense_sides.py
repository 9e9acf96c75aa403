"""TransformerLens' own models on the dense side: HookedTransformer below 4, TransformerBridge from
4 on, native and around a GPT-2 that Hugging Face's library saved."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.conformance.models import theirs
from tl_sparse import compat
from tl_sparse.bridges import (
    BridgedPair,
    Bridges,
    BridgesConfig,
    HybridPath,
    fit_bridges,
    path_table,
)

GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 4, "n_positions": 12, "vocab_size": 30}


@pytest.fixture
def native(small_model):
    """A HookedTransformer or native TransformerBridge with the weights of one of our models, which
    stands beside it."""
    model = small_model("standard")
    return theirs(model), model


@pytest.fixture
def gpt2(tmp_path, small_model, make_tokenizer):
    """A TransformerBridge around a GPT-2 from a folder, and a sparse model."""
    if not hasattr(compat.bridge_class(), "boot_transformers"):
        pytest.skip("TransformerLens 2 has no TransformerBridge")
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    saved = GPT2LMHeadModel(GPT2Config(**GPT2))
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    saved.save_pretrained(tmp_path / "gpt2")
    core = Tokenizer(WordLevel(make_tokenizer().get_vocab(), unk_token="<pad>"))
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    words.save_pretrained(tmp_path / "gpt2")
    dense = compat.bridge_class().boot_transformers(str(tmp_path / "gpt2"), device="cpu")
    return dense, small_model("abstopk", d_model=12, n_heads=3)


def plain_tail(model, hook, value, tokens):
    """The logits where the stream at a hook is replaced, by hand: also where a model's hook there
    shows the stream and cannot replace it."""
    layer, _, name = hook.removeprefix("blocks.").partition(".")
    at = f"blocks.{layer}."
    if name != "hook_resid_mid" or not isinstance(model, compat.bridge_class()):
        return model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: value)])
    seen = {}

    def keep(x, hook):
        seen["mid"] = x

    def read(x, hook):
        return value

    def shift(x, hook):  # what the block gives is the stream that went past, and the MLP of value
        return x - seen["mid"] + value

    hooks = [(hook, keep), (hook, read), (f"{at}hook_resid_post", shift)]
    return model.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize("which", ["native", "gpt2"])
def test_every_hybrid_is_the_two_models_run_by_hand(request, which, tokens):
    dense, sparse = request.getfixturevalue(which)
    pair = BridgedPair(dense, sparse, Bridges(BridgesConfig.of(dense, sparse, encoder="linear")))
    assert pair.sites == ("0.pre", "0.mid", "1.pre", "1.mid", "final")
    logits = {"dense": dense(tokens), "sparse": sparse(tokens)}
    caches = {"dense": dense.run_with_cache(tokens)[1], "sparse": sparse.run_with_cache(tokens)[1]}
    for side, other, maps in (
        ("dense", "sparse", pair.bridges.encode), ("sparse", "dense", pair.bridges.decode),
    ):  # fmt: skip
        streams = pair.streams(side, tokens)
        assert torch.equal(streams.logits, logits[side])
        for site in pair.sites:
            stream = caches[side][pair.hook(side, site)]
            assert torch.equal(streams.resid[site], stream)
            assert torch.equal(pair.tail(side, site, stream, tokens), logits[side])
            found = pair(tokens, HybridPath(side, (site,)))
            expected = plain_tail(
                pair.model(other), pair.hook(other, site), maps(site, stream), tokens
            )
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    there = pair(tokens, HybridPath("sparse", ("0.mid", "1.mid")))
    resid = pair.bridge("sparse", "0.mid", streams.resid["0.mid"])
    kept = {}
    pair.tail("dense", "0.mid", resid, tokens, keep=kept)
    resid = pair.bridge("dense", "1.mid", kept["1.mid"])
    torch.testing.assert_close(there, pair.tail("sparse", "1.mid", resid, tokens))


@pytest.mark.parametrize("which", ["native", "gpt2"])
def test_bridges_to_it_are_fitted_and_measured(request, which, many_tokens):
    dense, sparse = request.getfixturevalue(which)
    before = {name: p.clone() for name, p in dense.named_parameters()}
    fitted = fit_bridges(dense, sparse, many_tokens, progress=False)
    assert all(torch.equal(before[name], p) for name, p in dense.named_parameters())
    if which == "native":  # the same function as the sparse model
        assert fitted.to_dataframe()["fvu"].max() < 1e-6
    pair = BridgedPair(dense, sparse, fitted.bridges)
    table = path_table(pair, many_tokens[:2], back="next", progress=False)
    assert table.values.isfinite().all()
    if which == "native":
        own = [row.bridges == "own" for row in table.rows]
        assert table.values[own, 0].max() < 1e-3


def test_gradients_flow_through_the_frozen_model(gpt2, tokens):
    dense, sparse = gpt2
    dense.requires_grad_(False)
    pair = BridgedPair(dense, sparse, Bridges(BridgesConfig.of(dense, sparse)))
    pair(tokens, HybridPath("sparse", ("0.mid",))).logsumexp(-1).sum().backward()
    assert pair.bridges.decoders[1].W_dec.grad.abs().sum() > 0
    assert sparse.W_E.grad.abs().sum() > 0


def test_hooks_are_called_where_it_runs_and_not_on_what_is_thrown_away(gpt2, tokens):
    dense, sparse = gpt2
    pair = BridgedPair(dense, sparse, Bridges(BridgesConfig.of(dense, sparse)))
    called = []
    names = [f"blocks.{layer}.hook_{part}_out" for layer in (0, 1) for part in ("attn", "mlp")]
    hooks = [(f"dense.{name}", lambda x, hook, name=name: called.append(name)) for name in names]
    pair(tokens, HybridPath("sparse", ("0.mid",)), hooks)
    assert called == names[1:]
    called.clear()
    pair(tokens, HybridPath("dense", ("1.mid",)), hooks)
    assert called == names[:3]


def test_a_model_that_is_none_of_these_is_refused(small_model):
    model = small_model()
    with pytest.raises(TypeError, match="a HookedTransformer or a TransformerBridge, not a Linear"):
        BridgesConfig.of(torch.nn.Linear(3, 3), model)
