"""Released circuits, on payloads built here from the description of the released ones."""

import dataclasses
import math

import pandas as pd
import pytest
import torch

from tests.checkpoints.openai_payloads import PLACES, drop, make_payload, set_at
from tests.checkpoints.openai_reference_model import BASE, D, V, random_state
from tl_sparse import Circuit, activation_means
from tl_sparse.ablation import ActivationMeans, means_from_openai
from tl_sparse.circuits import circuit_from_openai, page_circuit, read_payload
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import BLOCK_SITES


@pytest.fixture(scope="module")
def state():
    return random_state(BASE)


@pytest.fixture
def payload(state):
    return make_payload(state)


@pytest.fixture
def model(write, state):
    return SparseTransformer.from_openai(write(BASE, state), tokenizer=False)


@pytest.fixture
def means(model):
    tokens = torch.randint(0, V, (8, 10), generator=torch.Generator().manual_seed(1))
    return activation_means(model, tokens, sites=(*BLOCK_SITES, "final_resid"))


@pytest.fixture
def saved(payload, tmp_path):
    folder = tmp_path / "k_optim"
    folder.mkdir()

    def save(change=lambda values: None):
        change(payload)
        torch.save(payload, folder / "viz_data.pt")
        return folder / "viz_data.pt"

    return save


def load(path, model, means):
    return circuit_from_openai(path, model, "quote", means)


def test_every_location_is_the_site_of_the_table(saved, payload, model, means):
    circuit = load(saved(), model, means)
    found = {
        (f"{row.layer}.{PLACES[row.site]}" if row.site in PLACES else row.site, row.channel)
        for row in circuit.nodes.itertuples(index=False)
    }
    assert found == {
        (name, int(channel))
        for name, channels in payload["circuit_data"].items()
        for channel in channels
    }
    assert circuit.n_nodes == len(found)


def test_edges_are_those_of_the_payloads_matrices(saved, payload, model, means):
    circuit = load(saved(), model, means)
    expected = {}
    weights = payload["importances"]["pair_data_connections"]
    for matrix, sources, targets, (source_at, target_at) in weights:
        assert sources[-1] == "bias"
        for i, source in enumerate(sources[:-1]):
            for j, target in enumerate(targets):
                if matrix[i, j] != 0:
                    expected[source_at, source, target_at, target] = float(matrix[i, j])
    found = {}
    for edge in circuit.edges.itertuples(index=False):
        source_at, target_at = (
            f"{edge.layer}.{PLACES[site]}" for site in (edge.source_site, edge.target_site)
        )
        found[source_at, edge.source, target_at, edge.target] = edge.weight
    assert len(found) == circuit.n_edges > 10
    assert found == expected


def test_what_a_payload_does_not_hold_is_unknown(saved, model, means):
    circuit = load(saved(), model, means)
    assert circuit.selection_loss == pytest.approx(0.15)
    assert circuit.model_loss == pytest.approx(0.02)
    unknown = (circuit.loss, circuit.accuracy, circuit.loss_calibrated, circuit.target_loss)
    assert all(math.isnan(value) for value in unknown)
    assert circuit.nodes["tau"].isna().all()
    assert (circuit.n_active, circuit.seed) == (-1, -1)
    assert len(circuit.to_dataframe()) == 0
    assert "quote" in repr(circuit)
    assert "nan" not in page_circuit(circuit).circuit.line.lower()


def test_an_imported_circuit_is_saved_and_loaded(saved, model, means, tmp_path):
    circuit = load(saved(), model, means)
    circuit.save(tmp_path / "circuit")
    loaded = Circuit.load(tmp_path / "circuit", model)
    assert torch.equal(loaded.kept, circuit.kept)
    assert loaded.config == circuit.config == read_payload(saved()).prune_config
    pd.testing.assert_frame_equal(loaded.edges, circuit.edges)


def test_its_hooks_leave_exactly_the_kept_channels(saved, payload, model, means):
    circuit = load(saved(), model, means)
    assert circuit.index.hook(1, "final_resid") == "blocks.1.hook_resid_post"
    tokens = torch.randint(0, V, (3, 9), generator=torch.Generator().manual_seed(2))
    seen = {}

    def record(x, hook):
        seen[hook.name] = x.detach().clone()

    recording = [(name, record) for name in circuit.index.slices]
    model.run_with_hooks(tokens, fwd_hooks=[*circuit.hooks(), *recording])
    at = circuit.nodes
    for name, piece in circuit.index.slices.items():
        values = seen[name].flatten(2)
        removed = [c for c in range(values.shape[-1]) if c not in set(at.channel[at.hook == name])]
        mean = means.values[piece][removed].expand(3, 9, -1)
        assert torch.equal(values[..., removed], mean), name
    kept = payload["circuit_data"]["final_resid"].tolist()
    assert kept == at.channel[at.site == "final_resid"].tolist()


