"""``SplicedModel``: a model with the features of its dictionaries as hook points of its own.

So a traced graph becomes a :class:`~tl_sparse.circuits.Circuit` over features, which the
faithfulness suite judges like any other, in three worlds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.circuits import Circuit
from tl_sparse.circuits.by_hand import circuit_of_channels
from tl_sparse.compat import HookPoint, has_hooks
from tl_sparse.model.added_points import AddedPoints
from tl_sparse.sites import NodeIndex
from tl_sparse.tracing.biases import mlp_hooks, plain_mlps
from tl_sparse.tracing.functions import AnyDictionary
from tl_sparse.tracing.splice import Splice, keep_in

World = Literal["linear", "spliced", "original"]


def feature_hook(splice: Splice, site: str) -> str:
    """Name of the hook point at which a site's features are in a SplicedModel."""
    if site == "embed":
        return "embed.hook_features"
    inside = re.fullmatch(r"(\d+)\.(\w+)", site)
    if inside:
        return f"blocks.{inside[1]}.{inside[2]}.hook_features"
    return f"blocks.{splice.layer(site)}.{site.replace('.', '_')}.hook_features"


class SplicedModel(AddedPoints):
    """A model whose dictionaries' features can be read and set by hooks.

    Beside the model's own hooks there is ``blocks.0.mlp.hook_features`` [batch, pos, feature] for
    every dictionary (``embed.hook_features`` for the token embedding's). Where nobody hooks them it
    is the model to the bit. Where a hook changes them, what follows depends on ``world``:

    - ``original``: the change is added to the model's own activation, along the features'
      directions; everything after it is computed by the model, errors too.
    - ``spliced``: dictionaries stand in the model; their errors stay what they are on these prompts
      without the change, everything else is computed.
    - ``linear``: patterns, norms, active sets and errors (and MLPs without a dictionary) stay too,
      so that effects are what traced contributions say, exactly.

    In the last two a run is two runs of the model. It is run on tokens, without a cache.
    """

    def __init__(self, splice: Splice, world: World = "original") -> None:
        """Hook points for a splice.

        Args:
            splice: The model and its dictionaries; none of them is changed.
            world: What a change does.

        Raises:
            ValueError: unknown world.
        """
        super().__init__()
        if world not in get_args(World):
            raise ValueError(f"world={world!r}; choose from {', '.join(get_args(World))}")
        self.inner, self.splice, self.world = splice.model, splice, world
        self.cfg: Any = splice.model.cfg
        self.names = {d.name: feature_hook(splice, d.name) for d in splice.dictionaries}
        self.add_points({name: HookPoint() for name in self.names.values()})
        # of a model's fingerprint, so that a circuit is not taken for one of other dictionaries
        weights = [w for d in splice.dictionaries for w in d.parts]
        sums = [[w.double().sum(), w.double().abs().sum()] for w in weights]
        self.register_buffer("dictionary_sums", torch.tensor(sums).view(-1, 2))

    def index(self, sites: Iterable[str] | None = None) -> NodeIndex:
        """Features as nodes, of all dictionaries or some."""
        chosen = [self.splice.dictionary(s) for s in sites] if sites else self.splice.dictionaries
        return NodeIndex.over(self, {self.names[d.name]: d.d_sae for d in chosen})

    def forward(
        self, tokens: Int[Tensor, "batch pos"], return_type: str | None = "logits", **options: Any
    ) -> Any:
        """The model, changed as the hooks on the features' points say."""
        inner: Any = self.inner
        if not any(has_hooks(point) for point in self._points.values()):
            return inner(tokens, return_type=return_type, **options)
        clean: dict[str, Tensor] = {}
        if self.world != "original":
            with torch.no_grad(), inner.hooks(fwd_hooks=self._recording(clean)):
                inner(tokens, return_type="logits")  # so that the final norm runs
        with inner.hooks(fwd_hooks=self._changing(clean)):
            return inner(tokens, return_type=return_type, **options)

    def _held(self) -> list[str]:
        """Hooks of what stays constant in the linear world."""
        outs = [mlp_hooks(layer)[2] for layer in plain_mlps(self.splice)]
        return self.splice.constant_hooks + outs

    def _recording(self, clean: dict[str, Tensor]) -> list[FwdHook]:
        reads = [d.hook_in for d in self.splice.dictionaries]
        outs = [d.hook_out for d in self.splice.dictionaries if d.transcoder]
        held = self._held() if self.world == "linear" else []
        return [keep_in(clean, name) for name in (*reads, *outs, *held)]

    def _changing(self, clean: dict[str, Tensor]) -> list[FwdHook]:
        hooks: list[FwdHook] = []
        if self.world == "linear":
            hooks += [(name, _constant(clean[name])) for name in self._held() if name in clean]
        live: dict[str, Tensor] = {}
        hooks += [keep_in(live, d.hook_in) for d in self.splice.dictionaries if d.transcoder]
        return hooks + [
            (d.hook_out, self._change(d, live, clean)) for d in self.splice.dictionaries
        ]

    def _change(self, d: AnyDictionary, live: dict[str, Tensor], clean: dict[str, Tensor]) -> Any:
        point = self._points[self.names[d.name]]

        def hook(x: Tensor, hook: Any = None) -> Tensor:
            shape, x = x.shape, x.flatten(2)
            x_in = live[d.hook_in].flatten(2) if d.transcoder else x
            if self.world == "original":
                if not has_hooks(point):
                    return x.view(shape)
                features = d.encode(x_in, x)
                changed = point(features.clone())
                return (x + (changed - features) @ d.W_dec).view(shape)
            was_in, was_out = (clean[name].flatten(2) for name in (d.hook_in, d.hook_out))
            was = d.encode(was_in, was_out)
            error = was_out - (was @ d.W_dec + constant(d, was_in, was_out, was_in, was_out))
            if self.world == "linear":
                features = d.held(x_in, was, was_in, was_out)
                rest = constant(d, x_in, x, was_in, was_out)
            else:
                features, rest = d.encode(x_in, x), constant(d, x_in, x, x_in, x)
            changed = point(features.clone()) if has_hooks(point) else features
            return (changed @ d.W_dec + rest + error).view(shape)

        return hook


