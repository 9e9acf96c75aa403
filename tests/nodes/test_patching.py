"""Patching nodes: against one plain run a patch, prompt by prompt."""

import pytest
import torch

from tl_sparse.node import Node
from tl_sparse.nodes import Patch, patch_nodes

ANSWERS = (5, 9)
ROWS = torch.Generator().manual_seed(11)
BASE = [torch.randint(3, 30, (n,), generator=ROWS).tolist() for n in (6, 9, 7, 9)]
SOURCE = [torch.randint(3, 30, (len(row),), generator=ROWS).tolist() for row in BASE]
SHIFTED = [torch.randint(3, 30, (n,), generator=ROWS).tolist() for n in (8, 5, 7, 9)]
SITES = ("attn_in", "attn_q", "attn_k", "attn_v", "attn_z", "attn_out", "mlp_in", "mlp_neuron",
         "mlp_out")  # fmt: skip
EVERYWHERE = [(0, "embed", 2), (1, "final_resid", 3)] + [(i % 2, s, 5) for i, s in enumerate(SITES)]


def spots_of(positions, n, m):
    """Places in base (of n tokens) and in source (of m)."""
    if positions == "last":
        return [(n - 1, m - 1)]
    if positions is None:
        return [(i, i) for i in range(n)]
    return [(p, p) if p >= 0 else (n + p, m + p) for p in positions]


def setting(node, strength, before, after, spots):
    """A hook that moves one node at some places of a single prompt."""

    def put(x, hook):
        x = x.clone()
        seen = (x, before[node.hook], after[node.hook])
        flat, b, s = (y.reshape(*y.shape[:2], -1) for y in seen)
        for i, j in spots:
            value = b[0, i, node.channel]
            flat[0, i, node.channel] = value + strength * (s[0, j, node.channel] - value)
        return flat.view(x.shape)

    return node.hook, put


def by_hand(model, base, source, changes, positions, restore=()):
    """logit(5) - logit(9) of each prompt, each patched in a run of its own."""
    return one_by_one(model, base, source, [[*changes, *((n, 0.0) for n in restore)]], positions)[0]


@torch.no_grad()
def one_by_one(model, base, source, patches, positions):
    """The same of many patches: a run a patch and prompt, each of its tokens alone."""
    found = torch.empty(len(patches), len(base))
    for i, (row, other) in enumerate(zip(base, source, strict=True)):
        one = torch.tensor([row])
        _, before = model.run_with_cache(one)
        _, after = model.run_with_cache(torch.tensor([other]))
        spots = spots_of(positions, len(row), len(other))
        for number, changes in enumerate(patches):
            hooks = [
                setting(Node(name).on(model), strength, before, after, spots)
                for name, strength in changes
            ]
            logits = model.run_with_hooks(one, fwd_hooks=hooks)[0, -1]
            found[number, i] = logits[5] - logits[9]
    return found


@pytest.mark.parametrize(
    ("option", "positions"),
    [("together", "last"), ("together", None), ("together", [-3, -1]), ("standard", [0, 4]),
     ("abstopk_resid", "last"), ("attn_only", None)],
)  # fmt: skip
def test_every_patch_is_what_a_run_of_its_own_gives(small_model, option, positions):
    model = small_model(option, zeros=0.3)
    names = [name for name in EVERYWHERE if option != "attn_only" or "mlp" not in name[1]]
    found = patch_nodes(model, BASE[:2], SOURCE[:2], [(name, 0.7) for name in names],
                        positions=positions, answers=ANSWERS)  # fmt: skip
    expected = one_by_one(model, BASE[:2], SOURCE[:2], [[(n, 0.7)] for n in names], positions)
    torch.testing.assert_close(found.values, expected, atol=1e-5, rtol=0)
    assert float(found.effects.abs().max()) > 1e-2


def test_groups_move_together_and_restored_nodes_stay(small_model):
    model = small_model("together")
    group = ["0.attn_v.3", "0.mlp_neuron.4", "1.attn_in.2"]
    found = patch_nodes(
        model, BASE, SOURCE, [group, Patch(group[:2], -1.5, restore="1.mlp_in.7")],
        positions=None, answers=ANSWERS,
    )  # fmt: skip
    with torch.no_grad():
        first = by_hand(model, BASE, SOURCE, [(name, 1.0) for name in group], None)
        second = by_hand(model, BASE, SOURCE, [(name, -1.5) for name in group[:2]], None,
                         ["1.mlp_in.7"])  # fmt: skip
    torch.testing.assert_close(found.values, torch.stack([first, second]), atol=1e-5, rtol=0)


