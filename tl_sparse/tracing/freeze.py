"""``Freeze``: what is held constant while a spliced model is taken apart."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Freeze:
    """Which nonlinear parts keep, for gradients, the value that they have in the forward pass.

    With all of them the model is affine between the features of its dictionaries, so that gradient
    times activation is an exact contribution. Forward values are never changed.
    """

    pattern: bool = True
    """Attention patterns (and with them queries, keys and score caps)."""
    norm: bool = True
    """Scales of the model's norms, of final norms and those after a sublayer too."""
    dictionary_norm: bool = True
    """Factors by which a dictionary normalises what it reads and writes."""
    qk_norm: bool = True
    """Scales of norms of queries and keys; they matter where attention scores are traced."""
    softcap: bool = True
    """The cap of the logits: they are traced as they are before it."""

    @property
    def strict(self) -> bool:
        """Whether everything is frozen."""
        return all(astuple(self))

    @classmethod
    def compat(cls) -> Freeze:
        """The published attributor of 2024 (Ge et al., code of June 2024): gradients flow through
        norms, dictionaries' norm factors and attention, so that attributions are first-order
        estimates."""
        return cls(False, False, False, False, False)
