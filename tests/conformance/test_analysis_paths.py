"""TransformerLens' direct path patching, on every option; and edges beside a GPT-2 bridge's."""

import pytest
import torch
from transformer_lens.tools import analysis

from tests.conformance.models import OPTIONS, build, every_option, expressible, theirs
from tests.conformance.pairs import (
    CLEAN,
    CORRUPTED,
    NO_SUM,
    SUM,
    caches,
    double,
    edge_config,
    metric,
)
from tl_sparse import compat

DIRECT = "get_act_patch_direct_path"
ALL_SOURCES = f"{DIRECT}_all_sources"
DROPS = "AbsTopK acts on the sum of the heads, so a head does not write z @ W_O"
LINEAR = "before 4, TransformerLens leaves out the norm's weight, LayerNorm's centring and AbsTopK"


def claim_direct_path(claim, option):
    density = OPTIONS[option].get("activation_density", {})
    for name in (DIRECT, ALL_SOURCES):
        utility = f"tools.analysis.{name}"
        if option == SUM:
            claim(utility, option, "refused", NO_SUM)
        elif "attn_out" in density:
            claim(utility, option, "refused", DROPS)
        elif compat.HAS_HOOKED_TRANSFORMER:
            claim(utility, option, "refused", LINEAR)
        else:
            claim(utility, option, "unchanged")


def direct_path(model, component, source=(0, 1)):
    clean, corrupted = caches(model)
    function = getattr(analysis, DIRECT)
    return function(
        model, CORRUPTED, clean, corrupted, metric, *source, component=component, verbose=False
    )


def path_by_hand(model, component, source=(0, 1)):
    """The path through layer 1's q, k or v, each recomputed from a stream with the difference."""
    clean, corrupted = caches(model)
    layer, head = source
    z, block = f"blocks.{layer}.attn.hook_z", model.blocks[1]
    difference = (clean[z] - corrupted[z])[:, :, head] @ model.W_O[layer, head]
    stream = corrupted["blocks.1.hook_resid_pre"]
    places = corrupted["hook_pos_concat"] if model.config.concat_positions else None
    which = "qkv".index(component)

    def project(stream):
        read = block.read(block.ln1, getattr(block, "ln1_pos", None), stream, places)
        return block.attn.project(read, read, read)[which]

    before, after = project(stream), project(stream + difference)
    topk = getattr(block.attn, f"topk_{component}")
    result = torch.zeros(2, model.cfg.n_heads)
    for reader in range(model.cfg.n_heads):
        mixed = before.clone()
        mixed[:, :, reader] = after[:, :, reader]
        value = block.attn.sparsify(topk, mixed)
        patches = [(f"blocks.1.attn.hook_{component}", lambda x, hook, value=value: value)]
        result[1, reader] = metric(model.run_with_hooks(CORRUPTED, fwd_hooks=patches)).item()
    return result


@every_option
@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_paths_equal_recomputing_what_the_head_reads_or_are_refused(
    claim, option, component
):
    claim_direct_path(claim, option)
    model = double(option)
    density = model.config.activation_density
    if option == SUM:
        match = "not the sum of what heads and MLPs write"
    elif density.attn_out < 1:
        match = "a head does not write z @ W_O"
    elif compat.HAS_HOOKED_TRANSFORMER and option == "layer_norm":
        match = "centre the difference"
    elif compat.HAS_HOOKED_TRANSFORMER and density.attn_in < 1:
        match = "AbsTopK at attn_in is not linear"
    elif compat.HAS_HOOKED_TRANSFORMER:
        match = "leaves out the norm's weight"
    else:
        result = direct_path(model, component)
        torch.testing.assert_close(
            result, path_by_hand(model, component), atol=1e-6, rtol=0
        )  # fmt: skip
        assert (result[1] - metric(model(CORRUPTED)).item()).abs().max() > 1e-3
        return
    with pytest.raises(ValueError, match=match) as error:
        direct_path(model, component)
    if option != SUM:
        assert "hook_result" in str(error.value), "it says what to do instead"


