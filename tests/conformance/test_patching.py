"""Every function of transformer_lens.patching, on every model option."""

import functools
from itertools import product

import pytest
import torch
from transformer_lens import patching

from tests.conformance.models import OPTIONS, build, every_option, expressible, reference
from tl_sparse import compat

# sweep → (activation, how an index after the layer addresses it [batch, ...])
BLOCK, HEAD, HEAD_BY_POS = "pos", "head", "pos head"
PATTERN, PATTERN_BY_POS, PATTERN_CELL = "pattern", "pattern pos", "pattern dest src"
SWEEPS = {
    "get_act_patch_resid_pre": ("resid_pre", BLOCK),
    "get_act_patch_resid_mid": ("resid_mid", BLOCK),
    "get_act_patch_attn_out": ("attn_out", BLOCK),
    "get_act_patch_mlp_out": ("mlp_out", BLOCK),
    "get_act_patch_attn_head_pattern_all_pos": ("pattern", PATTERN),
    "get_act_patch_attn_head_pattern_by_pos": ("pattern", PATTERN_BY_POS),
    "get_act_patch_attn_head_pattern_dest_src_pos": ("pattern", PATTERN_CELL),
    **{f"get_act_patch_attn_head_{x}_all_pos": (x, HEAD) for x in "qkv"},
    **{f"get_act_patch_attn_head_{x}_by_pos": (x, HEAD_BY_POS) for x in "qkv"},
    "get_act_patch_attn_head_out_all_pos": ("z", HEAD),
    "get_act_patch_attn_head_out_by_pos": ("z", HEAD_BY_POS),
}
TOGETHER = {
    "get_act_patch_block_every": ("resid_pre", "attn_out", "mlp_out"),
    "get_act_patch_attn_head_all_pos_every": tuple(
        f"attn_head_{x}_all_pos" for x in ("out", "q", "k", "v", "pattern")
    ),
    "get_act_patch_attn_head_by_pos_every": tuple(
        f"attn_head_{x}_by_pos" for x in ("out", "q", "k", "v", "pattern")
    ),
}
# tested with tools.analysis, which they were a part of below 4
DIRECT_PATH = {"get_act_patch_direct_path", "get_act_patch_direct_path_all_sources"}
# They see tensors and indices, never a model.
MODEL_FREE = {
    "make_df_from_ranges", "layer_pos_patch_setter", "layer_pos_head_vector_patch_setter",
    "layer_head_vector_patch_setter", "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter", "layer_head_dest_src_pos_pattern_patch_setter",
}  # fmt: skip
OTHER = {"generic_activation_patch", "PatchingResult"}

CLEAN = torch.tensor([[1, 5, 12]])
CORRUPTED = torch.tensor([[1, 9, 12]])


def metric(logits):
    return (logits[0, -1, 4] - logits[0, -1, 7]).double().detach()


def test_every_function_of_the_module_is_classified():
    """A new one fails here until a test says what it gives on our models."""
    functions = {
        name
        for name, value in vars(patching).items()
        if not name.startswith("_")
        if isinstance(value, functools.partial)
        or getattr(value, "__module__", "") == patching.__name__
    }
    assert functions <= SWEEPS.keys() | TOGETHER.keys() | DIRECT_PATH | MODEL_FREE | OTHER
    assert functions >= SWEEPS.keys() | TOGETHER.keys() | MODEL_FREE


def by_hand(model, corrupted, cache, activation, addressing):
    """The sweep, written out: every cell of every layer set to its clean value, one at a time."""
    n, heads = corrupted.shape[1], model.cfg.n_heads
    sizes = {
        BLOCK: (n,), HEAD: (heads,), HEAD_BY_POS: (n, heads), PATTERN: (heads,),
        PATTERN_BY_POS: (heads, n), PATTERN_CELL: (heads, n, n),
    }[addressing]  # fmt: skip
    batch = (slice(None), slice(None)) if addressing == HEAD else (slice(None),)
    result = torch.zeros(model.cfg.n_layers, *sizes)
    for layer, *index in product(range(model.cfg.n_layers), *map(range, sizes)):
        name = compat.tl_utils.get_act_name(activation, layer)

        def patch(x, hook, where=(*batch, *index), name=name):
            x = x.clone()
            x[where] = cache[name][where]
            return x

        logits = model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)])
        result[(layer, *index)] = metric(logits)
    return result


