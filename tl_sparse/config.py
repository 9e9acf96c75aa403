"""``SparseTransformerConfig``: what a model is, frozen, validated, saved with every checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tl_sparse.sites import SITE
from tl_sparse.storage.json_dataclass import check_fields, dataclass_from_json

Normalization = Literal["RMS", "LN", "none"]
Activation = Literal["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu"]
Positions = Literal["none", "standard", "concat", "sinusoidal_concat"]
Bigram = Literal["none", "frozen", "learned"]
ResidualActivation = Literal["identity", "relu"]


@dataclass(frozen=True)
class ActivationDensity:
    """Share of channels that AbsTopK keeps at each of the ten places (Gao et al. 2025, Fig. 12).

    1.0 switches AbsTopK off at that place. ``k = int(density * width)``, as in the released code.
    """

    attn_in: float = 1.0
    """After the norm before attention (and after concatenated positions, if any)."""
    attn_q: float = 1.0
    """Queries, over all heads together."""
    attn_k: float = 1.0
    """Keys, over all heads together."""
    attn_v: float = 1.0
    """Values, over all heads together."""
    attn_out: float = 1.0
    """The attention block's write, before it is added to the residual stream."""
    mlp_in: float = 1.0
    """After the norm before the MLP."""
    mlp_neuron: float = 1.0
    """After the MLP's activation function."""
    mlp_out: float = 1.0
    """The MLP's write, before it is added to the residual stream."""
    resid_post_attn: float = 1.0
    """The residual stream itself after attention (off in the paper)."""
    resid_post_mlp: float = 1.0
    """The residual stream itself after the MLP (off in the paper)."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int | float):
                raise ValueError(f"activation density {name}={value!r} must be a number in (0, 1]")
            if not 0.0 < value <= 1.0:
                raise ValueError(
                    f"activation density {name}={value!r} must lie in (0, 1]; 1 is off"
                )

    @classmethod
    def paper(cls, density: float = 0.25) -> ActivationDensity:
        """The paper's choice: the eight node sites at one density, off on the residual stream."""
        sites = [f.name for f in dataclasses.fields(cls) if not f.name.startswith("resid_")]
        return cls(**dict.fromkeys(sites, density))


