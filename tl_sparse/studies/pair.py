"""Train loss-matched pairs and their bridges, store them with cards, measure what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tl_sparse.checkpoints.checkpoint import TrainingRecord
from tl_sparse.data import TokenizedCorpus, build_corpus
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.studies.bridged import train_bridged
from tl_sparse.studies.bridged_card import bridged_card
from tl_sparse.studies.frontier import token_loss
from tl_sparse.studies.model_card import model_card
from tl_sparse.studies.pair_config import DTYPES, Pair, PairConfig, PairMember
from tl_sparse.studies.runner import Say, run_units
from tl_sparse.studies.trained import (
    Kind,
    ModelUnit,
    cache_folder,
    load_trained,
    train_unit,
    training_time,
)
from tl_sparse.tasks import table


def train_pair(config: PairConfig, say: Say, progress: bool = True) -> tuple[Pair, ...]:
    """Train a pair for every seed, and for the first the bridged model if the config has one; store
    the models with their cards, and measure what is stored.

    Every run keeps its checkpoints in the cache, in a folder named after a hash of its recipe.
    Several processes share the models of one config.

    Raises:
        ValueError: a dense model used up its steps before it reached the sparse one's loss.
    """
    say("Corpus: " + ", ".join(config.corpus.sources))
    corpus = build_corpus(config.corpus, cache_folder(config.cache), progress)

    def left() -> list[ModelUnit]:
        units = model_units(config, corpus)
        return [one for one in units if one.record is None]

    def train(jobs: Sequence[ModelUnit]) -> None:
        [one] = jobs
        say(
            f"{config.model_name(one.kind, one.training.seed)}: up to {one.training.steps} steps; "
            f"checkpoints in {one.unit.folder}"
        )
        train_unit(one, corpus, progress)

    run_units(left, train, say)
    trained = {(one.training.seed, one.kind): one for one in model_units(config, corpus)}
    pairs = []
    for seed in config.seeds:
        sparse, dense = (
            measured(config, corpus, trained[seed, kind], say) for kind in ("sparse", "dense")
        )
        pairs.append(Pair(seed, sparse, dense))
        both = pairs[-1].solved(config.target_loss)
        say(f"Seed {seed}: both solve {', '.join(both) or 'no task'}")
    bridged = None
    if config.bridged:
        folder = trained[config.seeds[0], "sparse"].unit.folder
        bridged = train_bridged(config, corpus, pairs[0], folder, say, progress)
        store(config, bridged.member.model, bridged.member.name, bridged.member.record,
              bridged_card(config, corpus, pairs[0], bridged))  # fmt: skip
    for pair in pairs:
        for member in pair.members:
            store(config, member.model, member.name, member.record,
                  model_card(config, corpus, pairs, member))  # fmt: skip
    return tuple(pairs)


def model_units(config: PairConfig, corpus: TokenizedCorpus) -> Iterator[ModelUnit]:
    """The models of all pairs; a dense one follows once its sparse partner is trained.

    Raises:
        ValueError: a dense model ended above its partner's loss.
    """
    for seed in config.seeds:
        sparse = model_unit(config, corpus, "sparse", seed, None)
        yield sparse
        if sparse.record is None:
            continue
        goal = sparse.record.result["validation_loss"]
        dense = model_unit(config, corpus, "dense", seed, goal)
        if dense.record is not None and dense.record.failure is not None:
            raise ValueError(
                f"{config.model_name('dense', seed)} ended at "
                f"{dense.record.result['validation_loss']:.4f} nats, above the sparse model's "
                f"{goal:.4f}: give it more steps (dense_training.steps) or more width "
                "(dense.d_model)"
            )
        yield dense


def model_unit(
    config: PairConfig, corpus: TokenizedCorpus, kind: Kind, seed: int, goal: float | None
) -> ModelUnit:
    """One model's training, in the cache."""
    architecture = config.model(kind, seed, len(corpus.tokenizer))
    training = config.training(kind, seed, goal)
    return ModelUnit.cached(config.cache, "pair", kind, architecture, training, corpus)


def measured(config: PairConfig, corpus: TokenizedCorpus, one: ModelUnit, say: Say) -> PairMember:
    """A trained model, stored, loaded again and measured."""
    name, run = config.model_name(one.kind, one.training.seed), one.training
    trained, record, reached = load_trained(one.unit.folder)
    store(config, trained, name, record)
    model = SparseTransformer.from_pretrained(Path(config.out) / name)
    hours, where = training_time(one.unit.folder, record.steps)
    text = corpus.validation_sequences(run.eval_sequences, run.context or model.config.n_ctx)
    member = PairMember(
        name=name,
        kind=one.kind,
        model=model,
        record=record,
        stored_loss=token_loss(model, text),
        tasks=table(model, config.pairs).results,
        hours=hours,
        machine=where,
    )
    solved = member.solved(config.target_loss)
    say(f"{name}: validation loss {reached:.3f} nats, solves {', '.join(solved) or 'no task'}")
    return member


def store(
    config: PairConfig,
    model: SparseTransformer,
    name: str,
    record: TrainingRecord,
    card: str | None = None,
) -> None:
    """Write a model's folder, its weights rounded to the config's dtype."""
    folder = Path(config.out) / name
    model.save_pretrained(folder, record, dtype=DTYPES[config.dtype], card=card)
