"""Folding: a model's weights and a circuit's constants become the parts of a compiled circuit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.circuits.compiled_parts import (
    CompiledAttention,
    CompiledMLP,
    Projection,
    Read,
    Spread,
    Stage,
)
from tl_sparse.circuits.edges import input_major
from tl_sparse.compat import HookPoint
from tl_sparse.model.layers import Norm
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import NodeIndex
from tl_sparse.sites import site as site_row


@dataclass(frozen=True, eq=False)
class KeptNodes:
    """What a compiled model is made from: which nodes are left, and what the others are set to."""

    index: NodeIndex
    """The nodes."""
    kept: Bool[Tensor, " node"]
    """Those that are left, on the CPU."""
    values: Float[Tensor, " node"]
    """What each is set to where it is removed, on the CPU."""


@dataclass(frozen=True, eq=False)
class Group:
    """Kept nodes of a site in the order of its hook's last axis, and what they are made of."""

    layer: int
    site: str
    hook: str
    channels: tuple[int, ...]
    projection: Projection | None
    """None for a read."""
    sources: tuple[str, ...]
    """Names of the projection's inputs."""


class CompiledBlock(nn.Module):
    """What is left of a block; a sublayer that writes nothing is absent."""

    attn_writes: Tensor
    mlp_writes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.ln1: Stage | None = None
        self.attn: CompiledAttention | None = None
        self.ln2: Stage | None = None
        self.mlp: CompiledMLP | None = None

    def set_attention(self, stage: Stage, attn: CompiledAttention, writes: Tensor) -> None:
        """Add attention, which writes these of the tracked channels."""
        self.ln1, self.attn, self.hook_attn_out = stage, attn, HookPoint()
        self.register_buffer("attn_writes", writes)

    def set_mlp(self, stage: Stage, mlp: CompiledMLP, writes: Tensor) -> None:
        """Add the MLP, which writes these of the tracked channels."""
        self.ln2, self.mlp, self.hook_mlp_out = stage, mlp, HookPoint()
        self.register_buffer("mlp_writes", writes)


