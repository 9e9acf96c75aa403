"""Dictionaries that are known by encode and decode alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch


def by_functions(d: Any) -> Any:
    """The functions of a dictionary, and nothing else of it."""
    found = SimpleNamespace(encode=lambda x: d.encode(x), decode=lambda f: d.decode(f),
                            hook_in=d.hook_in)  # fmt: skip
    if d.transcoder:
        found.hook_out = d.hook_out
    return found


@pytest.fixture(scope="module")
def both(own_model, spliced) -> Any:
    """The same dictionaries by weights and by functions."""
    from tl_sparse.tracing import Splice

    known = spliced(own_model, activation="topk", k=9)
    return known, Splice(own_model, [by_functions(d) for d in known.dictionaries])


def test_a_trace_by_functions_is_that_by_weights(both, prompt) -> None:
    from tl_sparse.tracing import Gate, LogitDiff, trace

    known, functions = both
    assert functions.sites == known.sites
    assert functions.strict
    assert "FunctionDictionary" in repr(functions.dictionaries[2])
    gate = Gate(tau=0.05, sign="absolute")
    left, right = (trace(s, prompt, LogitDiff(4, 9), gate, heads=True) for s in both)
    assert len(left.features) > 20
    for table in ("nodes", "edges", "heads"):
        a, b = getattr(left, table), getattr(right, table)
        assert a.shape == b.shape
        for column in a:
            if a[column].dtype == float:
                assert float((a[column] - b[column]).abs().max()) < 1e-9, (table, column)
            else:
                assert a[column].tolist() == b[column].tolist(), (table, column)
    assert left.mass["bias"] == pytest.approx(right.mass["bias"], abs=1e-9)


def test_interventions_by_functions_are_those_by_weights(both, prompt) -> None:
    from tl_sparse.tracing import FeatureChange, Logit, baseline_scores, feature_hooks

    for world, method in (("linear", "gradient"), ("spliced", "exact")):
        a, b = (baseline_scores(s, prompt[:, :3], Logit(4), method, world=world) for s in both)
        assert a["id"].tolist() == b["id"].tolist()
        assert float((a["score"] - b["score"]).abs().max()) < 1e-9
    change = FeatureChange("0.mlp", 3, "set", 2.0)
    logits = [s.model.run_with_hooks(prompt, fwd_hooks=feature_hooks(s, [change])) for s in both]
    torch.testing.assert_close(*logits)


def test_an_encoder_that_is_not_linear_still_sums_to_the_root(own_model, prompt) -> None:
    """The trace itself checks the sum; the tangent's rest is a bias."""
    from tl_sparse.tracing import FunctionDictionary, Gate, Logit, Splice, trace

    draw = torch.Generator().manual_seed(0)
    W = torch.randn(16, 24, generator=draw, dtype=torch.float64)
    given = FunctionDictionary(lambda x: torch.tanh(x @ W).relu(), lambda f: f @ W.T / 24,
                               "blocks.0.hook_attn_out", "blocks.0.hook_attn_out",
                               torch.zeros(2, 16, dtype=torch.float64))  # fmt: skip
    graph = trace(Splice(own_model, [given]), prompt, Logit(4), Gate.off())
    assert sum(graph.mass.values()) == pytest.approx(graph.value, abs=1e-9)


def test_what_is_no_dictionary_is_refused(own_model, both, tmp_path) -> None:
    from tl_sparse.tracing import FunctionDictionary, Splice, save_dictionaries

    hook, example = "hook_embed", torch.zeros(2, 16, dtype=torch.float64)

    def encode(x):
        return x.relu()

    with pytest.raises(TypeError, match=r"int is no dictionary: .* encode\(x\)"):
        Splice(own_model, [3])
    no_place = SimpleNamespace(encode=encode, decode=encode)
    with pytest.raises(TypeError, match="SimpleNamespace is no dictionary"):
        Splice(own_model, [no_place])
    with pytest.raises(ValueError, match="no hook 'nowhere'"):
        Splice(own_model, [SimpleNamespace(encode=encode, decode=encode, hook_in="nowhere")])
    with pytest.raises(ValueError, match="not affine"):
        FunctionDictionary(encode, lambda f: f * f, hook, hook, example)
    weight = torch.ones(16, 16, dtype=torch.float64, requires_grad=True)
    for wrong in (lambda x: x.detach(), lambda x: x.sum(), lambda x: x.detach() @ weight):
        with pytest.raises(ValueError, match="encode must make"):
            FunctionDictionary(wrong, lambda f: f, hook, hook, example)
    with pytest.raises(ValueError, match="functions, and no weights"):
        save_dictionaries(both[1].dictionaries, tmp_path / "out")
