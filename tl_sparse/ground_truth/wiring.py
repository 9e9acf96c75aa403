"""Heads and neurons in terms of named residual stream channels, and the model they are written in.

A :class:`Plan` says what a circuit reads and writes; :func:`build` gives every named channel, head
and neuron a random place in a model and fills the rest with random sparse weights, the distractors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_sparse.config import SparseTransformerConfig
from tl_sparse.ground_truth.ground_truth_model import GroundTruthModel
from tl_sparse.ground_truth.noise import write_noise
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.tasks import Task

Channels = Mapping[str, float]
"""Residual stream channel → weight."""
Node = tuple[int, str, int]
"""Layer, site and channel."""
Edge = tuple[int, str, int, str, int, str, float]
"""In the columns of ``circuit_edges``."""

BALLAST = 100.0  # the stream's two constant channels, far larger than most of what is written
NO_SINK = -1e3  # a sink's logit, so low that nothing is attended to it
DENSITY = 0.25  # share of the distractors' weights that are not zero


@dataclass(frozen=True)
class HeadPart:
    """An attention head: each of its channels reads and writes named residual stream channels."""

    layer: int
    """Its layer."""
    name: str
    """What it does."""
    query: tuple[Channels, ...]
    """What each query channel reads."""
    key: tuple[Channels, ...]
    """What each key channel reads; keys meet the queries of the same number."""
    value: tuple[Channels, ...]
    """What each value channel reads."""
    writes: tuple[Channels, ...]
    """What each value channel writes."""
    query_bias: tuple[float, ...] = ()
    """Constants added to the first query channels. A query that is nothing else is a node of the
    circuit, too, though mean ablation does not touch it: its mean is its only value."""
    sink: float | None = None
    """Logit of attending to nothing; None: the head always attends to some token."""
    also: tuple[tuple[Channels, Channels], ...] = ()
    """Further queries, each with the key that it meets, for purposes beside the circuit's: no nodes
    of it."""
    beside: bool = False
    """Whether it stands beside the circuit: no node of it."""


@dataclass(frozen=True)
class NeuronPart:
    """An MLP neuron with ReLU."""

    layer: int
    """Its layer."""
    name: str
    """What it does."""
    reads: Channels
    """What it reads."""
    writes: Channels
    """What it writes."""
    bias: float = 0.0
    """Added before the ReLU."""
    beside: bool = False
    """Whether it stands beside the circuit: no node of it."""


@dataclass(frozen=True)
class Plan:
    """A circuit in terms of named residual stream channels."""

    n_layers: int
    """Layers of the model."""
    embed: Mapping[str, Channels]
    """Token → its embedding in the circuit's channels."""
    unembed: Mapping[str, Channels]
    """Token → what its logit reads."""
    heads: tuple[HeadPart, ...]
    """The heads."""
    neurons: tuple[NeuronPart, ...] = ()
    """The neurons."""
    positions: tuple[Channels, ...] = ()
    """What the first positions' embeddings are in the circuit's channels; positions are embedded
    only if there are any."""
    unread: frozenset[str] = field(default_factory=frozenset)
    """Channels that distractors do not read: so large that these would drown everything."""

    @property
    def channels(self) -> list[str]:
        """All named channels, in the order in which they are first named."""
        maps: list[Channels] = [*self.embed.values(), *self.positions]
        for head in self.heads:
            maps += [*head.query, *head.key, *head.value, *head.writes]
            maps += [channels for pair in head.also for channels in pair]
        for neuron in self.neurons:
            maps += [neuron.reads, neuron.writes]
        maps += self.unembed.values()
        return list(dict.fromkeys(name for part in maps for name in part))


