import pytest
import torch

from tl_sparse.model.hook_names import ALIASES, SWITCHES


def ignore(x, hook):
    return None


# --------------------------------------------------------------------------------------------------
# names


WAYS = {
    "run_with_hooks": lambda model, tokens, name: model.run_with_hooks(
        tokens, fwd_hooks=[(name, ignore)]
    ),
    "run_with_cache": lambda model, tokens, name: model.run_with_cache(tokens, names_filter=name),
    "run_with_cache list": lambda model, tokens, name: model.run_with_cache(
        tokens, names_filter=["hook_embed", name]
    ),
    "add_hook": lambda model, tokens, name: model.add_hook(name, ignore),
    "add_perma_hook": lambda model, tokens, name: model.add_perma_hook(name, ignore),
    "hooks": lambda model, tokens, name: model.hooks(bwd_hooks=[(name, ignore)]).__enter__(),
    "add_caching_hooks": lambda model, tokens, name: model.add_caching_hooks(name),
    "cache_some": lambda model, tokens, name: model.get_caching_hooks([name]),
    "check_hooks_to_add": lambda model, tokens, name: model.check_hooks_to_add(
        model.hook_embed, name, ignore
    ),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_unknown_hook_name_names_the_nearest(small_model, tokens, way):
    with pytest.raises(KeyError, match=r"unknown hook 'blocks.0.attn.hook_patern'") as caught:
        WAYS[way](small_model(), tokens, "blocks.0.attn.hook_patern")
    assert "blocks.0.attn.hook_pattern" in str(caught.value)


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", ["attn.hook_result", "hook_mlp_in", "attn.hook_q_input"])
def test_switched_off_hook_names_its_switch(small_model, tokens, way, name):
    switch = SWITCHES[name.rpartition(".")[2]]
    with pytest.raises(ValueError, match=rf"never fires: call model.set_{switch}\(True\)"):
        WAYS[way](small_model(), tokens, f"blocks.1.{name}")


@pytest.mark.parametrize("way", ["run_with_hooks", "run_with_cache", "add_hook", "hooks"])
def test_filter_that_matches_nothing_is_an_error(small_model, tokens, way):
    with pytest.raises(ValueError, match=r"matches no hook that fires.*hook_result"):
        WAYS[way](small_model(), tokens, lambda name: "hook_result" in name)


def test_empty_names_filter_is_an_error(small_model, tokens):
    with pytest.raises(ValueError, match="names_filter is empty"):
        small_model().run_with_cache(tokens, names_filter=[])


def test_a_failed_run_leaves_no_hooks(small_model, tokens):
    model = small_model()
    with pytest.raises(KeyError):
        model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", ignore), ("nonsense", ignore)])
    assert not any(point.fwd_hooks for point in model.hook_points())
    assert model.context_level == 0


def test_every_hook_point_fires_or_is_switched_off(small_model, tokens, option):
    model = small_model(option)
    fired = []
    model.run_with_hooks(
        tokens, fwd_hooks=[(lambda name: True, lambda x, hook: fired.append(hook.name))]
    )
    assert len(fired) == len(set(fired))
    off = {name for name in model.hook_dict if name.rpartition(".")[2] in SWITCHES}
    assert set(fired) == set(model.hook_dict) - off


EXPECTED = {
    "hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post",
    "ln1.hook_scale", "ln1.hook_normalized", "ln2.hook_scale", "ln2.hook_normalized",
    "attn.hook_act_in", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_attn_scores",
    "attn.hook_pattern", "attn.hook_z", "mlp.hook_act_in", "mlp.hook_pre", "mlp.hook_post",
    "attn.hook_result", "hook_mlp_in", "hook_attn_in", "hook_q_input", "hook_k_input",
    "hook_v_input", *ALIASES,
}  # fmt: skip


def test_hook_names_are_those_of_transformer_lens_and_ours(small_model):
    names = set(small_model().hook_dict)
    outer = {"hook_tokens", "hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized"}
    assert names == outer | {f"blocks.{layer}.{name}" for layer in range(2) for name in EXPECTED}
    assert "hook_pos_embed" in small_model("standard").hook_dict
    assert "hook_bigram" in small_model("bigram_frozen").hook_dict
    extra = set(small_model("concat").hook_dict) - names
    assert {name for name in extra if "ln" not in name} == {"hook_pos_concat"}


# --------------------------------------------------------------------------------------------------
# aliases


def test_aliases_are_the_same_hook_point(small_model):
    model = small_model()
    for layer in range(2):
        for alias, name in ALIASES.items():
            point = model.hook_dict[f"blocks.{layer}.{name}"]
            assert model.hook_dict[f"blocks.{layer}.{alias}"] is point
            assert model.mod_dict[f"blocks.{layer}.{alias}"] is point
    points = list(model.hook_points())
    assert len(points) == len({id(point) for point in points})


@pytest.mark.parametrize("attach", ["run_with_hooks", "add_hook", "hooks"])
def test_a_filter_that_matches_both_names_edits_once(small_model, tokens, attach):
    model = small_model()
    model.set_use_split_qkv_input(True)
    calls = []

    def double(x, hook):
        calls.append(hook.name)
        return x * 2

    def both(name):
        return name.endswith("hook_q_input")

    once = model.run_with_hooks(
        tokens, fwd_hooks=[(f"blocks.{i}.hook_q_input", lambda x, hook: x * 2) for i in range(2)]
    )
    if attach == "run_with_hooks":
        logits = model.run_with_hooks(tokens, fwd_hooks=[(both, double)])
    elif attach == "add_hook":
        model.add_hook(both, double)
        logits = model(tokens)
    else:
        with model.hooks(fwd_hooks=[(both, double)]):
            logits = model(tokens)
    assert calls == ["blocks.0.hook_q_input", "blocks.1.hook_q_input"]
    assert torch.equal(logits, once)


def test_a_filter_that_matches_only_the_alias_still_finds_the_point(small_model, tokens):
    model = small_model()
    model.set_use_attn_in(True)
    calls = []
    model.run_with_hooks(
        tokens,
        fwd_hooks=[(lambda n: n == "blocks.1.attn.hook_attn_in", lambda x, hook: calls.append(x))],
    )
    assert len(calls) == 1


@pytest.mark.parametrize("names", [str, list])
def test_cache_has_the_alias_that_was_asked_for(small_model, tokens, names):
    model = small_model()
    model.set_use_split_qkv_input(True)
    alias, own = "blocks.0.attn.hook_k_input", "blocks.0.hook_k_input"
    wanted = alias if names is str else [alias]
    _, cache = model.run_with_cache(tokens, names_filter=wanted, return_type="loss", incl_bwd=True)
    assert torch.equal(cache[alias], cache[own])
    assert torch.equal(cache[f"{alias}_grad"], cache[f"{own}_grad"])


# --------------------------------------------------------------------------------------------------
# caches


@pytest.mark.parametrize("option", ["plain", "together", "standard"])
def test_backward_cache_holds_the_gradient_at_every_point(small_model, tokens, option):
    model = small_model(option)
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    names = [name for name in cache if not name.endswith("_grad")]
    for name in names:
        assert cache[f"{name}_grad"].shape == cache[name].shape, name
        assert cache[f"{name}_grad"].isfinite().all(), name
    # directional derivative at a point of each kind, in the direction of its own gradient
    for name in ("blocks.0.attn.hook_pattern", "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post",
                 "blocks.0.attn.hook_result", "blocks.1.hook_resid_pre"):  # fmt: skip
        grad = cache[f"{name}_grad"].double()
        model.double()

        def moved(step, name=name, grad=grad):
            hook = (name, lambda x, hook: x + step * grad)
            with torch.no_grad():
                return float(model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[hook]))

        slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
        assert slope == pytest.approx(float((grad**2).sum()), rel=1e-3), name
        model.float()


