"""``BridgedPair``: a dense and a sparse model that share their residual streams through bridges."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.bridges.bridged_dense import BridgedDense
from tl_sparse.bridges.bridges import Bridges
from tl_sparse.bridges.checks import check_sizes, check_vocabularies
from tl_sparse.bridges.dense_circuit import DenseCircuit, dense_circuit
from tl_sparse.bridges.path import OTHER, HybridPath, Side, Streams, check_side
from tl_sparse.bridges.places import START
from tl_sparse.bridges.reading import ablate, patch
from tl_sparse.bridges.segments import Hook, Segments
from tl_sparse.bridges.steering import steer
from tl_sparse.circuits import Circuit
from tl_sparse.compat import ActivationCache
from tl_sparse.node import Nodes
from tl_sparse.nodes.prompts import Prompts, PromptsLike
from tl_sparse.storage.fingerprint import fingerprint

CacheLike = Mapping[str, Tensor] | ActivationCache


class BridgedPair(nn.Module):
    """Two models, bridges between them, and every hybrid of the two.

    A hybrid forward pass runs one model up to a site, bridges its residual stream, and goes on in
    the other one; it may change over again at later sites. Hooks of both models are reached under
    ``dense.`` and ``sparse.``. Neither model is changed, and gradients flow through all of it: who
    trains decides what is frozen.

    Source: Gao et al. 2025 (arXiv 2511.13653), §2.3 and appendix A.3.
    """

    def __init__(self, dense: nn.Module, sparse: nn.Module, bridges: Bridges) -> None:
        """Join two models.

        Args:
            dense: A SparseTransformer, HookedTransformer or TransformerBridge.
            sparse: The same; usually a SparseTransformer.
            bridges: Bridges made for models of these sizes.

        Raises:
            TypeError: a model is none of these.
            ValueError: the models' vocabularies differ, the bridges are of other sizes, or they
                say that they were made for other models.
        """
        super().__init__()
        check_vocabularies(dense, sparse)
        self.dense, self.sparse, self.bridges = dense, sparse, bridges
        self._known: dict[Side, Segments] = {}
        check_sizes({side: self._segments(side) for side in OTHER}, bridges.config)
        for side, expected in bridges.made_for.items():
            if fingerprint(getattr(self, side)) != expected:
                raise ValueError(
                    f"these bridges were made for another {side} model, or it has changed since "
                    "(weights, config or dtype); set bridges.made_for = {} to use them all the same"
                )

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order of computation."""
        return self.bridges.names

    def model(self, side: Side) -> Any:
        """The model of a side.

        Raises:
            ValueError: no such side.
        """
        check_side(side)
        return getattr(self, side)

    def hook(self, side: Side, site: str) -> str:
        """Name of a model's hook that sees the residual stream at a site."""
        found = self.bridges.site(site)
        return found.dense_hook if side == "dense" else found.sparse_hook

    def encode(self, cache: CacheLike) -> dict[str, Tensor]:
        """The dense model's streams in a cache as the sparse model's, by the sparse hooks' names.

        Raises:
            ValueError: the cache has none of the sites' hooks.
        """
        return self._bridged(cache, "dense")

    def decode(self, cache: CacheLike) -> dict[str, Tensor]:
        """The sparse model's streams in a cache as the dense model's, by the dense hooks' names.

        Raises:
            ValueError: the cache has none of the sites' hooks.
        """
        return self._bridged(cache, "sparse")

    def bridge(
        self, side: Side, site: str, x: Float[Tensor, "... channel"]
    ) -> Float[Tensor, "... other_channel"]:
        """A model's stream at a site as the other model's."""
        return self.bridges.encode(site, x) if side == "dense" else self.bridges.decode(site, x)

    def streams(
        self, side: Side, tokens: Int[Tensor, "batch pos"], hooks: Sequence[Hook] = ()
    ) -> Streams:
        """One model's logits and its stream at every site, from one forward pass."""
        places, kept = self._places(side), dict[int, Tensor]()
        logits = self._segments(side).run(
            tokens, hooks=hooks, keep=tuple(places.values()), kept=kept
        )
        return Streams({name: kept[place] for name, place in places.items()}, logits)

    def residuals(
        self, side: Side, tokens: Int[Tensor, "batch pos"], hooks: Sequence[Hook] = ()
    ) -> dict[str, Float[Tensor, "batch pos channel"]]:
        """One model's stream at every site, by name; nothing after the last site is computed."""
        places, kept, run = self._places(side), dict[int, Tensor](), self._segments(side)
        run.run(tokens, stop=run.end - 1, hooks=hooks, keep=tuple(places.values()), kept=kept)
        return {name: kept[place] for name, place in places.items()}

    def _segments(self, side: Side) -> Segments:
        model = self.model(side)
        if side not in self._known or self._known[side].model is not model:
            self._known[side] = Segments(model)
        return self._known[side]

    def _places(self, side: Side) -> dict[str, int]:
        check_side(side)
        return {site.name: getattr(site, side) for site in self.bridges.sites}

    def tail(
        self,
        side: Side,
        site: str,
        resid: Float[Tensor, "batch pos channel"],
        tokens: Int[Tensor, "batch pos"],
        *,
        stop: str | None = None,
        hooks: Sequence[Hook] = (),
        keep: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "batch pos width"]:
        """A model run on from a site, to its logits or to a later site's stream.

        Args:
            side: Which model.
            site: Where it begins.
            resid: Its stream there: what :meth:`bridge` makes of the other model's, for example.
            tokens: The tokens that the stream is of.
            stop: The site to stop at; None: the logits.
            hooks: Hooks of this model; those before the site are not called.
            keep: Filled with the streams at all later sites up to the end, by name.
        """
        first = getattr(self.bridges.site(site), side)
        last = None if stop is None else getattr(self.bridges.site(stop), side)
        segments, kept = self._segments(side), dict[int, Tensor]()
        places = {} if keep is None else self._places(side)
        end = segments.end if last is None else last
        at = {name: place for name, place in places.items() if first < place <= end}
        out = segments.run(tokens, first, last, resid, hooks, tuple(at.values()), kept)
        if keep is not None:
            keep |= {name: kept[place] for name, place in at.items()}
        return out

    def forward(
        self, tokens: Int[Tensor, "batch pos"], path: HybridPath | Side = "dense",
        fwd_hooks: Sequence[Hook] = (),
    ) -> Float[Tensor, "batch pos d_vocab"]:  # fmt: skip
        """The logits along a path.

        Args:
            tokens: Ids; padding, if any, on the right.
            path: ``"dense"``, ``"sparse"`` or a :class:`HybridPath`.
            fwd_hooks: (name, function), the names with ``dense.`` or ``sparse.`` in front. A hook
                is called where its model runs at that place.

        Raises:
            ValueError: an unknown site, sites that do not come one after the other, or a hook's
                name without its model.
        """
        path = HybridPath(path) if isinstance(path, str) else path
        numbers = [self.bridges.number(name) for name in path.changes]
        if any(later <= sooner for sooner, later in itertools.pairwise(numbers)):
            raise ValueError(f"the sites of path {path} must come one after the other")
        hooks = self._hooks_of(fwd_hooks)
        place, resid = START, None
        for i, side in enumerate(path.sides):
            at = path.changes[i] if i < len(path.changes) else None
            stop = None if at is None else getattr(self.bridges.site(at), side)
            out = self._segments(side).run(tokens, place, stop, resid, hooks[side])
            if at is not None:
                resid = self.bridge(side, at, out)
                place = getattr(self.bridges.site(at), OTHER[side])
        return out

    def run_with_hooks(
        self, tokens: Int[Tensor, "batch pos"], path: HybridPath | Side = "dense",
        fwd_hooks: Sequence[Hook] = (),
    ) -> Float[Tensor, "batch pos d_vocab"]:  # fmt: skip
        """The same as calling the pair, by the name that TransformerLens' models have for it."""
        out: Tensor = self(tokens, path, fwd_hooks)
        return out

    def run_with_cache(
        self,
        tokens: Int[Tensor, "batch pos"],
        path: HybridPath | Side = "dense",
        names_filter: Callable[[str], bool] | Collection[str] | None = None,
        fwd_hooks: Sequence[Hook] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits along a path, and the activations of the halves of blocks that ran.

        ``names_filter`` takes or lists names with ``dense.`` or ``sparse.`` in front; None: the
        residual streams at the sites. Activations are detached.
        """
        if names_filter is None:
            sites = self.bridges.sites
            names_filter = {f"{side}.{self.hook(side, s.name)}" for side in OTHER for s in sites}
        names = self._names(names_filter) if callable(names_filter) else list(names_filter)
        cache: dict[str, Tensor] = {}

        def keeper(name: str) -> Callable[..., None]:
            def keep(x: Tensor, hook: Any = None) -> None:
                cache[name] = x.detach()

            return keep

        readers = [(name, keeper(name)) for name in names]
        return self.run_with_hooks(tokens, path, [*fwd_hooks, *readers]), cache

    @property
    def hook_dict(self) -> dict[str, nn.Module]:
        """Every hook point of both models, under ``dense.`` and ``sparse.``."""
        return {
            f"{side}.{name}": point
            for side in OTHER
            for name, point in self.model(side).hook_dict.items()
        }

    @contextlib.contextmanager
    def hooks(
        self, fwd_hooks: Sequence[Hook] = (), bwd_hooks: Sequence[Hook] = ()
    ) -> Iterator[BridgedPair]:
        """Hooks on both models inside a block, names with ``dense.`` or ``sparse.`` in front."""
        forward, backward = self._hooks_of(fwd_hooks), self._hooks_of(bwd_hooks)
        with contextlib.ExitStack() as stack:
            for side in OTHER:
                stack.enter_context(self.model(side).hooks(forward[side], backward[side]))
            yield self

    def steer(
        self,
        nodes: Nodes,
        counterfactual: PromptsLike | Prompts | None,
        presented: PromptsLike | Prompts,
        strength: float = 1.0,
        **options: Any,
    ) -> list[FwdHook]:
        """Hooks on the dense model that move nodes of the sparse one towards what they are on other
        prompts; see :func:`~tl_sparse.bridges.steer`."""
        return steer(self, nodes, counterfactual, presented, strength, **options)

    def ablate(
        self,
        nodes: Nodes,
        text: PromptsLike | Prompts,
        values: float | Float[Tensor, " node"] | None = None,
    ) -> list[FwdHook]:
        """Hooks on the dense model that set nodes of the sparse one to fixed values there; see
        :func:`~tl_sparse.bridges.ablate`."""
        return ablate(self, nodes, text, values)

    def patch(
        self,
        nodes: Nodes,
        counterfactual: PromptsLike | Prompts | None,
        presented: PromptsLike | Prompts,
        **options: Any,
    ) -> list[FwdHook]:
        """Hooks on the dense model that set nodes of the sparse one to what the dense model itself
        has on other prompts; see :func:`~tl_sparse.bridges.patch`."""
        return patch(self, nodes, counterfactual, presented, **options)

    def bridged_dense(self, reference: PromptsLike | Prompts) -> BridgedDense:
        """The dense model with the sparse one's nodes as hook points; see
        :class:`~tl_sparse.bridges.BridgedDense`."""
        return BridgedDense(self, reference)

    def dense_circuit(
        self, circuit: Circuit, tokens: Int[Tensor, "sequence pos"], **options: Any
    ) -> DenseCircuit:
        """What a circuit of the sparse model names in the dense one; see
        :func:`~tl_sparse.bridges.dense_circuit`."""
        return dense_circuit(self, circuit, tokens, **options)

    def _hooks_of(self, hooks: Sequence[Hook]) -> dict[Side, list[Hook]]:
        found: dict[Side, list[Hook]] = {"dense": [], "sparse": []}
        for wanted, fn in hooks:
            for name in self._names(wanted) if callable(wanted) else (wanted,):
                side, _, inner = name.partition(".")
                if side not in OTHER:
                    raise ValueError(f"hook {name!r} must begin with dense. or sparse.")
                if inner not in self.model(side).hook_dict:
                    raise ValueError(f"the {side} model has no hook {inner!r}")
                found[side].append((inner, fn))
        return found

    def _names(self, wanted: Callable[[str], bool]) -> list[str]:
        """Names that pass a filter, each hook point of a model once."""
        points = self.hook_dict
        names = [name for name in points if wanted(name)]
        return list({(name.partition(".")[0], id(points[name])): name for name in names}.values())

    def _bridged(self, cache: CacheLike, side: Side) -> dict[str, Tensor]:
        names = set(cache.keys())
        out = {
            self.hook(OTHER[side], site.name): self.bridge(side, site.name, cache[name])
            for site in self.bridges.sites
            if (name := self.hook(side, site.name)) in names
        }
        if not out:
            hooks = ", ".join(self.hook(side, name) for name in self.sites)
            raise ValueError(f"the cache has no residual stream at a bridge: give one of {hooks}")
        return out

    def __repr__(self) -> str:
        names = " and ".join(type(self.model(side)).__name__ for side in OTHER)
        return f"BridgedPair({names}, {self.bridges!r})"
