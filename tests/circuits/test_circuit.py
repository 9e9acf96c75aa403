import dataclasses
import json
import math
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from safetensors.torch import load_file, save_file

from tl_sparse.ablation import activation_means, norm_hooks, resample_sources
from tl_sparse.circuits import (
    Calibration,
    Circuit,
    circuit_edges,
    circuit_of_channels,
    circuit_of_heads,
    circuit_of_nodes,
)
from tl_sparse.circuits.edge_weights import edges_removed
from tl_sparse.sites import BLOCK_SITES, SITE_NAMES, NodeIndex
from tl_sparse.sparsity.weight_masks import WeightMasks
from tl_sparse.views.circuit_svg import circuit_svg

EDGE_COLUMNS = [
    "layer", "source_site", "source", "target_site", "target", "matrix", "weight",
]  # fmt: skip
NODE_COLUMNS = [
    "layer", "site", "channel", "head", "head_channel", "hook", "tau", "mean", "name",
]  # fmt: skip


def hand_made(model, tokens, share=0.3, nodes=None, sites=None):
    """A circuit of random nodes, or of those named, with results made up."""
    generator = torch.Generator().manual_seed(9)
    means = activation_means(model, tokens, *([] if sites is None else [sites]))
    index = means.index
    kept = torch.rand(index.n_nodes, generator=generator) < share
    if nodes is not None:
        kept = torch.zeros(index.n_nodes, dtype=torch.bool)
        for layer, site, channel in nodes:
            kept[index.slices[index.hook(layer, site)].start + channel] = True
    losses = torch.rand(6, generator=generator)
    return Circuit(
        task="marked", index=index, kept=kept, tau=torch.rand(index.n_nodes, generator=generator),
        means=means, edges=circuit_edges(model, index, kept), losses=losses,
        losses_calibrated=losses, correct=losses < 0.5, calibration=Calibration(1.5, -0.25),
        selection_loss=0.1 + 0.2, model_loss=0.01, target_loss=0.15, n_active=40, seed=3,
        config={"steps": 7, "penalty": "fixed", "lr": 0.1}, model_name=type(model).__name__,
        seconds=12.5,
        size_curve=pd.DataFrame({"n_nodes": [0, 7, 40], "loss": [0.1 + 0.7, 0.3, 0.1]}),
    )  # fmt: skip


@pytest.fixture
def model(small_model):
    return small_model("together", zeros=0.5)


@pytest.fixture
def circuit(model, random_tokens):
    return hand_made(model, random_tokens)


def assert_same(found, expected):
    for field in dataclasses.fields(Circuit):
        mine, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs), field.name
        elif isinstance(theirs, pd.DataFrame):
            pd.testing.assert_frame_equal(mine, theirs, check_exact=True, check_like=True)
        elif field.name == "means":
            assert torch.equal(mine.values, theirs.values)
            for name in ("index", "n_tokens", "tokens_hash", "model_fingerprint"):
                assert getattr(mine, name) == getattr(theirs, name)
        else:
            assert mine == theirs or (mine != mine and theirs != theirs), field.name  # NaN


@pytest.mark.parametrize("share", [0.3, 0.0, 1.0])
def test_a_saved_circuit_is_loaded_exactly(model, random_tokens, tmp_path, share):
    circuit = hand_made(model, random_tokens, share)
    circuit.save(tmp_path / "deep" / "c")
    loaded = Circuit.load(tmp_path / "deep" / "c", model)
    assert_same(loaded, circuit)
    pd.testing.assert_frame_equal(loaded.nodes, circuit.nodes, check_exact=True)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["c"]
    tokens = random_tokens[:4]
    before = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=circuit.hooks())
    after = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=loaded.hooks())
    assert torch.equal(before, after)


def test_a_circuit_of_some_sites_is_loaded_exactly(model, random_tokens, tmp_path):
    circuit = hand_made(model, random_tokens, sites=("attn_v", "attn_out"))
    circuit.save(tmp_path / "c")
    assert_same(Circuit.load(tmp_path / "c", model), circuit)


