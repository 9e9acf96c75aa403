"""``DiscreteSAE``: a sparse autoencoder over heads' outputs, whose most active unit is the code.

Source: O'Neill and Bui 2024, arXiv 2405.12522. Mode ``paper`` is what the paper's own code does,
its quirks included; mode ``corrected`` is the same idea without them:

| | paper | corrected |
|---|---|---|
| rows it is trained on | random prompts, however many of them are positive | as many positive ones as negative ones |
| norm of the decoder is 1 for | every coordinate of the residual stream | every unit |
| code where no unit is active | 0, as if unit 0 were | one of its own |
"""  # noqa: E501

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.heads.codes import Codes, check_kind, coded
from tl_sparse.heads.outputs import HeadOutputs
from tl_sparse.progress import progress_bar
from tl_sparse.storage.finite import check_finite
from tl_sparse.views.display import fields_html

Mode = Literal["paper", "corrected"]


@dataclass(frozen=True, eq=False, repr=False)
class DiscreteSAE:
    """Encoder and decoder; a group has weights of its own: all components, or each one."""

    W_enc: Float[Tensor, "group unit width"]
    """Directions of the units, each of norm 1."""
    b_enc: Float[Tensor, "group unit"]
    """The units' biases."""
    W_dec: Float[Tensor, "group width unit"]
    """What the units write."""
    bias: Float[Tensor, "group width"]
    """Taken from the input and given back to the output."""
    mode: str
    """As published, or corrected."""
    losses: Float[Tensor, " epoch"]
    """Loss of each epoch, summed over groups."""
    rows: Int[Tensor, " trained"]
    """The prompts that it was trained on."""
    seed: int
    """Seed of its start and of ``rows``."""
    seconds: float
    """Seconds that training took."""

    @classmethod
    def fit(
        cls,
        outputs: HeadOutputs,
        mode: str = "corrected",
        *,
        n_codes: int = 200,
        lam: float = 0.02,
        lr: float = 1e-3,
        epochs: int = 500,
        n_train: int = 10,
        seed: int = 0,
        shared: bool = True,
        progress: bool = False,
    ) -> DiscreteSAE:
        """Train one on the outputs of some prompts, with Adam on all rows at once.

        The loss is the mean squared error over all numbers plus ``lam`` times the mean L1 norm of
        the units. ``epochs=0`` leaves the encoder as it starts: random unit directions.

        Args:
            outputs: What the components write.
            mode: As published, or corrected.
            n_codes: Units.
            lam: Weight of the L1 norm; the paper's are 0.02, and 0.05 for docstrings.
            lr: Learning rate.
            epochs: Steps.
            n_train: Prompts that it is trained on.
            seed: Seed of its start and of the choice of prompts.
            shared: Whether all components have one autoencoder, or each its own.
            progress: Whether to show a bar.

        Raises:
            ValueError: a value out of its range, or a training that diverged.
        """
        started = time.perf_counter()
        _check(mode, n_codes, lam, lr, epochs, n_train, len(outputs.factors))
        generator = torch.Generator().manual_seed(seed)
        rows = _drawn(outputs, mode, n_train, generator)
        x = outputs.take(rows).values.transpose(0, 1)
        x = x.reshape(1, -1, outputs.width) if shared else x.contiguous()
        start = (len(x), n_codes, outputs.width)
        W_enc = torch.randn(start, generator=generator).to(x)
        W_dec = torch.randn(start[0], start[2], start[1], generator=generator).to(x)
        bound = 1 / math.sqrt(outputs.width)
        b_enc = ((torch.rand(start[:2], generator=generator) * 2 - 1) * bound).to(x)
        bias = torch.zeros(len(x), outputs.width).to(x)
        weights = [W_enc, W_dec, b_enc, bias]
        with torch.enable_grad():
            losses = _train(x, weights, mode, lam, lr, epochs, progress)
        seconds = time.perf_counter() - started
        return cls(W_enc, b_enc, W_dec, bias, mode, losses, rows, seed, seconds)

    @property
    def n_codes(self) -> int:
        """Units."""
        return self.W_enc.shape[1]

    @torch.no_grad()
    def codes(self, outputs: HeadOutputs, kind: str = "argmax", k: int = 8) -> Codes:
        """The code of every component on every prompt.

        Args:
            outputs: What the components write.
            kind: ``argmax``, the most active unit; ``top``, the set of the k most active ones;
                ``sign``, which of the first k units are active, as one of 2^k numbers.
            k: Units of ``top`` and ``sign``.

        Raises:
            ValueError: an unknown kind, too many units, or outputs of another width or number of
                components.
        """
        groups, n_codes, width = self.W_enc.shape
        check_kind(kind, k, n_codes)
        if width != outputs.width or groups not in (1, len(outputs.components)):
            raise ValueError(
                f"{outputs!r} do not fit an autoencoder of width {width} for "
                f"{'any' if groups == 1 else groups} components"
            )
        started = time.perf_counter()
        units = k if kind == "sign" else n_codes
        W_enc = self.W_enc[:, :units]
        shift = self.b_enc[:, :units] - torch.einsum("guw,gw->gu", W_enc, self.bias)
        inactive = 0 if self.mode == "paper" else n_codes
        found = [
            coded(part + shift.to(part), kind, k, inactive)
            for _, part in outputs.through(W_enc.transpose(1, 2))
        ]
        return Codes(
            torch.cat(found), 2**k if kind == "sign" else n_codes, outputs.components,
            outputs.positive, outputs.name, f"{self.mode} sae, {kind}",
            outputs.seconds + self.seconds + time.perf_counter() - started,
        )  # fmt: skip

    @torch.no_grad()
    def reconstruct(
        self, x: Float[Tensor, "group row width"]
    ) -> tuple[Float[Tensor, "group row width"], Float[Tensor, "group row unit"]]:
        """What the decoder makes of vectors, and their units."""
        return _forward(x, self.W_enc, self.W_dec, self.b_enc, self.bias)

    def __repr__(self) -> str:
        groups = "shared" if len(self.W_enc) == 1 else f"{len(self.W_enc)} components"
        return (
            f"DiscreteSAE({self.mode!r}, {self.n_codes} units of width {self.W_enc.shape[2]}, "
            f"{groups}, {len(self.losses)} epochs on {len(self.rows)} prompts)"
        )

    def _repr_html_(self) -> str:
        return fields_html(self)


