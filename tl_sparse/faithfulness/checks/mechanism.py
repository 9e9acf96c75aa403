"""Part E, mechanism: does the circuit compute as the full model does, or only end up alike?

Source: Drori 2026 and its evaluations (interchange sweep, unexplained variance of kept nodes, nodes
that are repurposed, heads left without a pattern); the metrics' exact form and nulls are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.ablation import ablation_hooks, resample_sources
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.ablation.masked_forward import masked_logit_diffs
from tl_sparse.faithfulness.checks.effects import (
    UnitEffects,
    opposite,
    pearson,
    spearman,
    unit_effects,
    unit_intervals,
)
from tl_sparse.faithfulness.checks.patterns import head_patterns
from tl_sparse.faithfulness.controls import few, first_nodes, random_units
from tl_sparse.faithfulness.measure import (
    Measure,
    PartResult,
    bootstrap_means,
    interval,
    measured_mean,
)
from tl_sparse.faithfulness.metrics import normalised
from tl_sparse.faithfulness.subject import Subject

PAST_ATTENTION = (
    "attn.hook_q", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "mlp.hook_act_in",
    "ln2.hook_normalized", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip
"""Hooks of the last layer where only the last token's activations can reach the answer."""
OTHER_PAIRS = "the model's values on another pair of prompts"
UNIFORM = "attention spread evenly over all tokens so far"
SHUFFLED = "the model's effects shuffled among the units"
RANDOM = "random sets of units, as many at every hook"
FRACTIONS = tuple(i / 10 for i in range(11))
SWAPS = 3  # draws of which units are swapped at each fraction
SHIFTS = 10  # other pairs that each pair is compared with
NOTICED = 0.01  # share of the model's logit_diff: the sign of smaller effects says nothing
EVEN = 0.05  # a head this close to uniform attention has no pattern to agree with
MOST_FLOATS = 2**26  # activations held at once


def mechanism(subject: Subject) -> PartResult:
    """Does the circuit compute what the full model computes at the nodes that it keeps?

    Measures:
        - ``fvu``, a variant per hook and ``all``: the fraction of variance unexplained of the kept
          nodes, ``sum (x_circuit - x_model)^2 / sum (x_model - mean)^2`` over kept nodes and real
          positions of the test prompts, with each node's own mean; of the last layer's queries and
          of what follows its attention only the last token counts. Null: x_circuit replaced by the
          full model's values at the same positions of other pairs (about 2 for values that have
          nothing in common, less for what all prompts share).
        - ``pattern_js``, a variant per head and ``mean``, and each with ``, last``: the
          Jensen-Shannon distance (root, base 2, 0 to 1) of the head's attention in circuit and
          model, mean over query positions or at the last token alone. Heads that the circuit uses.
          A sink's mass is one more outcome. Null: the distance of uniform attention, which gives
          every token so far as much (the sink keeps its own mass): a circuit that ignores the
          pattern.
        - ``pattern_ratio``, a variant per head: ``pattern_js`` as a share of that null; 1 is as
          good as uniform attention. Of the last layer's heads that at the last token, as nothing
          else there reaches the answer. Not given for heads that are uniform in the model.
        - ``patternless_heads``: heads of which the circuit keeps values, and no query or no key.
        - ``effect_correlation``, variants ``pearson`` and ``spearman``: over the circuit's units,
          of the drop in mean logit_diff when the unit alone is ablated in the circuit, and in the whole
          model. Null: the model's effects shuffled among the units.
        - ``sign_flips``: units whose two effects have opposite signs, both with 95% intervals more
          than 1% of the model's logit_diff m(M) - m(∅) away from 0; ``examples`` says which units.
        - ``interchange_f``: f of the circuit with all its nodes set to their values in the whole
          model on the same prompt. Null: random sets of units.

    Tables: ``fvu`` (a row per kept node), ``heads``, ``effects`` (a row per unit, with ``flipped``)
    and ``interchange`` (fraction of units swapped, draw, logit_diff, loss, f; on the first
    ``few_pairs`` pairs).
    """
    notes: list[str] = []
    measures: list[Measure] = []
    tables: dict[str, pd.DataFrame] = {}
    for piece in (variance, attention, effects, interchange):
        found, table, said = piece(subject)
        measures += found
        tables |= table
        notes += said
    return PartResult("E", tuple(measures), tables, tuple(notes))


Found = tuple[list[Measure], dict[str, pd.DataFrame], list[str]]


# --------------------------------------------------------------------------------------------------
# values of kept nodes


