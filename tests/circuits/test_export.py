"""Circuits as tables for other tools, and as Neuronpedia's JSON lines."""

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch

import tl_sparse
from tl_sparse.ablation import activation_means
from tl_sparse.circuits import (
    circuit_of_heads,
    circuit_of_nodes,
    export_circuit,
    export_neuronpedia,
    node_activations,
)
from tl_sparse.node import Node, node_mask
from tl_sparse.nodes import top_examples

SITES = (
    "attn_in",
    "attn_q",
    "attn_v",
    "attn_out",
    "mlp_in",
    "mlp_neuron",
    "mlp_out",
    "final_resid",
)
READ = {
    "parquet": pd.read_parquet,
    "csv": pd.read_csv,
    "json": lambda path: pd.DataFrame(json.loads(path.read_text())),
}


@pytest.fixture
def model(small_model):
    return small_model("together", zeros=0.5)


@pytest.fixture
def circuit(model, tokens):
    means = activation_means(model, tokens, SITES)
    generator = torch.Generator().manual_seed(2)
    kept = torch.rand(means.index.n_nodes, generator=generator) < 0.15
    return circuit_of_nodes(model, "marked", kept, means)


@pytest.fixture
def activations(circuit, model, tokens):
    return node_activations(circuit, model, tokens, last=torch.tensor([7, 4]))


@pytest.mark.parametrize("format", list(READ))
def test_tables_have_all_nodes_and_edges_under_both_names(circuit, activations, tmp_path, format):
    """Row 15."""
    export_circuit(circuit, tmp_path / "out", format, activations)
    found = {path.stem: path for path in (tmp_path / "out").iterdir()}
    assert set(found) == {"nodes", "edges", "activations", "about"}
    nodes, edges = (READ[format](found[name]) for name in ("nodes", "edges"))
    assert (len(nodes), len(edges)) == (circuit.n_nodes, circuit.n_edges)
    assert circuit.n_edges > 20
    for theirs, ours, layer, site, channel in nodes[
        ["name", "ours", "layer", "site", "channel"]
    ].itertuples(index=False):
        assert Node(theirs).on(circuit.index) == Node(ours).on(circuit.index)
        assert Node(ours).on(circuit.index) == Node((layer, site, channel)).on(circuit.index)
    assert set(edges["source_name"]) | set(edges["target_name"]) <= set(nodes["name"])
    assert set(edges["source_ours"]) | set(edges["target_ours"]) <= set(nodes["ours"])
    assert len(READ[format](found["activations"])) == circuit.n_nodes * (8 + 5)
    about = json.loads(found["about"].read_text())
    assert (about["n_nodes"], about["n_edges"]) == (circuit.n_nodes, circuit.n_edges)
    assert about["loss"] == "nan"
    assert about["model_fingerprint"] == circuit.model_fingerprint


@pytest.mark.parametrize("format", list(READ))
def test_numbers_come_back_to_the_bit(circuit, activations, tmp_path, format):
    """Row 15."""
    export_circuit(circuit, tmp_path, format, activations)
    for name, column, expected in (
        ("edges", "weight", circuit.edges["weight"].to_numpy()),
        ("nodes", "mean", circuit.nodes["mean"].to_numpy()),
        ("activations", "activation", activations.values[:, activations.real].flatten().numpy()),
    ):
        found = READ[format](tmp_path / f"{name}.{format}")[column].to_numpy()
        if format == "parquet":
            assert found.dtype == expected.dtype == np.float32
        assert np.array_equal(found.astype(np.float32).view(np.int32), expected.view(np.int32))
    assert READ[format](tmp_path / f"nodes.{format}")["tau"].isna().all()


def test_removed_edges_are_a_table_of_their_own(circuit, tmp_path):
    removed = circuit.edges[:3].assign(constant=0.5)
    pruned = replace(circuit, edges=circuit.edges[3:], removed_edges=removed)
    export_circuit(pruned, tmp_path, "csv")
    assert pd.read_csv(tmp_path / "removed_edges.csv")["constant"].tolist() == [0.5] * 3
    assert len(pd.read_csv(tmp_path / "edges.csv")) == circuit.n_edges - 3


