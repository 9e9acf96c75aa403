"""``tl-sparse trace``: what it writes, and what it refuses in one line."""

import json

import pandas as pd
import pytest
import torch

from tl_sparse.cli import main
from tl_sparse.tracing import Dictionary, load_graph, save_dictionaries


@pytest.fixture
def folders(small_model, make_tokenizer, tmp_path):
    """A saved model and dictionaries of it."""
    model = small_model(tokenizer=make_tokenizer())
    draw = torch.Generator().manual_seed(1)
    made = []
    for hook_in, hook_out in (
        ("hook_embed", "hook_embed"),
        ("blocks.0.hook_attn_out", "blocks.0.hook_attn_out"),
        ("blocks.1.mlp.hook_act_in", "blocks.1.hook_mlp_out"),
    ):
        W_enc, W_dec = (torch.randn(16, 24, generator=draw) for _ in range(2))
        made.append(Dictionary(hook_in, hook_out, W_enc, torch.zeros(24), W_dec.T.contiguous(),
                               torch.zeros(16)))  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    save_dictionaries(made, tmp_path / "dictionaries", model)
    return [str(tmp_path / "model"), "--dictionaries", str(tmp_path / "dictionaries"),
            "--out", str(tmp_path / "out")]  # fmt: skip


def test_a_text_is_traced_labelled_and_written(folders, tmp_path, monkeypatch):
    text = torch.randint(3, 30, (6, 8))
    monkeypatch.setattr("tl_sparse.cli.trace.text_of", lambda *_: text)
    main(["trace", *folders, "--text", "w3 w9 w4", "--token", "w5", "--tau", "0.05"])
    out = tmp_path / "out"
    graph = load_graph(out / "graph-0.json")
    assert graph.root == "logit('w5')"
    nodes = pd.read_csv(out / "nodes.csv", keep_default_na=False)
    assert nodes["id"].tolist() == graph.nodes["id"].tolist()
    features = nodes[nodes["kind"] == "feature"]
    assert len(features)
    assert features["label"].str.len().min() > 0
    drawn = json.loads((out / "attribution_graphs" / "graph-0.json").read_text())
    assert len(drawn["nodes"]) == len(nodes)
    assert any(node["clerp"] == features["label"].iloc[0] for node in drawn["nodes"])
    assert len(pd.read_csv(out / "edges.csv")) == len(graph.edges)
    assert features["id"].iloc[0] in (out / "trace.html").read_text()
    assert json.loads((out / "settings.json").read_text())["tau"] == 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give task= or text="),
        (["--text", "w3", "--task", "lambda_func"], "give task= or text="),
        (["--text", "w3", "--label", "llm"], "needs llm="),
        (["--text", "w3", "--token", "w3 w9"], "w3 w9"),
        (["--text", "w3", "--mode", "sometimes"], "sometimes"),
    ],
)
def test_what_it_cannot_do_it_says(folders, options, message):
    with pytest.raises(SystemExit, match=message):
        main(["trace", *folders, "--label", "none", *options])
