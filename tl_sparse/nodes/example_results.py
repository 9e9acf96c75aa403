"""``TopExamples``: what :func:`~tl_sparse.nodes.top_examples` found, to look at, keep and load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.node import Node, NodeName, Nodes
from tl_sparse.node.names import is_parts
from tl_sparse.nodes.leaders import bin_edges
from tl_sparse.nodes.saved_run import check_tensors, number, read_state, within, write_state
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html
from tl_sparse.views.examples import ExampleLists, TokenExample, examples_html

KIND, SCHEMA = "top_examples", 1
SHOWN = 8  # nodes, and examples of each list, in a notebook
PARTS = ("values", "sequences", "positions", "context", "tokens")


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of every node from one end of its values, the most extreme first."""

    side: str
    """``"top"``: the largest values; ``"bottom"``: the smallest."""
    quantile: float | None
    """The share of all positions, at that end, from which they are a sample; None: they are the
    most extreme of all."""
    values: Float[Tensor, "node example"]
    """The node's value; NaN where there were too few positions."""
    sequences: Int[Tensor, "node example"]
    """Which sequence of the tokens; -1 where there is none."""
    positions: Int[Tensor, "node example"]
    """Which position of the sequence as it was given; -1 where there is none."""
    context: Float[Tensor, "node example window"]
    """The node's values at the tokens around and at it; NaN outside the sequence."""
    tokens: Int[Tensor, "node example window"]
    """Ids of these tokens; -1 outside the sequence."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    @property
    def name(self) -> str:
        """``top`` or ``top 1 %``."""
        return self.side if self.quantile is None else f"{self.side} {100 * self.quantile:g} %"

    def of(self, rows: Int[Tensor, " chosen"]) -> Examples:
        """Those of some nodes."""
        return replace(self, **{name: getattr(self, name)[rows] for name in PARTS})


@dataclass(frozen=True, eq=False, repr=False)
class TopExamples:
    """The examples of many nodes over some tokens, and a histogram of each node's values."""

    nodes: pd.DataFrame
    """A row per node: name (OpenAI's), layer, site, channel, head, head_channel, hook."""
    examples: tuple[Examples, ...]
    """Top and bottom, then the samples, the smallest quantile first."""
    counts: Int[Tensor, "node bin"]
    """Exact histogram of each node's values; :meth:`histogram` has the edges."""
    exponents: Int[Tensor, " node"]
    """The bins divide [-2^exponent, 2^exponent) evenly."""
    means: Float[Tensor, " node"]
    """Mean value of each node."""
    active: Float[Tensor, " node"]
    """Share of the positions at which each node is not zero."""
    n_tokens: int
    """Positions that were looked at (real tokens)."""
    before: int
    """Tokens of each example's window that are before its own."""
    texts: Mapping[int, str]
    """Text of every token that occurs in an example."""
    run: Mapping[str, Any]
    """Settings, fingerprint of the model and digest of the tokens."""

    def __len__(self) -> int:
        return len(self.nodes)

    def of(self, nodes: Nodes) -> TopExamples:
        """The same of some of the nodes.

        Raises:
            ValueError: one of them is not among these.
        """
        one = isinstance(nodes, str | Node) or is_parts(nodes)
        names: list[Any] = [nodes] if one else list(nodes)  # type: ignore[arg-type]
        places = {name: i for i, name in enumerate(self.nodes["name"])}
        found = [places.get(self._name(node), -1) for node in names]
        if -1 in found:
            raise ValueError(
                f"{names[found.index(-1)]}: these are the examples of {len(self)} other nodes, "
                f"such as {self.nodes['name'].iloc[0]}"
            )
        rows = torch.tensor(found)
        tensors = {
            name: getattr(self, name)[rows] for name in ("counts", "exponents", "means", "active")
        }
        return replace(
            self,
            nodes=self.nodes.iloc[found].reset_index(drop=True),
            examples=tuple(part.of(rows) for part in self.examples),
            **tensors,
        )

    def _name(self, node: NodeName) -> str:
        """A node's name in the table, also of one that is named by its head."""
        found = Node(node)
        if found.channel is None:
            table = self.nodes
            at = (table["layer"] == found.layer) & (table["site"] == found.site)
            at &= (table["head"] == found.head) & (table["head_channel"] == found.head_channel)
            return str(table["name"][at].iloc[0]) if at.any() else ""
        return str(found)

    def histogram(self, node: NodeName) -> pd.DataFrame:
        """A row per bin of a node's values: from, to (not included), positions."""
        one = self.of([node])
        edges = bin_edges(self.counts.shape[1], one.exponents[0]).numpy()
        return pd.DataFrame({"from": edges[:-1], "to": edges[1:], "positions": one.counts[0]})

    def to_dataframe(self) -> pd.DataFrame:
        """A row per example: node, layer, site, channel, side, quantile (NaN: the extremes), rank,
        value, sequence, position, token, text (the window's tokens)."""
        return pd.concat([self._frame(part) for part in self.examples], ignore_index=True)

    def _frame(self, part: Examples) -> pd.DataFrame:
        n, k = part.values.shape
        which, rank = np.divmod(np.arange(n * k), k)
        there = part.sequences.flatten().numpy() >= 0
        words = self._words(part.tokens).reshape(n * k, -1)[there]
        columns: dict[str, Any] = {"node": self.nodes["name"].to_numpy()[which]}
        columns |= {name: self.nodes[name].to_numpy()[which] for name in ("layer", "site",
                                                                           "channel")}  # fmt: skip
        columns |= {"side": part.side, "quantile": part.quantile or np.nan, "rank": rank}
        columns |= {
            "value": part.values.flatten().numpy(),
            "sequence": part.sequences.flatten().numpy(),
            "position": part.positions.flatten().numpy(),
        }
        frame = pd.DataFrame(columns)[there].reset_index(drop=True)
        frame["token"] = words[:, self.before]
        frame["text"] = ["".join(row) for row in words]
        return frame

    def _words(self, tokens: Int[Tensor, "..."]) -> np.ndarray:
        """Texts of ids, as an array of strings; empty where there is no token."""
        ids, place = np.unique(tokens.numpy(), return_inverse=True)
        known = np.array([self.texts.get(int(i), f"<{i}>") if i >= 0 else "" for i in ids], object)
        return known[place.reshape(tokens.shape)]

    def __repr__(self) -> str:
        k = self.examples[0].values.shape[1]
        return (
            f"TopExamples({len(self):,} nodes, {k} at either end and {len(self.examples) // 2 - 1} "
            f"quantiles, over {self.n_tokens:,} tokens)"
        )

    def _repr_html_(self) -> str:
        shown = self.nodes["name"].head(SHOWN)
        some = self.of(list(self.nodes.head(SHOWN)["name"])) if len(self) > SHOWN else self
        line = f"{len(self):,} nodes over {self.n_tokens:,} tokens"
        line += f"; the first {SHOWN} are shown" if len(self) > SHOWN else ""
        parts = []
        for i, name in enumerate(shown):
            facts = f"mean {self.means[i]:.3g}, not zero at {100 * self.active[i]:.3g} %"
            parts.append(ExampleLists(str(name), facts, some.lists(i)))
        return examples_html("Top examples", line, parts)

    def lists(self, row: int) -> dict[str, list[TokenExample]]:
        """The examples of the node in a row of :attr:`nodes`, list by list, to be drawn; at most
        eight of each."""
        return {part.name: self._shown(part, row) for part in self.examples}

    def _shown(self, part: Examples, node: int) -> list[TokenExample]:
        found = []
        for j in range(min(part.values.shape[1], SHOWN)):
            if part.sequences[node, j] < 0:
                break
            inside = part.tokens[node, j] >= 0
            words = self._words(part.tokens[node, j])[inside.numpy()]
            note = (
                f"{part.values[node, j]:.4g} · sequence {part.sequences[node, j]}, "
                f"position {part.positions[node, j]}"
            )
            found.append(
                TokenExample(
                    tuple(words),
                    tuple(part.context[node, j][inside].tolist()),
                    int(inside[: self.before].sum()),
                    note,
                )
            )
        return found

    def save(self, folder: str | Path) -> None:
        """Write them to a folder, which appears when it is complete, for :meth:`load`."""
        table = self.nodes
        hooks = list(dict.fromkeys(table["hook"]))
        sites = dict(zip(table["hook"], table["site"], strict=True))
        record = {
            "kind": KIND, "schema": SCHEMA, "finished": True, "n_tokens": self.n_tokens,
            "before": self.before, "hooks": hooks, "sites": [sites[hook] for hook in hooks],
            "lists": [[part.side, part.quantile] for part in self.examples],
            "texts": [[token, text] for token, text in self.texts.items()],
            "settings": dict(self.run), "nodes": len(self),
        }  # fmt: skip
        place = {hook: i for i, hook in enumerate(hooks)}
        tensors = {
            "hook": torch.tensor([place[hook] for hook in table["hook"]]),
            "layer": torch.tensor(table["layer"].to_numpy()),
            "channel": torch.tensor(table["channel"].to_numpy()),
            "head": torch.tensor(table["head"].fillna(-1).to_numpy(np.int64)),
            "head_channel": torch.tensor(table["head_channel"].fillna(-1).to_numpy(np.int64)),
            "counts": self.counts, "exponents": self.exponents, "means": self.means,
            "active": self.active,
        }  # fmt: skip
        for i, part in enumerate(self.examples):
            tensors |= {f"{i}.{name}": getattr(part, name) for name in PARTS}
        write_state(Path(folder), record, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> TopExamples:
        """Read them from a folder that :meth:`save` or a finished run wrote.

        Raises:
            FileNotFoundError: there are none in it.
            ValueError: the run is not finished, or the files are broken or of another schema.
        """
        folder = Path(folder)
        record, tensors = read_state(folder, KIND, SCHEMA)
        if record.get("finished") is not True:
            raise ValueError(f"the run in {folder} is not finished: call top_examples again")
        try:
            return _from_files(folder, record, tensors)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"{folder} is broken: {error!s:.300}") from error