def test_recorded_activations_are_those_of_hooks(circuit, model, tokens, activations):
    seen = {}

    def record(x, hook):
        seen[hook.name] = x.detach().flatten(2)

    hooks = [(name, record) for name in circuit.index.slices]
    model.run_with_hooks(tokens, fwd_hooks=[*circuit.hooks(), *hooks])
    for row, values in zip(circuit.nodes.itertuples(), activations.values, strict=True):
        torch.testing.assert_close(values, seen[row.hook][..., row.channel])
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    whole = node_activations(circuit, model, tokens, alone=False)
    for row, values in zip(circuit.nodes.itertuples(), whole.values, strict=True):
        torch.testing.assert_close(values, seen[row.hook][..., row.channel])
    assert not torch.equal(whole.values, activations.values)
    assert "in the full model" in repr(whole)
    assert "<table" in activations._repr_html_()
    table = activations.to_dataframe()
    row = table.iloc[-1]
    assert (row.prompt, row.position, row.token) == (1, 4, int(tokens[1, 4]))
    assert row.activation == activations.values[-1, 1, 4]


def test_an_export_replaces_an_older_one_or_leaves_it(circuit, activations, tmp_path, monkeypatch):
    export_circuit(circuit, tmp_path / "out", "csv")
    before = (tmp_path / "out" / "nodes.csv").read_bytes()

    def fail(*_):
        raise RuntimeError("no more")

    monkeypatch.setitem(tl_sparse.circuits.export.WRITERS, "csv", fail)
    with pytest.raises(RuntimeError):
        export_circuit(circuit, tmp_path / "out", "csv")
    assert (tmp_path / "out" / "nodes.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_exported(circuit, model, tokens, activations, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="choose from parquet, csv, json"):
        export_circuit(circuit, tmp_path, "xlsx")
    other = circuit_of_nodes(model, "marked", ~circuit.kept, circuit.means)
    with pytest.raises(ValueError, match="activations are of another circuit"):
        export_circuit(other, tmp_path, "csv", activations)
    for last in (torch.tensor([8, 1]), torch.tensor([-1, 1]), torch.tensor([1])):
        with pytest.raises(ValueError, match="last must be a place in each of the 2 prompts"):
            node_activations(circuit, model, tokens, last=last)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        export_circuit(circuit, tmp_path / "out", "parquet")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# Neuronpedia

SCHEMA = json.loads(
    (Path(tl_sparse.__file__).parent / "circuits" / "neuronpedia.schema.json").read_text()
)


def lines(path, kind):
    """A file's lines, each checked against the schema of its kind."""
    validator = jsonschema.Draft202012Validator(SCHEMA | {"$ref": f"#/$defs/{kind}"})
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    for line in found:
        validator.validate(line)
    return found


def of_kind(folder, kind, schema_kind):
    return [
        line for path in sorted(folder.glob(f"*/{kind}/*.gz")) for line in lines(path, schema_kind)
    ]


@pytest.fixture
def exported(circuit, activations, make_tokenizer, tmp_path):
    export_neuronpedia(
        circuit, tmp_path / "np", "mine-1l", make_tokenizer(), activations, top=2, creator_id="me"
    )
    return tmp_path / "np" / "mine-1l"


def test_the_schema_refuses_what_is_no_line():
    validator = jsonschema.Draft202012Validator(SCHEMA | {"$ref": "#/$defs/connection"})
    assert not validator.is_valid({"modelId": "m"})
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_node_is_a_feature_and_every_edge_a_connection(exported, circuit):
    """Row 15."""
    features = of_kind(exported, "features", "feature")
    edges = lines(exported / "connections.jsonl", "connection")
    assert (len(features), len(edges)) == (circuit.n_nodes, circuit.n_edges)
    known = {(line["layer"], line["index"]) for line in features}
    assert len(known) == circuit.n_nodes
    ends = {
        (edge[end]["layer"], edge[end]["index"]) for edge in edges for end in ("source", "target")
    }
    assert ends <= known
    assert sorted(edge["weight"] for edge in edges) == sorted(circuit.edges["weight"].tolist())
    neurons = {line["layer"] + "/" + line["index"] for line in features if "-mlp" in line["layer"]}
    mlp = circuit.nodes[circuit.nodes["site"] == "mlp_neuron"]
    assert {Node(name).on(circuit.index) for name in neurons if "-mlp/" in name} == {
        Node(name).on(circuit.index) for name in mlp["name"]
    }
    assert {line["creatorId"] for line in features} == {"me"}


def test_examples_have_both_signs(exported, circuit, activations, tokens):
    """Row 15."""
    found = of_kind(exported, "activations", "activation")
    assert len({line["id"] for line in found}) == len(found)
    first = {}
    for line in found:
        assert line["maxValue"] == max(line["values"])
        assert line["minValue"] == min(line["values"])
        assert line["values"][line["maxValueTokenIndex"]] == line["maxValue"]
        assert len(line["tokens"]) == len(line["values"]) in (8, 5)
        first.setdefault((line["layer"], line["index"]), line)
    for row, values in zip(circuit.nodes.itertuples(), activations.values, strict=True):
        source = f"{row.layer}-{'mlp' if row.site == 'mlp_neuron' else row.site}"
        line = first[source, str(row.channel)]
        best = max(values[0].max(), values[1, :5].max())
        assert line["maxValue"] == float(best)
        assert line["tokens"][0].startswith("w")


def test_numbers_of_features(exported, circuit, activations):
    features = {(f["layer"], f["index"]): f for f in of_kind(exported, "features", "feature")}
    row = next(circuit.nodes.itertuples())
    values = activations.values[0][activations.real]
    line = features[f"{row.layer}-{row.site}", str(row.channel)]
    assert line["maxActApprox"] == float(values.max())
    assert line["frac_nonzero"] == float((values != 0).double().mean())
    assert sum(line["freq_hist_data_bar_heights"]) == int((values != 0).sum())
    assert line["hookName"] == row.hook
    assert line["vectorLabel"] == row.name


def test_examples_may_come_from_a_corpus(circuit, model, make_tokenizer, tmp_path):
    corpus = torch.randint(3, 30, (12, 9), generator=torch.Generator().manual_seed(4))
    names = circuit.nodes["name"].tolist()
    found = top_examples(model, corpus, names, k=3, index=circuit.index, progress=False)
    export_neuronpedia(circuit, tmp_path, "m", make_tokenizer(), found, top=2)
    features = of_kind(tmp_path / "m", "features", "feature")
    shown = of_kind(tmp_path / "m", "activations", "activation")
    assert len(features) == circuit.n_nodes
    by_node = {}
    for line in shown:
        by_node.setdefault((line["layer"], line["index"]), []).append(line)
    row = circuit.nodes[circuit.nodes["site"] == "mlp_neuron"].iloc[0]
    seen = {}
    model.run_with_hooks(corpus, fwd_hooks=[(row.hook, lambda x, hook: seen.update(x=x.detach()))])
    values = seen["x"][..., row.channel]
    lines = by_node[f"{row.layer}-mlp", str(row.channel)]
    assert max(line["maxValue"] for line in lines) == pytest.approx(float(values.max()))
    assert min(line["minValue"] for line in lines) == pytest.approx(float(values.min()))
    (feature,) = [f for f in features if f["vectorLabel"] == row["name"]]
    assert feature["frac_nonzero"] == pytest.approx(float((values != 0).double().mean()))
    assert sum(feature["freq_hist_data_bar_heights"]) == values.numel()
    other = replace(found, run={**found.run, "model": "another"})
    with pytest.raises(ValueError, match="of another model"):
        export_neuronpedia(circuit, tmp_path / "x", "m", make_tokenizer(), other)


def test_examples_may_be_a_table_such_as_a_payloads(circuit, make_tokenizer, tmp_path):
    names = circuit.nodes["name"].tolist()
    table = pd.DataFrame(
        {
            "node": [names[0], names[0], names[0], names[1]],
            "tokens": [torch.tensor([3, 4]), torch.tensor([5, 6, 7]), [8], [9]],
            "activations": [torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0, 1.0]), [1.5], [0.0]],
        }
    )
    export_neuronpedia(circuit, tmp_path, "m", make_tokenizer(), table, top=1)
    shown = of_kind(tmp_path / "m", "activations", "activation")
    assert [(x["tokens"], x["values"]) for x in shown] == [
        (["w3", "w4"], [0.5, 2.0]), (["w5", "w6", "w7"], [-3.0, 0.0, 1.0]), (["w9"], [0.0]),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="lacks activations"):
        export_neuronpedia(
            circuit, tmp_path / "x", "m", make_tokenizer(), table.drop(columns="activations")
        )
    nan = table.assign(activations=[[float("nan")] * len(x) for x in table["activations"]])
    with pytest.raises(ValueError, match="NaN or infinite"):
        export_neuronpedia(circuit, tmp_path / "x", "m", make_tokenizer(), nan)
    uneven = table.assign(tokens=[[1]] * 4)
    with pytest.raises(ValueError, match="1 tokens and 2 activations"):
        export_neuronpedia(circuit, tmp_path / "x", "m", make_tokenizer(), uneven)


