"""What a :class:`~tl_sparse.nodes.graph.NodeGraph` is made of: places of vertices, and weights.

Places follow from the site table; tokens, positions, logits and biases stand beside the sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.sites import BLOCK_MATRICES, BLOCK_SITES, SITE, joined_by
from tl_sparse.sparsity.matrices import block_matrix

Kind = Literal["node", "token", "position", "logit", "bias"]


@dataclass(frozen=True)
class Place:
    """The vertices of one site of one layer, or of the tokens, positions, logits, or of a bias."""

    name: str
    """What stands before the channel in their names: OpenAI's word for a site."""
    ours: str
    """Likewise in our names; empty where there is only one name."""
    kind: Kind
    """What they are."""
    layer: int
    """The layer; -1 for those of none."""
    site: str
    """Its site; the name where there is none."""
    start: int
    """Its first vertex."""
    width: int
    """How many there are."""
    order: int
    """What is written is read by places of higher order."""
    stream: Literal["", "read", "write"] = ""
    """Whether its channels read the residual stream, or write to it."""
    lane: int = 0
    """The channel of the residual stream that its first one reads or writes; concatenated positions
    count as channels after the last one."""

    @property
    def stop(self) -> int:
        """The vertex after its last one."""
        return self.start + self.width


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix between two places; a bias is one with a single row."""

    name: str
    """TransformerLens' name."""
    source: Place
    """Its rows."""
    target: Place
    """Its columns."""
    values: Float[Tensor, "source target"]
    """The model's weights."""


def places_of(model: nn.Module) -> tuple[Place, ...]:
    """The places of a model in the order of computation, biases last.

    Raises:
        ValueError: connections in this model are not single weights; the message says why.
    """
    cfg: Any = getattr(model, "cfg", None)
    if cfg is None or not hasattr(model, "blocks"):
        raise ValueError(
            f"a {type(model).__name__} is no TransformerLens model: it lacks cfg or blocks"
        )
    refuse_others(cfg)
    found: list[Place] = []

    def add(name: str, width: int, kind: Kind = "node", **more: Any) -> None:
        start = found[-1].stop if found else 0
        values: dict[str, Any] = {"ours": "", "layer": -1, "site": name, "order": len(found)} | more
        found.append(Place(name=name, kind=kind, start=start, width=width, **values))

    add("token", cfg.d_vocab, "token")
    positions, lane = positions_of(model)
    if positions is not None:
        add("position", len(positions), "position")
    add("hook_embed", cfg.d_model, ours="embed", site="embed", layer=0, stream="write")
    if positions is not None:
        hook = "hook_pos_concat" if lane else "hook_pos_embed"
        add(hook, positions.shape[1], stream="write", lane=lane)
    for layer in range(cfg.n_layers):
        reads = len(found)
        for row in (SITE[name] for name in BLOCK_SITES):
            if row.part == "mlp" and getattr(cfg, "attn_only", False):
                continue
            stream = "read" if row.reads else "write" if row.writes else ""
            parallel = row.reads and getattr(cfg, "parallel_attn_mlp", False)
            add(
                row.openai.format(layer=layer), row.width(cfg), ours=f"{layer}.{row.name}",
                site=row.name, layer=layer, stream=stream, order=reads if parallel else len(found),
            )  # fmt: skip
    final = SITE["final_resid"]
    add(
        final.openai, cfg.d_model, ours=final.name, site=final.name, layer=cfg.n_layers - 1,
        stream="read",
    )  # fmt: skip
    unembed: Any = model
    add("logit", unembed.W_U.shape[1], "logit")
    for name, _, _ in biases_of(model):
        add(name, 1, "bias")
    return tuple(found)


def refuse_others(cfg: Any) -> None:
    """ValueError for models whose connections are not single weights."""
    shared = getattr(cfg, "n_key_value_heads", None)
    if shared not in (None, cfg.n_heads):
        raise ValueError(
            f"{cfg.n_heads} heads share {shared} keys and values in this model, so that a weight "
            "belongs to several nodes; its connections are not defined"
        )
    if getattr(cfg, "use_normalization_before_and_after", False):
        raise ValueError(
            "this model has norms behind its blocks: what a weight writes is scaled with "
            "all that the block writes, so that its connections are not defined"
        )
    if getattr(cfg, "positional_embedding_type", None) == "shortformer":
        raise ValueError(
            "this model adds positions to queries and keys alone (shortformer), which are in no "
            "channel of the residual stream; its connections are not defined"
        )


def positions_of(model: Any) -> tuple[Tensor | None, int]:
    """The table of positions, and the channel where they begin: 0 where they are added."""
    kind = getattr(model.cfg, "positional_embedding_type", None)
    if kind in ("concat", "sinusoidal_concat"):
        return model.W_pos, model.cfg.d_model
    return (model.W_pos, 0) if kind == "standard" else (None, 0)


