"""Parts of the stream add up to it, and attributions to the logits, on every model option."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.model.cache import SparseActivationCache

STREAM = {"resid_post_attn": 0.5, "resid_post_mlp": 0.5}
BARE = {"attn_only": True, "d_mlp": None}
MORE = {
    "attn_only": ("standard", BARE),
    "attn_only_resid": ("plain", BARE | {"activation_density": {"resid_post_attn": 0.5}}),
    "no_norm": ("abstopk", {"normalization_type": "none"}),
    "layer_norm_abstopk": ("abstopk", {"normalization_type": "LN"}),
    "standard_resid": ("standard", {"activation_density": STREAM}),
}
PLACES = [(0, False), (0, True), (1, False), (1, True), (2, False)]


@pytest.fixture(params=["plain", "abstopk", "abstopk_resid", "sinks", "bigram_learned", "standard",
                        "concat", "tied", "layer_norm", "layer_norm_no_bias", "residual_relu",
                        "wide_heads", "no_bias", "together", *MORE])  # fmt: skip
def model(request, small_model):
    option, changes = MORE.get(request.param, (request.param, {}))
    return small_model(option, **changes).double()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def places(model):
    return [(layer, mid) for layer, mid in PLACES if not (mid and model.config.attn_only)]


def stream_at(cache, layer, mid):
    name = f"blocks.{layer}.hook_resid_{'mid' if mid else 'pre'}"
    return cache["blocks.1.hook_resid_post" if layer == 2 else name]


def norm_at(model, layer, mid):
    return model.ln_final if layer == 2 else getattr(model.blocks[layer], "ln2" if mid else "ln1")


def normalised(model, x, norm):
    """The norm written out anew, without its bias."""
    if model.config.normalization_type == "none":
        return x
    if model.config.normalization_type == "LN":
        return F.layer_norm(x, x.shape[-1:], norm.w, None, 1e-5)
    eps = torch.finfo(torch.float64).eps
    return x / (x**2).mean(-1, keepdim=True).add(eps).sqrt() * norm.w


@torch.no_grad()
def test_every_decomposition_adds_up_to_the_stream(model, tokens):
    _, cache = model.run_with_cache(tokens)
    assert isinstance(cache, SparseActivationCache)
    for layer, mid in places(model):
        stream = stream_at(cache, layer, mid)
        close(cache.decompose_resid(layer, mlp_input=mid).sum(0), stream)
        for expand in (True, False):
            parts, labels = cache.get_full_resid_decomposition(
                layer, mlp_input=mid, expand_neurons=expand, return_labels=True
            )
            assert len(parts) == len(labels)
            close(parts.sum(0), stream)
        both = cache.decompose_resid(layer, mlp_input=mid, mode="attn").sum(0)
        both = both + cache.decompose_resid(layer, mid, mode="mlp", incl_embeds=False).sum(0)
        close(both, stream)
        if layer and not mid:
            heads = cache.stack_head_results(layer, incl_remainder=True)
            assert len(heads) == layer * model.cfg.n_heads + 1
            close(heads.sum(0), stream)
        if (layer or mid) and not model.config.attn_only:
            close(
                cache.stack_neuron_results(layer, mlp_input=mid, incl_remainder=True).sum(0), stream
            )


@torch.no_grad()
def test_full_decomposition_is_the_stacks_of_heads_and_neurons(model, tokens):
    """The remainder hides nothing: it is embeddings, biases and what the other kind wrote."""
    _, cache = model.run_with_cache(tokens)
    parts, labels = cache.get_full_resid_decomposition(return_labels=True)
    heads, head_labels = cache.stack_head_results(return_labels=True)
    assert labels[: len(heads)] == head_labels == model.all_head_labels()
    close(parts[: len(heads)], heads)
    if not model.config.attn_only:
        neurons, neuron_labels = cache.stack_neuron_results(2, return_labels=True)
        assert neuron_labels == [f"L{i}N{n}" for i in range(2) for n in range(24)]
        assert labels[len(heads) : len(heads) + 48] == neuron_labels
        close(parts[len(heads) : len(heads) + 48], neurons)
    rest = 1 + (model.config.positional_embedding_type == "standard")
    assert labels[-1 - rest :] == [*["embed", "pos_embed"][:rest], "bias"]


@torch.no_grad()
def test_heads_and_neurons_add_up_to_their_blocks_write(model, tokens):
    _, cache = model.run_with_cache(tokens)
    cache.compute_head_results()
    for layer, block in enumerate(model.blocks):
        heads = cache["result", layer].sum(-2)
        bias = block.attn.b_O if not block.attn.topk_out.active else 0
        close(heads + bias, cache["attn_out", layer])
        if not model.config.attn_only:
            kept = (cache["mlp_out", layer] != 0) if block.mlp.topk_out.active else 1
            neurons = cache.get_neuron_results(layer)
            assert neurons.shape == (2, 8, 24, 16)
            close(neurons.sum(-2) + block.mlp.b_out * kept, cache["mlp_out", layer])


@torch.no_grad()
def test_computed_head_results_are_what_the_hook_shows(model, tokens):
    _, cache = model.run_with_cache(tokens)
    computed = cache.stack_head_results()
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(tokens)
    close(computed, cache.stack_head_results())
    shown = cache["result", 0]
    cache.compute_head_results()
    assert cache["result", 0] is shown


@torch.no_grad()
def test_normalised_parts_add_up_to_what_the_norm_gives_out(model, tokens):
    _, cache = model.run_with_cache(tokens)
    for layer, mid in places(model):
        expected = normalised(model, stream_at(cache, layer, mid), norm_at(model, layer, mid))
        close(cache.decompose_resid(layer, mid, apply_ln=True).sum(0), expected)
        parts = cache.get_full_resid_decomposition(layer, mid, apply_ln=True)
        close(parts.sum(0), expected)
        again = cache.get_full_resid_decomposition(layer, mid)
        close(cache.apply_ln_to_stack(again, layer, mid), parts)
        if layer and not mid:
            heads = cache.stack_head_results(layer, incl_remainder=True, apply_ln=True)
            close(heads.sum(0), expected)


@torch.no_grad()
def test_projecting_first_is_projecting_last(model, tokens):
    _, cache = model.run_with_cache(tokens)
    matrix = torch.randn(16, 3, dtype=torch.float64)
    for project, (layer, mid), apply_ln in itertools.product(
        (matrix, matrix[:, 0]), places(model), (False, True)
    ):
        for expand in (True, False):
            options = {"mlp_input": mid, "apply_ln": apply_ln, "expand_neurons": expand}
            parts = cache.get_full_resid_decomposition(layer, **options)
            projected = cache.get_full_resid_decomposition(
                layer, project_output_onto=project, **options
            )
            close(projected, parts @ project)
        if (layer or mid) and not model.config.attn_only:
            options = {"mlp_input": mid, "apply_ln": apply_ln, "incl_remainder": True}
            parts = cache.stack_neuron_results(layer, **options)
            projected = cache.stack_neuron_results(layer, project_output_onto=project, **options)
            close(projected, parts @ project)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this model's bigram table")
def test_attributions_and_what_is_outside_the_stream_add_up_to_the_logits(model, tokens):
    model.unembed.b_U.copy_(torch.randn(30))
    logits, cache = model.run_with_cache(tokens)
    stack = cache.get_full_resid_decomposition(expand_neurons=False)
    right, wrong = torch.randint(30, (2, 2, 8))
    every = logits.gather(-1, right[..., None])[..., 0]
    less = every - logits.gather(-1, wrong[..., None])[..., 0]

    def whole(stack, tokens, **options):
        outside = {k: v for k, v in options.items() if k != "has_batch_dim"}
        inside = cache.logit_attrs(stack, tokens, **options).sum(0)
        return inside + cache.logit_attrs_outside_stream(tokens, **outside).sum(0)

    close(whole(stack, 7), logits[..., 7])
    close(whole(stack, right), every)
    close(whole(stack, right, incorrect_tokens=wrong), less)
    close(whole(stack, right[:, 3]), logits[torch.arange(2), :, right[:, 3]])  # one an example
    close(whole(stack, right[0]), logits[:, torch.arange(8), right[0]])  # one a position
    last = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1)
    close(whole(last, right[:, -1], pos_slice=-1), every[:, -1])
    close(whole(last, right[:, -1], incorrect_tokens=wrong[:, -1], pos_slice=-1), less[:, -1])
    some = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=(2, 6))
    close(whole(some, right[:, 2:6], pos_slice=(2, 6)), every[:, 2:6])
    close(whole(stack, right[1], batch_slice=1), every[1])
    close(whole(stack, right[1:], batch_slice=[1]), every[1:])


@torch.no_grad()
def test_accumulated_streams_are_the_cached_ones_and_the_last_unembeds_to_the_logits(model, tokens):
    logits, cache = model.run_with_cache(tokens)
    streams, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    expected = [(0, False), (0, True), (1, False), (1, True), (2, False)]
    expected = [place for place in expected if place in places(model)]
    names = {(0, False): "0_pre", (0, True): "0_mid", (1, False): "1_pre", (1, True): "1_mid",
             (2, False): "final_post"}  # fmt: skip
    assert labels == [names[place] for place in expected]
    for stream, place in zip(streams, expected, strict=True):
        assert torch.equal(stream, stream_at(cache, *place))
    final = cache.accumulated_resid(apply_ln=True)[-1] @ model.W_U + model.b_U
    if model.config.bigram_table != "none":
        final = final + cache["hook_bigram"]
    close(final, logits)
    for layer, mid in places(model)[:-1]:
        read = cache.accumulated_resid(layer, mlp_input=mid, apply_ln=True)[-1]
        norm = norm_at(model, layer, mid)
        bias = getattr(norm, "b", None)
        x = normalised(model, stream_at(cache, layer, mid), norm)
        close(read, x if bias is None else x + bias)


@torch.no_grad()
@pytest.mark.parametrize("option", ["abstopk_resid", "together", "standard"])
@pytest.mark.filterwarnings("ignore:this model's bigram table")
def test_slices_of_a_cache_give_slices_of_the_answers(small_model, tokens, option):
    model = small_model(option).double()
    _, cache = model.run_with_cache(tokens)

    def answers(cache, **options):
        project = torch.arange(16.0).double()
        full = cache.get_full_resid_decomposition
        return [
            cache.decompose_resid(1, **options),
            cache.decompose_resid(apply_ln=True, **options),
            cache.accumulated_resid(apply_ln=True, **options),
            cache.stack_head_results(incl_remainder=True, apply_ln=True, **options),
            cache.stack_neuron_results(2, incl_remainder=True, apply_ln=True, **options),
            full(apply_ln=True, **options),
            full(apply_ln=True, project_output_onto=project, **options)[..., None],
            cache.logit_attrs(full(**options), 5, has_batch_dim=cache.has_batch_dim, **options)[
                ..., None
            ],
            cache.logit_attrs_outside_stream(5, **options)[..., None],
        ]

    whole = answers(cache)

    def check(answers, pick):
        for answer, expected in zip(answers, whole, strict=True):
            close(answer, pick(expected))

    check(answers(cache, pos_slice=-1), lambda x: x[:, :, -1])
    check(answers(cache, pos_slice=(1, 4)), lambda x: x[:, :, 1:4])
    check(answers(cache, pos_slice=[2, 0]), lambda x: x[:, :, [2, 0]])
    check(answers(cache.apply_slice_to_batch_dim([1])), lambda x: x[:, 1:])
    one = cache.apply_slice_to_batch_dim(1)
    assert not one.has_batch_dim
    check(answers(one), lambda x: x[:, 1])
    check(answers(one, pos_slice=3), lambda x: x[:, 1, 3])
    _, first = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    check(answers(first), lambda x: x[:, 0])
    _, last = model.run_with_cache(tokens, pos_slice=-1)
    check(answers(last), lambda x: x[:, :, -1:])
    _, single = model.run_with_cache(tokens[:1])
    check(answers(single.remove_batch_dim()), lambda x: x[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("option", ["abstopk", "together"])
def test_what_was_not_cached_is_not_needed_or_named(small_model, tokens, option):
    model = small_model(option)
    _, whole = model.run_with_cache(tokens)
    _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("attn.hook_z"))
    with pytest.raises(KeyError, match=r"'blocks.1.hook_resid_post' was not cached.*names_filter"):
        cache.stack_head_results(incl_remainder=True)
    torch.testing.assert_close(cache.stack_head_results(), whole.stack_head_results())
    _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("mlp.hook_post"))
    torch.testing.assert_close(cache.stack_neuron_results(2), whole.stack_neuron_results(2))
    with pytest.raises(KeyError, match="'hook_embed' was not cached"):
        cache.decompose_resid(0)
    with pytest.raises(KeyError, match=r"'ln_final.hook_scale' was not cached"):
        cache.stack_neuron_results(2, apply_ln=True)


@torch.no_grad()
@pytest.mark.parametrize("name", ["blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"])
def test_a_write_that_a_hook_changed_does_not_change_what_was_selected(small_model, tokens, name):
    """As in TransformerLens: a head's result is what it wrote, not what became of it."""
    model = small_model("abstopk").double()
    _, cache = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[(name, lambda x, hook: torch.ones_like(x))]):
        _, edited = model.run_with_cache(tokens)
    assert (edited[name] == 1).all()
    if name.endswith("attn_out"):
        close(edited.stack_head_results(1), cache.stack_head_results(1))
    else:
        assert (edited.get_neuron_results(0).sum(-2) == 0).sum() == (cache[name] == 0).sum()
        close(edited.get_neuron_results(0), cache.get_neuron_results(0))


