"""The parts around the blocks, and how every part of the model starts: norms, (un)embeddings.

Each part that owns parameters is a :class:`Layer`, which can draw them anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.compat import HookPoint, hooked
from tl_sparse.config import Activation, SparseTransformerConfig
from tl_sparse.model.abstopk import AbsTopK

Resid = Float[Tensor, "batch pos d_model"]
Logits = Float[Tensor, "batch pos d_vocab"]


class Layer(nn.Module):
    """A part of the model with parameters of its own."""

    MATRICES: ClassVar[dict[str, tuple[str, ...]]] = {}
    """The matrices that the forward pass multiplies by → the parameters that each is made of."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__()
        self.config = config

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw this part's own parameters anew, in place (A.1).

        Weights are N(0, initializer_range), those that write to the residual stream / sqrt(2
        n_layers); norm weights are one; biases, sinks and a learned bigram table zero. Without a
        generator the numbers come from torch's global one.
        """
        std = self.config.initializer_range
        shrunk = std / (2 * self.config.n_layers) ** 0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("W_") and name != "W_B":
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * (shrunk if name in ("W_O", "W_out") else std))
                else:
                    parameter.fill_(1.0 if name == "w" else 0.0)

    def multiply(
        self, name: str, x: Float[Tensor, "... d_in"], bias: Float[Tensor, " d_out"]
    ) -> Float[Tensor, "... d_out"]:
        """``x`` times one of the matrices, plus a bias: the one place where this is done."""
        return F.linear(x, self.matrix(name).T, bias)

    def matrix(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """One of the matrices, as it is multiplied by."""
        raise NotImplementedError(f"{type(self).__name__} has no matrix {name!r}")

    def part(self, name: str, matrix: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "..."]:
        """The values of a parameter out of the matrix that it is a part of."""
        raise NotImplementedError(f"{type(self).__name__} has no weight {name!r}")

    def add_bias(self, name: str, *shape: int) -> None:
        """A zero bias: a parameter, or a constant that TransformerLens' tools can still read."""
        if self.config.use_bias:
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        else:
            self.register_buffer(name, torch.zeros(shape), persistent=False)

    def topk_at(self, site: str) -> AbsTopK:
        """The AbsTopK of one of the config's activation sites."""
        return AbsTopK(getattr(self.config.activation_density, site), self.config.site_width(site))


class Embed(Layer):
    """Token embedding."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        self.W_E = nn.Parameter(torch.empty(config.d_vocab, config.d_model))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Resid:
        """Each token's row."""
        return F.embedding(tokens, self.W_E)