def constant(
    d: AnyDictionary, x_in: Tensor, x_out: Tensor, factor_in: Tensor, factor_out: Tensor
) -> Tensor:
    """What a dictionary writes besides its features, with the norm factors of given activations.

    The mean over channels that a layer norm adds is left to the error.
    """
    written = d.b_dec
    if d.W_skip is not None:
        written = written + d.centred(x_in) * d.factor(factor_in) @ d.W_skip
    return written / d.factor(factor_out) if d.norm != "none" else written


def _constant(value: Tensor) -> Any:
    return lambda x, hook=None: value


def feature_masks(
    splice: Splice, features: Iterable[tuple[str, int]]
) -> Mapping[str, Bool[Tensor, " feature"]]:
    """Masks over each dictionary's features from (site, index) pairs."""
    masks = {d.name: torch.zeros(d.d_sae, dtype=torch.bool) for d in splice.dictionaries}
    for site, index in features:
        splice.check_feature(site, index)
        masks[site][index] = True
    return masks


def feature_circuit(
    model: SplicedModel,
    features: Iterable[tuple[str, int]] | nn.Module | Any,
    task: str,
    tokens: Int[Tensor, "sequence pos"],
) -> Circuit:
    """A circuit over features, which stand for themselves at every position.

    Args:
        model: The model with features as hook points.
        features: (site, index) of each kept feature, or a graph or several (all their features).
        task: Name of the task.
        tokens: Text over which the means are taken that removed features are set to.

    Raises:
        ValueError: a site or feature that the dictionaries do not have.
    """
    masks = feature_masks(model.splice, features_of(features))
    kept = {model.names[site]: mask for site, mask in masks.items()}
    return circuit_of_channels(model, task, kept, tokens)


def features_of(features: Any) -> list[tuple[str, int]]:
    """(site, index) pairs of a graph, of several, or of what already is such pairs."""
    graphs = [features] if hasattr(features, "features") else list(features)
    found: dict[tuple[str, int], None] = {}
    for graph in graphs:
        if hasattr(graph, "features"):
            table = graph.features
            found |= dict.fromkeys(zip(table["site"], map(int, table["index"]), strict=True))
        else:
            site, index = graph
            found[site, int(index)] = None
    return list(found)
