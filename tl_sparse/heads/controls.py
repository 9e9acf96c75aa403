"""``controls``: what codes find without training, without an autoencoder, without labels.

A trained autoencoder shows something only where it finds more than these do: the same encoder
before training, random hyperplanes, clusters, random codes, shuffled labels, and measures of the
heads' outputs that need no codes at all.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.heads.agreement import agreement
from tl_sparse.heads.baselines import LOOKING
from tl_sparse.heads.codes import Codes
from tl_sparse.heads.component import Component, ComponentName, places
from tl_sparse.heads.dataset import ContrastiveDataset
from tl_sparse.heads.discrete_sae import DiscreteSAE
from tl_sparse.heads.identify import VOTES, identify
from tl_sparse.heads.outputs import HeadOutputs, extract_head_outputs
from tl_sparse.heads.scores import Score
from tl_sparse.views import frame_html

Coder = Callable[[HeadOutputs, int, int], Codes]
"""(outputs, number of codes, seed) → codes."""


def trained(outputs: HeadOutputs, n_codes: int, seed: int) -> Codes:
    """The codes of an autoencoder, as the paper trains it."""
    return DiscreteSAE.fit(outputs, "paper", n_codes=n_codes, seed=seed).codes(outputs)


def corrected(outputs: HeadOutputs, n_codes: int, seed: int) -> Codes:
    """The codes of an autoencoder without the paper's quirks."""
    return DiscreteSAE.fit(outputs, "corrected", n_codes=n_codes, seed=seed).codes(outputs)


def untrained(outputs: HeadOutputs, n_codes: int, seed: int) -> Codes:
    """The codes of the paper's encoder as it is before training: random unit directions."""
    return DiscreteSAE.fit(outputs, "paper", n_codes=n_codes, epochs=0, seed=seed).codes(outputs)


def hashed(outputs: HeadOutputs, n_codes: int, seed: int) -> Codes:
    """On which sides of log2(n_codes) random hyperplanes through zero a head's output lies
    (locality-sensitive hashing, Charikar 2002)."""
    return hash_around(outputs, n_codes, seed, centred=False)


def hashed_centred(outputs: HeadOutputs, n_codes: int, seed: int) -> Codes:
    """The same with hyperplanes through each head's mean output."""
    return hash_around(outputs, n_codes, seed, centred=True)


def hash_around(outputs: HeadOutputs, n_codes: int, seed: int, centred: bool) -> Codes:
    """Signs of random projections, as one number."""
    bits = max(1, int(math.log2(n_codes)))
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randn(1, outputs.width, bits, generator=generator)
    found = torch.cat([part for _, part in outputs.through(planes)])
    if centred:
        found = found - found.mean(0)
    powers = 2 ** torch.arange(bits)
    return codes_of(outputs, ((found > 0) * powers).sum(-1), 2**bits)


def clusters(outputs: HeadOutputs, n_codes: int, seed: int) -> Codes:
    """The nearest of ``n_codes`` centres of all heads' outputs together (k-means)."""
    from sklearn.cluster import MiniBatchKMeans

    rows = outputs.values.float().flatten(0, 1).numpy()
    found = MiniBatchKMeans(min(n_codes, len(rows)), random_state=seed, n_init=1).fit_predict(rows)
    return codes_of(outputs, torch.from_numpy(found).view(len(outputs.factors), -1), n_codes)


def clusters_by_head(outputs: HeadOutputs, n_codes: int, seed: int) -> Codes:
    """The nearest of eight centres of each head's own outputs (k-means)."""
    from sklearn.cluster import KMeans

    n = min(OWN_CLUSTERS, len(outputs.factors))
    columns = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        for head in outputs.values.float().unbind(1):
            fitted = KMeans(n, random_state=seed, n_init=1).fit_predict(head.numpy())
            columns.append(torch.from_numpy(fitted))
    return codes_of(outputs, torch.stack(columns, 1), n)


