"""The command about nodes: what a node is connected to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pandas as pd
import tyro

from tl_sparse.cli.inputs import say
from tl_sparse.model.by_name import model_of
from tl_sparse.nodes import Direction, NodeGraph, channel_tokens, readers, trace, writers
from tl_sparse.views.text import visible


@dataclass(frozen=True)
class Nodes:
    """What writes and what reads a node, by weight; traces; and the tokens of its channel."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a saved model (ours or OpenAI's), or the name of a bundled one."""
    node: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NODE")]
    """The node, such as 4.attn.act_in:1249, L10H82.v3 or 6-mlp/5543; or token:17; or the number of
    a channel of the residual stream."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Rows of each table."""
    depth: int = 2
    """Steps of the traces; 0 for none."""
    trace_k: int = 3
    """Connections of each node that a trace follows."""

    def run(self) -> None:
        """Say it."""
        model = model_of(self.model)
        graph = NodeGraph.of(model)
        node = int(self.node) if self.node.isdecimal() else self.node
        for title, question in (("Writers", writers), ("Readers", readers)):
            found = question(graph, node)
            hidden = f", the {self.k} largest" if len(found) > self.k else ""
            say(f"{title}: {len(found):,} weights{hidden}")
            say(shown(question(graph, node, self.k).iloc[:, :6]))
        if isinstance(node, str) and self.depth and len(graph.numbers(node)) == 1:
            directions: tuple[Direction, ...] = ("back", "forward")
            for direction in directions:
                say(f"\nTrace {direction}")
                say(trace(graph, node, self.depth, self.trace_k, direction).to_text())
        try:
            tokens = channel_tokens(model, node, self.k)
        except ValueError:  # a neuron, or a channel of a head: no token writes it
            return
        say("\nTokens that write the channel, and logits that read it")
        say(shown(tokens))


def shown(frame: pd.DataFrame) -> str:
    """A table in lines, white space in its texts made visible."""
    if frame.empty:
        return "  (none)"
    texts = {name: frame[name].map(lambda x: "–" if x is None else visible(str(x)))
             for name in frame if not pd.api.types.is_numeric_dtype(frame[name])}  # fmt: skip
    return frame.assign(**texts).to_string(index=False, float_format="{:.4g}".format)
