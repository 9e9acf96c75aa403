"""Released circuits' files as they are read, without a model."""

import math

import pandas as pd
import pytest
import torch

from tests.checkpoints.openai_payloads import PAIRS, make_payload, set_at, write_tinypython
from tests.checkpoints.openai_reference_model import BASE, D, random_state
from tl_sparse.checkpoints.openai_payload import CircuitPayload, parse_payload, read_payload
from tl_sparse.checkpoints.openai_tokenizer import tokenizer_from_openai


@pytest.fixture(scope="module")
def state():
    return random_state(BASE)


@pytest.fixture
def payload(state):
    return make_payload(state)


@pytest.fixture
def saved(payload, tmp_path):
    folder = tmp_path / "k_optim"
    folder.mkdir()

    def save(change=lambda values: None):
        change(payload)
        torch.save(payload, folder / "viz_data.pt")
        return folder / "viz_data.pt"

    return save


def test_losses_are_halved_once(saved):
    path = saved()
    for place in (path, str(path), path.parent):
        read = read_payload(place)
        assert read.circuit_loss == pytest.approx(0.15)
        assert read.model_loss == pytest.approx(0.02)
        assert read.node_losses["1.attn.v"].tolist() == [0.125, 0.25, 0.375]
        assert read.search_losses == ((0, 0.5), (1, 0.25))


def test_what_a_payload_says(saved, payload):
    read = read_payload(saved())
    assert all(torch.equal(read.kept[n], c) for n, c in payload["circuit_data"].items())
    assert read.n_nodes == sum(len(c) for c in payload["circuit_data"].values())
    assert read.n_total_nodes == 2 * 11 * D + D
    assert read.prune_config == {"k_coef": 1e-4, "lr": [1, 2], "dtype": "dtype", "on": True}
    assert torch.equal(read.task_tokens, payload["importances"]["task_samples"][0])
    assert read.sites[-1] == "final_resid"


def test_a_missing_payload(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"viz_data.pt is missing"):
        read_payload(tmp_path / "viz_data.pt")
    with pytest.raises(FileNotFoundError, match=r"viz_data.pt is missing"):
        read_payload(tmp_path)


def planted_edges(payload):
    """(source, target) → [importance, weight], entry by entry; an entry that is 0 is no edge."""
    found = {}
    for place, key in enumerate(("pair_data", "pair_data_connections")):
        for matrix, sources, targets, (source_at, target_at) in payload["importances"][key]:
            for i, source in enumerate(sources):
                for j, target in enumerate(targets):
                    name = "bias" if source == "bias" else f"{source_at}:{source}"
                    edge = found.setdefault((source_at, name, f"{target_at}:{target}"), [0.0, 0.0])
                    edge[place] = float(matrix[i, j])
    return {edge: values for edge, values in found.items() if values != [0.0, 0.0]}


def as_dict(edges):
    return {
        (row.source_location, row.source, row.target): [row.importance, row.weight]
        for row in edges.itertuples(index=False)
    }


def test_edges_have_importance_and_weight_and_biases_are_rows(saved, payload):
    """Row 5."""
    read = read_payload(saved())
    planted = planted_edges(payload)
    assert as_dict(read.edges) == planted
    assert len(read.edges) == len(planted) > 20
    biases = read.edges[read.edges["source"] == "bias"]
    assert len(biases) > 5
    assert biases["source_channel"].isna().all()
    assert biases["target_channel"].notna().all()
    assert set(biases["target_location"].str.slice(2)) == {target for _, target in PAIRS}
    assert read.n_edges == sum(
        name != "bias" and w != 0 for (_, name, _), (_, w) in planted.items()
    )


def test_lists_nested_by_process_are_read_alike(saved, payload):
    flat = read_payload(saved()).edges

    def nest(values):
        for key in ("pair_data", "pair_data_connections"):
            entries = values["importances"][key]
            values["importances"][key] = [entries[:5], [], entries[5:]]

    pd.testing.assert_frame_equal(read_payload(saved(nest)).edges, flat)


