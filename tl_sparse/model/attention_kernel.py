"""Causal attention with optional per-head sinks: one kernel for all runs, hooked or not.

AbsTopK turns last-bit differences between kernels into visible ones, so the value of ``z`` may not
depend on whether a hook reads the scores or the pattern. The fused kernel always computes it;
scores and pattern are computed besides, only when something is hooked to them, and enter ``z`` only
in the rows where a hook changed them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.compat import only_read
from tl_sparse.model.transforms import opaque, transformed

Hook = Callable[[Tensor], Tensor]
Queries = Float[Tensor, "batch dest head d_head"]
Keys = Float[Tensor, "batch src head d_head"]
Pattern = Float[Tensor, "batch head dest src"]
SINK_PAD = 8  # head channels added for the sink's logit; fused kernels want multiples of eight


def fused_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    scale: float,
    sinks: Float[Tensor, " head"] | None = None,
    mask: Bool[Tensor, "batch dest src"] | None = None,
) -> Queries:
    """Softmax attention by torch's fused kernel; causal where ``mask`` is None.

    A sink adds exp(sink) to each softmax denominator (Gao et al. 2025, A.1). It enters as a key of
    its own at position 0, before everything, with a zero value; its logit rides on one extra head
    channel that is 1 in every query, so the kernel needs no additive mask.
    """
    width = v.shape[-1]
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [batch, head, pos, d_head]
    if sinks is not None:
        carrier = F.pad(q.new_ones(1), (width, SINK_PAD - 1))
        sink_key = (sinks.to(k.dtype) / scale)[None, :, None, None] * carrier
        sink_key = sink_key.expand(k.shape[0], -1, 1, -1)
        k = torch.cat([sink_key, F.pad(k, (0, SINK_PAD))], dim=2)
        v = F.pad(v, (0, SINK_PAD, 1, 0))
        # One query more keeps the problem square, so that the kernel's own causal mask fits.
        q = F.pad(q, (0, SINK_PAD, 1 if mask is None else 0, 0)) + carrier
    allowed = mask if mask is None or sinks is None else F.pad(mask, (1, 0), value=True)
    z = softmax_attention(q, k, v, None if allowed is None else allowed[:, None], scale)
    if sinks is not None:
        z = z[:, :, (1 if mask is None else 0) :, :width]
    return z.transpose(1, 2)


def softmax_attention(
    q: Float[Tensor, "batch head dest width"],
    k: Float[Tensor, "batch head src width"],
    v: Float[Tensor, "batch head src width"],
    allowed: Bool[Tensor, "batch 1 dest src"] | None,
    scale: float,
) -> Float[Tensor, "batch head dest width"]:
    """The fused kernel's value and gradient; all other derivatives are :func:`plain_attention`'s.

    The kernel itself has neither second nor forward-mode derivatives. Causal where ``allowed`` is
    None.
    """
    if torch.compiler.is_compiling():
        return _kernel(q, k, v, allowed, scale)
    if transformed(q, k, v):
        value = _Value.apply(q.detach(), k.detach(), v.detach(), allowed, scale)
        return canonical_unless_changed(value, plain_attention(q, k, v, allowed, scale), None)
    z = _kernel(q, k, v, allowed, scale)
    return _TwiceDifferentiable.apply(z, q, k, v, allowed, scale) if z.requires_grad else z


def plain_attention(
    q: Float[Tensor, "batch head dest width"],
    k: Float[Tensor, "batch head src width"],
    v: Float[Tensor, "batch head src width"],
    allowed: Bool[Tensor, "batch 1 dest src"] | None,
    scale: float,
) -> Float[Tensor, "batch head dest width"]:
    """The same in operations that have all derivatives: slower, and other in the last bits."""
    scores = q * scale @ k.mT
    if allowed is None:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


def _kernel(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    causal = allowed is None
    return F.scaled_dot_product_attention(q, k, v, allowed, is_causal=causal, scale=scale)


class _TwiceDifferentiable(torch.autograd.Function):
    """The kernel's output ``z`` as it is; a gradient that is to be differentiated goes around it.

    It goes to q, k and v by the plain formula. Any other takes the kernel's own way through ``z``.
    What is saved is what the kernel saves, too.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, allowed)
        ctx.scale = scale
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():  # it is where create_graph=True
            return grads[0], None, None, None, None, None
        q, k, v, allowed = ctx.saved_tensors
        z = plain_attention(q, k, v, allowed, ctx.scale)
        wanted = [x for x in (q, k, v) if x.requires_grad]
        found = iter(torch.autograd.grad(z, wanted, grads[0], create_graph=True))
        qkv = (next(found) if x.requires_grad else None for x in (q, k, v))
        return None, *qkv, None, None


