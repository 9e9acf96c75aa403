"""Does the circuit hold if the rest of the model is ablated in part, at random or by an adversary?

Sources: stochastic and adversarial ablation of the complement as in the comments on Drori 2026; the
attack is projected gradient ascent (Madry et al. 2018), with a budget iterative hard thresholding
(Blumensath and Davies 2009), over one continuous mask for all prompts.
"""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import frozen_norms_of
from tl_sparse.faithfulness.ablation_masks import Attack, attack, gates_of, random_ablation_masks
from tl_sparse.faithfulness.controls import random_components
from tl_sparse.faithfulness.measure import CheckResult, measured_mean
from tl_sparse.faithfulness.metrics import normalised
from tl_sparse.faithfulness.registry import HALF_OF_CHANCE, Check, Criterion
from tl_sparse.faithfulness.under_test import CircuitUnderTest

NULL = "random sets of components, as many at every hook"
ATTACKS = ("matched", "continuous", "rounded")
FEW = 4  # ablation masks that each of the random sets is tried under


def partial_ablation(test: CircuitUnderTest) -> CheckResult:
    """Does the circuit still do the task when the rest of the model is ablated only in part?

    An ablation mask s in [0, 1] says what is left of each removed component: ``s * x + (1 - s) *
    value``; kept components are left alone. s = 0 is the circuit as it was found, s = 1 the full
    model. Losses are two-way cross-entropy ``softplus(-logit_diff)`` in nats (chance: ln 2), means
    over test prompts; f is ``(m - m(none)) / (m(model) - m(none))`` with m the mean logit_diff,
    never clamped.

    Measures:
        - ``stochastic_loss``: the mean over ``subsets`` random ablation masks, each of which leaves
          every removed component with a probability of its own that is uniform in (0, 1).
        - ``stochastic_worst``: the loss under the worst of these ablation masks; ``examples`` are
          the ablation masks' losses.
        - ``adversarial_loss`` and ``adversarial_f``: under the one ablation mask that
          :func:`~tl_sparse.faithfulness.ablation_masks.attack` found on train prompts. Variants:
          ``matched``, which leaves at most as many removed components as the circuit has, so that
          an explanation of n components meets n others; and without that limit ``continuous`` and
          ``rounded`` (every component is left or removed). Without it, thousands of small pushes to
          one answer add up, which cancel in the model and are no part of how it does the task.

    With ``verdict_only``: ``stochastic_loss`` and ``adversarial_loss [matched]`` alone, no nulls.

    The null of each is the same for random sets of components, as many at every hook (under the
    first four random ablation masks, or the worst that one ascent finds against each set): what the
    ablation masks do to a set that explains nothing. Table ``ablation_masks``: a row per ablation
    mask with its kind (``circuit``, ``model``, ``stochastic``, or a variant of the attack),
    probability ``p`` of being left, the share ``left`` of the removed components, logit_diff, loss
    and f on test prompts, and of attacks the loss on the prompts that they were found on.
    """
    if test.config.verdict_only:
        return judged_numbers(test)
    config, component = test.config, test.component
    generator = torch.Generator().manual_seed(config.seed)
    circuit = test.kept_components[None]
    controls = random_components(test, "anywhere", config.attacked_controls)
    drawn, shares = random_ablation_masks(test.n_components, config.subsets, generator)
    few = drawn[: min(FEW, config.subsets)]
    # of one strength for the circuit's own and the random sets' null
    found, matched = (
        attacked(test, circuit, config.attack_restarts, limited) for limited in (False, True)
    )
    against, matched_against = (attacked(test, controls, 1, limited) for limited in (False, True))

    ends = torch.stack([torch.zeros(test.n_components), torch.ones(test.n_components)])
    ablation_masks = torch.cat(
        [ends, drawn, matched.ablation_masks, found.ablation_masks, found.rounded]
    )
    null_ablation_masks = torch.cat(
        [few.repeat(len(controls), 1), matched_against.ablation_masks, against.ablation_masks,
         against.rounded]
    )  # fmt: skip
    repeated = controls.repeat_interleave(len(few), 0)
    sets = torch.cat([circuit.repeat(len(ablation_masks), 1), repeated, *[controls] * len(ATTACKS)])
    gates = gates_of(sets, torch.cat([ablation_masks, null_ablation_masks]), component)
    logit_diffs, null_logit_diffs = test.logit_diffs(gates).split(
        [len(ablation_masks), len(null_ablation_masks)]
    )
    losses = F.softplus(-logit_diffs)
    null_losses = F.softplus(-null_logit_diffs).mean(1)
    null_drawn = null_losses[: few.shape[0] * len(controls)].view(len(controls), -1)
    null_attacked = null_losses[null_drawn.numel() :].view(len(ATTACKS), -1)

    removed = ~test.kept_components
    ends_of_f = (test.empty_logit_diffs, test.model_logit_diffs)
    empty, model = (m.double().mean() for m in ends_of_f)
    table = pd.DataFrame(
        {
            "kind": ["circuit", "model", *["stochastic"] * len(drawn), *ATTACKS],
            "p": [0.0, 1.0, *shares.tolist(), *[float("nan")] * len(ATTACKS)],
            "left": ablation_masks[:, removed].mean(1).tolist(),
            "logit_diff": logit_diffs.double().mean(1).tolist(),
            "loss": losses.double().mean(1).tolist(),
            "train_loss": [float("nan")] * (2 + len(drawn))
            + [float(matched.losses), float(found.losses), float(found.rounded_losses)],
        }
    )
    mean_logit_diffs = logit_diffs.double().mean(1)
    table["f"] = normalised(
        mean_logit_diffs, empty.expand_as(mean_logit_diffs), model.expand_as(mean_logit_diffs)
    ).numpy()

    stochastic = losses[2 : 2 + len(drawn)]
    measures = [
        measured_mean(
            config, "stochastic_loss", "", [stochastic.mean(0)], prompts=test.batch.prompts,
            null=null_drawn.mean(1), null_name=NULL,
        ),
        measured_mean(
            config, "stochastic_worst", "", list(stochastic), lambda means: means.max(1).values,
            examples=stochastic.mean(1), null=null_drawn.max(1).values, null_name=NULL,
        ),
    ]  # fmt: skip
    null_means = null_logit_diffs[null_drawn.numel() :].double().mean(1).view(len(ATTACKS), -1)
    null_fs = normalised(null_means, empty.expand_as(null_means), model.expand_as(null_means))
    for i, variant in enumerate(ATTACKS):
        at = i - len(ATTACKS)
        columns = [logit_diffs[at], *ends_of_f]
        measures += [
            measured_mean(
                config, "adversarial_loss", variant, [losses[at]], prompts=test.batch.prompts,
                null=null_attacked[i], null_name=NULL,
            ),
            measured_mean(
                config, "adversarial_f", variant, columns, lambda means: normalised(*means.T),
                prompts=test.batch.prompts, null=null_fs[i], null_name=NULL,
            ),
        ]  # fmt: skip
    return CheckResult(tuple(measures), {"ablation_masks": table})


