"""The rest of TransformerLens' tools.analysis and its training loop, on every model option.

Others' tests: test_analysis_attribution.py, test_analysis_paths.py, test_analysis_interchange.py.
"""

import importlib
import inspect
import pkgutil
import warnings

import pytest
import torch
from transformer_lens.tools import analysis

from tests.conformance.models import OPTIONS, build, every_option, expressible, theirs
from tl_sparse import compat

TOKENS = torch.tensor([[1, 5, 12, 7], [1, 9, 12, 20]])
ANSWER, OTHER = 4, 8
FROM_4 = "TransformerLens has it from 4 on"
BELOW_4 = "TransformerLens has it below 4 only"

# module → its public functions and the classes whose methods take a model
ELSEWHERE = {
    "attribution_patching": {
        "attribution_patch", "faithfulness", "cache_activation_and_gradient",
        "capture_writer_outputs", "enumerate_nodes", "enumerate_edges",
    },
    "direct_path_patching": {"get_act_patch_direct_path", "get_act_patch_direct_path_all_sources"},
    "interchange": {
        "collect_activations", "run_with_intervention", "intervened_logits", "fit_das",
        "reinitialized",
    },
}  # fmt: skip
TESTED_HERE = {
    "direct_logit_attribution": {"direct_logit_attribution"},
    "logit_lens": {"logit_lens", "logit_readout"},
    "projection_kernel": {"attention_head_subspace_affinity"},
    "svd_circuits": {"decompose_head"},
    "jacobian_lens": {"JacobianLens"},
    "backward_lens": {"BackwardLens"},
}  # fmt: skip
# They see tensors and labels, never a model of ours.
MODEL_FREE = {
    "interchange": {
        "random_basis", "mean_difference_basis", "probe_basis", "neuron_basis",
        "random_neuron_basis", "arbitrary_targets", "random_init_bridge", "LearnedSubspace",
    },
    "jacobian_lens_coordinate_patch": {
        "solve_coordinate_patch", "solve_coordinate_patch_positions",
    },
    "jacobian_lens_decomposition": {"get_sparse_decomposition", "estimate_occupancy"},
    "projection_kernel": {
        "orthonormal_subspace", "projection_kernel", "random_projection_kernel_moments",
    },
    "sparse_probing": {"fit_sparse_probe", "sweep_sparse_probe"},
}  # fmt: skip


def needs(version_4):
    if compat.HAS_HOOKED_TRANSFORMER is version_4:
        pytest.skip(FROM_4 if version_4 else BELOW_4)


def test_every_function_of_the_package_is_classified():
    """A new one fails here until a test says what it gives on our models."""
    known = {}
    for part in (ELSEWHERE, TESTED_HERE, MODEL_FREE):
        for module, names in part.items():
            known[module] = known.get(module, set()) | names
    found = set()
    for info in pkgutil.iter_modules(analysis.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{analysis.__name__}.{info.name}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "") == module.__name__
            if own and not name.startswith("_") and inspect.isfunction(value):
                assert name in known.get(info.name, set()), f"{info.name}.{name} is unclassified"
                found.add(name)
    exported = {name for name in analysis.__all__ if inspect.isfunction(getattr(analysis, name))}
    assert exported <= set().union(*known.values())
    classes = {name for name in analysis.__all__ if inspect.isclass(getattr(analysis, name))}
    takes_model = {name for name in classes if _takes_a_model(getattr(analysis, name))}
    assert takes_model <= set().union(*known.values())
    assert found, "nothing was looked at"


def _takes_a_model(cls):
    for _, method in inspect.getmembers(cls, inspect.isroutine):
        try:
            if "model" in inspect.signature(method).parameters:
                return True
        except (TypeError, ValueError):
            continue
    return False


# --------------------------------------------------------------------------------------------------
# direct logit attribution


