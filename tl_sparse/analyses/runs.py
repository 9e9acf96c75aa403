"""What the analyses share: places and activations of nodes, per-token losses, logit_diffs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.node import Nodes, numbers
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import TaskBatch

CHANCE = math.log(2)
CHUNK_PAIRS = 128  # prompt pairs of one forward pass


def places(index: NodeIndex, nodes: Nodes) -> Int[Tensor, " chosen"]:
    """Where nodes are in a flat vector over all nodes.

    Raises:
        ValueError: none at all, one twice, or one that the index does not have (its choices are
            named).
    """
    found = numbers(index, nodes)
    if not len(found):
        raise ValueError("no nodes: name at least one, such as '4.attn.act_in:1249'")
    if len(found.unique()) < len(found):
        raise ValueError("a node is named twice")
    return found


def channels(x: Tensor) -> Float[Tensor, "batch pos channel"]:
    """A site's activation with its channels in one dimension (q, k and v come by head)."""
    return x.flatten(2)


class Recorder:
    """Keeps the activations of some nodes during a forward pass, by hook."""

    def __init__(self, index: NodeIndex, nodes: Int[Tensor, " node"], device: torch.device) -> None:
        self.index = index
        self.seen: dict[str, Tensor] = {}
        self.where: dict[str, tuple[Tensor, Tensor]] = {}
        self.n_nodes, self.device = len(nodes), device
        for hook, piece in index.slices.items():
            here = torch.nonzero((nodes >= piece.start) & (nodes < piece.stop)).flatten()
            if len(here):
                self.where[hook] = ((nodes[here] - piece.start).to(device), here.to(device))

    def read(self, name: str, x: Tensor, hook: Any = None) -> None:
        """Keep what the site's nodes are."""
        self.seen[name] = channels(self.index.read(name, x.detach()))[..., self.where[name][0]]

    def hooks(self) -> list[Any]:
        """Hooks that keep and change nothing."""
        return [(name, partial(self.read, name)) for name in self.where]

    def taken(self) -> Float[Tensor, "batch pos node"]:
        """What was kept in the last forward pass, in the nodes' order.

        Raises:
            ValueError: one of the hooks has not fired.
        """
        if missing := set(self.where) - set(self.seen):
            raise ValueError(f"hooks {', '.join(sorted(missing))} did not fire before they were "
                             "needed on this model")  # fmt: skip
        first = next(iter(self.seen.values()))
        joined = first.new_zeros(*first.shape[:2], self.n_nodes)
        for name, (_, here) in self.where.items():
            joined[..., here] = self.seen[name]
        return joined


@torch.no_grad()
def prompt_logit_diffs(
    model: nn.Module, batch: TaskBatch, hooks: Sequence[FwdHook] = ()
) -> Float[Tensor, " prompt"]:
    """The logit_diff of each prompt under hooks, in chunks and without gradients, on the CPU."""
    pairs = len(batch) // 2
    parts = (batch.pairs(at, at + CHUNK_PAIRS) for at in range(0, pairs, CHUNK_PAIRS))
    return torch.cat([task_logit_diffs(model, part, hooks).cpu() for part in parts])


@torch.no_grad()
def token_losses(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    hooks: Sequence[FwdHook] = (),
    batch_size: int = 64,
) -> Float[Tensor, "sequence next"]:
    """Next-token cross-entropy (nats) at every position but the last, on the CPU.

    Column ``i`` is the loss of predicting token ``i + 1``.

    Raises:
        ValueError: no sequences, or sequences of fewer than two tokens.
    """
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be [sequence, at least 2], not {tuple(tokens.shape)}")
    run: Any = model
    found = []
    for part in tokens.to(device_of(model)).split(batch_size):
        logits = run.run_with_hooks(part, return_type="logits", fwd_hooks=list(hooks))
        scores, wanted = logits[:, :-1].float().flatten(0, 1), part[:, 1:].flatten()
        found.append(F.cross_entropy(scores, wanted, reduction="none").view(len(part), -1).cpu())
    return torch.cat(found)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def accuracy(losses: Float[Tensor, " prompt"]) -> float:
    """Share of two-way losses below ln 2: the right answer has the higher logit."""
    return float((losses < CHANCE).float().mean())


def by_sequence(losses: Float[Tensor, "sequence next"]) -> tuple[float, float]:
    """Mean over all tokens, and its standard error from the spread between sequences.

    Tokens of one sequence are not independent; sequences are taken to be. NaN for a single one.
    """
    means = losses.double().mean(1)
    error = float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return float(means.mean()), error