def test_strength_0_is_base_and_the_whole_final_stream_is_source(small_model):
    model = small_model("abstopk")
    found = patch_nodes(
        model, BASE, SOURCE, [("0.mlp_in.3", 0.0), "final_resid"], answers=ANSWERS
    )  # fmt: skip
    torch.testing.assert_close(found.values[0], found.base, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.values[1], found.source["source"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.shares, torch.tensor([[0.0], [1.0]]).expand(2, 4))
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([row]))[0, -1] for row in BASE])
    torch.testing.assert_close(found.base, expected[:, 5] - expected[:, 9], atol=1e-5, rtol=0)


def test_restoring_is_the_same_with_base_and_source_exchanged(small_model):
    model = small_model("plain")
    found = patch_nodes(model, SOURCE, BASE, ["0.attn_out.3"], answers=ANSWERS, positions=None)
    with torch.no_grad():
        expected = by_hand(model, SOURCE, BASE, [("0.attn_out.3", 1.0)], None)
    torch.testing.assert_close(found.values[0], expected, atol=1e-5, rtol=0)


def test_prompts_of_other_lengths_are_aligned_from_the_right(small_model):
    model = small_model("standard")
    found = patch_nodes(model, BASE, SHIFTED, ["0.attn_v.1"], positions=[-2, -1], answers=ANSWERS)
    with torch.no_grad():
        expected = by_hand(model, BASE, SHIFTED, [("0.attn_v.1", 1.0)], [-2, -1])
    torch.testing.assert_close(found.values[0], expected, atol=1e-5, rtol=0)
    assert "aligned from the right" in found.notes[0]
    with pytest.raises(ValueError, match="equal lengths"):
        patch_nodes(model, BASE, SHIFTED, ["0.attn_v.1"], positions=None, answers=ANSWERS)


def test_several_sources_in_one_call(small_model):
    model = small_model("plain")
    patches = [("0.mlp_neuron.3", 1.0, "a"), ("0.mlp_neuron.3", 1.0, "b"), ("1.attn_q.2", 2.0, "b")]
    found = patch_nodes(model, BASE, {"a": SOURCE, "b": SHIFTED}, patches, answers=ANSWERS)
    with torch.no_grad():
        for row, (name, strength, which) in zip(found.values, patches, strict=True):
            source = SOURCE if which == "a" else SHIFTED
            expected = by_hand(model, BASE, source, [(name, strength)], "last")
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="only a, b"):
        patch_nodes(model, BASE, {"a": SOURCE, "b": SHIFTED}, ["0.attn_in.1"], answers=ANSWERS)


def test_neither_batch_nor_chunks_of_prompts_matter(small_model, monkeypatch):
    model = small_model("together")
    names = [(name, 0.5) for name in EVERYWHERE]
    found = patch_nodes(model, BASE, SOURCE, names, answers=ANSWERS, positions=None)
    single = patch_nodes(model, BASE, SOURCE, names, answers=ANSWERS, positions=None, batch=1)
    torch.testing.assert_close(found.values, single.values, atol=1e-5, rtol=0)
    monkeypatch.setattr("tl_sparse.nodes.patched_runs.FLOATS", 1)
    chunked = patch_nodes(model, BASE, SOURCE, names, answers=ANSWERS, positions=None)
    torch.testing.assert_close(found.values, chunked.values, atol=1e-5, rtol=0)


def test_only_the_ends_of_prompts_are_run_where_only_these_are_patched(small_model, monkeypatch):
    from tl_sparse.nodes.patched_runs import PartialForward

    widths, run = [], PartialForward.changed_stream

    def seen(self, *arguments):
        widths.append(self.packed.tokens.shape[1])
        return run(self, *arguments)

    monkeypatch.setattr(PartialForward, "changed_stream", seen)
    patch_nodes(small_model("sinks"), BASE, SOURCE, EVERYWHERE[:7], answers=ANSWERS)
    assert widths == [7]  # a slot a patch, in one pass


