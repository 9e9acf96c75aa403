"""The residual stream before a layer, taken apart: heads, neurons, writes, embeddings, biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.compat import tl_utils
from tl_sparse.model.contributions import (
    Acts,
    Kind,
    Place,
    Stream,
    head_results,
    kept_channels,
    matched,
    neuron_results,
    product,
    survival,
)

Stack = Float[Tensor, "part *batch_and_pos out"]


@dataclass(frozen=True)
class Reading:
    """How parts of the residual stream are returned: as they are, normalised, projected, or both.

    A norm with its scale held fixed is linear, so projecting what it gives out is projecting what
    it reads onto another direction, and dividing by the scale.
    """

    scale: Float[Tensor, "*batch_and_pos 1"] | None
    """The norm's cached scale; None where no norm is applied."""
    weight: Float[Tensor, " d_model"] | None
    """The norm's weight."""
    centred: bool
    """Whether the norm takes out the mean, as LayerNorm does."""
    project: Float[Tensor, "d_model out"] | None
    """Directions to project what is read onto."""

    @property
    def direction(self) -> Float[Tensor, "d_model out"] | None:
        """Directions to project a part onto before it is divided by the scale."""
        if self.project is None or self.scale is None or self.weight is None:
            return self.project
        direction = self.weight.to(self.project)[:, None] * self.project
        return direction - direction.mean(0) if self.centred else direction

    def of(
        self, parts: Float[Tensor, "part *batch_and_pos d_model"]
    ) -> Float[Tensor, "part *batch_and_pos out"]:
        """Parts of the residual stream, read."""
        direction = self.direction
        if direction is not None:
            parts, direction = matched(parts, direction)
            return self.scaled(parts @ direction)
        if self.scale is None or self.weight is None:
            return parts
        if self.centred:
            parts = parts - parts.mean(-1, keepdim=True)
        return self.scaled(parts) * self.weight.to(parts.device)

    def scaled(self, parts: Tensor) -> Tensor:
        """Parts divided by the norm's scale, if there is one."""
        return parts if self.scale is None else parts / self.scale


def as_slice(wanted: Any) -> Any:
    """TransformerLens' Slice of anything that it takes for one."""
    return wanted if isinstance(wanted, tl_utils.Slice) else tl_utils.Slice(wanted)


def as_columns(project: Tensor | None) -> Float[Tensor, "d_model out"] | None:
    """Directions to project onto as [d_model, out]; a single one may come as [d_model]."""
    return project[:, None] if project is not None and project.ndim == 1 else project


def squeezed(stack: Tensor, project: Tensor | None) -> Tensor:
    """Without the last dimension, if the projection was onto a single direction [d_model]."""
    return stack.squeeze(-1) if project is not None and project.ndim == 1 else stack


