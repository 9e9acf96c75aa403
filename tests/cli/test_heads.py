import json

import pandas as pd
import pytest

from tl_sparse import cli
from tl_sparse.circuits import Circuit
from tl_sparse.cli.heads import is_ours
from tl_sparse.model.transformer import SparseTransformer

SMALL = ["--epochs", "2", "--n-codes", "8", "--n-train", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.conformance.models import build

    folder = tmp_path_factory.mktemp("heads")
    build("paper").save_pretrained(folder / "model")
    rows = [
        {"positive": f"w3 w{4 + i} w5", "negative": f"w6 w{4 + i} w5", "answers": ["w7", "w8"]}
        for i in range(12)
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder, *options):
    out = folder / "out"
    cli.main(
        ["heads", str(folder / "model"), "--out", str(out), "--file", str(folder / "mine.jsonl"),
         *SMALL, *options]
    )  # fmt: skip
    return out


def test_heads_are_named_from_a_file_of_prompts(capsys, folder):
    out = run(folder, "--top", "2", "--edges", "--edge-shuffles", "19", "--position", "last")
    told = capsys.readouterr().out
    table = pd.read_csv(out / "heads.csv")
    best = table["component"][:2].tolist()
    assert f"2 of {len(table)} components highest: {', '.join(best)}" in told
    assert "12 positive and 12 negative prompts" in told
    circuit = Circuit.load(out / "circuit", SparseTransformer.from_pretrained(folder / "model"))
    rows = circuit.components[["layer", "head"]].itertuples(index=False)
    assert {f"L{layer}H{head}" for layer, head in rows} == set(best)
    assert circuit.task == "mine"
    edges = pd.read_csv(out / "edges.csv")
    assert len(edges) == (len(table) // 2) ** 2
    assert edges["p_value"].between(0.05, 1).all()
    assert json.loads((out / "settings.json").read_text())["heads"] == best
    page = (out / "heads.html").read_text()
    assert "Heads of mine" in page
    assert best[0] in page


def test_mistakes_are_told_in_one_line(folder):
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "heads.csv").touch()
    for options, message in (
        ([], "already: choose another --out, or replace with --overwrite"),
        (["--overwrite", "--position", "S2"], "position='S2': choose from mean, last, max"),
        (["--overwrite", "--n-train", "99"], "n_train=99: there are 24 prompts"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(folder, *options)
        assert message in str(stopped.value)
        assert str(stopped.value).startswith("tl-sparse: ")


def test_whose_model_it_is(folder, tmp_path):
    assert is_ours(str(folder / "model"))
    assert is_ours("python-sparse")
    assert not is_ours("gpt2")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert not is_ours(str(tmp_path))