class Folding:
    """Folds a model's weights, in float64, going down the stream once."""

    def __init__(self, model: SparseTransformer, nodes: KeptNodes, exact_topk: bool,
                 tables: bool = True) -> None:  # fmt: skip
        self.model, self.nodes, self.exact, self.tables = model, nodes, exact_topk, tables
        self.config = config = model.config
        self.groups: list[Group] = []
        self.written = False
        self.embed = model.embed.W_E.detach().double().cpu()
        self.added = torch.zeros(1, config.d_model, dtype=torch.float64)
        if config.positional_embedding_type == "standard":
            self.added = model.pos_embed.W_pos.detach().double().cpu()
        touched = torch.zeros(config.d_model, dtype=torch.bool)
        for layer in range(config.n_layers):
            for site in ("attn_in", "attn_out", "mlp_in", "mlp_out"):
                part = "attn_out" if site.startswith("attn") else "mlp_out"
                if config.has_site(site) and bool(self.kept(layer, part).any()):
                    touched |= self.kept(layer, site)[: config.d_model]
        self.tracked = touched
        self.place_of = touched.cumsum(0) - 1

    def kept(self, layer: int, site: str) -> Bool[Tensor, " channel"]:
        """Kept channels; a site outside the circuit's node universe is kept whole."""
        index = self.nodes.index
        if site not in index.sites:
            return torch.ones(self.config.site_width(site), dtype=torch.bool)
        return self.nodes.kept[index.slices[index.hook(layer, site)]]

    def constant(self, layer: int, site: str) -> Float[Tensor, " channel"]:
        """What removed channels are set to; 0 at the kept ones."""
        index, kept = self.nodes.index, self.kept(layer, site)
        if site not in index.sites:
            return torch.zeros(len(kept), dtype=torch.float64)
        values = self.nodes.values[index.slices[index.hook(layer, site)]]
        return torch.where(kept, 0.0, values.double())

    def k(self, site: str) -> int | None:
        """AbsTopK's k, or None where it does nothing (or is to be left out)."""
        width = self.config.site_width(site)
        k = int(getattr(self.config.activation_density, site) * width)
        return k if k < width and self.exact else None

    def norm_affine(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Weight and bias that a norm applies, zeros for no bias."""
        if not isinstance(norm, Norm):
            ones = torch.ones(self.config.d_model, dtype=torch.float64)
            return ones, torch.zeros_like(ones)
        weight = norm.w.detach().double().cpu()
        bias = torch.zeros_like(weight) if norm.b is None else norm.b.detach().double().cpu()
        return weight, bias

    def stage(self, norm: nn.Module) -> Stage:
        """The stream here."""
        return Stage(norm, self.embed, self.added, self.tracked)

    def add(self, layer: int, site: str, projection: Projection | None, sources: Sequence[str],
            channels: Sequence[int] | None = None) -> tuple[str, ...]:  # fmt: skip
        """Note down a site's kept nodes; returns their names."""
        if channels is None:
            channels = torch.nonzero(self.kept(layer, site)).flatten().tolist()
        hook = site_row(site).hook.format(layer=layer)
        group = Group(layer, site, hook, tuple(channels), projection, tuple(sources))
        self.groups.append(group)
        return tuple(f"L{layer}.{site}[{channel}]" for channel in channels)

    def read(self, layer: int, site: str, norm: nn.Module, norm_pos: nn.Module | None
             ) -> tuple[Read, tuple[str, ...]]:  # fmt: skip
        """The read of a sublayer, and its nodes' names."""
        k = self.k(site)
        weight, bias = self.norm_affine(norm)
        place = torch.zeros(1, 0, dtype=torch.float64)
        if norm_pos is not None:
            place = norm_pos(self.model.pos_embed.W_pos.detach()).double().cpu()
        by_token = len(self.added) == 1 and not (isinstance(norm, Norm) and norm.centred)
        magnitudes = None
        if k is not None and by_token:
            magnitudes = ((self.embed + self.added) * weight)[:, ~self.tracked].abs()
        kept = self.kept(layer, site)
        read = Read(weight, bias, place, kept, self.tracked, k, magnitudes, self.added)
        return read, self.add(layer, site, None, ())

    def block(self, block: Any, layer: int) -> CompiledBlock:
        """A block's two sublayers; the constants they write are added to the stream's."""
        compiled = CompiledBlock()
        kept = self.kept(layer, "attn_out")
        if bool(kept.any()):
            stage, attn = self.stage(block.ln1), self.attention(block, layer)
            if self.tables and not self.written:
                attn.tabulate(stage, self.embed[:, self.tracked], self.config.n_ctx)
            self.written = True
            compiled.set_attention(stage, attn, self.place_of[kept])
        self.added = self.added + self.constant(layer, "attn_out")
        if self.config.attn_only:
            return compiled
        kept = self.kept(layer, "mlp_out")
        if bool(kept.any()):
            stage, mlp = self.stage(block.ln2), self.mlp(block, layer)
            self.written = True
            compiled.set_mlp(stage, mlp, self.place_of[kept])
        self.added = self.added + self.constant(layer, "mlp_out")
        return compiled

    def project(self, layer: int, matrix: str, site: str, source: str, bias: Tensor, **options: Any
                ) -> Projection:  # fmt: skip
        """A block matrix between the kept nodes of two sites."""
        weight = input_major(self.model, layer, matrix).double().cpu()
        bias = bias.detach().double().cpu().flatten() + self.constant(layer, source) @ weight
        weight = weight[self.kept(layer, source)]
        return Projection(weight, bias[None], self.kept(layer, site), self.k(site), **options)

    def mlp(self, block: Any, layer: int) -> CompiledMLP:
        """The kept part of an MLP."""
        mlp = block.mlp
        read, names = self.read(layer, "mlp_in", block.ln2, getattr(block, "ln2_pos", None))
        neurons = self.project(layer, "W_in", "mlp_neuron", "mlp_in", mlp.b_in, act=mlp.act)
        names = self.add(layer, "mlp_neuron", neurons, names)
        out = self.project(layer, "W_out", "mlp_out", "mlp_neuron", mlp.b_out)
        self.add(layer, "mlp_out", out, names)
        return CompiledMLP(read, neurons, out)

    def attention(self, block: Any, layer: int) -> CompiledAttention:
        """The kept part of attention."""
        attn, config = block.attn, self.config
        read, names = self.read(layer, "attn_in", block.ln1, getattr(block, "ln1_pos", None))
        q, k, v = (
            self.project(layer, f"W_{x}", f"attn_{x.lower()}", "attn_in", getattr(attn, f"b_{x}"))
            for x in "QKV"
        )
        v_names = self.add(layer, "attn_v", v, names)
        heads, d_head = attn.W_Q.shape[0], config.d_head
        kept = {x: self.kept(layer, f"attn_{x}").view(heads, d_head) for x in "qkv"}
        mean = {x: self.constant(layer, f"attn_{x}").view(heads, d_head) for x in "qkv"}
        rank = {x: (kept[x].flatten().cumsum(0) - 1).view(heads, d_head) for x in "qkv"}
        sinks = None if attn.sinks is None else attn.sinks.detach().double().cpu()
        W_O = attn.W_O.detach().double().cpu()
        writes, out_k = self.kept(layer, "attn_out"), self.k("attn_out")
        wanted = writes if out_k is None else torch.ones_like(writes)
        reaches = (W_O[..., wanted] != 0).any(-1)  # [head, d_head]
        constant = torch.einsum("he,hed->hd", mean["v"], W_O)  # what removed values write
        bias = attn.b_O.detach().double().cpu()[None]
        seen = torch.arange(1, config.n_ctx + 1, dtype=torch.float64)
        uniform: list[tuple[int, Tensor]] = []
        live: list[int] = []
        weights, sources = [], []
        for head in range(heads):
            used = torch.nonzero(kept["v"][head] & reaches[head]).flatten()
            constant_reaches = bool((constant[head][wanted] != 0).any())
            if sinks is None:
                bias = bias + constant[head]
            if not len(used) and (sinks is None or not constant_reaches):
                continue
            if bool(kept["k"][head].any()) or (sinks is not None and bool(kept["q"][head].any())):
                live.append(head)
                continue
            each = 1 / seen
            if sinks is not None:
                score = attn.scale * (mean["q"][head] @ mean["k"][head])
                each = 1 / (seen + (sinks[head] - score).exp())
                bias = bias + (seen * each)[:, None] * constant[head]
            for channel in used.tolist():
                uniform.append((int(rank["v"][head, channel]), each))
                weights.append(W_O[head, channel])
                sources.append(f"attend[{head}]({v_names[uniform[-1][0]]})")
        empty = torch.zeros(config.n_ctx, 0, dtype=torch.float64)
        table = torch.stack([each for _, each in uniform], 1) if uniform else empty
        numbers = torch.tensor([number for number, _ in uniform], dtype=torch.int64)

        extra = 0 if sinks is None else 1
        pairs = [kept["q"][head] | kept["k"][head] for head in live]
        widths = [int(pair.sum()) + extra for pair in pairs]
        widths += [int(kept["v"][head].sum()) + extra for head in live]
        shape = (len(live), max(widths, default=0))
        source = {x: torch.full(shape, p.n_kept) for x, p in zip("qkv", (q, k, v), strict=True)}
        fixed = {x: torch.zeros(shape, dtype=torch.float64) for x in "qkv"}
        z: list[int] = []
        for row, (head, pair) in enumerate(zip(live, pairs, strict=True)):
            n = int(pair.sum())
            for x in "qk":
                own = torch.where(kept[x][head], rank[x][head], source[x][row, 0])
                source[x][row, :n], fixed[x][row, :n] = own[pair], mean[x][head][pair]
            if sinks is not None:  # channels removed from both add one score everywhere
                fixed["q"][row, n] = 1.0
                fixed["k"][row, n] = (mean["q"][head] * mean["k"][head])[~pair].sum()
            values = torch.nonzero(kept["v"][head] & reaches[head]).flatten().tolist()
            for slot, channel in enumerate(values):
                number = int(rank["v"][head, channel])
                source["v"][row, slot] = number
                z.append(row * shape[1] + slot)
                weights.append(W_O[head, channel])
                sources.append(f"attend[{head}]({v_names[number]})")
            if sinks is not None and bool((constant[head][wanted] != 0).any()):
                fixed["v"][row, len(values)] = 1.0  # the mass that is not on the sink
                z.append(row * shape[1] + len(values))
                weights.append(constant[head])
                sources.append(f"mass[{head}]")
        joint = torch.stack(weights) if weights else torch.zeros(0, config.d_model).double()
        out = Projection(joint, bias, writes, out_k)
        compiled = CompiledAttention(read, v, (numbers, table), out, attn.scale)
        if live:
            self.add(layer, "attn_q", q, names)
            self.add(layer, "attn_k", k, names)
            spreads = (
                Spread(q.n_kept, source["q"], fixed["q"]),
                Spread(k.n_kept, source["k"], fixed["k"]),
                Spread(v.n_kept, source["v"], fixed["v"]),
            )
            own_sinks = None if sinks is None else sinks[live]
            compiled.add_heads(tuple(live), q, k, spreads, torch.tensor(z), own_sinks)
        self.add(layer, "attn_out", out, sources)
        return compiled
