from dataclasses import replace
from html import escape

import pytest
import torch

from tests.circuits.test_circuit import hand_made
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import circuit_edges, circuit_equations, compile_circuit
from tl_sparse.circuits.compiled import check
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.tasks import TaskBatch

TOPK = "abstopk"
MORE = {
    "layer norm and AbsTopK": (TOPK, {"normalization_type": "LN"}),
    "standard positions and AbsTopK": (TOPK, {"positional_embedding_type": "standard"}),
    "concatenated positions and AbsTopK": (
        TOPK, {"positional_embedding_type": "concat", "d_pos": 4}
    ),
    "no norm and AbsTopK": (TOPK, {"normalization_type": "none"}),
    "sinks and AbsTopK": (TOPK, {"use_attention_sinks": True}),
    "layer norm, standard positions, sinks": (
        "layer_norm", {"positional_embedding_type": "standard", "use_attention_sinks": True}
    ),
}  # fmt: skip
UNSUPPORTED = ("abstopk_resid", "residual_relu")


@pytest.fixture
def prompts(random_tokens):
    """Prompts of several lengths with the answers 3 and 4."""
    generator = torch.Generator().manual_seed(6)
    tokens = random_tokens[:24, :8]
    last = torch.randint(2, 8, (24,), generator=generator)
    answer = torch.randint(3, 5, (24,), generator=generator)
    texts = ("",) * 24
    return TaskBatch(tokens, last, answer, 7 - answer, texts, texts)


@torch.no_grad()
def masked(model, circuit, tokens):
    return model.run_with_hooks(tokens, return_type="logits", fwd_hooks=circuit.hooks())


def assert_same_logits(model, circuit, prompts):
    """At every position and at the last ones, for all tokens."""
    compiled = compile_circuit(circuit, model, prompts, token_ids=range(model.config.n_logits))
    expected = masked(model, circuit, prompts.tokens)
    scale = max(1.0, float(expected.abs().max()))
    assert compiled.max_deviation <= 1e-5 * scale
    torch.testing.assert_close(compiled(prompts.tokens), expected, rtol=0, atol=1e-5 * scale)
    rows = torch.arange(len(prompts))
    torch.testing.assert_close(
        compiled(prompts.tokens, prompts.last), expected[rows, prompts.last],
        rtol=0, atol=1e-5 * scale,
    )  # fmt: skip
    return compiled


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_logits_are_the_masked_models(option, share, small_model, random_tokens, prompts):
    model = small_model(option, zeros=0.6)
    circuit = hand_made(model, random_tokens, share)
    if option in UNSUPPORTED:
        with pytest.raises(ValueError, match="only where the stream is a plain sum"):
            compile_circuit(circuit, model, prompts)
    else:
        assert_same_logits(model, circuit, prompts)


@pytest.mark.parametrize(("share", "zeros"), [(0.15, 0.0), (0.5, 0.8)])
@pytest.mark.parametrize("name", list(MORE))
def test_logits_are_the_masked_models_with_more_options(
    name, share, zeros, small_model, random_tokens, prompts
):
    option, changes = MORE[name]
    model = small_model(option, zeros=zeros, **changes)
    assert_same_logits(model, hand_made(model, random_tokens, share), prompts)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("option", ["plain", "layer_norm", "together"])
def test_no_node_and_all_nodes_are_circuits_too(option, share, small_model, random_tokens, prompts):
    model = small_model(option)
    compiled = assert_same_logits(model, hand_made(model, random_tokens, share), prompts)
    assert len(compiled.nodes) == share * NodeIndex.of(model).n_nodes


@pytest.mark.parametrize("site", ["attn_q", "attn_k", "attn_v", "mlp_neuron", "attn_out"])
def test_a_site_may_be_ablated_whole(site, small_model, random_tokens, prompts):
    for option in ("sinks", "together"):
        model = small_model(option)
        circuit = hand_made(model, random_tokens, 0.6)
        kept = circuit.kept.clone()
        for layer in range(2):
            kept[circuit.index.slices[circuit.index.hook(layer, site)]] = False
        assert_same_logits(model, replace(circuit, kept=kept), prompts)


def test_sites_outside_the_node_universe_are_kept_whole(small_model, random_tokens, prompts):
    model = small_model("together")
    circuit = hand_made(model, random_tokens, 0.3, sites=("attn_v", "mlp_neuron"))
    compiled = assert_same_logits(model, circuit, prompts)
    assert len(compiled.nodes) > circuit.n_nodes


