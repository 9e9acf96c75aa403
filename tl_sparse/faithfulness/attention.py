"""Where heads attend in the circuit's run and in the full model's, how far apart that is, and where
it matters: what is attended to for another task, at another token, is no part of the mechanism."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.ablation import FwdHook
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.tasks.padding import real_positions

PARTS = ("q", "k", "v", "z")
PAIRS = 16  # whose attention patterns are differentiated at once
_HOOK = re.compile(r"blocks\.(\d+)\.attn\.hook_(q|k|v|z)")
_PATTERN = "blocks.{}.attn.hook_pattern"


@dataclass(frozen=True, eq=False)
class HeadPatterns:
    """How far each head's attention in the circuit is from the full model's."""

    heads: pd.DataFrame
    """A row per head that the circuit uses: layer, head, and whether it keeps any node of its
    queries, keys, values and outputs (keeps_q, keeps_k, keeps_v, keeps_z; missing where these are
    no nodes of the universe, which means that they are not ablated)."""
    js: Float[Tensor, "head prompt"]
    """Distance of circuit and model, mean over query positions."""
    js_last: Float[Tensor, "head prompt"]
    """The same at the prompt's last token alone."""
    uniform: Float[Tensor, "head prompt"]
    """Distance of uniform attention from the model's, mean over query positions."""
    uniform_last: Float[Tensor, "head prompt"]
    """The same at the prompt's last token alone."""
    effect: Float[Tensor, "head prompt"]
    """What the model's pattern is worth to the circuit's logit_diff, against even attention, to
    first order (:func:`pattern_effects`); absolute values, summed over query positions."""
    js_felt: Float[Tensor, "head prompt"]
    """Distance of circuit and model, each query position in proportion to that effect (a sum)."""
    uniform_felt: Float[Tensor, "head prompt"]
    """The same of uniform attention."""
    missing: tuple[int, ...]
    """Layers with heads of the circuit whose attention patterns have no hook."""
    unread: tuple[int, ...] = ()
    """Layers whose patterns nothing can be put into, so that all positions count alike."""


def head_patterns(test: CircuitUnderTest) -> HeadPatterns:
    """The patterns of all heads that the circuit uses, compared on the test prompts."""
    frame = used_heads(test)
    layers = sorted(set(frame["layer"]))
    hook_dict: Any = test.model.hook_dict
    missing = tuple(layer for layer in layers if _PATTERN.format(layer) not in hook_dict)
    frame = frame[~frame["layer"].isin(missing)].reset_index(drop=True)
    here = [layer for layer in layers if layer not in missing]
    full = patterns(test, here, ())
    with test.edges_of(test.kept[None]):
        circuit = patterns(test, here, test.circuit_hooks())
        effects = pattern_effects(test, full)
    last = test.batch.last.cpu()
    rows: list[list[Tensor]] = [[] for _ in range(7)]
    for layer, head in frame[["layer", "head"]].itertuples(index=False, name=None):
        mine, theirs = circuit[layer][:, head], full[layer][:, head]
        queries = real_positions(mine.shape[1], last)
        felt = effects[layer][:, head] * queries if layer in effects else queries.double()
        rows[6].append(felt.sum(1))
        for i, other in enumerate((mine, evened(theirs))):
            apart = js_distance(other, theirs)
            rows[3 * i].append((apart * queries).sum(1) / queries.sum(1))
            rows[3 * i + 1].append(apart[torch.arange(len(last)), last])
            rows[3 * i + 2].append((apart * felt).sum(1))
    none = torch.zeros(0, len(last), dtype=torch.float64)
    js, js_last, js_felt, uniform, uniform_last, uniform_felt, effect = (
        torch.stack(row) if row else none for row in rows
    )
    return HeadPatterns(
        frame, js, js_last, uniform, uniform_last, effect, js_felt, uniform_felt, missing,
        tuple(layer for layer in here if layer not in effects),
    )  # fmt: skip


