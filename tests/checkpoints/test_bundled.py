"""The models that ship: what their cards and records say of them holds."""

import re
from pathlib import Path

import pytest
import torch

import tl_sparse
from tl_sparse.bridges import BridgedPair, Bridges, path_table
from tl_sparse.checkpoints.packed import training_record
from tl_sparse.data import CorpusConfig, validation_text
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.sparsity.projection import l0
from tl_sparse.studies import pair_config
from tl_sparse.tasks import evaluate_task, get, names

NAMES = ("python-sparse", "python-dense")
BRIDGED, BRIDGES = "python-bridged", "python-bridges"
FOLDER = Path(tl_sparse.__file__).parent / "bundled"
MEGABYTES = 9


@pytest.fixture(scope="module")
def models():
    return {name: SparseTransformer.from_pretrained(name) for name in NAMES}


@pytest.fixture(scope="module")
def cards():
    return {name: (FOLDER / name / "README.md").read_text(encoding="utf-8") for name in NAMES}


@pytest.fixture(scope="module")
def results(models):
    """Held-out losses of both models on every task."""
    return {
        task: [evaluate_task(m, get(task, m.tokenizer, 64), 32) for m in models.values()]
        for task in names()
    }


def table(card):
    """Rows of the card's first task table: task → its cells."""
    rows = re.findall(r"^\| `(\w+)` \| ([^\n]*) \|$", card, flags=re.MULTILINE)
    found = {}
    for task, cells in rows:
        if task in names():
            found.setdefault(task, [cell.strip() for cell in cells.split("|")])
    return found


def test_all_are_small_enough_to_ship():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {*NAMES, BRIDGED, BRIDGES, "text"}
    assert sum(path.stat().st_size for path in files) <= MEGABYTES * 1e6


def test_they_have_the_architecture_of_the_default_recipe(models):
    config = pair_config.PairConfig(out="models")
    for kind, model in zip(("sparse", "dense"), models.values(), strict=True):
        assert model.config == config.model(kind, 0, 1024)
        assert not model.training


@pytest.mark.parametrize("name", ["python-sparse", BRIDGED])
def test_the_sparse_ones_are_as_sparse_as_their_records_say(name):
    record = training_record(name)
    matrices = weight_matrices(SparseTransformer.from_pretrained(name))
    assert l0(matrices) == dict(record.l0)
    entries = sum(matrix.numel for matrix in matrices)
    assert sum(record.l0.values()) < entries / 15
    assert not any(bool((p.signbit() & (p == 0)).any()) for m in matrices for p in m.parts)


def test_their_losses_are_equal(cards):
    sparse, dense = (training_record(name) for name in NAMES)
    assert dense.config["stop_at_loss"] == sparse.validation_loss
    assert 0 <= sparse.validation_loss - dense.validation_loss < 0.02
    assert sparse.corpus == dense.corpus
    for card in cards.values():
        for record in (sparse, dense):
            assert f"{record.validation_loss:.4f}" in card


def test_they_share_a_tokenizer(models):
    sparse, dense = (model.tokenizer.get_vocab() for model in models.values())
    assert sparse == dense
    assert len(sparse) == 1024


def test_both_solve_at_least_four_tasks_and_those_that_their_cards_say(results, cards):
    solved = {task for task, pair in results.items() if max(r.loss for r in pair) < 0.15}
    assert len(solved) >= 4
    for card in cards.values():
        claimed = {task for task, cells in table(card).items() if cells[-1] == "both"}
        # the prompts quote the interpreter's own library, and here are a quarter as many
        assert len(claimed & solved) >= max(4, len(claimed) - 2)


def test_both_cards_give_the_same_results_and_the_command(cards):
    sparse, dense = (table(card) for card in cards.values())
    assert sparse == dense
    assert set(sparse) == set(names())
    for card in cards.values():
        assert "```sh\ntl-sparse pair --out models\n```" in card


def test_weights_are_stored_in_half_precision_and_loaded_in_single(models):
    for name, model in models.items():
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        half = SparseTransformer.from_pretrained(name, dtype=torch.float16)
        for one, other in zip(model.parameters(), half.parameters(), strict=True):
            assert torch.equal(one, other.float())


def test_the_bridged_one_is_joined_to_the_dense_one(models):
    dense, sparse = models["python-dense"], SparseTransformer.from_pretrained(BRIDGED)
    assert sparse.config == models["python-sparse"].config
    assert sparse.tokenizer.get_vocab() == dense.tokenizer.get_vocab()
    bridges = Bridges.from_pretrained(BRIDGES)
    with pytest.raises(ValueError, match="another sparse model"):
        BridgedPair(dense, models["python-sparse"], bridges)
    text = validation_text(CorpusConfig(), dense.tokenizer, 16, context=64)
    pair = BridgedPair(dense, sparse, bridges)
    kl = path_table(pair, text, back="none", progress=False).by_site("kl")
    for hybrid, mean in (("d→s", "mean→s"), ("s→d", "mean→d")):
        assert (kl[hybrid] < 0.4 * kl[mean]).all()


def test_the_bridged_one_s_card_says_what_it_ended_with_and_the_command():
    card = (FOLDER / BRIDGED / "README.md").read_text(encoding="utf-8")
    assert f"| `{BRIDGED}` | {training_record(BRIDGED).validation_loss:.4f} | " in card
    assert set(table(card)) == set(names())
    assert "```sh\ntl-sparse pair --out models --bridged\n```" in card