@pytest.mark.parametrize("option", ["plain", "together"])
def test_hooks_show_the_kept_channels_of_the_full_model(
    option, small_model, random_tokens, prompts
):
    model = small_model(option)
    circuit = hand_made(model, random_tokens, 0.5)
    compiled = compile_circuit(circuit, model, prompts)
    with model.hooks(fwd_hooks=circuit.hooks()):
        _, expected = model.run_with_cache(prompts.tokens)
    _, cache = compiled.run_with_cache(prompts.tokens)
    assert {"attn_in", "attn_q", "attn_v", "attn_out", "mlp_neuron"} <= set(compiled.nodes["site"])
    for hook, nodes in compiled.nodes.groupby("hook"):
        assert nodes["place"].tolist() == list(range(len(nodes)))
        full = expected[hook].flatten(2)[..., nodes["channel"].tolist()]
        assert full.abs().max() > 0
        torch.testing.assert_close(cache[hook], full, rtol=1e-4, atol=1e-5)
    name = "blocks.1.ln1.hook_scale"
    torch.testing.assert_close(cache[name], expected[name], rtol=1e-5, atol=1e-6)
    attention = compiled.blocks[0].attn
    pattern = expected["blocks.0.attn.hook_pattern"][:, list(attention.heads)]
    torch.testing.assert_close(cache["blocks.0.attn.hook_pattern"], pattern, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("site", ["attn_in", "mlp_neuron"])
def test_an_intervention_does_the_same_in_both(site, small_model, random_tokens, prompts):
    model = small_model("plain")
    circuit = hand_made(model, random_tokens, 0.5)
    compiled = compile_circuit(circuit, model, prompts)
    nodes = compiled.nodes
    node = nodes[(nodes["layer"] == 0) & (nodes["site"] == site)].iloc[1]

    def put(place):
        def hook_function(x, hook):
            x = x.clone()
            x[..., place] = 3.0
            return x

        return [(node["hook"], hook_function)]

    found = compiled.run_with_hooks(prompts.tokens, fwd_hooks=put(int(node["place"])))
    expected = model.run_with_hooks(
        prompts.tokens, return_type="logits", fwd_hooks=circuit.hooks() + put(int(node["channel"]))
    )[..., compiled.token_ids]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - compiled(prompts.tokens)).abs().max() > 1e-3


def test_heads_without_queries_and_keys_have_no_pattern(small_model, random_tokens, prompts):
    model = small_model("sinks")
    circuit = hand_made(model, random_tokens, 0.7)
    kept = circuit.kept.clone()
    for site in ("attn_q", "attn_k"):
        head_0 = circuit.index.slices[circuit.index.hook(0, site)].start
        kept[head_0 : head_0 + model.config.d_head] = False
    compiled = assert_same_logits(model, replace(circuit, kept=kept), prompts)
    assert compiled.blocks[0].attn.heads == tuple(range(1, model.config.n_heads))
    assert 0 in (compiled.nodes.query("layer == 0 and site == 'attn_v'")["channel"] // 4).tolist()


def known(model, chain, random_tokens):
    circuit = hand_made(model, random_tokens, nodes=chain)
    return replace(circuit, edges=circuit_edges(model, circuit.index, circuit.kept))


def test_a_known_circuit_is_six_nodes(planted, marks, random_tokens):
    model, chain = planted()
    circuit = known(model, chain, random_tokens)
    batch = marks.batch(32, split="held_out", seed=0)
    compiled = compile_circuit(circuit, model, batch)
    names = compiled.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None)
    assert set(names) == chain
    assert compiled.n_weights == circuit.n_edges == 4
    assert compiled.tracked == (0, 1, 2)
    assert compiled.token_ids.tolist() == sorted(
        {*batch.correct_token.tolist(), *batch.incorrect_token.tolist()}
    )
    expected = task_logit_diffs(model, batch, circuit.hooks())
    torch.testing.assert_close(compiled.logit_diffs(batch), expected, rtol=0, atol=1e-4)
    assert "6 nodes, 4 weights, 3 stream channels, 2 logits" in repr(compiled)