@every_option
def test_all_sources_are_the_single_sources_stacked(claim, option):
    claim_direct_path(claim, option)
    model = build(option)
    function = getattr(analysis, ALL_SOURCES)
    arguments = (model, CORRUPTED, *caches(model), metric)
    if (
        option == SUM
        or compat.HAS_HOOKED_TRANSFORMER
        or model.config.activation_density.attn_out < 1
    ):
        with pytest.raises(
            ValueError, match=r"not the sum|direct path patching would give a wrong"
        ):
            function(*arguments, verbose=False)
        return
    result = function(*arguments, verbose=False)
    for head in range(model.cfg.n_heads):
        assert torch.equal(result[0, head], direct_path(model, "q", (0, head)))
    assert (result[1] == 0).all(), "nothing is downstream of the last layer"


UNIT = "norm weights 1"


def unit_norms(model):
    with torch.no_grad():
        for block in model.blocks:
            block.ln1.w.fill_(1.0)
    return model


@pytest.mark.parametrize("option", ["plain", "sinks", "bigram", "concat", "standard", "tied",
                                    "wide_heads"])  # fmt: skip
@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_below_4_direct_paths_are_linearised_where_norms_have_no_weight(claim, option, component):
    """Equal to patching what the head reads while its norm's scale stays the corrupted run's."""
    claim(f"tools.analysis.{DIRECT} ({UNIT})", option, "unchanged")
    if not compat.HAS_HOOKED_TRANSFORMER:
        pytest.skip("from 4 on, TransformerLens' is exact whatever the weights")
    model = unit_norms(build(option))
    result = direct_path(model, component)
    clean, corrupted = caches(model)
    difference = (clean["blocks.0.attn.hook_z"] - corrupted["blocks.0.attn.hook_z"])[:, :, 1]
    difference = difference @ model.W_O[0, 1]
    scale = corrupted["blocks.1.ln1.hook_scale"][:, :, None]
    model.set_use_split_qkv_input(True)
    for reader in range(model.cfg.n_heads):

        def add(x, hook, reader=reader):
            x[:, :, reader] += difference
            return x

        patches = [
            (f"blocks.1.hook_{component}_input", add),
            ("blocks.1.ln1.hook_scale", lambda x, hook: scale.expand_as(x)),
        ]
        expected = metric(model.run_with_hooks(CORRUPTED, fwd_hooks=patches)).item()
        assert float(result[1, reader]) == pytest.approx(expected, abs=1e-5)
    model.set_use_split_qkv_input(False)
    if expressible(option):
        reference = direct_path(theirs(model), component)
        torch.testing.assert_close(result, reference, atol=1e-5, rtol=0)


@pytest.mark.skipif(not compat.HAS_HOOKED_TRANSFORMER, reason="before 4 only")
@pytest.mark.parametrize("site", ["attn_q", "attn_k", "attn_v"])
def test_below_4_a_path_into_a_sparsified_projection_is_refused(site):
    model = unit_norms(build(activation_density={site: 0.5}))
    for component in "qkv":
        if site == f"attn_{component}":
            with pytest.raises(ValueError, match=f"AbsTopK at {site} is not linear"):
                direct_path(model, component)
        else:
            direct_path(model, component)


def test_only_tl_s_own_direct_path_hooks_are_stopped():
    model = build("abstopk_writes")

    def _make_direct_path_hook():
        return lambda x, hook: x

    model.run_with_hooks(CLEAN, fwd_hooks=[("blocks.1.attn.hook_q", _make_direct_path_hook())])


@pytest.mark.parametrize("site", ["resid_post_attn", "resid_post_mlp"])
def test_abstopk_on_the_stream_refuses_every_tool_that_follows_edges(site):
    edges = edge_config()
    model = build(activation_density={site: 0.5})
    calls = [
        lambda: analysis.attribution_patch(model, CLEAN, CORRUPTED, metric, edges),
        lambda: analysis.faithfulness(model, CLEAN, CORRUPTED, metric, []),
        lambda: direct_path(model, "q"),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=f"AbsTopK at {site} drops channels of the residual stream"
        ):
            call()


