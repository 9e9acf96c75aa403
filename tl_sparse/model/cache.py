"""``SparseActivationCache``: TransformerLens' cache, right where its assumptions do not hold here.

TransformerLens takes a block's write for the sum of its heads or neurons, the residual stream for
the sum of writes, a norm for its scale, and logits for a projection of the residual stream. Here
AbsTopK selects from sums, norms keep their weights (folding them would fill in zeros), and a bigram
table adds to the logits. Every helper takes all of it into account; parts add up to the residual
stream.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.compat import ActivationCache, logit_lens_tool
from tl_sparse.model.contributions import Kind, Place, head_results, kept_channels
from tl_sparse.model.decomposition import (
    Reading,
    ResidualParts,
    Stack,
    as_columns,
    as_slice,
    neuron_results_of,
    squeezed,
)
from tl_sparse.model.hook_names import did_you_mean, switch_of
from tl_sparse.model.logit_attribution import (
    BigramReader,
    Tokens,
    check_alike,
    constant_logits,
    token_ids,
)


class SparseActivationCache(ActivationCache):
    """What ``run_with_cache`` returns: TransformerLens' ActivationCache with exact decompositions.

    Arguments, shapes and labels are those of TransformerLens. What differs in value:

    - The channels that AbsTopK selected are held fixed, so heads and neurons add up to their
      block's write, and parts to the residual stream. A head's result carries its share of b_O
      where AbsTopK is on attn_out, and a part of the residual stream is what is left of it at the
      layer asked for where AbsTopK or ReLU is on the residual stream itself.
    - ``apply_ln`` multiplies with the norm's weight, so its result times W_U is a logit.
    - What the logits owe to no part of it is in :meth:`logit_attrs_outside_stream`.

    A hook that changed a write or the residual stream during the run breaks these sums, as it does
    in TransformerLens. A helper whose activations were not cached raises KeyError, naming them.
    """

    model: Any

    def __getitem__(self, key: Any) -> Tensor:
        """An activation by name or TransformerLens' shorthand, such as ("z", 0)."""
        try:
            return super().__getitem__(key)
        except KeyError as error:
            name = str(error.args[0])
        raise KeyError(self._absence(name))

    def _absence(self, name: str) -> str:
        if self.model is not None and name in self.model.hook_dict:
            switch = switch_of(name)
            hint = f", and set_{switch}(True) before it" if switch else ""
            return (
                f"{name!r} was not cached: run_with_cache needs it in its names_filter{hint}, and "
                "no stop_at_layer before it"
            )
        hint = did_you_mean(name, self.cache_dict)
        return f"{name!r} is not in the cache{hint} (cache.keys() lists all)"

    def __repr__(self) -> str:
        return f"SparseActivationCache with keys {list(self.cache_dict)}"

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> SparseActivationCache:
        """The cache of some of the examples; an integer takes the batch dimension off."""
        batch = as_slice(batch_slice)
        if not self.has_batch_dim:
            raise ValueError("the cache has no batch dimension to slice")
        sliced = {name: batch.apply(acts, dim=0) for name, acts in self.cache_dict.items()}
        return SparseActivationCache(sliced, self.model, has_batch_dim=batch.mode != "int")

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """One activation of every layer before ``layer``, stacked."""
        last = Place.of(self.model.config, layer, False).layer
        if last == 0:
            raise ValueError("layer=0 has no layers before it to stack")
        return torch.stack([self[activation_name, i, sublayer_type] for i in range(last)])

    # ----------------------------------------------------------------------------------------------
    # the stream and its parts

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream before every layer up to ``layer`` [layers, *batch_and_pos, d_model].

        ``apply_ln`` gives what a norm makes of the residual streams, bias included: ln_final, with
        each residual stream's own scale, if ``layer`` is the end; otherwise the layer's norm with
        its cached scale.
        """
        parts = self._parts(layer, mlp_input, pos_slice)
        place, end = parts.place, self.model.config.n_layers
        names, labels = [], []
        for i in range(place.layer + 1):
            if i == end:
                names.append(f"blocks.{i - 1}.hook_resid_post")
                labels.append("final_post")
                continue
            names.append(f"blocks.{i}.hook_resid_pre")
            labels.append(f"{i}_pre")
            between = incl_mid and i < place.layer and not self.model.config.attn_only
            if between or (mlp_input and i == place.layer):
                names.append(f"blocks.{i}.hook_resid_mid")
                labels.append(f"{i}_mid")
        streams = torch.stack([parts.pos.apply(self[name], dim=-2) for name in names])
        if apply_ln and place.layer == end:
            streams = self._final_norm(streams)
        elif apply_ln:
            streams = self._reading(parts).of(streams)
            bias = getattr(place.norm(self.model)[1], "b", None)
            streams = streams if bias is None else streams + bias.to(streams.device)
        return (streams, labels) if return_labels else streams

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """Embeddings and writes whose sum is the residual stream before a layer.

        Shape [parts, ..., d_model].

        Concatenated positions are no part of the residual stream, hence of no row.
        """
        modes: dict[str, tuple[Kind, ...]] = {
            "all": ("attn", "mlp"),
            "attn": ("attn",),
            "mlp": ("mlp",),
        }
        if mode not in modes:
            raise ValueError(f"mode={mode!r} is unknown; choose from {', '.join(modes)}")
        parts = self._parts(layer, mlp_input, pos_slice)
        found = [parts.embeddings()] if incl_embeds else []
        if parts.place.writes(self.model.config) or not incl_embeds:
            found.append(parts.writes(modes[mode]))
        stack = self._reading(parts, apply_ln).of(torch.cat([stack for stack, _ in found]))
        return (stack, [name for _, names in found for name in names]) if return_labels else stack

    def compute_head_results(self) -> None:
        """Cache what each head adds to its block's write under ``hook_result``, where it is not."""
        for layer in range(self.model.config.n_layers):
            name = f"blocks.{layer}.attn.hook_result"
            self.cache_dict[name] = head_results(self, self.model, layer)

    def _ensure_head_results(self) -> bool:
        # by this name TransformerLens 4 computes them for itself, and asks if all were there
        before = set(self.cache_dict)
        self.compute_head_results()
        return before == set(self.cache_dict)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Any:
        """What every head before a layer adds to the residual stream there [heads, ..., d_model].

        ``incl_remainder`` adds a row with the rest of the residual stream. A remainder before layer
        0 is refused: TransformerLens answers there with the end of the residual stream.
        """
        parts = self._parts(layer, False, pos_slice)
        stack, labels = parts.heads()
        if incl_remainder:
            rest = parts.remainder(stack, parts.stream[None])
            stack, labels = torch.cat([stack, rest]), [*labels, "remainder"]
        stack = self._reading(parts, apply_ln).of(stack)
        return (stack, labels) if return_labels else stack

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Any = None,
        pos_slice: Any = None,
        project_output_onto: Tensor | None = None,
    ) -> Float[Tensor, "..."]:
        """What each neuron of a layer adds to its MLP's write [*batch_and_pos, neuron, d_model].

        With ``project_output_onto`` [d_model] or [d_model, out], its products with those
        directions. The write is their sum plus b_out in the channels that AbsTopK kept.
        """
        has_neurons = not self.model.config.attn_only and 0 <= layer < self.model.config.n_layers
        kept = kept_channels(self, self.model, layer, "mlp") if has_neurons else None
        return neuron_results_of(
            self, self.model, layer, neuron_slice, as_slice(pos_slice), kept, project_output_onto
        )

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
        mlp_input: bool = False,
    ) -> Any:
        """What every neuron before a layer adds to the residual stream there.

        Shape [neurons, ..., d_model].

        See :meth:`get_neuron_results` for the projection and :meth:`stack_head_results` for the
        remainder.
        """
        if self.model.config.attn_only:
            raise ValueError("a model with attn_only=True has no neurons")
        parts = self._parts(layer, mlp_input, pos_slice)
        reading = self._reading(parts, apply_ln, project_output_onto)
        stack, labels = parts.neurons(neuron_slice, reading)
        if incl_remainder:
            rest = parts.remainder(stack, reading.of(parts.stream[None]))
            stack, labels = torch.cat([stack, rest]), [*labels, "remainder"]
        stack = squeezed(stack, project_output_onto)
        return (stack, labels) if return_labels else stack

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:
        """Heads, neurons (or MLPs), embeddings and biases: their sum is the residual stream there.

        The order of rows is TransformerLens'. The row "bias" has the biases that are in no other:
        b_O unless the heads carry it, and b_out if neurons are expanded.
        """
        parts = self._parts(layer, mlp_input, pos_slice)
        reading = self._reading(parts, apply_ln, project_output_onto)
        found: list[tuple[Tensor, list[str]]] = [read(reading, parts.heads())]
        if not self.model.config.attn_only and parts.place.layer > 0:
            found.append(
                parts.neurons(None, reading)
                if expand_neurons
                else read(reading, parts.writes(("mlp",)))
            )
        found += [read(reading, parts.embeddings()), read(reading, parts.biases(expand_neurons))]
        stack = squeezed(torch.cat([stack for stack, _ in found]), project_output_onto)
        return (stack, [name for _, names in found for name in names]) if return_labels else stack

    # ----------------------------------------------------------------------------------------------
    # norms and logits

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "part *batch_and_pos d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "part *batch_and_pos_out d_model"]:
        """What each part of the residual stream contributes to what a layer's norm gives out.

        The norm's scale is the cached one, and its weight is applied: weights are never folded
        here. LayerNorm's bias is of no part. With ``recompute_ln`` at the end of the residual
        stream, rows are whole residual streams, each normalised by ln_final with its own scale,
        bias included.
        """
        parts = self._parts(layer, mlp_input, pos_slice)
        batch = as_slice(batch_slice)
        if has_batch_dim:
            residual_stack = batch.apply(residual_stack, dim=1)
        if recompute_ln and parts.place.layer == self.model.config.n_layers:
            return self._final_norm(residual_stack)
        return self._reading(parts, batch=batch).of(residual_stack)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "part *batch_and_pos d_model"],
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, " part *batch_and_pos_out"]:
        """What parts of the residual stream add to the logit of ``tokens``, minus the incorrect's.

        Tokens may be one, [batch], [pos] or [batch, pos]; a row of as many tokens as there are
        examples is one token for each example. The final norm's weight is taken into account. What
        is in the logits but in no part of the residual stream is
        :meth:`logit_attrs_outside_stream`; a bigram table is the largest of it, and a warning
        reminds of it.
        """
        if self.model.config.bigram_table != "none":
            warnings.warn(
                "this model's bigram table adds to the logits past the residual stream: add "
                "cache.logit_attrs_outside_stream(tokens) for its part",
                UserWarning,
                stacklevel=2,
            )
        batch = as_slice(batch_slice)
        stack = self.apply_ln_to_stack(residual_stack, None, False, pos_slice, batch, has_batch_dim)
        shape, per_example = stack.shape[1:-1], has_batch_dim and batch.mode != "int"
        columns = self.model.W_U.T.to(stack.device)
        direction = columns[token_ids(self.model, tokens, shape, per_example, stack.device)]
        if incorrect_tokens is not None:
            check_alike(tokens, incorrect_tokens)
            other = token_ids(self.model, incorrect_tokens, shape, per_example, stack.device)
            direction = direction - columns[other]
        return (stack * direction).sum(-1)

    def logit_attrs_outside_stream(
        self,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        return_labels: bool = False,
    ) -> Any:
        """What the logits of ``tokens`` owe to no part of the residual stream.

        Shape [parts, *batch_and_pos].

        Rows: "b_U"; "ln_final.b" where the final norm has a bias; "bigram", the current token's row
        of the bigram table, where there is one. They and :meth:`logit_attrs` of a whole
        decomposition add up to the logits. Tokens as in :meth:`logit_attrs`.
        """
        batch = as_slice(batch_slice)
        stream = self._sliced(self._parts(None, False, pos_slice).stream, batch)
        shape, device = stream.shape[:-1], stream.device
        constants = constant_logits(self.model)
        rows = {name: row.to(device).expand(*shape, -1) for name, row in constants.items()}
        if self.model.config.bigram_table != "none":
            bigram = as_slice(pos_slice).apply(self["hook_bigram"], dim=-2)
            rows["bigram"] = self._sliced(bigram, batch).to(device)

        def of(wanted: Tokens) -> Tensor:
            per_example = self.has_batch_dim and batch.mode != "int"
            ids = token_ids(self.model, wanted, shape, per_example, device).expand(shape)
            return torch.stack([row.gather(-1, ids[..., None])[..., 0] for row in rows.values()])

        values = of(tokens)
        if incorrect_tokens is not None:
            check_alike(tokens, incorrect_tokens)
            values = values - of(incorrect_tokens)
        return (values, list(rows)) if return_labels else values

    def logit_lens(self, **kwargs: Any) -> Any:
        """TransformerLens 4's logit lens, with the bigram table.

        Every layer's entry gets the bigram row of its token, as the model's own logits do.

        Raises:
            NotImplementedError: this TransformerLens has no logit lens.
        """
        logit_lens = logit_lens_tool()
        if self.model.config.bigram_table == "none":
            return logit_lens(self.model, cache=self, **kwargs)
        bigram = as_slice(kwargs.get("positions", -1)).apply(self["hook_bigram"], dim=-2)
        bigram = self._sliced(bigram, as_slice(kwargs.get("batch_slice")))
        reader = BigramReader(self.model, bigram.reshape(-1, bigram.shape[-1]))
        return logit_lens(reader, cache=self, **kwargs)

    def _stack_neuron_results_apply_ln_projected(
        self,
        layer: int,
        pos_slice: Any,
        neuron_slice: Any,
        project_2d: Tensor,
        mlp_input: bool = False,
    ) -> Tensor:
        # a step of TransformerLens' own stack_neuron_results, for code that calls it
        return self.stack_neuron_results(
            layer, pos_slice, neuron_slice, apply_ln=True, project_output_onto=project_2d,
            mlp_input=mlp_input,
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------

    def _parts(self, layer: int | None, mlp_input: bool, pos_slice: Any) -> ResidualParts:
        place = Place.of(self.model.config, layer, mlp_input)
        return ResidualParts(self, self.model, place, as_slice(pos_slice))

    def _reading(
        self,
        parts: ResidualParts,
        apply_ln: bool = True,
        project: Tensor | None = None,
        batch: Any = None,
    ) -> Reading:
        if not apply_ln or self.model.config.normalization_type == "none":
            return Reading(None, None, False, as_columns(project))
        name, norm = parts.place.norm(self.model)
        scale = parts.pos.apply(self[f"{name}.hook_scale"], dim=-2)
        scale = scale if batch is None else self._sliced(scale, batch)
        return Reading(scale, norm.w, norm.centred, as_columns(project))

    def _final_norm(self, streams: Tensor) -> Tensor:
        # the cache may be on another device than the model
        return self.model.ln_final(streams.to(self.model.W_U.device)).to(streams.device)

    def _sliced(self, acts: Tensor, batch: Any) -> Tensor:
        return batch.apply(acts, dim=0) if self.has_batch_dim else acts


def read(
    reading: Reading, found: tuple[Float[Tensor, "part *batch_and_pos d_model"], list[str]]
) -> tuple[Stack, list[str]]:
    """Parts of the residual stream, read, with their labels."""
    return reading.of(found[0]), found[1]