def test_a_circuit_is_saved_over_an_older_one(circuit, model, tmp_path):
    circuit.save(tmp_path / "c")
    newer = replace(circuit, seed=4)
    newer.save(tmp_path / "c")
    assert Circuit.load(tmp_path / "c", model).seed == 4


def test_the_same_weights_elsewhere_are_the_same_model(circuit, small_model, tmp_path):
    circuit.save(tmp_path / "c")
    assert_same(Circuit.load(tmp_path / "c", small_model("together", zeros=0.5)), circuit)


def test_another_model_is_refused(circuit, model, tmp_path):
    circuit.save(tmp_path / "c")
    with torch.no_grad():
        model.blocks[0].mlp.W_in[0, 0] += 1e-3
    with pytest.raises(
        ValueError, match=r"not of this model.*load the model it was pruned from"
    ) as e:
        Circuit.load(tmp_path / "c", model)
    assert "\n" not in str(e.value)


def test_a_missing_folder_or_file_is_named(circuit, model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"circuit.json is missing$"):
        Circuit.load(tmp_path / "nowhere", model)
    circuit.save(tmp_path / "c")
    (tmp_path / "c" / "circuit.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"circuit.safetensors is missing"):
        Circuit.load(tmp_path / "c", model)


@pytest.mark.parametrize("name", ["circuit.json", "circuit.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_truncated_file_is_one_line(circuit, model, tmp_path, name, share):
    circuit.save(tmp_path / "c")
    path = tmp_path / "c" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=name) as error:
        Circuit.load(tmp_path / "c", model)
    assert "\n" not in str(error.value)


def change_record(folder, **changes):
    path = folder / "circuit.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({k: v for k, v in values.items() if k not in changes or v is not None})
    )


def test_an_unknown_time_and_an_empty_curve_are_loaded_exactly(circuit, model, tmp_path):
    curve = pd.DataFrame({"n_nodes": [], "loss": []}).astype({"n_nodes": "int64"})
    replace(circuit, seconds=math.nan, size_curve=curve).save(tmp_path / "c")
    loaded = Circuit.load(tmp_path / "c", model)
    assert math.isnan(loaded.seconds)
    pd.testing.assert_frame_equal(loaded.size_curve, curve)


def test_a_curve_may_hold_what_a_failed_mask_gives(circuit, model, tmp_path):
    curve = pd.DataFrame({"n_nodes": [0, 3], "loss": [math.nan, math.inf]})
    replace(circuit, size_curve=curve).save(tmp_path / "c")
    pd.testing.assert_frame_equal(Circuit.load(tmp_path / "c", model).size_curve, curve)


@pytest.mark.parametrize(
    "curve",
    [
        {}, "x", [1, 2], [[1]], [[1, 0.1, 2]], [["1", 0.1]], [[1, "x"]], [[True, 0.1]],
        [[1, False]], [[1.5, 0.1]], [[-1, 0.1]], [[2**62, 0.1]], [[10**400, 0.1]],
        [[1, 10**400]], [["nan", 0.1]], [["inf", 0.1]], [[1, [0.1]]], [[None, 0.1]],
    ],
)  # fmt: skip
def test_a_broken_curve_is_refused(circuit, model, tmp_path, curve):
    circuit.save(tmp_path / "c")
    change_record(tmp_path / "c", size_curve=curve)
    message = r"circuit.json is broken: size_curve must be a list of \[number of nodes, loss\]$"
    with pytest.raises(ValueError, match=message):
        Circuit.load(tmp_path / "c", model)


@pytest.mark.parametrize("seconds", ["12", True, [1.0], {}])
def test_a_broken_time_is_refused(circuit, model, tmp_path, seconds):
    circuit.save(tmp_path / "c")
    change_record(tmp_path / "c", seconds=seconds)
    with pytest.raises(ValueError, match=r"circuit.json is broken: .*seconds"):
        Circuit.load(tmp_path / "c", model)


def test_a_circuit_of_the_older_schema_is_told_apart(circuit, model, tmp_path):
    circuit.save(tmp_path / "c")
    change_record(tmp_path / "c", schema_version=1, seconds=None, size_curve=None)
    with pytest.raises(ValueError, match="circuit schema_version 1; this version"):
        Circuit.load(tmp_path / "c", model)


def test_another_schema_version_is_refused(circuit, model, tmp_path):
    circuit.save(tmp_path / "c")
    change_record(tmp_path / "c", schema_version=99)
    with pytest.raises(ValueError, match="schema_version 99; this version of tl_sparse reads 3"):
        Circuit.load(tmp_path / "c", model)


def test_a_record_that_lacks_something_names_it(circuit, model, tmp_path):
    circuit.save(tmp_path / "c")
    change_record(tmp_path / "c", config=None, seed=None)
    with pytest.raises(ValueError, match=r"circuit.json is broken: .* without config, seed$"):
        Circuit.load(tmp_path / "c", model)


def test_a_tensor_too_many_or_too_few_is_refused(circuit, model, tmp_path):
    circuit.save(tmp_path / "c")
    path = tmp_path / "c" / "circuit.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="must hold kept, losses"):
        Circuit.load(tmp_path / "c", model)
    del tensors["kept"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="must hold kept, losses"):
        Circuit.load(tmp_path / "c", model)


@pytest.mark.parametrize("when", ["writing", "moving"])
def test_an_interrupted_save_leaves_the_old_circuit(circuit, model, tmp_path, monkeypatch, when):
    circuit.save(tmp_path / "c")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if when == "writing":
        monkeypatch.setattr("tl_sparse.circuits.stored.json.dumps", interrupt)
    else:
        moved = []
        real = os.replace

        def third_fails(source, target):
            moved.append(target)
            if len(moved) == 3:  # the first finds the old folder, the second sets it aside
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr("tl_sparse.storage.atomic_write.os.replace", third_fails)
        monkeypatch.setattr("tl_sparse.storage.atomic_write.exchange", lambda one, other: False)
    with pytest.raises(KeyboardInterrupt):
        replace(circuit, seed=77).save(tmp_path / "c")
    monkeypatch.undo()
    assert_same(Circuit.load(tmp_path / "c", model), circuit)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_the_table_of_nodes_names_each_kept_node(circuit):
    nodes = circuit.nodes
    assert list(nodes.columns) == NODE_COLUMNS
    assert len(nodes) == circuit.n_nodes == int(circuit.kept.sum())
    for node in (nodes.index[0], nodes.index[-1]):
        row = nodes.loc[node]
        piece = circuit.index.slices[row.hook]
        assert piece.start + row.channel == node
        assert circuit.kept[node]
        assert row.tau == pytest.approx(float(circuit.tau[node]))
        assert row["mean"] == pytest.approx(float(circuit.means.values[node]))
    in_heads = nodes["site"].isin(["attn_q", "attn_k", "attn_v"])
    assert (nodes["head"].notna() == in_heads).all()
    heads = nodes[in_heads]
    assert (heads["head"] * 8 + heads["head_channel"] == heads["channel"]).all()


def test_the_table_of_edges_joins_kept_nodes(circuit):
    assert list(circuit.edges.columns) == EDGE_COLUMNS
    assert circuit.n_edges == len(circuit.edges) > 0
    kept = set(circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None))
    for end in ("source", "target"):
        names = circuit.edges[["layer", f"{end}_site", end]].itertuples(index=False, name=None)
        assert set(names) <= kept


