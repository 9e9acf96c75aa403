"""Do the circuit's nodes have the values that they have in the full model?

Source: Drori 2026 (unexplained variance of kept nodes); the metric's exact form and null are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.faithfulness.measure import CheckResult, NotMeasured, measured_mean
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.tasks.padding import real_positions

PAST_ATTENTION = (
    "attn.hook_q", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "mlp.hook_act_in",
    "ln2.hook_normalized", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip
"""Hooks of the last layer where only the last token's activations can reach the answer."""
OTHER_PAIRS = "the model's values on another pair of prompts"
SHIFTS = 10  # other pairs that each pair is compared with


def node_values(test: CircuitUnderTest) -> CheckResult:
    """Do the circuit's nodes have the values that they have in the full model?

    ``fvu``, a variant per hook and ``all``: the fraction of variance unexplained of the kept nodes,
    ``sum (x_circuit - x_model)^2 / sum (x_model - mean)^2`` over kept nodes and real positions of
    the test prompts, with each node's own mean; of the last layer's queries and of what follows its
    attention only the last token counts. Null: x_circuit replaced by the full model's values at the
    same positions of other pairs (about 2 for values that have nothing in common, less for what all
    prompts share). Table ``fvu``: a row per kept node.
    """
    config, index, kept = test.config, test.index, test.kept
    if not bool(kept.any()):
        raise NotMeasured("the circuit keeps no node")
    full = kept_values(test, ())
    with test.edges_of(kept[None]):
        circuit = kept_values(test, test.circuit_hooks())
    last = test.batch.last.cpu()
    names = index.nodes(kept)
    hooks = names["hook"].to_numpy()
    late = torch.tensor([reaches_from_last(test, hook) for hook in hooks])
    real = real_positions(full.shape[1], last)
    at_last = torch.arange(full.shape[1]) == last[:, None]
    counted = torch.where(late, at_last[..., None], real[..., None]).double()
    # centred first: sums of squares would lose what little a large constant varies by
    centre = (full * counted).sum((0, 1)) / counted.sum((0, 1))
    full, circuit = full - centre, circuit - centre
    squares = ((circuit - full).square() * counted).sum(1)
    second = (full.square() * counted).sum(1)
    first = (full * counted).sum(1)
    counts = counted.sum(1)
    table = names.assign(
        squares=squares.sum(0).numpy(),
        variance=(second.sum(0) - first.sum(0).square() / counts.sum(0)).numpy(),
    )
    table["fvu"] = table["squares"] / table["variance"].where(table["variance"] > 0)
    ends = full[torch.arange(len(last)), last][:, None]
    others = [
        [
            torch.where(late, end, through)
            for through, end in zip(
                unexplained_by_others(full, real, shift),
                unexplained_by_others(ends, torch.ones_like(real[:, :1]), shift),
                strict=True,
            )
        ]
        for shift in range(1, min(SHIFTS, len(full) // 2 - 1) + 1)
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
                config, "fvu", hook, columns, ratio, prompts=test.batch.prompts,
                examples=squares[:, mine].sum(1),
                null=torch.stack(null) if null else None, null_name=OTHER_PAIRS,
            )
        )  # fmt: skip
    still = [m.variant for m in found if math.isnan(m.value)]
    notes = [f"nothing varies at {', '.join(still)} in the model"] if still else []
    return CheckResult(tuple(found), {"fvu": table.reset_index()}, tuple(notes))


def reaches_from_last(test: CircuitUnderTest, hook: str) -> bool:
    """Whether what stands at a hook can reach the answer from the prompt's last token alone."""
    cfg: Any = test.model.cfg
    block = f"blocks.{cfg.n_layers - 1}."
    return hook.startswith(block) and hook.removeprefix(block) in PAST_ATTENTION


def kept_values(test: CircuitUnderTest, hooks: Sequence[Any]) -> Float[Tensor, "prompt pos kept"]:
    """Activations of the kept nodes on the test prompts under hooks, in float64 on the CPU."""
    found: dict[str, Tensor] = {}

    def record(x: Tensor, hook: Any = None, *, name: str, kept: Bool[Tensor, " channel"]) -> None:
        # a site's activation may come once per head
        x = test.index.read(name, x.detach())
        channels = x.reshape(*x.shape[:2], -1, len(kept))[:, :, 0]
        found[name] = channels[..., kept.to(x.device)].double().cpu()

    parts = {name: test.kept[piece] for name, piece in test.index.slices.items()}
    readers: list[Any] = [
        (name, partial(record, name=name, kept=kept)) for name, kept in parts.items() if kept.any()
    ]
    with eval_mode(test.model), torch.no_grad():
        task_logit_diffs(test.model, test.batch, [*hooks, *readers])
    return torch.cat([found[name] for name, _ in readers], -1)


def unexplained_by_others(
    x: Float[Tensor, "prompt pos node"], real: Bool[Tensor, "prompt pos"], shift: int
) -> tuple[Float[Tensor, " node"], Float[Tensor, " node"]]:
    """Squared differences to the prompts ``shift`` pairs back, and squares about the mean, over
    positions that both prompts have."""
    both = real & real.roll(2 * shift, 0)
    here, there = x[both], x.roll(2 * shift, 0)[both]
    return (there - here).square().sum(0), (here - here.mean(0)).square().sum(0)


CHECK = Check(
    node_values,
    "do its nodes have the values that they have in the model?",
    order=50,
    criteria=(
        Criterion("same values", "has nodes with the values that they have in the model", "fvu",
                  0.5, variants=("all",)),
    ),
)  # fmt: skip
