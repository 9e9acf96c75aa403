"""What a page is told of a circuit: plain tables, texts and numbers, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from tl_sparse.views.circuit_table import CircuitTable
from tl_sparse.views.examples import TokenExample
from tl_sparse.views.graph_table import GraphTable

TOKEN_COLUMNS = ("node", "side", "text", "weight")
SIDES = ("embedding", "logits")


def no_tokens() -> pd.DataFrame:
    """An empty table of tokens."""
    return pd.DataFrame(columns=list(TOKEN_COLUMNS))


@dataclass(frozen=True)
class PageExample:
    """One prompt of a task, with what the model and the circuit make of it."""

    tokens: tuple[str, ...]
    """The prompt, one string a token."""
    correct_token: str
    """The correct continuation."""
    incorrect_token: str
    """The continuation that it competes with."""
    p_model: float
    """Probability of the correct token against the incorrect one in the full model, in [0, 1]."""
    p_circuit: float | None
    """The same in the circuit, everything else ablated, in [0, 1]; None if it was not run."""
    activations: Mapping[str, Sequence[float] | np.ndarray] | None = None
    """Node id ("layer.site.channel") to the node's value at every token in the full model; None if
    not recorded."""
    circuit_activations: Mapping[str, Sequence[float] | np.ndarray] | None = None
    """The same with everything else ablated."""
    attention: Mapping[str, np.ndarray] | None = None
    """Head ("L0H5") to its attention pattern in the full model, [query, key], in [0, 1]."""
    bigram: tuple[tuple[str, float], ...] = ()
    """What the model's bigram table alone adds to some logits after the last token: those of both
    answers, and the highest."""


@dataclass(frozen=True, eq=False)
class PageCircuit:
    """A circuit of the page, and what is shown of its nodes. All but the circuit may be left out.

    Nodes are called by their ids: "layer.site.channel" of a :class:`CircuitTable`, ``id`` of a
    :class:`GraphTable`.
    """

    circuit: CircuitTable | GraphTable
    """The circuit, or another graph."""
    title: str
    """What tells it from the task's other circuits, e.g. "sparse" or "dense"."""
    examples: tuple[PageExample, ...] = ()
    """Prompts; choosing a node colours their tokens by its values."""
    tokens: pd.DataFrame = field(default_factory=no_tokens)
    """A row per node and token: node, side ("embedding": tokens whose embedding writes the node's
    channel; "logits": logits that it moves), text, weight."""
    texts: Mapping[str, Mapping[str, Sequence[TokenExample]]] = field(default_factory=dict)
    """Node to name of a list ("top", "bottom") to texts in which the node is most active."""
    effects: Mapping[str, float] = field(default_factory=dict)
    """Node to what removing it alone from the circuit adds to the loss, in nats."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Node's name (OpenAI's, as the page shows it) to what its reader wrote about it."""
    key: str = ""
    """What tells the circuit from all others; notes are kept under it in the reader's browser."""
