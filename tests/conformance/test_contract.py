"""What the installed TransformerLens takes a model to be: its types, methods and arguments."""

import importlib
import inspect

import pytest
import torch

from tl_sparse import compat
from tl_sparse.model.transformer import SparseTransformer


def test_the_model_passes_the_checks_of_the_installed_transformer_lens(small_model):
    model = small_model()
    assert isinstance(model, compat.HookedRootModule)
    if compat.HAS_HOOKED_TRANSFORMER:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        assert isinstance(model, HookedTransformer)
        assert isinstance(model.cfg, HookedTransformerConfig)
    else:
        from transformer_lens import model_protocol
        from transformer_lens.config import TransformerLensConfig

        for name in ("TransformerLensModel", "TrainableTransformerLensModel",
                     "TransformerLensModelWithWeights"):  # fmt: skip
            assert isinstance(model, getattr(model_protocol, name)), name
        assert isinstance(model.cfg, TransformerLensConfig)
    assert all(block.hook_out_is_single_residual_stream for block in model.blocks)


# Methods of HookedRootModule that only touch hook_dict, mod_dict and what we override.
INHERITED = {
    "add_perma_hook", "cache_all", "cache_some", "check_and_add_hook", "clear_contexts", "hooks",
    "list_hooks", "remove_all_hook_fns", "reset_hooks", "run_with_hooks",
}  # fmt: skip


def test_every_public_method_of_the_base_is_ours_or_known_to_be_right():
    """A new TransformerLens method must not act on our weights or tokens unnoticed."""
    unknown = {}
    for name in public(compat.ModelBase):
        owner = next(cls for cls in SparseTransformer.__mro__ if name in vars(cls))
        if not owner.__module__.startswith("tl_sparse") and name not in INHERITED:
            unknown[name] = owner.__name__
    assert unknown == {}


def test_overridden_module_methods_are_ours():
    """Methods of nn.Module that TransformerLens changes must not run on our models."""
    for name in ("forward", "to", "cuda", "cpu", "__init__", "_apply"):
        owner = next(cls for cls in SparseTransformer.__mro__ if name in vars(cls))
        assert owner.__module__.startswith("tl_sparse"), (name, owner)


def public(cls):
    return [n for n in dir(cls) if not n.startswith("_") and n not in dir(torch.nn.Module)]


# --------------------------------------------------------------------------------------------------
# arguments

# Where our arguments are not those of the base class: the method → why.
OWN_ARGUMENTS = {
    "from_pretrained": "it loads what save_pretrained wrote, and processes no weights",
    "from_pretrained_no_processing": "as from_pretrained",
    "to": "torch's own: a device, a dtype or both; print_details is taken and prints nothing",
    "check_hooks_to_add": "a check that TransformerLens calls, not its users",
}  # fmt: skip
# Where a TransformerBridge's arguments are not HookedTransformer's, which ours are.
BRIDGE_ARGUMENTS = {
    "add_hook": "the bridge calls it hook_fn",
    "add_perma_hook": "the bridge calls it hook_fn",
    "forward": "the bridge has arguments for images, audio and Hugging Face's caches",
    "generate": "the bridge has Hugging Face's arguments in between",
    "generate_stream": "the bridge has Hugging Face's arguments in between",
    "run_with_hooks": "the bridge names the arguments that ours hands on to forward",
    "run_with_cache": "the bridge names the arguments that ours hands on to forward",
}


def named(function):
    """[(name, default)] of the arguments that have a name, self left out."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind not in kinds and p.name != "self"]


def keywords_only(function):
    """Whether all named arguments come after ``*args``, so that their order does not matter."""
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def differences(base, exempt):
    """Methods that both have, whose arguments are not the base's first and with its defaults."""
    found = {}
    for name in [*public(base), "forward", "to", "cuda", "cpu"]:
        theirs, ours = getattr(base, name), getattr(SparseTransformer, name, None)
        if not callable(theirs) or not callable(ours) or name in exempt:
            continue
        if (ours.__doc__ or "").startswith("Refused:") or theirs is ours:
            continue
        wanted, have = named(theirs), named(ours)
        if keywords_only(theirs):
            have = [pair for pair in wanted if pair in have]
        if have[: len(wanted)] != wanted:
            found[name] = (have, wanted)
    return found


def test_shared_methods_take_the_arguments_of_the_base_class_with_its_defaults(claim):
    claim("arguments of shared methods", "any", "unchanged")
    assert differences(compat.ModelBase, OWN_ARGUMENTS) == {}


def test_shared_methods_take_the_arguments_of_a_bridge_with_its_defaults(claim):
    claim("arguments of shared methods", "any", "unchanged")
    if compat.HAS_HOOKED_TRANSFORMER:
        pytest.skip("the base class is HookedTransformer here")
    bridge = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
    assert differences(bridge, OWN_ARGUMENTS | BRIDGE_ARGUMENTS) == {}


GENERATE = [
    ("input", ""), ("max_new_tokens", 10), ("stop_at_eos", True), ("eos_token_id", None),
    ("do_sample", True), ("top_k", None), ("top_p", None), ("temperature", 1.0),
    ("freq_penalty", 0.0), ("use_past_kv_cache", True), ("prepend_bos", None),
    ("padding_side", None), ("return_type", "input"), ("verbose", True),
    ("attention_mask", None),
]  # fmt: skip


def test_arguments_are_hooked_transformers_where_there_is_none_to_compare_with():
    """On TransformerLens 4 nothing else holds them to it."""
    assert named(SparseTransformer.generate) == GENERATE
    stream = [*GENERATE[:2], ("max_tokens_per_yield", 25), *GENERATE[2:]]
    assert named(SparseTransformer.generate_stream) == stream
    names = [name for name, _ in named(SparseTransformer.forward)]
    assert names == [
        "input", "return_type", "loss_per_token", "prepend_bos", "padding_side", "start_at_layer",
        "tokens", "shortformer_pos_embed", "attention_mask", "stop_at_layer", "past_kv_cache",
    ]  # fmt: skip


# What a TransformerBridge has and ours has not: all of it is about Hugging Face models, other
# modalities, or layers that are not alike.
BRIDGE_ONLY = {
    "OV_for_attn_layers", "QK_for_attn_layers", "adapter", "attn_head_labels", "block_hooks",
    "block_submodules", "boot_native", "boot_tl_legacy", "boot_transformers",
    "check_model_support", "clear_hook_registry", "close", "compatibility_mode",
    "composition_layer_indices", "diffusion_generate", "enable_compatibility_mode",
    "encoder_output", "get_hook_point", "get_params", "hf_generate", "hook_aliases", "layer_types",
    "list_supported_models", "original_model", "predict_next_sentence",
    "prepare_multimodal_inputs", "processor", "real_components", "stack_params_for",
    "tl_named_parameters", "to_sentence_pair_tokens",
}  # fmt: skip


def test_every_public_name_of_a_bridge_is_ours_or_left_out_on_purpose(small_model):
    if compat.HAS_HOOKED_TRANSFORMER:
        pytest.skip("from TransformerLens 4 on the bridge is what there is beside ours")
    bridge = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
    model = small_model("standard")
    missing = {name for name in public(bridge) if not hasattr(model, name)}
    assert missing <= BRIDGE_ONLY
    assert not {name for name in BRIDGE_ONLY if hasattr(model, name)}