def test_the_same_circuit_gives_the_same_bytes(
    exported, circuit, activations, make_tokenizer, tmp_path
):
    export_neuronpedia(
        circuit, tmp_path / "b", "mine-1l", make_tokenizer(), activations, top=2, creator_id="me"
    )
    files = sorted(p.relative_to(exported) for p in exported.rglob("*") if p.is_file())
    assert files
    for path in files:
        assert (exported / path).read_bytes() == (tmp_path / "b" / "mine-1l" / path).read_bytes()


def test_without_activations_there_are_features_and_connections(circuit, make_tokenizer, tmp_path):
    export_neuronpedia(circuit, tmp_path, "m", make_tokenizer(), set_suffix="-quotes")
    features = of_kind(tmp_path / "m", "features", "feature")
    assert len(features) == circuit.n_nodes
    assert all(line["layer"].endswith("-quotes") for line in features)
    assert list(tmp_path.glob("*/*/activations")) == []


def test_what_neuronpedia_has_no_name_for(circuit, model, tokens, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="model_id='A/b' must be of"):
        export_neuronpedia(circuit, tmp_path / "a", "A/b", tokenizer)
    with pytest.raises(ValueError, match="set_suffix"):
        export_neuronpedia(circuit, tmp_path / "a", "a", tokenizer, set_suffix="/..")
    with pytest.raises(ValueError, match="top=0"):
        export_neuronpedia(circuit, tmp_path / "a", "a", tokenizer, top=0)
    heads = circuit_of_heads(model, "marked", [(0, 1)], tokens)
    with pytest.raises(ValueError, match=r"blocks.0.attn.hook_z are at no site"):
        export_neuronpedia(heads, tmp_path / "a", "a", tokenizer)
    assert not (tmp_path / "a").exists()
    export_circuit(heads, tmp_path / "heads", "csv")
    assert len(pd.read_csv(tmp_path / "heads" / "nodes.csv")) == heads.n_nodes


def test_a_circuit_of_nothing(circuit, model, make_tokenizer, tmp_path):
    empty = circuit_of_nodes(model, "marked", node_mask(circuit.index, []), circuit.means)
    for format in READ:
        export_circuit(empty, tmp_path / format, format)
        assert len(READ[format](tmp_path / format / f"nodes.{format}")) == 0
    export_neuronpedia(empty, tmp_path / "np", "m", make_tokenizer())
    assert lines(tmp_path / "np" / "m" / "connections.jsonl", "connection") == []
    assert math.isnan(empty.loss)