def test_results_are_summed_up(circuit):
    table = circuit.to_dataframe()
    assert list(table.columns) == ["task", "loss", "loss_calibrated", "correct"]
    assert len(table) == 6
    assert circuit.loss == pytest.approx(table["loss"].mean())
    assert circuit.loss_calibrated == pytest.approx(table["loss_calibrated"].mean())
    assert circuit.accuracy == pytest.approx(table["correct"].mean())


def test_the_graph_has_the_nodes_the_edges_and_the_residual_links(small_model, random_tokens):
    model = small_model("plain")
    nodes = [
        (0, "attn_in", 3), (0, "attn_out", 3), (0, "mlp_in", 3), (0, "mlp_neuron", 1),
        (0, "mlp_out", 5), (1, "attn_in", 3), (1, "attn_in", 5), (1, "mlp_out", 3),
    ]  # fmt: skip
    circuit = hand_made(model, random_tokens, nodes=nodes)
    graph = circuit.to_networkx()
    assert set(graph.nodes) == set(nodes)
    kinds = {(a, b): kind for a, b, kind in graph.edges(data="kind")}
    assert {ends for ends, kind in kinds.items() if kind == "weight"} == {
        ((0, "mlp_in", 3), (0, "mlp_neuron", 1)), ((0, "mlp_neuron", 1), (0, "mlp_out", 5)),
    }  # fmt: skip
    assert {ends for ends, kind in kinds.items() if kind == "residual"} == {
        ((0, "attn_out", 3), (0, "mlp_in", 3)), ((0, "attn_out", 3), (1, "attn_in", 3)),
        ((0, "mlp_out", 5), (1, "attn_in", 5)),
    }  # fmt: skip
    edge = graph.edges[(0, "mlp_in", 3), (0, "mlp_neuron", 1)]
    assert edge["matrix"] == "W_in"
    assert edge["weight"] == pytest.approx(float(model.blocks[0].mlp.W_in[3, 1]))
    place = circuit.index.slices[circuit.index.hook(1, "attn_in")].start + 5
    assert graph.nodes[1, "attn_in", 5]["tau"] == pytest.approx(float(circuit.tau[place]))
    assert graph.graph["task"] == "marked"


