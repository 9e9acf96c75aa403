"""Roots: the scalar of each prompt that is traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.nodes.tokens import token_id, token_text
from tl_sparse.tracing.splice import Splice
from tl_sparse.tracing.spliced_run import SplicedRun

TokenLike = int | str
Side = Literal["query", "key"]


def position(run: SplicedRun, pos: int) -> Int[Tensor, " prompt"]:
    """A position in each prompt; negative ones count from each prompt's last token.

    Raises:
        ValueError: a prompt is shorter.
    """
    found = run.last + 1 + pos if pos < 0 else torch.full_like(run.last, pos)
    if bool(((found < 0) | (found > run.last)).any()):
        raise ValueError(f"pos={pos}: the shortest prompt has {int(run.last.min()) + 1} tokens")
    return found


def each(run: SplicedRun, token: TokenLike | Sequence[TokenLike]) -> Int[Tensor, " prompt"]:
    """A token's id for every prompt: the same for all, or one for each."""
    model = run.splice.model
    names = [token] * run.n_prompts if isinstance(token, int | str) else list(token)
    if len(names) != run.n_prompts:
        raise ValueError(f"{len(names)} tokens for {run.n_prompts} prompts: give one, or one each")
    return torch.tensor([token_id(model, name) for name in names], device=run.tokens.device)


def _at(run: SplicedRun, pos: int) -> Float[Tensor, "prompt token"]:
    return run.logits[torch.arange(run.n_prompts, device=run.last.device), position(run, pos)]


@dataclass(frozen=True)
class Logit:
    """The logit of a token (an id, its text, or a list with one for each prompt)."""

    token: TokenLike | Sequence[TokenLike]
    """The token."""
    pos: int = -1
    """Where it is predicted."""

    linear: ClassVar[bool] = True

    def hooks(self, splice: Splice) -> tuple[str, ...]:
        """None."""
        return ()

    def of(self, run: SplicedRun) -> Float[Tensor, " prompt"]:
        """The value in each prompt."""
        return _at(run, self.pos).gather(1, each(run, self.token)[:, None])[:, 0]

    def name(self, prompt: int) -> str:
        """Its name in a prompt's graph."""
        return f"logit({_of(self.token, prompt)!r})"


@dataclass(frozen=True)
class LogitDiff:
    """Logit of the correct token minus that of the incorrect one."""

    correct: TokenLike | Sequence[TokenLike]
    """Id or text, or one for each prompt."""
    incorrect: TokenLike | Sequence[TokenLike]
    """The other."""
    pos: int = -1
    """Where they are predicted."""

    linear: ClassVar[bool] = True

    def hooks(self, splice: Splice) -> tuple[str, ...]:
        """None."""
        return ()

    def of(self, run: SplicedRun) -> Float[Tensor, " prompt"]:
        """The value in each prompt."""
        logits = _at(run, self.pos)
        sides = (each(run, token) for token in (self.correct, self.incorrect))
        correct, incorrect = (logits.gather(1, ids[:, None])[:, 0] for ids in sides)
        return correct - incorrect

    def name(self, prompt: int) -> str:
        """Its name in a prompt's graph."""
        return f"logit({_of(self.correct, prompt)!r}) - logit({_of(self.incorrect, prompt)!r})"


@dataclass(frozen=True)
class LogProb:
    """The log-probability of a token; contributions to it are first-order."""

    token: TokenLike | Sequence[TokenLike]
    """The token."""
    pos: int = -1
    """Where it is predicted."""

    linear: ClassVar[bool] = False

    def hooks(self, splice: Splice) -> tuple[str, ...]:
        """None."""
        return ()

    def of(self, run: SplicedRun) -> Float[Tensor, " prompt"]:
        """The value in each prompt."""
        return _at(run, self.pos).log_softmax(-1).gather(1, each(run, self.token)[:, None])[:, 0]

    def name(self, prompt: int) -> str:
        """Its name in a prompt's graph."""
        return f"log p({_of(self.token, prompt)!r})"


