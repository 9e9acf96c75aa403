"""Other ways to score the same nodes: gradients, integrated gradients, exact patching, EAP-IG.

Source: attribution patching: Nanda 2023; integrated gradients and exact effects of features: Marks
et al. 2024 (arXiv 2403.19647); EAP: Syed et al. 2023 (arXiv 2310.10348); EAP-IG: Hanna et al. 2024
(arXiv 2403.17806).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.ablation import FwdHook
from tl_sparse.nodes.prompts import Prompts, PromptsLike, prompts_of
from tl_sparse.tracing.attribution import attribute
from tl_sparse.tracing.gate import Gate, GateState, parse_id
from tl_sparse.tracing.roots import Root
from tl_sparse.tracing.run import run
from tl_sparse.tracing.splice import Splice, keep_in
from tl_sparse.tracing.spliced_model import SplicedModel, World
from tl_sparse.tracing.spliced_run import SplicedRun

Method = Literal["attribution", "gradient", "ig", "eap_ig", "exact"]
Values = dict[str, Tensor]  # site -> [pos, feature]


def baseline_scores(
    splice: Splice,
    prompt: PromptsLike | Prompts,
    root: Root,
    method: Method,
    *,
    other: PromptsLike | Prompts | None = None,
    only: Collection[str] | None = None,
    world: World = "spliced",
    steps: int = 10,
    batch_size: int = 32,
) -> pd.DataFrame:
    """A score for every feature that is active in a prompt: its id (as in traced graphs) and score.

    A feature's score is what the root is thought to lose if the feature goes from its activation to
    0, or to what it is in another prompt (``other``), with which features count that are active
    there alone. In the linear world all methods are one and the same; how far they are apart
    elsewhere is what holding patterns, norms and active sets constant leaves out.

    Args:
        splice: The model and its dictionaries.
        prompt: One prompt.
        root: What is scored, a function of the logits.
        method: ``attribution``: gradient times change with everything frozen, the trace with an
            open gate. ``gradient``: the same with nothing frozen: attribution patching, and the sum
            of EAP's scores of a node's edges. ``ig``: the mean of the gradients while all features
            of the site grow to what they are, in ``steps`` (left rule). ``eap_ig``: the mean of the
            gradients while the token embeddings grow to what they are. ``exact``: what the root
            loses; a run for each feature.
        other: A prompt of as many tokens. EAP-IG without it starts at embeddings of 0.
        only: Ids of the features that are scored, instead of all: ``exact`` is a run for each.
        world: In which world features are changed; ``attribution`` knows only the linear one.
        steps: Of ``ig`` and ``eap_ig``.
        batch_size: Copies of the prompt in one run.

    Raises:
        ValueError: more prompts, one of another length, an unknown method, a root inside the
            model, ids in ``only`` that are not among the features, or ``eap_ig`` in the linear
            world, whose gradients do not depend on the input.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}; choose from {', '.join(get_args(Method))}")
    if method == "eap_ig" and world == "linear":
        raise ValueError("eap_ig: gradients of the linear world do not depend on the input; "
                         "choose world='spliced' or 'original'")  # fmt: skip
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps={steps} and batch_size={batch_size} must be at least 1")
    prompts = _one(splice, prompt, "prompt")
    against = None if other is None else _one(splice, other, "other")
    if against is not None and int(against.last[0]) != int(prompts.last[0]):
        raise ValueError(f"other has {int(against.last[0]) + 1} tokens, and the prompt "
                         f"{int(prompts.last[0]) + 1}")  # fmt: skip
    if root.hooks(splice) or hasattr(root, "site"):
        raise ValueError("baseline_scores takes roots of the logits: Logit, LogitDiff, LogProb ...")
    if method == "attribution" and against is None and only is None:
        return _table(_attributions(splice, prompts, root))
    model = SplicedModel(splice, "linear" if method == "attribution" else world)
    was = _features(model, prompts)
    then = {n: torch.zeros_like(x) for n, x in was.items()}
    if against is not None:
        then = _features(model, against)
    scored = {n: (was[n] != 0) | (then[n] != 0) for n in was}
    if only is not None:
        scored = _chosen(scored, only)
    job = _Job(model, prompts, against, root, was, then, scored, steps, batch_size)
    scorer = {"attribution": _gradients, "gradient": _gradients, "ig": _integrated,
              "eap_ig": _input_integrated, "exact": _exact}[method]  # fmt: skip
    return _table(scorer(job))


