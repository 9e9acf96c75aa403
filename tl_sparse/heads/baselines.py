"""``baseline``: other ways to score heads, on the same heads and prompts as codes are scored on.

Some intervene (patching, ACDC, subnetwork probing), some follow gradients (attribution patching,
EAP, HISP), some only look at the heads' outputs (norm, difference of means, linear probe).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import ResampleSources, ablation_hooks, gated_ablation_hooks
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits.gates import HardConcreteGates
from tl_sparse.heads.gradients import Scores, attribution, eap, eap_ig, hisp
from tl_sparse.heads.prompt_pairs import PromptPairs
from tl_sparse.nodes import patch_nodes
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.finite import check_finite
from tl_sparse.views.display import frame_html

THRESHOLDS = tuple(10.0 ** (-3 + 0.3 * i) for i in range(11))
"""Share of the logit difference that patching a head may cost for ACDC to patch it: 0.001 to 1."""
FEW_PROMPTS = 16
"""Pairs of which ACDC and SP, which take hundreds of forward passes, use no more."""
SP_STEPS, SP_LR, SP_PENALTY = 60, 0.2, 1.0


@dataclass(frozen=True, eq=False)
class HeadScores:
    """A number per head by which heads can be ranked, the most important ones highest."""

    scores: Float[Tensor, "layer head"]
    """The score of each head; what it is, ``method`` says."""
    method: str
    """How the scores came about."""
    seconds: float
    """Time it took, activations included."""

    def to_dataframe(self) -> pd.DataFrame:
        """A row per head, best first: layer, head, score."""
        layers, heads = self.scores.shape
        frame = pd.DataFrame(
            [(layer, head) for layer in range(layers) for head in range(heads)],
            columns=["layer", "head"],
        )
        frame["score"] = self.scores.flatten().tolist()
        return frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)

    def __repr__(self) -> str:
        layers, heads = self.scores.shape
        return f"HeadScores({self.method}, {layers} x {heads} heads, {self.seconds:.2f} s)"

    def _repr_html_(self) -> str:
        return frame_html("Heads scored", repr(self), self.to_dataframe())


def patching(model: nn.Module, pairs: PromptPairs) -> Scores:
    """Activation patching: how much the mean logit difference moves, in absolute value, when one
    head is what it is in the corrupted prompt, at every position."""
    cfg: Any = model.cfg
    heads = [f"L{layer}H{head}.z" for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    found = patch_nodes(model, pairs.clean, pairs.corrupted, heads, positions=None)
    return found.effects.mean(1).abs().view(cfg.n_layers, cfg.n_heads)


@dataclass(frozen=True, eq=False)
class LostShare:
    """What ACDC and SP keep small: how much of the logit difference is lost when heads are patched.

    Of the answers alone, as every other method here: over the whole vocabulary, KL divergence would
    also ask for heads that have nothing to do with them.
    """

    model: nn.Module
    """The model."""
    pairs: PromptPairs
    """Few enough for one forward pass."""
    index: NodeIndex
    """The channels of all heads."""
    head_of: Int[Tensor, " node"]
    """The head of each."""
    sources: ResampleSources
    """What they are in the corrupted prompts."""
    full: Float[Tensor, " prompt"]
    """Logit differences without patching."""
    whole: Float[Tensor, ""]
    """How far patching every head moves the mean."""

    @classmethod
    def of(cls, model: nn.Module, pairs: PromptPairs) -> LostShare:
        """That of the first :data:`FEW_PROMPTS` pairs."""
        pairs = pairs.rows(torch.arange(min(FEW_PROMPTS, len(pairs))))
        index, head_of, sources = pairs.sources(model)
        none = torch.zeros(index.n_nodes, dtype=torch.bool)
        with torch.no_grad():
            full, empty = (
                task_logit_diffs(model, pairs.batch(), ablation_hooks(index, keep, sources))
                for keep in (~none, none)
            )
        whole = (full.mean() - empty.mean()).abs().clamp(min=1e-9)
        return cls(model, pairs, index, head_of, sources, full, whole)

    @property
    def n_heads(self) -> int:
        """Heads of the model."""
        return int(self.head_of.max()) + 1

    def under(self, gates: Float[Tensor, " head"]) -> Float[Tensor, ""]:
        """Mean absolute change of the logit difference over the whole, with each head's output
        mixed with what it is in the corrupted prompt; differentiable in the gates."""
        hooks = gated_ablation_hooks(self.index, gates[None, self.head_of], self.sources)
        found = task_logit_diffs(self.model, self.pairs.batch(), hooks)
        return (found - self.full).abs().mean() / self.whole


def acdc(model: nn.Module, pairs: PromptPairs) -> Scores:
    """ACDC (Conmy et al. 2023) over heads, not over edges: at how many thresholds a head is kept.

    For each of :data:`THRESHOLDS`, heads are visited from the last layer to the first; one whose
    patching from the corrupted prompt loses less of the logit difference than the threshold, beside
    those patched before, stays patched.
    """
    cfg: Any = model.cfg
    known: dict[bytes, float] = {}  # the first steps of neighbouring thresholds are the same
    with eval_mode(model), torch.no_grad():
        lost = LostShare.of(model, pairs)

        def loss(keep: Float[Tensor, " head"]) -> float:
            key = keep.numpy().tobytes()
            if key not in known:
                known[key] = float(lost.under(keep))
            return known[key]

        counts = torch.zeros(lost.n_heads)
        for threshold in THRESHOLDS:
            keep, now = torch.ones(lost.n_heads), 0.0
            for head in reversed(range(lost.n_heads)):
                tried = keep.clone()
                tried[head] = 0.0
                if loss(tried) - now < threshold:
                    keep, now = tried, loss(tried)
            counts += keep
    return counts.view(cfg.n_layers, cfg.n_heads)


def subnetwork_probing(model: nn.Module, pairs: PromptPairs, seed: int = 0) -> Scores:
    """Subnetwork probing (Cao et al. 2021): log α of a HardConcrete gate per head.

    Gates mix a head's output with that on the corrupted prompt, and are trained on the share of the
    logit difference that is lost plus the expected share of open gates.
    """
    cfg: Any = model.cfg
    with eval_mode(model):
        lost = LostShare.of(model, pairs)
        gates = HardConcreteGates(2.0, torch.zeros(lost.n_heads), 1, seed)
        optimizer = torch.optim.Adam([gates.parameter], SP_LR)
        for _ in range(SP_STEPS):
            with torch.enable_grad():
                drawn = gates.draw()
                loss = lost.under(drawn[0]) + SP_PENALTY * gates.l0(drawn)[0] / lost.n_heads
                (gates.parameter.grad,) = torch.autograd.grad(loss, [gates.parameter])
            optimizer.step()
    return gates.scores()[0].detach().view(cfg.n_layers, cfg.n_heads)


INTERVENING: Mapping[str, Callable[[nn.Module, PromptPairs], Scores]] = {
    "patching": patching,
    "attribution": attribution,
    "EAP": eap,
    "EAP-IG": eap_ig,
    "HISP": hisp,
    "ACDC": acdc,
    "SP": subnetwork_probing,
}
"""Methods that run the model on pairs of prompts."""


def head_norm(
    outputs: Float[Tensor, "prompt head d_model"], labels: Bool[Tensor, " prompt"]
) -> Float[Tensor, " head"]:
    """The mean norm of a head's output."""
    return outputs.norm(dim=2).mean(0)


