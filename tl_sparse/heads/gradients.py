"""Scores of heads from gradients: attribution patching, HISP, EAP and EAP-IG.

Sources: Nanda 2023 (attribution patching); Michel et al. 2019, in the form that Conmy et al. 2023
compare with (HISP); Syed et al. 2023 (EAP); Hanna et al. 2024 (EAP-IG, inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.interventions import FwdHook
from tl_sparse.ablation.logit_diff import logits_at
from tl_sparse.heads.prompt_pairs import PromptPairs
from tl_sparse.nodes.prompts import Prompts

Scores = Float[Tensor, "layer head"]
AT_ONCE = 16  # prompts of one backward pass: inputs of every head's q, k and v are held
IG_STEPS = 5  # as in the MIB benchmark


def gradients(
    model: nn.Module, prompts: Prompts, names: Sequence[str], hooks: Sequence[FwdHook] = ()
) -> dict[str, tuple[Tensor, Tensor]]:
    """Hook name → the activation, and the gradient of each prompt's logit difference by it.

    Raises:
        ValueError: a hook that the model does not have.
    """
    known: Any = model.hook_dict
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{type(model).__name__} has no hook {', '.join(unknown[:3])}")
    assert prompts.correct is not None
    assert prompts.incorrect is not None
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., Tensor]:
        def keep(x: Tensor, hook: Any = None) -> Tensor:
            if not x.requires_grad:  # the model's weights are frozen, and nothing before it asked
                x = x.detach().requires_grad_()
            seen[name] = x
            return x

        return keep

    with torch.enable_grad(), eval_mode(model):
        keepers: list[FwdHook] = [(name, keeper(name)) for name in names]
        logits = logits_at(model, prompts.tokens, prompts.last, [*hooks, *keepers]).float()
        correct, incorrect = (
            logits.gather(1, ids.to(logits.device)[:, None])
            for ids in (prompts.correct, prompts.incorrect)
        )
        if silent := [name for name in names if name not in seen]:
            raise ValueError(f"hooks {', '.join(silent[:3])} never fired on this model")
        found = torch.autograd.grad(
            (correct - incorrect).sum(), [seen[name] for name in names], allow_unused=True
        )
    return {
        name: (seen[name].detach(), torch.zeros_like(seen[name]) if grad is None else grad)
        for name, grad in zip(names, found, strict=True)
    }


@torch.no_grad()
def values(model: nn.Module, prompts: Prompts, names: Sequence[str]) -> dict[str, Tensor]:
    """Hook name → the activation."""
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., Tensor]:
        # a TransformerBridge knows some hooks by two names, and calls them by the other one
        def keep(x: Tensor, hook: Any) -> Tensor:
            seen[name] = x
            return x

        return keep

    with eval_mode(model):
        logits_at(model, prompts.tokens, prompts.last, [(name, keeper(name)) for name in names])
    return seen


def z_hooks(model: nn.Module) -> list[str]:
    """Names of the hooks of heads' outputs before W_O, by layer."""
    cfg: Any = model.cfg
    return [f"blocks.{layer}.attn.hook_z" for layer in range(cfg.n_layers)]


def head_effects(model: nn.Module, pairs: PromptPairs) -> Float[Tensor, "prompt layer head"]:
    """To first order, what patching each head from the corrupted prompt adds to the logit
    difference: its change times the gradient, over all positions."""
    names, found = z_hooks(model), []
    for some in pairs.chunks(AT_ONCE):
        there = values(model, some.corrupted, names)
        here = gradients(model, some.clean, names)
        layers = [
            torch.einsum("bphd,bphd->bh", there[name] - here[name][0], here[name][1])
            for name in names
        ]
        found.append(torch.stack(layers, 1))
    return torch.cat(found).cpu()


def attribution(model: nn.Module, pairs: PromptPairs) -> Scores:
    """Attribution patching: the absolute value of each head's mean first-order effect."""
    return head_effects(model, pairs).mean(0).abs()


def hisp(model: nn.Module, pairs: PromptPairs) -> Scores:
    """Head importance: the mean absolute first-order effect, normalised within each layer."""
    mean = head_effects(model, pairs).abs().mean(0)
    return mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-12)


