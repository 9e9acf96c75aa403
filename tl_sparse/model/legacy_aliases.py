"""The names that TransformerLens 4 removed, and what stands for each on a sparse model.

TransformerLens 4 removed ``HookedTransformer``, its config, components and the modules that they
were in, and tools that import them fail. :func:`install_legacy_aliases` lets them import again. It
changes TransformerLens for the whole process, so tl_sparse never calls it, and nothing of tl_sparse
imports this module: call it yourself, before the tool is imported.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType, TracebackType
from typing import Any

import transformer_lens
from jaxtyping import Float
from torch import Tensor

from tl_sparse import compat
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.attention import Attention
from tl_sparse.model.inputs import Output
from tl_sparse.model.layers import MLP, Embed, PosEmbed, Unembed
from tl_sparse.model.runtime_config import RuntimeConfig, runtime_config
from tl_sparse.model.transformer import Block, SparseTransformer

SingleLoss = Float[Tensor, ""]
LossPerToken = Float[Tensor, "batch pos-1"]
Loss = SingleLoss | LossPerToken


class EveryRuntimeConfig(type):
    """The type of a class that counts every ``model.cfg`` as its instance."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, RuntimeConfig)


class HookedTransformerConfig(RuntimeConfig, metaclass=EveryRuntimeConfig):
    """A config to look fields up in, built as TransformerLens' was; ``model.cfg`` counts as one.

    What is not given has the value that it has in a ``model.cfg``. It tells a tool about a model
    and makes none: :class:`~tl_sparse.SparseTransformer` is built from a
    :class:`~tl_sparse.SparseTransformerConfig`.
    """

    def __init__(self, n_layers: int, d_model: int, n_ctx: int, d_head: int, **fields: Any) -> None:
        fields |= {"n_layers": n_layers, "d_model": d_model, "n_ctx": n_ctx, "d_head": d_head}
        shape = ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab",
                 "d_vocab_out", "attn_only")  # fmt: skip
        # -1 is TransformerLens' way to say that a size follows from the others
        fields = {name: value for name, value in fields.items() if value != -1}
        config = SparseTransformerConfig(**{name: fields[name] for name in shape if name in fields})
        super().__init__(**runtime_config(config).to_dict() | fields)


def alias_table() -> dict[str, dict[str, Any]]:
    """Path of a module → the names that it gets.

    No norm is among the components: TransformerLens has a class for each kind, here they are one.
    """
    model = {"HookedTransformer": SparseTransformer}
    config = {"HookedTransformerConfig": HookedTransformerConfig}
    cache = {"HookedTransformerKeyValueCache": compat.KeyValueCache}
    attention, base_attention = {"Attention": Attention}, {"AbstractAttention": Attention}
    mlp, base_mlp = {"MLP": MLP}, {"CanBeUsedAsMLP": MLP}
    block = {"TransformerBlock": Block}
    root_module = {"HookedRootModule": compat.HookedRootModule}
    others = {
        "ActivationCache": compat.ActivationCache,
        "FactoredMatrix": compat.FactoredMatrix,
        "HookPoint": compat.HookPoint,
        "Loss": Loss,
        "LossPerToken": LossPerToken,
        "Output": Output,
        "SingleLoss": SingleLoss,
    }
    ends = {"Embed": Embed, "PosEmbed": PosEmbed, "Unembed": Unembed}
    paths = {
        "": model | config | cache,
        ".HookedTransformer": model | config | cache | root_module | others,
        ".HookedTransformerConfig": config,
        ".components": attention | base_attention | mlp | base_mlp | block | ends,
        ".components.abstract_attention": base_attention,
        ".components.attention": attention,
        ".components.mlps": {},
        ".components.mlps.can_be_used_as_mlp": base_mlp,
        ".components.mlps.mlp": mlp,
        ".components.transformer_block": block,
        ".hook_points": root_module,
        ".past_key_value_caching": cache,
        ".utils": {k: v for k, v in vars(compat.tl_utils).items() if not k.startswith("__")},
    }
    return {transformer_lens.__name__ + path: names for path, names in paths.items()}


@dataclass
class LegacyAliases:
    """What one call of :func:`install_legacy_aliases` put in place; as a context, for a while.

    Attributes:
        modules: paths of the modules it made.
        names: what it set, as (path of the module, name).
    """

    modules: list[str]
    names: list[tuple[str, str]]

    def remove(self) -> None:
        """Take away what this call put in place; a second time, nothing.

        Code that was imported meanwhile keeps what it imported.
        """
        for path, name in self.names:
            delattr(sys.modules[path], name)
        for path in self.modules:
            del sys.modules[path]
        self.modules, self.names = [], []

    def __enter__(self) -> LegacyAliases:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def install_legacy_aliases() -> LegacyAliases:
    """Let code written for HookedTransformer import on TransformerLens 4, on sparse models.

    After this call ``transformer_lens.HookedTransformer`` is :class:`~tl_sparse.SparseTransformer`
    under every path that it had, so that ``isinstance(model, HookedTransformer)`` holds;
    ``HookedTransformerConfig`` is a class that counts ``model.cfg`` as its instance; and
    ``transformer_lens.utils``, ``.components``, ``.hook_points`` and ``.past_key_value_caching``
    hold what stands for their contents. :func:`alias_table` has all names.

    A second call changes nothing. On TransformerLens below 4 there is nothing to do.

    ::

        install_legacy_aliases()            # for good, or until .remove() of what it returns
        with install_legacy_aliases():      # for a while
            import tool

    Returns:
        What was put in place; its ``remove()`` undoes this call.

    Raises:
        RuntimeError: other code has put something else under one of the names; nothing has been
            changed then.
    """
    if compat.HAS_HOOKED_TRANSFORMER:
        return LegacyAliases([], [])
    table = alias_table()
    made = {path: empty_module(path) for path in table if path not in sys.modules}
    for path, module in made.items():
        package, _, name = path.rpartition(".")
        table[package].setdefault(name, module)  # where a class goes by that name, it is the class
    missing = []
    for path, names in table.items():
        present = {} if path in made else vars(sys.modules[path])
        for name, value in names.items():
            if name not in present:
                missing.append((path, name))
            elif present[name] is not value:
                raise RuntimeError(
                    f"{path}.{name} is {present[name]!r} already, so it cannot become tl_sparse's "
                    "alias: install the aliases before other code puts something there"
                )
    sys.modules.update(made)
    for path, name in missing:
        setattr(sys.modules[path], name, table[path][name])
    return LegacyAliases(list(made), missing)


def empty_module(path: str) -> ModuleType:
    """A module with nothing in it, made and not found."""
    return module_from_spec(ModuleSpec(path, None, origin=__name__, is_package=True))