def mean_difference(
    outputs: Float[Tensor, "prompt head d_model"], labels: Bool[Tensor, " prompt"]
) -> Float[Tensor, " head"]:
    """The distance between the mean outputs on positive and negative prompts."""
    return (outputs[labels].mean(0) - outputs[~labels].mean(0)).norm(dim=1)


def standard_difference(
    outputs: Float[Tensor, "prompt head d_model"], labels: Bool[Tensor, " prompt"]
) -> Float[Tensor, " head"]:
    """The same, over how much a head's output varies within positives and within negatives."""
    within = [x.var(0).sum(1) for x in (outputs[labels], outputs[~labels])]
    return mean_difference(outputs, labels) / (0.5 * (within[0] + within[1])).sqrt().clamp(1e-12)


def linear_probe(
    outputs: Float[Tensor, "prompt head d_model"], labels: Bool[Tensor, " prompt"]
) -> Float[Tensor, " head"]:
    """How well a linear probe of one head tells positive from negative prompts it was not fitted
    on: cross-validated AUC of ridge classification, the same folds for every head."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    y = labels.cpu().numpy()
    folds = min(5, int(y.sum()), int((~y).sum()))
    if folds < 2:
        raise ValueError("a linear probe needs at least two positive and two negative prompts")
    split = list(StratifiedKFold(folds, shuffle=True, random_state=0).split(np.zeros(len(y)), y))
    probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=10.0))
    scores = []
    for head in outputs.float().cpu().unbind(1):
        found = cross_val_predict(probe, head.numpy(), y, cv=split, method="decision_function")
        # folds are scored apart: their decision values have no common zero
        scores.append(np.mean([roc_auc_score(y[test], found[test]) for _, test in split]))
    return torch.tensor(scores, dtype=torch.float32)


LOOKING: Mapping[str, Callable[[Tensor, Tensor], Float[Tensor, " head"]]] = {
    "head norm": head_norm,
    "difference of means": mean_difference,
    "standardised difference": standard_difference,
    "linear probe": linear_probe,
}
"""Methods that look at the heads' outputs on positive and negative prompts."""
METHODS = (*INTERVENING, *LOOKING)


