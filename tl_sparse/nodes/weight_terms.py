"""What one weight adds, and where: every weight of a matrix is a term of one channel's sum.

To set a weight to zero is to take ``weight · input`` from one output channel, before AbsTopK. So a
hook can do it, for another weight in every row of a batch, and no parameter is ever written to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import BLOCK_MATRICES, SITES
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.sparsity.weight_masks import Entry, part_names

TOKEN, POSITION, ONE, FINAL = "token", "position", "one", "final"
"""What a weight is multiplied by where that is no site: whether its row's token is there, whether
its row's position is, one (a bias), or what the unembedding reads."""
OUTPUTS = {
    "W_Q": ("attn.topk_q", "attn.hook_q"), "W_K": ("attn.topk_k", "attn.hook_k"),
    "W_V": ("attn.topk_v", "attn.hook_v"), "W_O": ("attn.topk_out", "hook_attn_out"),
    "W_in": ("", "mlp.hook_pre"), "W_out": ("mlp.topk_out", "hook_mlp_out"),
}  # fmt: skip
"""Where a matrix' output is before it is changed: the AbsTopK of a SparseTransformer, else a
hook."""


@dataclass(frozen=True, eq=False)
class Terms:
    """A matrix (or bias) whose weights are set to zero one at a time."""

    name: str
    """``blocks.0.attn.W_Q`` ..."""
    tensor: Float[Tensor, "..."]
    """The weights, in their own shape."""
    layer: int | None
    """The block that the matrix is in; None before and after the blocks."""
    reads: str
    """The site of what the weights are multiplied by, or TOKEN, POSITION, ONE or FINAL."""
    output: nn.Module | None
    """What the output goes through next; None for the logits."""
    source: str
    """What a weight reads, in words to which a channel is added: ``0.mlp.act_in``, ``token``."""
    target: str
    """What it writes: ``0.mlp.post_act``, ``embed``, ``logit``."""
    shift: int = 0
    """Channels of the site before the matrix' own: positions come after the residual stream's."""
    tied: bool = False
    """Whether the unembedding is the same matrix."""

    def sources(self, index: Int[Tensor, "entry dim"]) -> Int[Tensor, " entry"]:
        """The channel (token, position) that each weight reads."""
        short = self.name.rpartition(".")[2]
        if self.reads == ONE:
            return torch.zeros(len(index), dtype=torch.int64)
        if short == "W_O":
            return index[:, 0] * self.tensor.shape[1] + index[:, 1]
        return index[:, 1 if self.tensor.ndim == 3 else 0] + self.shift

    def targets(self, index: Int[Tensor, "entry dim"]) -> Int[Tensor, " entry"]:
        """The output channel that each weight is a term of."""
        short = self.name.rpartition(".")[2]
        if self.tensor.ndim == 3 and short != "W_O":  # q, k, v: [head, source, channel]
            return index[:, 0] * self.tensor.shape[2] + index[:, 2]
        if self.tensor.ndim == 2 and short.startswith("b_"):
            return index[:, 0] * self.tensor.shape[1] + index[:, 1]
        return index[:, -1]


def terms_of(
    model: nn.Module, biases: bool, names: Collection[str] | None = None
) -> dict[str, Terms]:
    """Every matrix that weight sparsity applies to (or those of these names), and the biases if
    asked for, by name.

    Raises:
        UnsupportedWeights: the model keeps a matrix in a form that has no single entries.
        ValueError: an unknown name, gated MLPs, or a model that lacks a hook.
    """
    found: dict[str, Terms] = {}
    matrices = weight_matrices(model, biases=biases)
    known = [name for matrix in matrices for name in part_names(matrix)]
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"unknown matrix {unknown[0]!r}; choose from {', '.join(known)}")
    untied = any(matrix.name == "unembed.W_U" for matrix in matrices)
    for matrix in matrices:
        # concatenated positions are read after the residual stream's channels
        shifts = (0, matrix.parts[0].shape[-2]) if len(matrix.parts) > 1 else (0,)
        for name, part, shift in zip(part_names(matrix), matrix.parts, shifts, strict=True):
            if names is None or name in names:
                found[name] = _terms(model, name, part, shift, not untied)
    return found


