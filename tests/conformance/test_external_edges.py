"""Code that finds circuits of edges, as EAP (Syed et al. 2023) and EAP-IG (Hanna et al. 2024) do.

A tool in their style is written out below on the surface that they use: it asks for a
HookedTransformer, switches on what splits the stream by edge, and reads and writes ``hook_embed``,
``attn.hook_result``, ``hook_{q,k,v}_input``, ``hook_mlp_in``, ``hook_mlp_out`` and the last
``hook_resid_post``. It adds up writes by itself, so it is right only where a stream is the sum of
the writes that hooks show.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.conformance.models import OPTIONS, build
from tl_sparse import compat
from tl_sparse.model.legacy_aliases import install_legacy_aliases

ADDITIVE = [name for name, fields in OPTIONS.items() if "residual_act" not in fields]
WHY_NOT = (
    "the stream is not the sum of the writes: block.residual_contribution_scale raises, and so "
    "does a run with all the switches of edge tools on"
)
SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
CLEAN, CORRUPT = "w5 w6 w7 w9", "w5 w8 w4 w9"  # the same last token


# --------------------------------------------------------------------------------------------------
# the tool


class End(NamedTuple):
    """Where an edge starts or ends; ``depth`` counts the sublayers before it."""

    hook: str
    head: int | None
    depth: int


class Graph(NamedTuple):
    sources: list[End]
    targets: list[End]

    @classmethod
    def from_model(cls, model_or_config: Any) -> Graph:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        if isinstance(model_or_config, HookedTransformer):
            cfg = model_or_config.cfg
        elif isinstance(model_or_config, HookedTransformerConfig):
            cfg = model_or_config
        else:
            raise ValueError(f"no graph of a {type(model_or_config)}")
        assert not cfg.parallel_attn_mlp
        sources, targets = [End("hook_embed", None, 0)], []
        for layer in range(cfg.n_layers):
            at, depth = f"blocks.{layer}.", 2 * layer
            for head in range(cfg.n_heads):
                sources.append(End(at + "attn.hook_result", head, depth + 1))
                targets += [End(f"{at}hook_{x}_input", head, depth) for x in "qkv"]
            sources.append(End(at + "hook_mlp_out", None, depth + 2))
            targets.append(End(at + "hook_mlp_in", None, depth + 1))
        last = f"blocks.{cfg.n_layers - 1}.hook_resid_post"
        return cls(sources, [*targets, End(last, None, 2 * cfg.n_layers)])

    def edges(self) -> list[tuple[End, End]]:
        return [(s, t) for t in self.targets for s in self.sources if s.depth <= t.depth]


def part(x: Tensor, end: End) -> Tensor:
    """One head's slice, or all of a tensor that has no head axis."""
    return x if end.head is None else x[:, :, end.head]


def switch_on(model: Any) -> Any:
    for name in SWITCHES:
        getattr(model, f"set_{name}")(True)
    assert all(getattr(model.cfg, name) for name in SWITCHES)
    assert model.cfg.n_key_value_heads is None
    return model


def recorder(graph: Graph, into: dict[End, Tensor]) -> list:
    def keep(x: Tensor, hook: Any, end: End) -> None:
        into[end] = part(x, end).detach().clone()

    return [(end.hook, functools.partial(keep, end=end)) for end in graph.sources]


def run(model: Any, text: str, hooks: list) -> Tensor:
    tokens = model.to_tokens([text], prepend_bos=True, padding_side="right", truncate=False)
    attention_mask = compat.tl_utils.get_attention_mask(model.tokenizer, tokens, True)
    with model.hooks(fwd_hooks=hooks):
        return model(tokens, attention_mask=attention_mask)


def writes(model: Any, graph: Graph, text: str) -> dict[End, Tensor]:
    into: dict[End, Tensor] = {}
    with torch.inference_mode():
        run(model, text, recorder(graph, into))
    return into


def difference(model: Any, graph: Graph, clean: str, corrupt: str) -> dict[End, Tensor]:
    before, after = writes(model, graph, clean), writes(model, graph, corrupt)
    return {end: after[end] - before[end] for end in graph.sources}


def run_circuit(model: Any, graph: Graph, clean: str, corrupt: str, kept: set) -> Tensor:
    """Logits with every edge outside the circuit carrying what it carries in the corrupt run."""
    corrupted, now = writes(model, graph, corrupt), {}

    def construct(x: Tensor, hook: Any, target: End) -> Tensor:
        for source in graph.sources:
            if source.depth <= target.depth and (source, target) not in kept:
                part(x, target).add_(corrupted[source] - now[source])
        return x

    inputs = [(t.hook, functools.partial(construct, target=t)) for t in graph.targets]
    with torch.inference_mode():
        return run(model, clean, recorder(graph, now) + inputs)


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 11] - logits[0, -1, 14]


