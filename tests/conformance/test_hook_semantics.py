"""Looking changes no bit of the logits, editing takes effect, at every hook point."""

import math

import pytest
import torch

# --------------------------------------------------------------------------------------------------
# looking changes nothing: the bits of the logits


def nothing(x, hook):
    return None


def same(x, hook):
    return x


def clone(x, hook):
    return x.clone()


READERS = [nothing, same, clone]


def read_every_way(model, tokens, baseline):
    names = model.matching(lambda name: True)
    for i, name in enumerate(names):
        reader = READERS[i % 3]
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, reader)])
        assert torch.equal(logits, baseline), f"{reader.__name__} at {name} changed the logits"
    for reader in READERS:
        logits = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, reader)])
        assert torch.equal(logits, baseline), f"{reader.__name__} everywhere changed the logits"
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, baseline)
    assert set(cache.keys()) == set(names)
    return cache


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_reading_hooks_keep_every_bit_of_the_logits(small_model, tokens, option, mode):
    model = small_model(option).train(mode == "train")
    with torch.set_grad_enabled(mode == "train"):
        baseline = model(tokens)
        model.set_use_attn_result(True)
        model.set_use_hook_mlp_in(True)
        read_every_way(model, tokens, baseline)


@pytest.mark.parametrize("switch", ["attn_in", "split_qkv_input"])
@pytest.mark.parametrize("option", ["plain", "together"])
def test_reading_keeps_the_bits_with_streams_per_head(small_model, tokens, option, switch):
    model = small_model(option)
    getattr(model, f"set_use_{switch}")(True)
    with torch.no_grad():
        read_every_way(model, tokens, model(tokens))


@pytest.mark.parametrize("option", ["plain", "together", "abstopk"])
def test_reading_keeps_the_bits_of_a_padded_batch(small_model, tokens, option):
    model = small_model(option)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    baseline = model(tokens, attention_mask=mask)
    logits, _ = model.run_with_cache(tokens, attention_mask=mask)
    assert torch.equal(logits, baseline)


@pytest.mark.parametrize("option", ["plain", "sinks", "together"])
def test_a_padded_batch_shows_and_passes_back_only_finite_numbers(small_model, tokens, option):
    """A padding token attends to itself: an empty softmax row would be NaN."""
    model = small_model(option)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    _, cache = model.run_with_cache(tokens, attention_mask=mask, return_type="loss", incl_bwd=True)
    for name, value in cache.items():
        scores = name.endswith("hook_attn_scores")  # -inf where nothing may be attended to
        assert not value.isnan().any(), name
        assert scores or value.isfinite().all(), name


def test_gradients_of_a_hooked_and_an_unhooked_run_agree(small_model, tokens, option):
    model = small_model(option, zeros=0.5)
    model(tokens, return_type="loss").backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for switches in ([], ["attn_result", "hook_mlp_in"]):
        for switch in switches:
            getattr(model, f"set_use_{switch}")(True)
        model.zero_grad()
        model.run_with_hooks(
            tokens, return_type="loss", fwd_hooks=[(lambda name: True, clone)]
        ).backward()
        hooked = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert hooked.keys() == plain.keys()
        for name, grad in hooked.items():
            torch.testing.assert_close(grad, plain[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_kept_zero_passes_the_same_gradient_through_hook_result(small_model, tokens):
    """AbsTopK keeps zeros where a write has too few others; they are no less kept for that."""
    model = small_model("abstopk", use_bias=False)
    model.blocks[0].attn.W_O.data[:, :, 3:] = 0.0  # fewer nonzero channels than AbsTopK keeps
    grads = []
    for switch in (False, True):
        model.set_use_attn_result(switch)
        model.zero_grad()
        model(tokens, return_type="loss").backward()
        grads.append(model.blocks[0].attn.W_O.grad.clone())
    assert (grads[0][:, :, 3:] != 0).any()
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# editing takes effect


def perturbation(x):
    return 0.7 * torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(9))


def by_return(x, hook):
    out = x.clone()
    out[0] = out[0] + perturbation(x)
    return out


def in_place(x, hook):
    x[0] += perturbation(x)


def by_data(x, hook):
    x.data[0] += perturbation(x)


EDITED = [
    ("together", 2, ("attn_result", "hook_mlp_in")),
    ("plain", 1, ("attn_result", "hook_mlp_in", "attn_in")),
    ("together", 1, ("attn_result", "split_qkv_input")),
    *((option, 1, ()) for option in ("plain", "sinks", "standard", "layer_norm", "relu")),
]


@pytest.mark.parametrize(("option", "layers", "switches"), EDITED)
@torch.no_grad()
def test_editing_takes_effect_at_every_hook_point(small_model, tokens, option, layers, switches):
    model = small_model(option, n_layers=layers)
    for switch in switches:
        getattr(model, f"set_use_{switch}")(True)
    baseline = model(tokens)
    names = model.matching(lambda name: True)
    # all of them but those that another switch would turn on
    off = {name.rpartition(".")[2] for name in model.hook_dict if name not in names}
    assert off <= {"hook_result", "hook_mlp_in", "hook_attn_in", "hook_q_input", "hook_k_input",
                   "hook_v_input", "hook_tokens"}  # fmt: skip
    for name in names:
        results = []
        for edit in (by_return, in_place, by_data):
            logits = model.run_with_hooks(tokens, fwd_hooks=[(name, edit)])
            assert not torch.equal(logits[0], baseline[0]), f"{edit.__name__} at {name} is inert"
            assert torch.equal(logits[1], baseline[1]), f"{name}: an edit of row 0 reached row 1"
            results.append(logits)
        assert torch.equal(results[0], results[1]), name
        assert torch.equal(results[0], results[2]), name


@pytest.mark.parametrize("option", ["plain", "together", "residual_relu", "relu"])
def test_in_place_edits_do_not_break_the_backward_pass(small_model, tokens, option):
    model = small_model(option, n_layers=1)
    model.set_use_attn_result(True)
    for name in model.matching(lambda name: True):
        grads = []
        for edit in (by_return, in_place):
            model.zero_grad()
            model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(name, edit)]).backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("option", ["plain", "sinks", "abstopk", "together"])