@every_option
@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweeps_equal_patching_by_hand_and_transformer_lens_own_model(claim, option, sweep):
    """With gradients on, as in a notebook where nobody turned them off."""
    claim(f"patching.{sweep}", option, "unchanged")
    model, function = build(option), getattr(patching, sweep)
    n = 3 if sweep.endswith("all_pos") else 2
    clean, corrupted = CLEAN[:, -n:], CORRUPTED[:, -n:]
    _, cache = model.run_with_cache(clean)
    result = function(model, corrupted, cache, metric)
    expected = by_hand(model, corrupted, cache, *SWEEPS[sweep])
    assert torch.equal(result, expected)
    assert (expected != metric(model(corrupted))).any(), "patching nothing would pass"
    if expressible(option):
        model = reference(option)
        _, cache = model.run_with_cache(clean)
        if sweep.endswith("resid_mid") and not compat.HAS_HOOKED_TRANSFORMER:
            # A TransformerBridge's resid_mid is only what ln2 reads: the stream itself goes past.
            ours = build(option)
            ours.set_use_hook_mlp_in(True)
            _, cache_in = ours.run_with_cache(clean)
            result = by_hand(ours, corrupted, cache_in, "mlp_in", BLOCK)
        value = function(model, corrupted, cache, metric)
        torch.testing.assert_close(result, value, atol=1e-5, rtol=1e-5)


@every_option
@pytest.mark.parametrize("sweep", TOGETHER)
def test_sweeps_taken_together_are_the_single_ones_stacked(claim, option, sweep):
    claim(f"patching.{sweep}", option, "unchanged")
    model, function = build(option, n_layers=1), getattr(patching, sweep)
    n = 1 if "by_pos" in sweep else 2
    clean, corrupted = CLEAN[:, 1 : n + 1], CORRUPTED[:, 1 : n + 1]
    logits, cache = model.run_with_cache(clean)
    result = function(model, corrupted, cache, metric)
    parts = [
        getattr(patching, f"get_act_patch_{name}")(model, corrupted, cache, metric)
        for name in TOGETHER[sweep]
    ]
    if "by_pos" in sweep:  # patterns come as [layer, head, pos], the others as [layer, pos, head]
        parts[-1] = parts[-1].transpose(1, 2)
    assert torch.equal(result, torch.stack(parts))
    into_itself = function(model, clean, cache, metric)
    assert (into_itself == metric(logits).to(result.dtype)).all(), "a bit of the logits changed"


@every_option
def test_generic_patch_takes_cells_from_a_data_frame(claim, option):
    claim("patching.generic_activation_patch", option, "unchanged")
    model = build(option)
    _, cache = model.run_with_cache(CLEAN)
    cells = patching.make_df_from_ranges([2, 3], ["layer", "pos"]).iloc[[4, 1]]
    result, index = patching.generic_activation_patch(
        model, CORRUPTED, cache, metric, patching.layer_pos_patch_setter, "resid_mid",
        index_df=cells, return_index_df=True,
    )  # fmt: skip
    whole = by_hand(model, CORRUPTED, cache, "resid_mid", BLOCK)
    assert torch.equal(result, torch.stack([whole[1, 1], whole[0, 1]]))
    assert index is cells


@every_option
def test_patching_every_resid_pre_restores_all_clean_logits(claim, option):
    names = ["blocks.0.hook_resid_pre"]
    if OPTIONS[option].get("bigram_table"):
        why = "the bigram table reads the tokens, not the stream: patch hook_bigram as well"
        claim("patching all of resid_pre", option, "right", why)
        names.append("hook_bigram")
    else:
        claim("patching all of resid_pre", option, "unchanged")
    model = build(option)
    corrupted = CORRUPTED.clone()
    corrupted[0, -1] = 20  # the token whose row of a bigram table is added at the end
    logits, cache = model.run_with_cache(CLEAN)
    patches = [(name, lambda x, hook: cache[hook.name]) for name in names]
    assert torch.equal(model.run_with_hooks(corrupted, fwd_hooks=patches), logits)
    if len(patches) == 2:
        assert not torch.equal(model.run_with_hooks(corrupted, fwd_hooks=patches[:1]), logits)


@every_option
def test_per_example_results_are_the_sweeps_of_each_example(claim, option):
    claim("patching.PatchingResult", option, "unchanged")
    if compat.HAS_HOOKED_TRANSFORMER:
        pytest.skip("TransformerLens has it from 4 on")
    model = build(option)
    clean = torch.tensor([[1, 5, 12], [1, 6, 20]])
    corrupted = torch.tensor([[1, 9, 12], [1, 17, 20]])

    def each(logits):
        return logits[:, -1, 4] - logits[:, -1, 7]

    _, cache = model.run_with_cache(clean)
    sweep = patching.get_act_patch_attn_out
    result = sweep(model, corrupted, cache, each, reduce="none", baseline=True)
    unpatched = each(model(corrupted))
    assert torch.equal(result.baseline, unpatched)
    torch.testing.assert_close(result.mean(), sweep(model, corrupted, cache, each, reduce="mean"))
    for i in range(2):
        _, one = model.run_with_cache(clean[i : i + 1])
        alone = sweep(model, corrupted[i : i + 1], one, lambda logits: each(logits)[0])
        torch.testing.assert_close(result.values[..., i], alone, atol=1e-5, rtol=1e-5)
        effect = alone - unpatched[i]
        torch.testing.assert_close(result.effect()[..., i], effect, atol=1e-5, rtol=1e-5)
    whole = result.normalized(each(model(clean)))
    assert whole.shape == (2, 3, 2)
    assert len(result.to_dataframe()) == 12