@torch.no_grad()
def test_neurons_can_be_picked(small_model, tokens):
    model = small_model("abstopk").double()
    _, cache = model.run_with_cache(tokens)
    every, project = cache.get_neuron_results(1), torch.randn(16, dtype=torch.float64)
    close(cache.get_neuron_results(1, neuron_slice=[3, 9]), every[..., [3, 9], :])
    close(cache.get_neuron_results(1, neuron_slice=(2, 5), pos_slice=4), every[:, 4, 2:5])
    close(cache.get_neuron_results(1, neuron_slice=7), every[..., 7, :])
    close(cache.get_neuron_results(1, neuron_slice=7, project_output_onto=project),
          every[..., 7, :] @ project)  # fmt: skip
    stack, labels = cache.stack_neuron_results(2, neuron_slice=7, return_labels=True)
    assert labels == ["L0N7", "L1N7"]
    assert stack.shape == (2, 2, 8, 16)
    close(cache.stack_neuron_results(2, neuron_slice=[7])[1], stack[1])


@torch.no_grad()
def test_gradients_are_cached_beside_the_activations(small_model, tokens):
    model = small_model("together")
    with torch.enable_grad():
        _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    torch.testing.assert_close(
        cache.decompose_resid().sum(0), cache["resid_post", 1], atol=1e-5, rtol=0
    )
    assert cache.apply_slice_to_batch_dim(0)["hook_embed_grad"].shape == (8, 16)


