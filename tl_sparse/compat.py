"""The only module that knows which TransformerLens is installed.

TransformerLens 2.16 to 3.x has ``HookedTransformer``; 4.x removed it and kept ``HookedRootModule``.
Everything else in this package imports TransformerLens names from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformer_lens
from torch import nn
from transformer_lens import ActivationCache, FactoredMatrix
from transformer_lens.hook_points import HookPoint

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
except ImportError:  # 2.x
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

__all__ = [
    "HAS_HOOKED_TRANSFORMER",
    "ActivationCache",
    "ConfigBase",
    "FactoredMatrix",
    "HookPoint",
    "HookedRootModule",
    "KeyValueCache",
    "ModelBase",
    "RuntimeConfig",
    "editable",
    "has_hooks",
    "runtime_dtype",
    "tl_utils",
    "transformer_lens_version",
]


def transformer_lens_version() -> str:
    """The installed TransformerLens version, for records and error messages."""
    from importlib.metadata import version

    return version("transformer-lens")


def has_hooks(point: nn.Module) -> bool:
    """Whether anything could see or change the value passing through ``point``.

    A module that other tools put in a HookPoint's place (SAELens, auto-circuit) counts as hooked.
    """
    if type(point) is not HookPoint:
        return True
    return bool(
        point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
    )


def editable(x: torch.Tensor, point: nn.Module) -> torch.Tensor:
    """``x`` in a form that a hook at ``point`` may edit in place, with the bits of ``x``.

    Autograd forbids in-place edits of what an operation saved for its backward pass and of the
    chunks of a tensor, so a hooked point gets a copy while gradients are on.
    """
    return x.clone() if torch.is_grad_enabled() and has_hooks(point) else x


class RuntimeConfig(ConfigBase):
    """``model.cfg``: the mutable object in which TransformerLens code looks fields up.

    It is an instance of TransformerLens' own config class (so that its ``isinstance`` checks hold)
    whose attributes are a model's :class:`~tl_sparse.SparseTransformerConfig` plus TransformerLens'
    run-time switches (``use_attn_result``, ``device``, ``dtype`` ...). It is not validated here and
    never saved: the frozen config is.
    """

    def __init__(self, **values: Any) -> None:
        # TransformerLens' own __init__ would validate against architectures it knows; its field
        # defaults are all that is wanted from it.
        for field in dataclasses.fields(ConfigBase):
            if field.default is not dataclasses.MISSING:
                setattr(self, field.name, field.default)
            elif field.default_factory is not dataclasses.MISSING:
                setattr(self, field.name, field.default_factory())
        for name, value in values.items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> RuntimeConfig:
        """A config with these values; :meth:`to_dict` is its inverse."""
        return cls(**config_dict)

    @classmethod
    def unwrap(cls, config: RuntimeConfig | Mapping[str, Any]) -> RuntimeConfig:
        """The config itself, or one with the values of a mapping."""
        return config if isinstance(config, RuntimeConfig) else cls.from_dict(config)

    def to_dict(self) -> dict[str, Any]:
        """Every field, TransformerLens' defaults included."""
        return dict(vars(self))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"RuntimeConfig({fields})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RuntimeConfig) and vars(self) == vars(other)


def runtime_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's floating point parameters."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())
