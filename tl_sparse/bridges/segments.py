"""Part of a model's forward pass: from one place of its residual stream, or its tokens, to another,
or its logits.

It is the model's own forward pass. A SparseTransformer's blocks are entered and left at the place
itself; a HookedTransformer starts and stops at a layer, and hooks do the rest; a TransformerBridge
runs as a whole, and hooks replace the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tl_sparse.ablation.partial_forward import put
from tl_sparse.bridges.places import START, half_of, hook_of
from tl_sparse.compat import HAS_HOOKED_TRANSFORMER, ModelBase, bridge_class
from tl_sparse.model.transformer import SparseTransformer

Hook = tuple[str, Callable[..., Any]]
Stream = Float[Tensor, "batch pos channel"]


@dataclass(frozen=True, eq=False)
class Segments:
    """A model whose forward pass can be run from any place to any later one."""

    model: nn.Module
    """A SparseTransformer, HookedTransformer or TransformerBridge."""
    checked: set[int] = field(default_factory=set, repr=False)
    """Layers of a TransformerBridge that are known to take a stream in their middle."""

    def __post_init__(self) -> None:
        config: Any = self.model.cfg if hasattr(self.model, "cfg") else None
        if config is None or not self._kind():
            raise TypeError(
                "a bridged model is a SparseTransformer, a HookedTransformer or a "
                f"TransformerBridge, not a {type(self.model).__name__}"
            )
        if getattr(config, "positional_embedding_type", None) == "shortformer":
            raise ValueError("a model with shortformer positions cannot start at a layer")

    @property
    def n_layers(self) -> int:
        """Layers."""
        return int(self.model.cfg.n_layers)  # type: ignore[union-attr, arg-type]

    @property
    def end(self) -> int:
        """The place of a run that goes on to the logits."""
        return 2 * self.n_layers + 1

    @property
    def has_mid(self) -> bool:
        """Whether the stream can be read and replaced between attention and MLP."""
        hooks: Any = self.model.hook_dict
        return hook_of(1, self.n_layers) in hooks

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        start: int = START,
        stop: int | None = None,
        resid: Stream | None = None,
        hooks: Sequence[Hook] = (),
        keep: Collection[int] = (),
        kept: dict[int, Tensor] | None = None,
    ) -> Float[Tensor, "batch pos width"]:
        """The stream at ``stop``, or by default the logits, from the stream at ``start``.

        Gradients flow. Hooks of halves of blocks that do not run are not called.

        Args:
            tokens: Ids; padding, if any, on the right.
            start: A place, or START: the run begins at the tokens.
            stop: A later place; None: the logits.
            resid: The stream at ``start``, unless that is START.
            hooks: (hook name, function), as TransformerLens'.
            keep: Places on the way whose streams are put in ``kept``, as the hooks leave them.
            kept: Where they are put.

        Raises:
            ValueError: no such run, tokens that are not [batch, pos] or too many, or a stream of
                another shape.
        """
        stop = self.end if stop is None else stop
        if not START <= start < stop <= self.end:
            raise ValueError(f"a run from place {start} to {stop} is none: {self.end - 1} is last")
        if (resid is None) != (start == START):
            raise ValueError(
                "a run that starts at a place needs the stream there, others have none"
            )
        self.check(tokens, resid)
        chosen = [(name, fn) for name, fn in hooks if start <= half_of(name, self.n_layers) < stop]
        if kept is None:
            kept, keep = {}, ()
        for place in keep:
            if place != stop:  # whose hook belongs to what would come next
                chosen.append((hook_of(place, self.n_layers), _keeper(kept, place)))
        weight = next(self.model.parameters())
        tokens = tokens.to(weight.device)
        if resid is not None:
            resid = resid.to(weight.device, weight.dtype)
        out: Tensor = getattr(self, self._kind())(tokens, start, stop, resid, chosen)
        if stop in keep:
            kept[stop] = out
        return out

    def check(self, tokens: Any, resid: Shaped[Tensor, "..."] | None) -> None:
        """ValueError unless the model can run on these tokens, and from this stream of them."""
        config: Any = self.model.cfg
        if not isinstance(tokens, Tensor):
            raise ValueError(f"tokens must be integers [batch, pos], not a {type(tokens).__name__};"
                             " texts have theirs from the model's to_tokens")  # fmt: skip
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens must be integers [batch, pos], not {tokens.dtype} "
                             f"{tuple(tokens.shape)}")  # fmt: skip
        if tokens.shape[1] > config.n_ctx:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit n_ctx={config.n_ctx}")
        wanted = (*tokens.shape, config.d_model)
        if resid is not None and resid.shape != wanted:
            raise ValueError(f"the stream of these tokens is {wanted}, not {tuple(resid.shape)}")

    def _kind(self) -> str:
        if isinstance(self.model, SparseTransformer):
            return "_run_sparse"
        if HAS_HOOKED_TRANSFORMER and isinstance(self.model, ModelBase):
            return "_run_hooked"
        return "_run_bridge" if isinstance(self.model, bridge_class()) else ""

    def _run_sparse(
        self, tokens: Tensor, start: int, stop: int, resid: Tensor | None, hooks: list[Hook]
    ) -> Tensor:
        model: Any = self.model
        run = model.prepare(
            tokens, None, None, None, return_type="logits", prepend_bos=None,
            padding_side="right", start_at_layer=None, stop_at_layer=None,
            shortformer_pos_embed=None,
        )  # fmt: skip
        with model.hooks(fwd_hooks=hooks):
            if resid is None:
                embedded = model.tokens_to_embed(run.tokens)
                resid = model.embed_tokens(embedded, run.positions)
            pos_channels = model.pos_channels(run.positions, len(resid))
            for place in range(max(start, 0), min(stop, 2 * self.n_layers)):
                block = model.blocks[place // 2]
                half = block.mlp_half if place % 2 else block.attn_half
                resid = half(resid, pos_channels)
            return model.output_logits(resid, run.tokens) if stop == self.end else resid

    def _run_hooked(
        self, tokens: Tensor, start: int, stop: int, resid: Tensor | None, hooks: list[Hook]
    ) -> Tensor:
        kept: dict[int, Tensor] = {}
        where: dict[str, int] = {} if resid is None else {"start_at_layer": start // 2}
        if resid is not None and start % 2:
            hooks = [(hook_of(start, self.n_layers), put(resid)), *hooks]
        if stop < self.end:
            where["stop_at_layer"] = (stop + 1) // 2
        if stop % 2 and stop < self.end:
            hooks = [*hooks, (hook_of(stop, self.n_layers), _keeper(kept, stop))]
        model: Any = self.model
        given = tokens if resid is None else resid
        out = model.run_with_hooks(given, return_type="logits", fwd_hooks=hooks, **where)
        return kept.get(stop, out)

    def _run_bridge(
        self, tokens: Tensor, start: int, stop: int, resid: Tensor | None, hooks: list[Hook]
    ) -> Tensor:
        kept: dict[int, Tensor] = {}
        at, n = f"blocks.{start // 2}.", self.n_layers
        if resid is not None and start % 2:
            # what a bridge calls hook_resid_mid is only what ln2 reads, and the stream goes past:
            # so attention has to add all of it to nothing
            whole: list[Hook] = [(f"{at}hook_resid_pre", lambda x, hook=None: torch.zeros_like(x)),
                     (f"{at}hook_attn_out", put(resid))]  # fmt: skip
            if start not in self.checked:
                whole.append((f"{at}hook_resid_mid", self._checker(resid, start)))
            hooks = [*whole, *hooks]
        elif resid is not None:
            hooks = [(hook_of(start, n), put(resid)), *hooks]
        early: dict[str, int] = {}
        if stop < self.end:
            hooks = [*hooks, (hook_of(stop, n), _keeper(kept, stop))]
            early = {"stop_at_layer": (stop + 1) // 2} if (stop + 1) // 2 < n else {}
        model: Any = self.model
        out = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks, **early)
        return kept.get(stop, out)

    def _checker(self, resid: Tensor, place: int) -> Callable[..., None]:
        def check(x: Tensor, hook: Any = None) -> None:
            if not torch.equal(x, resid):
                raise ValueError(
                    f"layer {place // 2} of this {type(self.model).__name__} does more between "
                    "attention and MLP than to add: its stream cannot be replaced there"
                )
            self.checked.add(place)

        return check


def _keeper(kept: dict[int, Tensor], place: int) -> Callable[..., None]:
    def keep(x: Tensor, hook: Any = None) -> None:
        kept[place] = x

    return keep
