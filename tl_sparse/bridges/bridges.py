"""``Bridges``: the maps between two models' residual streams, one encoder and one decoder a site.

Source: Gao et al. 2025 (arXiv 2511.13653), §2.3 and appendix A.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.bridges.config import BridgesConfig
from tl_sparse.bridges.files import read_bridges, write_bridges
from tl_sparse.bridges.places import BridgeSite
from tl_sparse.model.abstopk import AbsTopK


class LearnedThreshold(nn.Module):
    """Passes a channel where its magnitude exceeds a threshold of its own, which is learned.

    While ``sharpness`` is a number the step is a sigmoid of that slope, so that thresholds have
    gradients; None makes it hard.
    """

    def __init__(self, width: int, sharpness: float | None) -> None:
        super().__init__()
        self.log_threshold = nn.Parameter(torch.full((width,), -1.0))
        self.sharpness = sharpness

    def forward(self, x: Float[Tensor, "... channel"]) -> Float[Tensor, "... channel"]:
        """``x`` with what is below the thresholds zeroed."""
        above = x.abs() - self.log_threshold.exp()
        if self.sharpness is None:
            return x * (above > 0)
        return x * torch.sigmoid(self.sharpness * above)


class Encoder(nn.Module):
    """A dense stream as the sparse model's: a linear map, then what makes it sparse."""

    def __init__(self, config: BridgesConfig) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.empty(config.d_dense, config.d_sparse))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sparse))
        self.sparsify: nn.Module = nn.Identity()
        if config.encoder == "abstopk":
            self.sparsify = AbsTopK(config.density, config.d_sparse)
        elif config.encoder == "threshold":
            self.sparsify = LearnedThreshold(config.d_sparse, config.sharpness)

    def forward(self, x: Float[Tensor, "... d_dense"]) -> Float[Tensor, "... d_sparse"]:
        """The sparse model's stream."""
        out: Tensor = self.sparsify(F.linear(x.to(self.W_enc.dtype), self.W_enc.T, self.b_enc))
        return out


class Decoder(nn.Module):
    """A sparse model's stream as the dense model's: a linear map."""

    def __init__(self, config: BridgesConfig) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(torch.empty(config.d_sparse, config.d_dense))
        self.b_dec = nn.Parameter(torch.zeros(config.d_dense))

    def forward(self, x: Float[Tensor, "... d_sparse"]) -> Float[Tensor, "... d_dense"]:
        """The dense model's stream."""
        return F.linear(x.to(self.W_dec.dtype), self.W_dec.T, self.b_dec)


class Bridges(nn.Module):
    """Encoders (dense to sparse) and decoders (sparse to dense), one of each at every site.

    They act on residual streams before the norms that read them.
    """

    def __init__(self, config: BridgesConfig, weights: Mapping[str, Tensor] | None = None) -> None:
        """Make bridges.

        Args:
            config: What they are.
            weights: Their state dict; None: random weights, an encoder's semi-orthogonal and its
                decoder's the same transposed.
        """
        super().__init__()
        self.config = config
        encoders = [Encoder(config) for _ in config.sites]
        decoders = [Decoder(config) for _ in config.sites]
        self.encoders, self.decoders = nn.ModuleList(encoders), nn.ModuleList(decoders)
        self.made_for: dict[str, str] = {}
        """Fingerprints of the models ("dense", "sparse") that they belong to; {}: not known."""
        if weights is not None:
            self.load_state_dict(dict(weights))
            return
        generator = torch.Generator().manual_seed(config.seed)
        tall = config.d_dense >= config.d_sparse
        with torch.no_grad():
            for encoder, decoder in zip(encoders, decoders, strict=True):
                noise = torch.randn(config.d_dense, config.d_sparse, generator=generator)
                q = torch.linalg.qr(noise if tall else noise.T)[0]
                encoder.W_enc.copy_(q if tall else q.T)
                decoder.W_dec.copy_(encoder.W_enc.T)

    @classmethod
    def identity(cls, model: nn.Module) -> Bridges:
        """Bridges from a model to itself that change nothing."""
        bridges = cls(BridgesConfig.of(model, model, encoder="linear"))
        with torch.no_grad():
            for name, parameter in bridges.named_parameters():
                if ".W_" in name:
                    parameter.copy_(torch.eye(len(parameter)))
        return bridges.to(next(model.parameters()).device)

    @property
    def sites(self) -> tuple[BridgeSite, ...]:
        """The sites, in the order of computation."""
        return self.config.sites

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites: ``0.pre``, ``0.mid``, ``1.pre``, ... ``final``."""
        return tuple(site.name for site in self.sites)

    def number(self, site: str | BridgeSite) -> int:
        """The place of a site among the sites.

        Raises:
            ValueError: there is none of that name; the message lists those that exist.
        """
        name = site.name if isinstance(site, BridgeSite) else site
        if name not in self.names:
            raise ValueError(f"unknown site {name!r}; choose from {', '.join(self.names)}")
        return self.names.index(name)

    def site(self, name: str) -> BridgeSite:
        """The site of that name; errors as :meth:`number`."""
        return self.sites[self.number(name)]

    def encode(
        self, site: str | BridgeSite, x: Float[Tensor, "... d_dense"]
    ) -> Float[Tensor, "... d_sparse"]:
        """The dense model's stream at a site as the sparse model's."""
        out: Tensor = self.encoders[self.number(site)](x)
        return out

    def decode(
        self, site: str | BridgeSite, x: Float[Tensor, "... d_sparse"]
    ) -> Float[Tensor, "... d_dense"]:
        """The sparse model's stream at a site as the dense model's."""
        out: Tensor = self.decoders[self.number(site)](x)
        return out

    def set_sharpness(self, sharpness: float | None) -> None:
        """Give every learned threshold this slope; None makes them hard steps."""
        self.config = replace(self.config, sharpness=sharpness)
        for module in self.modules():
            if isinstance(module, LearnedThreshold):
                module.sharpness = sharpness

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config, weights and whose they are to a folder, all or nothing.

        Args:
            folder: New, or one of bridges, which is replaced.
            dtype: What numbers are rounded to; None: as they are.
        """
        write_bridges(folder, self.config, self.state_dict(), self.made_for, dtype)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Bridges:
        """Bridges that :meth:`save_pretrained` wrote, in float32, or bundled ones by name.

        Raises:
            FileNotFoundError: there are none.
            ValueError: files that are damaged, of another version, or contradict themselves.
        """
        config, tensors, made_for = read_bridges(name)
        bridges = cls(config, tensors)
        bridges.made_for = made_for
        return bridges

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Bridges({len(self.sites)} sites, {c.d_dense} ↔ {c.d_sparse} channels, {c.n_dense} ↔ "
            f"{c.n_sparse} layers, {c.encoder} encoders)"
        )
