import json

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conformance.models import build, theirs
from tl_sparse.node import Node
from tl_sparse.nodes import TopExamples, top_examples
from tl_sparse.nodes.example_state import Settings, State, drawn_positions
from tl_sparse.nodes.leaders import Histograms, Leaders
from tl_sparse.sites import NodeIndex

QUIET = {"progress": False}
SITES = ("attn_in", "attn_q", "mlp_neuron", "mlp_out")


@pytest.fixture
def many():
    """Ids [10, 9]; some sequences are there twice, so that values are, too."""
    ids = torch.randint(3, 30, (8, 9), generator=torch.Generator().manual_seed(6))
    return ids[[0, 1, 2, 2, 3, 4, 5, 6, 7, 0]]


def activations(model, tokens, batch, sites=SITES):
    """Values of every node [position, node], hook by hook, from caches of the same batches."""
    index = NodeIndex.of(model, sites)
    parts = []
    for rows in tokens.split(batch):
        _, cache = model.run_with_cache(rows)
        flat = [index.read(hook, cache[hook]).flatten(2).flatten(0, 1) for hook in index.slices]
        parts.append(torch.cat(flat, 1).detach())
    return index, torch.cat(parts).numpy()


def stable_top(values, k, largest=True):
    """Places of the k largest of each column, of equal ones the first."""
    return np.argsort(-values if largest else values, axis=0, kind="stable")[:k].T