def variance(subject: Subject) -> Found:
    """``fvu`` by hook and of all kept nodes."""
    config, index, kept = subject.config, subject.index, subject.kept
    if not bool(kept.any()):
        return [], {}, ["fvu: the circuit keeps no node"]
    whole = node_values(subject, ())
    own = ablation_hooks(index, kept, subject.values)
    circuit = node_values(subject, [*subject.norms, *own])
    last = subject.batch.last.cpu()
    names = index.nodes(kept)
    hooks = names["hook"].to_numpy()
    late = torch.tensor([reaches_from_last(subject, hook) for hook in hooks])
    real = torch.arange(whole.shape[1]) <= last[:, None]
    at_last = torch.arange(whole.shape[1]) == last[:, None]
    counted = torch.where(late, at_last[..., None], real[..., None]).double()
    # centred first: sums of squares would lose what little a large constant varies by
    centre = (whole * counted).sum((0, 1)) / counted.sum((0, 1))
    whole, circuit = whole - centre, circuit - centre
    squares = ((circuit - whole).square() * counted).sum(1)
    second = (whole.square() * counted).sum(1)
    first = (whole * counted).sum(1)
    counts = counted.sum(1)
    table = names.assign(
        squares=squares.sum(0).numpy(),
        variance=(second.sum(0) - first.sum(0).square() / counts.sum(0)).numpy(),
    )
    table["fvu"] = table["squares"] / table["variance"].where(table["variance"] > 0)
    ends = whole[torch.arange(len(last)), last][:, None]
    others = [
        [
            torch.where(late, end, through)
            for through, end in zip(
                unexplained_by_others(whole, real, shift),
                unexplained_by_others(ends, torch.ones_like(real[:, :1]), shift),
                strict=True,
            )
        ]
        for shift in range(1, min(SHIFTS, len(whole) // 2 - 1) + 1)
    ]
    found = []
    for hook in ("all", *dict.fromkeys(hooks)):
        mine = torch.tensor([hook in ("all", name) for name in hooks])

        def ratio(means: Float[Tensor, "draw column"]) -> Float[Tensor, " draw"]:
            sums, n = means[:, 2:].chunk(2, 1)
            spread = means[:, 1] - (sums.square() / n).sum(1)
            return means[:, 0] / torch.where(spread > 0, spread, torch.nan)

        columns = [squares[:, mine].sum(1), second[:, mine].sum(1)]
        columns += [*first[:, mine].T, *counts[:, mine].T]
        null = [error[mine].sum() / spread[mine].sum() for error, spread in others]
        found.append(
            measured_mean(
                "E", "fvu", hook, columns, ratio, draws=config.draws, seed=config.seed,
                examples=squares[:, mine].sum(1), null=torch.stack(null) if null else None,
                null_name=OTHER_PAIRS,
            )
        )  # fmt: skip
    still = [m.variant for m in found if math.isnan(m.value)]
    notes = [f"fvu: nothing varies at {', '.join(still)} in the model"] if still else []
    return found, {"fvu": table.reset_index()}, notes


def reaches_from_last(subject: Subject, hook: str) -> bool:
    """Whether what stands at a hook can reach the answer from the prompt's last token alone."""
    cfg: Any = subject.model.cfg
    block = f"blocks.{cfg.n_layers - 1}."
    return hook.startswith(block) and hook.removeprefix(block) in PAST_ATTENTION


def node_values(subject: Subject, hooks: Sequence[Any]) -> Float[Tensor, "prompt pos kept"]:
    """Activations of the kept nodes on the test prompts under hooks, in float64 on the CPU."""
    found: dict[str, Tensor] = {}

    def record(x: Tensor, hook: Any = None, *, name: str, kept: Bool[Tensor, " channel"]) -> None:
        # a site's activation may come once per head
        channels = x.detach().reshape(*x.shape[:2], -1, len(kept))[:, :, 0]
        found[name] = channels[..., kept.to(x.device)].double().cpu()

    parts = {name: subject.kept[piece] for name, piece in subject.index.slices.items()}
    readers: list[Any] = [
        (name, partial(record, name=name, kept=kept)) for name, kept in parts.items() if kept.any()
    ]
    with eval_mode(subject.model), torch.no_grad():
        task_logit_diffs(subject.model, subject.batch, [*hooks, *readers])
    return torch.cat([found[name] for name, _ in readers], -1)


def unexplained_by_others(
    x: Float[Tensor, "prompt pos node"], real: Bool[Tensor, "prompt pos"], shift: int
) -> tuple[Float[Tensor, " node"], Float[Tensor, " node"]]:
    """Squared differences to the prompts ``shift`` pairs back, and squares about the mean, over
    positions that both prompts have."""
    both = real & real.roll(2 * shift, 0)
    here, there = x[both], x.roll(2 * shift, 0)[both]
    return (there - here).square().sum(0), (here - here.mean(0)).square().sum(0)


# --------------------------------------------------------------------------------------------------
# attention


def attention(subject: Subject) -> Found:
    """``pattern_js`` and ``pattern_ratio`` of every head, and heads without a pattern."""
    config, notes = subject.config, []
    compared = head_patterns(subject)
    if compared.missing:
        layers = ", ".join(map(str, compared.missing))
        notes.append(f"pattern_js: the model lays no attention patterns open in layers {layers}")
    frame = compared.heads
    if frame.empty:
        return [], {"heads": frame}, [*notes, "pattern_js: no heads among the circuit's nodes"]
    names = [f"L{layer}H{head}" for layer, head in zip(frame["layer"], frame["head"], strict=True)]
    found = []
    for suffix, mine, even in (
        ("", compared.js, compared.uniform),
        (", last", compared.js_last, compared.uniform_last),
    ):
        rows = [("mean", mine.mean(0), even.mean(0)), *zip(names, mine, even, strict=True)]
        for name, distance, uniform in rows:
            null = bootstrap_means(uniform[:, None], config.draws, config.seed)[:, 0]
            found.append(
                measured_mean(
                    "E", "pattern_js", name + suffix, [distance], draws=config.draws,
                    seed=config.seed, null=null, null_name=UNIFORM,
                )
            )  # fmt: skip
    cfg: Any = subject.model.cfg
    for i, name in enumerate(names):
        # in the last layer only what the last token attends to can reach the answer
        at_last = int(frame["layer"].iloc[i]) == cfg.n_layers - 1
        distance = (compared.js_last if at_last else compared.js)[i]
        uniform = (compared.uniform_last if at_last else compared.uniform)[i]
        if float(uniform.mean()) < EVEN:
            notes.append(f"pattern_ratio: {name} attends evenly in the model")
            continue
        found.append(
            measured_mean(
                "E", "pattern_ratio", name, [distance, uniform],
                lambda means: means[:, 0] / means[:, 1], draws=config.draws, seed=config.seed,
            )
        )  # fmt: skip
    table = frame.assign(
        js=compared.js.mean(1).numpy(),
        js_uniform=compared.uniform.mean(1).numpy(),
        js_last=compared.js_last.mean(1).numpy(),
        js_uniform_last=compared.uniform_last.mean(1).numpy(),
    )
    lost = (~frame["keeps_q"] | ~frame["keeps_k"]).fillna(False) & frame["keeps_v"].fillna(False)
    table["patternless"] = lost.astype(bool)
    found.append(
        Measure("E", "patternless_heads", "", float(lost.sum()),
                examples=torch.tensor(table["patternless"].to_numpy()).float())
    )  # fmt: skip
    return found, {"heads": table}, notes


# --------------------------------------------------------------------------------------------------
# single units


def effects(subject: Subject) -> Found:
    """``effect_correlation`` and ``sign_flips``."""
    config, found, notes = subject.config, [], []
    if not bool(subject.kept.any()):
        return [], {}, ["effect_correlation: the circuit keeps no unit"]
    both = unit_effects(subject)
    n_units = len(both.circuit)
    if both.n_pairs < len(subject.batch) // 2:
        notes.append(f"effect_correlation: {n_units} units, on {both.n_pairs} pairs only")
    ends = [unit_intervals(rows, config.draws, config.seed) for rows in (both.circuit, both.model)]
    means = [rows.double().mean(1) for rows in (both.circuit, both.model)]
    generator = torch.Generator().manual_seed(config.seed)
    shuffled = torch.rand(config.draws, n_units, generator=generator).argsort(1)
    for name, correlation in (("pearson", pearson), ("spearman", spearman)):
        null = correlation(means[0].expand(config.draws, -1), means[1][shuffled])
        found.append(
            measured_mean(
                "E", "effect_correlation", name, [*both.circuit, *both.model],
                partial(of_halves, correlation), draws=config.draws, seed=config.seed,
                examples=means[0], null=null, null_name=SHUFFLED,
            )
        )  # fmt: skip
    if math.isnan(found[0].value):
        notes.append("effect_correlation: the units' effects do not differ")
    logit_diff = (
        subject.model_logit_diffs.double().mean() - subject.empty_logit_diffs.double().mean()
    )
    least = NOTICED * abs(float(logit_diff))
    flips = opposite(ends[0], ends[1], least)
    chance = torch.stack([opposite(ends[0], ends[1][order], least).sum() for order in shuffled])
    found.append(
        Measure("E", "sign_flips", "", float(flips.sum()), null=float(chance.mean()),
                null_low=interval(chance)[0], null_high=interval(chance)[1], null_name=SHUFFLED,
                examples=flips.float())
    )  # fmt: skip
    return found, {"effects": effect_table(subject, both, ends, flips)}, notes


def of_halves(
    correlation: Callable[[Tensor, Tensor], Tensor], means: Float[Tensor, "draw column"]
) -> Float[Tensor, " draw"]:
    """The correlation of the first half of the columns with the second."""
    first, second = means.chunk(2, 1)
    return correlation(first, second)


def effect_table(
    subject: Subject,
    both: UnitEffects,
    ends: Sequence[Float[Tensor, "unit 2"]],
    flips: Float[Tensor, " unit"],
) -> pd.DataFrame:
    """A row per unit: its first node, how many it has, both effects with intervals, flipped."""
    units = torch.nonzero(subject.kept_units).flatten()
    first = first_nodes(subject)
    mask = torch.zeros(subject.index.n_nodes, dtype=torch.bool)
    mask[first[units]] = True
    order = first[units].argsort()  # the index names nodes in ascending order
    table = subject.index.nodes(mask).reset_index()
    table["unit"] = units[order].numpy()
    table["n_nodes"] = torch.bincount(subject.unit)[units[order]].numpy()
    found = (("circuit", both.circuit), ("model", both.model))
    for (name, rows), span in zip(found, ends, strict=True):
        table[name] = rows.double().mean(1)[order].numpy()
        table[f"{name}_low"], table[f"{name}_high"] = span[order].T.numpy()
    table["flipped"] = flips[order].bool().numpy()
    return table


# --------------------------------------------------------------------------------------------------
# interchange


def interchange(subject: Subject) -> Found:
    """``interchange_f`` on all test prompts, and the curve of fractions swapped on the first."""
    config, units = subject.config, torch.nonzero(subject.kept_units).flatten()
    generator = torch.Generator().manual_seed(config.seed)
    rows, swaps = [], []
    for fraction in FRACTIONS:
        for draw in range(SWAPS if 0 < fraction < 1 else 1):
            order = torch.randperm(len(units), generator=generator)
            swap = torch.zeros(subject.n_units, dtype=torch.bool)
            swap[units[order[: round(fraction * len(units))]]] = True
            rows.append([fraction, draw, int(swap.sum())])
            swaps.append(swap)
    first = few(subject)
    logit_diffs = swapped_logit_diffs(first, first.kept_units, torch.stack(swaps))
    table = pd.DataFrame(rows, columns=["fraction", "draw", "n_units"]).assign(
        logit_diff=logit_diffs.double().mean(1).numpy(),
        loss=F.softplus(-logit_diffs).double().mean(1).numpy(),
        f=normalised(*(m.double().mean(-1) for m in (logit_diffs, *ends_of(first)))).numpy(),
    )
    swapped, *controls = (
        swapped_logit_diffs(subject, one, one[None])[0]
        for one in (
            subject.kept_units, *random_units(subject, "anywhere", config.attacked_controls)
        )
    )  # fmt: skip
    ends = ends_of(subject)
    null = normalised(torch.stack(controls).double().mean(1), *(m.double().mean() for m in ends))
    measure = measured_mean(
        "E", "interchange_f", "", [swapped, *ends], lambda means: normalised(*means.T),
        draws=config.draws, seed=config.seed, null=null, null_name=RANDOM,
    )  # fmt: skip
    return [measure], {"interchange": table}, []


def ends_of(subject: Subject) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    """Margins with every node removed, and of the full model."""
    return subject.empty_logit_diffs, subject.model_logit_diffs


def swapped_logit_diffs(
    subject: Subject, kept: Bool[Tensor, " unit"], swaps: Bool[Tensor, "swap unit"]
) -> Float[Tensor, "swap prompt"]:
    """Margins of a circuit, some of whose units have their values in the full model."""
    removal = ablation_hooks(subject.index, kept[subject.unit], subject.values)
    keep = ~swaps[:, subject.unit]
    longest = int(subject.batch.last.max()) + 1
    at_once = max(1, MOST_FLOATS // (2 * longest * subject.index.n_nodes))
    found = []
    for start in range(0, len(subject.batch) // 2, at_once):
        less = replace(subject, batch=subject.batch.pairs(start, start + at_once))
        with eval_mode(less.model), torch.no_grad():
            tokens = less.batch.tokens[:, :longest]
            whole = resample_sources(less.model, tokens, index=less.index)
            found.append(
                masked_logit_diffs(
                    less.model, less.batch, less.index, keep, whole, hooks=[*less.norms, *removal]
                ).cpu()
            )
    return torch.cat(found, 1)
