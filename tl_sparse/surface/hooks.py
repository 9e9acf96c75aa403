"""Hooks that never fail silently: unknown and switched-off names raise, caches are never empty."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, Literal

from tl_sparse.compat import ActivationCache, HookedRootModule, HookPoint
from tl_sparse.surface.parts import ModelParts

# TransformerLens 4.x tools address these under attn; HookedTransformer had them on the block.
ALIASES = {f"attn.hook_{name}": f"hook_{name}" for name in ("q_input", "k_input", "v_input")}
ALIASES["attn.hook_attn_in"] = "hook_attn_in"

# Hook points that exist but only fire while a switch is on.
SWITCHES = {
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
}


def own_name(point: HookPoint) -> str:
    """The name that ``setup`` gave a hook point, whatever alias it was found by."""
    assert point.name is not None
    return point.name


class HookSurface(ModelParts):
    """Hooks, caches and the switches that turn optional hook points on."""

    def setup(self) -> None:
        """Name every module and hook point; called once the model is built."""
        HookedRootModule.setup(self)
        for layer in range(self.config.n_layers):
            for alias, name in ALIASES.items():
                point = self.mod_dict[f"blocks.{layer}.{name}"]
                self.mod_dict[f"blocks.{layer}.{alias}"] = point
                self.hook_dict[f"blocks.{layer}.{alias}"] = point

    def hook_points(self) -> list[HookPoint]:
        """Every hook point once, aliases not repeated."""
        return list({id(point): point for point in self.hook_dict.values()}.values())

    def require_hook(self, name: str) -> HookPoint:
        """The hook point of that name, if it exists and would fire.

        Raises:
            KeyError: no such hook point; the message names the nearest ones.
            ValueError: it is switched off; the message names the switch.
        """
        if name not in self.hook_dict:
            near = difflib.get_close_matches(name, self.hook_dict, n=4, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise KeyError(f"unknown hook {name!r}{hint} (model.hook_dict lists all)")
        switch = self.switch_of(name)
        if switch and not getattr(self.cfg, switch):
            raise ValueError(f"hook {name!r} never fires: call model.set_{switch}(True) first")
        return self.mod_dict[name]

    @staticmethod
    def switch_of(name: str) -> str | None:
        """The cfg switch that a hook point depends on, if any."""
        return SWITCHES.get(name.rpartition(".")[2])

    def check_hooks_to_add(
        self, hook_point: HookPoint, hook_point_name: str, hook: Any, *_: Any, **__: Any
    ) -> None:
        """TransformerLens' check before it adds a hook: the hook point exists and would fire."""
        self.require_hook(hook_point_name)

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: Callable,
        dir: Literal["fwd", "bwd"] = "fwd",
        **kwargs: Any,
    ) -> None:
        """Add a hook by name or by a filter on names; see TransformerLens."""
        names = [name] if isinstance(name, str) else self.matching(name)
        for each in names:
            self.require_hook(each).add_hook(hook, dir=dir, **kwargs)

    def matching(self, wanted: Callable[[str], bool]) -> list[str]:
        """Names of hook points that fire and pass a filter, each point once.

        Raises:
            ValueError: none does.
        """
        found = {
            id(point): own_name(point)
            for name, point in self.hook_dict.items()
            if wanted(name) and (not (s := self.switch_of(name)) or getattr(self.cfg, s))
        }
        if not found:
            raise ValueError(
                "the hook name filter matches no hook that fires; model.hook_dict lists all names, "
                f"those ending in {', '.join(sorted(SWITCHES))} fire only when switched on"
            )
        return list(found.values())

    # The two paths by which run_with_hooks and hooks() arrive in TransformerLens:
    def _enable_hook_with_name(self, name: str, hook: Callable, dir: Any) -> None:
        self.require_hook(name).add_hook(hook, dir=dir, level=self.context_level)

    def _enable_hooks_for_points(
        self,
        hook_points: Iterable[tuple[str, HookPoint]],
        enabled: Callable[[str], bool],
        hook: Callable,
        dir: Any,
    ) -> None:
        for name in self.matching(enabled):
            self._enable_hook_with_name(name, hook, dir)

    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' caching hooks; a names_filter that matches nothing is an error."""
        names = self.cached_names(names_filter)
        return HookedRootModule.get_caching_hooks(
            self,
            names.__contains__,
            *args,
            **kwargs,
        )

    def add_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' lasting caching hooks; a names_filter without a match is an error."""
        names = self.cached_names(names_filter)
        return HookedRootModule.add_caching_hooks(
            self,
            names.__contains__,
            *args,
            **kwargs,
        )

    def cached_names(self, names_filter: Any) -> set[str]:
        """Canonical names that a names_filter (None, name, names or function) selects."""
        if names_filter is None:
            return set(self.matching(lambda name: True))
        if isinstance(names_filter, str):
            names_filter = [names_filter]
        if callable(names_filter):
            return set(self.matching(names_filter))
        names = {own_name(self.require_hook(name)) for name in names_filter}
        if not names:
            raise ValueError("names_filter is empty: it would cache nothing")
        return names

    def run_with_cache(
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and cache activations; returns (output, ActivationCache), see TransformerLens."""
        if isinstance(names_filter, str):
            names_filter = [names_filter]
        out, cache = HookedRootModule.run_with_cache(
            self,
            *model_args,
            names_filter=names_filter,
            remove_batch_dim=remove_batch_dim,
            **kwargs,
        )
        if isinstance(names_filter, list | tuple):
            # a tool finds what it asked for under the name that it asked by, alias or not
            for name in names_filter:
                own = own_name(self.require_hook(name))
                for end in ("", "_grad"):
                    if own + end in cache:
                        cache[name + end] = cache[own + end]
        if return_cache_object:
            cache = ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
        return out, cache

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether ``attn.hook_result`` (what each head adds to the stream) fires."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether ``hook_mlp_in`` (the stream that the MLP alone reads) fires."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether ``hook_attn_in`` (the stream that each head reads) fires."""
        self.only_one(use_attn_in, "use_split_qkv_input")
        self.cfg.use_attn_in = use_attn_in

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether q, k and v of each head read streams of their own, ``hook_q_input`` and so on.

        Costs 3 n_heads d_model numbers per token and layer, and computes q, k, v by another matrix
        product, whose last bits differ.
        """
        self.only_one(use_split_qkv_input, "use_attn_in")
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def only_one(self, wanted: bool, other: str) -> None:
        """Refuse a switch while the one that excludes it is on."""
        if wanted and getattr(self.cfg, other):
            raise ValueError(f"call model.set_{other}(False) first: only one of the two can be on")

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Nothing to ungroup: every head has keys and values of its own."""
        if ungroup_grouped_query_attention:
            raise ValueError("this model has no grouped query attention")
