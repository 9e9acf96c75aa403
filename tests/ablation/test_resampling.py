import pytest
import torch

from tests.ablation.by_hand import affine
from tl_sparse.ablation import (
    ablation_hooks,
    aligned_sources,
    positional_means,
    resample_sources,
)
from tl_sparse.sites import SITE_NAMES, NodeIndex
from tl_sparse.storage.fingerprint import fingerprint


def kept(index, value):
    return torch.full((index.n_nodes,), value)


def test_removed_nodes_are_what_they_are_on_the_source_of_the_same_row(any_model, many):
    """By hand: the sources' activations put in their places, channel by channel, site by site."""
    index = NodeIndex.of(any_model, SITE_NAMES)
    keep = torch.rand(index.n_nodes) < 0.6
    sources = resample_sources(any_model, many[4:], SITE_NAMES)
    assert len(sources) == 6
    tokens = many[:3, :7]
    _, theirs = any_model.run_with_cache(many[4:7])

    def patch(x, hook):
        piece = index.slices[names[id(hook)]]
        mine = x.reshape(3, 7, -1).clone()
        other = theirs[names[id(hook)]][:, :7].reshape(3, 7, -1)
        for channel, stays in enumerate(keep[piece].tolist()):
            if not stays:
                mine[..., channel] = other[..., channel]
        return mine.view_as(x)

    # by the name that is asked for: a hook reached by an alias goes by another
    names = {id(any_model.hook_dict[name]): name for name in index.slices}
    hooks = [(name, patch) for name in index.slices]
    by_hand = any_model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    hooks = ablation_hooks(index, keep, sources)
    found = any_model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    assert torch.equal(found, by_hand)
    turned = ablation_hooks(index, keep, sources.take(torch.tensor([1, 0, 2])))
    other = any_model.run_with_hooks(tokens, return_type="logits", fwd_hooks=turned)
    assert torch.equal(other[2], found[2])
    assert (other[:2] - found[:2]).abs().max() > 0.01


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_positional_means_are_the_cached_activations_means_at_each_position(
    any_model, many, batch_size
):
    sources = positional_means(any_model, many, batch_size=batch_size)
    with torch.no_grad():
        _, cache = any_model.run_with_cache(many)
    assert set(sources.activations) == set(NodeIndex.of(any_model).slices)
    assert len(sources) == 1
    for name, found in sources.activations.items():
        weight, bias = affine(any_model, name)
        expected = (cache[name] * weight + bias).mean(0, keepdim=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert sources.model_fingerprint == fingerprint(any_model)


def test_prompts_take_positional_means_of_their_own_places(any_model, many):
    sources = positional_means(any_model, many).take(torch.zeros(3, dtype=torch.int64))
    index = sources.index
    hooks = ablation_hooks(index, kept(index, False), sources)
    with torch.no_grad():
        same = any_model.run_with_hooks(many[:3, :5], fwd_hooks=hooks)
        longer = any_model.run_with_hooks(many[:3], fwd_hooks=hooks)
    torch.testing.assert_close(same, longer[:, :5], atol=1e-5, rtol=1e-5)


def test_too_few_sources_or_too_short_ones_are_refused(small_model, many):
    model = small_model()
    index = NodeIndex.of(model)
    for source_tokens in (many[:2], many[:, :4]):
        hooks = ablation_hooks(index, kept(index, False), resample_sources(model, source_tokens))
        with pytest.raises(ValueError, match="too few or too short for 3 prompts of 9"):
            model.run_with_hooks(many[:3], fwd_hooks=hooks)


def test_sources_of_other_nodes_are_refused(small_model, many):
    model = small_model()
    index = NodeIndex.of(model)
    sources = resample_sources(model, many, ("attn_v",))
    with pytest.raises(
        ValueError, match=f"of {index.n_nodes} nodes.* and resample sources of other"
    ):
        ablation_hooks(index, kept(index, True), sources)


def test_aligned_sources_stand_with_their_last_token_where_it_is_asked(any_model, many):
    """By hand: positions moved by the difference of the last ones, the first token repeated."""
    last, onto = torch.tensor([5, 2, 6]), torch.tensor([3, 4, 6])
    found = aligned_sources(any_model, many[:3], last, onto)
    with torch.no_grad():
        _, cache = any_model.run_with_cache(many[:3, :7])
    for name, moved in found.activations.items():
        weight, bias = affine(any_model, name)
        there = cache[name] * weight + bias
        for row in range(3):
            for position in range(int(onto.max()) + 1):
                place = position + int(last[row]) - int(onto[row])
                place = min(max(place, 0), int(last[row]))
                torch.testing.assert_close(moved[row, position], there[row, place])
    assert len(found) == 3
