"""Tracing step by step, and again from its file."""

import json

import pytest


@pytest.fixture(scope="module")
def splice(own_model, spliced):
    return spliced(own_model)


def test_a_session_finds_the_direct_edges_of_a_trace(splice, prompt) -> None:
    from tl_sparse.tracing import Gate, Logit, TraceSession, trace

    session = TraceSession(splice, prompt, Logit(4), threshold=0.0)
    whole = trace(splice, prompt, Logit(4), Gate.off()).edges.set_index(["target", "source"])
    found = session.expand()
    assert found["weight"].abs().is_monotonic_decreasing
    node = found[found["site"].isin(["1.mlp", "1.attn", "0.mlp"])].iloc[0]["id"]
    session.expand(node)
    graph = session.graph()
    assert set(graph.edges["target"]) == {graph.root, node}
    for row in graph.edges.itertuples():
        assert row.weight == pytest.approx(whole.loc[(row.target, row.source), "weight"], abs=1e-10)
    assert len(graph.edges) == len(whole.loc[graph.root]) + len(whole.loc[node])


def test_best_first_expands_what_most_of_the_root_goes_through(splice, prompt) -> None:
    from tl_sparse.tracing import Logit, TraceSession

    session = TraceSession(splice, prompt, Logit(4), top_k=5).expand_best(4)
    assert len(session.expansions) == 4
    again = TraceSession(splice, prompt, Logit(4), top_k=5)
    again.expand()
    for node in session.expansions[1:]:
        assert again.frontier()["id"][0] == node
        again.expand(node)


def test_a_file_repeats_a_session(splice, prompt, tmp_path) -> None:
    from tl_sparse.tracing import Custom, LogitDiff, TraceSession

    session = TraceSession(splice, prompt, LogitDiff(4, 9), threshold=0.2, top_k=6).expand_best(5)
    session.save(tmp_path / "s.json")
    again = TraceSession.replay(splice, tmp_path / "s.json")
    assert again.expansions == session.expansions
    assert again.graph().edges.equals(session.graph().edges)
    values = json.loads((tmp_path / "s.json").read_text())
    for change in ({"expansions": ["9.mlp/0/0"]}, {"root": {"kind": "Custom"}}, {"prompt": "x"},
                   {"schema_version": 2}, {"top_k": 1.5}):  # fmt: skip
        (tmp_path / "bad.json").write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=r"bad\.json|none of the nodes"):
            TraceSession.replay(splice, tmp_path / "bad.json")
    custom = TraceSession(splice, prompt, Custom(lambda x, last: x[:, 0, 0]))
    with pytest.raises(ValueError, match="Custom"):
        custom.save(tmp_path / "c.json")


def test_what_was_not_found_is_not_expanded(splice, prompt) -> None:
    from tl_sparse.tracing import Logit, TraceSession

    session = TraceSession(splice, prompt, Logit(4))
    with pytest.raises(ValueError, match="the root first"):
        session.expand("1.mlp/5/1")
    found = session.expand()
    leaf = found[found["kind"] != "feature"].iloc[0]["id"]
    with pytest.raises(ValueError, match="leaf"):
        session.expand(leaf)