def test_a_measure_of_ones_own_sees_each_prompts_logits(small_model):
    model = small_model("plain")

    def top(logits, prompt):
        return logits.max(-1).values + prompt

    found = patch_nodes(model, BASE, SOURCE, [("0.mlp_in.3", 0.0)], measure=top)
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([row]))[0, -1].max() for row in BASE])
    torch.testing.assert_close(found.values[0], expected + torch.arange(4), atol=1e-5, rtol=0)
    assert found.to_dataframe().columns[4] == "top"


def test_a_tasks_pairs_are_each_others_sources(planted, marks):
    model, chain = planted()
    batch = marks.batch(4, split="train", seed=0)
    found = patch_nodes(model, batch, None, [list(chain)], positions=None)
    other = found.base.view(-1, 2).flip(1).flatten()
    torch.testing.assert_close(found.source["source"], -other, atol=1e-5, rtol=0)
    assert float((found.shares - 1).abs().max()) < 0.05  # the chain is all that matters


@pytest.mark.parametrize("positions", ["last", None])
def test_any_transformer_lens_model(dense_model, positions):
    names = [(0, "attn_in", 3), (0, "attn_v", 5), (1, "mlp_neuron", 7), (1, "final_resid", 2)]
    found = patch_nodes(dense_model, BASE, SOURCE, [(name, 0.7) for name in names],
                        positions=positions, answers=ANSWERS)  # fmt: skip
    with torch.no_grad():
        for name, values in zip(names, found.values, strict=True):
            expected = by_hand(dense_model, BASE, SOURCE, [(name, 0.7)], positions)
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


def test_the_result_shows_itself(small_model):
    found = patch_nodes(small_model("plain"), BASE, SOURCE,
                        [("0.mlp_in.3", 2.0), Patch("0.attn_in.1", restore="0.attn_v.0")],
                        answers=ANSWERS)  # fmt: skip
    frame = found.to_dataframe()
    assert frame["nodes"].tolist() == ["0.mlp_in.3", "0.attn_in.1"]
    assert frame["effect"][0] == pytest.approx(float(found.effects[0].mean()), abs=1e-6)
    assert len(found.examples()) == 8
    assert "2 patches of 4 prompts at the last token" in repr(found)
    assert "<table>" in found._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"patches": []}, "no patches"),
        ({"patches": [[]]}, "without nodes"),
        ({"patches": ["0.attn_in.99"]}, "channels 0 to 15"),
        ({"patches": ["9.attn_in.1"]}, "layers 0 to 1"),
        ({"patches": [["0.attn_in.1", "0.attn.act_in:1"]]}, "named twice"),
        ({"patches": [Patch("0.attn_in.1", restore="0.attn_in.1")]}, "named twice"),
        ({"patches": [("0.attn_in.1", float("nan"))]}, "finite"),
        ({"positions": "first"}, "'last', None"),
        ({"positions": []}, "at least one"),
        ({"positions": [6]}, "shortest prompt of base has 6 tokens"),
        ({"positions": [5, -1]}, "twice"),
        ({"source": SOURCE[:2]}, "2 prompts for 4"),
        ({"source": None}, "no source"),
        ({"answers": None}, "nothing to measure"),
        ({"answers": (1, 30)}, "0 to 29"),
        ({"answers": ([1, 2], [3, 4])}, "two lists of 4"),
        ({"batch": 0}, "at least 1"),
        ({"base": [[1, 2], []]}, "without a token"),
        ({"base": [[1, 30]]}, "0 to 29"),
        ({"base": torch.rand(2, 3)}, "integers"),
    ],
)
def test_what_does_not_fit_is_told(small_model, arguments, told):
    given = {"base": BASE, "source": SOURCE, "patches": ["0.attn_in.1"], "answers": ANSWERS}
    with pytest.raises(ValueError, match=told):
        patch_nodes(small_model("plain"), **(given | arguments))


def test_weights_and_modes_are_left_as_they_were(small_model):
    model = small_model("plain").train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    patch_nodes(model, BASE, SOURCE, ["0.attn_in.1"], answers=ANSWERS)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    assert not any(point.fwd_hooks for point in model.hook_points())
