"""The released means, in files built here: a dict from location to vector."""

import pytest
import torch

from tl_sparse import activation_means
from tl_sparse.ablation import means_from_openai
from tl_sparse.sites import BLOCK_SITES, NodeIndex

PLACES = {"attn_in": "attn.act_in", "attn_q": "attn.q", "attn_k": "attn.k", "attn_v": "attn.v",
          "attn_z": "attn.y", "attn_out": "attn.resid_delta", "mlp_in": "mlp.act_in",
          "mlp_neuron": "mlp.post_act", "mlp_out": "mlp.resid_delta"}  # fmt: skip
ALL = (*PLACES, "final_resid")


@pytest.fixture
def model(small_model):
    return small_model("together")  # positions in act_in, heads, a sink


@pytest.fixture
def released(model):
    """Vectors of every location, by a plain loop over the index of all sites."""
    index = NodeIndex.of(model, ALL)
    generator = torch.Generator().manual_seed(0)
    values = {}
    for layer in range(index.n_layers):
        for site in index.at(layer):
            name = "final_resid" if site == "final_resid" else f"{layer}.{PLACES[site]}"
            width = index.widths[index.sites.index(site)]
            values[name] = torch.randn(width, generator=generator)
    return values


@pytest.fixture
def save(tmp_path):
    def write(values):
        torch.save(values, tmp_path / "mean_baseline_pretrain.pt")
        return tmp_path

    return write


def test_vectors_by_location_become_means(model, released, save):
    """Row 3."""
    means = means_from_openai(save(released), model)
    assert means.index.sites == (*BLOCK_SITES, "final_resid")
    for layer in range(2):
        for site in means.index.at(layer):
            name = "final_resid" if site == "final_resid" else f"{layer}.{PLACES[site]}"
            found = means.values[means.index.slices[means.index.hook(layer, site)]]
            assert torch.equal(found, released[name])
    means.check_model(model)
    everywhere = means_from_openai(save(released), model, sites=ALL)
    assert everywhere.index.sites == ALL
    assert len(everywhere.values) == sum(map(len, released.values()))


def test_they_say_where_they_are_from(model, released, save):
    folder = save(released)
    means = means_from_openai(folder / "mean_baseline_pretrain.pt", model)
    assert "OpenAI's mean_baseline_pretrain.pt over the pretraining distribution" in repr(means)
    own = activation_means(model, torch.zeros(2, 3, dtype=torch.int64))
    assert own.origin == ""
    assert "over 6 tokens" in repr(own)


def test_shapes_and_types_that_mean_the_same(model, released, save):
    other = {name: x.double()[None, None] for name, x in released.items()}
    other["0.attn.q"] = released["0.attn.q"].bfloat16()
    means = means_from_openai(save(other), model)
    assert means.values.dtype == torch.float32
    at = means.index.slices["blocks.0.attn.hook_q"]
    assert torch.equal(means.values[at], released["0.attn.q"].bfloat16().float())


def test_a_model_without_the_final_streams_means(model, released, save):
    del released["final_resid"]
    assert means_from_openai(save(released), model).index.sites == BLOCK_SITES
    with pytest.raises(ValueError, match="it has no means at final_resid"):
        means_from_openai(save(released), model, sites=ALL)
    with pytest.raises(ValueError, match="no means of embed; choose from attn_in"):
        means_from_openai(save(released), model, sites=("embed", "attn_in"))


def test_locations_that_do_not_fit_are_named(model, released, save):
    missing = {k: x for k, x in released.items() if k not in ("1.attn.v", "0.mlp.act_in")}
    with pytest.raises(ValueError, match=r"no means at 0\.mlp\.act_in, 1\.attn\.v"):
        means_from_openai(save(missing), model)
    surplus = released | {"0.resid_in": torch.zeros(3), "7.attn.q": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"0.resid_in, 7.attn.q are no sites .* layers are 0 to 1"):
        means_from_openai(save(surplus), model)
    means = means_from_openai(save(surplus), model, strict=False)
    assert torch.equal(means.values, means_from_openai(save(released), model).values)
    wide = released | {"1.mlp.post_act": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"other widths: 1.mlp.post_act \(5, not \d+\)"):
        means_from_openai(save(wide), model)
    nan = released | {"1.attn.k": released["1.attn.k"] / 0}
    with pytest.raises(ValueError, match=r"NaN or infinite at 1\.attn\.k"):
        means_from_openai(save(nan), model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "must hold a dict of means by location"),
        ({3: torch.zeros(1)}, "must hold a dict of means by location"),
        ({"0.attn.q": [1.0]}, "0.attn.q must be a tensor, not a list"),
        ({"0.attn.q": torch.zeros(2, 3)}, "0.attn.q must be one mean a channel"),
        ({"0.attn.q": torch.zeros(24).long()}, "0.attn.q must be one mean a channel"),
        ({"0.attn.q": torch.zeros(1).expand(24)}, "0.attn.q repeats its storage"),
        ({"0.attn.q": torch.tensor(1.0)}, "0.attn.q must be one mean a channel"),
    ],
)
def test_broken_files(model, released, save, values, message):
    folder = save(released | values if isinstance(values, dict) else values)
    with pytest.raises(ValueError, match=message):
        means_from_openai(folder, model)


def test_a_file_that_is_not_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mean_baseline_pretrain\.pt is missing"):
        means_from_openai(tmp_path, model)


def test_means_are_found_by_the_models_name(container, model, released):
    base, root, _ = container
    (root / "viz" / "csp_yolo1").mkdir(parents=True)
    torch.save(released, root / "viz" / "csp_yolo1" / "mean_baseline_pretrain.pt")
    means = means_from_openai("csp_yolo1", model, progress=False, base_url=base)
    assert means.index.sites == (*BLOCK_SITES, "final_resid")
