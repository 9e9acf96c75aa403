"""``quote_closing``: the quote-closing circuit of Gao et al. 2025 (figure 39), written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tl_sparse.config import ActivationDensity, SparseTransformerConfig
from tl_sparse.ground_truth.ground_truth_model import GroundTruthModel
from tl_sparse.ground_truth.noise import write_noise
from tl_sparse.ground_truth.quoted_text import (
    CLOSING,
    N_CTX,
    OPENING,
    STOP,
    quote_task,
    quoted_tokenizer,
    running_text,
)
from tl_sparse.model.transformer import SparseTransformer

D_HEAD = 4
FEWEST = 27  # distractors: with fewer, too few queries compete with the circuit's
DENSITY = 0.25  # share of the distractors' weights that are not zero, and of channels AbsTopK keeps
TEXT = 512  # sequences that means are taken over
OPENING_SIZE, LOUDNESS = 5.0, 4.0  # of the embeddings; loudness in root mean squares of the stream
NEURON, THRESHOLD = 2.0, -3.0
DETECT, KIND = 2.5, 2.5
QUERY, KEY, VALUE, OUT, GAIN = 2.0, 1.8, 2.0, 1.5, 1.0
QUERIES = 4.0  # standard deviation of the distractors' queries in layer 1: larger than QUERY

DESCRIPTION = """\
The model closes quoted text: ('...') and ("...").

Layer 0's MLP has one neuron for each opening. Both raise the detector channel; one raises and the
other lowers the kind channel. One head of layer 1 attends from everywhere to the opening: its keys
read the detector, its queries are a bias. It copies the kind to the output channel, which the
unembedding reads for the two closings, with opposite signs.

The query is constant where it is there at all. At most tokens the other heads' queries are larger,
and AbsTopK drops it, so its mean is small and the head needs the node itself. At a full stop, where
texts are closed, another channel is so large that the norm makes everything else small: there the
query stands. Nobody else writes to the circuit's channels; all else reads and writes at random."""


@dataclass(frozen=True)
class Places:
    """Where the circuit stands: drawn from the seed."""

    single: int
    """Residual stream channel of the token that opens with a single quote."""
    double: int
    """Residual stream channel of the token that opens with a double quote."""
    detector: int
    """Residual stream channel that says: here text is opened."""
    kind: int
    """Residual stream channel of the quote's kind: positive for double, negative for single."""
    out: int
    """Residual stream channel that the unembedding reads for the two closings."""
    loud: int
    """A distractor's residual stream channel, large at a full stop alone."""
    single_neuron: int
    """Neuron of layer 0 that fires at a single opening."""
    double_neuron: int
    """Neuron of layer 0 that fires at a double opening."""
    head: int
    """Head of layer 1 that finds the opening."""
    qk: int
    """The head's channel whose queries and keys meet."""
    v: int
    """The head's channel that carries the kind."""

    @classmethod
    def draw(cls, config: SparseTransformerConfig, generator: torch.Generator) -> Places:
        """Random places in a model."""

        def some(n: int, of: int | None) -> list[int]:
            assert of is not None
            return torch.randperm(of, generator=generator)[:n].tolist()

        return cls(
            *some(6, config.d_model), *some(2, config.d_mlp), *some(1, config.n_heads),
            *some(2, config.d_head),
        )  # fmt: skip

    @property
    def channels(self) -> list[int]:
        """The circuit's own channels of the residual stream."""
        return [self.single, self.double, self.detector, self.kind, self.out]

    def roles(self) -> dict[tuple[int, str, int], str]:
        """Layer, site and channel of each of the 12 nodes, and what the node does."""
        first = self.head * D_HEAD
        return {
            (0, "mlp_in", self.single): "reads whether the token opens text with a single quote",
            (0, "mlp_in", self.double): "reads whether the token opens text with a double quote",
            (0, "mlp_neuron", self.single_neuron): "fires at a single opening",
            (0, "mlp_neuron", self.double_neuron): "fires at a double opening",
            (0, "mlp_out", self.detector): "quote detector: writes that text is opened here",
            (0, "mlp_out", self.kind): "kind of quote: writes + for double, - for single",
            (1, "attn_in", self.detector): "reads the quote detector",
            (1, "attn_in", self.kind): "reads the kind of quote",
            (1, "attn_q", first + self.qk): "a constant query, at full stops alone",
            (1, "attn_k", first + self.qk): "key: large where text is opened",
            (1, "attn_v", first + self.v): "value: the kind of quote",
            (1, "attn_out", self.out): "writes the kind of the opened quote: which closing comes",
        }

    def edges(self) -> list[tuple[int, str, int, str, int, str, float]]:
        """The 9 edges: layer, source site and channel, target site and channel, matrix, weight."""
        neurons = (
            (self.single, self.single_neuron, -KIND),
            (self.double, self.double_neuron, KIND),
        )
        first = self.head * D_HEAD
        key, value = first + self.qk, first + self.v
        found: list[tuple[int, str, int, str, int, str, float]] = [
            (1, "attn_in", self.detector, "attn_k", key, "W_K", KEY),
            (1, "attn_in", self.kind, "attn_v", value, "W_V", VALUE),
            (1, "attn_v", value, "attn_out", self.out, "W_O", OUT),
        ]
        for channel, neuron, kind in neurons:
            found += [
                (0, "mlp_in", channel, "mlp_neuron", neuron, "W_in", NEURON),
                (0, "mlp_neuron", neuron, "mlp_out", self.detector, "W_out", DETECT),
                (0, "mlp_neuron", neuron, "mlp_out", self.kind, "W_out", kind),
            ]
        return found