def test_cache_options_pass_through(small_model, tokens):
    model = small_model()
    _, cache = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    assert cache["hook_embed"].shape == (8, 16)
    _, cache = model.run_with_cache(tokens, pos_slice=-1, names_filter="hook_embed")
    assert cache["hook_embed"].shape == (2, 1, 16)
    resid, cache = model.run_with_cache(tokens, stop_at_layer=1)
    assert resid.shape == (2, 8, 16)
    assert "blocks.0.hook_resid_post" in cache
    assert "blocks.1.hook_resid_pre" not in cache
    _, plain = model.run_with_cache(tokens, return_cache_object=False)
    assert type(plain) is dict
    assert cache["resid_post", 0].shape == (2, 8, 16)


def test_lasting_caching_hooks(small_model, tokens):
    model = small_model()
    cache = model.add_caching_hooks(lambda name: name.endswith("hook_z"))
    assert cache == {}
    model(tokens)
    assert set(cache) == {"blocks.0.attn.hook_z", "blocks.1.attn.hook_z"}
    model.reset_hooks()
    assert not any(point.fwd_hooks for point in model.hook_points())


def test_permanent_hooks_outlive_a_reset(small_model, tokens):
    model = small_model()
    baseline = model(tokens)
    model.add_perma_hook("hook_embed", lambda x, hook: x * 0.5)
    model.add_hook("hook_embed", lambda x, hook: x + 1.0)
    model.reset_hooks()
    halved = model.run_with_hooks(tokens)
    assert not torch.equal(halved, baseline)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(tokens), baseline)


