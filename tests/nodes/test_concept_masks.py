import numpy as np
import pandas as pd
import pytest
import torch

from tests.conformance.models import build, theirs
from tl_sparse.nodes import concept_masks
from tl_sparse.sites import NodeIndex

QUIET = {"progress": False}
A, B, C, OTHER = 3, 4, 5, 20
SIZE = 2.0
"""How large a planted neuron is at its token."""


@pytest.fixture
def planted(small_model):
    """Neuron 0 fires at token A, 1 at B, 2 at C, 3 at A and B; no attention, no norm."""
    model = small_model("no_norm", act_fn="relu", n_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for channel, token in enumerate((A, B, C)):
            model.embed.W_E[token, channel] = 1.0
            model.blocks[0].mlp.W_in[channel, channel] = SIZE
        model.blocks[0].mlp.W_in[:2, 3] = SIZE
    return model


def prompts_of(*tokens, n=20, seed=0):
    """Prompts of several lengths with these tokens among others; the last token is the last."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        others = draw.integers(10, 30, draw.integers(1, 7)).tolist()
        for token in tokens[:-1]:
            others.insert(draw.integers(0, len(others) + 1), token)
        rows.append(torch.tensor([*others, tokens[-1]]))
    return rows


def neurons(masks, concept):
    return masks.mask(concept).nonzero().flatten().tolist()


@pytest.mark.parametrize("eps", [0.0, 0.5, 1.9])
def test_planted_neurons_are_found_at_all_eps_below_their_size(planted, eps):
    masks = concept_masks(planted, {"a": prompts_of(A), "b": prompts_of(B), "c": prompts_of(C)},
                          eps=eps, share=1.0, **QUIET)  # fmt: skip
    assert {name: neurons(masks, name) for name in "abc"} == {"a": [0, 3], "b": [1, 3], "c": [2]}
    assert {name: part.nonzero().tolist() for name, part in masks.parts.items()} == {
        "specific": [[0, 0], [1, 1], [2, 2]], "shared": [[0, 3], [1, 3]], "token": [],
    }  # fmt: skip


def test_and_not_from_their_size_on(planted):
    masks = concept_masks(planted, {"a": prompts_of(A)}, eps=SIZE, **QUIET)
    assert neurons(masks, "a") == []


def test_a_concepts_mask_is_the_intersection_over_its_partners(planted):
    sets = {(x, y): prompts_of(*tokens) for (x, y), tokens in
            {("a", "b"): (A, B), ("a", "c"): (A, C), ("b", "c"): (B, C)}.items()}  # fmt: skip
    masks = concept_masks(planted, sets, position="any", share=1.0, **QUIET)
    assert masks.concepts == ("a", "b", "c")
    # in the set (a, b) neurons 0, 1 and 3 are active; 1 is not in (a, c)
    assert {name: neurons(masks, name) for name in "abc"} == {"a": [0, 3], "b": [1, 3], "c": [2, 3]}
    assert masks.counts[:, :4].tolist() == [[20, 20, 0, 20], [20, 0, 20, 20], [0, 20, 20, 20]]


def test_what_the_token_alone_drives_is_told_apart(planted):
    """The checker prompts have the token and nothing else."""
    with torch.no_grad():  # neuron 4: as 0, and of no other concept
        planted.blocks[0].mlp.W_in[0, 4] = SIZE
    masks = concept_masks(
        planted, {"a": prompts_of(A), "b": prompts_of(B)}, token_only={"a": [torch.tensor([A])]},
        **QUIET,
    )  # fmt: skip
    assert masks.parts["token"].nonzero().tolist() == [[0, 0], [0, 3], [0, 4]]
    assert masks.parts["shared"].nonzero().tolist() == [[1, 3]]
    summary = masks.summary().set_index("concept")
    assert summary.loc["a"].tolist() == [1, 20, 3, 0, 0, 3]
    assert pd.isna(summary.loc["b", "token"])
    table = masks.to_dataframe()
    assert table["part"].tolist() == ["token"] * 3 + ["specific", "shared"]
    assert table["node"].tolist()[:2] == ["0.mlp.post_act:0", "0.mlp.post_act:3"]
    for part in masks.parts.values():
        assert not bool((part & ~masks.masks).any())
    assert torch.equal(sum(part.int() for part in masks.parts.values()), masks.masks.int())


def test_share_counts_prompts_and_can_be_changed_afterwards(planted):
    rows = prompts_of(A, n=7) + prompts_of(OTHER, n=3)
    masks = concept_masks(planted, {"a": rows}, share=0.7, **QUIET)
    assert masks.counts[0, 0] == 7
    assert neurons(masks, "a") == [0, 3]
    assert neurons(masks.with_share(0.71), "a") == []
    assert neurons(masks.with_share(0.1), "a") == [0, 3]
    with pytest.raises(ValueError, match="share=0"):
        masks.with_share(0.0)


@pytest.mark.parametrize("option", ["together", "abstopk", "standard"])
def test_equal_for_any_batch_size_and_padding_on_either_side(
    small_model, make_tokenizer, option, monkeypatch
):
    model = small_model(option, tokenizer=make_tokenizer())
    texts = [" ".join(f"w{t}" for t in row.tolist()) for row in prompts_of(A, n=12)]
    ids = model.tokenizer(texts)["input_ids"]
    index = NodeIndex.of(model, ("mlp_neuron", "attn_v"))
    by_hand = torch.zeros(index.n_nodes).int()
    for row in ids:
        _, cache = model.run_with_cache(torch.tensor([row]))
        last = torch.cat([cache[hook][0, -1].flatten() for hook in index.slices])
        by_hand += (last.abs() > 0.3).int()
    sides = {side: model.to_padded_tokens(texts, False, side) for side in ("left", "right")}
    for batch_size in (1, 5, 64):
        found = concept_masks(
            model,
            {"texts": texts, "rows": [torch.tensor(row) for row in ids], **sides},
            sites=("mlp_neuron", "attn_v"), eps=0.3, prepend_bos=False, batch_size=batch_size,
            **QUIET,
        )  # fmt: skip
        for counts in found.counts:
            assert torch.equal(counts, by_hand)


def test_dense_models_of_transformer_lens():
    ours = build("standard")
    model = theirs(ours)
    sets = {"a": prompts_of(A), "b": prompts_of(B)}
    settings = {"sites": ("attn_in", "mlp_neuron"), "eps": 0.4, "batch_size": 7, **QUIET}
    one, other = (concept_masks(each, sets, **settings) for each in (ours, model))
    assert torch.equal(one.counts, other.counts)


def test_positions_from_either_end(planted):
    rows = [torch.tensor([A, OTHER, B]), torch.tensor([A, C, OTHER, B])]
    for position, expected in ((0, [0, 3]), (-1, [1, 3]), (1, []), (-3, [])):
        masks = concept_masks(planted, {"x": rows}, position=position, share=1.0, **QUIET)
        assert neurons(masks, "x") == expected
    with pytest.raises(ValueError, match="position 3: a prompt has only 3 tokens"):
        concept_masks(planted, {"x": rows}, position=3, **QUIET)


def test_overlaps_and_their_test(planted):
    """Against the formula: sums of products of binomial coefficients."""
    from math import comb

    masks = concept_masks(planted, {"a": prompts_of(A), "b": prompts_of(B), "c": prompts_of(C)},
                          **QUIET)  # fmt: skip
    table = masks.overlap()
    assert table[["a", "b"]].to_numpy().tolist() == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert table["both"].tolist() == [1, 0, 0]
    assert table["jaccard"].tolist() == [1 / 3, 0, 0]
    # four nodes are ever active; two of them are a's, two b's
    at_least_one = sum(comb(2, i) * comb(2, 2 - i) for i in (1, 2)) / comb(4, 2)
    assert table["p"].tolist() == pytest.approx([at_least_one, 1, 1])
    assert table["q"].tolist() == pytest.approx([1, 1, 1])
    assert table["expected"].tolist() == [1, 0.5, 0.5]
    matrix = masks.jaccard()
    assert matrix.loc["a", "b"] == matrix.loc["b", "a"] == 1 / 3
    assert matrix.loc["c", "c"] == 1


def test_an_overlap_with_nothing_is_not_a_number(planted):
    masks = concept_masks(planted, {"a": prompts_of(A), "none": prompts_of(OTHER)}, **QUIET)
    assert masks.jaccard().loc["a", "none"] == 0
    assert np.isnan(masks.jaccard().loc["none", "none"])


def test_writes_are_refused_where_neurons_were_asked_for(planted):
    """The trap: the output of the MLP has d_model channels, which are no neurons."""
    with pytest.raises(ValueError, match=r"16 channels of it.; the neurons are mlp_neuron .24"):
        concept_masks(planted, {"a": prompts_of(A)}, sites=("mlp_out",), **QUIET)
    with pytest.raises(ValueError, match="writes=True"):
        concept_masks(planted, {"a": prompts_of(A)}, sites="mlp.resid_delta", **QUIET)
    meant = concept_masks(planted, {"a": prompts_of(A)}, sites="mlp_out", writes=True, **QUIET)
    assert meant.index.n_nodes == 16
    theirs_too = concept_masks(planted, {"a": prompts_of(A)}, sites="mlp.post_act", **QUIET)
    assert theirs_too.index.sites == ("mlp_neuron",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": {}}, "no concepts"), ({"sites": ("mlp",)}, "unknown site 'mlp'"),
        ({"eps": -1.0}, "eps=-1"), ({"eps": float("nan")}, "eps=nan"), ({"share": 0.0}, "share=0"),
        ({"share": 1.5}, "share=1.5"), ({"position": "first"}, "'last', 'any' or a number"),
        ({"token_only": {"z": [torch.tensor([3])]}}, "token_only of z"),
        ({"batch_size": 0}, "batch_size=0"), ({"prompts": {"a": []}}, "none of them empty"),
        ({"prompts": {"a": [torch.tensor([], dtype=torch.int64)]}}, "none of them empty"),
        ({"prompts": {"a": [torch.tensor([30])]}}, "0 to 29"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(planted, changes, message):
    arguments = {"prompts": {"a": prompts_of(A)}} | changes
    with pytest.raises(ValueError, match=message):
        concept_masks(planted, arguments.pop("prompts"), **arguments, **QUIET)


def test_repr_and_notebook(planted):
    masks = concept_masks(planted, {"<b>": prompts_of(A)}, **QUIET)
    assert "1 concepts in 1 sets" in repr(masks)
    assert "<b><" not in masks._repr_html_()
    assert "&lt;b&gt;" in masks._repr_html_()
    with pytest.raises(ValueError, match="unknown concept 'x'; they are <b>"):
        masks.mask("x")
