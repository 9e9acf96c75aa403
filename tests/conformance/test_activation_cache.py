"""Every helper of ActivationCache: parts add up, and equal TransformerLens' own if it has any."""

import contextlib
import functools

import pytest
import torch

from tests.conformance.models import OPTIONS, build, every_option, expressible, theirs
from tl_sparse import compat

TOKENS = torch.tensor([[1, 5, 12, 9], [1, 20, 7, 5]])
PLACES = [(0, False), (0, True), (1, False), (1, True), (2, False)]
WRITES = "AbsTopK selects from the sum of heads or neurons: each gets its part of what was kept"
STREAM = "ReLU on the stream makes channels zero: each part is what is left of it at that layer"
WEIGHTS = "norm weights cannot be folded into sparse matrices, so apply_ln multiplies with them"
BIGRAM = f"{WEIGHTS}; logit_attrs_outside_stream has what the bigram table adds"


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@functools.cache
def run(option):
    model = build(option)
    return model, *model.run_with_cache(TOKENS)


@functools.cache
def pair(option):
    """(our cache, theirs) where norm weights are 1: the only ones that TransformerLens applies."""
    model = build(option)
    for name, parameter in model.named_parameters():
        if "ln" in name:
            parameter.data.fill_(1.0 if name.endswith("w") else 0.0)
    return model.run_with_cache(TOKENS)[1], theirs(model).run_with_cache(TOKENS)[1]


def same_rows(ours, theirs, tolerance=1e-5):
    """Equal rows under equal labels; theirs may have an empty row for positions more."""
    (a, labels), (b, their_labels) = ours, theirs
    rows = [i for i, label in enumerate(their_labels) if label in labels]
    assert [their_labels[i] for i in rows] == labels
    assert {their_labels[i] for i in range(len(b)) if i not in rows} <= {"pos_embed"}
    close(a, b[rows], tolerance)


def split_claim(claim, utility, option):
    """AbsTopK and ReLU break what TransformerLens takes a write, and the stream, to be."""
    why = {"abstopk_writes": WRITES, "paper": WRITES, "residual_relu": STREAM}.get(option)
    claim(utility, option, "right" if why else "unchanged", why or "")


def stream(cache, layer, mlp_input=False):
    if layer == 2:
        return cache["resid_post", 1]
    return cache["resid_mid" if mlp_input else "resid_pre", layer]


def norm_at(model, layer, mlp_input):
    if layer == 2:
        return model.ln_final
    return model.blocks[layer].ln2 if mlp_input else model.blocks[layer].ln1


def kept(cache, write):
    """Channels that AbsTopK left in a write: those in which it is not zero."""
    return cache[write] != 0


# --------------------------------------------------------------------------------------------------

STREAM_HELPERS = {
    "accumulated_resid", "decompose_resid", "compute_head_results", "stack_head_results",
    "get_neuron_results", "stack_neuron_results", "get_full_resid_decomposition",
    "apply_ln_to_stack", "logit_attrs", "stack_activation",
}  # fmt: skip
MAPPING = {"keys", "values", "items", "to", "toggle_autodiff", "remove_batch_dim",
           "apply_slice_to_batch_dim"}  # fmt: skip
STATE_SPACE = {"ssm_layers", "compute_ssm_effective_attention", "compute_ssm_state"}


def test_every_helper_of_the_cache_is_classified():
    """A new one fails here until a test says what it gives on our models."""
    helpers = {name for name in dir(compat.ActivationCache) if not name.startswith("_")}
    known = STREAM_HELPERS | MAPPING
    assert known <= helpers <= known | STATE_SPACE | {"logit_lens"}


@every_option
def test_accumulated_streams_are_the_cached_ones(claim, option):
    claim("ActivationCache.accumulated_resid", option, "unchanged")
    model, _, cache = run(option)
    whole, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    for row, (layer, mid) in zip(whole, PLACES, strict=True):
        assert torch.equal(row, stream(cache, layer, mid))
    part = cache.accumulated_resid(1, mlp_input=True, pos_slice=(1, 3))
    assert torch.equal(part, whole[[0, 2, 3], :, 1:3])
    normed = cache.accumulated_resid(apply_ln=True)
    close(normed, torch.stack([model.ln_final(stream(cache, i)) for i in range(3)]))
    if expressible(option):
        ours, other = pair(option)
        for arguments in ({"apply_ln": True, "incl_mid": True}, {"layer": 1, "pos_slice": -1}):
            close(ours.accumulated_resid(**arguments), other.accumulated_resid(**arguments))


