"""Part I, relaxation: removed units come back; and the circuit's weights go from the full model.

A circuit that works for the model's own reasons is not disturbed by what it was cut out of: on the
way from circuit to model the loss should fall, not rise.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.analyses.necessity import nearest_values
from tl_sparse.circuits import Circuit
from tl_sparse.circuits.edge_weights import gated_logit_diffs, locate, packed_if_possible
from tl_sparse.circuits.edges import input_major, joined
from tl_sparse.faithfulness.controls import few, per_unit_logit_diffs, random_units
from tl_sparse.faithfulness.measure import Measure, PartResult, measured_mean
from tl_sparse.faithfulness.metrics import normalised
from tl_sparse.faithfulness.subject import Subject

MOST_WEIGHTS = 2**16  # of a matrix, among which controls are drawn; of more, so many random ones
STEPS = 10  # steps of the way from the circuit to the model
NULL = "random node sets of the same sizes at every hook"
EDGE_NULLS = {
    "random": "random nonzero weights of the same matrices",
    "matched": "other weights of the same matrices and about the same size",
}


def relaxation(subject: Subject) -> PartResult:
    """What happens to the loss as removed units come back, and as the circuit's weights go.

    A share 0, 0.1 … 1 of the removed units is put back, in ``relaxation_draws`` random orders, on
    the first ``few_pairs`` test pairs. L is the mean two-way loss (nats) over prompts; each number
    is taken of every order, and the mean over orders is reported:

    - ``monotone``: share of the ten steps at which L does not rise by more than the rise's standard
      error over pairs.
    - ``worst_loss``: the largest L on the way.
    - ``bump``: by how much it exceeds L at both ends: ``worst_loss - max(L(C), L(M))``, at least 0.

    Null: the same for ``relaxation_draws`` random sets of as many units at every hook, in one order
    each. Table ``curve``: kind (circuit, random), draw, fraction, n_units, loss, f.

    - ``edge_ablated_loss``: L of the full model with the weights of the circuit's edges zero, on
      all test pairs. Variants name the null: ``random`` nonzero weights of the same matrices, as
      many of each; ``matched``, ones outside the circuit whose sizes |w| are close.
    """
    small, config = few(subject), subject.config
    generator = torch.Generator().manual_seed(config.seed)
    draws = config.relaxation_draws
    circuit = paths(subject.kept_units.expand(draws, -1), generator)
    random = paths(random_units(subject, "anywhere", draws), generator)
    logit_diffs = _path_logit_diffs(small, circuit)
    null_logit_diffs = _path_logit_diffs(small, random)
    losses, null_losses = (F.softplus(-m.double()) for m in (logit_diffs, null_logit_diffs))

    errors, null_errors = (standard_errors(x) for x in (losses, null_losses))

    def measure(name: str, of: Callable[[Tensor, Tensor], Tensor]) -> Measure:
        return measured_mean(
            "I", name, "", list(losses.flatten(0, 1)),
            lambda means: of(means.unflatten(1, (draws, -1)), errors).mean(1),
            draws=config.draws, seed=config.seed, examples=of(losses.mean(2)[None], errors)[0],
            null=of(null_losses.mean(2)[None], null_errors)[0], null_name=NULL,
        )  # fmt: skip

    found = [
        measure("monotone", monotone),
        measure("worst_loss", lambda means, _: means.max(2).values),
        measure("bump", lambda means, _: bump(means)),
    ]
    curve = pd.concat(
        [
            _curve("circuit", subject, small, circuit, logit_diffs),
            _curve("random", subject, small, random, null_logit_diffs),
        ],
        ignore_index=True,
    )
    edges, notes = _edge_ablation(subject, small)
    return PartResult("I", (*found, *edges), {"curve": curve}, notes)


def paths(
    sets: Bool[Tensor, "draw unit"], generator: torch.Generator
) -> Bool[Tensor, "draw fraction unit"]:
    """For each set, masks that grow from it to everything, in a random order."""
    rows = []
    for kept in sets:
        removed = torch.nonzero(~kept).flatten()
        order = removed[torch.randperm(len(removed), generator=generator)]
        masks = kept.repeat(STEPS + 1, 1)
        for step in range(STEPS + 1):
            masks[step, order[: round(step * len(order) / STEPS)]] = True
        rows.append(masks)
    return torch.stack(rows)


def monotone(
    means: Float[Tensor, "draw order fraction"], errors: Float[Tensor, "order step"]
) -> Float[Tensor, "draw order"]:
    """Share of the steps at which the mean loss does not rise by more than its standard error."""
    return (means.diff(dim=2) <= errors).double().mean(2)


def bump(means: Float[Tensor, "draw order fraction"]) -> Float[Tensor, "draw order"]:
    """By how much the largest mean loss exceeds those of both ends."""
    return means.max(2).values - torch.maximum(means[..., 0], means[..., -1])


def standard_errors(losses: Float[Tensor, "order fraction prompt"]) -> Float[Tensor, "order step"]:
    """Standard error, over pairs of prompts, of the mean rise at each step; 0 for a single pair."""
    pairs = losses.diff(dim=1).unflatten(2, (-1, 2)).mean(3)
    return pairs.std(2, correction=min(1, pairs.shape[2] - 1)) / pairs.shape[2] ** 0.5


def _path_logit_diffs(
    small: Subject, masks: Bool[Tensor, "draw fraction unit"]
) -> Float[Tensor, "draw fraction prompt"]:
    """Margins along every path; masks that several paths share run once."""
    distinct, where = masks.flatten(0, 1).unique(dim=0, return_inverse=True)
    return per_unit_logit_diffs(small, distinct)[where].view(*masks.shape[:2], -1)


def _curve(
    kind: str,
    subject: Subject,
    small: Subject,
    masks: Bool[Tensor, "draw fraction unit"],
    logit_diffs: Float[Tensor, "draw fraction prompt"],
) -> pd.DataFrame:
    """A row per order and fraction."""
    draws, steps = masks.shape[:2]
    means = logit_diffs.double().mean(2).flatten()
    empty, model = (x.double().mean().expand_as(means)
                    for x in (small.empty_logit_diffs, small.model_logit_diffs))  # fmt: skip
    return pd.DataFrame(
        {
            "kind": kind,
            "draw": torch.arange(draws).repeat_interleave(steps).tolist(),
            "fraction": [step / STEPS for step in range(steps)] * draws,
            "n_units": masks.sum(2).flatten().tolist(),
            "loss": F.softplus(-logit_diffs.double()).mean(2).flatten().tolist(),
            "f": normalised(means, empty, model).tolist(),
        }
    )


# --------------------------------------------------------------------------------------------------
# edges


def _edge_ablation(subject: Subject, small: Subject) -> tuple[list[Measure], tuple[str, ...]]:
    """The full model without the circuit's weights, and without as many others."""
    circuit, model, config = subject.circuit, subject.model, subject.config
    if not joined(circuit.index):
        return [], ("edge_ablated_loss: edges are defined between nodes, not between these units",)
    if not circuit.n_edges:
        return [], ("edge_ablated_loss: the circuit has no edges",)
    generator = torch.Generator().manual_seed(config.seed)
    table, sets = edge_sets(model, circuit, config.controls, generator)
    try:
        weights = locate(model, subject.index, table, torch.zeros(subject.index.n_nodes))
    except ValueError as error:
        return [], (f"edge_ablated_loss: {error}",)
    with eval_mode(model), torch.no_grad():
        gates = (~sets).float()
        logit_diffs = gated_logit_diffs(
            model, packed_if_possible(model, subject.batch), (), weights, gates[0]
        )
        prompts = packed_if_possible(model, small.batch)
        random = torch.stack(
            [gated_logit_diffs(model, prompts, (), weights, row).cpu() for row in gates[1:]]
        )
    nulls = F.softplus(-random.double()).mean(1).view(2, -1)
    loss = F.softplus(-logit_diffs.cpu())
    found = [
        measured_mean(
            "I", "edge_ablated_loss", variant, [loss], draws=config.draws, seed=config.seed,
            null=null, null_name=name,
        )
        for (variant, name), null in zip(EDGE_NULLS.items(), nulls, strict=True)
    ]  # fmt: skip
    return found, ()


