"""``AddedPoints``: a model with hook points of its own around another model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from tl_sparse.compat import HookedRootModule
from tl_sparse.model.hook_names import switch_of
from tl_sparse.model.transformer import SparseTransformer


class AddedPoints(HookedRootModule):
    """What a model needs whose hook points are those of a model inside it, and more.

    A subclass has ``inner``, adds points with :meth:`add_points`, and runs ``inner`` in its
    forward pass; everything that takes a model of TransformerLens' kind then takes it.
    """

    inner: nn.Module

    def add_points(self, points: Mapping[str, Any]) -> None:
        """Hook points by their names, which none of the inner model's has."""
        self._points = dict(points)
        for name, point in self._points.items():
            point.name = name

    @property
    def hook_dict(self) -> dict[str, Any]:
        """The inner model's hook points that fire, and the added ones, by name."""
        inner: Any = self.inner
        fires = {
            name: point
            for name, point in inner.hook_dict.items()
            if not (isinstance(inner, SparseTransformer) and (switch := switch_of(name)))
            or getattr(inner.cfg, switch)
        }
        return {**fires, **self._points}

    @property
    def mod_dict(self) -> dict[str, Any]:
        """The same, where TransformerLens looks for them."""
        return self.hook_dict

    @property
    def tokenizer(self) -> Any:
        """The inner model's."""
        return getattr(self.inner, "tokenizer", None)

    def to_tokens(self, *args: Any, **options: Any) -> Int[Tensor, "batch pos"]:
        """Token ids of texts, as the inner model makes them."""
        inner: Any = self.inner
        return inner.to_tokens(*args, **options)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[Any, Any]] = (),
        bwd_hooks: Sequence[tuple[Any, Any]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Any]:
        """Hooks inside a block: on the added points, and on the inner model's own."""
        own, theirs = zip(*map(self._divided, (fwd_hooks, bwd_hooks)), strict=True)
        inner: Any = self.inner
        with (
            inner.hooks(*theirs, reset_hooks_end, clear_contexts),
            super().hooks(*own, reset_hooks_end, clear_contexts),
        ):
            yield self

    def hook_points(self) -> list[Any]:
        """The added points: the inner model looks after its own."""
        return list(self._points.values())

    def _divided(
        self, hooks: Sequence[tuple[Any, Any]]
    ) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
        named = [
            (name, function)
            for wanted, function in hooks
            for name in ([wanted] if isinstance(wanted, str) else filter(wanted, self.hook_dict))
        ]
        if unknown := [name for name, _ in named if name not in self.hook_dict]:
            raise KeyError(f"unknown hook {unknown[0]!r} (model.hook_dict lists all)")
        own = [(name, fn) for name, fn in named if name in self._points]
        return own, [(name, fn) for name, fn in named if name not in self._points]