def test_the_stream_runs_from_the_embedding_to_the_final_read(small_model, random_tokens, tmp_path):
    model = small_model("plain")
    nodes = [
        (0, "embed", 3), (0, "attn_in", 3), (0, "attn_out", 3), (1, "mlp_in", 3),
        (1, "mlp_out", 3), (1, "final_resid", 3), (1, "final_resid", 4), (0, "embed", 5),
    ]  # fmt: skip
    circuit = hand_made(model, random_tokens, nodes=nodes, sites=SITE_NAMES)
    writes = [(0, "embed", 3), (0, "attn_out", 3), (1, "mlp_out", 3)]
    reads = [(0, "attn_in", 3), (1, "mlp_in", 3), (1, "final_resid", 3)]
    links = {(a, b) for a, b, kind in circuit.to_networkx().edges(data="kind") if kind != "weight"}
    # the first read comes before the second write, the second before the third
    gone = {(writes[1], reads[0]), (writes[2], reads[0]), (writes[2], reads[1])}
    assert links == {(a, b) for a in writes for b in reads} - gone
    circuit.save(tmp_path / "c")
    assert_same(Circuit.load(tmp_path / "c", model), circuit)


@pytest.mark.parametrize("option", ["together", "abstopk_resid", "attn_only"])
def test_of_a_circuit_with_both_ends_only_what_is_removed_has_hooks(
    small_model, random_tokens, option
):
    model = small_model(option)
    sites = tuple(n for n in SITE_NAMES if option != "attn_only" or not n.startswith("mlp"))
    circuit = hand_made(model, random_tokens, share=1.1, sites=sites)
    assert circuit.hooks() == []
    keep = circuit.kept.clone()
    keep[[0, -1]] = False
    hooks = replace(circuit, kept=keep).hooks()
    assert [name for name, _ in hooks] == ["hook_embed", "blocks.1.hook_resid_post"]
    for name, hook in hooks:  # all channels but one pass bit for bit
        x = model.run_with_cache(random_tokens)[1][name]
        assert int((hook(x) != x).flatten(0, 1).any(0).sum()) == 1