def baseline(model: nn.Module, pairs: PromptPairs, method: str) -> HeadScores:
    """Score every head by a method that runs the model on pairs of prompts.

    Works for a ``SparseTransformer``, ``HookedTransformer`` or ``TransformerBridge``. ``EAP`` and
    ``EAP-IG`` read every head's inputs apart, as TransformerLens' switches allow: not of a native
    TransformerBridge.

    Args:
        model: The model.
        pairs: Clean and corrupted prompts.
        method: One of :data:`INTERVENING`: ``patching`` (exact), ``attribution``, ``EAP``,
            ``EAP-IG``, ``HISP``, ``ACDC`` or ``SP``.

    Raises:
        ValueError: unknown method, one that the model does not allow, or scores that are not
            finite.
    """
    if method not in INTERVENING:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(INTERVENING)}")
    return timed(method, lambda: INTERVENING[method](model, pairs))


def baseline_of_outputs(
    outputs: Float[Tensor, "prompt head d_model"],
    labels: Bool[Tensor, " prompt"],
    shape: tuple[int, int],
    method: str,
) -> HeadScores:
    """Score every head by what it writes in positive and in negative prompts; no model is run.

    Args:
        outputs: What each head adds to the residual stream, one vector a prompt.
        labels: Which prompts are positive.
        shape: Layers, and heads a layer.
        method: One of :data:`LOOKING`.

    Raises:
        ValueError: unknown method, outputs of another number of heads, or one class alone.
    """
    if method not in LOOKING:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(LOOKING)}")
    if outputs.shape[1] != shape[0] * shape[1] or len(labels) != len(outputs):
        raise ValueError(
            f"outputs {tuple(outputs.shape)} do not fit {len(labels)} labels and {shape} heads"
        )
    if bool(labels.all()) or not bool(labels.any()):
        raise ValueError("positive and negative prompts are both needed")
    return timed(method, lambda: LOOKING[method](outputs, labels).view(shape))


def timed(method: str, score: Callable[[], Tensor]) -> HeadScores:
    """Scores with the time that they took; ValueError if one is not finite."""
    began = time.perf_counter()
    found = score()
    check_finite({method: found}, "scores of heads")
    return HeadScores(found.cpu(), method, time.perf_counter() - began)