@dataclass(frozen=True)
class FeatureRoot:
    """The activation of a feature that is active: the root of a local circuit."""

    site: str
    """Name of the dictionary."""
    index: int
    """Number of the feature."""
    pos: int = -1
    """Position."""

    linear: ClassVar[bool] = True

    def hooks(self, splice: Splice) -> tuple[str, ...]:
        """None."""
        splice.dictionary(self.site)
        return ()

    def of(self, run: SplicedRun) -> Float[Tensor, " prompt"]:
        """The value in each prompt.

        Raises:
            ValueError: the feature is not active in one of them.
        """
        site = run.sites[self.site]
        found = []
        for prompt, pos in enumerate(position(run, self.pos).tolist()):
            entry = site.active.find(prompt, pos, self.index)
            if entry < 0:
                here = (site.active.prompt == prompt) & (site.active.pos == pos)
                active = site.active.feature[here].tolist()
                raise ValueError(
                    f"feature {self.index} of {self.site} is not active at position {pos} of "
                    f"prompt {prompt}; active are {', '.join(map(str, active[:10])) or 'none'}"
                )
            found.append(site.features.before[entry])
        return torch.stack(found)

    def name(self, prompt: int) -> str:
        """Its name in a prompt's graph."""
        return f"{self.site}/{self.pos}/{self.index} (root)"


@dataclass(frozen=True)
class AttentionScore:
    """A head's score between two positions, traced on one side, the other held constant.

    On either side, contributions (with those of biases) sum to the score.
    """

    layer: int
    """Layer."""
    head: int
    """Head."""
    query: int
    """Position of the query."""
    key: int
    """Position of the key."""
    side: Side = "query"
    """What is traced."""

    linear: ClassVar[bool] = True

    def hooks(self, splice: Splice) -> tuple[str, ...]:
        """Queries and keys."""
        return qk_hooks(splice, self.layer)

    def of(self, run: SplicedRun) -> Float[Tensor, " prompt"]:
        """The value in each prompt."""
        q, k = queries_and_keys(run, self)
        rows = torch.arange(run.n_prompts, device=q.device)
        q, k = q[rows, position(run, self.query)], k[rows, position(run, self.key)]
        return (q * k).sum(-1) / attention_scale(run.splice.model, self.layer)

    def name(self, prompt: int) -> str:
        """Its name in a prompt's graph."""
        return f"score L{self.layer}H{self.head} {self.query}←{self.key} ({self.side})"


@dataclass(frozen=True)
class AttentionPattern:
    """An entry of a head's pattern, traced on one side; contributions are first-order."""

    layer: int
    """Layer."""
    head: int
    """Head."""
    query: int
    """Position of the query."""
    key: int
    """Position of the key."""
    side: Side = "query"
    """What is traced."""

    linear: ClassVar[bool] = False

    def hooks(self, splice: Splice) -> tuple[str, ...]:
        """Queries and keys."""
        return qk_hooks(splice, self.layer)

    def of(self, run: SplicedRun) -> Float[Tensor, " prompt"]:
        """The value in each prompt: of a softmax over the keys up to the query."""
        query, key = position(run, self.query), position(run, self.key)
        width = int(query.max()) + 1
        if bool((key > query).any()):
            raise ValueError(f"key={self.key} is after query={self.query}")
        q, k = queries_and_keys(run, self)
        q, k = q[torch.arange(run.n_prompts, device=q.device), query], k[:, :width]
        scores = (k @ q[..., None])[..., 0] / attention_scale(run.splice.model, self.layer)
        late = torch.arange(width, device=q.device) > query[:, None]
        pattern = scores.masked_fill(late, -torch.inf).softmax(-1)
        return pattern.gather(1, key[:, None])[:, 0]

    def name(self, prompt: int) -> str:
        """Its name in a prompt's graph."""
        return f"pattern L{self.layer}H{self.head} {self.query}←{self.key} ({self.side})"