def test_the_graph_has_every_edge_and_no_way_back(circuit):
    graph = circuit.to_networkx()
    weights = [e for e in graph.edges(data="kind") if e[2] == "weight"]
    assert graph.number_of_nodes() == circuit.n_nodes
    assert len(weights) == circuit.n_edges
    order = list(circuit.index.sites)
    assert order == list(BLOCK_SITES)
    for a, b in graph.edges:
        assert (a[0], order.index(a[1])) < (b[0], order.index(b[1]))


@pytest.mark.parametrize("share", [0.3, 0.0])
def test_pictures_show_the_task(model, random_tokens, share):
    circuit = hand_made(model, random_tokens, share)
    figure = circuit.to_plotly(max_edges=50)
    assert isinstance(figure, go.Figure)
    assert "marked" in figure.to_json()
    assert "marked" in circuit._repr_html_()
    assert "<iframe" in circuit._repr_html_()
    words = repr(circuit)
    assert f"'marked', {circuit.n_nodes} nodes, {circuit.n_edges} edges" in words
    assert f"{circuit.loss:.3f}" in words


def test_hooks_set_what_is_not_kept_to_its_mean(circuit, model, random_tokens):
    seen = {}

    def look(name):
        return lambda x, hook: seen.update({name: x.reshape(-1, x[0, 0].numel())})

    hooks = [*circuit.hooks(), *((name, look(name)) for name in circuit.index.slices)]
    model.run_with_hooks(random_tokens, fwd_hooks=hooks)
    for name, piece in circuit.index.slices.items():
        off = ~circuit.kept[piece]
        mean = circuit.means.values[piece][off]
        assert torch.equal(seen[name][:, off], mean.expand(random_tokens.numel(), -1))
        assert (seen[name][:, ~off].std(0) > 0).any()


def test_a_whole_circuit_is_the_model_to_the_bit(model, random_tokens):
    circuit = hand_made(model, random_tokens, share=1.1)
    assert circuit.n_nodes == circuit.index.n_nodes
    base = model(random_tokens, return_type="logits")
    pruned = model.run_with_hooks(random_tokens, return_type="logits", fwd_hooks=circuit.hooks())
    assert torch.equal(base, pruned)


def test_hooks_for_tokens_are_the_hooks_unless_the_circuit_says_otherwise(
    circuit, model, random_tokens
):
    plain = circuit.hooks_for(model, random_tokens)
    assert [name for name, _ in plain] == [name for name, _ in circuit.hooks()]
    by_run = [
        model.run_with_hooks(random_tokens, return_type="logits", fwd_hooks=hooks)
        for hooks in (plain, circuit.hooks())
    ]
    assert torch.equal(*by_run)
    frozen = replace(circuit, config={"freeze_norm": True}).hooks_for(model, random_tokens)
    assert {name for name, _ in frozen[: -len(plain)]} == set(norm_hooks(model))
    assert [name for name, _ in frozen[-len(plain) :]] == [name for name, _ in plain]


@pytest.mark.parametrize("config", [{"ablation": "resample"}, {"freeze_norm": True}])
def test_hooks_that_depend_on_the_prompts_are_not_given_without_them(
    circuit, model, random_tokens, config
):
    bound = replace(circuit, config=config)
    with pytest.raises(ValueError, match=r"depend on the prompts: use hooks_for\(model, tokens\)"):
        bound.hooks()
    donors = resample_sources(model, random_tokens)
    wrong = None if "ablation" in config else donors
    with pytest.raises(ValueError, match="sources= belong to circuits pruned with"):
        bound.hooks_for(model, random_tokens, wrong)
    assert bound.hooks_for(model, random_tokens, donors if wrong is None else None)


