"""Other ways to score the same nodes: gradients, integrated gradients, exact patching, EAP-IG.

Source: attribution patching: Nanda 2023; integrated gradients and exact effects of features: Marks
et al. 2024 (arXiv 2403.19647); EAP: Syed et al. 2023 (arXiv 2310.10348); EAP-IG: Hanna et al. 2024
(arXiv 2403.17806).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.ablation import FwdHook
from tl_sparse.nodes.prompts import Prompts, PromptsLike, prompts_of
from tl_sparse.tasks.padding import real_positions
from tl_sparse.tracing.gate import Gate, GateState
from tl_sparse.tracing.roots import Root
from tl_sparse.tracing.splice import Splice, keep_in
from tl_sparse.tracing.spliced_model import SplicedModel, World
from tl_sparse.tracing.spliced_run import SplicedRun
from tl_sparse.tracing.trace import root_of

Method = Literal["attribution", "gradient", "ig", "eap_ig", "exact"]
Values = dict[str, Tensor]  # site -> [prompt, pos, feature]


def baseline_scores(
    splice: Splice,
    prompts: PromptsLike | Prompts,
    root: Root,
    method: Method,
    *,
    other: PromptsLike | Prompts | None = None,
    only: pd.DataFrame | None = None,
    world: World = "spliced",
    steps: int = 10,
    batch_size: int = 32,
) -> pd.DataFrame:
    """A score for every feature that is active in a prompt: a row with the prompt's number, the
    feature's id (as in traced graphs), site, position and index, and the score.

    A feature's score is what the root is thought to lose if the feature goes from its activation to
    0, or to what it is in another prompt (``other``), with which features count that are active
    there alone. In the linear world all methods are one and the same; how far they are apart
    elsewhere is what holding patterns, norms and active sets constant leaves out.

    Args:
        splice: The model and its dictionaries.
        prompts: One prompt or many; each is scored on its own.
        root: What is scored, a function of the logits.
        method: ``attribution``: gradient times change with everything frozen, the trace with an
            open gate. ``gradient``: the same with nothing frozen: attribution patching, and the sum
            of EAP's scores of a node's edges. ``ig``: the mean of the gradients while all features
            of the site grow to what they are, in ``steps`` (left rule). ``eap_ig``: the mean of the
            gradients while the token embeddings grow to what they are. ``exact``: what the root
            loses; a run for each feature.
        other: As many prompts, each of as many tokens. EAP-IG without them starts at embeddings of
            0.
        only: Rows of an earlier table of the same prompts: the features that are scored, instead of
            all, as ``exact`` is a run for each.
        world: In which world features are changed; ``attribution`` knows only the linear one.
        steps: Of ``ig`` and ``eap_ig``.
        batch_size: Runs of a prompt at a time.

    Raises:
        ValueError: other prompts of other lengths, an unknown method, a root inside the model, rows
            in ``only`` that are not among the features, or ``eap_ig`` in the linear world, whose
            gradients do not depend on the input.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}; choose from {', '.join(get_args(Method))}")
    if method == "eap_ig" and world == "linear":
        raise ValueError("eap_ig: gradients of the linear world do not depend on the input; "
                         "choose world='spliced' or 'original'")  # fmt: skip
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps={steps} and batch_size={batch_size} must be at least 1")
    given = prompts_of(splice.model, prompts, "prompts")
    against = None if other is None else prompts_of(splice.model, other, "other")
    if against is not None and against.last.tolist() != given.last.tolist():
        raise ValueError("other: give as many prompts, each with as many tokens as its partner")
    if root.hooks(splice) or hasattr(root, "site"):
        raise ValueError("baseline_scores takes roots of the logits: Logit, LogitDiff, LogProb ...")
    model = SplicedModel(splice, "linear" if method == "attribution" else world)
    was = _features(model, given)
    then = {n: torch.zeros_like(x) for n, x in was.items()}
    if against is not None:
        then = _features(model, against)
    scored = {n: (was[n] != 0) | (then[n] != 0) for n in was}
    if only is not None:
        scored = _chosen(scored, only)
    job = _Job(model, given, against, root, was, then, scored, steps, batch_size)
    scorer = {"attribution": _gradients, "gradient": _gradients, "ig": _integrated,
              "eap_ig": _input_integrated, "exact": _exact}[method]  # fmt: skip
    return pd.concat([job.table(site, x) for site, x in scorer(job).items()], ignore_index=True)


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

    def table(self, site: str, score: Float[Tensor, "prompt pos feature"]) -> pd.DataFrame:
        """The rows of a site."""
        prompt, pos, index = self.scored[site].nonzero(as_tuple=True)
        numbers = [x.tolist() for x in (prompt, pos, index)]
        ids = [f"{site}/{p}/{i}" for p, i in zip(*numbers[1:], strict=True)]
        values = score.detach()[prompt, pos, index].cpu().double().numpy()
        return pd.DataFrame({"prompt": numbers[0], "id": ids, "site": site, "pos": numbers[1],
                             "index": numbers[2], "score": values})  # fmt: skip

    def of_gradients(self, found: Values) -> Values:
        """Scores from gradients: times what each feature changes by."""
        return {site: x * (self.was[site] - self.then[site]) for site, x in found.items()}

    def values(
        self, rows: Int[Tensor, " run"], hooks: Sequence[FwdHook] = ()
    ) -> Float[Tensor, " run"]:
        """The root in runs of these prompts, changed by hooks."""
        tokens, last = self.prompts.tokens[rows], self.prompts.last[rows]
        logits = self.model.run_with_hooks(tokens, fwd_hooks=list(hooks))
        state = GateState(Gate.off(), torch.zeros(len(rows)))
        root = root_of(self.root, rows.tolist(), len(self.prompts))
        return root.of(SplicedRun(self.model.splice, tokens, last, state, logits))

    def chunks(self, total: int) -> Iterator[Int[Tensor, " run"]]:
        """Numbers from 0, as many as there are runs at a time."""
        numbers = torch.arange(total, device=self.prompts.tokens.device)
        return iter(numbers.split(self.batch_size))

    def steps_of_prompts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Prompts and how far to go [run, 1, 1] from ``then`` to ``was``, for some runs."""
        for numbers in self.chunks(len(self.prompts) * self.steps):
            share = (numbers % self.steps) / self.steps
            yield numbers // self.steps, share.to(next(iter(self.was.values())))[:, None, None]


def _chosen(scored: Values, only: pd.DataFrame) -> Values:
    """Of the features that could be scored those of these rows."""
    kept = {site: torch.zeros_like(mask) for site, mask in scored.items()}
    for row in only[["prompt", "site", "pos", "index"]].itertuples(index=False):
        mask, at = scored.get(row[1]), (row[0], *row[2:])
        if (
            mask is None
            or not all(0 <= i < n for i, n in zip(at, mask.shape, strict=True))
            or (not mask[at])
        ):
            raise ValueError(f"only: {row[1]}/{row[2]}/{row[3]} is none of the features that are "
                             f"active in prompt {row[0]}")  # fmt: skip
        kept[row[1]][at] = True
    return kept


@torch.no_grad()
def _features(model: SplicedModel, prompts: Prompts) -> Values:
    """Activations of every site's features in the prompts, 0 at padding."""
    found: Values = {}
    hooks = [keep_in(found, point) for point in model.names.values()]
    model.run_with_hooks(prompts.tokens, fwd_hooks=hooks)
    real = real_positions(prompts.tokens.shape[1], prompts.last)[..., None]
    return {site: found[point] * real for site, point in model.names.items()}


