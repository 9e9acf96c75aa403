"""``Dictionary``: one sparse dictionary of a model's activations, an SAE or a transcoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.views.display import fields_html

Activation = Literal["relu", "jumprelu", "topk", "batchtopk"]
Norm = Literal["none", "token", "layer_norm"]
_SHORT = {"hook_attn_out": "attn", "hook_mlp_out": "mlp", "hook_embed": "embed",
          "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid",
          "hook_resid_post": "resid_post"}  # fmt: skip


def site_name(hook: str) -> str:
    """Short name of the site that a dictionary writes at: ``embed``, ``0.attn``, ``3.mlp``; the
    hook's own name where it has none."""
    inside = re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook)
    short = _SHORT.get(inside[2] if inside else hook)
    if short is None:
        return hook
    return f"{inside[1]}.{short}" if inside else short


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """An SAE (``hook_in`` is ``hook_out``) or a transcoder, at inference.

    With c_in and c_out the norm factors (1 without ``norm``), the activation of feature i is
    ``act(c_in x_in · W_enc[:, i] + b_enc[i]) / c_out``, and what is written in the place of the
    activation at ``hook_out`` is ``activations @ W_dec + (b_dec + c_in x_in @ W_skip) / c_out``:
    activations are in the units of the model, whatever the dictionary was trained in. A bias that
    is taken off the input (``x - b_dec``) is part of ``b_enc`` here.

    Source: Ge et al. 2024 (arXiv 2405.13868), §2; JumpReLU: Rajamanoharan et al. 2024; TopK: Gao et
    al. 2024; BatchTopK: Bussmann et al. 2024; skip: Paulo et al. 2025.
    """

    hook_in: str
    """Hook of what it reads."""
    hook_out: str
    """Hook of what it stands for; of an SAE the same."""
    W_enc: Float[Tensor, "d_in feature"]
    """Encoder."""
    b_enc: Float[Tensor, " feature"]
    """Encoder's bias."""
    W_dec: Float[Tensor, "feature d_out"]
    """Decoder: a feature's direction is a row."""
    b_dec: Float[Tensor, " d_out"]
    """Decoder's bias."""
    activation: Activation = "relu"
    """``relu``; ``jumprelu``: a value above ``threshold`` passes, others become 0; ``topk``: the
    ``k`` largest of a token, if positive; ``batchtopk``: the ``k`` times number of tokens largest
    of a batch, or like ``jumprelu`` where there is a ``threshold``, as at inference."""
    threshold: Float[Tensor, " feature"] | None = None
    """Of ``jumprelu`` (and ``batchtopk``)."""
    k: int | None = None
    """Of ``topk`` and ``batchtopk``."""
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    """A linear path past the features."""
    norm: Norm = "none"
    """``token``: c is √d / ‖x‖ at each token; ``layer_norm``: c is 1 / standard deviation over the
    channels, and their mean is taken off the input and added to the output."""
    name: str = ""
    """Name of its site in nodes' ids; by default from ``hook_out``: ``embed``, ``0.attn``,
    ``3.mlp``."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: plain values, stored with it."""

    def __post_init__(self) -> None:
        """Name the site, and refuse sizes and options that do not go together."""
        if not self.name:
            object.__setattr__(self, "name", site_name(self.hook_out))
        if not (self.W_enc.requires_grad or self.W_dec.requires_grad):
            # each feature's vectors lie in one piece, so that a few of them are read fast
            object.__setattr__(self, "W_enc", self.W_enc.T.contiguous().T)
            object.__setattr__(self, "W_dec", self.W_dec.contiguous())
        d_in, width = self.W_enc.shape
        d_out = self.W_dec.shape[1]
        sizes = {
            "b_enc": (self.b_enc, (width,)), "W_dec": (self.W_dec, (width, d_out)),
            "b_dec": (self.b_dec, (d_out,)), "threshold": (self.threshold, (width,)),
            "W_skip": (self.W_skip, (d_in, d_out)),
        }  # fmt: skip
        for what, (tensor, size) in sizes.items():
            if tensor is not None and tuple(tensor.shape) != size:
                raise ValueError(
                    f"dictionary {self.name}: {what} is {tuple(tensor.shape)}, not {size}"
                )
        for what, value, known in (
            ("activation", self.activation, get_args(Activation)),
            ("norm", self.norm, get_args(Norm)),
        ):
            if value not in known:
                raise ValueError(
                    f"dictionary {self.name}: unknown {what} {value!r}; choose from "
                    f"{', '.join(known)}"
                )
        if self.activation == "jumprelu" and self.threshold is None:
            raise ValueError(f"dictionary {self.name}: jumprelu needs a threshold")
        ranks = self.activation in ("topk", "batchtopk") and not self.jumps
        if ranks and (self.k is None or not 0 < self.k <= width):
            raise ValueError(
                f"dictionary {self.name}: {self.activation} needs k from 1 to {width}, not {self.k}"
            )
        if not self.transcoder and d_in != d_out:
            raise ValueError(f"dictionary {self.name}: an SAE reads {d_in} and writes {d_out}")

    @property
    def transcoder(self) -> bool:
        """Whether it reads at another hook than it writes at."""
        return self.hook_in != self.hook_out

    @property
    def jumps(self) -> bool:
        """Whether thresholds say what is active."""
        return self.threshold is not None and self.activation in ("jumprelu", "batchtopk")

    @property
    def d_in(self) -> int:
        """Channels that it reads."""
        return self.W_enc.shape[0]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Tensors that tell it from other dictionaries."""
        return self.W_enc, self.b_enc, self.W_dec, self.b_dec

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def __repr__(self) -> str:
        kind = "transcoder" if self.transcoder else "SAE"
        sizes = f"{self.W_enc.shape[0]} → {self.d_sae} → {self.W_dec.shape[1]}"
        return f"Dictionary({self.name}: {kind}, {sizes}, {self.activation})"

    def _repr_html_(self) -> str:
        return fields_html(self)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Dictionary:
        """The same on a device and in a floating point type."""
        tensors: dict[str, Any] = {
            f.name: value.to(device=device, dtype=dtype)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)

    def factor(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
        """The norm factor c of an activation."""
        if self.norm == "token":
            return x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        if self.norm == "layer_norm":
            return 1 / (x.std(-1, keepdim=True) + 1e-5)
        return torch.ones_like(x[..., :1])

    def centred(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The activation as it is multiplied by its factor."""
        return x - x.mean(-1, keepdim=True) if self.norm == "layer_norm" else x

    def is_active(self, pre: Float[Tensor, "... feature"]) -> Tensor:
        """Where pre-activations let a feature be active: bool, of the same shape."""
        if self.jumps:
            assert self.threshold is not None
            return pre > self.threshold
        positive = pre > 0
        if self.activation == "relu":
            return positive
        assert self.k is not None
        if self.activation == "topk":
            chosen = torch.zeros_like(positive)
            return chosen.scatter_(-1, pre.topk(self.k, -1).indices, True) & positive
        flat = pre.flatten()
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[flat.topk(self.k * (len(flat) // self.d_sae)).indices] = True
        return chosen.view_as(pre) & positive

    def encode(
        self, x_in: Float[Tensor, "... d_in"], x_out: Float[Tensor, "... d_out"] | None = None
    ) -> Float[Tensor, "... feature"]:
        """Activations of all features.

        ``x_out``, what is at ``hook_out``, is needed by a transcoder with a norm alone.
        """
        pre = self.centred(x_in) * self.factor(x_in) @ self.W_enc + self.b_enc
        return torch.where(self.is_active(pre), pre, 0) / self._out_factor(x_in, x_out)

    def held(
        self,
        x_in: Float[Tensor, "... d_in"],
        was: Float[Tensor, "... feature"],
        at_in: Float[Tensor, "... d_in"],
        at_out: Float[Tensor, "... d_out"] | None = None,
    ) -> Float[Tensor, "... feature"]:
        """Activations with the active set and norm factors of a run in which they were ``was``, at
        ``at_in`` (and ``at_out`` at ``hook_out``): linear."""
        pre = self.centred(x_in) * self.factor(at_in) @ self.W_enc + self.b_enc
        return torch.where(was != 0, pre, 0) / self._out_factor(at_in, at_out)

    def decode(
        self,
        features: Float[Tensor, "... feature"],
        x_in: Float[Tensor, "... d_in"] | None = None,
        x_out: Float[Tensor, "... d_out"] | None = None,
    ) -> Float[Tensor, "... d_out"]:
        """What stands for the activation at ``hook_out``.

        ``x_in`` is needed with ``W_skip`` and with a norm, ``x_out`` by a transcoder with a norm.
        """
        if self.norm == "none" and self.W_skip is None:
            return features @ self.W_dec + self.b_dec
        if x_in is None:
            raise ValueError(f"dictionary {self.name}: decode needs x_in, as it has a norm or skip")
        constant = self.b_dec.expand(*features.shape[:-1], -1)
        if self.W_skip is not None:
            constant = constant + self.centred(x_in) * self.factor(x_in) @ self.W_skip
        written = features @ self.W_dec + constant / self._out_factor(x_in, x_out)
        if self.norm == "layer_norm":
            of = x_out if self.transcoder and x_out is not None else x_in
            written = written + of.mean(-1, keepdim=True)
        return written

    def _out_factor(self, x_in: Tensor, x_out: Tensor | None) -> Tensor:
        if not self.transcoder or self.norm == "none":
            return self.factor(x_in)
        if x_out is None:
            raise ValueError(
                f"dictionary {self.name}: a transcoder with a norm needs x_out, what is at "
                f"{self.hook_out}"
            )
        return self.factor(x_out)