@every_option
def test_embeddings_and_writes_add_up_to_the_stream(claim, option):
    why = STREAM if option == "residual_relu" else ""
    claim("ActivationCache.decompose_resid", option, "right" if why else "unchanged", why)
    _, _, cache = run(option)
    for layer, mlp_input in PLACES:
        parts, labels = cache.decompose_resid(layer, mlp_input, return_labels=True)
        close(parts.sum(0), stream(cache, layer, mlp_input))
        assert len(labels) == len(parts)
        # positions are a part only where they are added to the stream
        assert ("pos_embed" in labels) == (option == "standard")
    writes = [cache.decompose_resid(mode=mode, incl_embeds=False) for mode in ("attn", "mlp")]
    assert [len(rows) for rows in writes] == [2, 2]
    if option != "residual_relu":
        close(writes[0], cache.stack_activation("attn_out"))
        close(writes[1], cache.stack_activation("mlp_out"))
    if expressible(option):
        ours, other = pair(option)
        for arguments in ({"apply_ln": True}, {"layer": 1, "mlp_input": True, "pos_slice": 2}):
            arguments |= {"return_labels": True}
            same_rows(ours.decompose_resid(**arguments), other.decompose_resid(**arguments))


@every_option
@pytest.mark.parametrize("computed", ["by the cache", "by the model"])
def test_head_results_are_what_each_head_adds_to_the_write(claim, option, computed):
    for helper in ("stack_head_results", "compute_head_results"):
        split_claim(claim, f"ActivationCache.{helper}", option)
    model = build(option)
    model.set_use_attn_result(computed == "by the model")
    _, cache = model.run_with_cache(TOKENS)
    stacked, labels = cache.stack_head_results(return_labels=True)
    assert labels == model.all_head_labels()
    if computed == "by the cache":
        assert "blocks.0.attn.hook_result" not in cache
        cache.compute_head_results()
    for layer, block in enumerate(model.blocks):
        write = f"blocks.{layer}.hook_attn_out"
        z, attn = cache["z", layer], block.attn
        results = torch.einsum("bphe,hed->bphd", z, attn.W_O)
        if option in ("abstopk_writes", "paper"):
            heads = model.cfg.n_heads
            results = (results + attn.b_O / heads) * kept(cache, write)[:, :, None]
            close(results.sum(2), cache[write])
        close(cache["result", layer], results)
        rows = [i for i, label in enumerate(labels) if label.startswith(f"L{layer}")]
        rows = stacked[rows].movedim(0, 2)
        if option == "residual_relu":  # what later layers left of it
            results = results * (rows != 0)
        close(rows, results)
    whole = cache.stack_head_results(1, incl_remainder=True, pos_slice=(0, 2))
    close(whole.sum(0), stream(cache, 1)[:, :2])
    assert (cache.stack_head_results(1, pos_slice=(0, 2)) == whole[:-1]).all()
    if expressible(option):
        ours, other = pair(option)
        for arguments in ({"apply_ln": True, "incl_remainder": True}, {"layer": 1, "pos_slice": 3}):
            close(ours.stack_head_results(**arguments), other.stack_head_results(**arguments))


@every_option
def test_neuron_results_are_what_each_neuron_adds_to_the_write(claim, option):
    for helper in ("get_neuron_results", "stack_neuron_results"):
        split_claim(claim, f"ActivationCache.{helper}", option)
    model, _, cache = run(option)
    direction = torch.randn(16, 3)
    for layer, block in enumerate(model.blocks):
        write = f"blocks.{layer}.hook_mlp_out"
        results = cache["post", layer][..., None] * block.mlp.W_out
        bias = block.mlp.b_out.expand(2, 4, -1)
        if option in ("abstopk_writes", "paper"):
            selected = kept(cache, write)
            results, bias = results * selected[:, :, None], bias * selected
        found = cache.get_neuron_results(layer)
        close(found, results)
        close(found.sum(2) + bias, cache[write])
        some = cache.get_neuron_results(layer, neuron_slice=[3, 7], pos_slice=2)
        close(some, results[:, 2, [3, 7]])
        projected = cache.get_neuron_results(layer, project_output_onto=direction)
        close(projected, results @ direction)
    stacked, labels = cache.stack_neuron_results(2, return_labels=True)
    assert labels == [f"L{layer}N{n}" for layer in range(2) for n in range(24)]
    if option != "residual_relu":
        close(stacked[24:].movedim(0, 2), results)
    whole = cache.stack_neuron_results(1, incl_remainder=True)
    close(whole.sum(0), stream(cache, 1))
    read = cache.stack_neuron_results(2, apply_ln=True)
    close(cache.stack_neuron_results(2, apply_ln=True, project_output_onto=direction),
          read @ direction, 1e-4)  # fmt: skip
    if expressible(option):
        ours, other = pair(option)
        for arguments in ({"apply_ln": True, "incl_remainder": True}, {"neuron_slice": (2, 5)},
                          {"apply_ln": True, "project_output_onto": direction}):  # fmt: skip
            close(ours.stack_neuron_results(2, **arguments),
                  other.stack_neuron_results(2, **arguments), 1e-4)  # fmt: skip