def random_codes(outputs: HeadOutputs, n_codes: int, seed: int) -> Codes:
    """Codes that say nothing: drawn at random for every head and prompt."""
    shape = outputs.factors.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    return codes_of(outputs, torch.randint(n_codes, shape, generator=generator), n_codes)


def codes_of(outputs: HeadOutputs, numbers: Tensor, n_codes: int) -> Codes:
    """Codes that are one number for each prompt and component."""
    return Codes(
        numbers.long()[..., None], n_codes, outputs.components, outputs.positive, outputs.name
    )


OWN_CLUSTERS = 8
CODERS: Mapping[str, Coder] = {
    "paper": trained,
    "corrected": corrected,
    "untrained encoder": untrained,
    "hash": hashed,
    "centred hash": hashed_centred,
    "k-means": clusters,
    "k-means by head": clusters_by_head,
    "random codes": random_codes,
}
"""Ways to get codes; the first two train an autoencoder."""
SHUFFLED = "paper, labels shuffled"


@dataclass(frozen=True, eq=False)
class Controls:
    """Scores of every head by every way to get codes, and by what needs none."""

    scores: Mapping[tuple[str, str, str], Float[Tensor, " component"]]
    """(position, method, score) → the score of every component."""
    named: Mapping[tuple[str, str, str], Bool[Tensor, " component"]]
    """The same → which are above chance, where labels were shuffled."""
    seconds: Mapping[tuple[str, str, str], float]
    """The same → seconds, forward passes included."""
    components: tuple[Component, ...]
    """What was scored."""
    truth: Bool[Tensor, " component"] | None
    """Which are of the circuit, where it is known."""
    name: str
    """Name of the dataset."""
    n_prompts: int
    """Prompts, positive and negative."""

    def to_dataframe(self) -> pd.DataFrame:
        """A row per position, method and score: how many are named, seconds, and with the truth
        AUC, average precision and F1 of the named ones; without it ``agrees``, the rank
        correlation (Spearman) with the paper's codes at the same position and score, NaN where
        there are none."""
        rows = []
        for key, scores in self.scores.items():
            named = self.named.get(key)
            row: dict[str, object] = dict(zip(("position", "method", "score"), key, strict=True))
            row["named"] = math.nan if named is None else int(named.sum())
            if self.truth is not None:
                judged = agreement(scores, self.truth, self.components, named)
                row |= {"auc": judged.auc, "average_precision": judged.average_precision}
                row["f1"] = judged.f1
            else:
                row["agrees"] = self.agrees(key)
            rows.append(row | {"seconds": self.seconds[key]})
        return pd.DataFrame(rows)

    def agrees(self, key: tuple[str, str, str]) -> float:
        """Rank correlation with the trained codes' scores."""
        other = (key[0], "paper", key[2] if key[2] else "unique")
        if other not in self.scores:
            return math.nan
        pair = [pd.Series(self.scores[k].double().numpy()) for k in (key, other)]
        return float(pair[0].corr(pair[1], method="spearman"))

    def __repr__(self) -> str:
        methods = list(dict.fromkeys(method for _, method, _ in self.scores))
        return (
            f"Controls({self.name!r}, {self.n_prompts} prompts, {len(self.components)} components, "
            f"{len(methods)} methods: {', '.join(methods)})"
        )

    def _repr_html_(self) -> str:
        return frame_html(f"Controls of {self.name}", repr(self), self.to_dataframe())