@dataclass(frozen=True)
class Custom:
    """Any function of the run: ``function(logits, last) -> value of each prompt``."""

    function: Callable[[Tensor, Tensor], Tensor]
    """Takes logits [prompt, pos, token] and the last position of each prompt; differentiable."""
    label: str = "custom"
    """Its name."""

    linear: ClassVar[bool] = False

    def hooks(self, splice: Splice) -> tuple[str, ...]:
        """None."""
        return ()

    def of(self, run: SplicedRun) -> Float[Tensor, " prompt"]:
        """The value in each prompt."""
        value = self.function(run.logits, run.last)
        if not isinstance(value, Tensor) or value.shape != (run.n_prompts,):
            raise ValueError(
                f"{self.label}: one value for each of {run.n_prompts} prompts is needed, not "
                f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
            )
        return value

    def name(self, prompt: int) -> str:
        """Its name in a prompt's graph."""
        return self.label


Root = Logit | LogitDiff | LogProb | FeatureRoot | AttentionScore | AttentionPattern | Custom


def token_names(model: Any, ids: Sequence[int]) -> list[int | str]:
    """Tokens by their texts, where the texts stand for them; by their ids elsewhere."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    found: dict[int, int | str] = {}
    for token in set(ids):
        text = token_text(tokenizer, token) if tokenizer is not None else None
        again = [] if text is None else tokenizer.encode(text, add_special_tokens=False)
        found[token] = text if text is not None and again == [token] else token
    return [found[token] for token in ids]


def qk_hooks(splice: Splice, layer: int) -> tuple[str, str]:
    """Hooks of queries and keys as they are multiplied: after rotation, where there is one.

    Raises:
        ValueError: the model has no such layer.
    """
    points: Any = splice.model.hook_dict
    if not 0 <= layer < splice.n_layers:
        raise ValueError(f"layer={layer}: the model has layers 0 to {splice.n_layers - 1}")
    names = []
    rotary = getattr(splice.model.cfg, "positional_embedding_type", "") == "rotary"
    for which in "qk":
        rotated = f"blocks.{layer}.attn.hook_rot_{which}"
        if rotary and rotated not in points:
            raise ValueError(
                f"this {type(splice.model).__name__} has no hook at its rotated queries and keys"
            )
        names.append(rotated if rotary else f"blocks.{layer}.attn.hook_{which}")
    return names[0], names[1]


def queries_and_keys(
    run: SplicedRun, root: AttentionScore | AttentionPattern
) -> tuple[Float[Tensor, "prompt pos d_head"], Float[Tensor, "prompt pos d_head"]]:
    """Queries and keys of a root's head; those on the side that is not traced are constant.

    Raises:
        ValueError: the layer has no such head, or there is no such side.
    """
    if root.side not in get_args(Side):
        raise ValueError(f"side={root.side!r}; choose query or key")
    q, k = (run.points[hook] for hook in root.hooks(run.splice))
    heads = q.shape[2]
    if not 0 <= root.head < heads:
        raise ValueError(f"head={root.head}: layer {root.layer} has {heads} heads")
    q, k = q[:, :, root.head], k[:, :, root.head * k.shape[2] // heads]
    return (q, k.detach()) if root.side == "query" else (q.detach(), k)


def attention_scale(model: Any, layer: int) -> float:
    """What products of queries and keys are divided by."""
    cfg = model.cfg
    if getattr(cfg, "use_attn_scale", True) is False:
        return 1.0
    scale = getattr(cfg, "attn_scale", None)
    return float(scale) if scale is not None and scale > 0 else float(cfg.d_head) ** 0.5


def _of(token: TokenLike | Sequence[TokenLike], prompt: int) -> TokenLike:
    return token if isinstance(token, int | str) else token[prompt]