def test_sources_of_another_model_are_refused(circuit, model, random_tokens):
    sources = resample_sources(model, random_tokens)
    other = replace(sources, model_fingerprint="ab" * 32)
    with pytest.raises(ValueError, match="sources belong to another model than the circuit"):
        replace(circuit, config={"ablation": "resample"}).hooks_for(model, random_tokens, other)


def test_hooks_work_with_transformer_lens_own_tools(circuit, model, random_tokens):
    """The hooks() context, run_with_cache inside it, and activation patching of the circuit."""
    from transformer_lens import patching

    tokens = random_tokens[:2, :5]
    by_run = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=circuit.hooks())
    with model.hooks(fwd_hooks=circuit.hooks()):
        logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, by_run)
    assert torch.equal(model(tokens), model.run_with_hooks(tokens, fwd_hooks=[]))
    _, clean = model.run_with_cache(tokens)
    for name, hook in circuit.hooks():
        assert torch.equal(cache[name], hook(cache[name]))
    with model.hooks(fwd_hooks=circuit.hooks()):
        results = patching.get_act_patch_resid_pre(
            model, random_tokens[2:4, :5], clean, lambda out: out[0, -1, 3].detach()
        )
    assert results.shape == (2, 5)
    # the embedding is no node: patching all that block 0 reads at the last place changes the answer
    assert results[0].std() > 0


def test_a_circuit_of_a_transformer_lens_model_is_saved_and_loaded(
    dense_planted, random_tokens, tmp_path
):
    model, chain = dense_planted
    circuit = hand_made(model, random_tokens, nodes=sorted(chain))
    assert circuit.n_edges == 2
    circuit.save(tmp_path / "c")
    assert_same(Circuit.load(tmp_path / "c", model), circuit)
    index = NodeIndex.of(model)
    assert circuit.index == index


# --------------------------------------------------------------------------------------------------
# circuits over any hooks, in groups, and with removed edges


@pytest.fixture
def of_heads(model, random_tokens):
    return circuit_of_heads(model, "marked", [(0, 1), (1, 2)], random_tokens)


@pytest.fixture
def of_features(model, random_tokens):
    kept = {
        "blocks.0.hook_resid_post": torch.arange(model.cfg.d_model) % 3 == 0,
        "blocks.1.mlp.hook_post": torch.arange(model.cfg.d_mlp) < 5,
    }
    return circuit_of_channels(model, "marked", kept, random_tokens)


def with_removed_edges(circuit):
    """The circuit without every third of its edges, which carry made-up constants."""
    edges = circuit.edges.assign(score=np.linspace(-1, 1, circuit.n_edges, dtype=np.float32))
    gone = np.arange(len(edges)) % 3 == 0
    removed = edges[gone].assign(constant=np.linspace(-0.1, 0.1, gone.sum()))
    return replace(
        circuit,
        edges=edges[~gone].reset_index(drop=True),
        removed_edges=removed.reset_index(drop=True),
    )


@pytest.mark.parametrize("kind", ["of_heads", "of_features"])
def test_a_circuit_over_any_hooks_is_saved_loaded_and_run(
    request, kind, model, random_tokens, tmp_path
):
    circuit = request.getfixturevalue(kind)
    circuit.save(tmp_path / "c")
    loaded = Circuit.load(tmp_path / "c", model)
    assert_same(loaded, circuit)
    pd.testing.assert_frame_equal(loaded.components, circuit.components)
    tokens = random_tokens[:3]
    expected = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=circuit.hooks())
    with loaded.applied(model):
        assert torch.equal(model(tokens, return_type="logits"), expected)
    assert not torch.equal(model(tokens, return_type="logits"), expected)
    graph = circuit.to_networkx()
    assert graph.number_of_nodes() == circuit.n_nodes == len(circuit.nodes)