def test_a_payload_without_the_final_stream_has_no_nodes_there(saved, model, means):
    payload = read_payload(saved(lambda values: drop(values, "final_resid")))
    with pytest.raises(ValueError, match=r"where the payload has nodes at .*sites=payload.sites"):
        circuit_from_openai(payload, model, "quote", means)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    fewer = activation_means(model, tokens, sites=payload.sites)
    circuit = circuit_from_openai(payload, model, "quote", fewer)
    assert "final_resid" not in set(circuit.nodes["site"])
    assert circuit.n_nodes > 0


def test_means_and_models_that_are_others(saved, payload, model, means, small_model, write):
    path = saved()
    other = dataclasses.replace(means, model_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="means belong to another model"):
        circuit_from_openai(path, model, "quote", other)
    fewer = activation_means(model, torch.zeros(1, 3, dtype=torch.int64), sites=("attn_in",))
    assert isinstance(fewer, ActivationMeans)
    with pytest.raises(ValueError, match="the means are of attn_in, where the payload has nodes"):
        circuit_from_openai(path, model, "quote", fewer)
    with pytest.raises(ValueError, match=r"of a model with d_mlp|of a model with"):
        circuit_from_openai(path, small_model(n_heads=2), "quote", means)
    drop(payload, "1.mlp.post_act")
    with pytest.raises(ValueError, match=r"locations are not this model's: 1.mlp.post_act"):
        circuit_from_openai(saved(), model, "quote", means)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("circuit_data", "0.attn.q", torch.tensor([1, 999])), "0.attn.q keeps channel 999"),
        (set_at("importances", "beeg_model_config", {"n_layer": 3}), "with n_layer=3, not 2"),
    ],
)
def test_payloads_of_another_model_are_one_clear_error(saved, model, means, change, message):
    path = saved(change)
    with pytest.raises(ValueError, match=message) as caught:
        circuit_from_openai(path, model, "quote", means)
    assert "\n" not in str(caught.value)


def test_a_circuits_loss_with_the_released_means_is_that_of_hooks_by_hand(
    saved, payload, model, tmp_path
):
    """Row 3: a circuit alone, every other channel at the file's means, against plain hooks."""
    released = released_means(model)
    torch.save(released, tmp_path / "mean_baseline_pretrain.pt")
    read = read_payload(saved())
    means = means_from_openai(tmp_path, model, sites=read.sites)
    circuit = circuit_from_openai(read, model, "quote", means)
    assert "mean_baseline_pretrain.pt" in repr(circuit.means)
    tokens = torch.randint(0, V, (4, 9), generator=torch.Generator().manual_seed(2))
    right, wrong = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])

    def loss(hooks):
        last = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
        pair = torch.stack([last[range(4), right], last[range(4), wrong]], 1)
        return torch.nn.functional.cross_entropy(pair, torch.zeros(4, dtype=torch.int64))

    def by_hand(location):
        kept = payload["circuit_data"][location].tolist()

        def hook(x, hook):
            shape = x.shape
            x = x.reshape(*shape[:2], -1).clone()
            for channel in set(range(x.shape[-1])) - set(kept):
                x[:, :, channel] = released[location][channel]
            return x.reshape(shape)

        return hook

    hooks = [(hook_of(location), by_hand(location)) for location in payload["circuit_data"]]
    assert loss(circuit.hooks()).item() == pytest.approx(loss(hooks).item(), abs=1e-6)
    assert loss(hooks).item() != pytest.approx(loss([]).item(), abs=1e-3)


def released_means(model):
    generator = torch.Generator().manual_seed(5)
    widths = {"final_resid": D} | {
        f"{layer}.{place}": D * (4 if place == "mlp.post_act" else 1)
        for layer in range(2)
        for place in PLACES.values()
    }
    return {name: torch.randn(width, generator=generator) for name, width in widths.items()}


def hook_of(location):
    names = {"act_in": "hook_act_in", "post_act": "hook_post"}
    if location == "final_resid":
        return "blocks.1.hook_resid_post"
    layer, part, place = location.split(".")
    if place == "resid_delta":
        return f"blocks.{layer}.hook_{part}_out"
    return f"blocks.{layer}.{part}.{names.get(place, f'hook_{place}')}"


def test_the_means_that_a_circuit_was_given_are_stored_with_it(saved, model, tmp_path):
    torch.save(released_means(model), tmp_path / "mean_baseline_pretrain.pt")
    means = means_from_openai(tmp_path, model)
    circuit_from_openai(saved(), model, "quote", means).save(tmp_path / "circuit")
    loaded = Circuit.load(tmp_path / "circuit", model)
    assert loaded.means.origin == means.origin
    assert torch.equal(loaded.means.values, means.values)