def test_an_edge_in_one_list_alone_is_unknown_in_the_other(saved, payload):
    def half(values):
        values["importances"]["pair_data"] = []

    read = read_payload(saved(half))
    assert read.edges["importance"].isna().all()
    assert read.edges["weight"].notna().all()
    assert read.n_edges > 0


def test_samples_by_quantile_and_end(saved, payload):
    """Row 5."""
    read = read_payload(saved()).samples
    planted = payload["samples"]["1.mlp.post_act"][7]
    assert read[["node", "quantile", "end", "rank", "position"]].values.tolist() == [
        ["1.mlp.post_act:7", 0.001, "bottom", 0, 2],
        ["1.mlp.post_act:7", 0.001, "top", 0, 5],
        ["1.mlp.post_act:7", 0.001, "top", 1, 0],
        ["1.mlp.post_act:7", 0.5, "top", 0, 1],
    ]
    items = [planted[0.001][0][0], *planted[0.001][1], planted[0.5][1][0]]
    for row, (tokens, activations, place) in zip(read.itertuples(), items, strict=True):
        assert row.tokens.tolist() == tokens.tolist()
        assert torch.equal(row.activations, activations)
        assert row.activation == float(activations[place])


def test_activations_of_the_tasks_prompts(saved, payload):
    read = read_payload(saved())
    kept = payload["circuit_data"]
    assert set(read.activations) == {
        f"{name}:{channel}" for name in ("0.attn.v", "final_resid") for channel in kept[name]
    }
    for name, values in read.activations.items():
        assert values.shape == (4, 5)
        assert (values == float(name.rpartition(":")[2])).all()


def test_padding_is_cut_and_a_zero_within_a_prompt_is_kept(saved):
    """Row 5."""
    read = read_payload(saved())
    assert [row.tolist() for row in read.prompts] == [
        [3, 0, 5], [3, 1, 5, 6], [4, 0, 5], [4, 1, 5, 6, 7],
    ]  # fmt: skip
    assert read.lengths.tolist() == [3, 4, 3, 5]
    assert read_payload(saved(set_at("importances", "task_samples", None))).prompts == ()
    empty = {"task_samples": (torch.zeros(2, 0).long(), {})}
    assert parse_payload({"circuit_data": {}, "importances": empty}).lengths.tolist() == [0, 0]


def test_prompts_are_decoded_on_demand(saved, tmp_path):
    tokenizer = tokenizer_from_openai(write_tinypython(tmp_path / "t"), 300)
    row = [*tokenizer("a!b")["input_ids"], 280, 0]  # no token has id 280
    payload = read_payload(saved(set_at("importances", "task_samples", (torch.tensor([row]),))))
    assert 0 in payload.prompts[0].tolist()  # "!" is token 0
    assert payload.texts(tokenizer) == ("a!b",)


def test_losses_of_layers_and_locations(saved, payload):
    read = read_payload(saved())
    # where the circuit has no nodes, the number is the circuit's loss: 0.3 for a pair, so halved
    assert read.location_losses == pytest.approx({"0.attn.q": 0.2, "1.attn.q": 0.15})
    assert read.layer_losses == pytest.approx({"0.attn": 0.35, "1.mlp": 0.25})

    def once(values):
        values["importances"]["loc_interv_losses"] = {"0.attn.q": 0.4, "1.attn.q": 0.15}

    assert read_payload(saved(once)).location_losses == {"0.attn.q": 0.4, "1.attn.q": 0.15}


def test_the_table_of_nodes(saved, payload):
    table = read_payload(saved()).to_dataframe().set_index("node")
    row = table.loc[f"1.attn.v:{payload['circuit_data']['1.attn.v'][1]}"]
    assert (row.loss, row.loss_increase) == pytest.approx((0.25, 0.25 - 0.15))
    assert len(table) == read_payload(saved()).n_nodes
    assert parse_payload({"circuit_data": {}}).to_dataframe().empty


def in_release(tmp_path, payload, sweep="prune_v2", k="64"):
    folder = tmp_path / "viz" / "csp_yolo1" / "single_double_quote" / sweep / k
    folder.mkdir(parents=True)
    torch.save(payload, folder / "viz_data.pt")
    return folder