def controls(
    model: nn.Module,
    dataset: ContrastiveDataset,
    truth: Bool[Tensor, " component"] | Iterable[ComponentName] | None = None,
    *,
    positions: Sequence[str] = ("mean", "last", "max"),
    scores: Sequence[Score | Literal["edge_votes"]] = ("unique", "mi"),
    methods: Sequence[str] | None = None,
    n_codes: int = 200,
    permutations: int | None = 0,
    seed: int = 0,
) -> Controls:
    """Find heads by trained codes, and by everything that they have to be better than.

    Args:
        model: The model.
        dataset: Positive and negative prompts.
        truth: The circuit's heads, where they are known.
        positions: Where outputs are read (see :func:`~tl_sparse.heads.extract_head_outputs`); roles
            of the dataset, too.
        scores: How codes are scored (see :func:`~tl_sparse.heads.identify`).
        methods: Which ones, of :data:`CODERS`, ``LOOKING`` and ``"paper, labels shuffled"``; all.
        n_codes: Codes; as many clusters, and a power of two below it of hashes.
        permutations: Shuffles of the labels by which heads are named; 0 names none, None as many as
            ``identify`` takes.
        seed: Seed of all that is random.

    Raises:
        ValueError: an unknown method, or whatever ``extract_head_outputs`` and ``identify`` refuse.
    """
    every = (*CODERS, SHUFFLED, *LOOKING)
    chosen = every if methods is None else tuple(methods)
    if unknown := [name for name in chosen if name not in every]:
        raise ValueError(f"unknown method {unknown[0]!r}: choose from {', '.join(every)}")
    found: dict[tuple[str, str, str], Tensor] = {}
    named: dict[tuple[str, str, str], Tensor] = {}
    seconds: dict[tuple[str, str, str], float] = {}
    for position in positions:
        outputs = extract_head_outputs(model, dataset, position)
        for row in scored(outputs, chosen, scores, n_codes, permutations, seed):
            key = (position, row.method, row.score)
            found[key], seconds[key] = row.scores, row.seconds
            if row.named is not None:
                named[key] = row.named
    true = None
    if truth is not None:
        true = truth if isinstance(truth, Tensor) else torch.zeros(len(outputs.components)).bool()
        if not isinstance(truth, Tensor):
            true[places(truth, outputs.components)] = True
    return Controls(
        found, named, seconds, outputs.components, true, dataset.name, len(dataset.prompts)
    )


@dataclass(frozen=True, eq=False)
class Scored:
    """What one method makes of the heads' outputs."""

    method: str
    """Of :data:`CODERS`, ``LOOKING``, or ``"paper, labels shuffled"``."""
    score: str
    """How codes were scored; empty where there are none."""
    scores: Float[Tensor, " component"]
    """The score of every component."""
    named: Bool[Tensor, " component"] | None
    """Which are above chance; None without shuffles."""
    seconds: float
    """Seconds, forward passes included."""


def scored(
    outputs: HeadOutputs,
    methods: Sequence[str],
    scores: Sequence[Score | Literal["edge_votes"]],
    n_codes: int,
    permutations: int | None,
    seed: int,
) -> Iterator[Scored]:
    """Every method's scores of the same outputs; see :func:`controls`."""
    mixed = shuffled(outputs.positive, seed)
    made: dict[str, tuple[Codes, float]] = {}
    for method in methods:
        began = time.perf_counter()
        if method in LOOKING:
            found = LOOKING[method](outputs.values, outputs.positive).double()
            yield Scored(
                method, "", found, None, outputs.seconds + time.perf_counter() - began
            )  # fmt: skip
            continue
        coder = "paper" if method == SHUFFLED else method
        if coder not in made:
            codes = CODERS[coder](outputs, n_codes, seed)
            made[coder] = codes, time.perf_counter() - began
        codes, taken = made[coder]
        for score in scores:
            began = time.perf_counter()
            result = identify(
                codes, mixed if method == SHUFFLED else None, score=score,
                permutations=0 if score == VOTES else permutations, seed=seed,
            )  # fmt: skip
            yield Scored(
                method, score, result.scores, result.is_named if result.permutations else None,
                outputs.seconds + taken + time.perf_counter() - began,
            )  # fmt: skip


def shuffled(positive: Bool[Tensor, " prompt"], seed: int) -> Bool[Tensor, " prompt"]:
    """The labels in another order."""
    order = np.random.default_rng(seed).permutation(len(positive))
    return positive[torch.from_numpy(order)]
