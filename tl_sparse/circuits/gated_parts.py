"""The parts of a compiled circuit with gates in place of hooks: what pruning computes most often.

The same as the modules of ``compiled_parts`` with a hook at every site that mixes in a node's value
where its gate is closed, on slots (see ``slots``) instead of padded rows. A site is one function
with a gradient of its own (a map, AbsTopK's choice and the gates), which takes a third of the
operations that autograd would: in a circuit of a few dozen nodes these are what a pass costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.circuits.compiled_parts import Projection, Read, Stage, Where, rows, sorts, window
from tl_sparse.model.abstopk import kth_largest


class Gating(NamedTuple):
    """How a site is gated; all None: it is not."""

    gate: Float[Tensor, "_group _slot_or_1 kept"] | None
    """How open each gate is."""
    value: Float[Tensor, " kept"] | None
    """What a node is set to where its gate is closed."""
    group: Int[Tensor, " _group"] | None
    """Of each group of masks at this site the one before it that it is a part of; None: the same,
    or there was one."""


def passing(
    y: Float[Tensor, "group slot m"],
    kept: Tensor | slice,
    around_k: Float[Tensor, "..."],
    k: int,
    scale: Tensor | None = None,
) -> Float[Tensor, "group slot kept"] | None:
    """1 for the kept channels of ``y`` that AbsTopK passes, else 0; None: it passes all.

    ``around_k`` is the window of all channels not in ``y`` (see ``compiled_parts.survivors``),
    divided by ``scale`` if there is one.
    """
    m, around = y.shape[-1], around_k.shape[-1]
    r = min(k, m)
    if m + around == r:
        return None
    if not sorts(y):
        sizes = y.abs()
        mine = sizes[..., kept]
        around_k = around_k if scale is None else around_k / scale
        sizes = torch.cat([sizes, around_k.expand(*y.shape[:-1], around)], -1)
        return (mine >= kth_largest(sizes, r)).to(y.dtype)
    # numpy's calls cost half of torch's, and its sort is vectorised
    found = np.empty((*y.shape[:-1], m + around), dtype=y.numpy().dtype)
    mine = np.abs(y.numpy(), out=found[..., :m])[
        ..., kept if isinstance(kept, slice) else kept.numpy()
    ].copy()
    if scale is None:
        found[..., m:] = around_k.numpy()
    else:
        np.divide(around_k.numpy(), scale.numpy(), out=found[..., m:])
    found.sort(-1)
    passed = np.greater_equal(mine, found[..., -r, None], out=np.empty_like(mine))
    return torch.from_numpy(passed)


class _Site(torch.autograd.Function):
    """What all sites share: the gates, and which channels AbsTopK passed."""

    @staticmethod
    def mixed(ctx: Any, s: Tensor, passed: Tensor | None, gate: Tensor | None,
              value: Tensor | None, group: Tensor | None) -> Tensor:  # fmt: skip
        s = s if passed is None else s * passed
        ctx.passed, ctx.gate = passed, gate
        if group is not None and s.shape[0] > 1:
            s = s.index_select(0, group)
        if gate is None or value is None:
            return s
        ctx.apart = s - value
        return torch.addcmul(value, ctx.apart, gate)

    @staticmethod
    def unmixed(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient of what came in, and of the gates."""
        slope = None
        if ctx.gate is not None:
            slope = grad * ctx.apart
            slope = slope.sum(1, keepdim=True) if ctx.gate.shape[1] == 1 else slope
            grad = grad * ctx.gate
        return grad if ctx.passed is None else grad * ctx.passed, slope


