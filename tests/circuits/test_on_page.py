"""What a page shows of a circuit, against plain runs of the model."""

import json

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation import activation_means
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import (
    Circuit,
    circuit_of_heads,
    circuit_of_nodes,
    page_circuit,
)
from tl_sparse.sites import SITE
from tl_sparse.tasks.files import task_of_pairs
from tl_sparse.tasks.task import Pair

WORDS = [f"w{i}" for i in range(5, 29)]


@pytest.fixture(scope="module")
def model():
    from tests.conformance.models import make_tokenizer
    from tests.conftest import _small_model

    return _small_model("together", zeros=0.5, tokenizer=make_tokenizer())


@pytest.fixture(scope="module")
def text():
    return torch.randint(3, 30, (2, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def task(model):
    pairs = [Pair((f"{a} {b} w9", f"{b} {a} w9"), (" w3", " w4"))
             for a, b in zip(WORDS[::2], WORDS[1::2], strict=True)]  # fmt: skip
    return task_of_pairs("mine", pairs, model.tokenizer, description="", source="", max_tokens=8)


@pytest.fixture(scope="module")
def circuit(model, text):
    means = activation_means(model, text)
    kept = torch.rand(means.index.n_nodes, generator=torch.Generator().manual_seed(1)) < 0.3
    return circuit_of_nodes(model, "mine", kept, means)


@pytest.fixture(scope="module")
def shown(circuit, model, task, text):
    return page_circuit(circuit, model, task, text, pairs=2, k=2)


def test_examples_have_the_values_of_model_and_circuit(circuit, model, task, shown):
    batch = task.batch(2, split="held_out", seed=0)
    p_model = task_logit_diffs(model, batch).sigmoid()
    p_circuit = task_logit_diffs(model, batch, circuit.hooks()).sigmoid()
    row = circuit.nodes[circuit.nodes["site"] == "mlp_neuron"].iloc[0]
    name = f"{row['layer']}.mlp_neuron.{row['channel']}"
    values = {}

    def keep(x, hook):
        values[len(values)] = x[..., row["channel"]].detach().clone()

    model.run_with_hooks(batch.tokens, fwd_hooks=[(row["hook"], keep)])
    model.run_with_hooks(batch.tokens, fwd_hooks=[*circuit.hooks(), (row["hook"], keep)])
    assert len(shown.examples) == 4
    for i, example in enumerate(shown.examples):
        n = int(batch.last[i]) + 1
        assert len(example.tokens) == n
        assert example.correct_token == ("w3" if i % 2 == 0 else "w4")
        assert example.p_model == pytest.approx(float(p_model[i]))
        assert example.p_circuit == pytest.approx(float(p_circuit[i]))
        assert example.activations[name] == pytest.approx(values[0][i, :n].tolist())
        assert example.circuit_activations[name] == pytest.approx(values[1][i, :n].tolist())


def test_heads_of_kept_channels_have_their_patterns(circuit, model, task, shown):
    batch = task.batch(2, split="held_out", seed=0)
    _, cache = model.run_with_cache(batch.tokens)
    heads = circuit.nodes[circuit.nodes["head"].notna()]
    names = {f"L{layer}H{head}" for layer, head in zip(heads["layer"], heads["head"], strict=True)}
    found = shown.examples[0].attention
    assert set(found) == names
    layer, head = next(iter(names))[1:].split("H")
    n = int(batch.last[0]) + 1
    torch.testing.assert_close(
        torch.tensor(found[f"L{layer}H{head}"]), cache["pattern", int(layer)][0, int(head), :n, :n]
    )


def test_effects_are_the_loss_without_the_node_less_the_loss(circuit, model, task, shown):
    batch = task.batch(16, split="held_out", seed=0)

    def loss(kept):
        one = circuit_of_nodes(model, "mine", kept, circuit.means)
        return float(F.softplus(-task_logit_diffs(model, batch, one.hooks())).mean())

    assert len(shown.effects) == circuit.n_nodes
    for place in range(0, circuit.n_nodes, 17):
        number = circuit.nodes.index[place]
        kept = circuit.kept.clone()
        kept[number] = False
        row = circuit.nodes.loc[number]
        found = shown.effects[f"{row['layer']}.{row['site']}.{row['channel']}"]
        assert found == pytest.approx(loss(kept) - loss(circuit.kept), abs=1e-5)


def test_channels_have_their_rows_of_the_embedding_and_the_unembedding(circuit, model, shown):
    rows = shown.tokens
    residual = [
        (f"{r.layer}.{r.site}.{r.channel}", r.channel, SITE[r.site])
        for r in circuit.nodes.itertuples()
        if SITE[r.site].kind == "residual" and r.channel < model.config.d_model
    ]
    name, channel, _ = next(x for x in residual if x[2].reads)
    mine = rows[rows["node"] == name]
    column = model.W_E[:, channel].detach()
    assert mine["side"].unique().tolist() == ["embedding"]
    assert mine["weight"].max() == pytest.approx(float(column.max()))
    assert mine["weight"].min() == pytest.approx(float(column.min()))
    best = mine.loc[mine["weight"].idxmax(), "text"]
    assert best == model.tokenizer.decode([int(column.argmax())])
    name, channel, _ = next(x for x in residual if x[2].writes)
    mine = rows[rows["node"] == name]
    assert mine["side"].unique().tolist() == ["logits"]
    scaled = (model.W_U[channel] * model.ln_final.w[channel]).detach()
    assert mine["weight"].max() == pytest.approx(float(scaled.max()))


def test_texts_have_a_nodes_largest_value(circuit, model, text, shown):
    _, cache = model.run_with_cache(text)
    row = circuit.nodes[circuit.nodes["site"] == "mlp_neuron"].iloc[0]
    lists = shown.texts[f"{row['layer']}.mlp_neuron.{row['channel']}"]
    assert set(lists) == {"top", "bottom"}
    first = lists["top"][0]
    largest = cache[row["hook"]][..., row["channel"]].max()
    assert first.values[first.own] == pytest.approx(float(largest))


def test_a_circuit_of_heads_shows_where_they_look_and_what_removing_each_does(model, task, text):
    heads = circuit_of_heads(model, "mine", [(0, 0), (1, 1)], text)
    shown = page_circuit(heads, model, task)
    assert set(shown.examples[0].attention) == {"L0H0", "L1H1"}
    batch = task.batch(16, split="held_out", seed=0)

    def loss(chosen):
        one = circuit_of_heads(model, "mine", chosen, text)
        return float(F.softplus(-task_logit_diffs(model, batch, one.hooks())).mean())

    rises = list(shown.effects.values())
    assert rises == pytest.approx(
        [loss([(1, 1)]) - loss([(0, 0), (1, 1)]), loss([(0, 0)]) - loss([(0, 0), (1, 1)])],
        abs=1e-5,
    )


def test_without_a_model_there_is_a_page_and_no_examples(circuit, task, tmp_path):
    page = circuit.write_page(tmp_path / "x.html").read_text(encoding="utf-8")
    assert "Circuit of mine" in page
    assert page_circuit(circuit).examples == ()
    with pytest.raises(ValueError, match="give model="):
        circuit.write_page(tmp_path / "y.html", task=task)
    assert not (tmp_path / "y.html").exists()


def test_a_page_of_another_model_is_refused(circuit, small_model, tmp_path):
    with pytest.raises(ValueError, match="belongs to another model"):
        circuit.write_page(tmp_path / "x.html", small_model("together", zeros=0.2))


def test_notes_go_by_any_name_and_are_saved_with_the_circuit(circuit, model, tmp_path):
    row = circuit.nodes[circuit.nodes["head"].notna()].iloc[0]
    letter = SITE[row["site"]].short
    by_head = f"L{row['layer']}H{row['head']}.{letter}{row['head_channel']}"
    noted = circuit.with_notes({by_head: "a <b>", circuit.nodes["name"].iloc[0]: ""})
    assert noted.notes == {row["name"]: "a <b>"}
    noted.save(tmp_path / "c")
    assert Circuit.load(tmp_path / "c", model).notes == noted.notes
    (tmp_path / "notes.json").write_text(json.dumps({row["name"]: "new"}))
    assert noted.with_notes(tmp_path / "notes.json").notes == {row["name"]: "new"}
    assert page_circuit(noted).notes == noted.notes


def test_notes_of_nodes_that_are_not_kept_are_refused(circuit, tmp_path):
    removed = circuit.index.nodes(~circuit.kept).iloc[0]
    name = f"{removed['layer']}.{removed['site']}.{removed['channel']}"
    with pytest.raises(ValueError, match="is no node of this circuit; one of it is"):
        circuit.with_notes({name: "x"})
    (tmp_path / "bad.json").write_text(json.dumps({circuit.nodes["name"].iloc[0]: 3}))
    with pytest.raises(ValueError, match="a text for each node"):
        circuit.with_notes(tmp_path / "bad.json")
