"""Partial runs of a SparseTransformer on a task's pairs, from wherever a change begins.

A change at one site leaves everything before it as it was, and after the last block's attention
only the last tokens matter. Both are done by hooks on the one forward pass: a run starts at a
recorded stream, and cuts positions where no attention follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_sparse.ablation.frozen_layernorms import norm_hooks
from tl_sparse.ablation.interventions import FwdHook, Intervention
from tl_sparse.ablation.prompt_packing import PackedPairs
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import NodeIndex, Part, layer_of, site_at
from tl_sparse.tasks import TaskBatch


@dataclass(frozen=True, eq=False)
class PartialForward:
    """Some pairs of a task, the hooks that hold on them, and the streams recorded under these."""

    model: SparseTransformer
    packed: PackedPairs
    correct_token: Int[Tensor, "pair 2"]
    """Ids of the correct next tokens of A and B."""
    incorrect_token: Int[Tensor, "pair 2"]
    """Ids of the incorrect ones."""
    hooks: tuple[FwdHook, ...] = ()
    """What holds in every run, such as a circuit's ablation; of any number of positions."""
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    """Norm scales to hold, by hook; none: norms are free."""
    seen: Mapping[str, Tensor] = field(default_factory=dict)
    """Recorded activations by hook: sites before ``hooks``, and the streams of every block."""

    @classmethod
    def of(
        cls, model: SparseTransformer, batch: TaskBatch, packed: PackedPairs, *, freeze_norm: bool
    ) -> PartialForward:
        """Pairs of a batch, without hooks; norms held at the full model's scales if asked for."""
        correct, incorrect = (
            x[packed.prompts].view(-1, 2) for x in (batch.correct_token, batch.incorrect_token)
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
        points = self.model.hook_dict
        streams = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", PLACE]
        layers = range(self.model.config.n_layers)
        names = [f"blocks.{layer}.{name}" for layer in layers for name in streams]
        names = [name for name in (*index.slices, *names) if name in points]
        seen: dict[str, Tensor] = {}
        run = replace(self, hooks=tuple(hooks), seen=seen)
        readers = [(name, partial(_record, seen, name)) for name in dict.fromkeys(names)]
        with self.model.hooks(fwd_hooks=readers):
            final = run._blocks(run._embedded(1, []), 0, [], cut=False)
        return run, run.logit_diffs(final)[0]

    @staticmethod
    def can_start_at(index: NodeIndex) -> bool:
        """Whether all nodes are at hooks that a run can start from: the embedding's and blocks'."""
        return all(name.startswith(("hook_embed", "blocks.")) for name in index.slices)

    def changed(self, change: FwdHook, copies: int) -> Float[Tensor, "copy prompt"]:
        """Logit differences of the pairs' prompts, so many copies of them side by side, with one
        more hook. A and B of each pair stand side by side, as in ``packed.prompts``."""
        start, layer, late = self._start(change[0])
        if start == "embed":
            return self.logit_diffs(self._blocks(self._embedded(copies, [change]), 0, []))
        if start == "attn":
            resid = self._tiled(self._seen(layer, "hook_resid_pre"), copies)
            return self.logit_diffs(self._blocks(resid, layer, [change]))
        hook = "hook_resid_mid" if start == "mlp" else "hook_resid_post"
        resid = self._seen(layer, hook)
        resid = self._tiled(self.packed.at_last(resid) if late else resid, copies)
        resid = self._rest_of_block(resid, layer, f"blocks.{layer}.{hook}", change)
        return self.logit_diffs(resid if late else self._blocks(resid, layer + 1, []))

    def slots(self, hook: str) -> int:
        """Slots that a copy takes in :meth:`changed`."""
        _, _, late = self._start(hook)
        return 2 * len(self.packed.pairs) if late else self.packed.tokens.numel()

    def _start(self, hook: str) -> tuple[Part, int, bool]:
        """Where the run begins after a change at a hook: before the embedding, at the layer's input
        (attn), between its attention and its MLP, or at its output; the layer; and whether nothing
        from there on depends on any token but the last ones."""
        n_layers = self.model.config.n_layers
        row, layer = site_at(hook), layer_of(hook, n_layers)
        start: Part = "attn" if row is None else row.part
        return start, layer, layer == n_layers - 1 and start in ("mlp", "final")

    def logit_diffs(self, resid: Float[Tensor, "row 2 channel"]) -> Float[Tensor, "copy prompt"]:
        """logit(correct) - logit(incorrect) from the last block's output at the last tokens."""
        copies = len(resid) // len(self.correct_token)
        tokens = self.packed.at_last(self.packed.tokens).repeat(copies, 1)
        # the final norm's scale was recorded at the last tokens
        with self.model.hooks(fwd_hooks=self._norms("ln_final.")):
            logits = self.model.output_logits(resid, tokens).float()
        correct, incorrect = (
            logits.gather(2, ids.repeat(copies, 1)[..., None])
            for ids in (self.correct_token, self.incorrect_token)
        )
        return (correct - incorrect).view(copies, -1)

    # ----------------------------------------------------------------------------------------------

    def _embedded(self, copies: int, change: Sequence[FwdHook]) -> Tensor:
        tokens = self.packed.tokens.repeat(copies, 1)
        hooks = [*change, *self._of("hook_embed")]
        with self.model.hooks(fwd_hooks=hooks):
            return self.model.embed_tokens(tokens, self.packed.positions)

    def _blocks(
        self, resid: Tensor, first: int, change: Sequence[FwdHook], cut: bool = True
    ) -> Tensor:
        """The last block's output at the last tokens, from the stream before block ``first``."""
        last = self.model.config.n_layers - 1
        mask = self.packed.mask.repeat(len(resid) // len(self.correct_token), 1, 1)
        for layer in range(first, last + 1):
            name = f"blocks.{layer}."
            middle, place = f"{name}hook_resid_mid", f"{name}{PLACE}"
            # nothing after the last attention looks at another position
            cuts = cut and layer == last and middle in self.model.hook_dict
            hooks = [
                *self._norms(f"{name}ln1."),
                *self._norms(f"{name}ln2.", at_last=cuts),
                *(change if layer == first else ()),
                *self._of(name),
            ]
            if cuts:
                found = [at for at in (middle, place) if at in self.model.hook_dict]
                hooks += [(at, lambda x, hook=None: self.packed.at_last(x)) for at in found]
            with self.model.hooks(fwd_hooks=hooks):
                resid = self._run(resid, layer, self.packed.positions, mask)
        return resid if cuts else self.packed.at_last(resid)

    def _rest_of_block(self, resid: Tensor, layer: int, at: str, change: FwdHook) -> Tensor:
        """A block's output from the stream at one of its hooks: what comes before runs on a single
        position, whose outcome ``resid`` replaces."""
        name, copies = f"blocks.{layer}.", len(resid) // len(self.correct_token)
        cut = layer == self.model.config.n_layers - 1
        hooks: list[FwdHook] = [(at, _put(resid))]
        if at.endswith("hook_resid_mid"):
            hooks += self._norms(f"{name}ln2.", at_last=cut)
            if f"{name}{PLACE}" in self.seen:
                place = self.seen[f"{name}{PLACE}"]
                place = self.packed.at_last(place) if cut else place
                hooks.append((f"{name}{PLACE}", _put(self._tiled(place, copies))))
        hooks += [change, *self._of(name)]
        with self.model.hooks(fwd_hooks=hooks):
            return self._run(resid[:1, :1], layer, self.packed.positions[:1, :1], None)

    def _run(self, resid: Tensor, layer: int, positions: Tensor, mask: Tensor | None) -> Tensor:
        pos_channels = self.model.pos_channels(positions, len(resid))
        return self.model.blocks[layer](resid, pos_channels, attention_mask=mask)

    def _of(self, prefix: str) -> list[FwdHook]:
        return [(name, fn) for name, fn in self.hooks if name.startswith(prefix)]

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


def _record(seen: dict[str, Tensor], name: str, x: Tensor, hook: Any = None) -> None:
    seen[name] = x.detach().clone()


def _put(value: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook=None: value
