"""``NodeAblation``: training in which some sequences run with random nodes at their means.

A circuit is the model with all other nodes at their means, which next-token training never asks of
a model: what a circuit does may rest on the whole model being there. An objective of the Trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tl_sparse.ablation.interventions import FwdHook, Intervention
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.json_dataclass import check_fields
from tl_sparse.training.objective import Moment, NextToken

DRAW = 1  # apart from what else is drawn from a step's seed


@dataclass(eq=False, repr=False)  # TransformerLens asks for the repr of every hook that it adds
class ToBatchMean:
    """Hook function: sets nodes of the first sequences to their means over the other ones."""

    keep: Bool[Tensor, "sequence channel"]
    """For each of the first sequences, the nodes that stay as they are."""

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The activation [sequence, pos, ...]; no gradient goes into the means."""
        ablated, others = x[: len(self.keep)], x[len(self.keep) :]
        means = others.detach().mean((0, 1)).reshape(1, -1)
        return torch.cat([Intervention(self.keep, means)(ablated), others])


@dataclass(frozen=True)
class NodeAblation:
    """Next-token cross-entropy (nats per token), on a share of sequences under node ablation.

    Each of these sequences has a rate of its own, uniform between 0 and ``largest``, and each node
    of the site table (``NodeIndex.of``) is removed from it with that probability: at all its
    positions the node is at its mean over the batch's other sequences, as in mean ablation (Gao et
    al. 2025, appendix A.5, there over the pretraining text). All sequences of a step go through one
    forward pass, so that a step costs about what it did. Draws depend on seed and step alone.

    ``Trainer(model, corpus, config, objective=NodeAblation())``; a trained sparse model is trained
    on with a ``constant_sparsity``.
    """

    share: float = 0.2
    """Share of the sequences of each backward pass, rounded, at least one; 0: plain training."""
    largest: float = 1.0
    """The largest rate at which nodes are removed; at 1 as in the suite's random subsets."""

    is_loss_of_model = True
    companions = NextToken.companions

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share} must lie in [0, 1): means are over the rest")
        if not 0 < self.largest <= 1:
            raise ValueError(f"largest={self.largest} must lie in (0, 1]")

    @property
    def columns(self) -> Sequence[str]:
        """The loss of sequences left alone, and that of the ablated ones."""
        return ("loss_as_it_is", "loss_ablated") if self.share else ()

    def description(self) -> dict[str, Any]:
        """The settings; nothing where it is plain training."""
        return {"node_ablation": asdict(self)} if self.share else {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """None."""
        return []

    def start(self, device: torch.device) -> None:
        """Nothing to do."""

    def backward(
        self, model: nn.Module, tokens: Int[Tensor, "sequence pos"], moment: Moment
    ) -> dict[str, Float[Tensor, ""]]:
        """Add the gradient of the mean loss over all sequences.

        Raises:
            ValueError: a single sequence, so that there are no others to take means over.
        """
        if not self.share:
            return NextToken().backward(model, tokens, moment)
        n_ablated = self.n_ablated(len(tokens))
        bare: Any = model.module if isinstance(model, DistributedDataParallel) else model
        index = NodeIndex.of(bare)
        keep = self.draw(n_ablated, index.n_nodes, moment).to(tokens.device)
        hooks: list[FwdHook] = [
            (name, ToBatchMean(keep[:, piece])) for name, piece in index.slices.items()
        ]
        with bare.hooks(fwd_hooks=hooks), moment.autocast():
            losses = model(tokens, return_type="loss", loss_per_token=True)
        loss = losses.mean()
        (loss / moment.parts).backward()
        parts = losses.detach().tensor_split([n_ablated])
        ablated, as_it_is = (part.mean() for part in parts)
        return {"loss": loss.detach(), "loss_as_it_is": as_it_is, "loss_ablated": ablated}

    def n_ablated(self, sequences: int) -> int:
        """How many sequences of a backward pass are ablated: its first ones, as their order says
        nothing."""
        if sequences < 2:
            raise ValueError(
                "node ablation needs at least two sequences in a backward pass, as removed nodes "
                "are set to their means over the others: raise batch_size, or lower accumulation"
            )
        return min(max(1, round(self.share * sequences)), sequences - 1)

    def draw(self, sequences: int, nodes: int, moment: Moment) -> Bool[Tensor, "sequence node"]:
        """Which nodes stay in each ablated sequence."""
        rng = np.random.default_rng((*moment.seed, DRAW))
        rates = self.largest * rng.random((sequences, 1))
        return torch.from_numpy(rng.random((sequences, nodes), dtype=np.float32) >= rates)