@every_option
@pytest.mark.parametrize("expand_neurons", [True, False])
def test_the_full_decomposition_adds_up_to_the_stream(claim, option, expand_neurons):
    split_claim(claim, "ActivationCache.get_full_resid_decomposition", option)
    _, _, cache = run(option)
    direction = torch.randn(16, 2)
    for layer, mlp_input in PLACES:
        parts, labels = cache.get_full_resid_decomposition(
            layer, mlp_input, expand_neurons, return_labels=True
        )
        assert len(parts) == len(labels)
        close(parts.sum(0), stream(cache, layer, mlp_input), 2e-5)
    projected = cache.get_full_resid_decomposition(
        expand_neurons=expand_neurons, project_output_onto=direction, pos_slice=(1, 4)
    )
    close(projected, parts[:, :, 1:] @ direction, 2e-5)
    if expressible(option):
        ours, other = pair(option)
        for apply_ln in (True, False):
            arguments = {"expand_neurons": expand_neurons, "apply_ln": apply_ln}
            same_rows(
                ours.get_full_resid_decomposition(**arguments, return_labels=True),
                other.get_full_resid_decomposition(**arguments, return_labels=True),
            )


# --------------------------------------------------------------------------------------------------
# norms and logits


@every_option
def test_normalised_parts_add_up_to_what_the_norm_gives_out(claim, option):
    claim("ActivationCache.apply_ln_to_stack", option, "right", WEIGHTS)
    model, _, cache = run(option)
    for layer, mlp_input in PLACES:
        norm = norm_at(model, layer, mlp_input)
        parts = cache.get_full_resid_decomposition(layer, mlp_input)
        read = cache.apply_ln_to_stack(parts, layer, mlp_input).sum(0)
        bias = norm.b if norm.b is not None else 0.0
        close(read + bias, norm(stream(cache, layer, mlp_input)), 2e-5)
    one = cache.apply_ln_to_stack(parts[:, :, 1:3], pos_slice=(1, 3), batch_slice=1)
    close(one, cache.apply_ln_to_stack(parts)[:, 1, 1:3])
    if expressible(option):
        ours, other = pair(option)
        stack = torch.randn(3, 2, 4, 16)
        for arguments in ({}, {"layer": 1, "mlp_input": True}, {"layer": 0}, {"batch_slice": 1}):
            close(ours.apply_ln_to_stack(stack, **arguments),
                  other.apply_ln_to_stack(stack, **arguments))  # fmt: skip


def quietly(option):
    """The reminder that a bigram table adds to the logits past the stream."""
    if OPTIONS[option].get("bigram_table"):
        return pytest.warns(UserWarning, match="bigram table adds to the logits")
    return contextlib.nullcontext()


@every_option
def test_attributions_to_parts_add_up_to_the_logits(claim, option):
    bigram = OPTIONS[option].get("bigram_table")
    claim("ActivationCache.logit_attrs", option, "right", BIGRAM if bigram else WEIGHTS)
    _, logits, cache = run(option)
    parts = cache.get_full_resid_decomposition()
    each = torch.tensor([4, 9])
    cells = torch.tensor([[4, 9, 3, 8], [7, 7, 5, 6]])
    wanted = {4: logits[..., 4], "w7": logits[..., 7], each: logits[[0, 1], :, each],
              cells: logits.gather(-1, cells[..., None])[..., 0]}  # fmt: skip
    for tokens, expected in wanted.items():
        with quietly(option):
            direct = cache.logit_attrs(parts, tokens).sum(0)
        beside = cache.logit_attrs_outside_stream(tokens).sum(0)
        close(direct + beside, expected, 3e-5)
    with quietly(option):
        last = cache.logit_attrs(parts[:, :, -1], each, each + 1, pos_slice=-1).sum(0)
    beside = cache.logit_attrs_outside_stream(each, each + 1, pos_slice=-1).sum(0)
    expected = logits[[0, 1], -1, each] - logits[[0, 1], -1, each + 1]
    close(last + beside, expected, 3e-5)
    if expressible(option):
        ours, other = pair(option)
        stack = torch.randn(3, 2, 4, 16)
        for arguments in ((4,), (4, 9), (cells,), (cells, cells.flip(0)), ("w5", "w6")):
            close(ours.logit_attrs(stack, *arguments), other.logit_attrs(stack, *arguments), 3e-5)