def quote_closing(distractors: int = 59, seed: int = 0) -> GroundTruthModel:
    """A sparse transformer of two layers in which 12 nodes with 9 edges close quoted text.

    The circuit is that of Gao et al. 2025 (§3.1, figure 39) in small: two residual stream channels,
    one for each opening quote; two neurons; a detector and a kind channel; and a head with
    a constant query, a key read from the detector and a value read from the kind, which writes one
    channel.
    Where its parts stand is drawn from the seed. Around it are random sparse weights: other
    channels, neurons and heads, which are active, and of which some read the circuit's channels and
    write elsewhere. AbsTopK keeps a quarter of the channels at all eight sites.

    Without any one of the 12 nodes the task's loss is above 0.15, whatever else is there.

    Args:
        distractors: Residual stream channels besides the circuit's five. There are four times as
            many neurons a layer as channels, and a quarter as many heads.
        seed: Decides places and random weights.

    Raises:
        ValueError: fewer than 27 distractors, or channels that heads of four do not divide.
    """
    if distractors < FEWEST or (distractors + 5) % D_HEAD:
        raise ValueError(
            f"distractors={distractors} must be at least {FEWEST}, and with the circuit's 5 "
            f"channels a multiple of {D_HEAD}, such as 27, 59 or 123"
        )
    tokenizer = quoted_tokenizer()
    config = SparseTransformerConfig(
        n_layers=2, d_model=distractors + 5, d_head=D_HEAD, n_ctx=N_CTX, d_vocab=len(tokenizer),
        activation_density=ActivationDensity.paper(DENSITY), seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = SparseTransformer(config, tokenizer).eval()
    places = Places.draw(config, generator)
    with torch.no_grad():
        write_distractors(model, places, generator)
        write_circuit(model, places)
    text = running_text(tokenizer, TEXT, seed)
    return GroundTruthModel.of(
        model, quote_task(tokenizer), text, places.roles(), places.edges(), DESCRIPTION
    )


def write_distractors(model: SparseTransformer, places: Places, generator: torch.Generator) -> None:
    """Random sparse weights everywhere, none of which writes to the circuit's channels.

    Nobody reads the loud channel but the norms.
    """

    noise = partial(write_noise, density=DENSITY, generator=generator)
    parts: Any = model
    own, d_model = places.channels, model.config.d_model
    noise(parts.embed.W_E, 1.0)
    parts.embed.W_E[:, [*own, places.loud]] = 0
    noise(parts.unembed.W_U, 1.0, d_model)
    for layer, block in enumerate(parts.blocks):
        attn, mlp = block.attn, block.mlp
        noise(attn.W_Q, QUERIES if layer == 1 else 1.2, d_model)
        for weight in (attn.W_K, attn.W_V, mlp.W_in):
            noise(weight, 1.2, d_model)
        noise(attn.W_O, 1.5, d_model)
        noise(mlp.W_out, 1.5, 4 * d_model)
        noise(mlp.b_in, 0.3)
        for weight in (attn.W_Q, attn.W_K, attn.W_V):
            weight[:, places.loud] = 0
        mlp.W_in[places.loud] = 0
        for bias, weight in ((attn.b_O, attn.W_O), (mlp.b_out, mlp.W_out)):
            noise(bias, 0.1)
            bias[own] = 0
            weight[..., own] = 0


def write_circuit(model: SparseTransformer, p: Places) -> None:
    """The circuit's weights, its embeddings and its unembedding."""
    tokenizer: Any = model.tokenizer
    parts: Any = model
    token = tokenizer.convert_tokens_to_ids
    embed, unembed = parts.embed.W_E, parts.unembed.W_U
    mlp, attn = parts.blocks[0].mlp, parts.blocks[1].attn

    embed[token(OPENING["single"]), p.single] = OPENING_SIZE
    embed[token(OPENING["double"]), p.double] = OPENING_SIZE
    embed[token(STOP), p.loud] = LOUDNESS * model.config.d_model**0.5

    # each neuron reads its opening and nothing else
    neurons = [p.single_neuron, p.double_neuron]
    mlp.W_in[:, neurons] = 0
    mlp.W_in[[p.single, p.double], neurons] = NEURON
    mlp.b_in[neurons] = THRESHOLD
    mlp.W_out[neurons, p.detector] = DETECT
    mlp.W_out[neurons, p.kind] = torch.tensor([-KIND, KIND])

    # no other query of the head meets a key; its other values read and write at random
    attn.W_Q[p.head] = 0
    attn.b_Q[p.head, p.qk] = QUERY
    attn.W_K[p.head, :, p.qk] = 0
    attn.W_K[p.head, p.detector, p.qk] = KEY
    attn.W_V[p.head, :, p.v] = 0
    attn.W_V[p.head, p.kind, p.v] = VALUE
    attn.W_O[p.head, p.v, p.out] = OUT

    closings = [token(CLOSING["single"]), token(CLOSING["double"])]
    unembed[:, closings] = 0
    unembed[p.out, closings] = torch.tensor([-GAIN, GAIN])