@torch.no_grad()
def test_places_that_do_not_exist_are_refused(small_model, tokens):
    _, cache = small_model().run_with_cache(tokens)
    for call in (cache.decompose_resid, cache.accumulated_resid, cache.stack_head_results,
                 cache.stack_neuron_results, cache.get_full_resid_decomposition):  # fmt: skip
        with pytest.raises(ValueError, match=r"layer=3 is not in 0..2 \(None or -1: 2\)"):
            call(3)
        with pytest.raises(ValueError, match="layer=-2 is not in"):
            call(-2)
    with pytest.raises(ValueError, match=r"mlp_input=True needs a layer in 0..1"):
        cache.decompose_resid(2, mlp_input=True)
    with pytest.raises(ValueError, match="choose from all, attn, mlp"):
        cache.decompose_resid(mode="heads")
    for call in (cache.stack_head_results, cache.stack_neuron_results):
        assert call(0).shape == (0, 2, 8, 16)
        with pytest.raises(ValueError, match="nothing comes before the remainder"):
            call(0, incl_remainder=True)
    with pytest.raises(ValueError, match=r"layer=2 is not in 0..1"):
        cache.get_neuron_results(2)
    _, cache = small_model(**BARE).run_with_cache(tokens)
    for call in (cache.get_neuron_results, cache.stack_neuron_results):
        with pytest.raises(ValueError, match="has no neurons"):
            call(1)
    with pytest.raises(ValueError, match="has no MLPs"):
        cache.decompose_resid(1, mlp_input=True)


