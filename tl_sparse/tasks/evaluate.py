"""How well a model does a task."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from tl_sparse.storage.finite import check_finite
from tl_sparse.tasks.contexts import Split
from tl_sparse.tasks.task import Task, TaskBatch
from tl_sparse.views import frame_html

_CHUNK = 128  # prompts per forward pass


@dataclass(frozen=True, eq=False)
class TaskResult:
    """A model's losses on the prompts of a task."""

    task: str
    """Name of the task."""
    split: Split
    """Which templates and names the prompts use."""
    seed: int
    """Seed of the prompts."""
    losses: Float[Tensor, " prompt"]
    """Two-way cross-entropy of each prompt in nats; chance is ln 2."""
    correct: Bool[Tensor, " prompt"]
    """Whether the correct token got the higher logit."""
    prompts: tuple[str, ...]
    """The prompts; rows 2i and 2i+1 are a pair."""
    answers: tuple[str, ...]
    """The correct token of each, as text."""

    @property
    def loss(self) -> float:
        """Mean two-way cross-entropy in nats."""
        return self.losses.mean().item()

    @property
    def accuracy(self) -> float:
        """Share of prompts whose correct token got the higher logit."""
        return self.correct.float().mean().item()

    def __repr__(self) -> str:
        return (
            f"TaskResult({self.task!r}, {self.split}: loss {self.loss:.3f} nats (chance 0.693), "
            f"accuracy {self.accuracy:.2f}, {len(self.prompts):,} prompts)"
        )

    def _repr_html_(self) -> str:
        frame = self.to_dataframe()[["prompt", "answer", "loss", "correct"]]
        worst = frame.nlargest(8, "loss").reset_index(drop=True)
        line = (
            f"loss {self.loss:.3f} nats, accuracy {self.accuracy:.2f} on {len(frame):,} "
            f"{self.split} prompts; the {len(worst)} with the largest losses"
        )
        return frame_html(self.task, line, worst.assign(answer=worst["answer"].map(repr)))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt: task, split, pair, member, prompt, answer, loss, correct."""
        count = len(self.prompts)
        return pd.DataFrame(
            {
                "task": self.task,
                "split": self.split,
                "pair": [i // 2 for i in range(count)],
                "member": ["AB"[i % 2] for i in range(count)],
                "prompt": self.prompts,
                "answer": self.answers,
                "loss": self.losses.numpy(),
                "correct": self.correct.numpy(),
            }
        )


def task_losses(
    logits_at_last: Float[Tensor, "prompt d_vocab"], batch: TaskBatch
) -> Float[Tensor, " prompt"]:
    """Cross-entropy of each prompt over its two answers only, in nats; ln 2 is chance.

    The paper's loss (Gao et al. 2025, section 2.2); its released tables hold the sum over a pair.
    Differentiable.
    """
    return softplus(-logit_diffs(logits_at_last, batch))


def task_accuracy(
    logits_at_last: Float[Tensor, "prompt d_vocab"], batch: TaskBatch
) -> Bool[Tensor, " prompt"]:
    """Whether each prompt's correct token has the higher logit; a tie is wrong."""
    return logit_diffs(logits_at_last, batch) > 0


def select_last(
    logits: Float[Tensor, "prompt pos d_vocab"], batch: TaskBatch
) -> Float[Tensor, "prompt d_vocab"]:
    """The logits at each prompt's last real token."""
    return logits[torch.arange(len(batch), device=logits.device), batch.last.to(logits.device)]


def evaluate_task(
    model: Callable[..., Tensor],
    task: Task,
    n_pairs: int = 128,
    split: Split = "held_out",
    seed: int = 0,
) -> TaskResult:
    """Run a model on `n_pairs` pairs of a task, without gradients.

    `model` is called as TransformerLens models are, `model(tokens, return_type="logits")`, and
    returns logits of shape [prompt, pos, d_vocab]. The tokens go to the device of its parameters.
    """
    return evaluate_batch(model, task, task.batch(n_pairs, split=split, seed=seed), split, seed)


def evaluate_batch(
    model: Callable[..., Tensor], task: Task, batch: TaskBatch, split: Split, seed: int
) -> TaskResult:
    """As `evaluate_task`, on the batch that `split` and `seed` gave.

    Raises:
        NotFinite: a loss is NaN or infinite; an accuracy from it would look like a model's.
    """
    if isinstance(model, torch.nn.Module) and (first := next(model.parameters(), None)) is not None:
        batch = batch.to(first.device)
    losses, correct = [], []
    with torch.no_grad():
        for part in range(math.ceil(len(batch) / _CHUNK)):
            chunk = batch.pairs(part * _CHUNK // 2, (part + 1) * _CHUNK // 2)
            logits = select_last(model(chunk.tokens, return_type="logits"), chunk)
            losses.append(task_losses(logits.float(), chunk).cpu())
            correct.append(task_accuracy(logits.float(), chunk).cpu())
    check_finite({task.name: torch.cat(losses)}, "the model's task losses")
    return TaskResult(
        task=task.name,
        split=split,
        seed=seed,
        losses=torch.cat(losses),
        correct=torch.cat(correct),
        prompts=batch.prompts,
        answers=batch.answers,
    )


def logit_diffs(
    logits_at_last: Float[Tensor, "prompt d_vocab"], batch: TaskBatch
) -> Float[Tensor, " prompt"]:
    """logit(correct) - logit(incorrect) of each prompt; ``softplus(-logit_diff)`` is its loss."""
    correct = logits_at_last.gather(1, batch.correct_token.to(logits_at_last.device)[:, None])
    incorrect = logits_at_last.gather(1, batch.incorrect_token.to(logits_at_last.device)[:, None])
    return (correct - incorrect).squeeze(1)
