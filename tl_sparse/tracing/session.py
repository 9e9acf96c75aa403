"""``TraceSession``: tracing by hand as a list of steps that can be repeated, or step by step by
itself.

From the root, the direct contributors are looked at; one of them is chosen and expanded in its
turn; and so on. The list of what was expanded is the whole of it.

Source: the tracing server of Ge et al.'s code (September 2024), which is how the graphs of the
paper were made by hand.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from tl_sparse.nodes.prompts import Prompts, PromptsLike, prompts_of
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.storage.json_files import plain, read_json
from tl_sparse.tracing.attribution import attribute
from tl_sparse.tracing.edges import Target, rows
from tl_sparse.tracing.gate import Gate, parse_id
from tl_sparse.tracing.graph import EDGE_COLUMNS, TracedGraph
from tl_sparse.tracing.roots import (
    AttentionPattern,
    AttentionScore,
    FeatureRoot,
    Logit,
    LogitDiff,
    LogProb,
    Root,
)
from tl_sparse.tracing.run import run
from tl_sparse.tracing.splice import Splice
from tl_sparse.tracing.tables import edge_tables, prompt_nodes, prompt_words
from tl_sparse.tracing.trace import settings_of
from tl_sparse.views.display import frame_html

SCHEMA_VERSION = 1
ROOTS = {
    kind.__name__: kind
    for kind in (Logit, LogitDiff, LogProb, FeatureRoot, AttentionScore, AttentionPattern)
}
"""Roots that a file can name."""


class TraceSession:
    """Tracing of one prompt, one expansion at a time.

    ``expand()`` looks at the root, ``expand(id)`` at one of its contributors;
    ``expand_best(n)`` expands, n times, the node through which most of the root goes of those not
    yet expanded. ``graph()`` is what was found so far.
    """

    def __init__(
        self,
        splice: Splice,
        prompt: PromptsLike | Prompts,
        root: Root,
        *,
        threshold: float = 0.1,
        top_k: int | None = None,
    ) -> None:
        """Run the prompt once; nothing is expanded yet.

        Args:
            splice: The model and its dictionaries.
            prompt: One prompt.
            root: What is traced.
            threshold: Contributions that are at most this large are left out, in the units of what
                is expanded.
            top_k: At most so many contributors of each; None for all.

        Raises:
            ValueError: more prompts, or a root that the prompt does not have.
        """
        prompts = prompts_of(splice.model, prompt)
        if len(prompts) != 1:
            raise ValueError(f"a session is about one prompt, not {len(prompts)}")
        self.root, self.threshold, self.top_k = root, threshold, top_k
        self._run = run(splice, prompts.tokens, prompts.last, Gate.off(), points=root.hooks(splice))
        self._found = attribute(self._run, root)
        self._nodes = prompt_nodes(self._run, self._found, root, 0)
        self._by_id = self._nodes.table.set_index("id", drop=False)
        self.expansions: list[str] = []
        """What was expanded, in order: the root's name, then ids."""
        self._edges: dict[str, pd.DataFrame] = {}
        self._influence: dict[str, float] = {}

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        last = int(self._run.last[0])
        return tuple(self._run.tokens[0, : last + 1].tolist())

    def expand(self, node: str | None = None) -> pd.DataFrame:
        """The direct contributors of a node that was found (None: of the root): a row each, the
        largest first: id, kind, site, pos, index, weight.

        Raises:
            ValueError: the root was not expanded yet, no such node was found, or it is a leaf.
        """
        name = self.root.name(0)
        node = name if node is None else node
        if node in self._edges:
            return self._shown(node)
        if node != name and node not in self._influence:
            first = "expand() the root first" if not self.expansions else "frontier() lists those"
            raise ValueError(f"{node!r} is none of the nodes found so far: {first}")
        target = Target(0)
        if node != name:
            kind = self._by_id.loc[node, "kind"]
            if kind != "feature":
                raise ValueError(f"{node!r} is a leaf ({kind}): nothing is before it")
            site, pos, index = parse_id(node)
            if self._run.sites[site].first:
                raise ValueError(f"{node!r} is of the first dictionary: nothing is before it")
            entry = self._run.sites[site].active.find(0, int(pos or 0), index)
            target = Target(0, site, entry)
        row = rows(self._run, self._found, [[target]], through=False, chunk=1)
        ((edges, _),) = edge_tables(self._run, row, [self._nodes], [name], through=False)
        size = edges["weight"].abs()
        share = size / size.sum()
        order = size.sort_values(ascending=False, kind="stable").index
        chosen = [i for i in order if size[i] > self.threshold][: self.top_k]
        self._edges[node] = edges.loc[chosen].reset_index(drop=True)
        self.expansions.append(node)
        own = 1.0 if node == name else self._influence[node]
        for i in chosen:
            source = str(edges["source"][i])
            self._influence[source] = self._influence.get(source, 0.0) + own * float(share[i])
        return self._shown(node)

    def frontier(self) -> pd.DataFrame:
        """Features that were found and not expanded, by influence: how much of the root goes
        through them along what was expanded."""
        found = [
            (node, value)
            for node, value in self._influence.items()
            if node not in self._edges and self._by_id.loc[node, "kind"] == "feature"
            and not self._run.sites[str(self._by_id.loc[node, "site"])].first
        ]  # fmt: skip
        table = pd.DataFrame(found, columns=["id", "influence"])
        return table.sort_values("influence", ascending=False, kind="stable", ignore_index=True)

    def expand_best(self, n: int = 10) -> TraceSession:
        """Expand the root, and then the node of most influence, ``n`` times in all."""
        for _ in range(n):
            if not self.expansions:
                self.expand()
                continue
            ahead = self.frontier()
            if not len(ahead):
                break
            self.expand(str(ahead["id"][0]))
        return self

    def graph(self) -> TracedGraph:
        """What was found so far, as a graph; attributions are those of an open gate."""
        name = self.root.name(0)
        nodes = self._nodes.table
        nodes = nodes[nodes["id"].isin({name, *self._influence})].reset_index(drop=True)
        empty = pd.DataFrame(columns=list(EDGE_COLUMNS))
        edges = pd.concat(list(self._edges.values()) or [empty], ignore_index=True)
        mass = {kind: float(part[0]) for kind, part in self._found.mass.items()}
        settings = settings_of(self._run.splice, Gate.off(), "direct")
        return TracedGraph(
            self.prompt, prompt_words(self._run, 0), name, float(self._found.values[0].detach()),
            nodes, edges, mass, settings=settings | {"expansions": list(self.expansions)},
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the prompt, the root and the list of expansions to a JSON file.

        Raises:
            ValueError: a custom root, which no file can hold.
        """
        kind = type(self.root).__name__
        if kind not in ROOTS:
            raise ValueError(f"a root of kind {kind} cannot be written; choose {', '.join(ROOTS)}")
        values = {
            "schema_version": SCHEMA_VERSION, "tl_sparse_version": version("tl-sparse"),
            "prompt": list(self.prompt), "root": {"kind": kind} | asdict(self.root),
            "threshold": self.threshold, "top_k": self.top_k, "expansions": self.expansions,
        }  # fmt: skip
        write_atomic(Path(path), json.dumps(plain(values), allow_nan=False))

    @classmethod
    def replay(cls, splice: Splice, path: str | Path) -> TraceSession:
        """Repeat the expansions of a file with a model and dictionaries.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no session, or the model does not have one of its nodes.
        """
        values = read_json(path)
        try:
            if values["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version {values['schema_version']!r:.40}")
            root = root_from(values["root"])
            prompt, expansions = list(values["prompt"]), list(values["expansions"])
            threshold, top_k = float(values["threshold"]), values["top_k"]
            if top_k is not None and (not is_number(top_k) or top_k < 0):
                raise ValueError(f"top_k {top_k!r:.40}")
            if not all(isinstance(x, str) for x in expansions):
                raise ValueError("expansions must be ids")
            if not all(map(is_number, prompt)):
                raise ValueError("prompt must be token ids")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is no tracing session: {error}") from error
        session = cls(splice, [prompt], root, threshold=threshold, top_k=top_k)
        for node in expansions:
            session.expand(node)
        return session

    def _shown(self, node: str) -> pd.DataFrame:
        table = self._edges[node]
        known = self._by_id.loc[table["source"], ["id", "kind", "site", "pos", "index"]]
        return known.reset_index(drop=True).assign(weight=table["weight"].to_numpy())

    @property
    def line(self) -> str:
        """The facts in one line."""
        return f"{self.root.name(0)}: {len(self.expansions)} expanded, {len(self._influence)} found"

    def __repr__(self) -> str:
        return f"TraceSession({self.line})"

    def _repr_html_(self) -> str:
        return frame_html("Tracing session", self.line, self.frontier().head(20))


TOKENS = ("token", "correct", "incorrect")  # fields of roots that name tokens


def is_number(value: Any) -> bool:
    """Whether it is an integer that torch takes."""
    return type(value) is int and abs(value) < 1 << 31


def root_from(values: Any) -> Root:
    """A root from its kind and fields; ValueError if they are none."""
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind not in ROOTS:
        raise ValueError(f"unknown root {kind!r:.40}; known: {', '.join(ROOTS)}")
    given = {name: value for name, value in values.items() if name != "kind"}
    if set(given) != {field.name for field in fields(ROOTS[kind])}:
        raise ValueError(f"the fields of a {kind} are not {', '.join(map(str, given))}")
    for name, value in given.items():
        parts = value if isinstance(value, list) and name in TOKENS else [value]
        texts = name in (*TOKENS, "site", "side")
        numbers = name not in ("site", "side")
        if not all((texts and isinstance(x, str)) or (numbers and is_number(x)) for x in parts):
            raise ValueError(f"{kind}.{name} is {value!r:.40}")
    return ROOTS[kind](**given)