@pytest.mark.parametrize("batch_size", [3, 10])
def test_equal_to_a_full_stable_sort(small_model, many, batch_size):
    model = small_model("together", zeros=0.3)  # AbsTopK: most values are zero, so ties abound
    index, values = activations(model, many, batch_size)
    found = top_examples(model, many, SITES, k=7, batch_size=batch_size, **QUIET)
    order = np.concatenate([[*range(*index.slices[hook].indices(index.n_nodes))]
                            for site in SITES for layer in range(2)
                            for hook in [index.hook(layer, site)]])  # fmt: skip
    values = values[:, order]
    assert list(found.nodes["hook"]) == [index.nodes()["hook"][i] for i in order]
    for part, largest in zip(found.examples[:2], (True, False), strict=True):
        places = stable_top(values, 7, largest)
        assert np.array_equal(part.sequences.numpy(), places // 9)
        assert np.array_equal(part.positions.numpy(), places % 9)
        assert np.array_equal(part.values.numpy(), np.take_along_axis(values.T, places, 1))
    np.testing.assert_allclose(found.means, values.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.active, (values != 0).mean(0), atol=1e-6)


def test_contexts_are_the_tokens_and_values_around(small_model, many):
    model = small_model("abstopk")
    _, values = activations(model, many, 10, ("mlp_neuron",))
    values = values.reshape(10, 9, -1)
    found = top_examples(model, many, "mlp_neuron", k=3, window=(2, 1), batch_size=10, **QUIET)
    for part in found.examples:
        for node in range(0, 48, 7):
            for j in range(part.values.shape[1]):
                row, at = int(part.sequences[node, j]), int(part.positions[node, j])
                for w, column in enumerate(range(at - 2, at + 2)):
                    token, value = part.tokens[node, j, w], part.context[node, j, w]
                    if 0 <= column < 9:
                        assert token == many[row, column]
                        assert value == values[row, column, node]
                    else:
                        assert token == -1
                        assert value.isnan()
    frame = found.of("0.mlp.post_act:5").to_dataframe()
    first = frame.iloc[0]
    assert (first["node"], first["side"], first["rank"]) == ("0.mlp.post_act:5", "top", 0)
    assert first["value"] == values[:, :, 5].max()


@pytest.mark.parametrize("batch_size", [3, 10])
def test_quantile_samples_are_the_largest_of_the_positions_drawn(small_model, many, batch_size):
    model = small_model("together")
    _, values = activations(model, many, batch_size, ("mlp_neuron",))
    settings = {"quantiles": (0.5, 0.1), "samples": 4, "seed": 3}
    found = top_examples(model, many, "mlp_neuron", batch_size=batch_size, **settings, **QUIET)
    assert [part.name for part in found.examples[2:]] == [
        "top 10 %", "bottom 10 %", "top 50 %", "bottom 50 %",
    ]  # fmt: skip
    for i, drawn in enumerate((40, 8)):
        positions = drawn_positions(90, drawn, (3, i + 1))
        assert len(set(positions.tolist())) == drawn
        for part, largest in zip(found.examples[2 + 2 * i : 4 + 2 * i], (True, False), strict=True):
            places = positions[stable_top(values[positions], 4, largest)]
            assert np.array_equal(part.sequences * 9 + part.positions, places)


def test_samples_spread_over_about_their_quantile(small_model):
    """The least of 4 among 40 of 2400 positions is, on average, at the quantile 4 / 41."""
    model = small_model()
    tokens = torch.randint(3, 30, (200, 12), generator=torch.Generator().manual_seed(1))
    _, values = activations(model, tokens, 100, ("mlp_neuron",))
    shares = []
    for seed in range(5):
        found = top_examples(
            model, tokens, "mlp_neuron", k=1, quantiles=(0.1,), window=(0, 0), batch_size=100,
            seed=seed, **QUIET,
        )  # fmt: skip
        least = found.examples[2].values[:, -1].numpy()
        shares.append((values >= least).mean(0))
    assert abs(np.mean(shares) - 4 / 41) < 0.02


def test_few_positions_are_all_drawn(small_model, many):
    found = top_examples(
        small_model(), many[:1, :4], "0.mlp.post_act:3", k=9, quantiles=(0.1, 1.0), **QUIET
    )
    extremes, small, whole = found.examples[0], found.examples[2], found.examples[4]
    assert (extremes.sequences[0] >= 0).sum() == 4
    assert extremes.values[0, 4:].isnan().all()
    assert small.values.shape == (1, 1)
    assert torch.equal(whole.values, extremes.values[:, :4])
    assert len(found.to_dataframe()) == 2 * (4 + 1 + 4)


def test_histogram_is_that_of_all_values_in_the_final_bins(small_model, many):
    model = small_model("layer_norm")
    _, values = activations(model, many, 2, SITES)
    found = top_examples(model, many, [f"{i}.{site}" for i in (0, 1) for site in SITES], bins=16,
                         batch_size=2, **QUIET)  # fmt: skip
    for i in range(0, len(found), 5):
        frame = found.histogram(found.nodes["name"][i])
        column = values[:, i]
        edges = np.append(frame["from"], frame["to"].iloc[-1])
        assert np.array_equal(frame["positions"], np.histogram(column, edges)[0])
        assert edges[-1] / 2 <= np.abs(column).max() < edges[-1]  # no wider than it must be


def test_histogram_bins_join_in_pairs_whatever_the_order():
    values = torch.tensor([[0.0], [-1.0], [1.0], [3.9], [-4.0], [1e-9], [-1e-9], [100.0]])
    for order in (range(8), reversed(range(8))):
        histogram = Histograms.none(1, 8, torch.device("cpu"))
        for i in order:
            histogram.add(torch.tensor([0]), values[[i]])
        edges = histogram.edges(0).numpy()
        assert list(edges) == [-128, -96, -64, -32, 0, 32, 64, 96, 128]
        assert histogram.counts[0].tolist() == [0, 0, 0, 3, 4, 0, 0, 1]


def test_left_and_right_padding_and_none_give_the_same(small_model, many):
    """In the sequences' own tokens; positions are those of the sequences as they were given."""
    model = small_model("together", positional_embedding_type="standard", d_pos=0)
    lengths = torch.tensor([9, 4, 7, 2, 9, 1, 5, 8, 3, 6])
    missing = 9 - lengths
    right = many.masked_fill(torch.arange(9) >= lengths[:, None], 29)
    left = torch.stack([row.roll(int(n)) for row, n in zip(right, missing, strict=True)])
    settings = {"k": 20, "batch_size": 4, "quantiles": (0.5,)}
    a = top_examples(model, right, SITES, **settings, **QUIET,
                     attention_mask=torch.arange(9) < lengths[:, None])  # fmt: skip
    b = top_examples(model, left, SITES, **settings, **QUIET,
                     attention_mask=(torch.arange(9) >= missing[:, None]).long())  # fmt: skip
    assert a.n_tokens == int(lengths.sum())
    by_hand = torch.cat([
        torch.tensor(activations(model, row[None, :n], 1, ("mlp_neuron",))[1])
        for row, n in zip(many, lengths.tolist(), strict=True)
    ])  # fmt: skip
    best = a.of([f"{i}.mlp.post_act:3" for i in (0, 1)])
    expected = by_hand[:, [3, 27]].sort(dim=0, descending=True).values[:20].T
    torch.testing.assert_close(best.examples[0].values, expected, atol=1e-5, rtol=0)
    for one, other in zip(a.examples, b.examples, strict=True):
        there = one.sequences >= 0
        assert torch.equal(one.values.nan_to_num(), other.values.nan_to_num())
        assert torch.equal(one.sequences, other.sequences)
        shift = missing[one.sequences.clamp(min=0)]
        assert torch.equal((one.positions + shift)[there], other.positions[there])
        assert torch.equal(one.tokens, other.tokens)


def test_dense_models_of_transformer_lens(many):
    ours = build("layer_norm")
    model = theirs(ours)
    nodes = ["1.attn.act_in:3", "L1H2.v1", "0.mlp.post_act:7", (1, "mlp_out", 2)]
    a = top_examples(ours, many, nodes, k=3, **QUIET)
    b = top_examples(model, many, nodes, k=3, **QUIET)
    assert list(a.nodes["name"]) == list(b.nodes["name"])
    for one, other in zip(a.examples[:2], b.examples[:2], strict=True):
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------
# breaks


def same(a: TopExamples, b: TopExamples):
    pd.testing.assert_frame_equal(a.nodes, b.nodes)
    for one, other in zip(a.examples, b.examples, strict=True):
        assert (one.side, one.quantile) == (other.side, other.quantile)
        for name in ("values", "sequences", "positions", "context", "tokens"):
            torch.testing.assert_close(
                getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True
            )
    for name in ("counts", "exponents", "means", "active"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert (a.n_tokens, a.before, a.texts, a.run) == (b.n_tokens, b.before, b.texts, b.run)


def test_resumes_exactly_after_a_break(small_model, many, tmp_path):
    model = small_model("together")
    settings = {"k": 5, "batch_size": 2, "quantiles": (0.1, 0.5), **QUIET}
    whole = top_examples(model, many, SITES, **settings)
    batches = []

    def stop(x, hook):
        batches.append(len(x))
        if len(batches) == 4:
            raise KeyboardInterrupt

    model.add_hook("blocks.1.attn.hook_act_in", stop)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        top_examples(model, many, SITES, folder=folder, save_every=0.0, **settings)
    with pytest.raises(ValueError, match="not finished"):
        TopExamples.load(folder)
    resumed = top_examples(model, many, SITES, folder=folder, save_every=0.0, **settings)
    assert len(batches) == 4 + 2  # three of five batches were kept
    same(whole, resumed)
    same(whole, TopExamples.load(folder))
    same(whole, top_examples(model, many, SITES, folder=folder, **settings))
    assert len(batches) == 6  # finished: nothing is run
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_another_runs_folder_is_refused(small_model, many, tmp_path):
    model = small_model()
    top_examples(model, many, "0.mlp.post_act:3", folder=tmp_path / "run", **QUIET)
    again = {"folder": tmp_path / "run", **QUIET}
    with pytest.raises(ValueError, match=r"belongs to another run .k is 16 there and 3 here"):
        top_examples(model, many, "0.mlp.post_act:3", k=3, **again)
    with pytest.raises(ValueError, match=r"another run .tokens"):
        top_examples(model, many[:5], "0.mlp.post_act:3", **again)
    with pytest.raises(ValueError, match=r"another run .nodes"):
        top_examples(model, many, "0.mlp.post_act:4", **again)
    with torch.no_grad():
        model.blocks[0].mlp.b_in[3] += 1
    with pytest.raises(ValueError, match=r"another run .model"):
        top_examples(model, many, "0.mlp.post_act:3", **again)


def test_broken_files_are_refused(small_model, many, tmp_path):
    found = top_examples(small_model(), many, "0.mlp.post_act", k=2, **QUIET)
    found.save(tmp_path / "e")
    path = tmp_path / "e" / "run.json"
    record = json.loads(path.read_text())
    for change in (
        {"schema": 2}, {"kind": "other"}, {"nodes": 5}, {"before": -1}, {"hooks": []}, {"lists": 3},
        {"texts": [[1]]}, {"settings": None}, {"n_tokens": "many"}, {"lists": [["top", 7.0]] * 10},
    ):  # fmt: skip
        path.write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=r"is of kind|is broken|must be an integer"):
            TopExamples.load(tmp_path / "e")
    path.write_text(json.dumps(record))
    same(found, TopExamples.load(tmp_path / "e"))
    with pytest.raises(FileNotFoundError):
        TopExamples.load(tmp_path)


def test_memory_does_not_grow_with_the_tokens(small_model):
    """The state has one size; it is 12 + 4 · window bytes a value, as the docstring says."""
    settings = Settings(16, (0.001, 0.5), 4, 64, (12, 4), 0)
    state = State.new(10, settings, torch.device("cpu"))
    size = sum(x.numel() * x.element_size() for x in state.tensors().values())
    assert size == 10 * (2 * (16 + 2 * 4) * (12 + 4 * 17) + 8 * 64 + 3 * 8)
    leaders = Leaders.none(3, 4, 1, torch.device("cpu"))
    values = torch.randn(50, 20, 3)
    for i in range(50):
        leaders.take(torch.arange(3), values[i : i + 1], torch.arange(20), torch.tensor([20]),
                     i * 20, 0)  # fmt: skip
    assert leaders.values.shape == (3, 4)
    assert torch.equal(leaders.values, values.flatten(0, 1).T.topk(4).values)


# --------------------------------------------------------------------------------------------------
# display and errors


def test_notebook_shows_both_ends_side_by_side_and_escapes_texts(small_model, many, make_tokenizer):
    model = small_model(tokenizer=make_tokenizer())
    found = top_examples(model, many, "mlp_neuron", k=2, **QUIET)
    evil = "<script>alert(1)</script>"
    object.__setattr__(found, "texts", found.texts | {int(many[0, 0]): evil})
    html = found._repr_html_()
    assert "<script" not in html
    assert "the first 8 are shown" in html
    assert html.index(">top<") < html.index(">bottom<") < html.index("top 10 %")
    assert "background:#2f6fd0" in html
    assert "w5" in html
    assert "48 nodes" in repr(found)


def test_ids_without_a_token_are_marked(small_model, many):
    class Gaps:
        """As tiktoken's encodings: some ids have no token."""

        def decode(self, ids, **_):
            return {3: "three"}[ids[0]]

    model = small_model()
    model.tokenizer = Gaps()
    found = top_examples(model, many * 0 + torch.tensor([3] * 8 + [4]), "0.mlp.post_act:1", **QUIET)
    assert found.texts == {3: "three", 4: "<4>"}


def test_nodes_of_any_name_each_once(small_model, many):
    found = top_examples(
        small_model(),
        many,
        ["0.mlp.post_act:3", "0-mlp/3", "L1H0.q", Node(1, "attn_q", 0)],
        **QUIET,
    )
    assert list(found.nodes["name"]) == ["0.mlp.post_act:3", *(f"1.attn.q:{i}" for i in range(4))]
    assert list(found.of("L1H0.q2").nodes["name"]) == ["1.attn.q:2"]
    with pytest.raises(ValueError, match="the examples of 5 other nodes"):
        found.of("0.mlp.post_act:4")


def test_features_of_an_index(small_model, many):
    model = small_model()
    index = NodeIndex.over(model, {"blocks.1.hook_resid_mid": 16})
    found = top_examples(model, many, "blocks.1.hook_resid_mid", index=index, k=2, **QUIET)
    _, cache = model.run_with_cache(many)
    best = cache["blocks.1.hook_resid_mid"].flatten(0, 1).max(0).values
    torch.testing.assert_close(found.examples[0].values[:, 0], best.detach())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k=0"), ({"samples": 0}, "samples=0"), ({"quantiles": (0.0,)}, "above 0"),
        ({"quantiles": (0.5, 0.5)}, "twice"), ({"bins": 3}, "power of two"),
        ({"window": (-1, 0)}, "window"), ({"batch_size": 0}, "batch_size=0"),
        ({"nodes": []}, "no nodes"), ({"nodes": "0.mlp.post_act:99"}, "channels 0 to 23"),
        ({"nodes": "0.mlp.foo:1"}, "its places are"), ({"tokens": torch.zeros(0, 3).long()}, "so"),
        ({"tokens": torch.full((1, 3), 30)}, "0 to 29"),
        ({"attention_mask": torch.zeros(10, 9)}, "padding alone"),
        ({"attention_mask": torch.ones(2, 9)}, "does not belong"),
        ({"attention_mask": torch.full((10, 9), 2)}, "1 at real tokens"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(small_model, many, changes, message):
    arguments = {"tokens": many, "nodes": "0.mlp.post_act"} | changes
    with pytest.raises(ValueError, match=message):
        top_examples(small_model(), arguments.pop("tokens"), arguments.pop("nodes"), **arguments,
                     **QUIET)  # fmt: skip


def test_activations_that_are_not_finite_are_refused(small_model, many):
    model = small_model()

    def spoil(x, hook):
        x[0, 0, 0] = torch.inf
        return x

    model.add_hook("blocks.0.mlp.hook_post", spoil)
    with pytest.raises(ValueError, match="NaN or infinite on these tokens"):
        top_examples(model, many, "0.mlp.post_act", **QUIET)
