"""What does the full model lose without the circuit's weights?"""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.circuits import Circuit
from tl_sparse.circuits.edge_weights import gated_logit_diffs, locate, packed_if_possible
from tl_sparse.circuits.edges import input_major, joined
from tl_sparse.faithfulness.controls import few, nearest_values
from tl_sparse.faithfulness.measure import CheckResult, NotMeasured, measured_mean
from tl_sparse.faithfulness.registry import Check
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.sparsity.matrices import UnsupportedWeights

MOST_WEIGHTS = 2**16  # of a matrix, among which controls are drawn; of more, so many random ones
NULLS = {
    "random": "random nonzero weights of the same matrices",
    "matched": "other weights of the same matrices and about the same size",
}


def edge_ablation(test: CircuitUnderTest) -> CheckResult:
    """The full model without the circuit's weights, and without as many others.

    ``edge_ablated_loss``: L of the full model with the weights of the circuit's edges zero, on all
    test pairs. Variants name the null: ``random`` nonzero weights of the same matrices, as many of
    each; ``matched``, ones outside the circuit whose sizes |w| are close. Nulls are measured on the
    first ``few_pairs`` pairs.
    """
    circuit, model, config = test.circuit, test.model, test.config
    if not joined(circuit.index):
        raise NotMeasured("edges are defined between nodes, not between these components")
    if not circuit.n_edges:
        raise NotMeasured("the circuit has no edges")
    generator = torch.Generator().manual_seed(config.seed)
    table, sets = edge_sets(model, circuit, config.controls, generator)
    weights = locate(model, test.index, table, torch.zeros(test.index.n_nodes))
    with eval_mode(model), torch.no_grad():
        gates = (~sets).float()
        logit_diffs = gated_logit_diffs(
            model, packed_if_possible(model, test.batch), (), weights, gates[0]
        )
        prompts = packed_if_possible(model, few(test).batch)
        random = torch.stack(
            [gated_logit_diffs(model, prompts, (), weights, row).cpu() for row in gates[1:]]
        )
    nulls = F.softplus(-random.double()).mean(1).view(2, -1)
    loss = F.softplus(-logit_diffs.cpu())
    measures = [
        measured_mean(
            config, "edge_ablated_loss", variant, [loss], prompts=test.batch.prompts, null=null,
            null_name=name,
        )
        for (variant, name), null in zip(NULLS.items(), nulls, strict=True)
    ]  # fmt: skip
    return CheckResult(tuple(measures))


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


# no criterion: circuits are cut by node, and nobody says what their weights alone should do
CHECK = Check(
    edge_ablation,
    "what does the model lose without the circuit's weights?",
    order=61,
    errors=(NotMeasured, UnsupportedWeights),
)
