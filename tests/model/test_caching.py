"""run_with_cache: every argument, alone and together; the hooks of others, which it leaves be."""

import itertools

import pytest
import torch

PER_HEAD = ("hook_q_input", "hook_k_input", "hook_v_input")


def ignore(x, hook):
    return None


def sliced(name, value, positions):
    """Positions of an activation: second dimension, but third in [batch, head, dest, src]."""
    if name.removesuffix("_grad").endswith(("hook_pattern", "hook_attn_scores")):
        return value[:, :, positions]
    return value[:, positions]


@pytest.mark.parametrize("option", ["plain", "together"])
@pytest.mark.parametrize("switch", ["attn_result", "split_qkv_input"])
def test_arguments_together_cut_the_full_cache(small_model, tokens, option, switch):
    model, one = small_model(option), tokens[:1]
    getattr(model, f"set_use_{switch}")(True)
    _, whole = model.run_with_cache(one, return_type="loss", incl_bwd=True)
    filters = {
        None: lambda name: True,
        "blocks.0.attn.hook_q": lambda name: name == "blocks.0.attn.hook_q",
        ("hook_embed", "blocks.0.attn.hook_pattern"): lambda name: (
            name in ("hook_embed", "blocks.0.attn.hook_pattern")
        ),
        (lambda name: "hook_" in name and "blocks.0." in name): lambda name: "blocks.0." in name,
    }
    places = {None: slice(None), -1: [-1], (1, 4): slice(1, 4), (2,): slice(2)}
    for (names_filter, wanted), (pos_slice, positions), stop, backward, bare in itertools.product(
        filters.items(), places.items(), (None, 1), (False, True), (False, True)
    ):
        if stop is not None and backward:
            continue
        kind = {} if stop is not None else {"return_type": "loss"}
        _, cache = model.run_with_cache(
            one, names_filter=list(names_filter) if type(names_filter) is tuple else names_filter,
            pos_slice=pos_slice, stop_at_layer=stop, incl_bwd=backward, remove_batch_dim=bare,
            device="cpu", **kind,
        )  # fmt: skip
        expected = {
            name: sliced(name, value, positions)
            for name, value in whole.items()
            if wanted(name.removesuffix("_grad")) and (backward or not name.endswith("_grad"))
        }
        if stop == 1:
            behind = ("blocks.1.", "ln_final.", "hook_bigram")
            expected = {n: value for n, value in expected.items() if not n.startswith(behind)}
        assert cache.keys() == expected.keys()
        assert cache.has_batch_dim == (not bare)
        for name, value in cache.items():
            like = expected[name][0] if bare else expected[name]
            if name.endswith("_grad"):  # last bits depend on what else is hooked
                torch.testing.assert_close(value, like, atol=1e-6, rtol=1e-4)
            else:
                assert torch.equal(value, like), name


def test_positions_of_streams_per_head_are_positions_not_heads(small_model, tokens):
    model = small_model()
    model.set_use_split_qkv_input(True)
    _, cache = model.run_with_cache(tokens, pos_slice=(0, 3))
    for name in PER_HEAD:
        assert cache[f"blocks.0.{name}"].shape == (2, 3, 4, 16)
    assert cache["blocks.0.attn.hook_pattern"].shape == (2, 4, 3, 8)


def test_several_examples_keep_their_batch_dimension(small_model, make_tokenizer, tokens):
    model = small_model(tokenizer=make_tokenizer())
    for batch in (tokens, ["w4", "w5"]):
        with pytest.raises(ValueError, match="needs a batch of one, not of 2"):
            model.run_with_cache(batch, remove_batch_dim=True)
    assert not any(point.fwd_hooks for point in model.hook_points())
    _, cache = model.run_with_cache("w4 w5", remove_batch_dim=True)
    assert cache["hook_embed"].shape == (3, 16)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"return_type": "both"}, {"return_type": "loss", "loss_per_token": True},
     {"stop_at_layer": 1}, {"return_type": None}],
)  # fmt: skip
def test_a_backward_pass_needs_a_loss(small_model, tokens, arguments):
    model = small_model()
    with pytest.raises(ValueError, match="it needs return_type='loss'"):
        model.run_with_cache(tokens, incl_bwd=True, **arguments)
    with torch.no_grad(), pytest.raises(ValueError, match="gradients that are not switched off"):
        model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_points())


def test_names_that_the_run_does_not_reach_are_refused(small_model, tokens):
    model = small_model()
    for names_filter in ("blocks.1.hook_resid_pre", ["hook_embed", "blocks.1.attn.hook_z"]):
        with pytest.raises(ValueError, match=r"nothing to cache at blocks.1.*stopped at another"):
            model.run_with_cache(tokens, names_filter=names_filter, stop_at_layer=1)
    with pytest.raises(ValueError, match=r"nothing to cache at blocks.1"):
        model.run_with_cache(tokens, names_filter=lambda n: "blocks.1." in n, stop_at_layer=1)
    both = {"names_filter": lambda n: "resid_pre" in n, "stop_at_layer": 1}
    _, cache = model.run_with_cache(tokens, **both)
    assert set(cache) == {"blocks.0.hook_resid_pre"}
    resid = model(tokens, stop_at_layer=1)
    _, cache = model.run_with_cache(resid, start_at_layer=1)
    assert "blocks.0.hook_resid_pre" not in cache
    assert torch.equal(cache["blocks.1.hook_resid_pre"], resid)