@dataclass(frozen=True)
class ResidualParts:
    """The parts of the residual stream at one place and some positions, with their labels."""

    acts: Acts
    """Cached activations by full name."""
    model: Any
    """The SparseTransformer that they are from."""
    place: Place
    """Where the residual stream is read."""
    pos: Any
    """TransformerLens' Slice of the positions."""

    @cached_property
    def survives(self) -> dict[Any, Tensor | None]:
        """What later selections on the residual stream left of every write; see ``survival``."""
        return survival(self.acts, self.model, self.place)

    @property
    def stream(self) -> Stream:
        """The whole residual stream."""
        layer, mid = self.place.layer, self.place.mlp_input
        name = f"blocks.{layer}.hook_resid_{'mid' if mid else 'pre'}"
        if layer == self.model.config.n_layers or (name not in self.acts and layer and not mid):
            name = f"blocks.{layer - 1}.hook_resid_post"  # the same, unless a hook changed it
        return self.pos.apply(self.acts[name], dim=-2)

    def heads(self) -> tuple[Stack, list[str]]:
        """What is left of what each head added, layer by layer."""
        rows, labels = [], []
        for i in [i for i, kind in self.place.writes(self.model.config) if kind == "attn"]:
            results = self.pos.apply(head_results(self.acts, self.model, i), dim=-3)
            alive = self.survives[i, "attn"]
            if alive is not None:
                results = results * self.pos.apply(alive, dim=-2)[..., None, :]
            rows.append(results.movedim(-2, 0))
            labels += [f"L{i}H{head}" for head in range(self.model.cfg.n_heads)]
        return self.stacked(rows), labels

    def neurons(self, neuron_slice: Any, reading: Reading) -> tuple[Stack, list[str]]:
        """What is left of what each neuron added, read; an integer slice is a stack of one."""
        wanted = tl_utils.Slice.unwrap(neuron_slice)
        if wanted.mode == "int":
            wanted = tl_utils.Slice([wanted.slice])
        rows, labels = [], []
        for i in range(self.place.layer):
            kept = kept_channels(self.acts, self.model, i, "mlp")
            gate = product(kept, self.survives[i, "mlp"])
            results = neuron_results_of(
                self.acts, self.model, i, wanted, self.pos, gate, reading.direction
            ).movedim(-2, 0)
            projected = reading.direction is not None
            rows.append(reading.scaled(results) if projected else reading.of(results))
            labels += [f"L{i}N{n}" for n in wanted.indices(self.model.config.d_mlp).tolist()]
        return (torch.cat(rows) if rows else reading.of(self.stacked([]))), labels

    def writes(self, kinds: Sequence[Kind]) -> tuple[Stack, list[str]]:
        """What is left of each block's writes, of these kinds."""
        rows, labels = [], []
        for i, kind in self.place.writes(self.model.config):
            if kind in kinds:
                write = self.acts[f"blocks.{i}.hook_{kind}_out"]
                rows.append(self.left_of(write, self.survives[i, kind])[None])
                labels.append(f"{i}_{kind}_out")
        return self.stacked(rows), labels

    def embeddings(self) -> tuple[Stack, list[str]]:
        """What is left of the token embedding, and of added positions."""
        labels = ["embed"]
        if self.model.config.positional_embedding_type == "standard":
            labels.append("pos_embed")
        rows = [self.left_of(self.acts[f"hook_{n}"], self.survives["embed"])[None] for n in labels]
        return self.stacked(rows), labels

    def biases(self, expand_neurons: bool) -> tuple[Stack, list[str]]:
        """What is left of biases that are in no other part, summed.

        The heads carry b_O where AbsTopK is on attn_out; MLPs carry b_out unless split in neurons.
        """
        stream = self.stream
        total = torch.zeros_like(stream)
        for i, kind in self.place.writes(self.model.config):
            part = getattr(self.model.blocks[i], kind)
            if part.topk_out.active if kind == "attn" else not expand_neurons:
                continue
            kept = kept_channels(self.acts, self.model, i, kind)
            gate = product(kept, self.survives[i, kind])
            bias = (part.b_O if kind == "attn" else part.b_out).to(stream.device)
            total = total + (bias if gate is None else bias * self.pos.apply(gate, dim=-2))
        return total[None], ["bias"]

    def remainder(
        self, stack: Stack, whole: Float[Tensor, "1 *batch_and_pos out"]
    ) -> Float[Tensor, "1 *batch_and_pos out"]:
        """What a stack leaves of the whole residual stream, both read the same way.

        Raises:
            ValueError: nothing comes before this place.
        """
        if self.place == Place(0, False):
            raise ValueError(
                "incl_remainder=True at layer=0: nothing comes before the remainder there. For the "
                "end of the stream say layer=None, for the embeddings decompose_resid(0)"
            )
        return whole - stack.sum(0)

    def left_of(self, write: Tensor, alive: Tensor | None) -> Stream:
        """A write where it survives, at the positions wanted."""
        return self.pos.apply(write if alive is None else write * alive, dim=-2)

    def stacked(self, rows: list[Tensor]) -> Stack:
        """Rows put together; none give an empty stack of the right shape."""
        if rows:
            return torch.cat(rows)
        stream = self.stream
        return stream.new_zeros(0, *stream.shape)


def neuron_results_of(
    acts: Acts,
    model: Any,
    layer: int,
    neuron_slice: Any,
    pos: Any,
    gate: Stream | None,
    project: Tensor | None,
) -> Tensor:
    """``neuron_results`` of some neurons of a layer at some positions; an integer is one neuron.

    Raises:
        ValueError: the layer has no neurons.
    """
    if model.config.attn_only:
        raise ValueError("a model with attn_only=True has no neurons")
    if not 0 <= layer < model.config.n_layers:
        raise ValueError(f"layer={layer} is not in 0..{model.config.n_layers - 1}")
    wanted = as_slice(neuron_slice)
    one = wanted.mode == "int"
    wanted = tl_utils.Slice([wanted.slice]) if one else wanted
    neurons = pos.apply(acts[f"blocks.{layer}.mlp.hook_post"], dim=-2)
    neurons = wanted.apply(neurons, dim=-1)
    gate = None if gate is None else pos.apply(gate, dim=-2)
    W_out = wanted.apply(model.blocks[layer].mlp.W_out, dim=0)
    results = neuron_results(neurons, W_out, gate, as_columns(project))
    results = results.squeeze(-2) if one else results
    return squeezed(results, project)
