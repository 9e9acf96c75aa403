"""Dictionaries that are known by their functions alone: anything with ``encode`` and ``decode``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.tracing.dictionary import Dictionary, site_name
from tl_sparse.tracing.formats.sae_lens import from_sae_lens
from tl_sparse.views.display import fields_html

_CHUNK = 1024  # features that are decoded at once


@runtime_checkable
class EncodesAndDecodes(Protocol):
    """What another package's dictionary must have to stand in a ``Splice``."""

    hook_in: str
    """Hook that it reads; ``hook_out``, where it has that, is the hook that it explains."""

    def encode(self, x: Tensor) -> Tensor:
        """Activations of all features [..., feature], by differentiable torch code."""

    def decode(self, features: Tensor) -> Tensor:
        """What they write: a sum of directions, and a constant."""


@dataclass(frozen=True, eq=False, repr=False)
class FunctionDictionary:
    """An SAE or transcoder, by its functions.

    Directions are read off the decoder, which must be affine. The encoder may be anything that
    torch differentiates: features that are not 0 are active, and what each is made of is the
    encoder's derivative at the activation; what that leaves of a feature's activation counts as its
    bias. With an encoder that is linear where its features are active (ReLU, JumpReLU, TopK ...) it
    is a :class:`~tl_sparse.tracing.Dictionary` in every trace.
    """

    encoder: Callable[[Tensor], Tensor]
    """[..., d_in] to [..., feature]."""
    decoder: Callable[[Tensor], Tensor]
    """[..., feature] to [..., d_out]."""
    hook_in: str
    """Hook of what it reads."""
    hook_out: str
    """Hook of what it stands for; of an SAE the same."""
    example: Float[Tensor, "token d_in"]
    """Some activations that it reads, from which sizes and types are seen."""
    name: str = ""
    """Name of its site; by default that of ``hook_out``."""
    W_dec: Float[Tensor, "feature d_out"] = field(init=False)
    """The decoder's directions."""
    b_dec: Float[Tensor, " d_out"] = field(init=False)
    """What it writes without a feature."""
    norm: str = field(init=False, default="none")
    """As in ``Dictionary``: what is read and written is in the model's units."""
    W_skip: None = field(init=False, default=None)
    """As in ``Dictionary``: a skip path would be no sum of directions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or site_name(self.hook_out))
        example = self.example.detach()[:8]
        object.__setattr__(self, "example", example)
        with torch.enable_grad():
            x = example.clone().requires_grad_()
            features = self.encode(x)
            back: Any = (None,)
            if features.requires_grad:
                back = torch.autograd.grad(features.sum(), x, allow_unused=True)
        if features.shape[:-1] != example.shape[:-1] or back[0] is None:
            raise ValueError(
                f"dictionary {self.name}: encode must make [..., feature] of [..., d_in], by "
                f"torch code with a gradient; of {tuple(example.shape)} it made "
                f"{tuple(features.shape)}"
            )
        width = features.shape[-1]
        with torch.no_grad():
            none = example.new_zeros(1, width)
            b_dec = self.decoder(none)[0]
            rows = [self.decoder(part) - b_dec
                    for part in torch.eye(width).to(example).split(_CHUNK)]  # fmt: skip
            W_dec = torch.cat(rows)
            draw = torch.Generator().manual_seed(0)
            some = torch.rand(4, width, generator=draw).to(example)
            made, off = some @ W_dec + b_dec, self.decoder(some)
        if not torch.allclose(made, off, rtol=1e-3, atol=1e-3 * float(off.abs().max())):
            raise ValueError(f"dictionary {self.name}: decode is not affine, so that features have "
                             "no directions")  # fmt: skip
        object.__setattr__(self, "W_dec", W_dec)
        object.__setattr__(self, "b_dec", b_dec)

    def __repr__(self) -> str:
        sizes = f"{self.d_in} → {self.d_sae} → {self.W_dec.shape[1]}"
        return f"FunctionDictionary({self.name}: {sizes})"

    def _repr_html_(self) -> str:
        return fields_html(self)

    @property
    def transcoder(self) -> bool:
        """Whether it reads at another hook than it writes at."""
        return self.hook_in != self.hook_out

    @property
    def d_in(self) -> int:
        """Channels that it reads."""
        return self.example.shape[-1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.W_dec)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Tensors that tell it from other dictionaries."""
        return self.encode(self.example).detach(), self.W_dec, self.b_dec

    def factor(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
        """1: it has no norm factor of its own."""
        return torch.ones_like(x[..., :1])

    def centred(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The activation as it is."""
        return x

    def encode(
        self, x_in: Float[Tensor, "... d_in"], x_out: Float[Tensor, "... d_out"] | None = None
    ) -> Float[Tensor, "... feature"]:
        """Activations of all features."""
        return self.encoder(x_in)

    def decode(
        self,
        features: Float[Tensor, "... feature"],
        x_in: Float[Tensor, "... d_in"] | None = None,
        x_out: Float[Tensor, "... d_out"] | None = None,
    ) -> Float[Tensor, "... d_out"]:
        """What stands for the activation at ``hook_out``."""
        return features @ self.W_dec + self.b_dec

    def held(
        self,
        x_in: Float[Tensor, "... d_in"],
        was: Float[Tensor, "... feature"],
        at_in: Float[Tensor, "... d_in"],
        at_out: Float[Tensor, "... d_out"] | None = None,
    ) -> Float[Tensor, "... feature"]:
        """Activations on the encoder's tangent at ``at_in``, where they were ``was``."""
        return was.detach() + self.slope(at_in, x_in - at_in.detach())

    def slope(
        self, at: Float[Tensor, "... d_in"], by: Float[Tensor, "... d_in"]
    ) -> Float[Tensor, "... feature"]:
        """The encoder's derivative at an activation, in a direction; differentiable by that."""
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            features = self.encode(at)
            weights = torch.zeros_like(features, requires_grad=True)
            (back,) = torch.autograd.grad(features, at, weights, create_graph=True)
            (found,) = torch.autograd.grad(back, weights, by, create_graph=True)
        return found if by.requires_grad else found.detach()


AnyDictionary: TypeAlias = Dictionary | FunctionDictionary
"""What stands in a splice."""


def in_model(source: Any, model: nn.Module) -> AnyDictionary:
    """What stands in a splice for what was given: a dictionary as it is, an SAE of SAELens by its
    weights, another object by its functions.

    Raises:
        TypeError: it is none of them.
        ValueError: its functions are not what they must be.
    """
    if isinstance(source, Dictionary | FunctionDictionary):
        return source
    if callable(getattr(getattr(source, "cfg", None), "architecture", None)):
        return from_sae_lens(source)
    if not isinstance(source, EncodesAndDecodes) or not isinstance(source.hook_in, str):
        raise TypeError(
            f"{type(source).__name__} is no dictionary: give a tracing.Dictionary, a "
            "tracing.FunctionDictionary, an SAE of SAELens, or an object with encode(x), "
            "decode(features) and hook_in (and hook_out, if it explains another hook)"
        )
    hook_out = getattr(source, "hook_out", None) or source.hook_in
    example = activations_of(model, source.hook_in)
    return FunctionDictionary(source.encode, source.decode, source.hook_in, hook_out, example)


@torch.no_grad()
def activations_of(model: nn.Module, hook: str) -> Float[Tensor, "token channel"]:
    """What is at a hook on the first few tokens of the vocabulary."""
    run: Any = model
    if hook not in run.hook_dict:
        raise ValueError(f"the model has no hook {hook!r}")
    found: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any = None) -> None:
        found["x"] = x

    device = next(model.parameters()).device
    tokens = torch.arange(min(4, run.cfg.d_vocab), device=device)[None]
    run.run_with_hooks(tokens, fwd_hooks=[(hook, keep)])
    return found["x"].flatten(2).flatten(0, 1)