def attribute(model: Any, graph: Graph, clean: str, corrupt: str) -> dict[tuple[End, End], float]:
    """EAP's scores: what corrupting an edge does to the metric, to first order."""
    change, scores = difference(model, graph, clean, corrupt), {}

    def score(grad: Tensor, hook: Any, target: End) -> None:
        for source in graph.sources:
            if source.depth <= target.depth:
                effect = (change[source] * part(grad, target)).sum()
                scores[source, target] = float(effect.detach())

    backward = [(t.hook, functools.partial(score, target=t)) for t in graph.targets]
    with model.hooks(bwd_hooks=backward):
        metric(run(model, clean, [])).backward()
    model.zero_grad()
    return scores


# --------------------------------------------------------------------------------------------------
# what it finds


@pytest.fixture(autouse=True)
def aliases():
    with install_legacy_aliases():
        yield


def exact(option):
    """In double precision: no AbsTopK selection hangs on the last bit."""
    return switch_on(build(option).to(torch.float64))


def all_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("option", ["plain", "wide_heads"])
def test_a_graph_comes_from_the_model_or_its_config(claim, option):
    claim("EAP-style edge circuits", option, "unchanged")
    model = build(option)
    graph = Graph.from_model(model)
    assert Graph.from_model(model.cfg) == graph
    heads = model.cfg.n_heads
    assert len(graph.sources) == 1 + 2 * (heads + 1)
    assert len(graph.targets) == 1 + 2 * (3 * heads + 1)
    with pytest.raises(ValueError, match="no graph"):
        Graph.from_model(model.config)


@pytest.mark.parametrize("option", ADDITIVE)
def test_the_empty_graph_is_the_corrupt_run_and_the_full_graph_the_clean_one(claim, option):
    if OPTIONS[option].get("activation_density", {}).get("attn_out"):
        why = "hook_result is what a head adds after AbsTopK on attn_out, with its share of b_O"
        claim("EAP-style edge circuits", option, "right", why)
    else:
        claim("EAP-style edge circuits", option, "unchanged")
    model = exact(option)
    graph = Graph.from_model(model)
    clean, corrupt = run(model, CLEAN, []), run(model, CORRUPT, [])
    assert (metric(clean) - metric(corrupt)).abs() > 1e-2
    assert torch.equal(run_circuit(model, graph, CLEAN, CORRUPT, set(graph.edges())), clean)
    empty = run_circuit(model, graph, CLEAN, CORRUPT, set())
    all_close(empty[0, -1], corrupt[0, -1])
    if not OPTIONS[option].get("bigram_table"):
        all_close(empty, corrupt)


@pytest.mark.parametrize("option", ["bigram", "paper"])
def test_what_edges_do_not_carry_is_the_current_tokens_bigram_row(claim, option):
    why = "the bigram table is no part of the stream: patch hook_bigram where last tokens differ"
    claim("EAP-style edge circuits, other last token", option, "right", why)
    model = exact(option)
    graph = Graph.from_model(model)
    corrupt_text = CORRUPT.replace("w9", "w20")
    corrupt = run(model, corrupt_text, [])[0, -1]
    empty = run_circuit(model, graph, CLEAN, corrupt_text, set())[0, -1]
    row = model.bigram(torch.tensor([[9, 20]]))[0]
    assert (row[0] - row[1]).abs().max() > 0.1
    all_close(empty, corrupt + row[0] - row[1])


@pytest.mark.parametrize("option", ["plain", "abstopk_inside", "abstopk_writes", "paper"])
def test_scores_are_the_slope_of_the_metric_along_each_edge(claim, option):
    claim("EAP-style edge attribution", option, "unchanged")
    model = exact(option)
    graph = Graph.from_model(model)
    scores = attribute(model, graph, CLEAN, CORRUPT)
    change = difference(model, graph, CLEAN, CORRUPT)
    assert scores.keys() == set(graph.edges())
    assert sum(abs(score) for score in scores.values()) > 0.1
    step = 1e-6
    for source, target in graph.edges()[::5]:

        def add(x, hook, amount, source=source, target=target):
            part(x, target).add_(amount * change[source])
            return x

        with torch.no_grad():
            up, down = (
                metric(run(model, CLEAN, [(target.hook, functools.partial(add, amount=amount))]))
                for amount in (step, -step)
            )
        slope = float(up - down) / (2 * step)
        assert slope == pytest.approx(scores[source, target], abs=1e-6), (source, target)


@pytest.mark.parametrize("option", ["residual_relu"])
def test_where_the_stream_is_no_sum_edge_tools_are_refused_asked_or_not(claim, option):
    claim("EAP-style edge circuits", option, "refused", WHY_NOT)
    model = exact(option)
    for block in model.blocks:
        with pytest.raises(ValueError, match="not the sum of what heads and MLPs write"):
            _ = block.residual_contribution_scale
    # such a tool asks nothing: it turns its switches on and runs
    with pytest.raises(ValueError, match="not the sum of what heads and MLPs write"):
        run_circuit(model, Graph.from_model(model), CLEAN, CORRUPT, set())
    # each place can still be looked at
    for switch in ("attn_result", "split_qkv_input", "hook_mlp_in"):
        for other in ("attn_result", "split_qkv_input", "hook_mlp_in"):
            getattr(model, f"set_use_{other}")(other == switch)
        assert torch.isfinite(model(CLEAN)).all()