def norms_of(model: Any) -> Iterator[tuple[str, int, str, int, Any]]:
    """(name, layer, site, lane, norm) of every norm that reads the residual stream."""
    cfg = model.cfg
    for layer, block in enumerate(model.blocks):
        for norm, site in (("ln1", "attn_in"), ("ln2", "mlp_in")):
            for name, lane in ((norm, 0), (f"{norm}_pos", cfg.d_model)):
                if (module := block._modules.get(name)) is not None:
                    yield f"blocks.{layer}.{name}", layer, site, lane, module
    if (module := model._modules.get("ln_final")) is not None:
        yield "ln_final", cfg.n_layers - 1, "final_resid", 0, module


def part_of(norm: Any, names: tuple[str, ...]) -> Tensor | None:
    """A norm's weight or bias under either of its names; None if it has none."""
    found = (getattr(norm, name, None) for name in names)
    return next((x for x in found if isinstance(x, Tensor)), None)


def biases_of(model: Any) -> Iterator[tuple[str, tuple[int, str, int], Tensor]]:
    """(name, (layer, site, lane) that it is added at, values) of every bias."""
    for layer, block in enumerate(model.blocks):
        for matrix, _, site in joined_by(BLOCK_SITES):
            row = BLOCK_MATRICES[matrix]
            module = block._modules.get(row.part)
            bias = None if module is None else getattr(module, row.bias, None)
            if isinstance(bias, Tensor):
                yield f"blocks.{layer}.{row.part}.{row.bias}", (layer, site, 0), bias
    for name, layer, site, lane, norm in norms_of(model):
        if (bias := part_of(norm, ("b", "bias"))) is not None:
            yield f"{name}.b", (layer, site, lane), bias
    if isinstance(bias := getattr(model, "b_U", None), Tensor):
        yield "unembed.b_U", (-1, "logit", 0), bias


def weights_of(model: Any, places: tuple[Place, ...]) -> Iterator[Weight]:
    """Every matrix and bias of a model, one at a time."""
    at = {(place.layer, place.site): place for place in places}
    token, logit, embed = at[-1, "token"], at[-1, "logit"], at[0, "embed"]
    final = at[model.cfg.n_layers - 1, "final_resid"]
    yield Weight("embed.W_E", token, embed, model.W_E)
    positions, lane = positions_of(model)
    if positions is not None:
        lane_place = at[-1, "hook_pos_concat" if lane else "hook_pos_embed"]
        yield Weight("pos_embed.W_pos", at[-1, "position"], lane_place, positions)
    for layer, block in enumerate(model.blocks):
        for matrix, source, target in joined_by(BLOCK_SITES):
            part = BLOCK_MATRICES[matrix].part
            if part not in block._modules:
                continue
            ends = at[layer, source], at[layer, target]
            name = f"blocks.{layer}.{part}."
            yield Weight(name + matrix, *ends, block_matrix(model, layer, matrix))
            if matrix == "W_in" and getattr(getattr(block, part), "W_gate", None) is not None:
                yield Weight(name + "W_gate", *ends, block_matrix(model, layer, "W_gate"))
    yield Weight("unembed.W_U", final, logit, model.W_U)
    if (bigram := model._modules.get("bigram")) is not None:
        yield Weight("bigram.W_B", token, logit, bigram.W_B)
    for name, (layer, site, lane), bias in biases_of(model):
        # written out to the place's width: a norm over positions begins in its middle
        values = bias.detach().flatten().cpu()
        row = torch.zeros(1, at[layer, site].width, dtype=values.dtype)
        row[0, lane : lane + len(values)] = values
        yield Weight(name, at[-1, name], at[layer, site], row)


def nonzero(weight: Weight, number: int) -> tuple[np.ndarray, ...]:
    """Source vertex, target vertex, matrix and value of every nonzero entry."""
    values = weight.values.detach().cpu()
    row, column = torch.nonzero(values, as_tuple=True)
    found = values[row, column]
    dtype = torch.promote_types(found.dtype, torch.float32)
    return (
        (row + weight.source.start).to(torch.int32).numpy(),
        (column + weight.target.start).to(torch.int32).numpy(),
        np.full(len(row), number, dtype=np.int16),
        found.to(dtype).numpy(),
    )


def scales_of(model: Any, places: tuple[Place, ...]) -> Float[np.ndarray, " vertex"]:
    """For each vertex the weight that the norm before its matrices has at its channel; else 1."""
    at = {(place.layer, place.site): place for place in places}
    scales = np.ones(places[-1].stop, dtype=np.float32)
    for _, layer, site, lane, norm in norms_of(model):
        if (weight := part_of(norm, ("w", "weight"))) is not None:
            start = at[layer, site].start + lane
            scales[start : start + len(weight)] = weight.detach().float().cpu().numpy()
    return scales
