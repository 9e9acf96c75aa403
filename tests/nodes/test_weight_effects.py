import importlib
import json

import pandas as pd
import pytest
import torch

from tests.conformance.models import build, theirs
from tl_sparse import WeightMasks
from tl_sparse.nodes import load_effects, save_effects, weight_effects
from tl_sparse.sparsity.matrices import weight_matrices

QUIET = {"progress": False}


@pytest.fixture
def many():
    return torch.randint(3, 30, (5, 8), generator=torch.Generator().manual_seed(6))


def parameters(model):
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def random_entries(model, n, seed=0, biases=False):
    """Weights drawn over all matrices, at least one of each."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    matrices = weight_matrices(model, biases=biases)
    while len(found) < n:
        for matrix in matrices:
            for part, suffix in zip(matrix.parts, ("", "_pos"), strict=False):
                place = torch.randint(part.numel(), (1,), generator=generator)
                index = tuple(int(x) for x in torch.unravel_index(place, part.shape))
                found[matrix.name + suffix, index] = None
    return list(found)


@torch.no_grad()
def reference(model, tokens, entries):
    """KL and change of probability for each weight: written to zero, run, and put back."""
    tensors = {
        matrix.name + suffix: part
        for matrix in weight_matrices(model, biases=True)
        for part, suffix in zip(matrix.parts, ("", "_pos"), strict=False)
    }
    p = model(tokens).double().log_softmax(-1)
    kl, moved = [], []
    for name, index in entries:
        value = tensors[name][index].clone()
        tensors[name][index] = 0.0
        q = model(tokens).double().log_softmax(-1)
        tensors[name][index] = value
        kl.append((p.exp() * (p - q)).sum(-1))
        moved.append((q.exp() - p.exp()).mean((0, 1)))
    return torch.stack(kl), torch.stack(moved)


@pytest.mark.parametrize(
    "option", ["together", "abstopk_resid", "tied", "layer_norm", "standard", "attn_only", "sinks"]
)
def test_equal_to_setting_each_weight_to_zero(small_model, many, option):
    model = small_model(option, zeros=0.3)
    entries = random_entries(model, 30, biases=True)
    found = weight_effects(
        model, many, entries, biases=True, every_position=True, max_tokens=50, **QUIET
    )
    table = found.to_dataframe()
    by_name = {key: i for i, key in enumerate(zip(table["matrix"], table["index"], strict=True))}
    order = torch.tensor([by_name[entry] for entry in entries])
    kl, moved = reference(model, many, entries)
    assert len(found) == len(entries) >= 30
    torch.testing.assert_close(found.kl[order].double(), kl, atol=2e-6, rtol=1e-3)
    assert kl.amax((1, 2)).max() > 1e-3
    for i, place in enumerate(order.tolist()):
        change = moved[i, found.up_token[place]]
        torch.testing.assert_close(found.up[place].double(), change, atol=1e-6, rtol=1e-3)
        change = moved[i, found.down_token[place]]
        torch.testing.assert_close(found.down[place].double(), change, atol=1e-6, rtol=1e-3)
        assert found.up[place, 0] == pytest.approx(float(moved[i].max()), abs=1e-6)


def test_the_summaries_are_those_of_the_kl_at_every_position(small_model, many):
    model = small_model("together", zeros=0.5)
    found = weight_effects(
        model, many, random_entries(model, 20), k=6, bins=14, every_position=True, **QUIET
    )
    kl = found.kl.double()
    torch.testing.assert_close(found.mean.double(), kl.mean((1, 2)))
    torch.testing.assert_close(found.by_sequence.double(), kl.mean(2))
    torch.testing.assert_close(found.by_position.double(), kl.mean(1))
    for i in range(len(found)):
        best = kl[i].flatten().argsort(descending=True, stable=True)[:6]
        assert torch.equal(found.top_sequence[i] * 8 + found.top_position[i], best)
        assert torch.equal(found.top_kl[i], found.kl[i].flatten()[best])
        assert torch.equal(found.top_token[i], many.flatten()[best])
    assert list(found.edges()) == pytest.approx([0, *(10.0**e for e in range(-12, 3))])
    for low, high, n in zip(
        found.edges()[:-1], found.edges()[1:], found.counts.sum(0), strict=True
    ):
        assert n == ((kl >= low) & (kl < high)).sum()
    table = found.histogram()
    assert table["positions"].sum() == len(found) * 40
    for _, row in table.dropna().iterrows():
        i = found.names.index(row["weight"])
        assert row["from"] <= found.kl[i, row["sequence"], row["position"]] < row["to"]


def test_all_weights_that_are_not_zero(small_model, many):
    model = small_model("abstopk", zeros=0.9)
    found = weight_effects(model, many[:2], max_tokens=512, **QUIET)
    counts = {name: n for name, n in WeightMasks.of(model).l0().items() if n}
    table = found.by_matrix().set_index("matrix")
    assert table["weights"].to_dict() == counts
    frame = found.to_dataframe()
    assert (frame["weight"] != 0).all()
    row = frame[frame["matrix"] == "blocks.1.mlp.W_out"].iloc[0]
    assert row["source"] == f"1.mlp.post_act:{row['index'][0]}"
    assert row["target"] == f"1.mlp.resid_delta:{row['index'][1]}"
    head = frame[frame["matrix"] == "blocks.0.attn.W_V"].iloc[0]
    assert head["target"] == f"0.attn.v:{head['index'][0] * 4 + head['index'][2]}"
    some = weight_effects(model, many[:2], matrices=["blocks.1.mlp.W_out"], **QUIET)
    assert len(some) == counts["blocks.1.mlp.W_out"]


def test_sequences_that_a_weight_does_not_touch_are_not_run(small_model, many):
    model = small_model("abstopk")
    entry = ("embed.W_E", (int(many[0, 0]), 3))
    batches = []
    model.add_hook("hook_embed", lambda x, hook: batches.append(len(x)))
    found = weight_effects(model, many, [entry], every_position=True, **QUIET)
    with_token = (many == many[0, 0]).any(1)
    assert batches == [5, int(with_token.sum())]
    assert torch.equal((found.kl[0] > 0).any(1), with_token)
    first = (many == many[0, 0]).int().argmax(1)
    for row in with_token.nonzero().flatten().tolist():
        assert (found.kl[0, row, : first[row]] < 1e-10).all()


def test_weights_are_not_touched_even_by_an_exception(small_model, many):
    model = small_model("together")
    before = parameters(model)
    versions = {name: x._version for name, x in model.named_parameters()}
    calls = []

    def stop(x, hook):
        calls.append(hook.name)
        if len(calls) == 9:
            raise RuntimeError("stop")

    model.add_hook("blocks.1.hook_resid_post", stop)
    with pytest.raises(RuntimeError, match="stop"):
        weight_effects(model, many, max_tokens=80, **QUIET)
    assert len(calls) == 9
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name])
        assert x._version == versions[name]
        assert x.requires_grad
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(small_model, many, side):
    model = small_model("together")
    lengths = torch.tensor([8, 3, 1])
    mask = torch.arange(8) < lengths[:, None]
    many = many[:3]
    padded = many.masked_fill(~mask, 29)
    if side == "left":
        padded, mask = padded.clone(), mask.clone()
        for i, n in enumerate((8 - lengths).tolist()):
            padded[i], mask[i] = padded[i].roll(n), mask[i].roll(n)
    entries = random_entries(model, 1, seed=4)
    found = weight_effects(
        model, padded, entries, attention_mask=mask, every_position=True, k=50, **QUIET
    )
    assert found.n_tokens == 12
    assert torch.equal(found.kl.isnan(), (~mask).expand_as(found.kl))
    names = list(zip(found.to_dataframe()["matrix"], found.to_dataframe()["index"], strict=True))
    for i, n in enumerate(lengths.tolist()):
        kl, _ = reference(model, many[i : i + 1, :n], names)
        here = found.kl[:, i][:, mask[i]].double()
        torch.testing.assert_close(here, kl[:, 0], atol=2e-6, rtol=1e-3)
    assert found.top_kl.shape[1] == 12
    places = zip(found.top_sequence.flatten(), found.top_position.flatten(), strict=True)
    assert all(mask[i, j] for i, j in places)
    assert bool((found.counts.sum(1) == 12).all())


def test_dense_models_of_transformer_lens(many):
    ours = build("layer_norm", use_ln_bias=True)
    model = theirs(ours)
    entries = random_entries(ours, 14, seed=2)
    one, other = (
        weight_effects(each, many, entries, every_position=True, **QUIET) for each in (ours, model)
    )
    torch.testing.assert_close(one.kl, other.kl, atol=2e-6, rtol=1e-3)
    assert one.names == other.names


# --------------------------------------------------------------------------------------------------
# breaks


def same(a, b):
    assert a.matrices == b.matrices
    assert (a.n_tokens, dict(a.texts)) == (b.n_tokens, dict(b.texts))
    for name, x in a.tensors().items():
        torch.testing.assert_close(x, b.tensors()[name], rtol=0, atol=0, equal_nan=True)


def test_resumes_exactly_after_a_break(small_model, many, tmp_path, monkeypatch):
    model = small_model("together")
    module = importlib.import_module("tl_sparse.nodes.weight_effects")
    monkeypatch.setattr(module, "MAX_PART", 4)
    entries = random_entries(model, 40)
    whole = weight_effects(model, many, entries, every_position=True, **QUIET)
    calls = []

    def stop(x, hook):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt

    model.add_hook("hook_bigram", stop)
    run = {"entries": entries, "every_position": True, "folder": tmp_path / "run", **QUIET}
    with pytest.raises(KeyboardInterrupt):
        weight_effects(model, many, **run)
    kept = len(list((tmp_path / "run").glob("part-*")))
    assert 1 < kept < 15
    with pytest.raises(ValueError, match=f"not finished .{kept} of"):
        load_effects(tmp_path / "run")
    same(whole, weight_effects(model, many, **run))
    resumed = len(calls) - 12
    same(whole, load_effects(tmp_path / "run"))
    calls.clear()
    same(whole, weight_effects(model, many, **run))
    assert not calls
    model.reset_hooks()
    model.add_hook("hook_bigram", lambda x, hook: calls.append(1))
    weight_effects(model, many, entries, **QUIET)
    assert resumed < len(calls)
    with pytest.raises(ValueError, match=r"another run .*k is 8 there and 2 here"):
        weight_effects(model, many, **run, k=2)
    with pytest.raises(ValueError, match="has a run in parts"):
        save_effects(whole, tmp_path / "run")


def test_saved_effects_are_those_loaded_and_broken_files_are_refused(small_model, many, tmp_path):
    model = small_model()
    found = weight_effects(model, many, random_entries(model, 16), **QUIET)
    save_effects(found, tmp_path / "e")
    same(found, load_effects(tmp_path / "e"))
    path = tmp_path / "e" / "part-00000000" / "run.json"
    record = json.loads(path.read_text())
    for change in (
        {"schema": 3}, {"part": 1}, {"weights": 4}, {"matrices": []}, {"matrices": 3},
        {"texts": [[1]]}, {"settings": []}, {"settings": {}}, {"positions": "x"}, {"n_tokens": 0},
    ):  # fmt: skip
        path.write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=r"is of kind|is broken|must be an integer"):
            load_effects(tmp_path / "e")


# --------------------------------------------------------------------------------------------------
# display and errors


def test_tokens_moved_and_notebook(small_model, many, make_tokenizer):
    model = small_model(tokenizer=make_tokenizer())
    found = weight_effects(model, many, [("unembed.W_U", (3, 7)), ("unembed.W_U", (3, 8))], **QUIET)
    moved = found.tokens_moved(0)
    assert abs(moved.set_index("token")["change"]).idxmax() == 7  # its own logit
    assert moved.set_index("token")["text"][7] == "w7"
    assert len(moved) == 16
    html = found._repr_html_()
    assert "unembed.W_U[3, 7]" in html
    assert "logit:7" in html
    assert "2 weights of 1 matrices" in repr(found)
    second = found.to_dataframe().iloc[[1]].reset_index(drop=True)
    pd.testing.assert_frame_equal(found.of(torch.tensor([1])).to_dataframe(), second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrices": ["W_Z"]}, "unknown matrix 'W_Z'; choose from blocks.0.attn.W_Q"),
        ({"entries": [("W_Z", (0,))]}, "unknown matrix 'W_Z'"),
        ({"entries": [("embed.W_E", (99, 0))]}, "lies outside embed.W_E"),
        ({"entries": [("embed.W_E", (1, 2, 3))]}, "lies outside"),
        ({"entries": []}, "no weights"), ({"k": 0}, "k=0"), ({"bins": 0}, "bins=0"),
        ({"entries": [("embed.W_E", (1, 2))], "matrices": ["embed.W_E"]}, "not both"),
        ({"matrices": ["blocks.0.mlp.b_in"]}, "unknown matrix"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(small_model, many, changes, message):
    with pytest.raises(ValueError, match=message):
        weight_effects(small_model(), many, **changes, **QUIET)
