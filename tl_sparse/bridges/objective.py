"""``BridgeObjective``: what a bridged pair is trained for, as an objective of the Trainer.

One step: the dense model runs without gradients, the sparse model with them; their streams are cut
off at every site. From there bridges, errors and hybrid tails are computed and differentiated, and
what arrives at the cuts goes through the sparse model's own pass once, together with its own loss.
The gradients are those of the plain sum of all losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.bridges.bridges import Bridges
from tl_sparse.bridges.files import read_bridges
from tl_sparse.bridges.losses import Predictions, normalised_error
from tl_sparse.bridges.pair import BridgedPair
from tl_sparse.bridges.path import OTHER, Side, Streams
from tl_sparse.bridges.tails import Entry, groups, tails
from tl_sparse.bridges.training_config import BridgeTrainingConfig
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.training.objective import Moment

ERROR: dict[Side, str] = {"dense": "encoder", "sparse": "decoder"}
"""The error of the bridge that leads away from a model."""
HYBRID: dict[Side, str] = {"dense": "dense_to_sparse", "sparse": "sparse_to_dense"}
"""The hybrid pass that begins in a model."""
FOLDER = "bridges"

Measured = dict[str, Float[Tensor, ""]]


class TrainedBridges(nn.Module):
    """Bridges that are saved and loaded beside the model that they are trained with."""

    def __init__(self, pair: BridgedPair) -> None:
        super().__init__()
        self.bridges: Bridges = pair.bridges
        self.sparse = (pair.sparse,)  # a tuple: it is no submodule of this
        self.dense = fingerprint(pair.dense)
        """Fingerprint of the dense model, which does not change."""

    def made_for(self) -> dict[str, str]:
        """Whose the bridges are: the models as they are now."""
        return {"dense": self.dense, "sparse": fingerprint(self.sparse[0])}

    def save_pretrained(self, folder: Path) -> None:
        """Write the bridges, and whose they are; they stay nobody's while the model trains."""
        self.bridges.made_for = self.made_for()
        try:
            self.bridges.save_pretrained(folder)
        finally:
            self.bridges.made_for = {}

    def load_pretrained(self, folder: Path) -> None:
        """Take the weights from a folder; errors as :meth:`Bridges.from_pretrained`, and ValueError
        if they are of other sizes."""
        config, tensors, _ = read_bridges(folder)
        mine = {name: x.shape for name, x in self.bridges.state_dict().items()}
        if {name: x.shape for name, x in tensors.items()} != mine:
            raise ValueError(f"{folder} holds other bridges than this run's")
        self.bridges.load_state_dict(tensors)
        if self.bridges.config.encoder == "threshold":
            self.bridges.set_sharpness(config.sharpness)