def _check(
    mode: str, n_codes: int, lam: float, lr: float, epochs: int, n_train: int, n_prompts: int
) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}: choose from {', '.join(get_args(Mode))}")
    if n_codes < 2:
        raise ValueError(f"n_codes={n_codes} must be at least 2")
    if not (lam >= 0 and lr > 0 and math.isfinite(lam + lr)) or epochs < 0:
        raise ValueError(
            f"lam={lam} and epochs={epochs} must not be negative, lr={lr} positive, all finite"
        )
    if not 1 <= n_train <= n_prompts:
        raise ValueError(f"n_train={n_train}: there are {n_prompts} prompts to train on")


def _drawn(
    outputs: HeadOutputs, mode: str, n_train: int, generator: torch.Generator
) -> Int[Tensor, " trained"]:
    """The prompts to train on, in ascending order."""
    shuffled = torch.randperm(len(outputs.factors), generator=generator)
    if mode == "paper":
        return shuffled[:n_train].sort().values
    positive = outputs.positive[shuffled]
    kinds = [shuffled[positive], shuffled[~positive]]
    half = min(len(kinds[0]), max(n_train - n_train // 2, n_train - len(kinds[1])))
    return torch.cat([kinds[0][:half], kinds[1][: n_train - half]]).sort().values


def _forward(
    x: Float[Tensor, "group row width"],
    W_enc: Float[Tensor, "group unit width"],
    W_dec: Float[Tensor, "group width unit"],
    b_enc: Float[Tensor, "group unit"],
    bias: Float[Tensor, "group width"],
) -> tuple[Float[Tensor, "group row width"], Float[Tensor, "group row unit"]]:
    # the input's bias is taken off after the product: one product less in the backward pass
    shift = b_enc - torch.einsum("guw,gw->gu", W_enc, bias)
    units = F.relu(torch.baddbmm(shift[:, None], x, W_enc.transpose(1, 2)))
    return torch.baddbmm(bias[:, None], units, W_dec.transpose(1, 2)), units


def _train(
    x: Float[Tensor, "group row width"],
    weights: list[Tensor],
    mode: str,
    lam: float,
    lr: float,
    epochs: int,
    progress: bool,
) -> Float[Tensor, " epoch"]:
    """Change the weights (W_enc, W_dec, b_enc, bias) in place; the loss of each epoch.

    Before each step both weights are normalised, and their gradients have no part along them, so
    that Adam does not count on what the next normalisation takes back.
    """
    W_enc, W_dec = weights[:2]
    # the published code normalises both along their last dimension, which of the decoder's is units
    normal = ((W_enc, 2), (W_dec, 2 if mode == "paper" else 1))
    for weight in weights:
        weight.requires_grad_(True)
    adam = torch.optim.Adam(weights, lr=lr)
    losses = torch.zeros(epochs, device=x.device)
    for epoch in progress_bar(range(epochs), desc="autoencoder", disable=not progress, leave=False):
        _normalise(normal)
        made, units = _forward(x, *weights)
        loss = (made - x).square().mean((1, 2)).sum() + lam * units.sum(2).mean(1).sum()
        losses[epoch] = loss.detach()
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight, dim in normal:
                assert weight.grad is not None
                weight.grad -= (weight.grad * weight).sum(dim, keepdim=True) * weight
        adam.step()
    _normalise(normal)
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    check_finite({"loss": losses, "encoder": W_enc}, "training the autoencoder")
    return losses.cpu()


def _normalise(weights: tuple[tuple[Tensor, int], ...]) -> None:
    with torch.no_grad():
        for weight, dim in weights:
            weight /= weight.norm(dim=dim, keepdim=True)