def test_the_repr_says_units_sweep_and_k(tmp_path, payload):
    """Row 26."""
    folder = in_release(tmp_path, payload)
    for place in (folder, str(folder), folder / "viz_data.pt", f"{folder}/"):
        read = read_payload(place)
        assert (read.model_name, read.task) == ("csp_yolo1", "single_double_quote")
        text = repr(read)
        assert "csp_yolo1/single_double_quote: sweep prune_v2 (aims at k nodes" in text
        for words in ("k 64", "nats per prompt", "loss 0.15", "full model 0.02", "4 prompts"):
            assert words in text, words
        assert "\n" not in text
        assert "below the full model" not in text
    later = read_payload(in_release(tmp_path, payload, "prune_v4", "k_optim"))
    assert "sweep prune_v4, k k_optim" in repr(later)


def test_a_loss_below_the_full_models_is_explained(tmp_path, payload):
    """Row 26."""
    payload["importances"] |= {"interv_loss": 6e-9, "loss": 2.8e-3}
    fixed = read_payload(in_release(tmp_path, payload))
    assert "below the full model's: prune_v2 keeps k nodes" in repr(fixed)
    assert fixed.note in fixed._repr_html_()
    other = read_payload(in_release(tmp_path, payload, "prune_v4"))
    assert "below the full model's: pruning lowers this very loss" in repr(other)


def test_the_address_says_them_too(container, payload):
    base, root, _ = container
    place = "viz/csp_yolo1/single_double_quote/prune_v2/64"
    (root / place).mkdir(parents=True)
    torch.save(payload, root / place / "viz_data.pt")
    for where in (place, f"{place}/viz_data.pt", f"{base}/{place}", f"{base}/{place}/viz_data.pt"):
        read = read_payload(where, progress=False, base_url=base)
        assert (read.model_name, read.sweep, read.k) == ("csp_yolo1", "prune_v2", "64")


def test_folders_that_are_called_otherwise_say_nothing(saved):
    read = read_payload(saved())
    assert (read.model_name, read.task, read.sweep, read.k) == ("", "", "", "")
    assert "sweep unknown, k unknown" in repr(read)


def test_a_payload_of_little_is_shown(tmp_path):
    read = parse_payload({"circuit_data": {}})
    assert isinstance(read, CircuitPayload)
    assert "0 nodes" in repr(read)
    assert "nan" not in repr(read)
    assert "<table" in read._repr_html_()
    assert read.edges.empty
    assert read.samples.empty
    assert math.isnan(read.circuit_loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("circuit_data", None), "circuit_data must be a dict, not a NoneType"),
        (set_at("circuit_data", {3: torch.zeros(1)}), "circuit_data must be a dict"),
        (
            set_at("circuit_data", "0.attn.q", torch.tensor([1, 1])),
            "0.attn.q keeps a channel twice",
        ),
        (set_at("circuit_data", "0.attn.q", torch.tensor([1, -1])), "one below 0"),
        (set_at("circuit_data", "0.attn.q", torch.tensor([1.0, 2.0])), "list of channels"),
        (set_at("circuit_data", "0.attn.q", torch.zeros(2, 1).long()), "list of channels"),
        (set_at("circuit_data", "0.attn.q", torch.zeros(1).long().expand(10**9)), "repeats"),
        (set_at("circuit_data", "0.attn.q", [1, 2]), "0.attn.q must be a tensor, not a list"),
        (set_at("importances", "ch_interv_losses", "0.attn.q", [1.0]), "do not fit its nodes"),
        (set_at("importances", "ch_interv_losses", "0.attn.q", 1.0), "do not fit its nodes"),
        (set_at("importances", "ch_interv_losses", "0.attn.q", ["a", "b"]), "must be a number"),
        (set_at("importances", "loss", "low"), "loss must be a number, not 'low'"),
        (set_at("importances", "loss", torch.zeros(3)), "loss must be a number"),
        (set_at("importances", "loss", 10**400), "loss must be a number"),
        (set_at("importances", "task_samples", (torch.zeros(3),)), r"must be tokens \[prompt, pos"),
        (
            set_at("importances", "task_samples", (torch.rand(2, 3),)),
            r"must be tokens \[prompt, pos\], not torch.float32",
        ),
        (set_at("importances", []), "importances must be a dict, not a list"),
        (set_at("all_loss", [1.0]), "all_loss must hold pairs"),
        (set_at("all_loss", [(math.nan, 1.0)]), "cannot convert float NaN"),
        (set_at("num_total_nodes", "many"), "num_total_nodes must be a number"),
        (set_at("prune_config", [3]), "prune_config must be a dict"),
        (set_at("prune_config", {"a": [[[[[[[[[[1]]]]]]]]]]}), "nested more than 8 deep"),
    ],
)
def test_broken_payloads_are_one_clear_error(saved, change, message):
    path = saved(change)
    with pytest.raises(ValueError, match=message) as caught:
        read_payload(path)
    assert "\n" not in str(caught.value)