def node_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``NodeIndex.nodes`` with OpenAI's names in front."""
    frame = frame.reset_index(drop=True)
    columns = zip(frame["layer"].tolist(), frame["site"], frame["channel"].tolist(), strict=True)
    names = [str(Node(layer, site, channel)) for layer, site, channel in columns]
    frame.insert(0, "name", names)
    return frame


def _from_files(folder: Path, record: dict[str, Any], tensors: dict[str, Tensor]) -> TopExamples:
    hooks, sites, lists = (record[name] for name in ("hooks", "sites", "lists"))
    texts = dict(record["texts"])
    fits = all(isinstance(word, str) for word in [*hooks, *sites, *texts.values()])
    fits = fits and len(hooks) == len(sites) and isinstance(record["settings"], dict)
    fits = fits and all(side in ("top", "bottom") for side, _ in lists) and len(lists) > 1
    fits = fits and all(q is None or (isinstance(q, float) and 0 < q <= 1) for _, q in lists)
    if not fits or not all(isinstance(token, int) for token in texts):
        raise ValueError("its record is no list of examples")
    n = number(record, "nodes", 1)
    numbers = ("hook", "layer", "channel", "head", "head_channel", "exponents")
    expected: dict[str, tuple[Any, ...]] = dict.fromkeys(numbers, (torch.int64, n))
    expected |= dict.fromkeys(("means", "active"), (torch.float32, n))
    expected["counts"] = (torch.int64, n, *tensors["counts"].shape[1:2])
    window = tensors["0.context"].shape[2]
    for i in range(len(lists)):
        k = tensors[f"{i}.values"].shape[1]
        expected |= {
            f"{i}.values": (torch.float32, n, k), f"{i}.sequences": (torch.int64, n, k),
            f"{i}.positions": (torch.int64, n, k), f"{i}.context": (torch.float32, n, k, window),
            f"{i}.tokens": (torch.int64, n, k, window),
        }  # fmt: skip
    check_tensors(folder, tensors, expected)
    before = number(record, "before", 0, max(window - 1, 0))
    inside = within(tensors["hook"], 0, len(hooks)) and within(tensors["exponents"], -200, 200)
    if not inside or not all(within(tensors[name], -1, 1 << 31) for name in numbers[1:5]):
        raise ValueError("it names nodes that no model has")
    place = tensors["hook"].tolist()
    head = {
        name: pd.Series(tensors[name].numpy()).astype("Int64").where(tensors[name].numpy() >= 0)
        for name in ("head", "head_channel")
    }
    frame = pd.DataFrame(
        {
            "layer": tensors["layer"].numpy(),
            "site": pd.Series([sites[i] for i in place], dtype="object"),
            "channel": tensors["channel"].numpy(),
            **head,
            "hook": [hooks[i] for i in place],
        }
    )
    examples = tuple(
        Examples(side, quantile, **{name: tensors[f"{i}.{name}"] for name in PARTS})
        for i, (side, quantile) in enumerate(lists)
    )
    rest = {name: tensors[name] for name in ("counts", "exponents", "means", "active")}
    return TopExamples(
        node_table(frame), examples, **rest, n_tokens=number(record, "n_tokens", 1),
        before=before, texts=texts, run=record["settings"],
    )  # fmt: skip