def claim_readout(claim, utility, option):
    if OPTIONS[option].get("bigram_table"):
        claim(utility, option, "refused",
              "the bigram table's row is in the logits, not in the stream: call "
              "cache.logit_lens(), which adds it")  # fmt: skip
    else:
        claim(utility, option, "unchanged")


@every_option
@pytest.mark.parametrize("unit", ["component", "layer", "head"])
@pytest.mark.filterwarnings("ignore:this model's bigram table")
def test_attributions_and_what_is_outside_the_stream_add_up_to_the_logit(claim, option, unit):
    """TransformerLens refuses its own bridge here: it leaves out the final norm's weight."""
    claim("tools.analysis.direct_logit_attribution", option, "right",
          "the final norm's weight, which is never folded, and what AbsTopK or ReLU on a write or "
          "the stream keep of each part are taken into account; the bigram table's part is in "
          "cache.logit_attrs_outside_stream")  # fmt: skip
    model = build(option)
    function = analysis.direct_logit_attribution
    logits, cache = model.run_with_cache(TOKENS)
    result = function(model, TOKENS, ANSWER, unit=unit, pos=None)
    assert len(result.labels) == len(result.attribution)
    whole = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
    outside = cache.logit_attrs_outside_stream(ANSWER).sum(0)
    torch.testing.assert_close(whole + outside, logits[..., ANSWER], atol=1e-5, rtol=0)
    with pytest.warns() if OPTIONS[option].get("bigram_table") else warnings.catch_warnings():
        difference = function(model, None, ANSWER, OTHER, unit=unit, pos=None, cache=cache)
    other = function(model, TOKENS, OTHER, unit=unit, pos=None).attribution
    expected = result.attribution - other
    torch.testing.assert_close(difference.attribution, expected, atol=1e-5, rtol=0)
    last = function(model, TOKENS, ANSWER, unit=unit)
    torch.testing.assert_close(last.attribution, result.attribution[..., -1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("option", [option for option in OPTIONS if expressible(option)])
@pytest.mark.parametrize("unit", ["component", "layer", "head"])
def test_attributions_with_a_norm_without_weight_are_tl_s_own(claim, option, unit):
    claim("tools.analysis.direct_logit_attribution (final norm weight 1)", option, "unchanged")
    model = build(option)
    with torch.no_grad():
        model.ln_final.w.fill_(1.0)
        if model.ln_final.b is not None:
            model.ln_final.b.zero_()
    reference = theirs(model)
    if not compat.HAS_HOOKED_TRANSFORMER:
        reference.enable_compatibility_mode(no_processing=True)
    ours, expected = (
        analysis.direct_logit_attribution(each, TOKENS, ANSWER, OTHER, unit=unit)
        for each in (model, reference)
    )
    attribution = dict(zip(ours.labels, ours.attribution, strict=True))
    for label, value in zip(expected.labels, expected.attribution, strict=True):
        if label in attribution:
            torch.testing.assert_close(attribution[label], value, atol=1e-5, rtol=0)
        else:
            assert label == "pos_embed", "TransformerLens' models have a table of zeros there"
            assert not value.any()


# --------------------------------------------------------------------------------------------------
# logit lens and readout


@every_option
def test_the_lens_ends_at_the_logits(claim, option):
    claim_readout(claim, "tools.analysis.logit_lens", option)
    needs(version_4=True)
    model = build(option)
    logits, cache = model.run_with_cache(TOKENS)
    outside = 0.0
    if OPTIONS[option].get("bigram_table"):
        for source in ((model, TOKENS), (cache,)):
            with pytest.raises(ValueError, match=r"bigram table.*cache\.logit_lens"):
                analysis.logit_lens(*source, positions=None)
        result = cache.logit_lens(positions=None, incl_mid=True)
        outside = cache["hook_bigram"]
    else:
        result = analysis.logit_lens(model, TOKENS, positions=None, incl_mid=True)
    assert result.labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    torch.testing.assert_close(result.values[-1], logits, atol=1e-5, rtol=0)
    for label, values in zip(result.labels, result.values, strict=True):
        layer, place = ("1", "post") if label == "final_post" else label.split("_")
        stream = cache[f"blocks.{layer}.hook_resid_{place}"]
        read = model.ln_final(stream) @ model.W_U + model.b_U + outside
        torch.testing.assert_close(values, read, atol=1e-5, rtol=0)
    if expressible(option):
        expected = analysis.logit_lens(theirs(model), TOKENS, positions=None, incl_mid=True)
        torch.testing.assert_close(result.values, expected.values, atol=1e-5, rtol=0)


@every_option
def test_a_readout_of_any_vector_is_the_final_norm_and_unembedding(claim, option):
    claim_readout(claim, "tools.analysis.logit_readout", option)
    needs(version_4=True)
    model, vectors = build(option), torch.randn(3, 16)
    if OPTIONS[option].get("bigram_table"):
        with pytest.raises(ValueError, match="bigram table"):
            analysis.logit_readout(model, vectors)
        return
    values = analysis.logit_readout(model, vectors, targets=[4, "w8"], return_type="log_probs")
    logits = model.ln_final(vectors[None])[0] @ model.W_U + model.b_U
    expected = logits.log_softmax(-1)[:, [4, 8]]
    torch.testing.assert_close(values.values, expected, atol=1e-5, rtol=0)
    ranks = (logits[:, None] > logits[:, [4, 8], None]).sum(-1)
    assert torch.equal(values.target_ranks, ranks)


# --------------------------------------------------------------------------------------------------
# weights


@every_option
@pytest.mark.parametrize("role", ["Q", "K", "V"])
def test_head_subspaces_overlap_as_principal_angles_say(claim, option, role):
    claim("tools.analysis.attention_head_subspace_affinity", option, "unchanged")
    model = build(option)
    result = analysis.attention_head_subspace_affinity(model, target_role=role, layer_order="all")
    readers = getattr(model, f"W_{role}")
    for writer, reader in (((0, 0), (1, 1)), ((0, 1), (1, 2)), ((1, 2), (0, 0))):
        written = torch.linalg.qr(model.W_O[writer].T)[0]
        read = torch.linalg.qr(readers[reader])[0]
        expected = (written.T @ read).square().sum()
        torch.testing.assert_close(result.scores[(*writer, *reader)], expected.detach())
    if expressible(option):
        reference = analysis.attention_head_subspace_affinity(
            theirs(model), target_role=role, layer_order="all"
        ) if not compat.HAS_HOOKED_TRANSFORMER else None  # fmt: skip
        if reference is not None:
            torch.testing.assert_close(result.scores, reference.scores, atol=1e-5, rtol=0)


def test_heads_that_sparsity_left_without_full_rank_need_a_rank(claim):
    claim(
        "tools.analysis.attention_head_subspace_affinity (heads of deficient rank)",
        "plain",
        "refused",
        "a head with zero columns spans fewer dimensions than d_head: pass rank=",
    )
    model = build()
    with torch.no_grad():
        model.blocks[0].attn.W_O[1, 2:] = 0.0
    with pytest.raises(ValueError, match="role O at layer 0, head 1"):
        analysis.attention_head_subspace_affinity(model, target_role="Q")
    result = analysis.attention_head_subspace_affinity(model, target_role="Q", rank=2)
    assert int(result.source_ranks[0, 1]) == 2


@every_option
def test_singular_directions_rebuild_a_head_s_circuits(claim, option):
    claim("tools.analysis.svd_circuits.decompose_head", option, "unchanged")
    needs(version_4=False)
    decompose_head = importlib.import_module(f"{analysis.__name__}.svd_circuits").decompose_head
    model = build(option)
    result = decompose_head(model, 1, 2)
    for found, circuit in ((result.QK, model.QK), (result.OV, model.OV)):
        rebuilt = found.U @ found.S.diag() @ found.V.T
        torch.testing.assert_close(rebuilt, circuit[1, 2].AB.detach(), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------
# lenses that only take a TransformerBridge


@every_option
def test_the_jacobian_lens_says_that_it_takes_a_bridge_only(claim, option):
    claim("tools.analysis.JacobianLens", option, "refused",
          "TransformerLens fits and reads it on a TransformerBridge only, and says so")  # fmt: skip
    model = build(option)
    with pytest.raises(TypeError, match="JacobianLens supports TransformerBridge only"):
        analysis.JacobianLens.fit(model, ["w4 w5 w6 w7"], corpus="words")
    lens = analysis.JacobianLens(jacobians={0: torch.eye(16)}, n_prompts=1, d_model=16)
    with pytest.raises(TypeError, match="JacobianLens supports TransformerBridge only"):
        lens.validate_model(model)


@every_option
def test_the_backward_lens_says_that_it_takes_a_bridge_only(claim, option):
    claim("tools.analysis.BackwardLens", option, "refused",
          "TransformerLens has it for GPT-2 in a TransformerBridge only, and says so")  # fmt: skip
    needs(version_4=False)
    with pytest.raises(TypeError, match="Backward Lens supports TransformerBridge only"):
        analysis.BackwardLens(build(option))


# --------------------------------------------------------------------------------------------------
# functions of tensors, fed with our activations


def test_probes_and_kernels_take_our_activations(claim):
    claim("tools.analysis: functions of tensors", "any", "unchanged")
    model = build("paper")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 30, (40, 4), generator=generator)
    _, cache = model.run_with_cache(tokens)
    features = cache["blocks.0.mlp.hook_post"][:, -1].detach()
    subspaces = [analysis.orthonormal_subspace(features[i : i + 3].T) for i in (0, 3)]
    kernel = analysis.projection_kernel(*subspaces)
    bases = [torch.linalg.qr(features[i : i + 3].T)[0] for i in (0, 3)]
    assert kernel.score == pytest.approx((bases[0].T @ bases[1]).square().sum().item(), abs=1e-5)
    dictionary = torch.eye(features.shape[1])
    parts = analysis.get_sparse_decomposition(features[0].abs(), dictionary, k=2)
    assert set(parts.support.tolist()) == set(features[0].abs().topk(2).indices.tolist())
    if compat.HAS_HOOKED_TRANSFORMER:
        return
    neuron = int(features.abs().sum(0).argmax())
    labels = features[:, neuron] > features[:, neuron].median()
    probe = analysis.fit_sparse_probe(features, labels, k=1, preprocess="standardize")
    chosen = (features[labels].mean(0) - features[~labels].mean(0)).abs()
    assert int(probe.selected_features[0]) in chosen.topk(3).indices.tolist()


# --------------------------------------------------------------------------------------------------
# the training loop


def training():
    """TransformerLens' ``train`` and config class, wherever this version keeps them."""
    name = "transformer_lens.train" if compat.HAS_HOOKED_TRANSFORMER else (
        "transformer_lens.tools.training")  # fmt: skip
    module = importlib.import_module(name)
    config = getattr(module, "TrainConfig", None) or module.HookedTransformerTrainConfig
    return module.train, config


@every_option
def test_train_takes_adam_s_steps_on_every_parameter(claim, option, capsys):
    claim("tools.training.train", option, "unchanged")
    train, config = training()
    options = config(
        num_epochs=2, batch_size=4, lr=1e-2, seed=3, device="cpu", max_grad_norm=1.0,
        weight_decay=0.1, print_every=None,
    )  # fmt: skip
    rows = [{"tokens": row} for row in torch.randint(3, 30, (6, 8))]
    model, twin = build(option), build(option).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert train(model, options, rows) is model
    torch.manual_seed(3)
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            tokens = batch["tokens"]
            log_probs = twin(tokens)[:, :-1].log_softmax(-1)
            loss = -log_probs.gather(-1, tokens[:, 1:, None]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            optimizer.step()
    for (name, value), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=0, msg=name)
        if value.requires_grad:
            assert not torch.equal(value, before[name]), f"{name} was not trained"