def entry(values):
    return values["importances"]["pair_data_connections"][0]


def shrink(values):
    entry(values)[2] = entry(values)[2][:-1]


def other_shape(values):
    values["importances"]["task_samples"][1]["0.attn.v"] = {1: torch.ones(2)}


def repeat(values):
    values["importances"]["pair_data"].append(values["importances"]["pair_data"][0])


def stretch(*item):
    return set_at("samples", {"0.attn.q": {3: {0.5: ([item], [])}}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("importances", "pair_data", 3), "pair_data must be a list"),
        (set_at("importances", "pair_data", [[torch.zeros(1)]]), "must be .matrix, sources"),
        (lambda values: entry(values).__setitem__(3, "0.attn.q"), "must name two locations"),
        (lambda values: entry(values).__setitem__(1, ["x"]), "must be a number, not 'x'"),
        (lambda values: entry(values).__setitem__(0, torch.zeros(2, 2, 2)), r"must be numbers \["),
        (lambda values: entry(values).__setitem__(0, [[0.0]]), "must be .matrix, sources"),
        (shrink, r"must be numbers \["),
        (repeat, "pair_data has the edge .* twice"),
        (set_at("samples", [1]), "samples must be a dict"),
        (set_at("samples", {"0.attn.q": [1]}), "must be a dict by channel"),
        (set_at("samples", {"0.attn.q": {"a": {}}}), "must be a number, not 'a'"),
        (set_at("samples", {"0.attn.q": {1: {}, torch.tensor(1): {}}}), "has a channel twice"),
        (set_at("samples", {"0.attn.q": {3: {0.5: ([],)}}}), "a bottom and a top list"),
        (stretch(torch.zeros(3)), "must be tokens, activations and a position"),
        (stretch(torch.zeros(3), torch.zeros(2), 0), "3 tokens, 2 activations, position 0"),
        (stretch(torch.zeros(3), torch.zeros(3), 3), "position 3"),
        (stretch(torch.tensor([0.5]), torch.zeros(1), 0), "token ids, which are integers"),
        (stretch(torch.tensor([-1]), torch.zeros(1), 0), "a token below 0"),
        (
            set_at("importances", "task_samples", (torch.zeros(2, 3).long(), torch.zeros(2, 3))),
            "must be tokens and a dict of activations, not Tensor, Tensor",
        ),
        (other_shape, r"activations \(4, 5\), not torch.float32 \(2,\)"),
        (set_at("importances", "layer_interv_losses", {"0.a": [1]}), "0.a.* must be a number"),
    ],
)  # fmt: skip
def test_broken_tables_are_one_clear_error(saved, change, message):
    path = saved(change)
    with pytest.raises(ValueError, match=message) as caught:
        read_payload(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_one_matrix_named_again_and_again_is_refused_at_once(tmp_path):
    matrix, channels = torch.ones(1000, 1000), list(range(1000))
    entries = [[matrix, channels, channels, (f"{i}.a", f"{i}.b")] for i in range(500)]
    values = {"circuit_data": {}, "importances": {"pair_data": entries}}
    torch.save(values, tmp_path / "viz_data.pt")
    with pytest.raises(ValueError, match="entries, with shared ones written out"):
        read_payload(tmp_path)
