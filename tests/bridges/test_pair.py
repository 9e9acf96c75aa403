"""Hybrids of two models: a model bridged to itself, hooks, paths, what is refused."""

import copy
import itertools

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tl_sparse.bridges import BridgedPair, Bridges, BridgesConfig, HybridPath
from tl_sparse.bridges.segments import Segments


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
        for start, sizes in (("dense", (0, 1, 2, len(pair.sites))), ("sparse", (1,)))
        for n in sizes
        for changes in itertools.combinations(pair.sites, n)
    ]
    assert len(paths) > 10
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


def test_tokens_and_streams_that_do_not_fit_are_refused(itself, tokens):
    pair = itself()
    with pytest.raises(ValueError, match="13 tokens do not fit n_ctx=12"):
        pair.streams("sparse", torch.ones(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must be integers \[batch, pos\], not torch\.bool"):
        Segments(pair.sparse).check(tokens > 3, None)
    with pytest.raises(ValueError, match="not a str; texts have theirs from the model's to_tokens"):
        Segments(pair.sparse).check("some text", None)
    with pytest.raises(ValueError, match=r"is \(2, 8, 16\), not \(2, 7, 16\)"):
        Segments(pair.sparse).check(tokens, torch.zeros(2, 7, 16))
    with pytest.raises(ValueError, match="is none"):
        pair.tail("sparse", "1.pre", torch.zeros(2, 8, 16), tokens, stop="0.mid")


def test_caches_and_hooks_take_filters_and_see_what_ran(itself, tokens):
    pair = itself()
    path = HybridPath("dense", ("0.mid",))
    logits, cache = pair.run_with_cache(tokens, path)
    assert torch.equal(logits, pair.sparse(tokens))
    assert set(cache) == {
        "dense.blocks.0.hook_resid_pre", "sparse.blocks.0.hook_resid_mid",
        "sparse.blocks.1.hook_resid_pre", "sparse.blocks.1.hook_resid_mid",
        "sparse.blocks.1.hook_resid_post",
    }  # fmt: skip
    _, cache = pair.run_with_cache(tokens, path, lambda name: name.endswith("mlp.hook_post"))
    assert set(cache) == {"sparse.blocks.0.mlp.hook_post", "sparse.blocks.1.mlp.hook_post"}
    silenced = [(lambda name: name == "sparse.hook_embed", lambda x, hook: 0 * x)]
    assert not torch.equal(pair(tokens, "sparse", silenced), logits)
    assert torch.equal(pair(tokens, path, silenced), logits)
    with pair.hooks([("dense.hook_embed", lambda x, hook: 0 * x)]):
        assert not torch.equal(pair(tokens, path), logits)
    assert torch.equal(pair(tokens, path), logits)


def test_a_pair_follows_its_models(itself, small_model, tokens):
    pair = itself()
    other = small_model("standard")
    pair.sparse = other
    assert torch.equal(pair(tokens, "sparse"), other(tokens))
    copied = copy.deepcopy(pair)
    with torch.no_grad():
        copied.sparse.unembed.b_U.add_(1.0)
    assert torch.equal(pair(tokens, "sparse"), other(tokens))
    assert not torch.equal(copied(tokens, "sparse"), other(tokens))