class PosEmbed(Layer):
    """Absolute positions: added to the residual stream, or read beside it (concatenated)."""

    W_pos: Tensor

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        width = config.d_pos if config.concat_positions else config.d_model
        if config.positional_embedding_type == "sinusoidal_concat":
            without_data = torch.empty(0).is_meta
            table = torch.empty if without_data else sinusoids
            self.register_buffer("W_pos", table(config.n_ctx, width))
        else:
            self.W_pos = nn.Parameter(torch.empty(config.n_ctx, width))

    def forward(
        self, positions: Int[Tensor, "batch_or_1 pos"], batch: int
    ) -> Float[Tensor, "batch pos width"]:
        """Each position's row, for every sequence of the batch."""
        # repeated, not expanded: a hook may edit one row of the batch in place
        return F.embedding(positions, self.W_pos).repeat(batch // positions.shape[0], 1, 1)


def sinusoids(n_ctx: int, width: int) -> Float[Tensor, "n_ctx width"]:
    """Sines and cosines with log-spaced periods from 4 to n_ctx tokens (released code's option)."""
    periods = torch.logspace(2, torch.log2(torch.tensor(float(max(n_ctx, 4)))), width // 2, base=2)
    angles = 2 * torch.pi * torch.arange(n_ctx)[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def make_norm(config: SparseTransformerConfig, width: int) -> nn.Module:
    """The config's norm over ``width`` channels."""
    return NoNorm() if config.normalization_type == "none" else Norm(config, width)


class NoNorm(nn.Module):
    """What stands in a norm's place where there is none."""

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """``x``, copied: a hook that edits what is read must not edit the residual stream."""
        return x.clone()


class Norm(Layer):
    """RMSNorm or LayerNorm, with TransformerLens' two hook points before the weight is applied."""

    b: Tensor | None

    def __init__(self, config: SparseTransformerConfig, width: int) -> None:
        super().__init__(config)
        self.centred = config.normalization_type == "LN"
        self.eps = config.eps
        self.w = nn.Parameter(torch.ones(width))
        if self.centred and config.use_ln_bias:
            self.b = nn.Parameter(torch.zeros(width))
        else:
            self.register_buffer("b", None)
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """``x`` divided by its scale (and centred before, as LayerNorm), times the weight."""
        eps = self.eps or self.config.eps_for(x.dtype)
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow in float16
        scale = (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt().to(x.dtype)
        scale = hooked(self.hook_scale, scale)
        x = self.hook_normalized(x / scale) * self.w
        return x if self.b is None else x + self.b


def tanh_gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """GELU's approximation by tanh, GPT-2's activation function."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class MLP(Layer):
    """Two-layer MLP: reads the normalised residual stream, writes one delta to it."""

    MATRICES: ClassVar = {"in": ("W_in", "W_in_pos"), "out": ("W_out",)}
    b_in: Tensor
    b_out: Tensor

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        self.act = ACTIVATIONS[config.act_fn]
        d_model, d_pos, d_mlp = config.d_model, config.d_pos, config.site_width("mlp_neuron")
        self.W_in = nn.Parameter(torch.empty(d_model, d_mlp))
        self.W_in_pos = nn.Parameter(torch.empty(d_pos, d_mlp)) if d_pos else None
        self.W_out = nn.Parameter(torch.empty(d_mlp, d_model))
        self.add_bias("b_in", d_mlp)
        self.add_bias("b_out", d_model)
        self.topk_in, self.topk_neuron = self.topk_at("mlp_in"), self.topk_at("mlp_neuron")
        self.topk_out = self.topk_at("mlp_out")
        self.hook_act_in, self.hook_pre, self.hook_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_in"]) -> Resid:
        """What the block adds to the residual stream."""
        read = self.hook_act_in(self.topk_in(x))
        pre = self.hook_pre(self.multiply("in", read, self.b_in))
        post = hooked(self.hook_post, self.topk_neuron(self.act(pre)))
        return self.topk_out(self.multiply("out", post, self.b_out))

    def matrix(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """``in`` with the rows that read positions, or ``out``."""
        return self.read_weight() if name == "in" else self.W_out

    def part(self, name: str, matrix: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "..."]:
        """A weight out of its matrix."""
        if name == "W_out":
            return matrix
        d_model = self.config.d_model
        return matrix[:d_model] if name == "W_in" else matrix[d_model:]

    def read_weight(self) -> Float[Tensor, "d_in d_mlp"]:
        """W_in with the rows that read concatenated positions, if there are any."""
        return self.W_in if self.W_in_pos is None else torch.cat([self.W_in, self.W_in_pos])


class Unembed(Layer):
    """Residual stream to logits; tied, it holds no matrix of its own."""

    MATRICES: ClassVar = {"U": ("W_U",)}
    b_U: Tensor

    def __init__(self, config: SparseTransformerConfig, embed: Embed) -> None:
        super().__init__(config)
        # in a tuple, so that the embedding is not registered (and saved) twice
        self.tied_to: tuple[Embed, ...] = (embed,) if config.tie_word_embeddings else ()
        if not self.tied_to:
            self.W_U = nn.Parameter(torch.empty(config.d_model, config.n_logits))
        # The released models' final_logits_bias: present, zero, never trained. A model converted
        # from TransformerLens keeps its own there.
        self.register_buffer("b_U", torch.zeros(config.n_logits))

    def __getattr__(self, name: str) -> Any:
        if name == "W_U" and self.__dict__.get("tied_to"):
            return self.tied_to[0].W_E.T
        return super().__getattr__(name)

    def forward(self, resid: Resid) -> Logits:
        """Logits of the normalised residual stream."""
        return self.multiply("U", resid, self.b_U)

    def matrix(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """W_U."""
        return self.W_U

    def part(self, name: str, matrix: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "..."]:
        """W_U."""
        return matrix


class Bigram(Layer):
    """Dense table whose row of the current token is added to the logits (A.1, Fig. 24)."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        table = torch.zeros(config.d_vocab, config.d_vocab)
        self.W_B = nn.Parameter(table, requires_grad=config.bigram_table == "learned")

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Logits:
        """Each token's row of the table."""
        return F.embedding(tokens, self.W_B)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A learned table starts at zero; a frozen one is the corpus' statistic and stays."""
        if self.config.bigram_table == "learned":
            super().reset_parameters(generator)
