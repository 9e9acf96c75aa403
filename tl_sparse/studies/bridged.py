"""The third of a trio: the trained sparse model, trained on along with bridges to the dense one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from tl_sparse.bridges import (
    BridgedPair,
    Bridges,
    BridgesConfig,
    PathTable,
    Reconstruction,
    fit_bridges,
    path_table,
    reconstruction,
    train_bridges,
)
from tl_sparse.bridges.objective import BridgeObjective
from tl_sparse.checkpoints.packed import SCHEMA_VERSION
from tl_sparse.data import TokenizedCorpus, windows
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.studies.frontier import token_loss
from tl_sparse.studies.pair_config import DTYPES, Pair, PairConfig, PairMember
from tl_sparse.studies.runner import Say, Unit, UnitRecord, read_unit, run_units, write_record
from tl_sparse.studies.trained import (
    cache_folder,
    last_step,
    load_trained,
    note_session,
    training_time,
)
from tl_sparse.tasks import table
from tl_sparse.training.resume import read_metrics
from tl_sparse.training.train_step import training_starts

FITTED = 2048  # training sequences that the first bridges are fitted to


@dataclass(frozen=True)
class BridgedUnit:
    """The bridged run as a unit of work."""

    unit: Unit
    """The work."""
    record: UnitRecord | None
    """What it measured, once it is done."""


@dataclass(frozen=True, eq=False)
class Compared:
    """Two models and their bridges, measured on validation text."""

    paths: PathTable
    """Every hybrid that changes over once, with the mean-stream anchors."""
    errors: Reconstruction
    """The bridges' errors."""

    @classmethod
    def of(cls, pair: BridgedPair, tokens: Int[Tensor, "sequence pos"]) -> Compared:
        """Measure a pair."""
        return cls(
            path_table(pair, tokens, back="none", progress=False),
            reconstruction(pair, tokens, progress=False),
        )

    def by_site(self) -> pd.DataFrame:
        """A row per site: KL from the dense model of both hybrids and both mean-stream anchors,
        and the fraction of variance unexplained by encoder and decoder."""
        kl = self.paths.by_site("kl")
        errors = self.errors.to_dataframe().set_index("site")[["encoder", "decoder"]]
        return kl.join(errors)


@dataclass(frozen=True, eq=False)
class Bridged:
    """The bridged model and its bridges, as stored, with what was measured of them."""

    member: PairMember
    """The model; its tasks and loss are measured as those of the other two."""
    bridges: Bridges
    """The bridges between it and the dense model, as loaded from their folder."""
    trained: Compared
    """The bridged pair."""
    separate: Compared
    """For comparison: the dense model and the sparse one as it was, with fitted (ridge) bridges."""
    metrics: pd.DataFrame
    """The run's metrics, a row per logged step."""


def train_bridged(
    config: PairConfig, corpus: TokenizedCorpus, pair: Pair, sparse: Path, say: Say,
    progress: bool = True,
) -> Bridged:  # fmt: skip
    """Train the bridged model of a pair, unless that is done; store and measure it.

    ``sparse`` is the folder that the sparse model was trained in, where its weights are exact. The
    dense partner is the stored one, rounded as users will load it. An interrupted training resumes.
    """
    dense, (start, _, _) = pair.dense.model, load_trained(sparse)
    unit = Unit.of(
        cache_folder(config.cache), "pair-bridged", training=config.bridged_training,
        bridging=config.bridging, corpus=corpus.fingerprint, sparse=fingerprint(start),
        dense=fingerprint(dense), made_by=[version("tl-sparse"), SCHEMA_VERSION],
    )  # fmt: skip

    def left() -> list[BridgedUnit]:
        one = BridgedUnit(unit, read_unit(unit))
        return [one] if one.record is None else []

    def train(jobs: object) -> None:
        say(f"{config.bridged_name}: up to {config.bridged_training.steps} steps; checkpoints in "
            f"{unit.folder}")  # fmt: skip
        result, seconds = train_in(unit.folder, config, corpus, dense, start, progress)
        write_record(unit.folder, UnitRecord(unit.settings, result, None, seconds))

    run_units(left, train, say)
    return measured(config, corpus, pair, unit.folder, say)


def train_in(
    folder: Path, config: PairConfig, corpus: TokenizedCorpus, dense: SparseTransformer,
    start: SparseTransformer, progress: bool,
) -> tuple[Mapping[str, float], float]:  # fmt: skip
    """Train a sparse model on with bridges, from those that fit it best; metrics and seconds."""
    first, began = last_step(folder), time.perf_counter()
    bridges = fitted(corpus, dense, start, start.config.n_ctx, progress)
    both = BridgedPair(deepcopy(dense), start, bridges)  # training takes them to its device
    result = train_bridges(
        both, corpus, config.bridged_training, config.bridging, folder, progress=progress
    )
    note_session(folder, result.record.steps - first, time.perf_counter() - began)
    last = result.metrics.dropna(axis=1, how="all").ffill().iloc[-1]
    return {str(k): float(v) for k, v in last.items()}, time.perf_counter() - began


def fitted(
    corpus: TokenizedCorpus, dense: SparseTransformer, sparse: SparseTransformer, context: int,
    progress: bool, linear: bool = False,
) -> Bridges:  # fmt: skip
    """Ridge bridges on training text; with AbsTopK behind the encoders unless ``linear``."""
    starts = training_starts(0, 0, FITTED, len(corpus.train), context)
    tokens = windows(corpus.train, starts, context, corpus.tokenizer.bos_token_id)
    chosen = BridgesConfig.of(dense, sparse, **({"encoder": "linear"} if linear else {}))
    return fit_bridges(dense, sparse, tokens, config=chosen, progress=progress).bridges


def measured(
    config: PairConfig, corpus: TokenizedCorpus, pair: Pair, folder: Path, say: Say
) -> Bridged:
    """The trained model and bridges, stored, loaded again and measured."""
    model, record, reached = load_trained(folder)
    out, dtype, dense = Path(config.out), DTYPES[config.dtype], pair.dense.model
    model.save_pretrained(out / config.bridged_name, record, dtype=dtype)
    model = SparseTransformer.from_pretrained(out / config.bridged_name)
    bridges = Bridges.from_pretrained(folder / "bridges")
    # whose they are: the models as they are loaded
    bridges.made_for = {"dense": fingerprint(dense), "sparse": fingerprint(model)}
    bridges.save_pretrained(out / config.bridges_name, dtype)
    bridges = Bridges.from_pretrained(out / config.bridges_name)
    run = config.bridged_training
    context = run.context or model.config.n_ctx
    text = corpus.validation_sequences(run.eval_sequences, context)
    hours, where = training_time(folder, record.steps)
    member = PairMember(
        config.bridged_name, "sparse", model, record, token_loss(model, text),
        table(model, config.pairs).results, hours, where,
    )  # fmt: skip
    ridge = fitted(corpus, dense, pair.sparse.model, context, progress=False, linear=True)
    both = BridgedPair(dense, model, bridges)
    terms = BridgeObjective(both, config.bridging).columns
    found = Bridged(
        member, bridges, Compared.of(both, text),
        Compared.of(BridgedPair(dense, pair.sparse.model, ridge), text),
        pd.DataFrame(read_metrics(folder, record.steps, terms)),
    )  # fmt: skip
    solved = member.solved(config.target_loss)
    say(f"{member.name}: validation loss {reached:.3f} nats (the sparse model's "
        f"{pair.sparse.record.validation_loss:.3f}), solves {', '.join(solved) or 'no task'}; "
        f"{found.trained.paths!r}")  # fmt: skip
    return found
