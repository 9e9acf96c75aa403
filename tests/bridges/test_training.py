"""A bridged pair trained by the Trainer: what changes, what does not, and runs that go on."""

import json
from dataclasses import fields, replace

import pytest
import torch

from tl_sparse import SparseTransformer, SparsityConfig, TrainingConfig
from tl_sparse.bridges import BridgedPair, Bridges, train_bridges
from tl_sparse.bridges.losses import BridgeLosses
from tl_sparse.bridges.training_config import BridgeTrainingConfig
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.sparsity.projection import check_l0

SPARSITY = SparsityConfig(density=1 / 2, floor=1, lr_factor="none")
TINY = TrainingConfig(
    steps=6, batch_size=4, context=8, lr=0.01, sparsity=SPARSITY, eval_every=3, eval_sequences=4,
    log_every=1, save_every=2,
)  # fmt: skip

ERRORS, HYBRIDS = ("encoder", "decoder"), ("dense_to_sparse", "sparse_to_dense")
ONES = BridgeLosses(**{f.name: 1.0 for f in fields(BridgeLosses)})


def weights(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def new_pair(make_pair, corpus):
    return lambda **changes: make_pair(tokenizer=corpus.tokenizer, layers=(1, 1), **changes)


def test_training_changes_bridges_and_sparse_model_but_not_the_dense_one(new_pair, corpus):
    pair = new_pair()
    before = [weights(part) for part in (pair.dense, pair.sparse, pair.bridges)]
    result = train_bridges(pair, corpus, TINY, BridgeTrainingConfig(ONES), progress=False)
    after = [weights(part) for part in (pair.dense, pair.sparse, pair.bridges)]
    assert [same(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False]
    check_l0(weight_matrices(pair.sparse), SPARSITY)
    assert all(p.requires_grad for p in pair.parameters())  # as it was before
    assert all(p.grad is None for p in pair.parameters())
    BridgedPair(pair.dense, pair.sparse, pair.bridges)  # made for them as they are now
    assert pair.bridges.made_for.keys() == {"dense", "sparse"}
    metrics = result.metrics
    assert metrics["step"].tolist() == [1, 2, 3, 4, 5, 6]
    for name in ("language_model", "distillation", "encoder/0.pre", "sparse_to_dense/final"):
        assert metrics[name].notna().all()
    terms = metrics.drop(
        columns=["step", "tokens", "loss", "lr", "density", "l0", "validation_loss"]
    )
    assert len(terms.columns) == 2 + 4 * 3
    assert metrics["loss"].to_numpy() == pytest.approx(terms.sum(axis=1).to_numpy(), rel=1e-5)


def test_losses_fall(new_pair, corpus):
    pair = new_pair()
    training = replace(TINY, steps=12, batch_size=16, lr=0.01, sparsity=None)
    config = BridgeTrainingConfig(ONES, lr_share=10.0)
    frame = train_bridges(pair, corpus, training, config, progress=False).metrics
    for name in (*(f"{error}/0.mid" for error in ERRORS), *(f"{kl}/0.mid" for kl in HYBRIDS)):
        assert frame[name][-3:].mean() < 0.9 * frame[name][:3].mean(), name


def test_a_frozen_sparse_model_stays_as_it_is(new_pair, corpus):
    pair = new_pair(sparse="bigram_frozen")
    before = weights(pair.sparse), weights(pair.bridges)
    frozen = BridgeTrainingConfig(train_sparse=False)
    with pytest.raises(ValueError, match="sparsity=None"):
        train_bridges(pair, corpus, TINY, frozen, progress=False)
    config = replace(TINY, sparsity=None, decay_after_projection=True, weight_decay=0.5)
    train_bridges(pair, corpus, config, frozen, progress=False)
    assert same(weights(pair.sparse), before[0])
    assert not same(weights(pair.bridges), before[1])


@pytest.mark.parametrize("encoder", ["abstopk", "threshold"])
def test_a_run_goes_on_to_the_bit_and_ends_in_what_can_be_loaded(
    new_pair, corpus, tmp_path, encoder
):
    losses = BridgeLosses(encoder=0.0)  # some encoders have no gradient at first
    config = BridgeTrainingConfig(losses, tail_share=0.5, sites_per_step=2)
    training = replace(TINY, steps=4, accumulation=2)
    straight, resumed = new_pair(encoder=encoder), new_pair(encoder=encoder)
    whole = train_bridges(straight, corpus, training, config, tmp_path / "whole", progress=False)

    class Stopped(Exception):
        pass

    def stop(*_):
        seen.append(0)
        if len(seen) == 5:  # in the third step
            raise Stopped

    seen = []
    handle = resumed.dense.embed.register_forward_hook(stop)  # once a part
    with pytest.raises(Stopped):
        train_bridges(resumed, corpus, training, config, tmp_path / "cut", progress=False)
    handle.remove()
    kept = tmp_path / "cut" / "checkpoint-00000002"
    assert Bridges.from_pretrained(kept / "bridges").made_for.keys() == {"dense", "sparse"}

    third = new_pair(encoder=encoder)
    result = train_bridges(third, corpus, training, config, tmp_path / "cut", progress=False)
    assert same(weights(third), weights(straight))
    assert result.metrics.equals(whole.metrics)
    assert result.metrics["sparse_to_dense/0.pre"].isna().any()  # two sites of three a step

    end = tmp_path / "cut"
    loaded = BridgedPair(  # made for these models, or it would be refused
        third.dense,
        SparseTransformer.from_pretrained(end / "model"),
        Bridges.from_pretrained(end / "bridges"),
    )
    tokens = corpus.validation_sequences(2, 8)
    assert torch.equal(loaded(tokens), third(tokens))
    assert same(weights(loaded.bridges), weights(third.bridges))
    assert loaded.bridges.config == third.bridges.config
    with pytest.raises(ValueError, match="another dense model"):
        BridgedPair(new_pair(dense="relu").dense, loaded.sparse, loaded.bridges)


def test_another_run_s_folder_is_refused(new_pair, corpus, tmp_path):
    short = replace(TINY, steps=2)
    train_bridges(new_pair(), corpus, short, folder=tmp_path, progress=False)
    other = BridgeTrainingConfig(losses=BridgeLosses(decoder=2.5))
    with pytest.raises(ValueError, match=r"losses\.decoder: 0\.3 there, 2\.5 here"):
        train_bridges(new_pair(), corpus, short, other, tmp_path, progress=False)
    with pytest.raises(ValueError, match="dense: "):
        train_bridges(new_pair(dense="relu"), corpus, short, folder=tmp_path, progress=False)
    train_bridges(new_pair(), corpus, short, other, tmp_path, progress=False, restart=True)


def test_a_stranger_s_file_in_the_place_of_the_bridges_is_refused(new_pair, corpus, tmp_path):
    (tmp_path / "bridges").write_text("mine")
    with pytest.raises(ValueError, match="bridges was not written by a trainer"):
        train_bridges(new_pair(), corpus, TINY, folder=tmp_path, progress=False)
    assert (tmp_path / "bridges").read_text() == "mine"


@pytest.mark.parametrize("line", ['"encoder/0.pre": "x"', '"mine": 1.0'])
def test_metrics_that_no_run_of_bridges_wrote_are_refused(new_pair, corpus, tmp_path, line):
    short = replace(TINY, steps=2)
    train_bridges(new_pair(), corpus, short, folder=tmp_path, progress=False)
    path = tmp_path / "metrics.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    assert json.loads(first)["encoder/0.pre"] > 0
    path.write_text(first.rstrip("}\n") + f", {line}}}\n" + "".join(rest))
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        train_bridges(new_pair(), corpus, short, folder=tmp_path, progress=False)


def test_what_does_not_fit_is_refused(new_pair, corpus):
    pair = new_pair()
    pair.dense.cfg.n_ctx = 8
    with pytest.raises(ValueError, match="context=9 is more than the dense model's n_ctx=8"):
        train_bridges(pair, corpus, replace(TINY, context=9), progress=False)
    pair.sparse = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="must be a SparseTransformer, not a Linear"):
        train_bridges(pair, corpus, TINY, progress=False)


def test_a_pair_of_one_model_is_refused(small_model, corpus):
    model = small_model(tokenizer=corpus.tokenizer)
    pair = BridgedPair(model, model, Bridges.identity(model))
    with pytest.raises(ValueError, match="both sides of the pair are one model"):
        train_bridges(pair, corpus, TINY, progress=False)


def test_bfloat16_trains(new_pair, corpus):
    pair = new_pair()
    config = replace(TINY, precision="bf16", steps=2)
    frame = train_bridges(pair, corpus, config, progress=False).metrics
    assert frame.notna().drop(columns="validation_loss").all().all()
    assert {p.dtype for p in pair.parameters()} == {torch.float32}