@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
def test_an_edit_of_scores_or_pattern_equals_the_explicit_computation(
    small_model, tokens, option, point
):
    model = small_model(option)
    attn, at = model.blocks[1].attn, "blocks.1.attn"
    change = torch.rand(attn.W_Q.shape[0], 8, 8) + 0.5
    edit = (f"{at}.{point}", lambda x, hook: x * change)
    with torch.no_grad(), model.hooks(fwd_hooks=[edit]):
        _, cache = model.run_with_cache(tokens)
        q, k, v = (cache[f"{at}.hook_{name}"] for name in "qkv")
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(model.config.d_head)
        scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
        if point == "hook_attn_scores":
            scores = scores * change
        weight = scores.exp()
        sink = attn.sinks.exp()[:, None, None] if model.config.use_attention_sinks else 0.0
        pattern = weight / (weight.sum(-1, keepdim=True) + sink)
        if point == "hook_pattern":
            pattern = pattern * change
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
    torch.testing.assert_close(cache[f"{at}.hook_pattern"], pattern, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache[f"{at}.hook_z"], z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ["plain", "sinks", "together"])
@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores", "hook_result", "hook_z"])
def test_gradient_of_a_gate_at_one_is_the_finite_difference(small_model, tokens, option, point):
    model = small_model(option).to(torch.float64)
    model.set_use_attn_result(True)
    heads = model.config.n_heads
    # pattern and scores: [batch, head, dest, src]; result and z: [batch, pos, head, ...]
    shape = (heads, 1, 1) if point in ("hook_pattern", "hook_attn_scores") else (heads, 1)
    offset = torch.randn(heads, 8, 8, dtype=torch.float64)

    def gated(x, gate):
        if point == "hook_attn_scores":  # masked scores are -inf, which no gate can multiply
            return x + (gate - 1) * offset
        return x * gate

    def loss(gate):
        hook = (f"blocks.0.attn.{point}", lambda x, hook: gated(x, gate.view(shape)))
        return model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[hook])

    gate = torch.ones(heads, dtype=torch.float64, requires_grad=True)
    value = loss(gate)
    value.backward()
    assert torch.equal(value, model(tokens, return_type="loss"))
    step = 1e-6
    for head in range(heads):
        move = torch.zeros(heads, dtype=torch.float64)
        move[head] = step
        difference = (loss(gate.detach() + move) - loss(gate.detach() - move)) / (2 * step)
        torch.testing.assert_close(gate.grad[head], difference.detach(), atol=1e-6, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# hook_result


def test_head_results_add_up_to_the_blocks_write(small_model, tokens, option):
    model = small_model(option)
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(tokens)
    for layer in range(2):
        total = cache[f"blocks.{layer}.attn.hook_result"].sum(2)
        if model.config.activation_density.attn_out == 1:
            total = total + model.blocks[layer].attn.b_O
        torch.testing.assert_close(total, cache[f"blocks.{layer}.hook_attn_out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", ["plain", "abstopk"])
def test_removing_a_heads_result_removes_it_from_the_write(small_model, tokens, option):
    model = small_model(option)
    model.set_use_attn_result(True)

    def drop(result, hook):
        result[:, :, 1] = 0.0
        return result

    _, before = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_result", drop)]):
        _, after = model.run_with_cache(tokens)
    out, result = "blocks.0.hook_attn_out", "blocks.0.attn.hook_result"
    torch.testing.assert_close(after[out], before[out] - before[result][:, :, 1], atol=1e-5, rtol=0)
