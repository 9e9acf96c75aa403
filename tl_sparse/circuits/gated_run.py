"""``gated_logits``: a compiled circuit run with gates, on slots, many masks at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_sparse.circuits.compiled import CompiledCircuit
from tl_sparse.circuits.compiled_parts import CompiledAttention, Where, rows
from tl_sparse.circuits.folding import CompiledBlock
from tl_sparse.circuits.gated_parts import Gating, project_site, read_site, taken
from tl_sparse.circuits.mask_groups import MaskGroups
from tl_sparse.circuits.slots import Slots
from tl_sparse.sites import site as site_row

ORDER = (
    ("attn_in",), ("attn_q", "attn_k", "attn_v"), ("attn_out",),
    ("mlp_in",), ("mlp_neuron",), ("mlp_out",),
)  # fmt: skip
STAGE = {site: number for number, sites in enumerate(ORDER) for site in sites}
"""The order in which a block's sites are computed."""
WIDTHS = 8  # the fused kernel wants heads of a multiple of so many channels


def stage_of(layer: int, site: str) -> int:
    """The number of a site's stage; all sites of a stage are computed before those of the next."""
    return len(ORDER) * layer + STAGE[site]


@dataclass(frozen=True, eq=False)
class Heads:
    """How a layer's attention is laid out for the kernel: the sink is a key of its own."""

    place: tuple[Tensor, Tensor, Tensor]
    """For q, k and v where each kept channel goes: [head and channel, kept]."""
    constant: tuple[Tensor, Tensor, Tensor]
    """What is in the other channels: [head and channel]."""
    sink: Float[Tensor, " head_channel"] | None
    """The sink's key, whose logit rides on a channel that is 1 in every query."""
    weight: Float[Tensor, "source write"]
    """From the outputs of all heads, the ones with a pattern by position first, to the writes."""
    n_heads: int

    @classmethod
    def of(cls, attn: CompiledAttention) -> Heads | None:
        """The layout; None where no head has a pattern that depends on tokens."""
        if not attn.heads:
            return None
        n_heads, slots = attn.spread_q.constant.shape
        extra = 0 if attn.sinks is None else 1
        width = -(-(slots + extra) // WIDTHS) * WIDTHS
        spreads = (attn.spread_q, attn.spread_k, attn.spread_v)
        place = tuple(
            F.pad(s.place.unflatten(-1, (n_heads, slots)), (0, width - slots)).flatten(1).T
            for s in spreads
        )
        constant = [F.pad(s.constant, (0, width - slots)) for s in spreads]
        sink = None
        if attn.sinks is not None:
            constant[0][:, slots] = 1.0
            sink = torch.zeros_like(constant[1])
            sink[:, slots] = attn.sinks / attn.scale
            sink = sink.flatten()
        n_alike = len(attn.uniform_v)
        weight = attn.out.weight.new_zeros(n_alike + n_heads * width, attn.out.weight.shape[1])
        weight[:n_alike] = attn.out.weight[:n_alike]
        head, channel = attn.z // slots, attn.z % slots
        weight[n_alike + head * width + channel] = attn.out.weight[n_alike:]
        q, k, v = (c.flatten() for c in constant)
        return cls((place[0], place[1], place[2]), (q, k, v), sink, weight, n_heads)


@dataclass(frozen=True, eq=False)
class GatedRun:
    """Slots that run through a compiled circuit with gates."""

    compiled: CompiledCircuit
    heads: tuple[Heads | None, ...]
    """The attention of each layer."""
    values: dict[str, Float[Tensor, " _kept"]]
    """Of each gated hook, what its nodes are set to where their gates are closed."""
    slots: Slots
    masks: MaskGroups

    def logits(self) -> Float[Tensor, "group end token_id"]:
        """Logits at the last tokens, by the last stage's groups."""
        compiled, slots = self.compiled, self.slots
        static = compiled.static_embed
        static = None if static is None else static[slots.tokens]
        where, x = Where(slots.tokens, slots.places, static), compiled.embed[slots.tokens]
        at: int | None = None  # the stage whose groups the stream has
        cut = False  # whether only the last tokens are left
        if compiled.last_attention < 0:
            where, x, cut = self._ends(where), x.index_select(1, slots.ends), True
        for layer, block in enumerate(compiled.blocks):
            if block.attn is not None:
                ends = layer == compiled.last_attention
                delta, now = self._attention(layer, block, x, at, where, ends)
                if ends:
                    where, x, cut = self._ends(where), x.index_select(1, slots.ends), True
                x, at = self._added(x, at, delta, now, block.attn_writes), now
            if block.mlp is not None:
                delta, now = self._mlp(layer, block, x, at, where, cut)
                x, at = self._added(x, at, delta, now, block.mlp_writes), now
        return compiled.read_out(x, where)

    # ----------------------------------------------------------------------------------------------

    def _ends(self, where: Where) -> Where:
        ends = self.slots.ends
        static = None if where.static is None else where.static[:, ends]
        return Where(where.tokens[:, ends], where.places[:, ends], static)

    def _added(self, x: Tensor, at: int | None, delta: Tensor, now: int | None, writes: Tensor
               ) -> Tensor:  # fmt: skip
        return self._aligned(x, at, now, len(delta)).index_add(-1, writes, delta)

    def _aligned(self, x: Tensor, at: int | None, now: int | None, groups: int) -> Tensor:
        parents = self.masks.parents(at, now)
        if parents is not None and len(x) > 1:
            return x.index_select(0, parents)
        return x if len(x) == groups else x.expand(groups, -1, -1)

    def _gate(self, layer: int, site: str, at: int | None, cut: bool) -> tuple[Gating, int | None]:
        """How a site is gated, and its stage."""
        hook = site_row(site).hook.format(layer=layer)
        gate = self.masks.gates.get(hook)
        if gate is None:
            return Gating(None, None, None), at
        if cut and gate.shape[1] > 1:
            gate = gate.index_select(1, self.slots.ends)
        now = stage_of(layer, site)
        return Gating(gate, self.values[hook], self.masks.parents(at, now)), now

    def _mlp(self, layer: int, block: CompiledBlock, x: Tensor, at: int | None, where: Where,
             cut: bool) -> tuple[Tensor, int | None]:  # fmt: skip
        mlp, stage = block.mlp, block.ln2
        assert mlp is not None
        assert stage is not None
        gates, at = self._gate(layer, "mlp_in", at, cut)
        read = read_site(x, mlp.read, stage, where, gates)
        gates, at = self._gate(layer, "mlp_neuron", at, cut)
        neurons = project_site(read, mlp.neurons, where.places, gates)
        gates, at = self._gate(layer, "mlp_out", at, cut)
        return project_site(neurons, mlp.out, where.places, gates), at

    def _attention(self, layer: int, block: CompiledBlock, x: Tensor, at: int | None,
                   where: Where, ends: bool) -> tuple[Tensor, int | None]:  # fmt: skip
        attn, stage, slots = block.attn, block.ln1, self.slots
        assert attn is not None
        assert stage is not None
        gates, at = self._gate(layer, "attn_in", at, cut=False)
        read = read_site(x, attn.read, stage, where, gates)
        to = where.places[:, slots.ends] if ends else where.places
        heads, now, found = self.heads[layer], at, []
        parts = [("attn_v", attn.v)] if heads is None else [
            ("attn_q", attn.q), ("attn_k", attn.k), ("attn_v", attn.v)
        ]  # fmt: skip
        for site, part in parts:
            late = ends and site == "attn_q"
            source = read.index_select(1, slots.ends) if late else read
            gates, here = self._gate(layer, site, at, late)
            y = project_site(source, part, to if late else where.places, gates)
            found.append((y, here))
            now = here if now is None else max(now, here or now)
        # those without gates of their own are not yet in the groups of the others
        groups = max(len(y) for y, _ in found)
        projected = [self._aligned(y, here, now, groups) for y, here in found]
        alike = self._by_position(attn, projected[-1], to, ends)
        if heads is None:
            z, weight = alike, attn.out.weight
        else:
            live = self._by_content(attn, heads, projected, ends)
            z = torch.cat([alike, live], -1) if len(attn.uniform_v) else live
            weight = heads.weight
        gates, now = self._gate(layer, "attn_out", now, ends)
        return project_site(z, attn.out, to, gates, weight), now

    def _by_position(self, attn: CompiledAttention, v: Tensor, to: Tensor, ends: bool) -> Tensor:
        """What heads pass whose pattern depends on the position alone."""
        slots = self.slots
        if not len(attn.uniform_v):
            return v.new_zeros(len(v), to.shape[1], 0)
        n_rows, width = slots.cells.shape
        cells = taken(v[..., attn.uniform_v], slots.cells.flatten(), slots.back)
        seen = self._seen(ends).to(v.dtype)
        total = seen @ cells.view(len(v), n_rows, width, -1)
        total = total.flatten(1, 2)
        total = total if ends else taken(total, slots.back, slots.cells.flatten())
        return total * rows(attn.uniform_weight, to)

    def _by_content(self, attn: CompiledAttention, heads: Heads, projected: list[Tensor],
                    ends: bool) -> Tensor:  # fmt: skip
        """What the other heads pass: attention's fused kernel on rows."""
        slots, sink = self.slots, heads.sink
        (n_rows, width), groups = slots.cells.shape, len(projected[-1])
        q, k, v = (
            F.linear(y, place, constant)
            for y, place, constant in zip(projected, heads.place, heads.constant, strict=True)
        )
        cells, back, seen = slots.cells, slots.back, self._seen(ends)
        if sink is not None:
            cells = F.pad(cells, (1, 0), value=k.shape[1])
            back = back + back // width + 1
            seen = F.pad(seen, (1, 0), value=True)
        k = taken(k, cells.flatten(), back, sink)
        v = taken(v, cells.flatten(), back, None if sink is None else torch.zeros_like(sink))
        if not ends:
            q = taken(q, slots.cells.flatten(), slots.back)
        q, k, v = (
            y.reshape(groups * n_rows, -1, heads.n_heads, y.shape[-1] // heads.n_heads)
            .transpose(1, 2)
            for y in (q, k, v)
        )  # fmt: skip
        allowed = seen[:, None]
        allowed = allowed if groups == 1 else allowed.repeat(groups, 1, 1, 1)
        z = F.scaled_dot_product_attention(q, k, v, allowed, scale=attn.scale)
        z = z.transpose(1, 2).reshape(groups, -1, z.shape[1] * z.shape[3])
        return z if ends else taken(z, slots.back, slots.cells.flatten())

    def _seen(self, ends: bool) -> Tensor:
        slots = self.slots
        if not ends:
            return slots.allowed
        row = torch.arange(len(slots.last), device=slots.last.device)[:, None]
        return slots.allowed[row, slots.last]