def _with_gradients(
    job: _Job, rows: Int[Tensor, " run"], before: Sequence[FwdHook], total: Values
) -> None:
    """Add the root's gradients by every site's features, in runs of these prompts."""
    kept: dict[str, Tensor] = {}

    def keep(site: str) -> Any:
        def hook(x: Tensor, hook: Any = None) -> Tensor:
            kept[site] = x if x.requires_grad else x.detach().requires_grad_()
            return kept[site]

        return job.model.names[site], hook

    with torch.enable_grad():
        value = job.values(rows, [*before, *(keep(site) for site in job.was)])
    found = torch.autograd.grad(value.sum(), [kept[site] for site in job.was])
    for site, gradient in zip(job.was, found, strict=True):
        total[site].index_add_(0, rows, gradient)


def _nothing(job: _Job) -> Values:
    return {site: torch.zeros_like(x) for site, x in job.was.items()}


def _gradients(job: _Job) -> Values:
    total = _nothing(job)
    for rows in job.chunks(len(job.prompts)):
        _with_gradients(job, rows, [], total)
    return job.of_gradients(total)


@torch.no_grad()
def _embeddings(job: _Job, prompts: Prompts) -> Float[Tensor, "prompt pos d_model"]:
    found: dict[str, Tensor] = {}
    job.model.run_with_hooks(prompts.tokens, fwd_hooks=[keep_in(found, "hook_embed")])
    return found["hook_embed"]


def _input_integrated(job: _Job) -> Values:
    whole = _embeddings(job, job.prompts)
    start = torch.zeros_like(whole) if job.other is None else _embeddings(job, job.other)
    total = _nothing(job)
    for rows, share in job.steps_of_prompts():
        between = start[rows] + share * (whole - start)[rows]

        def put(x: Tensor, hook: Any = None, between: Tensor = between) -> Tensor:
            return between

        _with_gradients(job, rows, [("hook_embed", put)], total)
    return job.of_gradients({site: x / job.steps for site, x in total.items()})


def _integrated(job: _Job) -> Values:
    total = _nothing(job)
    for site, point in job.model.names.items():
        for rows, share in job.steps_of_prompts():
            leaf: list[Tensor] = []

            def grow(
                x: Tensor, hook: Any = None, at: Any = (job.then[site][rows], share, leaf)
            ) -> Tensor:
                start, share, leaf = at
                leaf.append((start + share * (x - start)).detach().requires_grad_())
                return leaf[0]

            with torch.enable_grad():
                value = job.values(rows, [(point, grow)])
            total[site].index_add_(0, rows, torch.autograd.grad(value.sum(), leaf)[0])
    return job.of_gradients({site: x / job.steps for site, x in total.items()})


@torch.no_grad()
def _exact(job: _Job) -> Values:
    clean = torch.cat([job.values(rows) for rows in job.chunks(len(job.prompts))])
    scores = _nothing(job)
    for site, point in job.model.names.items():
        nodes = job.scored[site].nonzero()
        for chosen in job.chunks(len(nodes)):
            rows, pos, feature = nodes[chosen].unbind(1)
            value = job.then[site][rows, pos, feature]

            def put(x: Tensor, hook: Any = None, at: Any = (pos, feature, value)) -> Tensor:
                x = x.clone()
                x[torch.arange(len(x), device=x.device), at[0], at[1]] = at[2]
                return x

            scores[site][rows, pos, feature] = clean[rows] - job.values(rows, [(point, put)])
    return scores
