import pytest
import torch

from tests.conformance.models import build, theirs
from tl_sparse.nodes import qk_channels


def scores_by_hand(model, reads, layer, head):
    """q·k / sqrt(d_head) in double precision, before AbsTopK on q and k."""
    attn = model.blocks[layer].attn
    q, k = (
        reads.double() @ attn.read_weight(n)[head].double() + getattr(attn, f"b_{n}")[head].double()
        for n in "QK"
    )
    return q @ k.transpose(-1, -2) / attn.config.d_head**0.5


@pytest.mark.parametrize("option", ["plain", "concat", "sinks", "layer_norm", "no_bias"])
def test_the_sum_over_pairs_is_the_score(small_model, tokens, option):
    model = small_model(option, zeros=0.7)
    seen = []
    hook = ("blocks.1.attn.hook_attn_scores", lambda x, hook: seen.append(x.detach()))
    model.run_with_hooks(tokens, return_type=None, fwd_hooks=[hook])
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    for head in range(4):
        pairs = qk_channels(model, 1, head)
        compared = pairs.compare(model, tokens)
        scores = seen[0][:, head][:, causal]
        assert (compared.pairs - scores).abs().max() < 1e-5
        assert compared.difference.abs().max() < 1e-5
        assert scores.abs().max() > 0.01


def test_pairs_are_the_product_of_the_two_matrices_with_the_biases_as_a_channel(small_model):
    model = small_model("together", zeros=0.6)
    attn = model.blocks[1].attn
    frame = qk_channels(model, 1, 2).to_dataframe()
    expected = {}
    for name in "QK":
        weight = torch.cat([attn.read_weight(name)[2], getattr(attn, f"b_{name}")[2][None]])
        expected[name] = weight.double()
    product = expected["Q"] @ expected["K"].T / 8**0.5
    assert len(frame) == int((product != 0).sum())
    assert (frame["weight"].abs().diff().dropna() <= 0).all()
    names = [f"1.attn.act_in:{c}" for c in range(20)] + ["bias"]
    for row in frame.itertuples():
        at = names.index(row.query), names.index(row.key)
        assert row.weight == pytest.approx(product[at].item(), rel=1e-9)
        kind = "bias" if at[0] == 20 else "position" if at[0] >= 16 else "residual"
        assert row.query_kind == kind
    assert frame["key_channel"].isna().equals(frame["key"] == "bias")


def test_it_says_by_how_much_re_sparsified_queries_and_keys_differ(small_model, tokens):
    model = small_model("together", zeros=0.3)
    pairs = qk_channels(model, 1, 1)
    seen = []
    model.run_with_hooks(
        tokens, return_type=None,
        fwd_hooks=[(pairs.read_hook, lambda x, hook: seen.append(x.detach()))],
    )  # fmt: skip
    compared = pairs.compare(model, tokens)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    by_hand = scores_by_hand(model, seen[0], 1, 1)[:, causal]
    assert torch.allclose(compared.pairs, by_hand, atol=1e-9)
    assert compared.difference.abs().max() > 1e-3
    assert 0.1 < compared.zero_queries < 0.9
    assert f"by at most {compared.difference.abs().max():.2g}" in repr(compared)
    frame = compared.to_dataframe()
    assert (frame["model"] - frame["pairs"] - frame["difference"]).abs().max() < 1e-12
    assert "differ from the sum over pairs" in compared._repr_html_()


def test_pairs_that_are_cut_are_missing_from_the_scores(small_model, tokens):
    model = small_model("concat", zeros=0.7)
    pairs = qk_channels(model, 1, 2)
    gone = torch.arange(len(pairs.weight)) % 3 == 0
    seen = {}

    def keep(x, hook):
        seen[hook.name] = x.detach()

    names = (pairs.read_hook, pairs.scores_hook)
    whole = model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names])
    before, reads = seen[pairs.scores_hook], seen[pairs.read_hook]
    cut = model.run_with_hooks(tokens, fwd_hooks=[*pairs.cut(gone), (pairs.scores_hook, keep)])
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    left = (before - seen[pairs.scores_hook])[..., causal]
    assert torch.allclose(left[:, 2].double(), pairs.scores(reads, gone)[:, causal], atol=1e-5)
    assert not left[:, [0, 1, 3]].any()
    assert not torch.allclose(whole, cut)
    every = torch.ones_like(gone)
    model.run_with_hooks(tokens, fwd_hooks=[*pairs.cut(every), (pairs.scores_hook, keep)])
    assert seen[pairs.scores_hook][:, 2][:, causal].abs().max() < 1e-5


@pytest.mark.parametrize("option", ["plain", "layer_norm", "standard"])
def test_transformer_lens_own_models_have_the_same_pairs(option, tokens):
    ours = build(option)
    dense = theirs(ours)
    one, two = qk_channels(ours, 1, 3), qk_channels(dense, 1, 3)
    assert torch.allclose(one.weight, two.weight, atol=1e-7)
    assert two.compare(dense, tokens).difference.abs().max() < 1e-5
    if two.bridge:  # its hook_attn_scores has the pattern
        with pytest.raises(ValueError, match="no hook at the scores before the softmax"):
            two.cut(torch.ones(len(two.weight), dtype=torch.bool))


def test_what_is_no_sum_over_pairs_is_refused(small_model):
    model = small_model("plain")
    for layer, head in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match="layers 0 to 1 with heads 0 to 3"):
            qk_channels(model, layer, head)
    model.cfg.positional_embedding_type = "rotary"
    with pytest.raises(ValueError, match=r"no sums over pairs of channels.*rotary"):
        qk_channels(model, 0, 0)


def test_a_head_without_weights_has_no_pairs(small_model, tokens):
    model = small_model("plain", use_bias=False)
    model.blocks[0].attn.W_Q.data[1] = 0
    pairs = qk_channels(model, 0, 1)
    assert len(pairs.weight) == 0
    assert pairs.to_dataframe().empty
    assert pairs.compare(model, tokens).difference.abs().max() == 0
    assert repr(pairs) == "QKChannels(L0H1: 0 pairs of channels, of 289)"
    assert "0 pairs" in pairs._repr_html_()
