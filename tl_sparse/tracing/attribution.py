"""One backward pass from the roots of a batch: what every node and leaf contributes.

Source: Ge et al. 2024 (arXiv 2405.13868), §3; with the gate open it is gradient times activation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.tracing.gate import thresholds
from tl_sparse.tracing.roots import Root
from tl_sparse.tracing.splice import NotLinear
from tl_sparse.tracing.spliced_run import Leaf, SplicedRun

_STEPS = 24  # of the search for a threshold that keeps a number of features
LeafName = tuple[str, str]


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """What arrives at every node when the gradients of the roots flow back through the gate."""

    values: Float[Tensor, " prompt"]
    """The roots' values; differentiable."""
    gradient: dict[str, Tensor]
    """Site → gradient that arrives at each of its nodes (flat)."""
    score: dict[str, Tensor]
    """Site → activation times gradient."""
    kept: dict[str, Tensor]
    """Site → which passed it on."""
    leaves: dict[LeafName, Tensor]
    """(kind, name) → contribution at each token [prompt, pos]."""
    mass: dict[str, Tensor]
    """Kind → sum of the contributions of each prompt; ``cut``: of the features at which the
    gradient was stopped; ``feature``: of those that nothing is before."""

    @property
    def total(self) -> Float[Tensor, " prompt"]:
        """The sum of all parts; in a strict splice the roots' values."""
        return torch.stack(list(self.mass.values())).sum(0)


def gradients(
    run: SplicedRun, values: Float[Tensor, " prompt"]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the sum of ``values`` by every node (flat) and every leaf."""
    nodes = [behind for behind, _ in run.nodes.values()]
    inputs = [*nodes, *(leaf.at for leaf in run.leaves)]
    ones = torch.ones_like(values)
    found = torch.autograd.grad([values], inputs, [ones], retain_graph=True, allow_unused=True)
    whole = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
    return [g.flatten() for g in whole[: len(nodes)]], whole[len(nodes) :]


def attribute(
    run: SplicedRun, root: Root, values: Float[Tensor, " prompt"] | None = None
) -> Attribution:
    """Contributions to a root under the run's gate.

    Raises:
        NotLinear: the splice is strict, and the parts do not sum to the root's value.
    """
    if values is None:
        with torch.enable_grad():
            values = root.of(run)
    gate = run.state.gate
    run.state.passing = None
    if gate.mode == "budget":
        run.state.tau = budget_thresholds(run, values, int(gate.tau))
    else:
        run.state.tau = thresholds(gate, values)
    found = collect(run, values)
    if run.splice.strict and root.linear:
        check_sum(found)
    return found


def collect(run: SplicedRun, values: Float[Tensor, " prompt"]) -> Attribution:
    """The attribution with the thresholds that the gate has now."""
    at_nodes, at_leaves = gradients(run, values)
    gradient = dict(zip(run.nodes, at_nodes, strict=True))
    score, kept = {}, {}
    sums = {kind: values.new_zeros(len(values)) for kind in ("feature", "cut")}
    for name, (_, nodes) in run.nodes.items():
        score[name] = nodes.activation * gradient[name]
        kept[name] = run.state.select(nodes, score[name])
        if name in run.scores:
            continue
        cut = torch.where(kept[name], 0, score[name])
        sums["cut"] = sums["cut"].index_add(0, nodes.prompt, cut)
        if run.sites[name].first:
            rest = score[name] - cut
            sums["feature"] = sums["feature"].index_add(0, nodes.prompt, rest)
    leaves = leaf_parts(run, run.leaves, at_leaves, rows=False)
    for (kind, _), part in leaves.items():
        sums[kind] = sums.get(kind, 0) + part.sum(-1)
    return Attribution(values, gradient, score, kept, leaves, sums)


def leaf_parts(
    run: SplicedRun, leaves: Sequence[Leaf], found: Sequence[Tensor], rows: bool
) -> dict[LeafName, Float[Tensor, "*row prompt pos"]]:
    """Contributions of every leaf at every token, those of one name summed."""
    parts: dict[LeafName, Tensor] = {}
    shape = tuple(run.tokens.shape)
    for leaf, gradient in zip(leaves, found, strict=True):
        part = leaf.part(gradient, rows, shape)
        name = (leaf.kind, leaf.name)
        parts[name] = parts[name] + part if name in parts else part
    return parts


def check_sum(found: Attribution) -> None:
    """NotLinear if the parts of a strict splice do not sum to the roots' values."""
    values = found.values.detach()
    size = torch.stack([part.abs().sum(-1) for part in found.leaves.values()]).sum(0)
    within = (1e-9 if values.dtype == torch.float64 else 2e-3) * (1 + values.abs() + size)
    off = (found.total - values).abs()
    if bool((off > within).any()) or not bool(off.isfinite().all()):
        worst = int((off / within).nan_to_num(math.inf).argmax())
        raise NotLinear(
            f"prompt {worst}: the parts sum to {float(found.total[worst]):.6g}, and the root is "
            f"{float(values[worst]):.6g}. Something is not held constant: a hook of an attention "
            "pattern or norm has no effect on this model (a TransformerBridge from Hugging Face "
            "needs enable_compatibility_mode()), or it computes beside its hooks. "
            "Freeze.compat() traces first-order estimates without this check"
        )


def counts(run: SplicedRun, kept: dict[str, Tensor]) -> Float[Tensor, " prompt"]:
    """Kept nodes of each prompt."""
    total = torch.zeros(run.n_prompts, device=run.tokens.device)
    for name, (_, nodes) in run.nodes.items():
        total = total.index_add(0, nodes.prompt, kept[name].to(total.dtype))
    return total


def budget_thresholds(
    run: SplicedRun, values: Float[Tensor, " prompt"], n_nodes: int
) -> Float[Tensor, " prompt"]:
    """For each prompt a threshold under which at most ``n_nodes`` nodes pass, and nearly as many.

    Bisection over thresholds. Stopping a gradient can raise other scores, so the number of nodes
    need not fall as the threshold rises: of all thresholds tried the best counts.
    """
    state = run.state
    state.passing, state.tau = None, torch.full_like(values.detach(), -math.inf)
    open_scores = collect(run, values).score
    top = torch.zeros_like(state.tau)
    for name, (_, nodes) in run.nodes.items():
        top = top.scatter_reduce(0, nodes.prompt, open_scores[name].abs(), "amax")
    high = top * 4 + 1e-30
    low = high * 1e-9
    best, most = high.clone(), torch.full_like(top, -1)
    state.tau = torch.zeros_like(top)
    for _ in range(_STEPS):
        found = counts(run, collect(run, values).kept).to(most.dtype)
        better = (found <= n_nodes) & (found > most)
        best, most = torch.where(better, state.tau, best), torch.where(better, found, most)
        low = torch.where(found > n_nodes, torch.maximum(low, state.tau), low)
        high = torch.where(found > n_nodes, high, torch.minimum(high, state.tau.clamp_min(1e-30)))
        high = torch.maximum(high, low)
        state.tau = (low * high).sqrt()
    return best