# --------------------------------------------------------------------------------------------------
# TransformerLens' own model that has these hooks: GPT-2 (its native bridge has not)


def gpt2(model):
    """TransformerLens' bridge of a GPT-2 with our layer_norm model's weights."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    config, ours = model.config, model.tl_parameters()
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.d_vocab, n_positions=config.n_ctx, n_embd=config.d_model,
            n_layer=config.n_layers, n_head=config.n_heads, n_inner=config.d_mlp,
            activation_function="gelu", layer_norm_epsilon=1e-5, tie_word_embeddings=False,
        )
    )  # fmt: skip
    state = {
        "transformer.wte.weight": ours["embed.W_E"],
        "transformer.wpe.weight": torch.zeros(config.n_ctx, config.d_model),
        "transformer.ln_f.weight": ours["ln_final.w"],
        "transformer.ln_f.bias": ours["ln_final.b"],
        "lm_head.weight": ours["unembed.W_U"].T,
    }
    same = {
        "ln_1.weight": "ln1.w", "ln_1.bias": "ln1.b", "ln_2.weight": "ln2.w", "ln_2.bias": "ln2.b",
        "mlp.c_fc.weight": "mlp.W_in", "mlp.c_fc.bias": "mlp.b_in",
        "mlp.c_proj.weight": "mlp.W_out", "mlp.c_proj.bias": "mlp.b_out",
        "attn.c_proj.bias": "attn.b_O",
    }  # fmt: skip
    for i in range(config.n_layers):
        layer, block = f"transformer.h.{i}.", f"blocks.{i}."
        state |= {layer + name: ours[block + own] for name, own in same.items()}
        weights = [ours[f"{block}attn.W_{x}"].transpose(0, 1).flatten(1) for x in "QKV"]
        biases = [ours[f"{block}attn.b_{x}"].flatten() for x in "QKV"]
        state[f"{layer}attn.c_attn.weight"] = torch.cat(weights, dim=1)
        state[f"{layer}attn.c_attn.bias"] = torch.cat(biases)
        state[f"{layer}attn.c_proj.weight"] = ours[f"{block}attn.W_O"].flatten(0, 1)
    theirs.load_state_dict(state)
    bridge = build_bridge_from_module(theirs, "GPT2LMHeadModel", hf_config=theirs.config)
    return bridge.eval()


def test_edges_and_paths_are_those_of_tl_s_bridge_of_a_gpt2_with_these_weights(claim):
    for utility in ("attribution_patch, edges", "faithfulness", DIRECT, ALL_SOURCES):
        claim(f"tools.analysis.{utility}", "layer_norm", "unchanged")
    edges = edge_config()
    model = build("layer_norm")
    model.unembed.b_U.zero_()  # GPT-2 has none
    reference = gpt2(model)
    torch.testing.assert_close(model(CLEAN), reference(CLEAN), atol=1e-5, rtol=0)
    ours, expected = (
        analysis.attribution_patch(each, CLEAN, CORRUPTED, metric, edges)
        for each in (model, reference)
    )
    assert ours.edge_scores == pytest.approx(expected.edge_scores, abs=1e-5)
    assert ours.node_scores == pytest.approx(expected.node_scores, abs=1e-5)
    circuit = expected.top_edges(60)
    ours, expected = (
        analysis.faithfulness(each, CLEAN, CORRUPTED, metric, circuit)
        for each in (model, reference)
    )
    # a recovered fraction is a difference of metrics over their gap of 0.2
    assert ours.recovered == pytest.approx(expected.recovered, abs=5e-5)
    assert ours.edge_class_recovered == pytest.approx(expected.edge_class_recovered, abs=5e-5)
    assert ours.edge_class_counts == expected.edge_class_counts
    for component in "qkv":
        paths, expected = (
            getattr(analysis, ALL_SOURCES)(
                each, CORRUPTED, *caches(each), metric, component=component, verbose=False
            )
            for each in (model, reference)
        )
        torch.testing.assert_close(paths, expected, atol=1e-5, rtol=0)
