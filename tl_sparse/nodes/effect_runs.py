"""Forward passes in which every row has another weight set to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.nodes.chosen_nodes import channel_values
from tl_sparse.nodes.rows import Rows
from tl_sparse.nodes.weight_terms import FINAL, ONE, POSITION, TOKEN, Terms
from tl_sparse.sites import NodeIndex

SMALL = 0.01  # below it the series of exp(x) - 1 - x has less rounding than the function


@dataclass(frozen=True, eq=False)
class Original:
    """What the model, as it is, makes of some sequences."""

    logits: Float[Tensor, "sequence pos d_vocab"]
    """Its logits."""
    resid: Float[Tensor, "sequence pos d_model"] | None
    """The residual stream before the weights' block."""
    inputs: Float[Tensor, "sequence pos channel"] | None
    """What the weights are multiplied by, where that is a site's."""
    final: Float[Tensor, "sequence pos d_model"] | None
    """What the unembedding reads, where that is asked for."""


@dataclass(eq=False)
class Runs:
    """Runs of a model on sequences, many changed copies of it at once."""

    model: Any
    rows: Rows
    max_tokens: int
    """Tokens of one forward pass."""
    kept: tuple[str, Original] | None = None
    """The last original run over all sequences, and the matrix that it was made for."""

    @property
    def at_once(self) -> int:
        """Sequences of one forward pass."""
        return max(1, self.max_tokens // self.rows.tokens.shape[1])

    def effects(
        self, term: Terms, index: Int[Tensor, "entry dim"]
    ) -> tuple[Float[Tensor, "entry sequence pos"], Float[Tensor, "entry d_vocab"]]:
        """KL(original || changed) in nats at every position for each weight set to zero, 0 at
        padding; and the sum over real positions of the change of every token's probability."""
        device = next(self.model.parameters()).device
        n, width = self.rows.tokens.shape
        index = index.to(device)
        weights = term.tensor[tuple(index.T)]
        sources, targets = term.sources(index), term.targets(index)
        kl = torch.zeros(len(index), n, width, device=device)
        moved = torch.zeros(0)
        for first in range(0, n, self.at_once):
            piece = slice(first, first + self.at_once)
            tokens = self.rows.tokens[piece].to(device)
            original = self._original(term, tokens, first)
            real = self.rows.real(first, self.at_once).to(device)
            if not len(moved):
                moved = kl.new_zeros(len(index), original.logits.shape[-1])
            if term.reads == FINAL:
                of_logit(original, sources, targets, weights, real, kl[:, piece], moved)
                continue
            inputs = read(term, original, tokens, sources) * real[..., None]
            changes = self._changes(term, original, tokens, inputs * weights, sources, targets)
            for entry, sequence, logits in changes:
                here = real[sequence]
                found, probabilities = divergence(original.logits[sequence], logits)
                kl[entry, first + sequence] = found * here
                moved.index_add_(0, entry, (probabilities * here[..., None]).sum(1))
        return kl, moved

    def _changes(
        self, term: Terms, original: Original, tokens: Tensor,
        added: Float[Tensor, "sequence pos entry"], sources: Tensor, targets: Tensor,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
        """(weights, sequences, logits) of one changed run after another: every weight on every
        sequence in which it adds anything."""
        # a tied weight is in the unembedding, too, which reads every sequence
        touched = torch.ones_like(added[:, 0], dtype=torch.bool) if term.tied else (
            (added != 0).any(1)
        )  # fmt: skip
        for pairs in touched.T.nonzero().split(self.at_once):
            entry, sequence = pairs.T
            with ExitStack() as stack:
                final: dict[str, Tensor] = {}
                edit = Subtract(targets[entry], added[sequence, :, entry])
                stack.enter_context(before(term.output, edit))
                if term.tied:
                    stack.enter_context(before(self.model.unembed, partial(note, final, "final")))
                resid = None if original.resid is None else original.resid[sequence]
                logits = self._logits(term, resid, tokens[sequence])
                edit.check(term.name)
            if term.tied:
                rows = torch.arange(len(entry), device=logits.device)
                read_by = final["final"][rows, :, targets[entry]]
                weight = term.tensor[sources[entry], targets[entry]]
                logits[rows, :, sources[entry]] -= read_by * weight[:, None]
            yield entry, sequence, logits

    def _logits(self, term: Terms, resid: Tensor | None, tokens: Tensor) -> Tensor:
        if resid is None:
            return self.model(tokens).float()
        # a bigram table reads the tokens
        more = {"tokens": tokens} if isinstance(self.model, SparseTransformer) else {}
        return self.model(resid, start_at_layer=term.layer, **more).float()

    def _original(self, term: Terms, tokens: Int[Tensor, "sequence pos"], first: int) -> Original:
        whole = self.at_once >= len(self.rows.tokens)
        if whole and self.kept is not None and self.kept[0] == term.name:
            return self.kept[1]
        seen: dict[str, Tensor] = {}
        hooks: list[tuple[str, Callable[..., None]]] = []
        width = 0
        if term.layer is not None:
            name = f"blocks.{term.layer}.hook_resid_pre"
            hooks.append((name, partial(keep, seen, "resid")))
        if term.layer is not None and term.reads != ONE:
            sites = NodeIndex.of(self.model, (term.reads,))
            hook = sites.hook(term.layer, term.reads)
            piece = sites.slices[hook]
            width = piece.stop - piece.start
            reading = partial(keep, seen, "inputs", after=partial(sites.read, hook))
            hooks.append((hook, reading))
        with ExitStack() as stack:
            if term.reads == FINAL:
                stack.enter_context(before(self.model.unembed, partial(note, seen, "final")))
            logits = self.model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
        inputs = channel_values(term.source, seen["inputs"], width) if width else None
        found = Original(logits.float(), seen.get("resid"), inputs, seen.get("final"))
        self.kept = (term.name, found) if whole else None
        return found


def read(
    term: Terms, original: Original, tokens: Int[Tensor, "sequence pos"],
    sources: Int[Tensor, " entry"],
) -> Float[Tensor, "sequence pos entry"]:  # fmt: skip
    """What each weight is multiplied by at every position."""
    if term.reads == TOKEN:
        return (tokens[..., None] == sources).to(term.tensor.dtype)
    if term.reads == POSITION:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        found = (places[:, None] == sources).to(term.tensor.dtype)
        return found.expand(len(tokens), -1, -1)
    if term.reads == ONE:
        return torch.ones(*tokens.shape, len(sources), device=tokens.device)
    assert original.inputs is not None
    return original.inputs[..., sources]


@dataclass(eq=False)
class Subtract:
    """A forward pre-hook that takes a term from one channel of each row."""

    channel: Int[Tensor, " row"]
    """The channel of each row."""
    term: Float[Tensor, "row pos"]
    """What is taken from it."""
    fired: bool = False
    """Whether it ran."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Tensor:
        """The input with the terms taken from it."""
        self.fired = True
        x = args[0]
        if len(x) == 1:  # positions, once for all rows
            x = x.expand(len(self.channel), *x.shape[1:])
        flat = x.flatten(2).clone()
        flat[torch.arange(len(flat), device=x.device), :, self.channel] -= self.term.to(x.dtype)
        return flat.view(x.shape)

    def check(self, name: str) -> None:
        """ValueError if it never ran: the weight would seem to do nothing."""
        if not self.fired:
            raise ValueError(f"the output of {name} did not go through its hook on this model")


@contextmanager
def before(module: nn.Module | None, hook: Callable[..., Any]) -> Iterator[None]:
    """Run a module with a forward pre-hook inside the block."""
    assert module is not None
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def keep(
    seen: dict[str, Tensor], name: str, x: Tensor, hook: Any = None,
    after: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> None:  # fmt: skip
    """A hook function that keeps an activation."""
    seen[name] = after(x.detach()).clone()


def note(seen: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that keeps a module's input."""
    seen[name] = args[0].detach().clone()


def divergence(
    original: Float[Tensor, "row pos d_vocab"], changed: Float[Tensor, "row pos d_vocab"]
) -> tuple[Float[Tensor, "row pos"], Float[Tensor, "row pos d_vocab"]]:
    """KL(original || changed) in nats from logits, and the change of every probability.

    As log E[exp(d)] for the differences d of the logits, less their mean: a sum of squares for
    small ones, so that a KL of 1e-10 is no difference of two large numbers. Never negative.
    """
    p = original.softmax(-1)
    d = changed - original
    d = d - (p * d).sum(-1, keepdim=True)
    series = d * d / 2 * (1 + d / 3 * (1 + d / 4))
    above = torch.where(d.abs() < SMALL, series, d.expm1() - d)  # exp(d) - 1 - d
    kl = (p * above).sum(-1).log1p()
    return kl, p * (d - kl[..., None]).expm1()


def of_logit(
    original: Original, sources: Int[Tensor, " entry"], targets: Int[Tensor, " entry"],
    weights: Float[Tensor, " entry"], real: Tensor, kl: Float[Tensor, "entry sequence pos"],
    moved: Float[Tensor, "entry d_vocab"],
) -> None:  # fmt: skip
    """Write the KL, and add the changes of probabilities, where one logit alone changes."""
    assert original.final is not None
    p = original.logits.softmax(-1).double()
    change = -(original.final[..., sources].float() * weights.float()).double()
    own = p[..., targets]
    log_sum = (own * change.expm1()).log1p()  # by which the log of the sum of exponentials grows
    scale = real[..., None]
    kl.copy_(((log_sum - own * change).clamp(min=0) * scale).permute(2, 0, 1))
    others = (torch.expm1(-log_sum) * scale).flatten(0, 1)
    moved += (others.T @ p.flatten(0, 1)).float()
    extra = own * ((change - log_sum).exp() - (-log_sum).exp()) * scale
    rows = torch.arange(len(targets), device=targets.device)
    moved[rows, targets] += extra.sum((0, 1)).float()
