"""Does the circuit live on norms that amplify what ablation leaves of the residual stream?

Source: Drori 2026, appendix C: ablation shrinks the residual stream, and the norms make up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparse.ablation import FwdHook, NoNormScales, check_fired, gated_ablation_hooks, norm_hooks
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import frozen_norms_of, trimmed
from tl_sparse.ablation.masked_forward import tiled
from tl_sparse.faithfulness.checks.sufficiency import NULL, f_statistic, prompt_shares
from tl_sparse.faithfulness.controls import few, random_components
from tl_sparse.faithfulness.measure import CheckResult, measured_mean
from tl_sparse.faithfulness.metrics import normalised
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.tasks.padding import real_positions

ROWS = 256  # masks x prompts of one forward pass, whose logits at every position are computed


def norms(test: CircuitUnderTest) -> CheckResult:
    """The circuit with the norms' scales held at the full model's, and how far they drift.

    - ``frozen_loss``: mean two-way loss (nats) of the circuit, every norm dividing by what it
      divides by in the full model on the same prompt.
    - ``frozen_f``: (m(C) - m(∅)) / (m(M) - m(∅)), C and ∅ with frozen norms.
    - ``frozen_share``: what freezing leaves of the circuit's own logit_diff, (m(C) - m(∅)) with
      frozen norms / (m(C) - m(∅)) as the circuit was found; 1 if it does not need them. Without a
      null: random sets have no logit_diff of which a share could be left.
    - ``norm_drift``, a variant a norm hook: scale under the circuit / scale in the full model, mean
      over prompts and their tokens. Below one, the norm amplifies what is left.

    With ``verdict_only`` there is no ``norm_drift``, and one random set.

    Null: random sets with as many components at every hook, on the first ``few_pairs`` test pairs.
    Where a model's norms have no scales to read or to set, a note says so.
    """
    model, config, small = test.model, test.config, few(test)
    n_sets = config.null_sets(config.controls)
    sets = test.nodes(random_components(test, "anywhere", n_sets))
    notes: list[str] = []
    found = []

    def measure(name: str, variant: str, columns: list[Tensor], **kw: Any) -> None:
        found.append(measured_mean(
            config, name, variant, columns, prompts=test.batch.prompts, null_name=NULL, **kw
        ))  # fmt: skip

    try:
        with eval_mode(model), torch.no_grad():
            held, held_few = (frozen_norms_of(model, s.batch) for s in (test, small))
    except NoNormScales as error:
        notes.append(f"frozen_loss, frozen_f: {error}")
    else:
        kept, none = test.kept[None], torch.zeros_like(test.kept)[None]
        every = torch.ones_like(kept)
        # all three by one path: with other hooks, rounding differs
        circuit, empty, full = (
            test.logit_diffs(keep, hooks=held)[0] for keep in (kept, none, every)
        )
        random = small.logit_diffs(sets, hooks=held_few).double()
        m_empty, m_full = (x[: len(small.batch)].double().mean().expand(len(random))
                            for x in (empty, full))  # fmt: skip
        measure("frozen_loss", "", [F.softplus(-circuit)], null=F.softplus(-random).mean(1))
        measure(
            "frozen_f", "", [circuit, empty, full], statistic=f_statistic,
            examples=prompt_shares(circuit, empty, full, empty),
            null=normalised(random.mean(1), m_empty, m_full),
        )  # fmt: skip
        free = test.circuit_logit_diffs, test.empty_logit_diffs
        measure(
            "frozen_share", "", [circuit, empty, *free],
            statistic=lambda means: (means[:, 0] - means[:, 1]) / (means[:, 2] - means[:, 3]),
            examples=prompt_shares(circuit, empty, *free),
        )  # fmt: skip
        if test.norms:
            notes.append("frozen_loss, frozen_f: the circuit was found with frozen norms")
    if config.verdict_only:
        return CheckResult(tuple(found), notes=tuple(notes))
    drift = norm_drift(test, test.kept[None])
    random_drift = norm_drift(small, sets)
    for name, ratio in drift.items():
        measure("norm_drift", name, [ratio[0]], null=random_drift[name].double().mean(1))
    if not drift:
        notes.append(f"norm_drift: this {type(model).__name__} has no norm scales to read")
    return CheckResult(tuple(found), notes=tuple(notes))


@torch.no_grad()
def norm_drift(
    test: CircuitUnderTest, keep: Bool[Tensor, "mask node"]
) -> dict[str, Float[Tensor, "mask prompt"]]:
    """Norm hook → its scale under each mask over that in the full model, mean over a prompt's
    tokens. Hooks that never fire are left out; norms that were frozen for the circuit are free.
    """
    model: Any = test.model
    device = next(model.parameters()).device
    batch = trimmed(test.batch.to(device))
    real = real_positions(batch.tokens.shape[1], batch.last)
    seen: dict[str, Tensor] = {}

    def read(x: Tensor, hook: Any = None, *, name: str) -> None:
        # some models' norms fire once each for queries, keys and values: they are the same
        seen[name] = x.detach().float().flatten(2).mean(2)

    readers: list[Any] = [(name, partial(read, name=name)) for name in norm_hooks(model)]

    def scales(tokens: Tensor, hooks: Sequence[FwdHook]) -> dict[str, Tensor]:
        seen.clear()
        model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[*hooks, *readers])
        return dict(seen)

    values = test.values.to(device)[None]
    with eval_mode(model), torch.no_grad():
        full = scales(batch.tokens, [])
        found: dict[str, list[Tensor]] = {name: [] for name in full}
        for part in keep.to(device).split(max(1, ROWS // len(batch))):
            mixes = gated_ablation_hooks(test.index, part.float(), values)
            with test.edges_of(part):
                under = scales(tiled(batch, len(part)).tokens, mixes)
            check_fired(mixes)
            for name, rows in found.items():
                ratio = under[name].view(len(part), *full[name].shape) / full[name]
                rows.append((ratio * real).sum(2) / real.sum(1))
    return {name: torch.cat(rows).cpu() for name, rows in found.items()}


CHECK = Check(
    norms,
    "does the circuit live on norms that amplify what is left?",
    order=40,
    criteria=(
        Criterion("norms", "does not live on norms that amplify what is left", "frozen_share", 0.5,
                  at_least=True, divides_by_logit_diff=True),
    ),
)  # fmt: skip