def judged_numbers(test: CircuitUnderTest) -> CheckResult:
    """The two numbers that the verdict reads."""
    config, circuit = test.config, test.kept_components[None]
    generator = torch.Generator().manual_seed(config.seed)
    drawn, _ = random_ablation_masks(test.n_components, config.subsets, generator)
    worst = attacked(test, circuit, config.attack_restarts, limited=True).ablation_masks
    masks = torch.cat([drawn, worst])
    gates = gates_of(circuit.repeat(len(masks), 1), masks, test.component)
    losses = F.softplus(-test.logit_diffs(gates))
    return CheckResult(
        tuple(
            measured_mean(config, name, variant, [loss], prompts=test.batch.prompts)
            for name, variant, loss in (
                ("stochastic_loss", "", losses[: len(drawn)].mean(0)),
                ("adversarial_loss", "matched", losses[-1]),
            )
        )
    )


def attacked(
    test: CircuitUnderTest,
    kept: Bool[Tensor, "circuit component"],
    restarts: int,
    limited: bool = False,
) -> Attack:
    """The worst ablation masks for some circuits, found on the first train pairs; ``limited`` to as
    many components as each has."""
    config, batch = test.config, test.train_batch.pairs(0, test.config.attack_pairs)
    with eval_mode(test.model):
        hooks = frozen_norms_of(test.model, batch) if test.norms else ()
        return attack(
            test.model, batch, test.index, kept, test.component, test.values,
            steps=config.attack_steps, restarts=restarts, hooks=hooks,
            budget=kept.sum(1) if limited else None,
            generator=torch.Generator().manual_seed(config.seed),
        )  # fmt: skip


CHECK = Check(
    partial_ablation,
    "does the circuit hold if the rest is ablated in part, at random or by an adversary?",
    order=30,
    criteria=(
        Criterion("random subsets", "holds when random parts of the rest are ablated",
                  "stochastic_loss", HALF_OF_CHANCE),
        Criterion("worst subset",
                  "holds when an adversary puts back as many of the rest as it has itself",
                  "adversarial_loss", HALF_OF_CHANCE, variants=("matched",)),
    ),
)  # fmt: skip