@every_option
def test_the_logit_lens_ends_in_the_models_logits(claim, option):
    utility = "ActivationCache.logit_lens"
    if OPTIONS[option].get("bigram_table"):
        claim(utility, option, "right", "every layer's entry has the bigram row of its token added")
    else:
        claim(utility, option, "unchanged")
    if not hasattr(compat.ActivationCache, "logit_lens"):
        pytest.skip("TransformerLens has it from 4 on")
    model, logits, cache = run(option)
    result = cache.logit_lens(positions=(0, 4), return_type="logits")
    values = result.values if hasattr(result, "values") else result
    close(values[-1], logits, 2e-5)
    normed = model.ln_final(cache["resid_pre", 1])
    expected = normed @ model.W_U + model.b_U
    if OPTIONS[option].get("bigram_table"):
        expected = expected + cache["hook_bigram"]
    close(values[1], expected, 2e-5)


# --------------------------------------------------------------------------------------------------
# the cache as a mapping


@every_option
def test_activations_are_stacked_over_layers(claim, option):
    claim("ActivationCache.stack_activation", option, "unchanged")
    _, _, cache = run(option)
    for name, full in (
        ("z", "attn.hook_z"),
        ("scale", "ln1.hook_scale"),
        ("post", "mlp.hook_post"),
    ):
        arguments = (-1, "ln1") if name == "scale" else ()
        both = cache.stack_activation(name, *arguments)
        close(both, torch.stack([cache[f"blocks.{i}.{full}"] for i in range(2)]), 0)
    assert len(cache.stack_activation("pattern", 1)) == 1
    if expressible(option):
        ours, other = pair(option)
        for name in ("q", "k", "v", "z", "pattern", "attn_out", "mlp_out", "resid_mid"):
            close(ours.stack_activation(name), other.stack_activation(name))


@every_option
def test_the_cache_is_a_mapping_that_can_be_sliced_and_moved(claim, option):
    claim("ActivationCache[…], slicing, remove_batch_dim, to", option, "unchanged")
    model, _, cache = run(option)
    assert set(cache.keys()) == set(model.matching(lambda name: True))
    for name, value in cache.items():
        assert torch.equal(cache[name], value)
    assert len(list(cache.values())) == len(cache)
    for key, name in ((("q", 0), "blocks.0.attn.hook_q"), ("embed", "hook_embed"),
                      (("scale", 1, "ln2"), "blocks.1.ln2.hook_scale")):  # fmt: skip
        assert torch.equal(cache[key], cache[name])
    second = cache.apply_slice_to_batch_dim(slice(1, 2))
    close(second.get_full_resid_decomposition(), cache.get_full_resid_decomposition()[:, 1:])
    one = model.run_with_cache(TOKENS[:1])[1]
    batched = one.get_full_resid_decomposition()
    bare = one.remove_batch_dim()
    assert bare["resid_post", 1].shape == (4, 16)
    close(bare.get_full_resid_decomposition(), batched[:, 0])
    close(bare.stack_head_results(1), batched[: model.cfg.n_heads, 0] * 0
          + cache.stack_head_results(1)[:, 0])  # fmt: skip
    assert bare.to("cpu")["resid_post", 1].device.type == "cpu"


@every_option
def test_there_are_no_state_space_layers(claim, option):
    why = "the model has no state space layers"
    claim("ActivationCache.compute_ssm_state, …effective_attention", option, "refused", why)
    _, _, cache = run(option)
    if not hasattr(cache, "ssm_layers"):
        pytest.skip("TransformerLens has it from 3 on")
    assert cache.ssm_layers() == []
    for helper in ("compute_ssm_state", "compute_ssm_effective_attention"):
        with pytest.raises(RuntimeError, match="No SSM mixer layers"):
            getattr(cache, helper)()
        with pytest.raises(TypeError, match=r"has no .*SSM mixer"):
            getattr(cache, helper)(0)


def test_autodiff_is_toggled(claim):
    claim("ActivationCache.toggle_autodiff", "any", "unchanged")
    _, _, cache = run("plain")
    try:
        cache.toggle_autodiff(False)
        assert not torch.is_grad_enabled()
    finally:
        cache.toggle_autodiff(True)
    assert torch.is_grad_enabled()
