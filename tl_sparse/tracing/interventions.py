"""Changing features: plain hooks for ``run_with_hooks``, which act while text is generated too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparse.ablation import FwdHook
from tl_sparse.tracing.functions import AnyDictionary
from tl_sparse.tracing.splice import Splice, keep_in

How = Literal["ablate", "scale", "set", "add"]


@dataclass(frozen=True)
class FeatureChange:
    """What is done to one feature."""

    site: str
    """Name of the dictionary."""
    index: int
    """Number of the feature."""
    how: How = "ablate"
    """``ablate``: to zero; ``scale``: times ``value``; ``set``: to ``value``; ``add``: by
    ``value``. Ablating and scaling change a feature where it is active alone."""
    value: float = 0.0
    """In the units of :meth:`Dictionary.encode`."""
    pos: int | slice | None = None
    """Where: a position from the first token or (negative) from the end of what the model is run
    on, a slice (open ends go on while text is generated), or None for everywhere."""

    def __post_init__(self) -> None:
        """Refuse an unknown change."""
        if self.how not in get_args(How):
            raise ValueError(f"how={self.how!r}; choose from {', '.join(get_args(How))}")

    def of(self, values: Tensor) -> Tensor:
        """The new activations."""
        if self.how == "scale":
            return values * self.value
        if self.how == "add":
            return values + self.value
        return torch.full_like(values, self.value if self.how == "set" else 0.0)


def feature_hooks(
    splice: Splice,
    changes: Iterable[FeatureChange],
    *,
    tokens: Int[Tensor, "prompt pos"] | None = None,
) -> list[FwdHook]:
    """Hooks that change features, for ``run_with_hooks(fwd_hooks=...)`` or ``model.hooks``.

    What a feature writes is changed along its direction in the model's own activation, by the
    difference between its new and its present activation. By default everything after it is free:
    the model computes with the change. Given ``tokens``, effects are constrained to direct ones:
    every pattern, norm scale and what every other sublayer writes stays what it is on these tokens,
    on which the model then has to be run; in a strict splice the root then changes by what the
    direct edges say.

    While text is generated with a cache of keys and values the model is run on one token at a time,
    whose position the hooks count on from the first run's; ``reset`` them by making new ones.

    Raises:
        ValueError: a feature that the dictionaries do not have.
    """
    by_site: dict[str, list[FeatureChange]] = {}
    for change in changes:
        splice.check_feature(change.site, change.index)
        by_site.setdefault(change.site, []).append(change)
    held, inputs = ({}, {}) if tokens is None else held_activations(splice, tokens)
    hooks: list[FwdHook] = []
    outs: dict[str, list[Any]] = {}
    for site, mine in by_site.items():
        dictionary = splice.dictionary(site)
        edit = _Edit(dictionary, mine, inputs.get(dictionary.hook_in))
        if dictionary.transcoder and edit.x_in is None:
            hooks.append((dictionary.hook_in, edit.read))
        outs.setdefault(dictionary.hook_out, []).append(edit)
    for name, value in held.items():
        if name not in outs:
            hooks.append((name, _held(value)))
    for name, edits in outs.items():
        if name in held:
            hooks.append((name, _held(held[name])))
        hooks += [(name, edit) for edit in edits]
    return hooks


class _Edit:
    """Hook function at a dictionary's output."""

    def __init__(
        self, dictionary: AnyDictionary, changes: Sequence[FeatureChange], x_in: Tensor | None
    ) -> None:
        self.dictionary, self.changes, self.x_in = dictionary, changes, x_in
        self.seen = 0  # positions in earlier runs of one generation

    def read(self, x: Tensor, hook: Any = None) -> Tensor:
        self.x_in = x
        return x

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        d, shape = self.dictionary, x.shape
        x = x.flatten(2)
        x_in = x if self.x_in is None else self.x_in.flatten(2)
        n_pos = x.shape[1]
        first = self.seen if n_pos == 1 else 0
        self.seen = first + n_pos
        features = d.encode(x_in, x)
        delta = torch.zeros_like(x)
        for change in self.changes:
            here = positions(change.pos, first, n_pos)
            if not len(here):
                continue
            was = features[:, here, change.index]
            delta[:, here] += (change.of(was) - was)[..., None] * d.W_dec[change.index]
        return (x + delta).view(shape)


def positions(pos: int | slice | None, first: int, n_pos: int) -> list[int]:
    """Which of ``n_pos`` positions, the first of which is number ``first``, are meant."""
    if pos is None:
        return list(range(n_pos))
    if isinstance(pos, slice):
        stop = first + n_pos if pos.stop is None else pos.stop
        return [i for i in range(n_pos) if (pos.start or 0) <= first + i < stop]
    if pos < 0:
        return [n_pos + pos] if first == 0 and n_pos + pos >= 0 else []
    return [pos - first] if first <= pos < first + n_pos else []


def held_activations(
    splice: Splice, tokens: Int[Tensor, "prompt pos"]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Patterns, norm scales and what every dictionary's sublayer and every MLP writes on some
    tokens, by hook; and what transcoders read."""
    model: Any = splice.model
    names = splice.constant_hooks
    outs = [d.hook_out for d in splice.dictionaries]
    for layer in range(splice.n_layers):
        outs.append(f"blocks.{layer}.hook_mlp_out")
    found: dict[str, Tensor] = {}
    reads = [d.hook_in for d in splice.dictionaries if d.transcoder]
    wanted = [name for name in dict.fromkeys([*names, *outs, *reads]) if name in model.hook_dict]
    with torch.no_grad():
        # asked for logits, since without them the final norm need not run
        model.run_with_hooks(
            tokens, return_type="logits", fwd_hooks=[keep_in(found, name) for name in wanted]
        )
    inputs = {name: found[name] for name in reads}
    return {name: x for name, x in found.items() if name in {*names, *outs}}, inputs


def _held(value: Tensor) -> Any:
    def hook(x: Tensor, hook: Any = None) -> Tensor:
        if x.shape != value.shape:
            raise ValueError(
                "effects are constrained to direct ones on other tokens: an activation is "
                f"{tuple(x.shape)}, and was {tuple(value.shape)}"
            )
        return value

    return hook