def test_names_may_come_in_any_collection(small_model, tokens):
    model = small_model()
    names = ("hook_embed", "blocks.0.attn.hook_z")
    for names_filter in (list(names), names, set(names), (name for name in names)):
        _, cache = model.run_with_cache(tokens, names_filter=names_filter)
        assert set(cache) == set(names)


def test_caching_hooks_by_hand_are_those_of_run_with_cache(small_model, tokens):
    model = small_model()
    model.set_use_attn_in(True)
    alias = "blocks.0.attn.hook_attn_in"
    for names_filter in (None, alias, lambda name: name.endswith("attn.hook_attn_in")):
        _, expected = model.run_with_cache(tokens, names_filter=names_filter)
        cache, forward, backward = model.get_caching_hooks(names_filter)
        with model.hooks(forward, backward):
            assert model.is_caching
            model(tokens)
        assert not model.is_caching
        assert set(cache) == set(expected)
        lasting = model.add_caching_hooks(names_filter)
        model(tokens)
        model.reset_hooks()
        assert set(lasting) == set(expected)
    assert {alias, "blocks.0.hook_attn_in"} <= set(lasting)


def test_caching_into_a_dict_that_is_there(small_model, tokens):
    model, cache = small_model(), {}
    model.cache_some(cache, lambda name: name.endswith("hook_z"))
    model(tokens, return_type="loss").backward()
    assert set(cache) == {"blocks.0.attn.hook_z", "blocks.1.attn.hook_z"}
    model.reset_hooks()
    model.cache_all(cache, incl_bwd=True)
    model(tokens, return_type="loss").backward()
    assert {"hook_embed", "hook_embed_grad"} <= set(cache)
    model.reset_hooks()
    model.add_caching_hooks("hook_embed", remove_batch_dim=True)
    with pytest.raises(ValueError, match="needs a batch of one"):
        model(tokens)


# --------------------------------------------------------------------------------------------------
# hooks of others

RUNS = {
    "run_with_hooks": lambda model, tokens: model.run_with_hooks(
        tokens, fwd_hooks=[("hook_embed", ignore), ("blocks.0.hook_resid_pre", ignore)]
    ),
    "run_with_cache": lambda model, tokens: model.run_with_cache(tokens)[0],
    "run_with_cache, both ways": lambda model, tokens: model.run_with_cache(
        tokens, return_type="loss", incl_bwd=True
    ),
    "hooks in hooks": lambda model, tokens: nested(model, tokens),
    "a hook that fails": lambda model, tokens: failing(model, tokens),
    "an unknown name": lambda model, tokens: unknown(model, tokens),
}


def nested(model, tokens):
    with model.hooks(fwd_hooks=[("hook_embed", ignore)]):
        with model.hooks(fwd_hooks=[("hook_embed", ignore)]):
            model(tokens)
            assert len(model.hook_embed.fwd_hooks) == 4
        assert len(model.hook_embed.fwd_hooks) == 3
        model(tokens)


def failing(model, tokens):
    def fail(x, hook):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", fail)])


def unknown(model, tokens):
    with pytest.raises(KeyError):
        model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", ignore), ("nonsense", ignore)])
    with pytest.raises(KeyError):
        model.run_with_cache(tokens, names_filter=["hook_embed", "nonsense"])


@pytest.mark.parametrize("run", list(RUNS))
def test_a_users_own_hooks_stay_and_count(small_model, tokens, run):
    model = small_model()
    plain = model(tokens)
    model.add_hook("hook_embed", lambda x, hook: x * 0.5)
    model.add_perma_hook("hook_embed", lambda x, hook: x + 0.1)
    model.add_hook("blocks.0.hook_resid_pre", ignore, dir="bwd")
    own = model(tokens)
    assert not torch.equal(own, plain)
    logits = RUNS[run](model, tokens)
    if isinstance(logits, torch.Tensor):
        assert torch.equal(logits, own)
    assert len(model.hook_embed.fwd_hooks) == 2
    assert len(model.blocks[0].hook_resid_pre.bwd_hooks) == 1
    assert model.context_level == 0
    assert torch.equal(model(tokens), own)
    _, cache = model.run_with_cache(tokens, names_filter="hook_embed")
    torch.testing.assert_close(cache["hook_embed"], model.W_E[tokens] * 0.5 + 0.1)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(tokens), plain)


def test_hooks_that_are_to_stay_do(small_model, tokens):
    model = small_model()
    model.run_with_hooks(
        tokens, fwd_hooks=[("hook_embed", lambda x, hook: x * 0)], reset_hooks_end=False
    )
    assert len(model.hook_embed.fwd_hooks) == 1
    model.reset_hooks()
    assert not model.hook_embed.fwd_hooks
