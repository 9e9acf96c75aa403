"""Partial runs of a SparseTransformer on prompts, from wherever a change begins.

A change at one site leaves everything before it as it was, a change at some position all positions
before that, and after the last block's attention only the last tokens matter. All of it is done by
hooks on the one forward pass: a run starts at a recorded stream, sees recorded keys and values of
what stands before its rows, and cuts positions where no attention follows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_sparse.ablation.frozen_layernorms import norm_hooks
from tl_sparse.ablation.interventions import FwdHook, Intervention
from tl_sparse.ablation.prompt_packing import PackedPairs
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import NodeIndex, Part, layer_of, site_at
from tl_sparse.tasks import TaskBatch


@dataclass(frozen=True, eq=False)
class Prefix:
    """One layer's keys and values at the tokens before each row's own: what a KV cache holds."""

    keys: Float[Tensor, "row src head d_head"]
    """Keys, as attention uses them."""
    values: Float[Tensor, "row src head d_head"]
    """Values."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, these first; as TransformerLens' cache entries do it."""
        return torch.cat([self.keys, k], 1), torch.cat([self.values, v], 1)


@dataclass(frozen=True, eq=False)
class PartialForward:
    """Some pairs of a task, the hooks that hold on them, and the streams recorded under these."""

    model: SparseTransformer
    packed: PackedPairs
    correct_token: Int[Tensor, "pair member"] | None = None
    """Ids of the correct next tokens of A and B; None where only logits are asked for."""
    incorrect_token: Int[Tensor, "pair member"] | None = None
    """Ids of the incorrect ones."""
    hooks: tuple[FwdHook, ...] = ()
    """What holds in every run, such as a circuit's ablation; of any number of positions."""
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    """Norm scales to hold, by hook; none: norms are free."""
    seen: Mapping[str, Tensor] = field(default_factory=dict)
    """Recorded activations by hook: sites before ``hooks``, and the streams of every block."""
    prefix: tuple[Prefix, ...] = ()
    """Of every layer what stands before the rows' tokens; none: the rows are whole prompts."""

    @classmethod
    def of(
        cls, model: SparseTransformer, batch: TaskBatch, packed: PackedPairs, *, freeze_norm: bool
    ) -> PartialForward:
        """Pairs of a batch, without hooks; norms held at the full model's scales if asked for."""
        correct, incorrect = (
            x[packed.prompts].view_as(packed.last)
            for x in (batch.correct_token, batch.incorrect_token)
        )
        run = cls(model, packed, correct, incorrect)
        if not freeze_norm:
            return run
        # norms of positions keep their scales anyway
        names = [name for name in norm_hooks(model) if "_pos." not in name]
        scales: dict[str, Tensor] = {}
        points = [(name, partial(_record, scales, name)) for name in names]
        with model.hooks(fwd_hooks=points):
            run.logit_diffs(run._blocks(run._embedded(1, []), 0, [], cut=False))
        return replace(run, scales=scales)

    def recorded(
        self, hooks: Sequence[FwdHook], index: NodeIndex
    ) -> tuple[PartialForward, Float[Tensor, " prompt"]]:
        """The same pairs under hooks, sites and residual streams recorded; their logit_diffs."""
        run, final = self.recording(hooks, index.slices)
        return run, run.logit_diffs(final)[0]

    def recording(
        self, hooks: Sequence[FwdHook], at: Collection[str]
    ) -> tuple[PartialForward, Float[Tensor, "row member channel"]]:
        """The same prompts under hooks, with these hooks' activations and the residual streams
        recorded; the last block's output at the last tokens."""
        points = self.model.hook_dict
        streams = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", PLACE]
        layers = range(self.model.config.n_layers)
        names = [f"blocks.{layer}.{name}" for layer in layers for name in streams]
        names = [name for name in (*at, *names) if name in points]
        seen: dict[str, Tensor] = {}
        run = replace(self, hooks=tuple(hooks), seen=seen)
        readers = [(name, partial(_record, seen, name)) for name in dict.fromkeys(names)]
        with self.model.hooks(fwd_hooks=readers):
            final = run._blocks(run._embedded(1, []), 0, [], cut=False)
        return run, final

    @staticmethod
    def can_start_at(index: NodeIndex) -> bool:
        """Whether all nodes are at hooks that a run can start from: the embedding's and blocks'."""
        return all(name.startswith(("hook_embed", "blocks.")) for name in index.slices)

    def changed(self, change: FwdHook, copies: int) -> Float[Tensor, "copy prompt"]:
        """Logit differences of the pairs' prompts, so many copies of them side by side, with one
        more hook. A and B of each pair stand side by side, as in ``packed.prompts``."""
        return self.logit_diffs(self.changed_stream([change], copies))

    def changed_stream(
        self, changes: Sequence[FwdHook], copies: int, cut: bool = True
    ) -> Float[Tensor, "row_of_copy member channel"]:
        """The last block's output at the last tokens, so many copies of the prompts one after the
        other, with more hooks, of which the first to run stands first.

        Hooks behind the last attention see the last tokens alone, unless ``cut`` is off.
        """
        start, layer, late = self._start(changes[0][0])
        late = late and cut
        if start == "embed":
            return self._blocks(self._embedded(copies, changes), 0, changes, cut)
        if start == "attn":
            resid = self._tiled(self._seen(layer, "hook_resid_pre"), copies)
            return self._blocks(resid, layer, changes, cut)
        hook = "hook_resid_mid" if start == "mlp" else "hook_resid_post"
        resid = self._seen(layer, hook)
        resid = self._tiled(self.packed.at_last(resid) if late else resid, copies)
        resid = self._rest_of_block(resid, layer, f"blocks.{layer}.{hook}", changes, late)
        return resid if late else self._blocks(resid, layer + 1, changes, cut)

    def slots(self, hook: str) -> int:
        """Slots that a copy takes in :meth:`changed`."""
        _, _, late = self._start(hook)
        return self.packed.last.numel() if late else self.packed.tokens.numel()

    def _start(self, hook: str) -> tuple[Part, int, bool]:
        """Where the run begins after a change at a hook: before the embedding, at the layer's input
        (attn), between its attention and its MLP, or at its output; the layer; and whether nothing
        from there on depends on any token but the last ones."""
        n_layers = self.model.config.n_layers
        row, layer = site_at(hook), layer_of(hook, n_layers)
        start: Part = "attn" if row is None else row.part
        return start, layer, layer == n_layers - 1 and start in ("mlp", "final")

    def last_logits(
        self, resid: Float[Tensor, "row member channel"]
    ) -> Float[Tensor, "row member d_vocab"]:
        """The logits from the last block's output at the last tokens."""
        copies = len(resid) // len(self.packed.tokens)
        tokens = self.packed.at_last(self.packed.tokens).repeat(copies, 1)
        # the final norm's scale was recorded at the last tokens
        with self.model.hooks(fwd_hooks=self._norms("ln_final.")):
            return self.model.output_logits(resid, tokens).float()

    def logit_diffs(
        self, resid: Float[Tensor, "row member channel"]
    ) -> Float[Tensor, "copy prompt"]:
        """logit(correct) - logit(incorrect) from the last block's output at the last tokens."""
        assert self.correct_token is not None
        assert self.incorrect_token is not None
        copies = len(resid) // len(self.packed.tokens)
        logits = self.last_logits(resid)
        correct, incorrect = (
            logits.gather(2, ids.repeat(copies, 1)[..., None])
            for ids in (self.correct_token, self.incorrect_token)
        )
        return (correct - incorrect).view(copies, -1)

    # ----------------------------------------------------------------------------------------------

    def _embedded(self, copies: int, changes: Sequence[FwdHook]) -> Tensor:
        tokens = self.packed.tokens.repeat(copies, 1)
        hooks = [*within(changes, "hook_embed"), *within(self.hooks, "hook_embed")]
        with self.model.hooks(fwd_hooks=hooks):
            return self.model.embed_tokens(tokens, self.packed.positions)

    def _blocks(
        self, resid: Tensor, first: int, changes: Sequence[FwdHook], cut: bool = True
    ) -> Tensor:
        """The last block's output at the last tokens, from the stream before block ``first``."""
        last, cuts = self.model.config.n_layers - 1, False
        mask = self.packed.mask
        mask = None if mask is None else self._tiled(mask, len(resid) // len(self.packed.tokens))
        for layer in range(first, last + 1):
            name = f"blocks.{layer}."
            middle, place = f"{name}hook_resid_mid", f"{name}{PLACE}"
            # nothing after the last attention looks at another position
            cuts = cut and layer == last and middle in self.model.hook_dict
            hooks = [
                *self._norms(f"{name}ln1."),
                *self._norms(f"{name}ln2.", at_last=cuts),
                *within(changes, name),
                *within(self.hooks, name),
            ]
            if cuts:
                found = [at for at in (middle, place) if at in self.model.hook_dict]
                hooks += [(at, lambda x, hook=None: self.packed.at_last(x)) for at in found]
            with self.model.hooks(fwd_hooks=hooks):
                resid = self._run(resid, layer, self.packed.positions, mask)
        return resid if cuts else self.packed.at_last(resid)

    def _rest_of_block(
        self, resid: Tensor, layer: int, at: str, changes: Sequence[FwdHook], cut: bool
    ) -> Tensor:
        """A block's output from the stream at one of its hooks: what comes before runs on a single
        position, whose outcome ``resid`` replaces; ``cut``: which is of the last tokens alone."""
        name, copies = f"blocks.{layer}.", len(resid) // len(self.packed.tokens)
        hooks: list[FwdHook] = [(at, put(resid))]
        if at.endswith("hook_resid_mid"):
            hooks += self._norms(f"{name}ln2.", at_last=cut)
            if f"{name}{PLACE}" in self.seen:
                place = self.seen[f"{name}{PLACE}"]
                place = self.packed.at_last(place) if cut else place
                hooks.append((f"{name}{PLACE}", put(self._tiled(place, copies))))
        hooks += [*within(changes, name), *within(self.hooks, name)]
        with self.model.hooks(fwd_hooks=hooks):
            pos_channels = self.model.pos_channels(self.packed.positions[:1, :1], 1)
            return self.model.blocks[layer](resid[:1, :1], pos_channels)

    def _run(self, resid: Tensor, layer: int, positions: Tensor, mask: Tensor | None) -> Tensor:
        pos_channels = self.model.pos_channels(positions, len(resid))
        before = self.prefix[layer] if self.prefix else None
        return self.model.blocks[layer](resid, pos_channels, before, mask)

    def _norms(self, prefix: str, at_last: bool = False) -> list[FwdHook]:
        return [
            (name, Intervention(source=self.packed.at_last(scale) if at_last else scale))
            for name, scale in self.scales.items()
            if name.startswith(prefix)
        ]

    def _seen(self, layer: int, name: str) -> Tensor:
        return self.seen[f"blocks.{layer}.{name}"]

    @staticmethod
    def _tiled(x: Shaped[Tensor, "row ..."], copies: int) -> Shaped[Tensor, "row_of_copy ..."]:
        return x.repeat(copies, *[1] * (x.ndim - 1))


PLACE = "ln2_pos.hook_normalized"


def within(hooks: Sequence[FwdHook], prefix: str) -> list[FwdHook]:
    """Those of some hooks whose names begin so."""
    return [(name, fn) for name, fn in hooks if name.startswith(prefix)]


def _record(seen: dict[str, Tensor], name: str, x: Tensor, hook: Any = None) -> None:
    seen[name] = x.detach().clone()


def put(value: Tensor) -> Callable[..., Tensor]:
    """A hook function after which the activation is ``value``."""
    return lambda x, hook=None: value