def _chosen(scored: Values, only: Collection[str]) -> Values:
    """Of the features that could be scored those of these ids."""
    kept = {site: torch.zeros_like(mask) for site, mask in scored.items()}
    for name in only:
        site, pos, index = parse_id(name)
        mask = scored.get(site)
        inside = mask is not None and pos is not None and pos < len(mask) and index < len(mask[0])
        if mask is None or not inside or not bool(mask[pos, index]):
            raise ValueError(f"only: {name!r} is none of the features that are active here")
        kept[site][pos, index] = True
    return kept


Flat = dict[str, tuple[Tensor, Tensor, Tensor]]  # site -> position, feature, score of each node


@dataclass(frozen=True, eq=False, repr=False)
class _Job:
    """What is scored, and how."""

    model: SplicedModel
    prompts: Prompts
    other: Prompts | None
    root: Root
    was: Values
    then: Values
    scored: Values
    steps: int
    batch_size: int

    def at(self, site: str) -> tuple[Int[Tensor, " node"], Int[Tensor, " node"]]:
        """Position and number of the features that are scored."""
        pos, feature = self.scored[site].nonzero(as_tuple=True)
        return pos, feature

    def of_gradient(self, site: str, gradient: Float[Tensor, "pos feature"]) -> Any:
        """Scores from a gradient: times what each feature changes by."""
        pos, feature = self.at(site)
        score = gradient * (self.was[site] - self.then[site])
        return pos, feature, score[pos, feature]

    def values(self, copies: int, hooks: list[FwdHook]) -> Float[Tensor, " copy"]:
        """The root in several runs of the prompt, changed by hooks."""
        tokens = self.prompts.tokens.expand(copies, -1)
        logits = self.model.run_with_hooks(tokens, fwd_hooks=hooks)
        state = GateState(Gate.off(), torch.zeros(copies))
        last = self.prompts.last.expand(copies)
        return self.root.of(SplicedRun(self.model.splice, tokens, last, state, logits))

    def shares(self) -> Iterator[Float[Tensor, " copy"]]:
        """How far to go from ``then`` to ``was``, in batches of runs."""
        for first in range(0, self.steps, self.batch_size):
            last = min(first + self.batch_size, self.steps)
            yield torch.arange(first, last, device=self.prompts.tokens.device) / self.steps


def _one(splice: Splice, prompt: PromptsLike | Prompts, what: str) -> Prompts:
    prompts = prompts_of(splice.model, prompt, what)
    if len(prompts) != 1:
        raise ValueError(f"baseline_scores takes one prompt, not {len(prompts)}")
    return prompts


def _table(scores: Flat) -> pd.DataFrame:
    tables = []
    for name, (pos, feature, score) in scores.items():
        ids = [f"{name}/{p}/{i}" for p, i in zip(pos.tolist(), feature.tolist(), strict=True)]
        tables.append(pd.DataFrame({"id": ids, "score": score.detach().cpu().double().numpy()}))
    return pd.concat(tables, ignore_index=True)


def _attributions(splice: Splice, prompts: Prompts, root: Root) -> Flat:
    opened = run(splice, prompts.tokens, prompts.last, Gate.off())
    scores = attribute(opened, root).score
    return {name: (site.active.pos, site.active.feature, scores[name])
            for name, site in opened.sites.items()}  # fmt: skip