def edge_sets(
    model: nn.Module, circuit: Circuit, draws: int, generator: torch.Generator
) -> tuple[pd.DataFrame, Bool[Tensor, "set edge"]]:
    """A circuit's edges, and as many other weights of each matrix: ``random``, then ``matched``.

    Returns:
        A row per weight that is in any set, as in ``Circuit.edges``; and which are in which: the
        circuit first, then ``draws`` random sets, then ``draws`` matched ones. Where a matrix has
        too few other weights, a matched set has all of them.
    """
    tables, members = [], []
    for (layer, matrix), rows in circuit.edges.groupby(["layer", "matrix"], sort=False):
        weight = input_major(model, layer, matrix).cpu()
        flat, wide = weight.flatten().float().abs(), weight.shape[1]
        own = torch.tensor(rows["source"].to_numpy() * wide + rows["target"].to_numpy())
        every = torch.nonzero(flat).flatten()
        if len(every) > MOST_WEIGHTS:
            every = every[torch.randperm(len(every), generator=generator)[:MOST_WEIGHTS]]
        others = every[~torch.isin(every, own)]
        sets = [own]
        sets += [
            every[torch.randperm(len(every), generator=generator)[: len(own)]] for _ in range(draws)
        ]
        sets += [others[nearest_values(flat[own], flat[others], generator)] for _ in range(draws)]
        used = torch.cat(sets).unique()
        tables.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "source_site": rows["source_site"].iloc[0],
                    "source": (used // wide).numpy(),
                    "target_site": rows["target_site"].iloc[0],
                    "target": (used % wide).numpy(),
                    "matrix": matrix,
                    "weight": weight.flatten()[used].float().numpy(),
                }
            )
        )
        members.append(torch.stack([torch.isin(used, one) for one in sets]))
    return pd.concat(tables, ignore_index=True), torch.cat(members, 1)
