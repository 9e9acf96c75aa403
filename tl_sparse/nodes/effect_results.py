"""``WeightEffects``: what setting each weight to zero does to the model's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.nodes.leaders import ranked
from tl_sparse.nodes.rows import Rows
from tl_sparse.nodes.weight_terms import Terms
from tl_sparse.views.display import frame_html

LOWEST, HIGHEST = -12.0, 2.0  # decimal logarithms of the histogram's ends
SHOWN = 10  # weights in a notebook


@dataclass(frozen=True)
class Sizes:
    """Sizes of the results of each weight."""

    sequences: int
    positions: int
    top: int
    """Positions that are kept."""
    moved: int
    """Tokens that are kept, at either end."""
    bins: int
    every_position: bool

    @classmethod
    def of(cls, model: Any, rows: Rows, k: int, bins: int, every_position: bool) -> Sizes:
        """Those of a run; there are no more positions and tokens than the run has."""
        n, width = rows.tokens.shape
        vocabulary = getattr(model.cfg, "d_vocab_out", -1)
        vocabulary = model.cfg.d_vocab if vocabulary in (None, -1) else vocabulary
        return cls(n, width, min(k, int(rows.lengths.sum())), min(k, vocabulary), bins,
                   every_position)  # fmt: skip

    def shapes(self, weights: int) -> dict[str, tuple[Any, ...]]:
        """dtype and shape of every tensor of so many weights."""
        number, real = torch.int64, torch.float32
        found: dict[str, tuple[Any, ...]] = {
            "matrix": (number, weights), "index": (number, weights, 3),
            "weight": (real, weights), "source": (number, weights), "target": (number, weights),
            "mean": (real, weights), "by_sequence": (real, weights, self.sequences),
            "by_position": (real, weights, self.positions),
            "counts": (number, weights, self.bins + 1),
            "top_kl": (real, weights, self.top), "top_sequence": (number, weights, self.top),
            "top_position": (number, weights, self.top), "top_token": (number, weights, self.top),
            "up": (real, weights, self.moved), "up_token": (number, weights, self.moved),
            "down": (real, weights, self.moved), "down_token": (number, weights, self.moved),
        }  # fmt: skip
        if self.every_position:
            found["kl"] = (real, weights, self.sequences, self.positions)
        return found


@dataclass(frozen=True, eq=False, repr=False)
class WeightEffects:
    """KL(original || changed) in nats for many weights, each set to zero alone."""

    matrices: tuple[tuple[str, str, str], ...]
    """Name of each matrix, and what it reads and writes in OpenAI's words."""
    matrix: Int[Tensor, " weight"]
    """Which matrix each weight is in."""
    index: Int[Tensor, "weight 3"]
    """Its place in the matrix; -1 for dimensions that the matrix does not have."""
    weight: Float[Tensor, " weight"]
    """Its value."""
    source: Int[Tensor, " weight"]
    """The channel (token, position) that it reads."""
    target: Int[Tensor, " weight"]
    """The channel (logit) that it writes."""
    mean: Float[Tensor, " weight"]
    """Mean KL over all real positions."""
    by_sequence: Float[Tensor, "weight sequence"]
    """Mean KL of each sequence."""
    by_position: Float[Tensor, "weight pos"]
    """Mean KL at each position over the sequences; NaN where no sequence has a real token."""
    counts: Int[Tensor, "weight bin"]
    """Positions in each bin of KL; the first is below the lowest edge, 1e-12."""
    top_kl: Float[Tensor, "weight k"]
    """The largest KL, largest first."""
    top_sequence: Int[Tensor, "weight k"]
    """The sequences that these are in."""
    top_position: Int[Tensor, "weight k"]
    """The positions that these are at, in the sequences as they were given."""
    top_token: Int[Tensor, "weight k"]
    """The tokens at these positions."""
    up: Float[Tensor, "weight token"]
    """Mean rise in probability of the tokens that rise most."""
    up_token: Int[Tensor, "weight token"]
    """Ids of these tokens."""
    down: Float[Tensor, "weight token"]
    """Mean change in probability (negative) of the tokens that fall most."""
    down_token: Int[Tensor, "weight token"]
    """Ids of these tokens."""
    kl: Float[Tensor, "weight sequence pos"] | None
    """KL at every position, NaN at padding; None unless it was asked for."""
    n_tokens: int
    """Real positions."""
    texts: Mapping[int, str]
    """Texts of the tokens."""
    run: Mapping[str, Any]
    """Settings, fingerprint of the model and digest of the tokens."""

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def names(self) -> list[str]:
        """Name of every weight: ``blocks.0.mlp.W_in[3, 17]``."""
        rows = zip(self.matrix.tolist(), self.index.tolist(), strict=True)
        return [f"{self.matrices[i][0]}{[x for x in place if x >= 0]}" for i, place in rows]

    def edges(self) -> Float[np.ndarray, " edge"]:
        """Edges of the bins of :attr:`counts`, the first of which begins at 0; the last takes all
        above, too."""
        return np.concatenate([[0.0], bin_edges(self.counts.shape[1] - 1).double().numpy()])

    def to_dataframe(self) -> pd.DataFrame:
        """A row per weight: matrix, index, weight, source and target (nodes, OpenAI's names), mean
        and largest KL, where the largest is, and the tokens that move most."""
        which, index = self.matrix.tolist(), self.index.tolist()
        ends = zip(which, self.source.tolist(), self.target.tolist(), strict=True)
        nodes = [
            ("bias" if self.matrices[i][1] == "bias" else f"{self.matrices[i][1]}:{source}",
             f"{self.matrices[i][2]}:{target}")
            for i, source, target in ends
        ]  # fmt: skip
        return pd.DataFrame(
            {
                "matrix": [self.matrices[i][0] for i in which],
                "index": [tuple(x for x in place if x >= 0) for place in index],
                "weight": self.weight.numpy(),
                "source": [source for source, _ in nodes], "target": [t for _, t in nodes],
                "mean": self.mean.numpy(), "largest": self.top_kl[:, 0].numpy(),
                "sequence": self.top_sequence[:, 0].numpy(),
                "position": self.top_position[:, 0].numpy(),
                "token": [self._text(token) for token in self.top_token[:, 0].tolist()],
                "up": [self._text(token) for token in self.up_token[:, 0].tolist()],
                "down": [self._text(token) for token in self.down_token[:, 0].tolist()],
            }
        )  # fmt: skip

    def by_matrix(self) -> pd.DataFrame:
        """A row per matrix: weights, mean KL over them, the largest mean, the largest KL, and the
        share of weights whose KL is nowhere above 1e-6 nats."""
        found = []
        for i, (name, source, target) in enumerate(self.matrices):
            here = self.matrix == i
            if not bool(here.any()):
                continue
            largest = self.top_kl[here, 0]
            found.append(
                {
                    "matrix": name, "reads": source, "writes": target, "weights": int(here.sum()),
                    "mean": float(self.mean[here].mean()),
                    "largest mean": float(self.mean[here].max()),
                    "largest": float(largest.max()),
                    "without effect": float((largest <= 1e-6).float().mean()),
                }
            )  # fmt: skip
        return pd.DataFrame(found)

    def histogram(self, matrix: str | None = None) -> pd.DataFrame:
        """A row per bin of KL: from, to, positions (summed over weights), weight, sequence and
        position of an example: the first of the weights' largest KLs that is in the bin.

        Raises:
            ValueError: there is no such matrix.
        """
        names = [name for name, _, _ in self.matrices]
        if matrix is not None and matrix not in names:
            raise ValueError(f"unknown matrix {matrix!r}; choose from {', '.join(names)}")
        here = torch.arange(len(self))
        here = here if matrix is None else here[self.matrix == names.index(matrix)]
        edges = self.edges()
        frame = pd.DataFrame(
            {"from": edges[:-1], "to": edges[1:], "positions": self.counts[here].sum(0).numpy()}
        )
        top = self.top_kl[here]
        place = bin_of(top, self.counts.shape[1] - 1).flatten()
        none = torch.full((len(frame),), top.numel())
        first = none.scatter_reduce(0, place, torch.arange(top.numel()), "amin")
        there = (first < top.numel()).numpy()
        first = first.clamp(max=top.numel() - 1)
        entry, j = first // top.shape[1], first % top.shape[1]
        weights = self.of(here[entry]).names
        frame["weight"] = pd.Series(weights).where(pd.Series(there), None)
        for name in ("sequence", "position"):
            values = getattr(self, f"top_{name}")[here][entry, j].numpy()
            frame[name] = pd.Series(values).astype("Int64").where(there)
        return frame

    def of(self, weights: Int[Tensor, " chosen"]) -> WeightEffects:
        """The same of some weights, by their places."""
        return replace(self, **{name: x[weights] for name, x in self.tensors().items()})

    def tokens_moved(self, weight: int) -> pd.DataFrame:
        """A row per token that a weight's removal moves most: token, text, change of probability
        (mean over positions)."""
        tokens = torch.cat([self.up_token[weight], self.down_token[weight].flip(0)]).tolist()
        change = torch.cat([self.up[weight], self.down[weight].flip(0)]).tolist()
        frame = pd.DataFrame({"token": tokens, "text": [self._text(t) for t in tokens],
                              "change": change})  # fmt: skip
        return frame.drop_duplicates("token", ignore_index=True)

    def tensors(self) -> dict[str, Any]:
        """All that there is of each weight, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def ids(self) -> Int[Tensor, " id"]:
        """The tokens that occur."""
        parts = (self.top_token, self.up_token, self.down_token)
        return torch.cat([part.flatten() for part in parts]).unique()

    def with_texts(self, texts: Mapping[int, str]) -> WeightEffects:
        """The same with texts of the tokens."""
        return replace(self, texts=texts)

    @classmethod
    def joined(cls, parts: Sequence[WeightEffects]) -> WeightEffects:
        """The weights of all parts."""
        names = tuple(dict.fromkeys(name for part in parts for name in part.matrices))
        columns = [
            part.tensors()
            | {"matrix": torch.tensor([names.index(m) for m in part.matrices])[part.matrix]}
            for part in parts
        ]
        tensors: dict[str, Any] = {
            name: torch.cat([part[name] for part in columns]) for name in columns[0]
        }
        texts = {token: text for part in parts for token, text in part.texts.items()}
        return replace(parts[0], matrices=names, texts=texts, **tensors)

    def _text(self, token: int) -> str:
        return self.texts.get(token, f"<{token}>")

    def __repr__(self) -> str:
        return (
            f"WeightEffects({len(self):,} weights of {len(self.matrices)} matrices over "
            f"{self.n_tokens:,} tokens, mean KL {float(self.mean.mean()):.3g} nats)"
        )

    def _repr_html_(self) -> str:
        most = self.of(self.mean.argsort(descending=True, stable=True)[:SHOWN])
        line = f"{len(self):,} weights, {self.n_tokens:,} tokens, KL in nats; the largest means"
        frame = most.to_dataframe().drop(columns=["matrix", "index"])
        frame.insert(0, "name", most.names)
        return frame_html("Weights, each alone set to zero", line, frame)


def bin_edges(bins: int) -> Float[Tensor, " edge"]:
    """Edges of logarithmic bins of KL."""
    return torch.logspace(LOWEST, HIGHEST, bins + 1, dtype=torch.float64).float()


def bin_of(kl: Float[Tensor, "..."], bins: int) -> Int[Tensor, "..."]:
    """The bin of each KL: 0 below the lowest edge, then those between two edges, each with its
    lower one."""
    edges = bin_edges(bins).to(kl.device)
    return torch.bucketize(kl.contiguous(), edges[:-1], right=True)


def reduced(
    kl: Float[Tensor, "entry sequence pos"], moved: Float[Tensor, "entry d_vocab"], term: Terms,
    index: Int[Tensor, "entry 3"], rows: Rows, sizes: Sizes, run: Mapping[str, Any],
) -> WeightEffects:  # fmt: skip
    """What is kept of the weights of one matrix, on the CPU, by positions as they were given."""
    device = kl.device
    real = rows.real(0, sizes.sequences).to(device)
    tokens = rows.tokens.to(device)
    if rows.places is not None:
        places = rows.places.to(device)
        kl = torch.zeros_like(kl).scatter_(2, places.expand_as(kl), kl)
        real = torch.zeros_like(real).scatter_(1, places, real)
        tokens = torch.zeros_like(tokens).scatter_(1, places, tokens)
    n_tokens = int(rows.lengths.sum())
    whole = kl.double()
    flat = kl.masked_fill(~real, -torch.inf).flatten(1)
    top = ranked(flat).topk(sizes.top, dim=1).indices
    counts = torch.zeros(len(kl), sizes.bins + 2, dtype=torch.int64, device=device)
    # padding into a bin of its own
    place = bin_of(kl, sizes.bins).masked_fill(~real, sizes.bins + 1).flatten(1)
    counts.scatter_add_(1, place, torch.ones_like(place))
    change = moved / n_tokens
    up, down = change.topk(sizes.moved), change.topk(sizes.moved, largest=False)
    local = index[:, : term.tensor.ndim]
    found: dict[str, Any] = {
        "matrix": torch.zeros(len(kl), dtype=torch.int64), "index": index,
        "weight": term.tensor[tuple(local.to(term.tensor.device).T)].float(),
        "source": term.sources(local), "target": term.targets(local),
        "mean": (whole.sum((1, 2)) / n_tokens).float(),
        "by_sequence": (whole.sum(2) / real.sum(1)).float(),
        "by_position": (whole.sum(1) / real.sum(0)).float(),
        "counts": counts[:, :-1],
        "top_kl": flat.gather(1, top), "top_sequence": top // sizes.positions,
        "top_position": top % sizes.positions, "top_token": tokens.flatten()[top].long(),
        "up": up.values, "up_token": up.indices, "down": down.values, "down_token": down.indices,
        "kl": kl.masked_fill(~real, torch.nan) if sizes.every_position else None,
    }  # fmt: skip
    # copies: none may be a view of another where they are saved
    found = {name: x if x is None else x.cpu().clone(memory_format=torch.contiguous_format)
             for name, x in found.items()}  # fmt: skip
    names = (term.name, term.source, term.target)
    return WeightEffects((names,), **found, n_tokens=n_tokens, texts={}, run=run)