def test_equations_name_what_the_nodes_are_made_of(planted, marks, random_tokens):
    model, chain = planted()
    compiled = compile_circuit(
        known(model, chain, random_tokens), model, marks.batch(8, split="held_out", seed=0)
    )
    frame = circuit_equations(compiled)
    formulas = {
        (site, channel): formula
        for site, channel, formula in zip(
            frame["site"], frame["channel"], frame["formula"], strict=True
        )
    }
    assert formulas["attn_in", 0] == "1*stream[0] / scale"
    assert formulas["attn_v", 1] == "1*L0.attn_in[0]"
    assert formulas["attn_out", 1].endswith("4*attend[0](L0.attn_v[1])")
    assert formulas["mlp_neuron", 5] == "gelu(8 + 1*L1.mlp_in[1])"
    assert formulas["mlp_out", 2].startswith("-24")
    assert formulas["mlp_out", 2].endswith("3*L1.mlp_neuron[5]")
    assert formulas["stream", 2] == "embed[2] + L1.mlp_out[2]"
    assert formulas["logit", 3] == "(table[token] + 25*stream[2]) / scale"
    assert formulas["logit", 4] == "(table[token] + -25*stream[2]) / scale"


@pytest.mark.parametrize("option", ["together", "layer_norm", "standard"])
def test_every_option_has_equations(option, small_model, random_tokens, prompts):
    model = small_model(option)
    compiled = compile_circuit(hand_made(model, random_tokens, 0.4), model, prompts)
    frame = circuit_equations(compiled)
    assert len(frame) == len(compiled.nodes) + len(compiled.tracked) + 2
    assert (frame["formula"].str.startswith("AbsTopK(").any()) == (option == "together")
    assert frame["formula"].str.contains("mean").any() == (option == "layer_norm")
    for formula in frame["formula"]:  # in full: pandas would cut after fifty letters
        assert formula in repr(frame)
        assert escape(formula, quote=False) in frame.head(len(frame))._repr_html_()


def test_inexact_topk_is_refused_unless_tolerated(small_model, random_tokens, prompts):
    model = small_model("abstopk")
    circuit = hand_made(model, random_tokens, 0.5)
    with pytest.raises(ValueError, match=r"deviate by up to .* of 24 prompts.*raise `tolerance`"):
        compile_circuit(circuit, model, prompts, exact_topk=False)
    compiled = compile_circuit(circuit, model, prompts, exact_topk=False, tolerance=10.0)
    found = compiled(prompts.tokens, prompts.last)
    expected = masked(model, circuit, prompts.tokens)[torch.arange(24), prompts.last]
    deviation = (found - expected[:, compiled.token_ids]).abs().max()
    assert compiled.max_deviation == pytest.approx(float(deviation), rel=1e-4)
    assert deviation > 1e-3


def test_a_compiled_circuit_that_is_off_is_noticed(small_model, random_tokens, prompts):
    model = small_model("plain")
    circuit = hand_made(model, random_tokens, 0.5)
    compiled = compile_circuit(circuit, model, prompts)
    with torch.no_grad():
        compiled.blocks[1].mlp.out.bias += 0.1
        with pytest.raises(ValueError, match="deviate"):
            check(compiled, circuit, model, prompts, tolerance=1e-5)
        compiled.W_U.fill_(float("nan"))
        with pytest.raises(ValueError, match="deviate"):
            check(compiled, circuit, model, prompts, tolerance=1e-5)


def test_bad_arguments_are_refused(small_model, dense_model, random_tokens, prompts):
    model = small_model("plain")
    circuit = hand_made(model, random_tokens)
    with pytest.raises(ValueError, match="token_ids must be between 0 and"):
        compile_circuit(circuit, model, prompts, token_ids=[3, 10_000])
    compiled = compile_circuit(circuit, model, prompts, token_ids=[3])
    with pytest.raises(ValueError, match=r"token 4 is not among .*\[3\]"):
        compiled.logit_diffs(prompts)
    with pytest.raises(ValueError, match="exceed the context"):
        compiled(torch.zeros(1, model.config.n_ctx + 1, dtype=torch.int64))
    other = small_model("plain", zeros=0.5)
    assert fingerprint(other) != fingerprint(model)
    with pytest.raises(ValueError, match="another model"):
        compile_circuit(circuit, other, prompts)
    with pytest.raises(TypeError, match="only a SparseTransformer"):
        compile_circuit(circuit, dense_model, prompts)


def test_compiled_circuits_that_differ_in_epsilon_alone_are_different_models(
    small_model, random_tokens, prompts
):
    """With all nodes kept there are no means in which it would show."""
    models = [small_model("plain", eps=eps) for eps in (1e-5, 1e-5, 1e-2)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    found = [
        fingerprint(compile_circuit(hand_made(model, random_tokens, 1.0), model, prompts))
        for model in models
    ]
    assert found[0] == found[1] != found[2]
