"""The modules of a compiled circuit: stages of the stream, reads, projections, attention, MLP.

Only the channels that the kept nodes write or read (the *tracked* ones) are carried along. All
others hold an embedding plus constants, so whatever depends on them is looked up in tables by token
and position, made in float64.

AbsTopK is exact without its full width: of the channels that nothing kept reaches, only the
magnitudes around the k-th place can decide whether a kept channel survives, and they are a table
(the *window*) too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.compat import HookPoint, has_hooks
from tl_sparse.model.abstopk import kth_largest, top_k_mask
from tl_sparse.model.attention_kernel import attention
from tl_sparse.model.layers import Norm
from tl_sparse.model.transforms import opaque


class Where(NamedTuple):
    """Where a stage is evaluated, and the untracked stream there if a read needs all of it."""

    tokens: Int[Tensor, "batch pos"]
    places: Int[Tensor, "..."]
    """Positions, [pos] or [batch, pos]."""
    static: Float[Tensor, "batch pos untracked"] | None

    def pick(self, ends: Int[Tensor, "batch end"]) -> Where:
        """The same at a few slots of each row."""
        static = None if self.static is None else pick(self.static, ends)
        return Where(pick(self.tokens, ends), self.places_at(ends), static)

    def places_at(self, ends: Int[Tensor, "batch end"]) -> Int[Tensor, "batch end"]:
        """The positions of a few slots of each row."""
        return ends if self.places.ndim == 1 else pick(self.places, ends)


class State(NamedTuple):
    """The stream before a read."""

    x: Float[Tensor, "batch pos tracked"]
    mean: Tensor
    """What the norm subtracts: zero unless it is LayerNorm."""
    scale: Tensor
    """What it divides by."""


def pick(x: Tensor, ends: Int[Tensor, "batch end"]) -> Tensor:
    """``x`` [batch, slot, ...] at a few slots of each row: [batch, end, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], ends]


def rows(table: Float[Tensor, "place_or_1 ..."], places: Tensor) -> Tensor:
    """A table's rows at positions; a table of one row is the same everywhere."""
    return table[0] if table.shape[0] == 1 else table[places]