class BridgeObjective:
    """All losses of a bridged pair, in one step (Gao et al. 2025, §2.3 and appendix A.3)."""

    is_loss_of_model = False

    def __init__(self, pair: BridgedPair, config: BridgeTrainingConfig) -> None:
        config.check(pair)
        self.pair, self.config = pair, config
        self.companions: Mapping[str, TrainedBridges] = {FOLDER: TrainedBridges(pair)}
        losses = config.losses
        terms = [n for n in ("language_model", "distillation") if getattr(losses, n)]
        by_site = [n for s in OTHER for n in (ERROR[s], HYBRID[s]) if getattr(losses, n)]
        self.columns: Sequence[str] = (
            *terms, *(f"{term}/{site}" for term in by_site for site in pair.sites)
        )  # fmt: skip

    def description(self) -> dict[str, Any]:
        """The settings, the bridges' form, and which dense model it is."""
        form = asdict(self.pair.bridges.config)
        del form["sharpness"]  # changes with the steps
        companion = self.companions[FOLDER]
        return {
            "bridge_training": asdict(self.config),
            "bridges": form,
            "dense": companion.dense,
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices of bridges, which may decay, and what else they have."""
        bridges, share = self.pair.bridges, self.config.lr_share
        matrices = [p for n, p in bridges.named_parameters() if ".W_" in n]
        rest = [p for n, p in bridges.named_parameters() if ".W_" not in n]
        decay = self.config.weight_decay
        return [
            {"params": matrices, "weight_decay": decay, "lr_share": share},
            {"params": rest, "weight_decay": 0.0, "lr_share": share},
        ]

    def made_for(self) -> dict[str, str]:
        """Fingerprints of the models as they are now."""
        return self.companions[FOLDER].made_for()

    def start(self, device: torch.device) -> None:
        """Put the dense model and the bridges there."""
        self.pair.to(device)
        self.pair.dense.eval()

    def backward(
        self, model: nn.Module, tokens: Int[Tensor, "sequence pos"], moment: Moment
    ) -> Measured:
        """Add the gradients of all losses on one batch; the losses, weighted in sum under "loss",
        and each without its weight."""
        del model  # the pair's sparse one
        pair, trains = self.pair, self.config.train_sparse
        if pair.bridges.config.encoder == "threshold":
            pair.bridges.set_sharpness(sharpness_at(moment.step, moment.steps))
        rows = self.draw(len(tokens), moment)
        with moment.autocast():
            with torch.no_grad():
                dense = pair.streams("dense", tokens)
                target = Predictions.of(dense.logits)
            with nullcontext() if trains else torch.no_grad():
                sparse = pair.streams("sparse", tokens)
                own, measured = self.own_losses(sparse.logits, tokens, target)
        cut = Streams(
            {name: x.detach().requires_grad_(trains) for name, x in sparse.resid.items()},
            sparse.logits.detach(),
        )
        ends: dict[Side, Streams] = {"dense": dense, "sparse": cut}
        total = own.detach()
        for side in OTHER:
            total = total + self.bridged(side, ends, target, tokens, rows, moment, measured)
        if trains:
            self.release(own / moment.parts, sparse, cut)
        if moment.step == 0:
            self.fill()
        return {"loss": total, **{name: x.detach() for name, x in measured.items()}}

    def own_losses(
        self, logits: Tensor, tokens: Tensor, target: Predictions
    ) -> tuple[Float[Tensor, ""], Measured]:
        """The losses of the sparse model by itself: their weighted sum, and each."""
        measured: Measured = {}
        sparse: Any = self.pair.sparse
        if self.config.losses.language_model:
            measured["language_model"] = sparse.loss_fn(logits, tokens)
        if self.config.losses.distillation:
            measured["distillation"] = target.kl(logits)
        terms = [getattr(self.config.losses, name) * x for name, x in measured.items()]
        return sum(terms, start=target.entropy.new_zeros(())), measured

    def bridged(
        self,
        side: Side,
        ends: Mapping[Side, Streams],
        target: Predictions,
        tokens: Tensor,
        rows: Mapping[str, Tensor | None],
        moment: Moment,
        measured: Measured,
    ) -> Float[Tensor, ""]:
        """Add the gradients of the bridges that lead away from a model, and of the hybrid passes
        that begin in it; their weighted losses' sum, and each of them in ``measured``."""
        pair, losses = self.pair, self.config.losses
        error, hybrid = getattr(losses, ERROR[side]), getattr(losses, HYBRID[side])
        entering = [name for name in pair.sites if name in rows] if hybrid else []
        apart = [[name] for name in pair.sites if error and name not in entering]
        scale = hybrid * len(pair.sites) / max(1, len(entering))
        sums = []
        for sites in [*groups(pair, OTHER[side], entering), *apart]:
            with moment.autocast():
                terms, entries = [], {}
                for name in sites:
                    out = pair.bridge(side, name, ends[side].resid[name])
                    if error:
                        found = normalised_error(out, ends[OTHER[side]].resid[name])
                        measured[f"{ERROR[side]}/{name}"] = found
                        terms.append(error * found)
                    if name in entering:
                        chosen = rows[name]
                        of = (out, tokens) if chosen is None else (out[chosen], tokens[chosen])
                        entries[name] = Entry(*of)
                for name, logits in tails(pair, OTHER[side], entries):
                    found = target.rows(rows[name]).kl(logits)
                    measured[f"{HYBRID[side]}/{name}"] = found
                    terms.append(scale * found)
                loss = torch.stack(terms).sum()
            (loss / moment.parts).backward()
            sums.append(loss.detach())
        return torch.stack(sums).sum() if sums else target.entropy.new_zeros(())

    @staticmethod
    def release(own: Tensor, sparse: Streams, cut: Streams) -> None:
        """Let the gradients of the sparse model's own losses, and those that arrived at its cut
        streams, through its forward pass, once."""
        grads = {name: x.grad for name, x in cut.resid.items() if x.grad is not None}
        ends, arrived = [sparse.resid[name] for name in grads], list(grads.values())
        if own.requires_grad:
            ends.append(own)
            arrived.append(torch.ones_like(own))
        torch.autograd.backward(ends, arrived)

    def fill(self) -> None:
        """Give what no loss reaches a gradient of 0, once, so that the optimiser has moments of
        every parameter, and a checkpoint is one of all of them."""
        for parameter in self.pair.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def draw(self, n_rows: int, moment: Moment) -> dict[str, Tensor | None]:
        """The sites whose hybrid passes run in this step, in order, and on which of the sequences;
        None: on all. All parts of a step, in every process, draw the same sites."""
        config, sites = self.config, self.pair.sites
        k = len(sites) if config.sites_per_step is None else config.sites_per_step
        chosen = np.random.default_rng(moment.seed[:2]).choice(len(sites), k, replace=False)
        kept = max(1, round(config.tail_share * n_rows))
        if kept == n_rows:
            return {sites[i]: None for i in sorted(chosen)}
        rng = np.random.default_rng(moment.seed)
        device = next(self.pair.bridges.parameters()).device
        return {
            sites[i]: torch.from_numpy(np.sort(rng.permutation(n_rows)[:kept])).to(device)
            for i in sorted(chosen)
        }


def sharpness_at(step: int, steps: int) -> float | None:
    """Slope of the learned thresholds at a step: it rises from 1 to 100, by equal factors, over the
    first half of training; after that they are hard (None)."""
    progress = 2 * step / steps
    return float(100**progress) if progress < 1 else None
