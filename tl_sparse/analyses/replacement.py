"""Is a node no more than a constant, or a linear function of others? (Gao et al. 2025, F.1, F.2.)

Both checks replace nodes in the full model, on ordinary text, and give the loss increase in nats
per token beside that of setting the same nodes to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import ActivationMeans, FwdHook, ablation_hooks
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.analyses.runs import (
    Recorder,
    by_sequence,
    channels,
    device_of,
    places,
    token_losses,
)
from tl_sparse.node import Node, Nodes, resolve
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.finite import check_weights
from tl_sparse.views.brief import brief
from tl_sparse.views.display import frame_html


@dataclass(frozen=True, eq=False)
class ConstantNodes:
    """Per-token losses with single nodes fixed at their means, and at zero."""

    nodes: pd.DataFrame
    """A row per node: layer, site, channel, head, head_channel, hook, mean."""
    losses: Float[Tensor, "sequence next"]
    """The full model's loss (nats) on every token but the first of each sequence."""
    losses_at_mean: Float[Tensor, "node sequence next"]
    """The same with each node alone fixed at its mean."""
    losses_at_zero: Float[Tensor, "node sequence next"]
    """The same with each node alone fixed at zero."""

    def __repr__(self) -> str:
        return brief(self)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per node: layer, site, channel, mean, and the increase of the loss in nats per
        token at_mean and at_zero, each with its standard error (from the spread between sequences).
        """
        frame = self.nodes[["layer", "site", "channel", "mean"]].reset_index(drop=True)
        for name, losses in (("at_mean", self.losses_at_mean), ("at_zero", self.losses_at_zero)):
            found = [by_sequence(row.double() - self.losses.double()) for row in losses]
            frame[name] = [increase for increase, _ in found]
            frame[f"{name}_error"] = [error for _, error in found]
        return frame

    def _repr_html_(self) -> str:
        line = f"full model {float(self.losses.mean()):.4f} nats/token"
        return frame_html("Nodes fixed at a constant", line, self.to_dataframe())


def constant_node_check(
    model: nn.Module,
    nodes: Nodes,
    tokens: Int[Tensor, "sequence pos"],
    *,
    means: ActivationMeans,
    batch_size: int = 64,
) -> ConstantNodes:
    """Loss per token with each node, alone, fixed at its mean, and at zero.

    A node whose mean does as well as its activations carries a constant. Source: Gao et al. 2025,
    F.1 (a query channel: 2.6e-5 nats per token at its mean, 1.47e-4 at zero).

    Raises:
        ValueError: no or unknown nodes, or means of another model.
    """
    means.check_model(model)
    index, where = means.index, places(means.index, nodes)
    zeros = torch.zeros_like(means.values)
    at_mean: list[Tensor] = []
    at_zero: list[Tensor] = []
    with eval_mode(model):
        losses = token_losses(model, tokens, batch_size=batch_size)
        for place in where:
            keep = torch.ones(index.n_nodes, dtype=torch.bool)
            keep[place] = False
            for values, into in ((means.values, at_mean), (zeros, at_zero)):
                hooks = ablation_hooks(index, keep, values)
                into.append(token_losses(model, tokens, hooks, batch_size))
    return ConstantNodes(
        nodes=_rows(index, where).assign(mean=means.values.cpu()[where].numpy()),
        losses=losses,
        losses_at_mean=torch.stack(at_mean),
        losses_at_zero=torch.stack(at_zero),
    )


@dataclass(frozen=True, eq=False)
class LinearReplacement:
    """Nodes replaced by a linear function of others, and what that costs."""

    targets: pd.DataFrame
    """A row per replaced node: layer, site, channel, head, head_channel, hook, bias, r2."""
    sources: pd.DataFrame
    """A row per node that the function reads: layer, site, channel, head, head_channel, hook."""
    weights: Float[Tensor, "source target"]
    """The function: target = sources @ weights + bias."""
    losses: Float[Tensor, "sequence next"]
    """The full model's loss (nats) on every token but the first of each sequence."""
    losses_linear: Float[Tensor, "sequence next"]
    """The same with all targets replaced by the function."""
    losses_at_mean: Float[Tensor, "sequence next"]
    """The same with all targets at their means over the fitted tokens."""
    losses_at_zero: Float[Tensor, "sequence next"]
    """The same with all targets at zero."""

    def __repr__(self) -> str:
        return brief(self)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per replacement (linear, mean, zero): the loss in nats per token, its increase over
        the full model's and the increase's standard error (from the spread between sequences)."""
        rows = []
        for name, losses in (
            ("linear", self.losses_linear),
            ("mean", self.losses_at_mean),
            ("zero", self.losses_at_zero),
        ):
            increase, error = by_sequence(losses.double() - self.losses.double())
            rows.append((name, float(losses.double().mean()), increase, error))
        return pd.DataFrame(rows, columns=["replacement", "loss", "increase", "error"])

    def _repr_html_(self) -> str:
        line = (
            f"{len(self.targets)} node(s) as a linear function of {len(self.sources)}, "
            f"R² {self.targets['r2'].min():.3f} or more; full model "
            f"{float(self.losses.mean()):.4f} nats/token"
        )
        return frame_html("Linear replacement", line, self.to_dataframe())


def linear_replacement(
    model: nn.Module,
    targets: Nodes,
    sources: Nodes,
    tokens: Int[Tensor, "sequence pos"],
    *,
    fit_tokens: Int[Tensor, "sequence_fit pos_fit"],
    batch_size: int = 64,
) -> LinearReplacement:
    """Replace nodes by the least-squares linear function of other nodes at the same position.

    The function (with a constant) is fitted on ``fit_tokens`` and put in the targets' place on
    ``tokens``; ``r2`` is its share of a target's variance there (after the replacements before it).
    Sources must be computed before the targets, or with them at the same site. Source: Gao et al.
    2025, F.2 (the last MLP's writes: 5.8e-5 nats per token, at zero 2.69e-4; one write by another:
    7e-4, at zero 4e-3).

    Raises:
        ValueError: no or unknown nodes, or a source that comes after a target or is one.
    """
    check_weights(model)
    index = NodeIndex.of(model, _sites(model, [*resolve(model, targets), *resolve(model, sources)]))
    to, of = places(index, targets), places(index, sources)
    _check_order(index, to, of)
    device = device_of(model)
    with eval_mode(model):
        fitted = fit(Recorder(index, torch.cat([of, to]), device), model, fit_tokens, len(of),
                     batch_size)  # fmt: skip
        weights, bias, mean = (x.float() for x in fitted)
        recorder = Recorder(index, of, device)
        swap = Swap(recorder, index, to, weights, bias)
        losses = token_losses(model, tokens, batch_size=batch_size)
        linear = token_losses(model, tokens, swap.hooks(), batch_size)
        keep = torch.ones(index.n_nodes, dtype=torch.bool)
        keep[to] = False
        constant = torch.zeros(index.n_nodes)
        at_zero = token_losses(model, tokens, ablation_hooks(index, keep, constant), batch_size)
        constant[to] = mean.cpu()
        at_mean = token_losses(model, tokens, ablation_hooks(index, keep, constant), batch_size)
    return LinearReplacement(
        targets=_rows(index, to).assign(bias=bias.cpu().numpy(), r2=swap.r2()),
        sources=_rows(index, of),
        weights=weights.cpu(),
        losses=losses,
        losses_linear=linear,
        losses_at_mean=at_mean,
        losses_at_zero=at_zero,
    )


class Swap:
    """Puts a linear function of recorded nodes in the place of others, and sums its errors."""

    def __init__(
        self,
        recorder: Recorder,
        index: NodeIndex,
        targets: Int[Tensor, " target"],
        weights: Float[Tensor, "source target"],
        bias: Float[Tensor, " target"],
    ) -> None:
        self.recorder, self.weights, self.bias = recorder, weights, bias
        self.where = Recorder(index, targets, recorder.device).where
        # of every target: count, sum and sum of squares (from its bias), sum of squared errors
        self.sums = torch.zeros(4, len(targets), dtype=torch.float64, device=recorder.device)

    def hooks(self) -> list[FwdHook]:
        """The readers, and in each target's place the function's value."""
        # the readers first: sources at a target's own site are read as the model computed them
        return [*self.recorder.hooks(), *((name, partial(self.put, name)) for name in self.where)]

    def put(self, name: str, x: Tensor, hook: Any = None) -> Tensor:
        """The site's activation with its targets replaced."""
        channel, here = self.where[name]
        value = self.recorder.taken().to(x.dtype) @ self.weights[:, here].to(x.dtype)
        value = value + self.bias[here].to(x.dtype)
        flat = channels(self.recorder.index.read(name, x))
        true = flat[..., channel].double().flatten(0, 1) - self.bias[here].double()
        error = (flat[..., channel] - value).double().flatten(0, 1)
        stats = (torch.ones_like(true), true, true.square(), error.square())
        self.sums[:, here] += torch.stack([part.sum(0) for part in stats])
        if name in self.recorder.index.norms:
            value = self.recorder.index.norms[name].at(channel).before(value)
        return channels(x).index_copy(2, channel, value.to(x.dtype)).view(x.shape)

    def r2(self) -> Float[np.ndarray, " target"]:
        """1 - squared error / variance of every target, over what ran; NaN for a constant one."""
        count, total, squares, errors = self.sums.cpu()
        variance = squares - total**2 / count
        known = variance > 1e-12 * count
        return torch.where(known, 1 - errors / variance, torch.nan).numpy()