# --------------------------------------------------------------------------------------------------
# switches


@pytest.mark.parametrize("option", ["plain", "abstopk", "together", "sinks"])
@pytest.mark.parametrize("switch", ["attn_result", "hook_mlp_in"])
def test_switches_that_only_lay_open_keep_every_bit(small_model, tokens, option, switch):
    model = small_model(option)
    baseline = model(tokens)
    getattr(model, f"set_use_{switch}")(True)
    assert torch.equal(model(tokens), baseline)
    getattr(model, f"set_use_{switch}")(False)
    assert torch.equal(model(tokens), baseline)


@pytest.mark.parametrize("option", ["plain", "sinks", "concat", "layer_norm"])
@pytest.mark.parametrize("switch", ["attn_in", "split_qkv_input"])
def test_streams_per_head_compute_the_same(small_model, tokens, option, switch):
    model = small_model(option)
    baseline = model(tokens)
    getattr(model, f"set_use_{switch}")(True)
    torch.testing.assert_close(model(tokens), baseline, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_split_inputs_reach_one_head_of_one_kind(small_model, tokens, letter):
    model = small_model()
    model.set_use_split_qkv_input(True)

    def edit(x, hook):
        assert x.shape == (2, 8, 4, 16)
        x[:, :, 2] += torch.randn(16)
        return x

    _, before = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[(f"blocks.0.hook_{letter}_input", edit)]):
        _, after = model.run_with_cache(tokens)
    for other in "qkv":
        name = f"blocks.0.attn.hook_{other}"
        same = (before[name] == after[name]).all(-1).all(0).all(0).tolist()
        assert same == [True, True, other != letter, True]
    assert torch.equal(before["blocks.0.hook_resid_pre"], after["blocks.0.hook_resid_pre"])


def test_attn_in_reaches_one_head_in_all_three(small_model, tokens):
    model = small_model()
    model.set_use_attn_in(True)

    def edit(x, hook):
        x[:, :, 0] = 0.5
        return x

    _, before = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_in", edit)]):
        _, after = model.run_with_cache(tokens)
    for letter in "qkv":
        name = f"blocks.1.attn.hook_{letter}"
        same = (before[name] == after[name]).all(-1).all(0).all(0).tolist()
        assert same == [False, True, True, True]


def test_mlp_in_reaches_the_mlp_alone(small_model, tokens):
    model = small_model()
    model.set_use_hook_mlp_in(True)
    _, before = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_in", lambda x, hook: x.mul_(-1.0))]):
        _, after = model.run_with_cache(tokens)
    assert torch.equal(before["blocks.0.hook_resid_mid"], after["blocks.0.hook_resid_mid"])
    assert not torch.equal(before["blocks.0.hook_mlp_out"], after["blocks.0.hook_mlp_out"])
    change = after["blocks.0.hook_resid_post"] - before["blocks.0.hook_resid_post"]
    delta = after["blocks.0.hook_mlp_out"] - before["blocks.0.hook_mlp_out"]
    torch.testing.assert_close(change, delta, atol=1e-5, rtol=0)


def test_the_two_input_switches_exclude_each_other(small_model):
    model = small_model()
    model.set_use_attn_in(True)
    with pytest.raises(ValueError, match=r"call model.set_use_attn_in\(False\) first"):
        model.set_use_split_qkv_input(True)
    model.set_use_attn_in(False)
    model.set_use_split_qkv_input(True)
    with pytest.raises(ValueError, match=r"call model.set_use_split_qkv_input\(False\) first"):
        model.set_use_attn_in(True)


def test_there_is_no_grouped_query_attention_to_ungroup(small_model):
    small_model().set_ungroup_grouped_query_attention(False)
    with pytest.raises(ValueError, match="no grouped query attention"):
        small_model().set_ungroup_grouped_query_attention(True)


def test_a_module_put_in_a_hook_points_place_is_used(small_model, tokens):
    """As SAELens and auto-circuit do: the pattern they return must enter z."""

    class Halve(torch.nn.Module):
        def forward(self, x):
            return x / 2

    model = small_model("no_bias")
    _, before = model.run_with_cache(tokens, names_filter="blocks.0.attn.hook_z")
    model.blocks[0].attn.hook_pattern = Halve()
    _, after = model.run_with_cache(tokens, names_filter="blocks.0.attn.hook_z")
    half = before["blocks.0.attn.hook_z"] / 2
    torch.testing.assert_close(after["blocks.0.attn.hook_z"], half, atol=1e-6, rtol=1e-5)
