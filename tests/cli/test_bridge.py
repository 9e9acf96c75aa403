"""``tl-sparse bridge``: fitted and trained bridges from a command line, and what it refuses."""

import pytest
import torch

from tl_sparse import SparseTransformer, SparseTransformerConfig, cli
from tl_sparse.bridges import BridgedPair, Bridges

SIZES = {"n_layers": 1, "d_model": 8, "d_head": 4, "n_ctx": 16}


@pytest.fixture(scope="module")
def models(sixty_sources, tmp_path_factory):
    """Folders of a dense and a sparse model of the same tokenizer."""
    from tl_sparse.data import CorpusConfig, build_corpus

    folder = tmp_path_factory.mktemp("models")
    config = CorpusConfig(sources=(str(sixty_sources),), vocab_size=320, required_words=())
    tokenizer = build_corpus(config, folder / "cache", progress=False).tokenizer
    for name, seed in (("dense", 0), ("sparse", 1)):
        sizes = SparseTransformerConfig(d_vocab=len(tokenizer), seed=seed, **SIZES)
        SparseTransformer(sizes, tokenizer).save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(models, sixty_sources, tmp_path):
    """``run(*arguments)``: bridges from the dense model in tmp_path / "out"."""

    def main(*arguments, dense="dense"):
        cli.main([
            "bridge", str(models / dense), "--out", str(tmp_path / "out"),
            "--corpus.sources", str(sixty_sources), "--corpus.idiom-share", "0",
            "--sequences", "8", *map(str, arguments),
        ])  # fmt: skip
        return tmp_path / "out"

    return main


SHORT = (
    "--training.steps", 2, "--training.batch-size", 4, "--training.eval-sequences", 2,
)  # fmt: skip
NEW = (
    "--model.n-layers", 1, "--model.d-model", 8, "--model.d-head", 4, "--model.n-ctx", 16,
    "--training.sparsity.density", 0.5, "--training.sparsity.floor", 1,
    "--training.sparsity.embedding-floor", 1,
)  # fmt: skip


def loaded(models, out, sparse):
    bridges = Bridges.from_pretrained(out / "bridges")
    ends = [SparseTransformer.from_pretrained(place) for place in (models / "dense", sparse)]
    return BridgedPair(*ends, bridges)  # refuses bridges of other models


def test_fit(run, models, capsys):
    out = run("--method", "fit", "--sparse", models / "sparse", "--encoder", "linear")
    pair = loaded(models, out, models / "sparse")
    assert pair.bridges.config.encoder == "linear"
    said = capsys.readouterr().out
    assert "Reconstruction(3 sites" in said
    assert f"bridges in {out / 'bridges'}" in said
    page = (out / "bridge.html").read_text(encoding="utf-8")
    assert "Reconstruction(3 sites" in page
    assert "Hybrids of the two models" in page
    assert "0.mid" in page


def test_train_a_new_sparse_model(run, models, capsys):
    out = run("--start", "fit", "--bridges.losses.decoder", 2, *SHORT, *NEW)
    pair = loaded(models, out, out / "model")
    assert pair.sparse.config.d_vocab == pair.dense.config.d_vocab
    nonzero = (pair.sparse.blocks[0].mlp.W_in != 0).float().mean()
    assert 0.4 < float(nonzero) <= 0.5
    assert "validation loss" in capsys.readouterr().out


def test_train_bridges_to_a_model_that_stays_as_it_is(run, models):
    out = run("--sparse", models / "sparse", "--bridges.no-train-sparse", *SHORT)
    before = SparseTransformer.from_pretrained(models / "sparse").state_dict()
    after = SparseTransformer.from_pretrained(out / "model").state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "fit"), "no sparse model to leave as it is: name it with --sparse"),
        (("--bridges.no-train-sparse",), "no sparse model to leave as it is"),
        (("--sequences", 2), "sequences=2 must be at least 8"),
        (("--bridges.tail-share", 2), "tail_share=2.0 must lie in"),
        (("--bridges.losses.encoder", -1), "the weight encoder=-1.0 must not be negative"),
        (("--encoder", "relu"), "relu"),
        (("--sparse", "nowhere"), "nowhere"),
        (("--encoder", "abstopk", "--density", 0.01, *NEW), "density=0.01 of 8 channels"),
        (("--training.context", 17, *NEW), "context=17"),
    ],
)
def test_bad_input_ends_in_one_line(run, arguments, words):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert words in str(ended.value.code)
    assert "\n" not in str(ended.value.code)