@pytest.mark.parametrize(("kind", "n_shown"), [("of_heads", 2), ("of_features", 11)])
def test_a_circuit_over_any_hooks_is_drawn_a_mark_a_component(request, kind, n_shown):
    circuit = request.getfixturevalue(kind)
    assert circuit.n_components == n_shown
    assert circuit_svg(circuit.table()).count("tls-node") >= n_shown
    figure = circuit.to_plotly()
    marks = [len(t.customdata) for t in figure.data if t.customdata is not None]
    assert sum(marks) == n_shown


def test_a_circuit_named_by_hand_has_no_results(of_heads, model, random_tokens):
    assert math.isnan(of_heads.loss)
    assert math.isnan(of_heads.accuracy)
    assert of_heads.calibration is None
    assert of_heads.tau is None
    assert of_heads.nodes["tau"].isna().all()
    assert len(of_heads.to_dataframe()) == 0
    assert repr(of_heads) == "Circuit('marked', 2 components of 16 nodes, 0 edges)"
    means = activation_means(model, random_tokens)
    every = circuit_of_nodes(model, "marked", torch.ones(means.index.n_nodes) > 0, means)
    assert every.edges.equals(circuit_edges(model, means.index, every.kept))


def test_nodes_are_named_in_any_way(model, random_tokens):
    means = activation_means(model, random_tokens)
    index = means.index
    names = ["0.attn.act_in:3", (1, "mlp_neuron", 2), "0-mlp/7", "L1H2.v"]
    circuit = circuit_of_nodes(model, "marked", names, means)
    values = [f"1.attn.v:{2 * index.d_head + i}" for i in range(index.d_head)]
    assert circuit.nodes["name"].tolist() == [
        "0.attn.act_in:3", "0.mlp.post_act:7", *values, "1.mlp.post_act:2",
    ]  # fmt: skip
    assert torch.equal(circuit.kept, circuit_of_nodes(model, "marked", circuit.kept, means).kept)
    with pytest.raises(ValueError, match="channels 0 to"):
        circuit_of_nodes(model, "marked", "0.attn.act_in:3000", means)


def test_components_are_heads_or_single_nodes(of_heads, of_features, circuit):
    assert of_heads.n_components == 2
    assert of_heads.components["component"].tolist() == [1, 5]
    assert of_heads.components["n_nodes"].tolist() == [8, 8]
    for single in (of_features, circuit):
        assert single.n_components == single.n_nodes
        assert (single.components["n_nodes"] == 1).all()
        assert single.components.index.equals(single.nodes.index)


def test_a_circuit_with_removed_edges_is_loaded_exactly(circuit, model, random_tokens, tmp_path):
    pruned = with_removed_edges(circuit)
    pruned.save(tmp_path / "c")
    loaded = Circuit.load(tmp_path / "c", model)
    assert_same(loaded, pruned)
    assert loaded.n_edges == pruned.n_edges < circuit.n_edges
    with pruned.applied(model):
        expected = model(random_tokens[:3], return_type="logits")
    with loaded.applied(model):
        assert torch.equal(model(random_tokens[:3], return_type="logits"), expected)
    assert f"{pruned.n_edges} edges ({len(pruned.removed_edges)} removed)" in repr(pruned)
    assert pruned.to_networkx().number_of_edges() < circuit.to_networkx().number_of_edges()


def test_hooks_cannot_remove_edges(circuit, model, random_tokens):
    pruned = with_removed_edges(circuit)
    for ask in (pruned.hooks, lambda: pruned.hooks_for(model, random_tokens)):
        with pytest.raises(
            ValueError, match=r"edges of this circuit are removed.*applied\(model\)"
        ):
            ask()


def test_edges_are_not_removed_twice(circuit, model):
    pruned = with_removed_edges(circuit)
    with edges_removed(model, pruned.index, pruned.removed_edges):
        again = edges_removed(model, pruned.index, pruned.removed_edges)
        with pytest.raises(ValueError, match="removed already"), again:
            pass


