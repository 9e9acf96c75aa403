"""``Splice``: a model with dictionaries in it, by hooks on its own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.sites import layer_of
from tl_sparse.tracing.freeze import Freeze
from tl_sparse.tracing.functions import AnyDictionary, in_model

MLP = Literal["error", "ratio", "gradient"]


class NotLinear(ValueError):
    """The parts do not sum to the whole: something that should be held constant is not."""


@dataclass(frozen=True, eq=False, repr=False)
class Splice:
    """Dictionaries in the places of a model's activations.

    At each dictionary's ``hook_out`` the activation is taken apart: the active features, each its
    activation times its direction, the decoder's bias, and what is missed, the error. They sum to
    the activation, so that the model computes what it did, to the bit; and everything else that is
    not linear is held constant (``freeze``), so that whatever is read from the model is exactly the
    sum of what its features, errors, biases, tokens and positions contribute.

    It works on SparseTransformer (without AbsTopK inside attention) and on every TransformerLens
    model (HookedTransformer, TransformerBridge, native or from Hugging Face) whose attention
    patterns can be set by a hook; every trace checks that the sum comes out.

    Source: Ge et al. 2024 (arXiv 2405.13868), §2 and §3.
    """

    model: nn.Module
    """Any TransformerLens model; it is not changed."""
    dictionaries: Sequence[AnyDictionary | Any]
    """One or none for every place. Besides dictionaries of this package, SAEs of SAELens and any
    object with ``encode``, ``decode`` and ``hook_in`` are taken (see :class:`FunctionDictionary`).
    """
    freeze: Freeze = field(default_factory=Freeze)
    """What is held constant; ``Freeze.compat()`` is what the published code of 2024 did."""
    mlp: MLP = "error"
    """What an MLP without a dictionary is: an ``error``, a leaf like what a dictionary misses;
    ``ratio``: linear, each neuron's activation over its input held constant; ``gradient``:
    its gradient, which is no exact contribution."""
    score_nodes: bool = False
    """Whether attention scores are nodes that the gate sees; patterns are then not frozen. Their
    contributions count from the mean under the pattern, on which no constant added to all scores
    has an effect. Not for a TransformerBridge, which has no hook before the softmax."""
    raw_scores: bool = False
    """Whether they count from zero, as in the published code."""

    def __post_init__(self) -> None:
        """Refuse dictionaries that the model has no place for."""
        taken = tuple(in_model(each, self.model) for each in self.dictionaries)
        object.__setattr__(self, "dictionaries", taken)
        points: Any = self.model.hook_dict
        seen: dict[str, AnyDictionary] = {}
        for dictionary in self.dictionaries:
            for hook in (dictionary.hook_in, dictionary.hook_out):
                if hook not in points:
                    near = [name for name in points if name.endswith(hook.rpartition(".")[2])]
                    raise ValueError(
                        f"dictionary {dictionary.name}: the model has no hook {hook!r}; of that "
                        f"kind it has {', '.join(near[:4]) or 'none'}"
                    )
            if dictionary.name in seen:
                raise ValueError(f"two dictionaries have the name {dictionary.name!r}")
            seen[dictionary.name] = dictionary
        if self.mlp not in get_args(MLP):
            raise ValueError(f"mlp={self.mlp!r}; choose from {', '.join(get_args(MLP))}")

    @property
    def strict(self) -> bool:
        """Whether everything is linear, so that contributions sum to what they are of."""
        return self.freeze.strict and self.mlp != "gradient" and not self.score_nodes

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the dictionaries."""
        return tuple(dictionary.name for dictionary in self.dictionaries)

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return int(self.model.cfg.n_layers)  # type: ignore[union-attr, arg-type]

    def dictionary(self, site: str) -> AnyDictionary:
        """The dictionary of a site, by name.

        Raises:
            ValueError: there is none; the message lists the sites.
        """
        for dictionary in self.dictionaries:
            if dictionary.name == site:
                return dictionary
        raise ValueError(f"no dictionary at {site!r}; there are {', '.join(self.sites) or 'none'}")

    def check_feature(self, site: str, index: int) -> None:
        """ValueError unless the dictionary of a site has a feature of that number."""
        size = self.dictionary(site).d_sae
        if not 0 <= index < size:
            raise ValueError(f"feature {index} of {site}: it has 0 to {size - 1}")

    @property
    def constant_hooks(self) -> list[str]:
        """Hooks of what makes the model nonlinear besides its sublayers: patterns, norm scales."""
        points: Any = self.model.hook_dict
        return [name for name in points if name.endswith(("attn.hook_pattern", "hook_scale"))]

    def layer(self, site: str) -> int:
        """The layer of a site or hook."""
        hooks = {dictionary.name: dictionary.hook_out for dictionary in self.dictionaries}
        return layer_of(hooks.get(site, site), self.n_layers)

    def __repr__(self) -> str:
        how = "strict" if self.strict else "compat"
        return f"Splice({type(self.model).__name__}, {', '.join(self.sites)}; {how})"


def keep_in(found: dict[str, Tensor], name: str) -> FwdHook:
    """A hook that writes down what is there, under the name that was asked for."""

    def hook(x: Tensor, hook: Any = None) -> Tensor:
        found[name] = x
        return x

    return name, hook
