"""Hooks that never fail silently: unknown and switched-off names raise, caches are never empty."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor

from tl_sparse.compat import HookedRootModule, HookPoint, ReadingHook, tl_utils
from tl_sparse.model.cache import SparseActivationCache
from tl_sparse.model.edge_tools import check_direct_path_hook
from tl_sparse.model.hook_names import ALIASES, SWITCHES, did_you_mean, switch_of
from tl_sparse.model.parts import ModelParts

# Names to cache, or a function that says of each name if it is cached; None is all that fire.
NamesFilter = str | Iterable[str] | Callable[[str], bool] | None


def own_name(point: HookPoint) -> str:
    """The name that ``setup`` gave a hook point, whatever alias it was found by."""
    assert point.name is not None
    return point.name


class HookMixin(ModelParts):
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
            hint = did_you_mean(name, self.hook_dict)
            raise KeyError(f"unknown hook {name!r}{hint} (model.hook_dict lists all)")
        switch = switch_of(name)
        if switch and not getattr(self.cfg, switch):
            raise ValueError(f"hook {name!r} never fires: call model.set_{switch}(True) first")
        return self.mod_dict[name]

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
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook by name or by a filter on names; see TransformerLens."""
        names = [name] if isinstance(name, str) else self.matching(name)
        for each in names:
            self.require_hook(each).add_hook(hook, dir, is_permanent, level, prepend)

    def matching(self, wanted: Callable[[str], bool]) -> list[str]:
        """Names of hook points that fire and pass a filter, each point once.

        Raises:
            ValueError: none does.
        """
        found = {
            id(point): own_name(point)
            for name, point in self.hook_dict.items()
            if wanted(name) and (not (s := switch_of(name)) or getattr(self.cfg, s))
        }
        if not found:
            raise ValueError(
                "the hook name filter matches no hook that fires; model.hook_dict lists all names, "
                f"those ending in {', '.join(sorted(SWITCHES))} fire only when switched on"
            )
        return list(found.values())

    # The two paths by which run_with_hooks and hooks() arrive in TransformerLens:
    def _enable_hook_with_name(self, name: str, hook: Callable, dir: Any) -> None:
        check_direct_path_hook(self, name, hook)
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

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list, list]:
        """The dict that hooks will fill, and the (name, hook) pairs, forward and backward.

        An activation that is asked for by an alias is kept under that name too. ``pos_slice`` takes
        positions out of every activation, wherever its dimension of positions is.

        Raises:
            KeyError, ValueError: as :meth:`require_hook`; or the names_filter matches nothing.
        """
        names = self.cached_names(names_filter)
        cache = {} if cache is None else cache
        positions = tl_utils.Slice.unwrap(pos_slice)
        self.is_caching = True

        def hooks(suffix: str) -> list[tuple[str, Callable]]:
            keep = ReadingHook(
                keep_activation, cache=cache, names=names, suffix=suffix, device=device,
                positions=positions, remove_batch_dim=remove_batch_dim,
            )  # fmt: skip
            return [(name, keep) for name in names]

        return cache, hooks(""), hooks("_grad") if incl_bwd else []

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Cache activations of every run to come, until ``reset_hooks``; returns the dict."""
        cache, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache
        )
        for name, hook in forward:
            self.add_hook(name, hook, dir="fwd")
        for name, hook in backward:
            self.add_hook(name, hook, dir="bwd")
        return cache

    def cached_names(self, names_filter: NamesFilter) -> dict[str, list[str]]:
        """Own name of every hook point that a names_filter selects → names to cache it under."""
        if names_filter is None:
            return {name: [name] for name in self.matching(lambda name: True)}
        if callable(names_filter):
            names = {name: [name] for name in self.matching(names_filter)}
            for alias, point in self.hook_dict.items():
                own = own_name(point)
                if own in names and names_filter(alias) and not names_filter(own):
                    names[own].append(alias)
            return names
        asked = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        if not asked:
            raise ValueError("names_filter is empty: it would cache nothing")
        names = {}
        for name in asked:
            own = own_name(self.require_hook(name))
            names.setdefault(own, [own])
            names[own] += [name] if name not in names[own] else []
        return names

    def run_with_cache(
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        device: Any = None,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and cache activations; returns (output, SparseActivationCache).

        Arguments are TransformerLens'. ``incl_bwd`` calls backward on the output, which must be the
        loss, and caches gradients under names that end in "_grad".

        Raises:
            KeyError: a name that does not exist.
            ValueError: a name that is switched off, or lies behind stop_at_layer; a filter that
                matches nothing; remove_batch_dim of several examples; incl_bwd without a loss.
        """
        cache, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice
        )
        with self.hooks(forward, backward, reset_hooks_end, clear_contexts):
            out = self(*model_args, **model_kwargs)
            if incl_bwd:
                if not isinstance(out, Tensor) or out.numel() != 1 or not out.requires_grad:
                    raise ValueError(
                        "incl_bwd=True calls backward on the output: it needs return_type='loss', "
                        "loss_per_token=False and gradients that are not switched off"
                    )
                out.backward()
        if names_filter is not None:
            self._check_fired(cache, [name for name, _ in forward], callable(names_filter))
        if not return_cache_object:
            return out, cache
        return out, SparseActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    @staticmethod
    def _check_fired(cache: dict[str, Tensor], names: list[str], filtered: bool) -> None:
        silent = [name for name in names if name not in cache]
        if silent and (not filtered or len(silent) == len(names)):
            raise ValueError(
                f"nothing to cache at {', '.join(silent)}: the run did not come by. It began or "
                "stopped at another layer, or a tool put another module in the hook point's place"
            )

    def set_use_hook_tokens(self, use_hook_tokens: bool) -> None:
        """Whether ``hook_tokens`` (the token ids, before they are embedded) fires."""
        self.cfg.use_hook_tokens = use_hook_tokens

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether ``attn.hook_result`` (what each head adds to the residual stream) fires."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether ``hook_mlp_in`` (the residual stream that the MLP alone reads) fires."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether ``hook_attn_in`` (the residual stream that each head reads) fires."""
        self.only_one(use_attn_in, "use_split_qkv_input")
        self.cfg.use_attn_in = use_attn_in

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether each head's q, k and v read copies of their own, ``hook_q_input`` and so on.

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


def keep_activation(
    activation: Tensor,
    hook: HookPoint,
    *,
    cache: dict[str, Tensor],
    names: dict[str, list[str]],
    suffix: str,
    device: Any,
    positions: Any,
    remove_batch_dim: bool,
) -> None:
    """Hook: store a detached activation, or a gradient, under its names."""
    kept = activation.detach().to(device)
    if positions.mode != "identity":
        # [batch, head, dest, src]; all others are [batch, pos, ...]
        by_head = own_name(hook).endswith(("hook_pattern", "hook_attn_scores"))
        kept = positions.apply(kept, dim=2 if by_head else 1)
    if remove_batch_dim:
        if len(kept) != 1:
            raise ValueError(f"remove_batch_dim=True needs a batch of one, not of {len(kept)}")
        kept = kept[0]
    for name in names[own_name(hook)]:
        cache[name + suffix] = kept
