import pytest
import torch

from tl_sparse.ablation import (
    frozen_norm_hooks,
    norm_hooks,
)


@pytest.fixture(params=["plain", "layer_norm", "concat", "dense"])
def normed(request, small_model):
    """Norms with and without centring, one of them over positions too; and TransformerLens' own."""
    if request.param == "dense":
        return request.getfixturevalue("random_dense_model")
    return small_model(request.param)


def test_a_frozen_norm_divides_a_shrunk_stream_by_the_whole_ones_scale(normed, many):
    """By hand: a hundredth of the stream comes out a hundredth as large, and not as it was."""
    norms = frozen_norm_hooks(normed, many)
    assert {name for name, _ in norms} == set(norm_hooks(normed))
    name = "blocks.1.hook_resid_pre"
    shrink = (name, lambda x, hook: x / 100)
    _, whole = normed.run_with_cache(many)
    seen = {}

    def look(x, hook):
        seen["normalized"] = x

    at = ("blocks.1.ln1.hook_normalized", look)
    normed.run_with_hooks(many, fwd_hooks=[shrink, *norms, at])
    stream = whole[name] / 100
    if normed.cfg.normalization_type in ("LN", "LNPre"):
        stream = stream - stream.mean(-1, keepdim=True)
    by_hand = stream / whole["blocks.1.ln1.hook_scale"]
    torch.testing.assert_close(seen["normalized"], by_hand, atol=1e-6, rtol=1e-4)
    normed.run_with_hooks(many, fwd_hooks=[shrink, at])
    assert (seen["normalized"] - by_hand).abs().max() > 0.5


def test_frozen_norms_change_no_whole_run_and_serve_copies_of_the_batch(normed, many):
    norms = frozen_norm_hooks(normed, many)
    whole = normed(many, return_type="logits")
    same = normed.run_with_hooks(many, return_type="logits", fwd_hooks=norms)
    torch.testing.assert_close(same, whole, atol=1e-5, rtol=1e-5)
    twice = normed.run_with_hooks(many.repeat(2, 1), return_type="logits", fwd_hooks=norms)
    torch.testing.assert_close(twice, whole.repeat(2, 1, 1), atol=1e-5, rtol=1e-5)


def test_a_model_without_norms_has_none_to_freeze(small_model, many):
    with pytest.raises(ValueError, match="SparseTransformer do not let their scales be set"):
        frozen_norm_hooks(small_model("no_norm"), many)