@dataclass(frozen=True, eq=False)
class Places:
    """Where everything stands, drawn from a seed."""

    channel: Mapping[str, int]
    """Residual stream channel of every name."""
    ballast: tuple[int, int]
    """The residual stream's constant channels."""
    heads: tuple[int, ...]
    """Head of every part."""
    qk: tuple[tuple[int, ...], ...]
    """Channels within the head of every part's queries and keys."""
    v: tuple[tuple[int, ...], ...]
    """The same of its values."""
    neurons: tuple[int, ...]
    """Neuron of every part."""

    @classmethod
    def draw(
        cls, plan: Plan, config: SparseTransformerConfig, generator: torch.Generator
    ) -> Places:
        """Random places for a plan's parts."""

        def some(n: int, of: int | None) -> list[int]:
            assert of is not None
            return torch.randperm(of, generator=generator)[:n].tolist()

        names = plan.channels
        *channels, up, down = some(len(names) + 2, config.d_model)

        def per_layer(parts: tuple[Any, ...], of: int | None) -> tuple[int, ...]:
            order = [iter(some(of or 0, of)) for _ in range(plan.n_layers)]
            return tuple(next(order[part.layer]) for part in parts)

        return cls(
            channel=dict(zip(names, channels, strict=True)),
            ballast=(up, down),
            heads=per_layer(plan.heads, config.n_heads),
            qk=tuple(tuple(some(len(h.query) + len(h.also), config.d_head)) for h in plan.heads),
            v=tuple(tuple(some(len(h.value), config.d_head)) for h in plan.heads),
            neurons=per_layer(plan.neurons, config.d_mlp),
        )


