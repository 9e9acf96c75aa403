"""The only module that knows which TransformerLens is installed.

TransformerLens 2.16 to 3.x has ``HookedTransformer``; 4.x removed it and kept ``HookedRootModule``.
Everything else in this package imports TransformerLens names from here.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformer_lens
from torch import nn
from transformer_lens import ActivationCache, FactoredMatrix
from transformer_lens.hook_points import HookPoint

if TYPE_CHECKING:
    import pandas as pd

# Typed Any: which class it is depends on the installation. 4.x answers names that it dropped with a
# directed ImportError.
installed: Any = transformer_lens
tl_utils: Any
HookedRootModule: Any
KeyValueCache: Any
ModelBase: Any
ConfigBase: Any

try:  # 3.x and 4.x
    from transformer_lens import utilities

    tl_utils = utilities
except ImportError:
    tl_utils = None
if not hasattr(tl_utils, "Slice"):  # 2.x, where utilities are something else, if there are any
    from transformer_lens import utils

    tl_utils = utils

try:  # 3.x and 4.x
    HookedRootModule = installed.HookedRootModule
except (AttributeError, ImportError):  # 2.x
    from transformer_lens import hook_points

    HookedRootModule = hook_points.HookedRootModule

try:  # 3.x and 4.x
    KeyValueCache = installed.TransformerLensKeyValueCache
except (AttributeError, ImportError):  # 2.x
    KeyValueCache = installed.HookedTransformerKeyValueCache

try:  # 2.x and 3.x
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    ModelBase, ConfigBase = HookedTransformer, HookedTransformerConfig
    HAS_HOOKED_TRANSFORMER = True
except ImportError:  # 4.x
    from transformer_lens.config import TransformerLensConfig

    ModelBase, ConfigBase = HookedRootModule, TransformerLensConfig
    HAS_HOOKED_TRANSFORMER = False

SINKS = "use_attention_sinks"
HAS_ATTENTION_SINKS = any(f.name == SINKS for f in dataclasses.fields(ConfigBase))
"""Whether the models that :func:`transformer_lens_model` makes can have attention sinks."""

BridgeConfig: Any

try:  # 3.x and 4.x
    from transformer_lens.config import TransformerBridgeConfig

    BridgeConfig = TransformerBridgeConfig
except ImportError:  # 2.x
    BridgeConfig = ()  # the class of which nothing is an instance

__all__ = [
    "HAS_ATTENTION_SINKS",
    "HAS_HOOKED_TRANSFORMER",
    "ActivationCache",
    "BridgeConfig",
    "ConfigBase",
    "FactoredMatrix",
    "HookPoint",
    "HookedRootModule",
    "KeyValueCache",
    "ModelBase",
    "ReadingHook",
    "affine_after",
    "bridge_class",
    "has_hooks",
    "hooked",
    "is_transformer_lens_model",
    "logit_lens_tool",
    "norm_centres",
    "norm_weight",
    "only_read",
    "patching_result",
    "runtime_dtype",
    "tl_utils",
    "transformer_lens_model",
    "transformer_lens_version",
    "transformer_lens_weights",
]


def transformer_lens_version() -> str:
    """The installed TransformerLens version, for records and error messages."""
    from importlib.metadata import version

    return version("transformer-lens")


def has_hooks(point: nn.Module) -> bool:
    """Whether anything could see or change the value passing through ``point``.

    A module that other tools put in a HookPoint's place (SAELens, auto-circuit) counts as hooked,
    and so does one that was given a forward of its own (nnsight).
    """
    if type(point) is not HookPoint or "forward" in vars(point):
        return True
    return bool(
        point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
    )


class ReadingHook(partial):
    """A hook function with arguments bound that never changes the value it sees.

    It neither edits it in place nor returns one; see :func:`only_read`.
    """


def only_read(point: Any) -> bool:
    """Whether a value passes ``point`` as it is: every forward hook there is a ReadingHook."""
    if type(point) is not HookPoint or "forward" in vars(point) or point._forward_pre_hooks:
        return False
    readers = [h for h in point.fwd_hooks if isinstance(getattr(h, "user_hook", None), ReadingHook)]
    return len(readers) == len(point._forward_hooks)


def hooked(point: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the hooks at ``point`` make of ``x``, which they may edit in place.

    Autograd forbids in-place edits of what an operation saved for its backward pass and of the
    chunks of a tensor, so the hooks get a copy while gradients are on.
    """
    return point(x.clone() if torch.is_grad_enabled() and has_hooks(point) else x)


def runtime_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's floating point parameters."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def affine_after(
    model: nn.Module, hook: str
) -> tuple[torch.Tensor] | tuple[torch.Tensor, torch.Tensor] | None:
    """The weight (and bias) that a norm of a HookedTransformer applies after its hook_normalized.

    None for every other hook, and where the hook has the norm's output: the norms without weights,
    and 2.x's LayerNorm.
    """
    path, _, name = hook.rpartition(".")
    if name != "hook_normalized":
        return None
    norm = model.get_submodule(path)
    weight, bias = getattr(norm, "w", None), getattr(norm, "b", None)
    if weight is None or (bias is not None and BridgeConfig == ()):
        return None
    return (weight,) if bias is None else (weight, bias)


def norm_weight(norm: nn.Module) -> torch.Tensor | None:
    """What a norm of any model multiplies by after it has divided; None if by nothing."""
    weight = getattr(norm, "w", None)
    if weight is None:
        return None
    # Gemma's are stored as what they are more than one
    return 1 + weight if getattr(norm, "uses_weight_offset", False) else weight


