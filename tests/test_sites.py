import pytest
import torch
from torch import nn

from tl_sparse.sites import (
    BLOCK_SITES,
    MATRICES,
    SITE_NAMES,
    SITES,
    NodeIndex,
    layer_of,
    site,
    site_at,
)


def test_the_eight_sites_of_the_paper_in_order_of_computation():
    assert BLOCK_SITES == (
        "attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out",
    )  # fmt: skip
    assert [n for n in SITE_NAMES if n not in BLOCK_SITES] == ["embed", "attn_z", "final_resid"]
    assert tuple(name for name in SITE_NAMES[1:-1] if name != "attn_z") == BLOCK_SITES


def test_edges_run_through_six_matrices():
    assert set(MATRICES) == {
        ("W_Q", "attn_in", "attn_q"), ("W_K", "attn_in", "attn_k"), ("W_V", "attn_in", "attn_v"),
        ("W_O", "attn_v", "attn_out"), ("W_in", "mlp_in", "mlp_neuron"),
        ("W_out", "mlp_neuron", "mlp_out"),
    }  # fmt: skip


def test_unknown_site_names_the_sites():
    with pytest.raises(ValueError, match=r"unknown site 'attn_y'.*attn_in.*mlp_out"):
        site("attn_y")


def test_hooks_hold_what_the_table_says(small_model, tokens, option):
    model = small_model(option)
    index = NodeIndex.of(model)
    _, cache = model.run_with_cache(tokens)
    assert set(index.slices) <= set(cache.keys())
    for layer in range(2):
        for name in index.sites:
            value = cache[index.hook(layer, name)]
            width = index.widths[index.sites.index(name)]
            assert value.flatten(2).shape[2] == width == model.config.site_width(name)


def test_an_attention_only_model_has_five_sites(small_model):
    model = small_model("attn_only")
    index = NodeIndex.of(model)
    assert index.sites == ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out")
    assert index.sites == tuple(name for name in BLOCK_SITES if model.config.has_site(name))
    assert index.n_nodes == 2 * 5 * 16
    names = [name for name in model.hook_dict if not name.endswith("act_in")]
    plain = PlainModel(model.cfg, [*names, *(f"blocks.{i}.ln1.hook_out" for i in (0, 1))])
    assert NodeIndex.of(plain).sites == index.sites
    with pytest.raises(ValueError, match=r"attention only, so it has no mlp_in, mlp_neuron, mlp"):
        NodeIndex.of(model, BLOCK_SITES)


def test_a_site_belongs_to_one_part_of_the_block():
    rows = [row for row in SITES if row.where == "every"]
    assert {row.name: row.part for row in rows} == {
        name: "attn" if name.startswith("attn") else "mlp" for name in (*BLOCK_SITES, "attn_z")
    }
    assert all(f".{row.part}" in row.hook or f"hook_{row.part}" in row.hook for row in rows)


def test_written_by_and_read_by_name_weights_that_do_so(small_model, tokens):
    """Zeroing a site's weights silences it; zeroing what reads it makes edits there inert."""
    for row in SITES:
        model = small_model("plain", use_bias=False)
        hook = row.hook.format(layer=1)
        parts = {"embed": "embed", "final": "unembed"}

        def weight(model, name, row=row, parts=parts):
            block = model if row.part in parts else model.blocks[1]
            return getattr(getattr(block, parts.get(row.part, row.part)), name)

        for name in row.written_by:
            weight(model, name).data.zero_()
        if row.written_by:
            assert (model.run_with_cache(tokens)[1][hook] == 0).all()
        model = small_model("plain", use_bias=False)
        for name in row.read_by:
            weight(model, name).data.zero_()
        if row.read_by:
            double = (hook, lambda x, hook: x * 2)
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[double]), model(tokens))


def test_nodes_are_numbered_layer_by_layer_without_gaps(small_model):
    index = NodeIndex.of(small_model("wide_heads"))
    widths = [16, 24, 24, 24, 16, 16, 24, 16]
    assert index.n_nodes == 2 * sum(widths)
    covered = [i for piece in index.slices.values() for i in range(piece.start, piece.stop)]
    assert covered == list(range(index.n_nodes))
    frame = index.nodes()
    assert len(frame) == index.n_nodes
    row = frame[(frame.layer == 1) & (frame.site == "attn_k") & (frame.channel == 17)]
    assert row[["head", "head_channel"]].values.tolist() == [[2, 1]]
    assert row.hook.item() == "blocks.1.attn.hook_k"
    assert frame[frame.site == "mlp_neuron"]["head"].isna().all()


