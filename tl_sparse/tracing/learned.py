"""A dictionary while it is trained, and what is trained beside a model in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.finite import check_finite
from tl_sparse.storage.tensor_files import read_tensors
from tl_sparse.tracing.dictionary_config import DictionaryTrainingConfig, Place

STATE = "state.safetensors"
SHORT = 0.25  # initial length of encoder columns
STRIDE = 7  # of the tokens that a threshold is found by; odd, so that all positions take part


class LearnedDictionary(nn.Module):
    """One dictionary in training, in units in which inputs and targets have variance 1.

    What is not a weight, but must be there to go on exactly, is a buffer: the scales and means
    that the first batch sets, the running threshold, and for how many steps each feature has not
    been active.
    """

    b_in: Tensor
    scale_in: Tensor
    scale_out: Tensor
    threshold: Tensor
    idle: Tensor
    started: Tensor

    def __init__(self, place: Place, d_in: int, d_out: int, config: DictionaryTrainingConfig,
                 number: int) -> None:  # fmt: skip
        super().__init__()
        self.place, self.config = place, config
        self.k = config.k if place.k is None else place.k
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        rows = torch.randn(place.n_features, d_out, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        is_sae = place.hook_in == place.hook_out
        columns = rows.T if is_sae else torch.randn(d_in, place.n_features, generator=generator)
        # short columns: the sum of k features that begin alike would be far too long
        self.W_enc = nn.Parameter(columns * SHORT / columns.norm(dim=0, keepdim=True))
        self.b_enc = nn.Parameter(torch.zeros(place.n_features))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("b_in", torch.zeros(d_in))
        self.register_buffer("scale_in", torch.ones(()))
        self.register_buffer("scale_out", torch.ones(()))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("idle", torch.zeros(place.n_features))
        self.register_buffer("started", torch.zeros(()))

    @torch.no_grad()
    def start(self, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> None:
        """Set scales and means from a first batch."""
        if bool(self.started):
            return
        for scale, values in ((self.scale_in, x), (self.scale_out, y)):
            variance = (values - values.mean(0)).square().mean()
            scale.copy_(variance.clamp(min=1e-12).rsqrt())
        self.b_in.copy_(x.mean(0) * self.scale_in)
        self.b_dec.copy_(y.mean(0) * self.scale_out)
        self.started.fill_(1.0)

    def losses(
        self, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss on a batch, its error over the target's variance (fvu), active features per
        token (l0) and the share of features that are dead (dead)."""
        self.normalise()
        x, y = x * self.scale_in, y * self.scale_out
        pre = torch.addmm(self.b_enc, x - self.b_in, self.W_enc)
        kept = pre.relu()
        if self.config.activation == "batchtopk":
            kept = kept * (kept > self.batch_threshold(kept.detach()))
        error = y - torch.addmm(self.b_dec, kept, self.W_dec)
        variance = (y - y.mean(0)).square().sum(1).mean()
        fvu = error.square().sum(1).mean() / variance
        loss = fvu
        if self.config.activation == "relu":
            loss = loss + self.config.l1 * kept.sum(1).mean()
        with torch.no_grad():
            active = kept > 0
            self.idle.add_(1.0).mul_(kept.amax(0) <= 0)
        if self.config.aux_weight:
            loss = loss + self.config.aux_weight * self.dead_loss(pre, error.detach())
        return {
            "loss": loss,
            "fvu": fvu.detach(),
            "l0": active.sum(1).float().mean(),
            "dead": self.dead.float().mean(),
        }

    @property
    def dead(self) -> Tensor:
        """[feature]: whether it has not been active for ``dead_after`` steps."""
        return self.idle >= self.config.dead_after

    @torch.no_grad()
    def batch_threshold(self, values: Float[Tensor, "token feature"]) -> Float[Tensor, ""]:
        """What leaves k activations per token, by every seventh token, and its running mean."""
        part = values[::STRIDE]
        count = min(self.k * len(part), part.numel())
        found = part.flatten().topk(count, sorted=False).values.min()
        decay = self.config.threshold_decay if bool(self.threshold) else 0.0
        self.threshold.mul_(decay).add_(found, alpha=1 - decay)
        return found

    def dead_loss(
        self, pre: Float[Tensor, "token feature"], error: Float[Tensor, "token d_out"]
    ) -> Float[Tensor, ""]:
        """How badly the dead features that come closest to activity explain the error."""
        dead = self.dead.nonzero().flatten()
        if not len(dead):
            return error.new_zeros(())
        top = pre[:, dead].topk(min(self.config.aux_k, len(dead)), dim=1)
        made = torch.einsum("tk,tkd->td", top.values, self.W_dec[dead[top.indices]])
        total = error.square().sum(1).mean().clamp(min=1e-12)
        return (error - made).square().sum(1).mean() / total

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every decoder row length 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8))

    @torch.no_grad()
    def drop_parallel_gradient(self) -> None:
        """Take from the decoder's gradient what the next normalisation would take back."""
        grad = self.W_dec.grad
        if grad is not None:
            grad -= (grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Weights in the model's own units; an activation of 1 writes a vector of length 1.

        Features that were dead at the end are left out. ``threshold`` is there with batchtopk.
        """
        alive = ~self.dead
        length = self.W_dec[alive].norm(dim=1) / self.scale_out
        W_enc, b_enc = self.W_enc[:, alive], self.b_enc[alive]
        found = {
            "W_enc": W_enc * self.scale_in * length,
            "b_enc": (b_enc - self.b_in @ W_enc) * length,
            "W_dec": self.W_dec[alive] / self.scale_out / length[:, None],
            "b_dec": self.b_dec / self.scale_out,
        }
        if self.config.activation == "batchtopk":
            found["threshold"] = self.threshold * length
        return {name: tensor.detach().clone() for name, tensor in found.items()}


class LearnedDictionaries(nn.Module):
    """All dictionaries of a run: saved and loaded beside the model that they are trained on."""

    def __init__(
        self, chosen: Sequence[Place], sizes: Mapping[str, int], config: DictionaryTrainingConfig
    ) -> None:
        super().__init__()
        self.each = nn.ModuleList(
            LearnedDictionary(place, sizes[place.hook_in], sizes[place.hook_out], config, number)
            for number, place in enumerate(chosen)
        )

    @property
    def dictionaries(self) -> list[LearnedDictionary]:
        """One for each place."""
        return [each for each in self.each if isinstance(each, LearnedDictionary)]

    def save_pretrained(self, folder: Path) -> None:
        """Write weights and buffers to the bit."""
        state: dict[str, Any] = {n: x.detach().cpu().contiguous().clone()
                                 for n, x in self.state_dict().items()}  # fmt: skip
        check_finite(state, "the dictionaries")
        with atomic_folder(folder) as work:
            save_file(state, work / STATE)

    def load_pretrained(self, folder: Path) -> None:
        """Take weights and buffers from a folder.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they are damaged, or those of other dictionaries.
        """
        tensors, mine = read_tensors(folder / STATE), self.state_dict()
        if {n: x.shape for n, x in tensors.items()} != {n: x.shape for n, x in mine.items()}:
            raise ValueError(f"{folder} holds other dictionaries than this run's")
        check_finite(tensors, str(folder))
        self.load_state_dict(tensors)