@torch.no_grad()
def fit(
    recorder: Recorder,
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    n_sources: int,
    batch_size: int,
) -> tuple[
    Float[Tensor, "source target"], Float[Tensor, " target"], Float[Tensor, " target"]
]:  # fmt: skip
    """Least squares of the recorder's later nodes on its first ``n_sources``: weights, bias, and
    the targets' means, in float64.

    Sources that are copies of each other share the weight (the solution of least norm).
    """
    run: Any = model
    count, shift = 0, None
    first = second = torch.zeros(())
    for part in tokens.to(device_of(model)).split(batch_size):
        run.run_with_hooks(part, return_type=None, fwd_hooks=recorder.hooks())
        x = recorder.taken().flatten(0, 1).double()
        shift = x.mean(0) if shift is None else shift  # sums about a mean keep their digits
        x = x - shift
        count += len(x)
        first, second = first + x.sum(0), second + x.T @ x
    if shift is None:
        raise ValueError("no tokens to fit on")
    centre = first / count
    moments = second / count - torch.outer(centre, centre)
    mean = centre + shift
    inverse = torch.linalg.pinv(moments[:n_sources, :n_sources], rtol=1e-10, hermitian=True)
    weights = inverse @ moments[:n_sources, n_sources:]
    return weights, mean[n_sources:] - mean[:n_sources] @ weights, mean[n_sources:]