def test_flat_is_the_order_of_nodes(small_model):
    index = NodeIndex.of(small_model())
    values = {hook: torch.arange(s.start, s.stop).float() for hook, s in index.slices.items()}
    values["blocks.0.attn.hook_q"] = values["blocks.0.attn.hook_q"].view(4, 4)
    assert torch.equal(index.flat(values), torch.arange(index.n_nodes).float())


def test_a_mask_selects_rows(small_model):
    index = NodeIndex.of(small_model(), sites=("mlp_neuron", "attn_q"))
    assert index.sites == ("attn_q", "mlp_neuron")
    mask = torch.zeros(index.n_nodes, dtype=torch.bool)
    mask[[2, 20, -1]] = True
    frame = index.nodes(mask)
    assert frame[["layer", "site", "channel"]].values.tolist() == [
        [0, "attn_q", 2], [0, "mlp_neuron", 4], [1, "mlp_neuron", 23],
    ]  # fmt: skip
    assert frame.index.tolist() == [2, 20, index.n_nodes - 1]


@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_embedding_stands_in_the_first_layer_and_the_final_stream_in_the_last(
    small_model, tokens, n_layers
):
    model = small_model("concat", n_layers=n_layers)
    index = NodeIndex.of(model, ("final_resid", "mlp_out", "embed"))
    assert index.sites == ("embed", "mlp_out", "final_resid")
    last = n_layers - 1
    hooks = ["hook_embed", *(f"blocks.{i}.hook_mlp_out" for i in range(n_layers))]
    hooks.append(f"blocks.{last}.hook_resid_post")
    assert list(index.slices) == hooks
    assert index.n_nodes == 16 * (n_layers + 2)
    _, cache = model.run_with_cache(tokens)
    assert all(cache[hook].shape[2] == 16 for hook in hooks)
    assert index.hook(0, "embed") == "hook_embed"
    assert index.hook(last, "final_resid") == hooks[-1]
    assert "final_resid" in index.at(last)
    assert ("embed" in index.at(last)) == (n_layers == 1)
    frame = index.nodes()
    assert frame[["layer", "site"]].drop_duplicates().values.tolist() == [
        [0, "embed"], *([i, "mlp_out"] for i in range(n_layers)), [last, "final_resid"],
    ]  # fmt: skip
    assert frame["head"].isna().all()
    assert frame[frame.site == "final_resid"]["channel"].tolist() == list(range(16))
    if n_layers == 3:
        for layer, name in ((1, "embed"), (0, "final_resid"), (2, "embed")):
            message = rf"layer {layer} has no nodes at {name}; its sites are .*mlp_out"
            with pytest.raises(ValueError, match=message):
                index.hook(layer, name)


def test_the_ends_are_nodes_only_where_they_are_asked_for(small_model):
    index = NodeIndex.of(small_model())
    assert index.sites == BLOCK_SITES
    with pytest.raises(ValueError, match="layer 0 has no nodes at embed"):
        index.hook(0, "embed")


def test_unknown_site_in_an_index_is_refused(small_model):
    with pytest.raises(ValueError, match="unknown site 'neurons'"):
        NodeIndex.of(small_model(), sites=("neurons",))


class PlainModel(nn.Module):
    """The hook names of a TransformerLens model that is not ours."""

    def __init__(self, cfg, names):
        super().__init__()
        self.cfg = cfg
        self.hook_dict = dict.fromkeys(names)


def test_other_models_use_what_their_norms_put_out_for_the_reads(small_model):
    model = small_model()
    names = [name for name in model.hook_dict if not name.endswith("act_in")]
    names += [f"blocks.{i}.{norm}.hook_out" for i in (0, 1) for norm in ("ln1", "ln2")]
    index = NodeIndex.of(PlainModel(model.cfg, names))
    assert index.hook(1, "attn_in") == "blocks.1.ln1.hook_out"
    assert index.hook(0, "mlp_in") == "blocks.0.ln2.hook_out"
    assert index.n_nodes == NodeIndex.of(model).n_nodes


def test_missing_hook_is_named(small_model):
    model = small_model()
    names = [n for n in model.hook_dict if not n.endswith(("act_in", "1.mlp.hook_post"))]
    plain = PlainModel(model.cfg, names)
    with pytest.raises(ValueError, match=r"PlainModel has no hook 'blocks.1.mlp.hook_post'"):
        NodeIndex.of(plain)
    assert NodeIndex.of(plain, sites=("attn_q",)).sites == ("attn_q",)