def build(
    plan: Plan,
    task: Task,
    text: Int[Tensor, "sequence pos"],
    *,
    description: str,
    distractors: int = 24,
    heads: int = 6,
    d_head: int = 4,
    neurons: int = 96,
    seed: int = 0,
) -> GroundTruthModel:
    """A model of a plan, among distractors.

    Two constant channels of the residual stream are so large that its norm is nearly constant
    wherever the plan writes nothing as large; what parts read is scaled up by as much. Attention
    scores are products of queries and keys, undivided. Distractors are random sparse weights that
    read the plan's channels, too, and write elsewhere.

    Args:
        plan: The circuit.
        task: What it is for, with its tokenizer; its length is the model's context.
        text: What means are taken over.
        description: What the model does and how.
        distractors: Residual stream channels besides the plan's and the two constant ones.
        heads: Heads a layer.
        d_head: Channels of a head.
        neurons: Neurons a layer.
        seed: Decides places and random weights.

    Raises:
        ValueError: more parts in a layer than it has heads or neurons, or wider ones than heads, or
            parts in layers that are not there, or tokens that the tokenizer does not have.
    """
    check_fits(plan, heads, d_head, neurons)
    config = SparseTransformerConfig(
        n_layers=plan.n_layers, d_model=len(plan.channels) + 2 + distractors, d_head=d_head,
        n_heads=heads, d_mlp=neurons, n_ctx=task.max_tokens, d_vocab=len(task.tokenizer),
        act_fn="relu", attn_scale=1.0, seed=seed, use_attention_sinks=True,
        positional_embedding_type="standard" if plan.positions else "none",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = SparseTransformer(config, task.tokenizer).eval()
    places = Places.draw(plan, config, generator)
    with torch.no_grad():
        write_distractors(model, plan, places, generator)
        write_ends(model, plan, places, task.tokenizer)
        roles, edges = write_parts(model, plan, places)
    return GroundTruthModel.of(model, task, text, roles, edges, description)


def check_fits(plan: Plan, heads: int, d_head: int, neurons: int) -> None:
    """ValueError if a layer cannot hold the plan's parts, or is not there."""
    every: list[HeadPart | NeuronPart] = [*plan.heads, *plan.neurons]
    for part in every:
        if not 0 <= part.layer < plan.n_layers:
            raise ValueError(f"{part.name!r} is in layer {part.layer} of {plan.n_layers}")
    for layer in range(plan.n_layers):
        here = [head for head in plan.heads if head.layer == layer]
        wide = max((max(len(h.query) + len(h.also), len(h.value)) for h in here), default=0)
        n_neurons = sum(part.layer == layer for part in plan.neurons)
        for name, wanted, given in (
            ("heads", len(here), heads), ("d_head", wide, d_head), ("neurons", n_neurons, neurons),
        ):  # fmt: skip
            if wanted > given:
                raise ValueError(f"layer {layer} of the plan needs {name}={wanted}, not {given}")


def norm_scale(model: SparseTransformer) -> float:
    """What the norms divide the residual stream by where the two constant channels dominate it."""
    return BALLAST * (2 / model.config.d_model) ** 0.5


def write_distractors(
    model: SparseTransformer, plan: Plan, places: Places, generator: torch.Generator
) -> None:
    """Random sparse weights everywhere, none of which writes to the plan's channels."""
    scale, d_model = norm_scale(model), model.config.d_model
    own = [*places.channel.values(), *places.ballast]
    unread = [*places.ballast, *(places.channel[name] for name in sorted(plan.unread))]

    noise = partial(write_noise, density=DENSITY, generator=generator)
    parts: Any = model
    noise(parts.embed.W_E, 1.0)
    parts.embed.W_E[:, own] = 0
    if plan.positions:
        noise(parts.pos_embed.W_pos, 0.5)
        parts.pos_embed.W_pos[:, own] = 0
    noise(parts.unembed.W_U, scale, d_model)
    for block in parts.blocks:
        attn, mlp = block.attn, block.mlp
        for weight in (attn.W_Q, attn.W_K, attn.W_V, mlp.W_in):
            noise(weight, 1.2 * scale, d_model)
            weight[..., unread, :] = 0
        noise(attn.W_O, 1.0, d_model)
        noise(mlp.W_out, 1.5, len(mlp.W_out))
        noise(mlp.b_in, 0.3)
        attn.sinks.fill_(NO_SINK)
        for weight in (attn.W_O, mlp.W_out):
            weight[..., own] = 0


def write_ends(
    model: SparseTransformer, plan: Plan, places: Places, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Embeddings, the constant channels, and the unembeddings of the tokens that the plan names."""
    parts: Any = model
    up, down = places.ballast
    embed, unembed = parts.embed.W_E, parts.unembed.W_U
    embed[:, up], embed[:, down] = BALLAST, -BALLAST
    for token, channels in plan.embed.items():
        for name, value in channels.items():
            embed[token_id(tokenizer, token), places.channel[name]] = value
    for position, channels in enumerate(plan.positions):
        for name, value in channels.items():
            parts.pos_embed.W_pos[position, places.channel[name]] = value
    for token, channels in plan.unembed.items():
        unembed[:, token_id(tokenizer, token)] = 0
        for name, gain in channels.items():
            unembed[places.channel[name], token_id(tokenizer, token)] = gain * norm_scale(model)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a token; ValueError if there is none."""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ValueError(f"{token!r} is no token of the task's tokenizer")
    return found


@dataclass(frozen=True)
class Link:
    """A weight of the plan, and what the nodes at its ends do."""

    edge: Edge
    """In the columns of ``circuit_edges``."""
    source_role: str
    """What the node that it comes from does."""
    target_role: str
    """What the node that it goes to does."""


def head_links(
    part: HeadPart, head: int, qk: Sequence[int], v: Sequence[int], places: Places, scale: float,
    d_head: int,
) -> Iterator[Link]:  # fmt: skip
    """All weights of a head."""
    first, values = head * d_head, f"value of: {part.name}, for "
    carried = [values + ", ".join(writes) for writes in part.writes]
    asked = [f"query of: {part.name}"] * len(qk)
    told = [f"key of: {part.name}"] * len(qk)
    for site, matrix, reads, channels, roles in (
        ("attn_q", "W_Q", part.query, qk, asked),
        ("attn_k", "W_K", part.key, qk, told),
        ("attn_v", "W_V", part.value, v, carried),
    ):
        for weights, target, role in zip(reads, channels, roles, strict=True):
            for name, weight in weights.items():
                source = places.channel[name]
                edge = (
                    part.layer, "attn_in", source, site, first + target, matrix, weight * scale,
                )  # fmt: skip
                yield Link(edge, f"reads {name}", role)
    for weights, source, role in zip(part.writes, v, carried, strict=True):
        for name, weight in weights.items():
            target = places.channel[name]
            edge = (part.layer, "attn_v", first + source, "attn_out", target, "W_O", weight)
            yield Link(edge, role, f"writes {name}")


def neuron_links(part: NeuronPart, neuron: int, places: Places, scale: float) -> Iterator[Link]:
    """All weights of a neuron."""
    for name, weight in part.reads.items():
        source = places.channel[name]
        edge = (part.layer, "mlp_in", source, "mlp_neuron", neuron, "W_in", weight * scale)
        yield Link(edge, f"reads {name}", part.name)
    for name, weight in part.writes.items():
        target = places.channel[name]
        edge = (part.layer, "mlp_neuron", neuron, "mlp_out", target, "W_out", weight)
        yield Link(edge, part.name, f"writes {name}")


def write_parts(
    model: SparseTransformer, plan: Plan, places: Places
) -> tuple[dict[Node, str], list[Edge]]:
    """The weights of the plan's heads and neurons, and nothing else in these.

    Returns:
        Layer, site and channel of every node → its role, and the edges as in ``circuit_edges``.
    """
    parts: Any = model
    scale, d_head = norm_scale(model), model.config.d_head
    roles: dict[Node, dict[str, None]] = {}
    links: list[Link] = []
    beside: list[Link] = []
    for part, head, qk, v in zip(plan.heads, places.heads, places.qk, places.v, strict=True):
        attn = parts.blocks[part.layer].attn
        for weight in (attn.W_Q, attn.W_K, attn.W_V, attn.W_O):
            weight[head] = 0
        attn.sinks[head] = NO_SINK if part.sink is None else part.sink
        for bias, channel in zip(part.query_bias, qk, strict=False):
            attn.b_Q[head, channel] = bias
            if not part.beside:
                node = (part.layer, "attn_q", head * d_head + channel)
                roles.setdefault(node, {})[f"query of: {part.name}"] = None
        found = head_links(part, head, qk[: len(part.query)], v, places, scale, d_head)
        (beside if part.beside else links).extend(found)
        for pair, channel in zip(part.also, qk[len(part.query) :], strict=True):
            for weight, reads in zip((attn.W_Q, attn.W_K), pair, strict=True):
                for name, gain in reads.items():
                    weight[head, places.channel[name], channel] = gain * scale
    for neuron, place in zip(plan.neurons, places.neurons, strict=True):
        mlp = parts.blocks[neuron.layer].mlp
        mlp.W_in[:, place] = 0
        mlp.W_out[place] = 0
        mlp.b_in[place] = neuron.bias
        (beside if neuron.beside else links).extend(neuron_links(neuron, place, places, scale))
    for link in [*links, *beside]:
        layer, source_site, source, target_site, target, matrix, weight = link.edge
        block = parts.blocks[layer]
        if matrix == "W_O":
            block.attn.W_O[source // d_head, source % d_head, target] = weight
        elif matrix in ("W_in", "W_out"):
            getattr(block.mlp, matrix)[source, target] = weight
        else:
            getattr(block.attn, matrix)[target // d_head, source, target % d_head] = weight
    for link in links:
        layer, source_site, source, target_site, target, _, _ = link.edge
        roles.setdefault((layer, source_site, source), {})[link.source_role] = None
        roles.setdefault((layer, target_site, target), {})[link.target_role] = None
    edges = [link.edge for link in links]
    return {node: "; ".join(names) for node, names in roles.items()}, edges
