"""Part C, partial ablation: the rest of the model removed in part, at random and by an adversary.

Sources: stochastic and adversarial ablation of the complement as in the comments on Drori 2026; the
attack is projected gradient ascent (Madry et al. 2018) over one continuous mask for all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import frozen_norms_of
from tl_sparse.ablation.masked_forward import gated_logit_diffs
from tl_sparse.faithfulness.checks.schemes import Attack, attack, gates_of, stochastic_schemes
from tl_sparse.faithfulness.controls import random_units
from tl_sparse.faithfulness.measure import Measure, PartResult, Statistic, measured_mean
from tl_sparse.faithfulness.metrics import normalised
from tl_sparse.faithfulness.subject import Subject

NULL = "random sets of units, as many at every hook"
FEW = 4  # schemes that each of the random sets is tried under


def partial(subject: Subject) -> PartResult:
    """Does the circuit still do the task when the rest of the model is ablated only in part?

    A scheme s in [0, 1] says what is left of each removed unit: ``s * x + (1 - s) * value``; kept
    units are left alone. s = 0 is the circuit as it was found, s = 1 the full model. Losses are
    two-way cross-entropy ``softplus(-logit_diff)`` in nats (chance: ln 2), means over test prompts; f
    is ``(m - m(none)) / (m(model) - m(none))`` with m the mean logit_diff, never clamped.

    Measures:
        - ``stochastic_loss``: the mean over ``subsets`` random schemes, each of which leaves every
          removed unit with a probability of its own that is uniform in (0, 1).
        - ``stochastic_worst``: the loss under the worst of these schemes; ``examples`` are the
          schemes' losses.
        - ``adversarial_loss`` and ``adversarial_f``: under the one scheme that
          :func:`~tl_sparse.faithfulness.checks.schemes.attack` found on discovery prompts; variants
          ``continuous`` and ``rounded`` (every unit is left or removed).

    The null of each is the same for random sets of units, as many at every hook (under the first
    four random schemes, or the worst that one ascent finds against each set): what the schemes do
    to a set that explains nothing. Table ``schemes``: a row per scheme with its kind
    (``circuit``, ``model``, ``stochastic``, ``continuous``, ``rounded``), probability ``p`` of
    being left, the share ``left`` of the removed units, logit_diff, loss and f on test prompts, and of
    attacks the loss on the prompts that they were found on.
    """
    config, unit = subject.config, subject.unit
    generator = torch.Generator().manual_seed(config.seed)
    circuit = subject.kept_units[None]
    controls = random_units(subject, "anywhere", config.attacked_controls)
    drawn, shares = stochastic_schemes(subject.n_units, config.subsets, generator)
    few = drawn[: min(FEW, config.subsets)]
    # of one strength for the circuit's own and the random sets' null
    found = attacked(subject, circuit, config.attack_restarts)
    against = attacked(subject, controls, 1)

    ends = torch.stack([torch.zeros(subject.n_units), torch.ones(subject.n_units)])
    schemes = torch.cat([ends, drawn, found.schemes, found.rounded])
    null_schemes = torch.cat([few.repeat(len(controls), 1), against.schemes, against.rounded])
    repeated = controls.repeat_interleave(len(few), 0)
    sets = torch.cat([circuit.repeat(len(schemes), 1), repeated, controls, controls])
    gates = gates_of(sets, torch.cat([schemes, null_schemes]), unit)
    logit_diffs, null_logit_diffs = gated(subject, gates).split([len(schemes), len(null_schemes)])
    losses = F.softplus(-logit_diffs)
    null_losses = F.softplus(-null_logit_diffs).mean(1)
    null_drawn = null_losses[: few.shape[0] * len(controls)].view(len(controls), -1)
    null_attacked = null_losses[null_drawn.numel() :].view(2, -1)

    removed = ~subject.kept_units
    ends_of_f = (subject.empty_logit_diffs, subject.model_logit_diffs)
    empty, model = (m.double().mean() for m in ends_of_f)
    table = pd.DataFrame(
        {
            "kind": ["circuit", "model", *["stochastic"] * len(drawn), "continuous", "rounded"],
            "p": [0.0, 1.0, *shares.tolist(), float("nan"), float("nan")],
            "left": schemes[:, removed].mean(1).tolist(),
            "logit_diff": logit_diffs.double().mean(1).tolist(),
            "loss": losses.double().mean(1).tolist(),
            "discovery_loss": [float("nan")] * (2 + len(drawn))
            + [float(found.losses), float(found.rounded_losses)],
        }
    )
    mean_logit_diffs = logit_diffs.double().mean(1)
    table["f"] = normalised(
        mean_logit_diffs, empty.expand_as(mean_logit_diffs), model.expand_as(mean_logit_diffs)
    ).numpy()

    stochastic = losses[2 : 2 + len(drawn)]
    measures = [
        _measure(subject, "stochastic_loss", "", [stochastic.mean(0)], null_drawn.mean(1)),
        _measure(
            subject, "stochastic_worst", "", list(stochastic), null_drawn.max(1).values,
            statistic=lambda means: means.max(1).values, examples=stochastic.mean(1),
        ),
    ]  # fmt: skip
    null_means = null_logit_diffs[null_drawn.numel() :].double().mean(1).view(2, -1)
    null_fs = normalised(null_means, empty.expand_as(null_means), model.expand_as(null_means))
    for i, variant in enumerate(("continuous", "rounded")):
        columns = [logit_diffs[i - 2], *ends_of_f]
        measures += [
            _measure(subject, "adversarial_loss", variant, [losses[i - 2]], null_attacked[i]),
            _measure(
                subject, "adversarial_f", variant, columns, null_fs[i],
                statistic=lambda means: normalised(*means.T),
            ),
        ]  # fmt: skip
    return PartResult("C", tuple(measures), {"schemes": table})


def attacked(subject: Subject, kept: Bool[Tensor, "circuit unit"], restarts: int) -> Attack:
    """The worst schemes for some circuits, found on the first discovery pairs."""
    config, batch = subject.config, subject.discovery.pairs(0, subject.config.attack_pairs)
    with eval_mode(subject.model):
        hooks = frozen_norms_of(subject.model, batch) if subject.norms else ()
        return attack(
            subject.model, batch, subject.index, kept, subject.unit, subject.values,
            steps=config.attack_steps, restarts=restarts, hooks=hooks,
            generator=torch.Generator().manual_seed(config.seed),
        )  # fmt: skip


def gated(subject: Subject, gates: Float[Tensor, "scheme node"]) -> Float[Tensor, "scheme prompt"]:
    """Margins of the test prompts under gates from 0 to 1, on the CPU."""
    with eval_mode(subject.model), torch.no_grad():
        return gated_logit_diffs(
            subject.model, subject.batch, subject.index, gates, subject.values,
            hooks=subject.norms,
        ).cpu()  # fmt: skip


def _measure(
    subject: Subject,
    name: str,
    variant: str,
    columns: Sequence[Float[Tensor, " prompt"]],
    null: Float[Tensor, " draw"],
    *,
    statistic: Statistic | None = None,
    examples: Float[Tensor, " example"] | None = None,
) -> Measure:
    config = subject.config
    return measured_mean(
        "C", name, variant, columns, statistic, draws=config.draws, seed=config.seed,
        examples=examples, null=null, null_name=NULL,
    )  # fmt: skip