def sorts(x: Tensor) -> bool:
    """Whether numpy, whose sort is several times as fast as torch's, can have these numbers."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not opaque(x)


def window(magnitude: Float[Tensor, "... static"], k: int, m: int) -> Float[Tensor, "... around_k"]:
    """What can decide which of m other channels are among the k largest.

    The k - m largest always are, as the m cannot fill more than m places; beyond the k-th none is.
    """
    if sorts(magnitude):
        magnitude = torch.from_numpy(np.sort(magnitude.detach().numpy(), axis=-1)).flip(-1)
    else:
        magnitude = magnitude.sort(-1, descending=True).values
    return magnitude[..., max(k - m, 0) : k]


TABULATED = 2**24  # numbers in the table of a first attention at most: 64 MB in float32


def survivors(
    y: Float[Tensor, "batch pos m"],
    kept: Tensor | slice,
    around_k: Float[Tensor, "..."],
    row: Tensor | None,
    k: int,
    scale: Tensor | None = None,
) -> Float[Tensor, "batch pos kept"]:
    """The kept channels of ``y`` where AbsTopK leaves them, else 0.

    ``around_k`` is the :func:`window` of all channels not in ``y``: one for each row of a table,
    divided by ``scale`` if there is one, or (``row`` None) one for each position. With a table kept
    channels that tie exactly for the last place all survive.
    """
    mine = y[..., kept] if isinstance(kept, slice) else y.index_select(-1, kept)
    if not mine.shape[-1]:
        return mine
    m, sizes = y.shape[-1], y.detach().abs()
    r = min(k, m)
    if row is None:
        sizes = torch.cat([sizes, around_k.detach()], -1)
        return mine * top_k_mask(sizes, r)[..., :m][..., kept]
    if around_k.shape[-1]:
        around_k = around_k[0] if around_k.shape[0] == 1 else around_k[row]
        around_k = around_k if scale is None else around_k / scale.detach()
        sizes = torch.cat([sizes, around_k.expand(*y.shape[:-1], -1)], -1)
    if sizes.shape[-1] == r:
        return mine  # these are all there are
    return mine * (mine.detach().abs() >= kth_largest(sizes, r))


class Stage(nn.Module):
    """The stream before one read, with the norm over all of its channels."""

    added: Tensor
    static_mean: Tensor
    static_squares: Tensor

    def __init__(
        self,
        norm: nn.Module,
        embed: Float[Tensor, "d_vocab d_model"],
        added: Float[Tensor, "place_or_1 d_model"],
        tracked: Bool[Tensor, " d_model"],
    ) -> None:
        super().__init__()
        self.d_model, self.n_static = len(tracked), int((~tracked).sum())
        self.normalised = isinstance(norm, Norm)
        self.centred = isinstance(norm, Norm) and norm.centred
        self.eps = 0.0
        if isinstance(norm, Norm):
            self.eps = norm.eps or norm.config.eps_for(norm.w.dtype)
        self.register_buffer("added", added[:, tracked])
        tokens, places = embed[:, ~tracked], added[:, ~tracked]
        means = tokens.sum(1), places.sum(1)
        divisor = max(self.n_static, 1)
        if self.centred:
            self.register_buffer("static_mean", (means[0] + means[1][:, None]) / divisor)
            tokens = tokens - means[0][:, None] / divisor
            places = places - means[1][:, None] / divisor
        squares = tokens.pow(2).sum(1) + places.pow(2).sum(1)[:, None] + 2 * places @ tokens.T
        self.register_buffer("static_squares", squares.clamp(min=0))
        self.hook_scale = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos tracked"], where: Where) -> State:
        """The stream's tracked channels, and the norm's mean and scale there."""
        x = x + rows(self.added, where.places)
        if not self.normalised:
            return State(x, x.new_zeros(()), x.new_ones(()))
        squares = self.look_up(self.static_squares, where)
        mean = x.new_zeros(())
        if self.centred:  # two groups' means and squares, put together as Chan et al. do
            static = self.look_up(self.static_mean, where)
            mean = (x.sum(-1, keepdim=True) + self.n_static * static) / self.d_model
            squares = squares + self.n_static * (static - mean).pow(2)
        squares = squares + (x - mean).pow(2).sum(-1, keepdim=True)
        return State(x, mean, self.hook_scale((squares / self.d_model + self.eps).sqrt()))

    @staticmethod
    def look_up(table: Float[Tensor, "place_or_1 d_vocab"], where: Where) -> Tensor:
        """[batch, pos, 1]."""
        cells = table[0, where.tokens] if len(table) == 1 else table[where.places, where.tokens]
        return cells[..., None]


class Read(nn.Module):
    """The kept channels of attn_in or mlp_in: normalised stream and concatenated positions."""

    kept: Tensor
    kept_place: Tensor
    weight: Tensor
    bias: Tensor
    place: Tensor
    window: Tensor
    static_weight: Tensor
    static_bias: Tensor
    static_added: Tensor

    def __init__(
        self,
        weight: Float[Tensor, " d_model"],
        bias: Float[Tensor, " d_model"],
        place: Float[Tensor, "place d_pos"],
        kept: Bool[Tensor, " d_in"],
        tracked: Bool[Tensor, " d_model"],
        k: int | None,
        magnitudes: Float[Tensor, "d_vocab untracked"] | None,
        added: Float[Tensor, "place_or_1 d_model"],
    ) -> None:
        """``k`` None: no AbsTopK. ``magnitudes``: |stream * weight| of untracked channels by token;
        None: they depend on more than the token, so they are computed at each position."""
        super().__init__()
        d_model, self.k = len(tracked), k
        numbers = torch.nonzero(tracked).flatten()
        self.register_buffer("kept", torch.nonzero(kept[:d_model][numbers]).flatten())
        self.register_buffer("kept_place", torch.nonzero(kept[d_model:]).flatten())
        self.register_buffer("weight", weight[tracked])
        self.register_buffer("bias", bias[tracked])
        self.register_buffer("place", place)
        self.from_table = magnitudes is not None
        if k is None:
            return
        if magnitudes is not None:
            m = len(numbers) + place.shape[1]
            self.register_buffer("window", window(magnitudes, k, m))
        else:
            self.register_buffer("static_weight", weight[~tracked])
            self.register_buffer("static_bias", bias[~tracked])
            self.register_buffer("static_added", added[:, ~tracked])

    def forward(self, state: State, where: Where) -> Float[Tensor, "batch pos kept"]:
        """The kept channels, stream channels first."""
        x, mean, scale = state
        place = rows(self.place, where.places).expand(*x.shape[:-1], -1)
        if self.k is None:
            kept = self.kept
            y = (x[..., kept] - mean) / scale * self.weight[kept] + self.bias[kept]
            return torch.cat([y, place[..., self.kept_place]], -1)
        y = torch.cat([(x - mean) / scale * self.weight + self.bias, place], -1)
        kept = torch.cat([self.kept, x.shape[-1] + self.kept_place])
        if self.from_table:  # the table holds the stream before it is divided by the scale
            return survivors(y, kept, self.window, where.tokens, self.k, scale)
        assert where.static is not None
        static = where.static + rows(self.static_added, where.places)
        static = (static - mean) / scale * self.static_weight + self.static_bias
        around_k = window(static.abs(), self.k, y.shape[-1])
        return survivors(y, kept, around_k, None, self.k)


class Projection(nn.Module):
    """The kept outputs of an affine map of kept inputs: activation function, then AbsTopK."""

    weight: Tensor
    bias: Tensor
    window: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "source target"],
        bias: Float[Tensor, "place_or_1 target"],
        kept: Bool[Tensor, " target"],
        k: int | None,
        act: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        k = k if bool(kept.any()) else None
        self.act, self.k, self.n_kept = act, k, int(kept.sum())
        outputs = torch.nonzero(kept).flatten()
        if k is not None:  # beside the kept ones, those that vary with the kept inputs
            reached = (weight != 0).any(0)
            outputs = torch.cat([outputs, torch.nonzero(reached & ~kept).flatten()])
            static = bias[:, ~reached & ~kept]
            static = static if act is None else act(static)
            self.register_buffer("window", window(static.abs(), k, len(outputs)))
        self.register_buffer("weight", weight[:, outputs])
        self.register_buffer("bias", bias[:, outputs])

    def forward(self, x: Float[Tensor, "batch pos source"], places: Tensor) -> Tensor:
        """[batch, pos, kept]."""
        y = x @ self.weight + rows(self.bias, places)
        if self.act is not None:
            y = self.act(y)
        kept = slice(self.n_kept)
        if self.k is None:
            return y[..., kept]
        return survivors(y, kept, self.window, places, self.k)


class Spread(nn.Module):
    """Kept channels put beside constants into a slot for every head: [batch, pos, head, slot]."""

    place: Tensor
    constant: Tensor

    def __init__(
        self, n_live: int, source: Int[Tensor, "head slot"], constant: Float[Tensor, "head slot"]
    ) -> None:
        """``source``: which kept channel goes into the slot; ``n_live`` for none."""
        super().__init__()
        # a product with ones: it and its gradient are several times faster than indexing
        place = F.one_hot(source.flatten(), n_live + 1)[:, :n_live].T.to(constant)
        self.register_buffer("place", place)
        self.register_buffer("constant", constant)

    def forward(self, x: Float[Tensor, "batch pos kept"]) -> Tensor:
        """The slots."""
        return (x @ self.place).unflatten(-1, self.constant.shape) + self.constant


class CompiledAttention(nn.Module):
    """Attention of the heads that reach a kept write."""

    uniform_v: Tensor
    uniform_weight: Tensor
    z: Tensor
    sinks: Tensor | None
    table: Tensor | None

    def __init__(
        self,
        read: Read,
        v: Projection,
        uniform: tuple[Int[Tensor, " channel"], Float[Tensor, "place channel"]],
        out: Projection,
        scale: float,
    ) -> None:
        """``uniform``: the v channels of heads whose pattern depends on the position alone, as
        places among the kept ones, and the weight that each position gives to every earlier one.
        """
        super().__init__()
        self.read, self.v, self.out, self.scale = read, v, out, scale
        self.register_buffer("uniform_v", uniform[0])
        self.register_buffer("uniform_weight", uniform[1])
        self.register_buffer("sinks", None)
        self.register_buffer("table", None)
        self.heads: tuple[int, ...] = ()
        self.hook_act_in, self.hook_v = HookPoint(), HookPoint()

    def add_heads(
        self,
        heads: tuple[int, ...],
        q: Projection,
        k: Projection,
        spreads: tuple[Spread, Spread, Spread],
        z: Int[Tensor, " z"],
        sinks: Float[Tensor, " head"] | None,
    ) -> None:
        """Heads whose pattern depends on more; ``z``: which of their outputs, flat, are read."""
        self.heads, self.q, self.k = heads, q, k
        self.spread_q, self.spread_k, self.spread_v = spreads
        self.register_buffer("z", z)
        self.register_buffer("sinks", sinks)
        self.hook_q, self.hook_k = HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()

    def tabulate(self, stage: Stage, embed: Float[Tensor, "d_vocab tracked"], n_ctx: int) -> None:
        """Compute values, keys and queries of every token (and position) once and for all.

        Only for attention that reads nothing but embeddings; does nothing if that is too much.
        """
        read = self.read
        if read.k is not None and not read.from_table:
            return
        n_places = n_ctx if max(len(read.place), len(stage.added)) > 1 else 1
        n_values = self.v.n_kept + (self.q.n_kept + self.k.n_kept if self.heads else 0)
        if n_places * len(embed) * n_values > TABULATED:
            return
        tokens = torch.arange(len(embed))[:, None]
        parts = []
        for place in range(n_places):
            where = Where(tokens, torch.full_like(tokens, place), None)
            kept = read(stage(embed[:, None], where), where)
            parts.append(torch.cat(self.project(kept, kept, where.places, where.places), -1)[:, 0])
        self.register_buffer("table", torch.stack(parts))

    def project(self, read: Tensor, queries: Tensor, places: Tensor, to: Tensor) -> list[Tensor]:
        """Values and, if a pattern depends on them, keys and queries."""
        projected = [self.v(read, places)]
        if self.heads:
            projected += [self.k(read, places), self.q(queries, to)]
        return projected

    def look_up(self, where: Where, ends: Int[Tensor, "batch end"] | None) -> list[Tensor]:
        """The same from the table."""
        assert self.table is not None
        cells = self.table[0 if len(self.table) == 1 else where.places, where.tokens]
        if not self.heads:
            return [cells]
        v, k, q = cells.split([self.v.n_kept, self.k.n_kept, self.q.n_kept], -1)
        return [v, k, q if ends is None else pick(q, ends)]

    def forward(
        self,
        x: Float[Tensor, "batch pos tracked"],
        stage: Stage,
        where: Where,
        ends: Int[Tensor, "batch end"] | None,
        mask: Bool[Tensor, "batch slot src"] | None,
    ) -> Float[Tensor, "batch dest write"]:
        """The kept writes: at every slot, or at ``ends`` only.

        ``mask``: what each slot attends to; None: itself and those before it.
        """
        to = where.places if ends is None else where.places_at(ends)
        if self.table is None or has_hooks(self.hook_act_in) or has_hooks(stage.hook_scale):
            read = self.hook_act_in(self.read(stage(x, where), where))
            queries = read if ends is None else pick(read, ends)
            projected = self.project(read, queries, where.places, to)
        else:
            projected = self.look_up(where, ends)
        v = self.hook_v(projected[0])
        seen, alike = mask, v[..., self.uniform_v]
        if ends is not None and mask is not None:
            seen = pick(mask, ends)
        elif ends is not None:
            seen = torch.arange(v.shape[1], device=v.device) <= ends[:, :, None]
        total = alike.cumsum(1) if seen is None else seen.to(v.dtype) @ alike
        z = total * self.uniform_weight[to]
        if self.heads:
            k, q = self.hook_k(projected[1]), self.hook_q(projected[2])
            live = attention(
                self.spread_q(q), self.spread_k(k), self.spread_v(v),
                scale=self.scale, sinks=self.sinks, mask=seen,
                hooked=has_hooks(self.hook_attn_scores) or has_hooks(self.hook_pattern),
                hook_scores=self.hook_attn_scores, hook_pattern=self.hook_pattern,
            )  # fmt: skip
            z = torch.cat([z, live.flatten(-2)[..., self.z]], -1)
        return self.out(z, to)


class CompiledMLP(nn.Module):
    """The kept neurons of an MLP that reach a kept write."""

    def __init__(self, read: Read, neurons: Projection, out: Projection) -> None:
        super().__init__()
        self.read, self.neurons, self.out = read, neurons, out
        self.hook_act_in, self.hook_post = HookPoint(), HookPoint()

    def forward(self, state: State, where: Where) -> Float[Tensor, "batch pos write"]:
        """The kept writes."""
        read = self.hook_act_in(self.read(state, where))
        return self.out(self.hook_post(self.neurons(read, where.places)), where.places)
