"""``feature_cards``: on which tokens features are active, and which logits they raise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.nodes.tokens import token_texts
from tl_sparse.tracing.functions import AnyDictionary

Key = tuple[str, int]
"""A feature, wherever it is active: its dictionary's name and its index."""


@dataclass(frozen=True)
class Example:
    """A stretch of text, and a feature's activation at each of its tokens."""

    words: tuple[str, ...]
    """The tokens as text."""
    activations: tuple[float, ...]
    """The activation at each."""

    @property
    def peak(self) -> str:
        """The token at which it is largest."""
        return self.words[max(range(len(self.words)), key=lambda i: self.activations[i])]


@dataclass(frozen=True)
class FeatureCard:
    """What is known of a feature, besides a graph."""

    site: str
    """Its dictionary."""
    index: int
    """Its number there."""
    frequency: float
    """Share of tokens at which it is active."""
    examples: tuple[Example, ...]
    """Where it is most active, one example a sequence, the largest first."""
    held_out: tuple[Example, ...]
    """Other sequences: half of them with activity, as far as there are any; for tests of labels."""
    raises: tuple[str, ...]
    """Tokens whose logits its direction raises most, past all other layers."""
    lowers: tuple[str, ...]
    """Tokens whose logits it lowers most."""


@torch.no_grad()
def feature_cards(
    model: nn.Module,
    dictionaries: Sequence[AnyDictionary],
    features: Sequence[Key],
    tokens: Int[Tensor, "sequence pos"],
    n_examples: int = 8,
    n_logits: int = 6,
    window: tuple[int, int] = (10, 5),
    batch_size: int = 16,
) -> dict[Key, FeatureCard]:
    """Cards of some features, from one pass over text.

    The text's first half gives the examples, the second those that labels are tested on.

    Args:
        model: A SparseTransformer, or any TransformerLens model.
        dictionaries: Of the model.
        features: Which features.
        tokens: Text, without padding.
        n_examples: Examples of each kind.
        n_logits: Tokens of each kind.
        window: Tokens before and after the peak that an example shows.
        batch_size: Sequences in one forward pass.

    Raises:
        ValueError: fewer than two sequences, or a feature that no dictionary has.
    """
    if len(tokens) < 2:
        raise ValueError("cards need at least two sequences of text")
    known = {each.name: each for each in dictionaries}
    for site, index in features:
        if site not in known or not 0 <= index < known[site].d_sae:
            raise ValueError(f"no dictionary has the feature {site}/{index}; sites are "
                             f"{', '.join(known)}")  # fmt: skip
    cards = {}
    for site, dictionary in known.items():
        chosen = sorted({index for name, index in features if name == site})
        if not chosen:
            continue
        values = activations_of(model, dictionary, chosen, tokens, batch_size)
        effects = logit_effects(model, dictionary, chosen)
        for number, index in enumerate(chosen):
            cards[site, index] = card_of(
                model, site, index, values[..., number], tokens, effects[number], n_examples,
                n_logits, window,
            )  # fmt: skip
    return cards


def activations_of(
    model: nn.Module,
    dictionary: AnyDictionary,
    chosen: Sequence[int],
    tokens: Int[Tensor, "sequence pos"],
    batch_size: int,
) -> Float[Tensor, "sequence pos chosen"]:
    """Activations of some features on every token, on the CPU."""
    run: Any = model
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        seen[hook.name] = x

    hooks = sorted({dictionary.hook_in, dictionary.hook_out})
    at, found = torch.tensor(chosen), []
    for part in tokens.to(next(model.parameters()).device).split(batch_size):
        run.run_with_hooks(part, return_type=None, fwd_hooks=[(name, keep) for name in hooks])
        features = dictionary.encode(seen[dictionary.hook_in], seen[dictionary.hook_out])
        found.append(features[..., at.to(features.device)].float().cpu())
    return torch.cat(found)


def logit_effects(
    model: nn.Module, dictionary: AnyDictionary, chosen: Sequence[int]
) -> Float[Tensor, "chosen token"]:
    """What features' directions add to the logits past all other layers, but for the final norm's
    scale, which is a number of the prompt's; less its mean over tokens."""
    part: Any = model
    rows = dictionary.W_dec[list(chosen)].float()
    norm = getattr(part, "ln_final", None)
    weight = getattr(norm, "w", getattr(norm, "weight", None))
    W_U = part.W_U.detach().float()
    if rows.shape[1] != W_U.shape[0]:  # a dictionary that does not write to the residual stream
        return torch.zeros(len(chosen), W_U.shape[1])
    rows = rows.to(W_U.device)
    effect = (rows if weight is None else rows * weight.detach().float()) @ W_U
    return (effect - effect.mean(1, keepdim=True)).cpu()


def card_of(
    model: nn.Module,
    site: str,
    index: int,
    values: Float[Tensor, "sequence pos"],
    tokens: Int[Tensor, "sequence pos"],
    effect: Float[Tensor, " token"],
    n_examples: int,
    n_logits: int,
    window: tuple[int, int],
) -> FeatureCard:
    """One feature's card."""
    half = len(values) // 2
    peaks = values.amax(1)
    first = [int(i) for i in peaks[:half].argsort(descending=True, stable=True)[:n_examples]]
    order = peaks[half:].argsort(descending=True, stable=True) + half
    active = [int(i) for i in order[: n_examples // 2] if peaks[i] > 0]
    silent = [int(i) for i in order.flip(0) if peaks[i] <= 0][: n_examples - len(active)]

    def example(row: int) -> Example:
        # where nothing is active, the middle
        at = int(values[row].argmax()) if peaks[row] > 0 else tokens.shape[1] // 2
        start, stop = max(0, at - window[0]), min(tokens.shape[1], at + window[1] + 1)
        return Example(words(model, tokens[row, start:stop]),
                       tuple(round(float(x), 4) for x in values[row, start:stop]))  # fmt: skip

    size = min(n_logits, len(effect))
    top, bottom = effect.topk(size).indices, (-effect).topk(size).indices
    has_logits = bool(effect.any())
    return FeatureCard(
        site, index, float((values > 0).float().mean()),
        tuple(example(i) for i in first if peaks[i] > 0),
        tuple(example(i) for i in (*active, *silent)),
        words(model, top) if has_logits else (), words(model, bottom) if has_logits else (),
    )  # fmt: skip


def words(model: nn.Module, ids: Int[Tensor, " token"]) -> tuple[str, ...]:
    """Tokens as text; their numbers where there is no tokenizer."""
    texts = token_texts(getattr(model, "tokenizer", None), ids.cpu())
    return tuple(str(i) if t is None else t for i, t in zip(ids.tolist(), texts, strict=True))


def as_values(card: FeatureCard, shown: int = 10) -> dict[str, Any]:
    """A card as plain values, for a request: examples as lines ``token<TAB>activation``."""
    return {
        "frequency": round(card.frequency, 6),
        "top_examples": [
            [f"{word}\t{value:g}" for word, value in zip(e.words, e.activations, strict=True)]
            for e in card.examples[:shown]
        ],
        "raises_logits_of": list(card.raises), "lowers_logits_of": list(card.lowers),
    }  # fmt: skip


Cards = Mapping[Key, FeatureCard]