class _Read(_Site):
    """Norm, read, AbsTopK and gates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, value: Tensor | None, read: Read,
                stage: Stage, where: Where, group: Tensor | None) -> Tensor:  # fmt: skip
        x, mean, scale = stage(x, where)
        unit = x - mean if stage.centred else x
        unit = unit / scale if stage.normalised else unit
        place = rows(read.place, where.places).expand(*x.shape[:-1], -1)
        kept, passed = read.kept, None
        ctx.n, ctx.kept, ctx.weight, ctx.stage = len(kept), kept, read.weight[kept], stage
        ctx.unit, ctx.scale = unit, scale
        if read.k is None:
            s = unit[..., kept] * ctx.weight + read.bias[kept]
            s = torch.cat([s, place[..., read.kept_place]], -1)
        else:
            y = torch.cat([unit * read.weight + read.bias, place], -1)
            kept = torch.cat([kept, unit.shape[-1] + read.kept_place])
            if read.from_table:
                passed = passing(y, kept, read.window[where.tokens], read.k, scale)
            else:
                assert where.static is not None
                static = where.static + rows(read.static_added, where.places)
                static = (static - mean) / scale * read.static_weight + read.static_bias
                passed = passing(y, kept, window(static.abs(), read.k, y.shape[-1]), read.k)
            s = y.index_select(-1, kept)
        return _Site.mixed(ctx, s, passed, gate, value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, slope = _Site.unmixed(ctx, grads[0])
        if not ctx.needs_input_grad[0]:
            return None, slope, None, None, None, None, None
        stage, unit = ctx.stage, ctx.unit
        part = grad[..., : ctx.n] * ctx.weight
        if not stage.normalised:
            dx = torch.zeros_like(unit).index_add_(-1, ctx.kept, part)
            return dx, slope, None, None, None, None, None
        part = part / ctx.scale
        along = (part * unit.index_select(-1, ctx.kept)).sum(-1, keepdim=True)
        dx = (unit * (along / -stage.d_model)).index_add_(-1, ctx.kept, part)
        if stage.centred:
            dx -= part.sum(-1, keepdim=True) / stage.d_model
        return dx, slope, None, None, None, None, None


class _Project(_Site):
    """An affine map, its activation function, AbsTopK and gates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, value: Tensor | None, part: Projection,
                weight: Tensor, places: Tensor, group: Tensor | None) -> Tensor:  # fmt: skip
        n = part.n_kept
        weight = weight if part.k is not None else weight[:, :n]
        bias = rows(part.bias, places)[..., : weight.shape[1]]
        if bias.ndim == 1:
            y = torch.addmm(bias, x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        else:
            y = x @ weight + bias
        ctx.weight, ctx.act, ctx.before = weight[:, :n], part.act, y[..., :n]
        y = y if part.act is None else part.act(y)
        passed = None
        if part.k is not None:
            passed = passing(y, slice(n), rows(part.window, places), part.k)
        return _Site.mixed(ctx, y[..., :n], passed, gate, value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, slope = _Site.unmixed(ctx, grads[0])
        if not ctx.needs_input_grad[0]:
            return None, slope, None, None, None, None, None
        if ctx.act is not None:
            with torch.enable_grad():
                before = ctx.before.detach().requires_grad_()
                (grad,) = torch.autograd.grad(ctx.act(before), before, grad)
        return grad @ ctx.weight.mT, slope, None, None, None, None, None


class _Take(torch.autograd.Function):
    """Slots of a tensor, and one more row behind them, in any order; each slot once at most, but
    for those whose gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, back: Tensor, more: Tensor | None) -> Tensor:
        ctx.save_for_backward(back)
        if more is not None:
            x = torch.cat([x, more.expand(len(x), 1, -1)], 1)
        return x.index_select(1, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(1, ctx.saved_tensors[0]), None, None, None


def read_site(
    x: Float[Tensor, "_group slot tracked"], read: Read, stage: Stage, where: Where, by: Gating
) -> Float[Tensor, "_group slot kept"]:
    """The gated channels of attn_in or mlp_in."""
    found: Tensor = _Read.apply(x, by.gate, by.value, read, stage, where, by.group)
    return found


def project_site(
    x: Float[Tensor, "_group slot source"],
    part: Projection,
    places: Tensor,
    by: Gating,
    weight: Float[Tensor, "source target"] | None = None,
) -> Float[Tensor, "_group slot kept"]:
    """The gated outputs of a map; ``weight``: in place of its own."""
    weight = part.weight if weight is None else weight
    found: Tensor = _Project.apply(x, by.gate, by.value, part, weight, places, by.group)
    return found


def taken(x: Float[Tensor, "group slot channel"], places: Tensor, back: Tensor,
          more: Tensor | None = None) -> Float[Tensor, "group place channel"]:  # fmt: skip
    """``x`` at some slots; ``back``: where each slot went, ``more``: a row that stands behind."""
    found: Tensor = _Take.apply(x, places, back, more)
    return found
