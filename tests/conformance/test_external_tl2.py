"""auto-circuit and circuit-tracer, unchanged, on TransformerLens 2, with which they stayed.

``make test-tl2`` sets up an environment that has all three. auto-circuit replaces the modules at
hook points; circuit-tracer replaces MLPs and freezes attention patterns and norm scales.
"""

import importlib.util

import pytest
import torch

from tests.conformance.models import SMALL, build
from tl_sparse.model.legacy_aliases import install_legacy_aliases

CLEAN = torch.tensor([[1, 5, 6, 7, 9], [1, 3, 16, 7, 9]])
CORRUPT = torch.tensor([[1, 5, 8, 4, 9], [1, 13, 16, 7, 9]])


def needs(package):
    missing = importlib.util.find_spec(package.replace("-", "_")) is None
    reason = f"{package} is not installed: `make test-tl2` sets up an environment that has it"
    return pytest.mark.skipif(missing, reason=reason)


# --------------------------------------------------------------------------------------------------
# auto-circuit


def patchable(option):
    from auto_circuit.utils.graph_utils import patchable_model

    model = build(option)
    for switch in ("attn_result", "split_qkv_input", "hook_mlp_in"):
        getattr(model, f"set_use_{switch}")(True)
    logits = [model(tokens)[:, -1].detach() for tokens in (CLEAN, CORRUPT)]
    return patchable_model(model, True, slice_output="last_seq", separate_qkv=True), *logits


def prompts():
    from auto_circuit.data import PromptDataLoader, PromptDataset

    answers = [torch.tensor([11])] * 2, [torch.tensor([14])] * 2
    pairs = PromptDataset(list(CLEAN), list(CORRUPT), *answers)
    return PromptDataLoader(pairs, seq_len=None, diverge_idx=0, batch_size=2, shuffle=False)


@needs("auto-circuit")
@pytest.mark.parametrize(
    "option", ["plain", "sinks", "bigram", "concat", "abstopk_writes", "paper"]
)
def test_auto_circuits_empty_circuit_is_the_corrupt_run_and_its_full_one_the_clean(claim, option):
    claim("auto-circuit EAP, run_circuits", option, "unchanged")
    from auto_circuit.prune import run_circuits
    from auto_circuit.prune_algos.edge_attribution_patching import (
        edge_attribution_patching_prune_scores,
    )
    from auto_circuit.types import AblationType, PatchType

    with install_legacy_aliases():
        model, clean, corrupt = patchable(option)
        batches = prompts()
        scores = edge_attribution_patching_prune_scores(model, batches, None)
        runs = run_circuits(
            model, batches, [0, model.n_edges], scores,
            patch_type=PatchType.TREE_PATCH, ablation_type=AblationType.RESAMPLE,
        )  # fmt: skip
    assert sum(score.abs().sum() for score in scores.values()) > 0.1
    (empty,), (full,) = runs[0].values(), runs[model.n_edges].values()
    assert (clean - corrupt).abs().max() > 0.1
    assert torch.equal(full, clean)
    torch.testing.assert_close(empty, corrupt, atol=1e-5, rtol=1e-5)


@needs("auto-circuit")
@pytest.mark.parametrize("option", ["plain", "paper"])
def test_auto_circuits_two_ways_to_edge_attribution_agree(claim, option):
    claim("auto-circuit mask gradients", option, "unchanged")
    from auto_circuit.prune_algos.edge_attribution_patching import (
        edge_attribution_patching_prune_scores,
    )
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores

    model, *_ = patchable(option)
    by_hooks = edge_attribution_patching_prune_scores(model, prompts(), None)
    by_masks = mask_gradient_prune_scores(
        model, prompts(), None, grad_function="logit", answer_function="avg_diff", mask_val=0.0
    )
    assert by_hooks.keys() == by_masks.keys()
    for name, scores in by_hooks.items():
        torch.testing.assert_close(scores, by_masks[name], atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# circuit-tracer


def transcoders():
    """A random transcoder a layer, without decoder bias, from what an MLP reads to its write."""
    from circuit_tracer.transcoder.single_layer_transcoder import (
        SingleLayerTranscoder,
        TranscoderSet,
    )

    generator, layers, where = torch.Generator().manual_seed(0), {}, torch.device("cpu")
    for layer in range(SMALL["n_layers"]):
        transcoder = SingleLayerTranscoder(
            SMALL["d_model"], 20, torch.relu, layer, device=where, dtype=torch.float32
        )
        with torch.no_grad():
            for parameter in (transcoder.W_enc, transcoder.W_dec, transcoder.b_enc):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        layers[layer] = transcoder
    return TranscoderSet(layers, "mlp.hook_in", "mlp.hook_out")


def traceable(ours):
    """Our model with circuit-tracer's methods mixed in, and the same weights."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import (
        TransformerLensReplacementModel,
    )

    from tl_sparse import SparseTransformer

    class Traceable(TransformerLensReplacementModel, SparseTransformer):
        def _deduplicate_attention_buffers(self):
            """Layers share no mask: ours is made anew at each call."""

    model = Traceable(ours.config, ours.tokenizer)
    model.load_state_dict(ours.state_dict())
    model.eval()._configure_replacement_model(transcoders())
    return model


@needs("circuit-tracer")
@pytest.mark.parametrize("option", ["plain", "sinks", "bigram", "abstopk_inside", "abstopk_writes"])
def test_circuit_tracers_graph_accounts_for_the_whole_logit(claim, option):
    """Without biases, the effects of all nodes on a logit add up to it, less the mean logit."""
    if option == "bigram":
        why = "the bigram table reads the token itself, so its row is in no edge of the graph"
        claim("circuit-tracer attribute", option, "right", why)
    else:
        claim("circuit-tracer attribute", option, "unchanged")
    from circuit_tracer.attribution.attribute import attribute

    ours = build(option, use_bias=False)
    ours.unembed.b_U.zero_()
    model, tokens = traceable(ours), CLEAN[0]
    model.zero_positions = slice(0, 0)  # by default the first position's MLPs are no nodes
    logits, cache = ours.run_with_cache(tokens[None])
    torch.testing.assert_close(model(tokens[None]), logits, atol=1e-5, rtol=1e-5)
    graph = attribute(tokens, model, max_n_logits=3, batch_size=16)
    targets = [target.vocab_idx for target in graph.logit_targets]
    effects = graph.adjacency_matrix[-len(targets) :].sum(1)
    wanted = logits[0, -1].detach()
    if option == "bigram":
        wanted = wanted - cache["hook_bigram"][0, -1].detach()
    expected = (wanted - wanted.mean())[targets]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(effects, expected, atol=1e-4, rtol=1e-4)


@needs("circuit-tracer")
@pytest.mark.parametrize("option", ["plain", "abstopk_inside"])
def test_circuit_tracers_intervention_on_a_feature_moves_the_mlps_write(claim, option):
    claim("circuit-tracer feature_intervention", option, "unchanged")
    ours = build(option)
    model, tokens = traceable(ours), CLEAN[0]
    _, activations = model.get_activations(tokens)
    position = 3
    feature = int(activations[1, position].argmax())
    value = float(activations[1, position, feature])
    assert value > 0
    changed, _ = model.feature_intervention(tokens, [(1, position, feature, 0.0)])
    direction = model.transcoders[1].W_dec[feature].detach()

    def remove(x, hook):
        x = x.clone()
        x[:, position] -= value * direction
        return x

    expected = ours.run_with_hooks(tokens[None], fwd_hooks=[("blocks.1.hook_mlp_out", remove)])
    assert (expected - ours(tokens[None])).abs().max() > 1e-2
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-4)
