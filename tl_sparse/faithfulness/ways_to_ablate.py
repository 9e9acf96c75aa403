"""Ways to ablate the rest of a circuit, as what removed nodes are set to for a batch of prompts."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparse.ablation import (
    KINDS,
    Replacement,
    ResampleSources,
    activation_means,
    aligned_sources,
)
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.kinds import AblationKind
from tl_sparse.faithfulness.controls import on
from tl_sparse.faithfulness.under_test import CircuitUnderTest
from tl_sparse.tasks import TaskBatch

MEAN_PAIRS = 256  # train pairs that task means are taken over
MOST_FLOATS = 2**27  # of resampled activations in memory at once
OF_PROMPTS = ("other_answer", "other_prompt")
"""Ways to ablate by the task's own prompts."""
Values = Callable[[TaskBatch], Replacement]


def ablations(test: CircuitUnderTest, notes: list[str]) -> dict[str, Values]:
    """Every way to ablate but the learned one, as what removed nodes are set to for a batch.

    What cannot be had is left out, and a line about it added to ``notes``.
    """
    as_pruned, text = test.values, test.tokens
    found: dict[str, Values] = {"as_pruned": lambda batch: as_pruned}
    longest = int(max(test.batch.last.max(), test.train_batch.last.max())) + 1
    left_out: dict[str, list[str]] = {}
    for name, kind in KINDS.items():
        if text is None and kind.needs_text:
            left_out.setdefault("no text of the pretraining distribution", []).append(name)
        elif text is not None and kind.sources is not None and text.shape[1] < longest:
            why = (
                f"sequences of {text.shape[1]} tokens are shorter than the longest prompt, of "
                f"{longest}"
            )
            left_out.setdefault(why, []).append(name)
        else:
            with eval_mode(test.model):
                found[name] = values_of(test, kind, longest)
    notes += [f"{', '.join(names)}: {why}" for why, names in left_out.items()]
    return found | {name: of_prompts(test, name == "other_answer") for name in OF_PROMPTS}


def of_prompts(test: CircuitUnderTest, partner: bool) -> Values:
    """Removed nodes as on the pair's other prompt, or on train prompts that are drawn by text."""
    known, model = test.train_batch, test.model

    def sources(batch: TaskBatch) -> ResampleSources:
        rows = torch.arange(len(batch)) ^ 1
        if not partner:
            rows = resampled_sequences(batch.prompts, len(known), test.config.seed)
        source = batch if partner else known
        with eval_mode(model):
            return aligned_sources(
                model, source.tokens[rows], source.last[rows], batch.last, test.index,
                test.circuit.means.model_fingerprint,
            )  # fmt: skip

    return sources


def values_of(test: CircuitUnderTest, kind: AblationKind, longest: int) -> Values:
    """What a kind of ablation sets removed nodes to, for a batch."""
    model, index, text = test.model, test.index, test.tokens
    if kind.means is not None:
        over_text = test.circuit.means
        if text is not None and kind.needs_text:
            over_text = activation_means(model, text, index=index)
        known = test.train_batch.pairs(0, MEAN_PAIRS)
        values = kind.means(model, over_text, known).values.cpu()
        return lambda batch: values
    assert kind.sources is not None
    assert text is not None
    sources, tokens = kind.sources, text
    if kind.pooled:
        one = sources(model, tokens[:, :longest], index=index)
        return lambda batch: one.take(torch.zeros(len(batch), dtype=torch.int64))

    def drawn(batch: TaskBatch) -> ResampleSources:
        rows = tokens[resampled_sequences(batch.prompts, len(tokens), test.config.seed)]
        with eval_mode(model):
            return sources(model, rows[:, : int(batch.last.max()) + 1], index=index)

    return drawn


def resampled_sequences(
    prompts: tuple[str, ...], sequences: int, seed: int
) -> Int[Tensor, " prompt"]:
    """A random sequence for each prompt: by its text, so that its place in a batch is no matter."""
    drawn = [random.Random(f"{seed} {prompt}").randrange(sequences) for prompt in prompts]
    return torch.tensor(drawn)


def logit_diffs_under(
    test: CircuitUnderTest, keep: Bool[Tensor, "mask node"], values: Values
) -> Float[Tensor, "mask prompt"]:
    """Logit differences of a test's prompts, so many at a time that what they are resampled from
    fits in memory."""
    batch = test.batch
    floats = 2 * (int(batch.last.max()) + 1) * test.index.n_nodes
    pairs, all_pairs = max(1, MOST_FLOATS // floats), len(batch) // 2
    if pairs >= all_pairs:
        return test.logit_diffs(keep, values(batch))
    parts = [on(test, batch.pairs(at, at + pairs)) for at in range(0, all_pairs, pairs)]
    return torch.cat([part.logit_diffs(keep, values(part.batch)) for part in parts], 1)
