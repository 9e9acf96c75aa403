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
    if mask is None:
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        allowed = mask if sinks is None else F.pad(mask, (1, 0), value=True)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None], scale=scale)
    if sinks is not None:
        z = z[:, :, (1 if mask is None else 0) :, :width]
    return z.transpose(1, 2)


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
    if changed is None and not (pattern.requires_grad or v.requires_grad):
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
    whatever they hold. None for ``changed`` is a change nowhere.
    """
    return _CanonicalUnlessChanged.apply(canonical, other, changed)


def _pass(x: Pattern, hook: Hook) -> tuple[Pattern, Bool[Tensor, "batch head dest"] | None]:
    """What a hook makes of ``x``, and the rows that it changed; None if there are none."""
    if only_read(hook):  # a cache: saves two copies and a comparison of all entries
        return hook(x), None
    before = x.detach()
    x = hook(x.clone())  # a copy, which a hook may edit in place
    return x, _rows_changed(before, x)


def _rows_changed(before: Tensor, after: Tensor) -> Tensor | None:
    if torch.equal(before, after):  # most hooks only look; row by row costs several times as much
        return None
    # NaN != NaN would report a change in rows that no hook touched
    same = (before == after) | (before.isnan() & after.isnan())
    changed = (~same).any(-1)
    return changed if bool(changed.any()) else None
