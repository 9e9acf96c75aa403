"""Part A, sufficiency: does the circuit do the task alone, however the rest is ablated?

Sources: Gao et al. 2025, §A.5 and appendix E (mean ablation, resampling); Wang et al. 2022
(ablating to means by position); Li and Janson 2024 (optimal ablation).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.ablation import (
    Replacement,
    ResampleSources,
    activation_means,
    positional_means,
    resample_sources,
)
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.circuits.calibration import Calibration, calibrate, calibrated
from tl_sparse.faithfulness.checks.optimal import optimal_values
from tl_sparse.faithfulness.checks.ranking import ranking_measures
from tl_sparse.faithfulness.controls import few, first_nodes, on, random_units, tuning
from tl_sparse.faithfulness.measure import Measure, PartResult, Statistic, measured_mean
from tl_sparse.faithfulness.metrics import kl_recovered, loss_recovered, normalised, two_way_kl
from tl_sparse.faithfulness.subject import Subject
from tl_sparse.tasks import TaskBatch

MEAN_PAIRS = 256  # discovery pairs that task means are taken over
MOST_FLOATS = 2**27  # of donors' activations in memory at once
NULL = "random node sets of the same sizes at every hook"
Values = Callable[[TaskBatch], Replacement]


def sufficiency(subject: Subject) -> PartResult:
    """What the circuit alone does, every other node removed, for each way to remove nodes.

    Variants are ways to ablate: ``own`` (as the circuit was found), ``zero``, ``mean`` (over the
    pretraining text), ``task_mean`` (over discovery prompts), ``positional_mean`` (over the text,
    by position), ``resample`` (each prompt's removed nodes as they are on a sequence of the text,
    drawn by the prompt; condition 2 of causal scrubbing), ``optimal`` (learned constants, see
    :func:`~tl_sparse.faithfulness.checks.optimal.optimal_values`). With m the mean logit_diff and L the mean
    two-way loss on test prompts, for each:

    - ``loss``: L(C), nats; chance is ln 2.
    - ``calibrated_loss``: L(C) after scale and shift of the logit difference: the circuit's stored
      ones for ``own``, otherwise fitted to the circuit on discovery prompts.
    - ``accuracy``: share of prompts with a positive logit_diff.
    - ``logit_diff``: m(C); ``empty_logit_diff``: m(∅); ``model_logit_diff``: m(M).
    - ``f``: (m(C) - m(∅)) / (m(M) - m(∅)).
    - ``loss_recovered``: 1 - (L(C) - L(M)) / (L(∅) - L(M)).
    - ``kl_recovered``: 1 - KL(C) / KL(∅), of the two answers' probabilities.
    - ``empty_loss``: L(∅), every node removed. ``model_loss`` is L(M).

    Of the ranking by learned scores that a :class:`~tl_sparse.circuits.Circuit` has, ``cpr`` and
    ``cmd`` of MIB; see :func:`~tl_sparse.faithfulness.checks.ranking.ranking_measures`, whose table is
    ``ranking``.

    ∅ is ablated as C is. The null of each is that of random sets with as many units at every hook,
    on the first ``few_pairs`` test pairs. What needs the pretraining text is left out without it.
    """
    small = few(subject)
    sets = random_units(subject, "anywhere", subject.config.controls)
    found: list[Measure] = []
    notes: list[str] = []
    for name, values in ablations(subject, notes).items():
        own = name == "own"
        found += _measures(
            name, subject, small, _fixed(subject, small, subject.nodes(sets), values, own)
        )
    sets = sets[: subject.config.optimal_controls]
    found += _measures("optimal", subject, small, _learned(subject, small, subject.nodes(sets)))
    model = subject.model_logit_diffs
    found.append(_mean("model_loss", "", subject, [F.softplus(-model)]))
    found.append(_mean("model_logit_diff", "", subject, [model]))
    tables = {}
    tau = subject.circuit.tau
    if tau is not None and bool(tau.isfinite().all()):
        scores = tau.cpu().float()[first_nodes(subject)]
        measures, tables["ranking"] = ranking_measures(subject, scores)
        found += measures
    else:
        notes.append("cpr, cmd: these units were not ranked")
    if subject.circuit.calibration is None:
        notes.append("calibrated_loss (own): no calibration is stored, so it is fitted too")
    return PartResult("A", tuple(found), tables, tuple(notes))


def ablations(subject: Subject, notes: list[str]) -> dict[str, Values]:
    """Every way to ablate but the learned one, as what removed nodes are set to for a batch.

    What cannot be had is left out, and a line about it added to ``notes``.
    """
    model, index = subject.model, subject.index
    own, text = subject.values, subject.tokens
    known = subject.discovery.pairs(0, MEAN_PAIRS)
    with eval_mode(model):
        task = activation_means(model, known.tokens, last=known.last, index=index).values.cpu()
    found: dict[str, Values] = {
        "own": lambda batch: own,
        "zero": lambda batch: torch.zeros_like(own),
        "task_mean": lambda batch: task,
    }
    if text is None:
        notes.append("mean, positional_mean, resample: no text of the pretraining distribution")
        return found
    with eval_mode(model):
        mean = activation_means(model, text, index=index).values.cpu()
    found["mean"] = lambda batch: mean
    longest = int(max(subject.batch.last.max(), subject.discovery.last.max())) + 1
    if text.shape[1] < longest:
        notes.append(
            f"positional_mean, resample: sequences of {text.shape[1]} tokens are shorter than the "
            f"longest prompt, of {longest}"
        )
        return found
    with eval_mode(model):
        by_position = positional_means(model, text[:, :longest], index)
    seed = subject.config.seed

    def averaged(batch: TaskBatch) -> ResampleSources:
        return by_position.take(torch.zeros(len(batch), dtype=torch.int64))

    def resampled(batch: TaskBatch) -> ResampleSources:
        drawn = text[donors_of(batch.prompts, len(text), seed)]
        with eval_mode(model):
            return resample_sources(model, drawn[:, : int(batch.last.max()) + 1], index=index)

    return found | {"positional_mean": averaged, "resample": resampled}


def donors_of(prompts: tuple[str, ...], sequences: int, seed: int) -> Int[Tensor, " prompt"]:
    """A random sequence for each prompt: by its text, so that its place in a batch is no matter."""
    drawn = [random.Random(f"{seed} {prompt}").randrange(sequences) for prompt in prompts]
    return torch.tensor(drawn)


@dataclass(frozen=True, eq=False)
class _Margins:
    """Margins under one way to ablate; those of random sets are on fewer prompts."""

    circuit: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]
    model: Float[Tensor, " prompt"]
    calibration: Calibration
    random: Float[Tensor, "draw few"]
    random_calibrated: Float[Tensor, "draw few"]
    few_empty: Float[Tensor, " few"]
    few_model: Float[Tensor, " few"]


def _fixed(
    subject: Subject, small: Subject, sets: Bool[Tensor, "draw node"], values: Values, own: bool
) -> _Margins:
    """Margins where removed nodes are set to the same, whichever they are."""
    kept, none = subject.kept[None], torch.zeros_like(subject.kept)[None]
    circuit, empty = (margins_under(subject, keep, values)[0] for keep in (kept, none))
    model = subject.model_logit_diffs
    if isinstance(
        values(small.batch), ResampleSources
    ):  # they take another path, which rounds otherwise
        model = margins_under(subject, torch.ones_like(kept), values)[0]
    known, tuned = (tuning(subject, n) for n in (subject.config.pairs, subject.config.few_pairs))
    stored = subject.circuit.calibration if own else None
    calibration = stored or calibrate(margins_under(known, kept, values)[0])
    random = margins_under(small, sets, values)
    return _Margins(
        circuit, empty, model, calibration, random,
        _calibrated(random, margins_under(tuned, sets, values)),
        empty[: len(small.batch)], model[: len(small.batch)],
    )  # fmt: skip


def margins_under(
    subject: Subject, keep: Bool[Tensor, "mask node"], values: Values
) -> Float[Tensor, "mask prompt"]:
    """Margins of a subject's prompts, so many at a time that their donors fit in memory."""
    batch = subject.batch
    floats = 2 * (int(batch.last.max()) + 1) * subject.index.n_nodes
    pairs, all_pairs = max(1, MOST_FLOATS // floats), len(batch) // 2
    if pairs >= all_pairs:
        return subject.logit_diffs(keep, values(batch))
    parts = [on(subject, batch.pairs(at, at + pairs)) for at in range(0, all_pairs, pairs)]
    return torch.cat([part.logit_diffs(keep, values(part.batch)) for part in parts], 1)


def _learned(subject: Subject, small: Subject, sets: Bool[Tensor, "draw node"]) -> _Margins:
    """Margins where every set of removed nodes has constants of its own."""
    kept, none = subject.kept[None], torch.zeros_like(subject.kept)[None]
    masks = torch.cat([kept, none, sets])
    values = optimal_values(subject, masks)

    def logit_diffs(where: Subject, mask: int) -> Tensor:
        return where.logit_diffs(masks[mask : mask + 1], values[mask])[0]

    circuit, empty = (logit_diffs(subject, mask) for mask in (0, 1))
    known, tuned = (tuning(subject, n) for n in (subject.config.pairs, subject.config.few_pairs))
    drawn = range(2, len(masks))
    random = torch.stack([logit_diffs(small, mask) for mask in drawn])
    return _Margins(
        circuit, empty, subject.model_logit_diffs, calibrate(logit_diffs(known, 0)), random,
        _calibrated(random, torch.stack([logit_diffs(tuned, mask) for mask in drawn])),
        empty[: len(small.batch)], subject.model_logit_diffs[: len(small.batch)],
    )  # fmt: skip


def _calibrated(
    logit_diffs: Float[Tensor, "draw few"], known: Float[Tensor, "draw known"]
) -> Float[Tensor, "draw few"]:
    """Every random set's logit_diffs, calibrated on its own logit_diffs on discovery prompts."""
    return torch.stack(
        [calibrated(row, calibrate(fit)) for row, fit in zip(logit_diffs, known, strict=True)]
    )


def _measures(variant: str, subject: Subject, small: Subject, m: _Margins) -> list[Measure]:
    """Every number of one way to ablate."""
    loss, empty, model = (F.softplus(-x) for x in (m.circuit, m.empty, m.model))
    kls = [two_way_kl(m.model, x) for x in (m.circuit, m.empty)]
    # means of the null's draws, and of ∅ and M on the same prompts
    m_empty, m_model = (x.double().mean() for x in (m.few_empty, m.few_model))
    l_empty, l_model = (F.softplus(-x).double().mean() for x in (m.few_empty, m.few_model))
    random = m.random.double()
    losses = F.softplus(-random).mean(1)
    random_kl = two_way_kl(m.few_model.double().expand_as(random), random).mean(1)
    empty_kl = two_way_kl(m.few_model.double(), m.few_empty.double()).mean()
    share = prompt_shares(m.circuit, m.empty, m.model, m.empty)
    after = F.softplus(-calibrated(m.circuit, m.calibration))
    nulls = [
        losses,
        F.softplus(-m.random_calibrated.double()).mean(1),
        (random > 0).double().mean(1),
        random.mean(1),
        normalised(random.mean(1), m_empty.expand(len(random)), m_model.expand(len(random))),
        loss_recovered(losses, l_empty.expand(len(losses)), l_model.expand(len(losses))),
        kl_recovered(random_kl, empty_kl.expand(len(random_kl))),
    ]
    rows: list[tuple[str, list[Tensor], Statistic | None, Tensor | None]] = [
        ("loss", [loss], None, None),
        ("calibrated_loss", [after], None, None),
        ("accuracy", [(m.circuit > 0).double()], None, None),
        ("logit_diff", [m.circuit], None, None),
        ("f", [m.circuit, m.empty, m.model], f_statistic, share),
        ("loss_recovered", [loss, empty, model], _loss_recovered, None),
        ("kl_recovered", kls, lambda means: kl_recovered(means[:, 0], means[:, 1]), None),
    ]
    found = [
        _mean(name, variant, subject, columns, statistic, examples=examples, null=null)
        for (name, columns, statistic, examples), null in zip(rows, nulls, strict=True)
    ]
    return [
        *found,
        _mean("empty_loss", variant, subject, [empty]),
        _mean("empty_logit_diff", variant, subject, [m.empty]),
    ]


def f_statistic(means: Float[Tensor, "draw 3"]) -> Float[Tensor, " draw"]:
    """f of mean logit_diffs of the circuit, the empty circuit and the model."""
    return normalised(means[:, 0], means[:, 1], means[:, 2])


def _loss_recovered(means: Float[Tensor, "draw 3"]) -> Float[Tensor, " draw"]:
    return loss_recovered(means[:, 0], means[:, 1], means[:, 2])


def prompt_shares(
    part: Float[Tensor, " prompt"],
    part_empty: Float[Tensor, " prompt"],
    whole: Float[Tensor, " prompt"],
    whole_empty: Float[Tensor, " prompt"],
) -> Float[Tensor, " prompt"]:
    """Each prompt's part in (m(part) - m(part ∅)) / (m(whole) - m(whole ∅)), their mean."""
    apart = (part.double() - part_empty.double(), whole.double() - whole_empty.double())
    return apart[0] / apart[1].mean()


def _mean(
    name: str,
    variant: str,
    subject: Subject,
    columns: list[Tensor],
    statistic: Statistic | None = None,
    *,
    examples: Tensor | None = None,
    null: Tensor | None = None,
) -> Measure:
    config = subject.config
    return measured_mean(
        "A", name, variant, columns, statistic, draws=config.draws, seed=config.seed,
        examples=examples, null=null, null_name="" if null is None else NULL,
    )  # fmt: skip
