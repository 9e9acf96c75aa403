"""Hybrids of two models: a model bridged to itself, hooks, paths, what is refused."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tl_sparse.bridges import BridgedPair, Bridges, BridgesConfig, HybridPath


@pytest.fixture
def itself(small_model):
    """``itself(option)``: a model bridged to itself by identity bridges."""

    def make(option="plain"):
        model = small_model(option)
        return BridgedPair(model, model, Bridges.identity(model))

    return make


def test_a_model_bridged_to_itself_reproduces_itself_on_every_path_to_the_bit(
    itself, option, tokens
):
    pair = itself(option)
    expected = pair.sparse(tokens)
    paths = [
        HybridPath(start, changes)
        for start in ("dense", "sparse")
        for n in range(len(pair.sites) + 1)
        for changes in itertools.combinations(pair.sites, n)
        if n in (0, 1, 2, len(pair.sites))
    ]
    assert len(paths) > 12
    wrong = [str(path) for path in paths if not torch.equal(pair(tokens, path), expected)]
    assert not wrong


def test_streams_are_those_of_a_cache_and_tails_from_them_are_the_model(itself, tokens):
    pair = itself("together")
    expected, cache = pair.sparse.run_with_cache(tokens)
    found = pair.streams("sparse", tokens)
    assert torch.equal(found.logits, expected)
    for site in pair.sites:
        assert torch.equal(found.resid[site], cache[pair.hook("sparse", site)])
        assert torch.equal(pair.tail("sparse", site, found.resid[site], tokens), expected)


def test_a_tail_depends_on_the_stream_it_is_given(itself, tokens):
    pair = itself()
    for site in pair.sites:
        resid = pair.streams("sparse", tokens).resid[site]
        hook = pair.hook("sparse", site)
        expected = pair.sparse.run_with_hooks(
            tokens, fwd_hooks=[(hook, lambda x, hook: x.flip(-1))]
        )
        assert torch.equal(pair.tail("sparse", site, resid.flip(-1), tokens), expected)
        assert not torch.equal(expected, pair.sparse(tokens))


def test_hooks_of_both_models_are_called_where_their_model_runs(itself, tokens):
    pair, called = itself(), []

    def note(x, hook):
        called.append(hook.name)

    names = [
        f"blocks.{layer}.{part}" for layer in (0, 1) for part in ("hook_attn_out", "hook_mlp_out")
    ]
    hooks = [(f"{side}.{name}", lambda x, hook, s=side: called.append((s, hook.name)))
             for side in ("dense", "sparse") for name in names]  # fmt: skip
    pair(tokens, HybridPath("dense", ("0.mid", "1.mid")), hooks)
    assert called == [("dense", names[0]), ("sparse", names[1]), ("sparse", names[2]),
                      ("dense", names[3])]  # fmt: skip
    with pytest.raises(ValueError, match=r"must begin with dense\. or sparse."):
        pair(tokens, "dense", [("blocks.0.hook_attn_out", note)])
    with pytest.raises(ValueError, match=r"no hook 'blocks\.9\.hook_attn_out'"):
        pair(tokens, "dense", [("dense.blocks.9.hook_attn_out", note)])


def test_gradients_reach_the_first_model_and_the_bridge(itself, tokens):
    pair = itself()
    pair(tokens, HybridPath("dense", ("1.mid",))).logsumexp(-1).sum().backward()
    assert pair.bridges.encoders[3].W_enc.grad.abs().sum() > 0
    assert pair.bridges.encoders[2].W_enc.grad is None
    assert pair.dense.embed.W_E.grad.abs().sum() > 0


def test_models_with_other_vocabularies_are_refused(small_model, make_tokenizer):
    model = small_model(tokenizer=make_tokenizer())
    larger = small_model(d_vocab=31)
    with pytest.raises(ValueError, match="vocabularies differ: 30 and 31 tokens"):
        BridgedPair(model, larger, Bridges(BridgesConfig.of(model, larger)))
    core = make_tokenizer().backend_tokenizer.to_str().replace('"w3"', '"v3"')
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(core), bos_token="<bos>")
    other = small_model(tokenizer=words)
    with pytest.raises(ValueError, match="tokenizers differ: 1 of 30 tokens"):
        BridgedPair(model, other, Bridges(BridgesConfig.of(model, other)))


def test_paths_that_are_none_are_refused(itself, tokens):
    pair = itself()
    with pytest.raises(ValueError, match=r"choose from 0\.pre, 0\.mid, 1\.pre, 1\.mid, final"):
        pair(tokens, HybridPath("dense", ("2.pre",)))
    with pytest.raises(ValueError, match="must come one after the other"):
        pair(tokens, HybridPath("dense", ("1.pre", "0.mid")))
    with pytest.raises(ValueError, match="choose from dense, sparse"):
        pair(tokens, "both")