def test_the_channels_of_any_hooks_can_be_nodes(small_model):
    model = small_model()
    index = NodeIndex.over(model, {"blocks.1.mlp.hook_post": 12, "blocks.0.attn.hook_z": 8}, 4)
    assert index.n_nodes == 20
    assert index.slices == {
        "blocks.0.attn.hook_z": slice(0, 8), "blocks.1.mlp.hook_post": slice(8, 20),
    }  # fmt: skip
    frame = index.nodes((torch.arange(20) == 5) | (torch.arange(20) == 9))
    columns = ["layer", "site", "channel", "head", "head_channel", "hook"]
    assert frame[columns].astype(object).where(frame[columns].notna(), None).values.tolist() == [
        [0, "blocks.0.attn.hook_z", 5, 1, 1, "blocks.0.attn.hook_z"],
        [1, "blocks.1.mlp.hook_post", 1, None, None, "blocks.1.mlp.hook_post"],
    ]
    assert index.hook(0, "blocks.0.attn.hook_z") == "blocks.0.attn.hook_z"
    with pytest.raises(ValueError, match=r"unknown site 'blocks\.3\.hook_z'"):
        index.hook(0, "blocks.3.hook_z")
    assert index.matrices == ()
    with pytest.raises(ValueError, match="no hook 'nowhere'"):
        NodeIndex.over(model, {"nowhere": 3})
    with pytest.raises(ValueError, match="no hooks"):
        NodeIndex.over(model, {})


def test_a_row_of_the_table_is_a_site_everywhere(small_model, random_tokens):
    """The attention output before W_O: means, masks, edges, drawing and OpenAI's names follow."""
    from tl_sparse.ablation import ablation_hooks, activation_means
    from tl_sparse.checkpoints.openai_artifacts import locations
    from tl_sparse.circuits.edges import circuit_edges, count_edges
    from tl_sparse.views.layout import circuit_layout
    from tl_sparse.views.style import node_labels, node_names

    model = small_model("wide_heads", zeros=0.5)
    means = activation_means(model, random_tokens, (*BLOCK_SITES, "attn_z"))
    index = means.index
    assert index.sites == (*BLOCK_SITES[:4], "attn_z", *BLOCK_SITES[4:])
    hook = index.hook(1, "attn_z")
    piece = index.slices[hook]
    assert piece.stop - piece.start == model.config.site_width("attn_z") == 24

    _, cache = model.run_with_cache(random_tokens)
    z = cache[hook]
    torch.testing.assert_close(means.values[piece], z.flatten(2).mean((0, 1)))
    keep = torch.ones(index.n_nodes, dtype=torch.bool)
    keep[piece.start + 9] = False  # channel 1 of head 1
    hooks = ablation_hooks(index, keep, means.values)
    out = model.blocks[1].attn
    moved = (means.values[piece.start + 9] - z[..., 1, 1])[..., None] * out.W_O[1, 1]
    seen = {}
    look = ("blocks.1.hook_attn_out", lambda x, hook: seen.update(out=x))
    model.run_with_hooks(random_tokens, fwd_hooks=[*hooks, look])
    torch.testing.assert_close(seen["out"], cache["blocks.1.hook_attn_out"] + moved)

    every = torch.ones(index.n_nodes, dtype=torch.bool)
    edges = circuit_edges(model, index, every)
    of_paper = NodeIndex.of(model)
    assert len(edges) == count_edges(model, index, every)
    assert len(edges) == count_edges(model, of_paper, torch.ones(of_paper.n_nodes, dtype=bool))
    ends = edges[["matrix", "source_site", "target_site"]].drop_duplicates()
    assert set(ends.itertuples(index=False, name=None)) == set(index.matrices)
    assert [source for matrix, source, _ in index.matrices if matrix == "W_O"] == ["attn_z"]
    assert of_paper.matrices == MATRICES

    nodes = index.nodes().assign(tau=0.0, mean=0.0)
    layout = circuit_layout(nodes, edges)
    assert layout.rows["label"].tolist()[1:4] == ["q k v", "z", "attn out"]
    at_z = layout.nodes["site"] == "attn_z"
    boxes = layout.heads.query("layer == 1")
    assert len(boxes) == 6  # each head's queries, keys and values, and its output
    assert node_names(layout.nodes[at_z])[25] == "layer 1 · attended value 1 of head 0"
    assert node_labels(layout.nodes[at_z])[25] == "z1"
    assert locations(index)["1.attn.y"] == hook


def test_a_hook_knows_its_site_and_layer():
    assert site_at("blocks.11.attn.hook_z") is site("attn_z")
    assert site_at("blocks.2.ln2.hook_normalized") is site("mlp_in")
    assert site_at("blocks.2.mlp.hook_act_in") is site("mlp_in")
    assert site_at("blocks.2.mlp.hook_pre") is None
    assert [layer_of(name, 4) for name in ("hook_embed", "blocks.2.hook_x", "ln_final.b")] == [
        0, 2, 3,
    ]  # fmt: skip