def pattern_effects(
    test: CircuitUnderTest, full: Mapping[int, Float[Tensor, "prompt head query source"]]
) -> dict[int, Float[Tensor, "prompt head query"]]:
    """|Σ_s dm/dp_s (p_s - e_s)|: what the model's pattern p is worth against even attention e.

    m is the circuit's logit_diff, its derivative that of the circuit's own run. Where values are
    the same everywhere, or nothing kept reads what the head writes, the pattern is worth nothing.
    Layers whose patterns are shown by a hook but cannot be set are left out.
    """
    moved: dict[int, Tensor] = {}

    def opener(layer: int) -> FwdHook:
        def add(x: Tensor, hook: Any = None) -> Tensor:
            moved[layer] = torch.zeros_like(x, requires_grad=True)
            return x + moved[layer]

        return _PATTERN.format(layer), add

    apart = {
        layer: torch.stack([x[:, h] - evened(x[:, h]) for h in range(x.shape[1])], 1)
        for layer, x in full.items()
    }
    found: dict[int, Tensor] = {}
    for start in range(0, len(test.batch) // 2, PAIRS):
        batch = test.batch.pairs(start, start + PAIRS)
        moved.clear()
        with eval_mode(test.model):
            hooks = [*test.circuit_hooks(batch), *map(opener, full)]
            m = task_logit_diffs(test.model, batch, hooks)
            if not m.requires_grad:
                return {}
            grads = torch.autograd.grad(m.sum(), list(moved.values()), allow_unused=True)
        for layer, grad in zip(moved, grads, strict=True):
            if grad is None:
                continue
            rows, width = slice(2 * start, 2 * start + len(batch)), grad.shape[2]
            effects = found.setdefault(layer, torch.zeros(apart[layer].shape[:3]).double())
            there = apart[layer][rows, :, :width, :width]
            effects[rows, :, :width] = (grad.double().cpu() * there).sum(-1).abs()
    return found


def patterns(
    test: CircuitUnderTest, layers: Sequence[int], hooks: Sequence[FwdHook]
) -> dict[int, Float[Tensor, "prompt head query source"]]:
    """The attention patterns of some layers on the test prompts, under hooks."""
    found: dict[int, Tensor] = {}

    def reader(layer: int) -> FwdHook:
        def record(x: Tensor, hook: Any = None) -> Tensor:
            found[layer] = x.detach().double().cpu()
            return x

        return _PATTERN.format(layer), record

    with eval_mode(test.model), torch.no_grad():
        task_logit_diffs(test.model, test.batch, [*hooks, *map(reader, layers)])
    return found


def js_distance(
    p: Float[Tensor, "*row source"], q: Float[Tensor, "*row source"]
) -> Float[Tensor, " *row"]:
    """Jensen-Shannon distance of distributions: the root of the divergence in bits, from 0 to 1.

    The rest of a row up to 1 is on the head's attention sink, which counts as one more
    outcome. Source: Endres and Schindelin 2003.
    """
    p, q = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp(min=0)], -1) for x in (p, q))
    middle = (p + q) / 2

    def bits(x: Tensor) -> Tensor:
        return (torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(-1) / torch.log(torch.tensor(2.0))

    return ((bits(p) + bits(q)) / 2).clamp(0, 1).sqrt()


def evened(
    pattern: Float[Tensor, "prompt query source"],
) -> Float[Tensor, "prompt query source"]:
    """The same mass on all sources up to the query, spread evenly; a sink keeps its own."""
    n_query, n_source = pattern.shape[1:]
    seen = torch.ones(n_query, n_source, dtype=pattern.dtype).tril(n_source - n_query)
    return pattern.sum(-1, keepdim=True) * seen / seen.sum(-1, keepdim=True)


def used_heads(test: CircuitUnderTest) -> pd.DataFrame:
    """Heads of whose queries, keys, values or outputs the circuit keeps any node.

    Where heads share keys and values, those kept count for every head that reads them.
    """
    cfg: Any = test.model.cfg
    kept: dict[tuple[int, str], Bool[Tensor, " head"]] = {}
    for hook, piece in test.index.slices.items():
        if (match := _HOOK.fullmatch(hook)) is None:
            continue
        by_head = test.kept[piece].view(-1, cfg.d_head).any(1)
        kept[int(match[1]), match[2]] = by_head.repeat_interleave(cfg.n_heads // len(by_head))
    rows = []
    for layer in sorted({layer for layer, _ in kept}):
        has: dict[str, Int[Tensor, " head"]] = {
            part: kept[layer, part].int() for part in PARTS if (layer, part) in kept
        }
        used = torch.stack(list(has.values())).any(0)
        for head in torch.nonzero(used).flatten().tolist():
            keeps = [bool(has[part][head]) if part in has else pd.NA for part in PARTS]
            rows.append([layer, head, *keeps])
    frame = pd.DataFrame(rows, columns=["layer", "head", *(f"keeps_{part}" for part in PARTS)])
    return frame.astype({"layer": int, "head": int} | {f"keeps_{p}": "boolean" for p in PARTS})