def _terms(model: Any, name: str, tensor: Tensor, shift: int, tied: bool) -> Terms:
    if name == "embed.W_E":
        point = _point(model, "hook_embed")
        return Terms(name, tensor, None, TOKEN, point, "token", "embed", tied=tied)
    if name == "pos_embed.W_pos":
        return Terms(
            name, tensor, None, POSITION, _point(model, "hook_pos_embed"), "position", "pos_embed"
        )
    if name == "unembed.W_U":
        if getattr(model.cfg, "output_logits_soft_cap", -1.0) > 0:
            raise ValueError("this model caps its logits, so that unembed.W_U cannot be changed")
        return Terms(name, tensor, None, FINAL, None, "unembed", "logit")
    _, number, part, short = name.split(".")
    layer = int(number)
    matrix = next(
        row.name for row in BLOCK_MATRICES.values() if short in (row.name, row.bias, row.positional)
    )
    if getattr(getattr(model.blocks[layer], part), "W_gate", None) is not None:
        raise ValueError(
            f"{name}: this model's MLPs are gated, so that a weight is no term of one sum; name "
            "the other matrices with matrices="
        )
    topk, hook = OUTPUTS[matrix]
    output: Any = None
    if isinstance(model, SparseTransformer) and topk:
        output = model.get_submodule(f"blocks.{layer}.{topk}")
        # without AbsTopK queries, keys and values do not go through the module
        output = output if topk.endswith("out") or output.active else None
    if output is None:
        output = _point(model, f"blocks.{layer}.{hook}")
    reads = next(row for row in reversed(SITES) if matrix in row.read_by)
    writes = next(row for row in SITES if matrix in row.written_by)
    bias = short.startswith("b_")
    return Terms(
        name, tensor, layer, ONE if bias else reads.name, output,
        "bias" if bias else reads.openai.format(layer=layer), writes.openai.format(layer=layer),
        shift,
    )  # fmt: skip


def _point(model: Any, hook: str) -> nn.Module:
    if hook not in model.hook_dict:
        raise ValueError(f"{type(model).__name__} has no {hook}, through which weights act")
    return model.hook_dict[hook]


@dataclass(frozen=True, eq=False)
class Entries:
    """Some weights, matrix by matrix."""

    matrices: tuple[str, ...]
    """Names of the matrices."""
    matrix: Int[Tensor, " entry"]
    """Which of them each weight is in."""
    index: Int[Tensor, "entry 3"]
    """Its place in the matrix; -1 for dimensions that the matrix does not have."""

    def __len__(self) -> int:
        return len(self.matrix)


def chosen_entries(terms: Mapping[str, Terms], entries: Sequence[Entry] | None) -> Entries:
    """The weights named, or all that are not zero.

    Raises:
        ValueError: an index outside of its matrix, or no weights.
    """
    names = tuple(terms)
    which, index = [], []
    if entries is None:
        places = {name: term.tensor.nonzero().cpu() for name, term in terms.items()}
    else:
        by_name: dict[str, list[tuple[int, ...]]] = {}
        for name, place in entries:
            shape = terms[name].tensor.shape
            inside = len(place) == len(shape) and all(
                0 <= x < n for x, n in zip(place, shape, strict=False)
            )
            if not inside:
                raise ValueError(f"index {place} lies outside {name} of shape {tuple(shape)}")
            by_name.setdefault(name, []).append(tuple(place))
        places = {name: torch.tensor(found) for name, found in by_name.items()}
    for name, found in places.items():
        index.append(_three(found))
        which.append(torch.full((len(found),), names.index(name)))
    if not sum(map(len, which)):
        raise ValueError("no weights: those chosen are all zero")
    return Entries(names, torch.cat(which), torch.cat(index))


def _three(index: Int[Tensor, "entry dim"]) -> Int[Tensor, "entry 3"]:
    return nn.functional.pad(index, (0, 3 - index.shape[1]), value=-1)