@torch.no_grad()
def test_names_that_are_not_there_name_the_nearest_or_the_switch(small_model, tokens):
    _, cache = small_model().run_with_cache(tokens)
    with pytest.raises(KeyError, match=r"did you mean .*hook_pattern"):
        cache["blocks.0.attn.hook_patern"]
    with pytest.raises(KeyError, match=r"was not cached.*set_use_attn_result\(True\)"):
        cache["result", 0]
    assert "blocks.0.attn.hook_result" not in cache
    assert torch.equal(cache["resid_post", -1], cache["blocks.1.hook_resid_post"])
    assert torch.equal(cache["act_in", 0, "attn"], cache["blocks.0.attn.hook_act_in"])


@torch.no_grad()
def test_tokens_that_do_not_fit_are_refused(small_model, tokens):
    _, cache = small_model().run_with_cache(tokens)
    stack = cache.decompose_resid()
    with pytest.raises(ValueError, match=r"tokens of shape \(3,\) fit no attributions of shape"):
        cache.logit_attrs(stack, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"must have the same shape, not \(2,\) and \(\)"):
        cache.logit_attrs(stack, torch.tensor([1, 2]), 3)
    with pytest.raises(ValueError, match="no batch dimension"):
        cache.apply_slice_to_batch_dim(0).apply_slice_to_batch_dim(0)


@torch.no_grad()
def test_activations_of_layers_are_stacked(small_model, tokens):
    _, cache = small_model().run_with_cache(tokens)
    z = cache.stack_activation("z")
    assert torch.equal(z, torch.stack([cache["z", 0], cache["z", 1]]))
    assert torch.equal(cache.stack_activation("scale", 1, "ln2")[0], cache["scale", 0, "ln2"])
    with pytest.raises(ValueError, match="no layers before it"):
        cache.stack_activation("z", 0)


@torch.no_grad()
def test_a_cache_moves_and_forgets_its_model(small_model, tokens):
    model = small_model("abstopk")
    _, cache = model.run_with_cache(tokens, device="cpu")
    assert cache.to("cpu") is cache
    assert "hook_embed" in repr(cache)
    assert len(cache) == len(list(cache.keys())) == len(list(cache.items())) == len(list(cache))
    wide = {name: value.double() for name, value in cache.items()}
    parts = SparseActivationCache(wide, model).get_full_resid_decomposition(apply_ln=True)
    assert parts.dtype == torch.float64
    cache.model = None
    assert cache["hook_embed"].shape == (2, 8, 16)
    with pytest.raises(KeyError, match="not in the cache"):
        cache["hook_nothing"]