@dataclass(frozen=True)
class SparseTransformerConfig:
    """Architecture of a :class:`~tl_sparse.SparseTransformer`, in TransformerLens' field names.

    Source: Gao et al. 2025, §2.1 and appendix A.1; the options are those of the released inference
    code. A dense model is the same config with ``activation_density=ActivationDensity()``; weight
    sparsity is a matter of training (:class:`~tl_sparse.SparsityConfig`), not of architecture.
    """

    n_layers: int = 2
    """Transformer blocks."""
    d_model: int = 128
    """Width of the residual stream."""
    n_ctx: int = 256
    """Longest sequence, in tokens."""
    d_vocab: int = 2048
    """Tokens in the vocabulary."""
    d_vocab_out: int | None = None
    """Logits per position; default d_vocab. Other sizes serve algorithmic tasks."""
    d_head: int = 16
    """Channels per head (the paper's 16: small heads are more monosemantic)."""
    n_heads: int | None = None
    """Heads per layer; default d_model // d_head. n_heads * d_head need not be d_model."""
    attn_scale: float | None = None
    """Attention scores are divided by it; default sqrt(d_head)."""
    attn_only: bool = False
    """Blocks of attention alone, without MLPs."""
    d_mlp: int | None = None
    """MLP neurons per layer; default 4 * d_model, and None where attn_only."""
    act_fn: Activation = "gelu"
    """The MLP's activation function, by TransformerLens' name. gelu_new, gelu_fast and
    gelu_pytorch_tanh are one function, GELU's approximation by tanh."""
    normalization_type: Normalization = "RMS"
    """RMSNorm (zero stays zero), LayerNorm, or none (TransformerLens' None, for toy models)."""
    eps: float | None = None
    """Epsilon of the norms. Default as the released code: for RMS finfo(dtype).eps, in half
    precision that of float32; for LN 1e-5."""
    use_bias: bool = True
    """Biases in attention and MLP."""
    use_ln_bias: bool = True
    """Bias of LayerNorm (RMSNorm has none)."""
    positional_embedding_type: Positions = "none"
    """none (the paper), standard (learned, added), or concatenated read-only channels: learned
    (concat) or fixed sinusoids (sinusoidal_concat)."""
    d_pos: int = 0
    """Width of the concatenated positions; 0 unless positional_embedding_type concatenates."""
    use_attention_sinks: bool = False
    """A learned logit per head in the softmax denominator, so that a head may attend to nothing."""
    bigram_table: Bigram = "none"
    """A dense [d_vocab, d_vocab] table whose row of the current token is added to the logits."""
    tie_word_embeddings: bool = False
    """Unembed with the transpose of the token embedding."""
    residual_act: ResidualActivation = "identity"
    """Function applied to the residual stream after every write."""
    activation_density: ActivationDensity = field(default_factory=ActivationDensity)
    """AbsTopK: share of channels kept, per site."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; block outputs get it / sqrt(2 n_layers)."""
    seed: int = 0
    """Seed of the initial weights."""
    default_prepend_bos: bool = True
    """Whether strings are tokenized with a BOS token in front."""

    def __post_init__(self) -> None:
        self.check_sizes("n_layers", "d_model", "n_ctx", "d_vocab", "d_head")
        if self.n_heads is None:
            object.__setattr__(self, "n_heads", max(1, self.d_model // self.d_head))
        if self.d_mlp is None and self.attn_only is not True:
            object.__setattr__(self, "d_mlp", 4 * self.d_model)
        optional = [name for name in ("d_mlp", "d_vocab_out") if getattr(self, name) is not None]
        self.check_sizes("n_heads", *optional)
        for name in (f.name for f in dataclasses.fields(self) if isinstance(f.default, bool)):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in ("d_pos", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
                raise ValueError(f"{name}={value!r} must be an integer of at least 0, below 2**63")
        for name in ("eps", "attn_scale", "initializer_range"):
            value = getattr(self, name)
            if value is None and name != "initializer_range":
                continue  # the default follows from the other fields
            if not (isinstance(value, int | float) and 0 < value < 1e30):
                raise ValueError(f"{name}={value!r} must be a positive number, below 1e30")
        if not isinstance(self.activation_density, ActivationDensity):
            raise ValueError(
                f"activation_density={self.activation_density!r} must be an ActivationDensity, "
                "such as ActivationDensity.paper(0.25)"
            )
        check_fields(self)
        if self.concat_positions != (self.d_pos > 0):
            raise ValueError(
                f"d_pos={self.d_pos} does not fit positional_embedding_type="
                f"{self.positional_embedding_type!r}: concatenated positions need d_pos > 0, "
                "the others d_pos = 0"
            )
        if self.positional_embedding_type == "sinusoidal_concat" and self.d_pos % 2:
            raise ValueError(f"d_pos={self.d_pos} must be even for sinusoids (sine and cosine)")
        self._check_combinations()
        for site, density in dataclasses.asdict(self.activation_density).items():
            if not self.has_site(site):
                if density == 1:
                    continue
                raise ValueError(
                    f"activation density {site}={density} has no place in a model with "
                    "attn_only=True: leave it at 1"
                )
            if int(density * self.site_width(site)) < 1:
                raise ValueError(
                    f"activation density {site}={density} keeps no channel of "
                    f"{self.site_width(site)}; use at least {1 / self.site_width(site):.4g}"
                )

    def check_sizes(self, *names: str) -> None:
        """ValueError unless these fields are integers that a tensor's size can be."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ValueError(f"{name}={value!r} must be a positive integer below 2**31")

    def _check_combinations(self) -> None:
        if self.attn_only and self.d_mlp is not None:
            raise ValueError(f"attn_only=True leaves no MLP for d_mlp={self.d_mlp}: use None")
        tied_to_vocab = self.tie_word_embeddings or self.bigram_table != "none"
        if tied_to_vocab and self.n_logits != self.d_vocab:
            raise ValueError(
                f"d_vocab_out={self.d_vocab_out} must be d_vocab={self.d_vocab} in a model with "
                "tie_word_embeddings or a bigram_table"
            )

    @property
    def n_logits(self) -> int:
        """Logits per position: ``d_vocab_out``, or by default ``d_vocab``."""
        return self.d_vocab if self.d_vocab_out is None else self.d_vocab_out

    @property
    def concat_positions(self) -> bool:
        """Whether positions are extra channels that attention and MLP read beside the residual
        stream."""
        return self.positional_embedding_type in ("concat", "sinusoidal_concat")

    def eps_for(self, dtype: torch.dtype) -> float:
        """Epsilon of the norms: ``eps``, or the default for activations of a dtype."""
        # The released code's nn.RMSNorm takes finfo(dtype).eps, its LayerNorm 1e-5 (A.1).
        # nn.RMSNorm computes in single precision at least: with half precision's eps (1e-3, 8e-3)
        # a cast model would be another function wherever the residual stream is small.
        wide = torch.promote_types(dtype, torch.float32)
        return self.eps or (torch.finfo(wide).eps if self.normalization_type == "RMS" else 1e-5)

    def has_site(self, site: str) -> bool:
        """Whether a model has this one of the activation sites: not those of absent MLPs."""
        # the two places of the residual stream are named after the part that they follow
        part = SITE[site].part if site in SITE else site.rpartition("_")[2]
        return not (self.attn_only and part == "mlp")

    def site_width(self, site: str) -> int:
        """Channels at one of the activation sites.

        Raises:
            ValueError: the model has no such site.
        """
        if not self.has_site(site):
            raise ValueError(f"a model with attn_only=True has no site {site!r}")
        return SITE[site].width(self) if site in SITE else self.d_model

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready values; :meth:`from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseTransformerConfig:
        """Build from :meth:`to_dict`'s output.

        Raises:
            ValueError: a key that is not a field (the message lists the fields), or a value of
                another type than its field's.
        """
        config: SparseTransformerConfig = dataclass_from_json(cls, values)
        return config