def norm_centres(norm: nn.Module) -> bool:
    """Whether a norm of any model takes the mean off, as LayerNorm does."""
    if hasattr(norm, "centred"):  # a SparseTransformer's
        return bool(norm.centred)
    if hasattr(norm, "uses_rms_norm"):  # a TransformerBridge's
        return not norm.uses_rms_norm
    return type(norm).__name__.startswith("LayerNorm")


def bridge_class() -> Any:
    """``TransformerBridge``; on 2.x, which has none, a class of which nothing is an instance."""
    try:
        # it brings most of transformers' models, and takes longer to import than all else together
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return ()
    return TransformerBridge


def is_transformer_lens_model(model: Any) -> bool:
    """Whether it is a HookedTransformer or a TransformerBridge."""
    hooked_transformer = HAS_HOOKED_TRANSFORMER and isinstance(model, ModelBase)
    return hooked_transformer or isinstance(model, bridge_class())


def transformer_lens_weights(model: Any) -> dict[str, torch.Tensor]:
    """Parameters of a HookedTransformer or TransformerBridge by HookedTransformer's names.

    Most share their storage with the model's own.
    """
    if not isinstance(model, bridge_class()):
        return dict(model.named_parameters())
    # it makes up zeros for MLPs that a block does not have
    absent = tuple(
        f"blocks.{layer}.mlp." for layer, block in enumerate(model.blocks) if not has_mlp(block)
    )
    weights = model.tl_parameters()
    return {name: tensor for name, tensor in weights.items() if not name.startswith(absent)}


def has_mlp(block: nn.Module) -> bool:
    """Whether a block of a TransformerLens model has an MLP."""
    return "mlp" in block._modules


def pretrained(name: str) -> Any:
    """A pretrained model by its name in TransformerLens or on the Hub, or from a local folder.

    Layernorms are folded and writing weights centred, as in a HookedTransformer by default.

    Raises:
        OSError: there is no such model, or no network to fetch it.
        ValueError: TransformerLens does not know its architecture.
    """
    if HAS_HOOKED_TRANSFORMER:
        return ModelBase.from_pretrained(name).eval()
    from transformer_lens.model_bridge.sources import boot_tl_legacy
    from transformer_lens.model_bridge.sources.tl_legacy import TL_LEGACY_PREFIXES

    boot = boot_tl_legacy if name.startswith(TL_LEGACY_PREFIXES) else (
        bridge_class().boot_transformers
    )  # fmt: skip
    model = boot(name)
    model.enable_compatibility_mode()
    return model.eval()


def transformer_lens_model(
    fields: Mapping[str, Any], weights: Mapping[str, torch.Tensor], tokenizer: Any
) -> Any:
    """TransformerLens' own model with a config's fields and copies of weights, in eval mode.

    It is a HookedTransformer where there is one, else a native TransformerBridge.

    Raises:
        ValueError: TransformerLens refuses one of the fields.
    """
    if HAS_HOOKED_TRANSFORMER:
        if not HAS_ATTENTION_SINKS:
            fields = {name: value for name, value in fields.items() if name != SINKS}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that the class will go in 4.0
            model = ModelBase(ConfigBase(**fields))
        expected, state = model.state_dict(), dict(weights)
        # what it keeps in its state dict besides parameters: the causal mask and minus infinity
        state |= {name: expected[name] for name in expected if is_attention_buffer(name)}
        model.load_state_dict(state, strict=True)
    else:
        from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

        fields = {name: value for name, value in fields.items() if name != SINKS}
        if fields["act_fn"] in ("gelu_fast", "gelu_pytorch_tanh"):
            fields["act_fn"] = "gelu_new"  # the same function; the native model knows it so
        config = BridgeConfig(**fields, architecture="TransformerLensNative")
        model = bridge_class().boot_native(config, device=fields["device"], dtype=fields["dtype"])
        model.load_state_dict(convert_tl_checkpoint(dict(weights), config), strict=True)
    if tokenizer is not None:
        # what set_tokenizer does, which would reload it by its name, if it has one
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.pad_token = tokenizer.eos_token
        model.tokenizer = tokenizer
        added = tokenizer("")["input_ids"]
        prepends_bos = added[:1] == [tokenizer.bos_token_id]
        model.cfg.tokenizer_prepends_bos = prepends_bos
        model.cfg.tokenizer_appends_eos = added[prepends_bos:] == [tokenizer.eos_token_id]
        model.cfg.default_prepend_bos = fields["default_prepend_bos"]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def is_attention_buffer(name: str) -> bool:
    """Whether a HookedTransformer's state dict has under this name something that is no weight."""
    return name.endswith((".attn.mask", ".attn.IGNORE"))


def logit_lens_tool() -> Any:
    """TransformerLens' ``tools.analysis.logit_lens``.

    Raises:
        NotImplementedError: this TransformerLens has none.
    """
    try:
        from transformer_lens.tools.analysis.logit_lens import logit_lens
    except ImportError:
        raise NotImplementedError(
            f"TransformerLens {transformer_lens_version()} has no logit lens (4 has); "
            "cache.accumulated_resid(apply_ln=True) @ model.W_U + model.b_U are its logits, bigram "
            "table aside"
        ) from None
    return logit_lens


def patching_result(
    values: torch.Tensor, rows: pd.DataFrame, metric: str, baseline: torch.Tensor | None
) -> Any:
    """TransformerLens 4's ``PatchingResult`` of per-example values [row, example].

    Raises:
        NotImplementedError: this TransformerLens has none.
    """
    try:
        from transformer_lens.patching import PatchingResult
    except ImportError:
        raise NotImplementedError(
            f"TransformerLens {transformer_lens_version()} has no PatchingResult (4 has); "
            "to_dataframe() and examples() have the same values"
        ) from None
    return PatchingResult(
        values=values, axis_names=[], index_df=rows, metric_names=[metric], reduced=False,
        baseline=baseline,
    )  # fmt: skip