@contextmanager
def split_inputs(model: nn.Module) -> Iterator[None]:
    """Inside the block every head's queries, keys and values are read through hooks of their own.

    Raises:
        ValueError: the model's class has no such switch, or its attention cannot be read so, as
            that of a native TransformerBridge.
    """
    run: Any = model
    switches = ["use_split_qkv_input"] + ([] if run.cfg.attn_only else ["use_hook_mlp_in"])
    if missing := [name for name in switches if not hasattr(run, f"set_{name}")]:
        raise ValueError(f"{type(model).__name__} has no {', '.join(missing)}: EAP needs it")
    before = {name: bool(getattr(run.cfg, name, False)) for name in switches}
    turned: list[str] = []
    try:
        for name in switches:
            try:
                getattr(run, f"set_{name}")(True)
            except NotImplementedError as error:
                raise ValueError(
                    f"EAP reads every head's inputs apart, which this {type(model).__name__} does "
                    f"not allow ({error}); choose another method"
                ) from error
            turned.append(name)
        yield
    finally:
        for name in turned:
            getattr(run, f"set_{name}")(before[name])


def edge_effects(
    model: nn.Module, pairs: PromptPairs, steps: int = 1
) -> Float[Tensor, "layer head receiver"]:
    """To first order, what each path from a head adds to the logit difference, mean over prompts.

    Receivers are, layer by layer, every head's query, key and value inputs and the MLP, then the
    logits; a receiver that is not behind the head has 0. With several ``steps`` gradients are
    averaged over inputs between the corrupted and the clean embedding (EAP-IG, left rule).
    """
    cfg: Any = model.cfg
    run: Any = model
    layers, names = range(cfg.n_layers), z_hooks(model)
    parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
    reads = [
        (layer, f"blocks.{layer}.{hook}")
        for layer in layers
        for hook in (
            "hook_q_input", "hook_k_input", "hook_v_input",
            *(() if cfg.attn_only else ("hook_mlp_in",)),
        )
    ]  # fmt: skip
    final = f"blocks.{cfg.n_layers - 1}.hook_resid_post"
    total: Tensor | None = None
    with split_inputs(model):
        for some in pairs.chunks(AT_ONCE):
            here, there = (values(model, x, names) for x in (some.clean, some.corrupted))
            with torch.no_grad():
                sent = torch.stack(
                    [
                        torch.einsum(
                            "bphd,hdm->bphm", there[name] - here[name], run.blocks[layer].attn.W_O
                        )
                        for layer, name in enumerate(names)
                    ]
                )
            slopes = mean_gradients(model, some, [*(name for _, name in reads), final], steps)
            found = []
            for layer, name in [*reads, (cfg.n_layers, final)]:
                slope = slopes[name]
                slope = slope if slope.ndim == 4 else slope[:, :, None]
                effects = torch.einsum("lbphm,bpgm->lhg", sent, slope.to(sent))
                same = "mlp" in name and not parallel
                behind = torch.tensor([layer > sender or (same and layer == sender)
                                       for sender in layers])  # fmt: skip
                found.append(effects * behind.to(effects)[:, None, None])
            joined = torch.cat(found, 2)
            total = joined if total is None else total + joined
    assert total is not None
    return (total / len(pairs)).cpu()


def mean_gradients(
    model: nn.Module, pairs: PromptPairs, names: Sequence[str], steps: int
) -> dict[str, Tensor]:
    """The gradients on the clean prompts, or their mean over embeddings on the way there."""
    if steps == 1:
        return {name: grad for name, (_, grad) in gradients(model, pairs.clean, names).items()}
    start, end = (
        values(model, x, ["hook_embed"])["hook_embed"] for x in (pairs.corrupted, pairs.clean)
    )
    total: dict[str, Tensor] = {}
    for step in range(steps):
        between = torch.lerp(start, end, step / steps)

        def put(x: Tensor, hook: Any = None, between: Tensor = between) -> Tensor:
            return between + 0 * x  # of x, so that the gradient has where to go

        for name, (_, grad) in gradients(model, pairs.clean, names, [("hook_embed", put)]).items():
            total[name] = total[name] + grad / steps if name in total else grad / steps
    return total


def eap(model: nn.Module, pairs: PromptPairs) -> Scores:
    """Edge attribution patching: the largest absolute score of a path that leaves the head."""
    return edge_effects(model, pairs).abs().amax(2)


def eap_ig(model: nn.Module, pairs: PromptPairs) -> Scores:
    """EAP with gradients averaged over :data:`IG_STEPS` inputs from corrupted to clean."""
    return edge_effects(model, pairs, IG_STEPS).abs().amax(2)