@torch.no_grad()
def _features(model: SplicedModel, prompts: Prompts) -> Values:
    """Activations of every site's features in a prompt."""
    found: Values = {}
    hooks = [keep_in(found, point) for point in model.names.values()]
    model.run_with_hooks(prompts.tokens, fwd_hooks=hooks)
    return {site: found[point][0].clone() for site, point in model.names.items()}


def _with_gradients(job: _Job, copies: int, before: list[FwdHook]) -> Values:
    """Gradient of the root at every site's features, summed over some runs."""
    kept: dict[str, Tensor] = {}

    def keep(site: str) -> Any:
        def hook(x: Tensor, hook: Any = None) -> Tensor:
            kept[site] = x if x.requires_grad else x.detach().requires_grad_()
            return kept[site]

        return job.model.names[site], hook

    with torch.enable_grad():
        value = job.values(copies, [*before, *(keep(site) for site in job.was)])
    found = torch.autograd.grad(value.sum(), [kept[site] for site in job.was])
    return {site: gradient.sum(0) for site, gradient in zip(job.was, found, strict=True)}


def _gradients(job: _Job) -> Flat:
    found = _with_gradients(job, 1, [])
    return {site: job.of_gradient(site, gradient) for site, gradient in found.items()}


@torch.no_grad()
def _embeddings(job: _Job, prompts: Prompts) -> Float[Tensor, "1 pos d_model"]:
    found: dict[str, Tensor] = {}
    job.model.run_with_hooks(prompts.tokens, fwd_hooks=[keep_in(found, "hook_embed")])
    return found["hook_embed"]


def _input_integrated(job: _Job) -> Flat:
    whole = _embeddings(job, job.prompts)
    start = torch.zeros_like(whole) if job.other is None else _embeddings(job, job.other)
    total = {site: torch.zeros_like(x) for site, x in job.was.items()}
    for share in job.shares():
        between = start + share.to(whole)[:, None, None] * (whole - start)

        def put(x: Tensor, hook: Any = None, between: Tensor = between) -> Tensor:
            return between

        found = _with_gradients(job, len(share), [("hook_embed", put)])
        total = {site: total[site] + gradient for site, gradient in found.items()}
    return {site: job.of_gradient(site, x / job.steps) for site, x in total.items()}


def _integrated(job: _Job) -> Flat:
    scores = {}
    for site, point in job.model.names.items():
        total = torch.zeros_like(job.was[site])
        for share in job.shares():
            leaf: list[Tensor] = []
            start = job.then[site]

            def grow(
                x: Tensor,
                hook: Any = None,
                share: Any = share,
                start: Any = start,
                leaf: Any = leaf,
            ) -> Tensor:
                between = start + share.to(x)[:, None, None] * (x - start)
                leaf.append(between.detach().requires_grad_())
                return leaf[0]

            with torch.enable_grad():
                value = job.values(len(share), [(point, grow)])
            total += torch.autograd.grad(value.sum(), leaf)[0].sum(0)
        scores[site] = job.of_gradient(site, total / job.steps)
    return scores


@torch.no_grad()
def _exact(job: _Job) -> Flat:
    clean = job.values(1, [])
    scores = {}
    for site, point in job.model.names.items():
        at_pos, at_feature = job.at(site)
        lost = [clean[:0]]
        for first in range(0, len(at_pos), job.batch_size):
            pos = at_pos[first : first + job.batch_size]
            feature = at_feature[first : first + job.batch_size]
            value = job.then[site][pos, feature]

            def put(x: Tensor, hook: Any = None, at: Any = (pos, feature, value)) -> Tensor:
                x = x.clone()
                x[torch.arange(len(x), device=x.device), at[0], at[1]] = at[2]
                return x

            lost.append(clean - job.values(len(pos), [(point, put)]))
        scores[site] = (at_pos, at_feature, torch.cat(lost))
    return scores
