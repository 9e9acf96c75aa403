"""Weights held as their nonzeros alone: a big, nearly empty model in a small part of its memory.

The forward pass is the same; where it multiplies by a matrix, a part that holds the matrix sparsely
multiplies sparsely. Embedding, bigram table, norms and biases stay as they are.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.model.attention import Attention
from tl_sparse.model.layers import MLP, Layer, Unembed

INDEX = torch.int32
"""Of rows and columns: half the memory of int64, and enough for matrices of 2**31 nonzeros."""


@dataclass(eq=False)
class SparseMatrix:
    """A matrix [d_in, d_out] as the compressed rows (CSR) of its transpose."""

    starts: Int[Tensor, " row"]
    """Where each row begins among the nonzeros, and where the last one ends."""
    columns: Int[Tensor, " nonzero"]
    """The column of each nonzero."""
    values: Float[Tensor, " nonzero"]
    """Its value."""
    shape: tuple[int, int]
    """(d_out, d_in)."""

    @classmethod
    def of(cls, matrix: Float[Tensor, "d_in d_out"]) -> SparseMatrix:
        """The nonzeros of a matrix."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this layout is in beta, told once a process
            csr = matrix.detach().T.to_sparse_csr()
        starts, columns = csr.crow_indices().to(INDEX), csr.col_indices().to(INDEX)
        return cls(starts, columns, csr.values(), (csr.shape[0], csr.shape[1]))

    @property
    def csr(self) -> Tensor:
        """The transpose as torch multiplies by it; no new memory."""
        return torch.sparse_csr_tensor(
            self.starts, self.columns, self.values, self.shape, check_invariants=False
        )

    def times(
        self, x: Float[Tensor, "... d_in"], bias: Float[Tensor, " d_out"]
    ) -> Float[Tensor, "... d_out"]:
        """``x @ matrix + bias``, with a gradient for ``x`` and ``bias``."""
        out = _Product.apply(x.reshape(-1, x.shape[-1]), self.csr)
        return out.view(*x.shape[:-1], -1) + bias

    def dense(self) -> Float[Tensor, "d_in d_out"]:
        """The matrix with its zeros: new memory."""
        return self.csr.to_dense().T

    def map(self, fn: Callable[[Tensor], Tensor]) -> SparseMatrix:
        """The same moved or cast by a function of tensors."""
        return SparseMatrix(fn(self.starts), fn(self.columns), fn(self.values), self.shape)

    @property
    def nonzeros(self) -> int:
        """How many entries it holds."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.starts.nbytes + self.columns.nbytes + self.values.nbytes


class _Product(torch.autograd.Function):
    """rows @ csr.T; torch's own has no gradient that keeps the matrix sparse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, csr: Tensor) -> Tensor:
        ctx.csr = csr
        return torch.mm(csr, rows.T).T.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.csr, None


class HoldsSparse(Layer):
    """A part some of whose matrices are held sparsely; reading one of them makes it dense."""

    sparse: dict[str, SparseMatrix]

    def multiply(self, name: str, x: Tensor, bias: Tensor) -> Tensor:
        """``x`` times a matrix, plus a bias."""
        if name in self.sparse:
            return self.sparse[name].times(x, bias)
        return super().multiply(name, x, bias)

    def __getattr__(self, name: str) -> Any:
        for matrix, held in self.__dict__.get("sparse", {}).items():
            if name in self.held_of(matrix):
                return self.part(name, held.dense())
        return super().__getattr__(name)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Refused: weights that are held sparsely do not change."""
        raise TypeError("weights that are held sparsely cannot be drawn anew; see dense_weights()")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.sparse = {name: held.map(fn) for name, held in self.sparse.items()}
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self.weights().items():
            destination[prefix + name] = weight.contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        errors: list[str] = arguments[-1]
        errors.append(f"{prefix[:-1]} holds its weights sparsely: call dense_weights() first")

    def weights(self) -> dict[str, Tensor]:
        """The weights that are held sparsely by name, made dense."""
        found: dict[str, Tensor] = {}
        for matrix, held in self.sparse.items():
            dense = held.dense()
            found |= {name: self.part(name, dense) for name in self.held_of(matrix)}
        return found

    def held_of(self, matrix: str) -> list[str]:
        """The weights that a matrix is made of, those of positions only where there are any."""
        return [n for n in self.MATRICES[matrix] if self.config.d_pos or not n.endswith("_pos")]


class SparseAttention(HoldsSparse, Attention):
    """:class:`Attention` with sparse matrices."""


class SparseMLP(HoldsSparse, MLP):
    """:class:`MLP` with sparse matrices."""


class SparseUnembed(HoldsSparse, Unembed):
    """:class:`Unembed` with a sparse matrix."""


KINDS: dict[type[Layer], type[HoldsSparse]] = {
    Attention: SparseAttention, MLP: SparseMLP, Unembed: SparseUnembed,
}  # fmt: skip


@torch.no_grad()
def hold_sparse(model: nn.Module, max_density: float = 0.1) -> None:
    """Hold every matrix of which at most so large a share is not zero as its nonzeros alone."""
    if not 0 <= max_density <= 1:
        raise ValueError(f"max_density={max_density} must be from 0 to 1")
    for module in list(model.modules()):
        kind = KINDS.get(type(module))  # type: ignore[arg-type]
        if kind is None or not isinstance(module, Layer):
            continue
        held = {}
        for name, parameters in module.MATRICES.items():
            if parameters[0] not in module._parameters:
                continue  # a tied unembedding has no matrix of its own
            matrix = module.matrix(name)
            if int(torch.count_nonzero(matrix)) <= max_density * matrix.numel():
                held[name] = SparseMatrix.of(matrix)
            del matrix
            for parameter in parameters if name in held else ():
                module._parameters.pop(parameter, None)
        if held:
            module.__class__ = kind
            vars(module)["sparse"] = held
    return_freed_memory()


def return_freed_memory() -> None:
    """Hand memory that was freed back to the system: glibc keeps pieces of less than 32 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


@torch.no_grad()
def hold_dense(model: nn.Module) -> None:
    """Hold every matrix with its zeros again: the inverse of :func:`hold_sparse`."""
    back: dict[type, Any] = {sparse: dense for dense, sparse in KINDS.items()}
    for module in parts_of(model):
        found = module.weights()
        del module.__dict__["sparse"]
        module.__class__ = back[type(module)]
        for name, weight in found.items():
            copy = weight.clone(memory_format=torch.contiguous_format)
            module.register_parameter(name, nn.Parameter(copy))


def parts_of(model: nn.Module) -> list[HoldsSparse]:
    """The parts of a model that hold matrices sparsely."""
    return [module for module in model.modules() if isinstance(module, HoldsSparse)]


def held_sparsely(model: nn.Module) -> dict[str, SparseMatrix]:
    """The matrices of a model that are held sparsely, by the part's name and the matrix'."""
    return {
        f"{name}.{matrix}": held
        for name, module in model.named_modules()
        if isinstance(module, HoldsSparse)
        for matrix, held in module.sparse.items()
    }