def _sites(model: nn.Module, nodes: Sequence[Node]) -> tuple[str, ...]:
    """The eight usual sites of the model, and further ones that the nodes name."""
    usual = NodeIndex.of(model).sites
    return (*usual, *sorted({node.site for node in nodes} - set(usual)))


def _check_order(index: NodeIndex, targets: Tensor, sources: Tensor) -> None:
    if both := set(targets.tolist()) & set(sources.tolist()):
        raise ValueError(f"{_names(index, torch.tensor(sorted(both)))}: a target and a source")
    starts = torch.tensor([piece.start for piece in index.slices.values()])
    place = torch.searchsorted(starts, sources, right=True)
    first = int(torch.searchsorted(starts, targets.min(), right=True))
    if bool((place > first).any()):
        raise ValueError(
            f"{_names(index, sources[place > first])}: computed after "
            f"{_names(index, targets.min()[None])}, which it should stand for"
        )


def _names(index: NodeIndex, nodes: Tensor) -> str:
    mask = torch.zeros(index.n_nodes, dtype=torch.bool)
    mask[nodes] = True
    return ", ".join(f"{row.hook}[{row.channel}]" for row in index.nodes(mask).itertuples())


def _rows(index: NodeIndex, where: Int[Tensor, " node"]) -> pd.DataFrame:
    """The index's columns for some nodes, in their order."""
    mask = torch.zeros(index.n_nodes, dtype=torch.bool)
    mask[where] = True
    return index.nodes(mask).loc[where.tolist()].reset_index(drop=True)
