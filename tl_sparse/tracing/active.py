"""Active features of one dictionary in one run, as flat vectors: how they are read and written.

Of thousands of features a few tens are active at a token. What a trace keeps, gates and
differentiates are vectors with one entry per active feature of the whole batch, in the order
prompt, position, feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.tracing.functions import AnyDictionary, FunctionDictionary

_DENSE = 1 / 16  # share of active entries above which a whole matrix product is faster than rows


@dataclass(frozen=True, eq=False, repr=False)
class Active:
    """Which features of a dictionary are active where."""

    site: str
    """The dictionary's name."""
    prompt: Int[Tensor, " active"]
    """Row of the batch."""
    pos: Int[Tensor, " active"]
    """Position."""
    feature: Int[Tensor, " active"]
    """Number of the feature."""
    row: Int[Tensor, " active"]
    """prompt · positions + pos."""
    n_rows: int
    """Prompts times positions."""
    n_pos: int
    """Positions."""
    d_sae: int
    """Features of the dictionary."""

    @classmethod
    def where(cls, site: str, mask: Bool[Tensor, "prompt pos feature"]) -> Active:
        """The entries of a mask."""
        n_prompts, n_pos, d_sae = mask.shape
        prompt, pos, feature = mask.nonzero(as_tuple=True)
        return cls(
            site, prompt, pos, feature, prompt * n_pos + pos, n_prompts * n_pos, n_pos, d_sae
        )

    def __len__(self) -> int:
        return len(self.feature)

    @property
    def dense(self) -> bool:
        """Whether so many are active that whole matrices are multiplied."""
        return len(self) > _DENSE * self.n_rows * self.d_sae

    def spread(self, values: Float[Tensor, " active"]) -> Float[Tensor, "row feature"]:
        """The values in a matrix, zero where nothing is active."""
        whole = values.new_zeros(self.n_rows, self.d_sae)
        return whole.index_put((self.row, self.feature), values)

    def find(self, prompt: int, pos: int, feature: int) -> int:
        """Number of the entry; -1 if that feature is not active there."""
        here = (self.prompt == prompt) & (self.pos == pos) & (self.feature == feature)
        found = here.nonzero().flatten()
        return int(found[0]) if len(found) else -1


class _Read(torch.autograd.Function):
    """Pre-activations of the active features; the gradient goes back along their encoders."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pre: Tensor, W_enc: Tensor, at: Active) -> Tensor:
        ctx.save_for_backward(W_enc)
        ctx.at = at
        return pre.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (W_enc,), at, g = ctx.saved_tensors, ctx.at, grads[0]
        if at.dense:
            return at.spread(g) @ W_enc.T, None, None, None
        rows = g[:, None] * W_enc.T[at.feature]
        back = g.new_zeros(at.n_rows, len(W_enc)).index_add(0, at.row, rows)
        return back, None, None, None


class _Write(torch.autograd.Function):
    """Sum of the active features' directions at each row."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, at: Active) -> Tensor:
        ctx.save_for_backward(W_dec)
        ctx.at = at
        return written(values, W_dec, at)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (W_dec,), at, g = ctx.saved_tensors, ctx.at, grads[0]
        if at.dense:
            return (g @ W_dec.T)[at.row, at.feature], None, None
        return (g[at.row] * W_dec[at.feature]).sum(-1), None, None


def written(
    values: Float[Tensor, " active"], W_dec: Float[Tensor, "feature d_out"], at: Active
) -> Float[Tensor, "row d_out"]:
    """Sum of the active features' directions at each row: rows gathered, or a whole product."""
    if at.dense:
        return at.spread(values) @ W_dec
    rows = values[:, None] * W_dec[at.feature]
    return rows.new_zeros(at.n_rows, W_dec.shape[1]).index_add_(0, at.row, rows)


class _AsIs(torch.autograd.Function):
    """The activation to the bit, with the gradient of the sum of its parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor) -> Tensor:
        ctx.n_parts = len(parts)
        return x.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *([grads[0]] * ctx.n_parts)


def as_is(x: Float[Tensor, "..."], *parts: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``x``, whose gradient goes to each of the parts that it is the sum of."""
    return _AsIs.apply(x, *parts)


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """A dictionary's active features in a run, with the graph before them."""

    active: Active
    """Which they are."""
    before: Float[Tensor, " active"]
    """Their activations, as they depend on what is before them."""
    bias: Float[Tensor, " active"]
    """The part of each activation that the encoder's bias adds."""
    out_factor: Float[Tensor, "prompt pos 1"]
    """c_out of every token."""
    skip: Float[Tensor, "prompt pos d_out"] | None
    """What a skip path writes."""


def read_features(
    dictionary: AnyDictionary,
    x_in: Float[Tensor, "prompt pos d_in"],
    x_out: Float[Tensor, "prompt pos d_out"],
    real: Bool[Tensor, "prompt pos"],
    frozen_norm: bool = True,
) -> Features:
    """The active features at real tokens, differentiable by ``x_in``, the active set held.

    With ``frozen_norm`` the dictionary's norm factors are constants.
    """
    if isinstance(dictionary, FunctionDictionary):
        return read_functions(dictionary, x_in, real)
    factor, out_factor = dictionary.factor(x_in), dictionary.factor(x_out)
    if frozen_norm:
        factor, out_factor = factor.detach(), out_factor.detach()
    x = dictionary.centred(x_in) * factor
    with torch.no_grad():
        pre = x @ dictionary.W_enc + dictionary.b_enc
        mask = dictionary.is_active(pre) & real[..., None]
        active = Active.where(dictionary.name, mask)
        values = pre[mask]
    row_factor = out_factor.flatten()[active.row]
    before = _Read.apply(x.flatten(0, 1), values, dictionary.W_enc, active) / row_factor
    bias = (dictionary.b_enc[active.feature] / row_factor).detach()
    skip = None
    if dictionary.W_skip is not None:
        skip = x @ dictionary.W_skip / out_factor * real[..., None]
    return Features(active, before, bias, out_factor, skip)


def read_functions(
    dictionary: FunctionDictionary,
    x_in: Float[Tensor, "prompt pos d_in"],
    real: Bool[Tensor, "prompt pos"],
) -> Features:
    """The same of a dictionary that is known by its functions."""
    features = dictionary.encode(x_in)
    mask = (features.detach() != 0) & real[..., None]
    active = Active.where(dictionary.name, mask)
    at = x_in.detach()
    rest = features.detach() - dictionary.slope(at, at)
    return Features(active, features[mask], rest[mask], dictionary.factor(at), None)


def write_features(
    dictionary: AnyDictionary, values: Float[Tensor, " active"], active: Active
) -> Float[Tensor, "prompt pos d_out"]:
    """What active features of these values write, the decoder's bias not included."""
    x = _Write.apply(values, dictionary.W_dec, active)
    return x.unflatten(0, (-1, active.n_pos))