def test_removed_edges_come_back_after_a_cast_and_in_any_order(circuit, model):
    pruned = with_removed_edges(circuit)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def holds(expected):
        return all(torch.equal(p, expected[name]) for name, p in model.named_parameters())

    masks = WeightMasks.top_k(model, 1 / 4)
    first, second = edges_removed(model, pruned.index, pruned.removed_edges), masks.applied(model)
    first.__enter__()
    assert not holds(before)
    second.__enter__()
    model.to(torch.float64)
    first.__exit__(None, None, None)
    for name, keep in masks.keep.items():
        live = dict(model.named_parameters())[name]
        assert torch.equal(live, torch.where(keep, before[name], 0.0).double())
    assert torch.equal(model.blocks[0].mlp.b_in, before["blocks.0.mlp.b_in"].double())
    second.__exit__(None, None, None)
    assert holds({name: x.double() for name, x in before.items()})


def test_applied_is_the_hooks_where_no_edge_is_removed(circuit, model, random_tokens):
    tokens = random_tokens[:3]
    expected = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=circuit.hooks())
    with circuit.applied(model) as inside:
        model.reset_hooks()
        assert torch.equal(inside(tokens, return_type="logits"), expected)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def change_tensors(folder, **changes):
    path = folder / "circuit.safetensors"
    tensors = load_file(path) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"removed": torch.tensor([[0, 1]])}, "removed_constants is"),
        ({"removed_constants": None}, "belong together"),
        ({"edge_scores": torch.zeros(3)}, "one for each of"),
        ({"edge_scores": torch.zeros(3, dtype=torch.int64)}, "one for each of"),
    ],
)
def test_removed_edges_that_contradict_are_refused(circuit, model, tmp_path, changes, message):
    with_removed_edges(circuit).save(tmp_path / "c")
    change_tensors(tmp_path / "c", **changes)
    with pytest.raises(ValueError, match=message):
        Circuit.load(tmp_path / "c", model)


@pytest.mark.parametrize("end", [-1, 10**9, 0])
def test_removed_edges_that_the_model_does_not_have_are_refused(circuit, model, tmp_path, end):
    with_removed_edges(circuit).save(tmp_path / "c")
    removed = load_file(tmp_path / "c" / "circuit.safetensors")["removed"]
    removed[0] = end
    change_tensors(tmp_path / "c", removed=removed)
    with pytest.raises(ValueError, match="does not have"):
        Circuit.load(tmp_path / "c", model)


@pytest.mark.parametrize(
    ("groups", "message"),
    [(lambda g: g + 1, "from 0 on"), (lambda g: g * 2, "from 0 on"), (lambda g: g // 2, "in part"),
     (lambda g: g.float(), "expected torch.int64"), (lambda g: g[1:], "expected torch.int64")],
)  # fmt: skip
def test_broken_groups_are_refused(of_heads, model, tmp_path, groups, message):
    of_heads.save(tmp_path / "c")
    change_tensors(tmp_path / "c", groups=groups(of_heads.groups))
    with pytest.raises(ValueError, match=message):
        Circuit.load(tmp_path / "c", model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [5, 24]}, "channels, not 5"), ({"widths": [24]}, "widths"),
        ({"widths": [24, True]}, "widths"), ({"widths": [24, 10**12]}, "widths"),
        ({"d_head": 0}, "widths"), ({"sites": ["nowhere", "blocks.1.attn.hook_z"]}, "no hook"),
    ],
)  # fmt: skip
def test_a_broken_index_over_hooks_is_refused(of_heads, model, tmp_path, changes, message):
    of_heads.save(tmp_path / "c")
    index = json.loads((tmp_path / "c" / "circuit.json").read_text())["index"]
    change_record(tmp_path / "c", index=index | changes)
    with pytest.raises(ValueError, match=message):
        Circuit.load(tmp_path / "c", model)