class _Value(torch.autograd.Function):
    """The kernel's value alone; under ``vmap`` one call for all, where torch would loop."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
        return _kernel(q, k, v, allowed, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        def merged(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            rows = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return rows.flatten(0, 1)

        value = _Value.apply(*map(merged, inputs, in_dims))
        return value.unflatten(0, (info.batch_size, -1)), 0


def explicit_pattern(
    q: Queries,
    k: Keys,
    *,
    scale: float,
    sinks: Float[Tensor, " head"] | None,
    mask: Bool[Tensor, "batch dest src"] | None,
    hook_scores: Hook,
    hook_pattern: Hook,
) -> tuple[Pattern, Bool[Tensor, "batch dest head"] | None]:
    """The same attention's pattern, with it and the scores laid open to hooks.

    Returns:
        The pattern, and which of its rows a hook changed; None if none did. Rows sum to less than 1
        where there is a sink: the rest of the mass is on it.
    """
    if mask is None:
        n = q.shape[1]
        mask = torch.ones(n, k.shape[1], dtype=torch.bool, device=q.device).tril()[None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    scores = scores.masked_fill_(~mask[:, None], -torch.inf)
    scores, changed = _pass(scores, hook_scores)
    if sinks is None:
        pattern = scores.softmax(-1)
    else:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        pattern = torch.cat([column, scores], -1).softmax(-1)[..., 1:].contiguous()
    pattern, also = _pass(pattern, hook_pattern)
    if changed is None or also is None:
        changed = also if changed is None else changed
    else:
        changed = changed | also
    return pattern, None if changed is None else changed.transpose(1, 2)


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    scale: float,
    sinks: Float[Tensor, " head"] | None,
    mask: Bool[Tensor, "batch dest src"] | None,
    hooked: bool,
    hook_scores: Hook,
    hook_pattern: Hook,
) -> Queries:
    """``z``: the fused value, or the explicit one in rows that a hook changed."""
    if not hooked:
        return fused_attention(q, k, v, scale=scale, sinks=sinks, mask=mask)
    pattern, changed = explicit_pattern(
        q, k, scale=scale, sinks=sinks, mask=mask, hook_scores=hook_scores,
        hook_pattern=hook_pattern,
    )  # fmt: skip
    with torch.no_grad():
        canonical = fused_attention(q, k, v, scale=scale, sinks=sinks, mask=mask)
    if changed is None and not (
        pattern.requires_grad or v.requires_grad or transformed(pattern, v)
    ):
        return canonical  # nothing to change it, and no gradient to pass to the hooks
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
    return canonical_unless_changed(canonical, z, None if changed is None else changed[..., None])


class _CanonicalUnlessChanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, canonical: Tensor, other: Tensor, changed: Tensor | None) -> Tensor:
        return canonical.clone() if changed is None else torch.where(changed, other, canonical)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        return None, grads[0], None


def canonical_unless_changed(
    canonical: Float[Tensor, "..."],
    other: Float[Tensor, "..."],
    changed: Bool[Tensor, "..."] | None,
) -> Float[Tensor, "..."]:
    """Two routes to one value: bits of ``canonical`` where nothing was ``changed``, else ``other``.

    The gradient always follows ``other``, the route on which the hooks are, so that it reaches
    whatever they hold; so do all other derivatives. None for ``changed`` is a change nowhere.
    """
    if transformed(other):
        # not the function below: torch drops its tangents where one jvp stands in another
        value = canonical if changed is None else torch.where(changed, other, canonical)
        return value.detach() + (other - other.detach())  # the bracket is exactly zero
    return _CanonicalUnlessChanged.apply(canonical, other, changed)


def _pass(x: Pattern, hook: Hook) -> tuple[Pattern, Bool[Tensor, "batch head dest"] | None]:
    """What a hook makes of ``x``, and the rows that it changed; None if there are none."""
    if only_read(hook):  # a cache: saves two copies and a comparison of all entries
        return hook(x), None
    before = x.detach()
    x = hook(x.clone())  # a copy, which a hook may edit in place
    return x, _rows_changed(before, x)


def _rows_changed(before: Tensor, after: Tensor) -> Tensor | None:
    if opaque(before) or opaque(after):
        return ~_same(before, after).all(-1)
    if torch.equal(before, after):  # most hooks only look; row by row costs several times as much
        return None
    changed = ~_same(before, after).all(-1)
    return changed if bool(changed.any()) else None


def _same(before: Tensor, after: Tensor) -> Tensor:
    # NaN != NaN would report a change in rows that no hook touched
    return (before == after) | (before.isnan() & after.isnan())
