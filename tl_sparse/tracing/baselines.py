"""Other ways to score the same nodes: gradients, integrated gradients, exact patching.

Source: attribution patching: Nanda 2023; integrated gradients and exact effects of features: Marks
et al. 2024 (arXiv 2403.19647). A feature's counterfactual value is 0.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.nodes.prompts import Prompts, PromptsLike, prompts_of
from tl_sparse.tracing.attribution import attribute
from tl_sparse.tracing.gate import Gate, GateState
from tl_sparse.tracing.roots import Root
from tl_sparse.tracing.run import run
from tl_sparse.tracing.splice import Splice
from tl_sparse.tracing.spliced_model import SplicedModel, World
from tl_sparse.tracing.spliced_run import SplicedRun

Method = Literal["attribution", "gradient", "ig", "exact"]


def baseline_scores(
    splice: Splice,
    prompt: PromptsLike | Prompts,
    root: Root,
    method: Method,
    *,
    world: World = "spliced",
    steps: int = 10,
    batch_size: int = 32,
) -> pd.DataFrame:
    """A score for every feature that is active in a prompt: its id (as in traced graphs) and score.

    In the linear world all four are one and the same; how far they are apart elsewhere is what
    holding patterns, norms and active sets constant leaves out.

    Args:
        splice: The model and its dictionaries.
        prompt: One prompt.
        root: What is scored, a function of the logits.
        method: ``attribution``: gradient times activation with everything frozen, the trace with an
            open gate. ``gradient``: the same with nothing frozen. ``ig``: the mean of the gradients
            while all features of the site grow from 0 to what they are, in ``steps`` (left rule).
            ``exact``: what the root loses if the feature is set to 0; a run for each feature.
        world: In which world features are changed; ``attribution`` knows only the linear one.
        steps: Of ``ig``.
        batch_size: Copies of the prompt in one run.

    Raises:
        ValueError: more prompts, an unknown method, or a root inside the model.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}; choose from {', '.join(get_args(Method))}")
    prompts = prompts_of(splice.model, prompt)
    if len(prompts) != 1:
        raise ValueError(f"baseline_scores takes one prompt, not {len(prompts)}")
    if root.hooks(splice) or hasattr(root, "site"):
        raise ValueError("baseline_scores takes roots of the logits: Logit, LogitDiff, LogProb ...")
    spliced = run(splice, prompts.tokens, prompts.last, biases=False)
    if method == "attribution":
        opened = run(splice, prompts.tokens, prompts.last, Gate.off())
        scores = {name: x.detach() for name, x in attribute(opened, root).score.items()}
    else:
        model = SplicedModel(splice, world)
        scorer = {"gradient": _gradients, "ig": _integrated, "exact": _exact}[method]
        scores = scorer(model, spliced, root, steps, batch_size)
    tables = []
    for name, site in spliced.sites.items():
        active = site.active
        ids = [f"{name}/{p}/{i}" for p, i in
               zip(active.pos.tolist(), active.feature.tolist(), strict=True)]  # fmt: skip
        tables.append(pd.DataFrame({"id": ids, "score": scores[name].cpu().double().numpy()}))
    return pd.concat(tables, ignore_index=True)


def _value(
    spliced: SplicedRun, root: Root, logits: Float[Tensor, "copy pos token"]
) -> Float[Tensor, " copy"]:
    """The root in each of several runs of the prompt."""
    copies = len(logits)
    state = GateState(Gate.off(), torch.zeros(copies))
    tokens, last = spliced.tokens.expand(copies, -1), spliced.last.expand(copies)
    return root.of(SplicedRun(spliced.splice, tokens, last, state, logits))


def _gradients(
    model: SplicedModel, spliced: SplicedRun, root: Root, steps: int, batch_size: int
) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def keep(site: str) -> Any:
        def hook(x: Tensor, hook: Any = None) -> Tensor:
            kept[site] = x if x.requires_grad else x.detach().requires_grad_()
            return kept[site]

        return model.names[site], hook

    hooks = [keep(site) for site in spliced.sites]
    with torch.enable_grad():
        logits = model.run_with_hooks(spliced.tokens, fwd_hooks=hooks)
        value = _value(spliced, root, logits)
    found = torch.autograd.grad(value.sum(), [kept[site] for site in spliced.sites])
    return {
        name: (gradient * kept[name].detach())[0, site.active.pos, site.active.feature]
        for (name, site), gradient in zip(spliced.sites.items(), found, strict=True)
    }


def _integrated(
    model: SplicedModel, spliced: SplicedRun, root: Root, steps: int, batch_size: int
) -> dict[str, Tensor]:
    scores = {}
    for name, site in spliced.sites.items():
        total = torch.zeros((), device=spliced.tokens.device)
        for first in range(0, steps, batch_size):
            share = torch.arange(first, min(first + batch_size, steps), device=total.device) / steps
            leaf: list[Tensor] = []

            def scale(x: Tensor, hook: Any = None, share: Any = share, leaf: Any = leaf) -> Tensor:
                leaf.append((x * share.to(x)[:, None, None]).detach().requires_grad_())
                return leaf[0]

            with torch.enable_grad():
                logits = model.run_with_hooks(
                    spliced.tokens.expand(len(share), -1), fwd_hooks=[(model.names[name], scale)]
                )
                value = _value(spliced, root, logits)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            total = total + gradient.sum(0)
        mean = total / steps
        scores[name] = site.features.before.detach() * mean[site.active.pos, site.active.feature]
    return scores


@torch.no_grad()
def _exact(
    model: SplicedModel, spliced: SplicedRun, root: Root, steps: int, batch_size: int
) -> dict[str, Tensor]:
    clean = _value(spliced, root, spliced.logits.detach())
    scores = {}
    for name, site in spliced.sites.items():
        lost = []
        for first in range(0, len(site.active), batch_size):
            pos = site.active.pos[first : first + batch_size]
            feature = site.active.feature[first : first + batch_size]

            def ablate(x: Tensor, hook: Any = None, at: Any = (pos, feature)) -> Tensor:
                x = x.clone()
                x[torch.arange(len(x), device=x.device), at[0], at[1]] = 0
                return x

            logits = model.run_with_hooks(
                spliced.tokens.expand(len(pos), -1), fwd_hooks=[(model.names[name], ablate)]
            )
            lost.append(clean - _value(spliced, root, logits))
        scores[name] = torch.cat(lost) if lost else clean[:0]
    return scores
