"""The pieces of a run and of its steps: checks, sequences, optimiser, what happens to gradients."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from tl_sparse.data import TokenizedCorpus, bigram_log_probs
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.finite import not_finite
from tl_sparse.training.config import GradientRule, Precision, TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

Starts = Int[np.ndarray, " sequence"]


def make_accelerator() -> Accelerator:
    """What knows the device and the other processes, if a launcher started several."""
    from accelerate import Accelerator  # slow to import, and needed for training alone

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # without a GPU, accelerate joins the processes only if told to use the CPU; else each of them
    # would be a run of its own
    has_gpu = torch.cuda.is_available() or torch.xpu.is_available()
    return Accelerator(cpu=several and not has_gpu)


def check_run(
    model: SparseTransformer,
    corpus: TokenizedCorpus,
    config: TrainingConfig,
    context: int,
    processes: int,
) -> None:
    """Refuse a run that cannot go well, before anything is touched.

    Raises:
        ValueError: context, corpus, tokenizer or batch size do not fit together.
    """
    if not 2 <= context <= model.config.n_ctx:
        raise ValueError(
            f"context={context} must be from 2 to the model's n_ctx={model.config.n_ctx}"
        )
    for split in ("train", "validation"):
        if len(getattr(corpus, split)) < context:
            raise ValueError(
                f"the corpus' {split} part has {len(getattr(corpus, split))} tokens, fewer than "
                f"one sequence of {context}; add text or lower context"
            )
    if len(corpus.tokenizer) > model.config.d_vocab:
        raise ValueError(
            f"the corpus' tokenizer has {len(corpus.tokenizer)} tokens, more than the model's "
            f"d_vocab={model.config.d_vocab}"
        )
    if len(corpus.tokenizer) > model.config.n_logits:
        raise ValueError(
            f"the corpus' tokenizer has {len(corpus.tokenizer)} tokens, and the model predicts "
            f"d_vocab_out={model.config.d_vocab_out} of them only"
        )
    if model.tokenizer is not None and model.tokenizer.get_vocab() != corpus.tokenizer.get_vocab():
        raise ValueError(
            "the model's tokenizer is not the corpus': make the model with corpus.tokenizer"
        )
    if config.batch_size % (processes * config.accumulation):
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of processes x accumulation = "
            f"{processes * config.accumulation}"
        )


@torch.no_grad()
def fill_bigram_table(model: SparseTransformer, corpus: TokenizedCorpus, smoothing: float) -> None:
    """Put smoothed corpus log-probabilities into a model's bigram table, if it has an empty one."""
    if model.config.bigram_table == "none" or bool(model.bigram.W_B.any()):
        return
    table = bigram_log_probs(corpus, smoothing)
    model.bigram.W_B[: len(table), : len(table)] = table.to(model.W_E.device)


def training_starts(seed: int, step: int, batch_size: int, tokens: int, context: int) -> Starts:
    """Where the sequences of a step start: a function of seed and step alone, whatever the process.

    Every start from 0 to ``tokens - context`` is equally likely.
    """
    rng = np.random.default_rng([seed, step])
    return rng.integers(0, tokens - context, batch_size, endpoint=True)


def make_optimizer(
    model: nn.Module, config: TrainingConfig, more: Iterable[dict[str, Any]] = ()
) -> torch.optim.AdamW:
    """AdamW; matrices decay, other parameters do not, a learned bigram table keeps the base lr.

    The first group holds the matrices, if they are trained; each group says whether the 1/sqrt(L0)
    factor of the learning rate applies to it (``sharkfin``). Groups besides the model's (``more``)
    have ``params``, ``weight_decay``, and ``lr_share``, by which the base lr is multiplied.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    table = [p for n, p in trained.items() if n.endswith("W_B")]
    matrices = [p for n, p in trained.items() if ".W_" in n and not n.endswith("W_B")]
    chosen = {id(p) for p in [*table, *matrices]}
    rest = [p for p in trained.values() if id(p) not in chosen]
    decay = 0.0 if config.decay_after_projection else config.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay, "sharkfin": True},
        {"params": rest, "weight_decay": 0.0, "sharkfin": True},
        # under the 1/sqrt(L0) factor a learned table grows without bound
        {"params": table, "weight_decay": 0.0, "sharkfin": False},
        *({"sharkfin": False, **group} for group in more),
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, eps=config.eps,
        betas=(config.beta1, config.beta2), fused=True,
    )  # fmt: skip


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainingConfig, step: int) -> None:
    """Give each group the learning rate of a step (0-based)."""
    for group in optimizer.param_groups:
        lr = config.lr_at(step) if group["sharkfin"] else config.base_lr_at(step)
        group["lr"] = lr * group.get("lr_share", 1.0)


@torch.no_grad()
def apply_gradient_rule(parameters: Iterable[nn.Parameter], rule: GradientRule) -> None:
    """Normalise, or clip, the root mean square over all gradients to 1 (§A.2, Fig. 16)."""
    if rule == "none":
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:  # of a frozen model
        return
    total = torch.stack(torch._foreach_norm(grads)).norm()
    rms = total / math.sqrt(sum(g.numel() for g in grads))
    # the released script's guard against gradients that are all zero
    scale = 1.0 / (rms + 1e-5)
    torch._foreach_mul_(grads, scale.clamp(max=1.0) if rule == "clip" else scale)


def share_weights(modules: Iterable[nn.Module]) -> None:
    """Give every process the first one's weights."""
    for parameter in (p for module in modules for p in module.parameters()):
        torch.distributed.broadcast(parameter.data, 0)


def average_gradients(modules: Iterable[nn.Module]) -> None:
    """Replace gradients by their means over processes, if there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for parameter in (p for module in modules for p in module.parameters()):
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


@torch.no_grad()
def decay_matrices(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> None:
    """Decoupled weight decay of the matrices, by hand, after the projection (released script)."""
    matrices = optimizer.param_groups[0]
    torch._foreach_mul_(matrices["params"], 1.0 - matrices["lr"] * config.weight_decay)


def check_finite(model: nn.Module, step: int) -> None:
    """Raise RuntimeError if a weight is NaN or infinite."""
    if not_finite(dict(model.named_parameters())):
        raise RuntimeError(
            f"weights are no longer finite at step {step}: lower lr, or use gradient='normalise'"
        )


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where asked for, or by default on a CUDA GPU that has it."""
    wanted = precision
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return torch.autocast(device.type, torch.bfloat16) if wanted == "bf16" else nullcontext()
