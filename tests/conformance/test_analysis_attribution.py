"""TransformerLens' attribution patching and faithfulness, on every model option.

Direct paths are in test_analysis_paths.py.
"""

import random

import pytest
import torch
from transformer_lens.tools import analysis
from transformer_lens.tools.analysis import attribution_patching

from tests.conformance.models import OPTIONS, build, every_option, expressible, theirs
from tests.conformance.pairs import (
    CLEAN,
    CORRUPTED,
    NO_SUM,
    SUM,
    caches,
    double,
    edge_config,
    metric,
)

LAST_DIFFERS = torch.tensor([[1, 9, 12, 20]])
BIGRAM = "the bigram table is no edge of the graph: the clean token's row stays where tokens differ"
MASKED = "hook_result is what a head really adds: masked by the channels that AbsTopK keeps"


def at(node):
    head = () if node.head is None else (node.head,)
    return (0, node.position, *head)


def slope(model, name, where, direction):
    """d metric / d t of the corrupted run with t * direction added, by finite differences."""
    step = 1e-6

    def add(x, hook):
        x = x.clone()
        x[where] += step * direction
        x[(1, *where[1:])] -= step * direction
        return x

    with torch.no_grad():
        both = model.run_with_hooks(CORRUPTED.repeat(2, 1), fwd_hooks=[(name, add)])
    return float(metric(both) - metric(both[1:])) / (2 * step)


def some(nodes_or_edges, n):
    return random.Random(0).sample(list(nodes_or_edges), n)


def switch_on(model):
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)


def writer_hook(node):
    hook = "attn.hook_result" if node.kind == "attn_head_out" else "hook_mlp_out"
    return "hook_embed" if node.kind == "embed" else f"blocks.{node.layer}.{hook}"


# --------------------------------------------------------------------------------------------------
# attribution patching


@every_option
def test_node_scores_are_the_slope_of_the_metric_along_the_clean_difference(claim, option):
    claim("tools.analysis.attribution_patch, nodes", option, "unchanged")
    model = double(option)
    scores = analysis.attribution_patch(model, CLEAN, CORRUPTED, metric).node_scores
    clean, corrupted = caches(model)
    assert len(scores) == 4 * (1 + 2 * (model.cfg.n_heads + 1))
    for node, score in some(scores.items(), 16):
        difference = (clean[node.hook_name] - corrupted[node.hook_name])[at(node)]
        expected = slope(model, node.hook_name, at(node), difference)
        assert score == pytest.approx(expected, abs=1e-7), node
    assert max(map(abs, scores.values())) > 1e-3
    if expressible(option):
        model = build(option)
        scores = analysis.attribution_patch(model, CLEAN, CORRUPTED, metric).node_scores
        reference = analysis.attribution_patch(theirs(model), CLEAN, CORRUPTED, metric)
        assert scores == pytest.approx(reference.node_scores, abs=1e-5)


@every_option
def test_edge_scores_are_the_slope_along_the_writer_s_difference(claim, option):
    utility = "tools.analysis.attribution_patch, edges"
    if option == SUM:
        claim(utility, option, "refused", NO_SUM)
    elif "attn_out" in OPTIONS[option].get("activation_density", {}):
        claim(utility, option, "right", MASKED)
    else:
        claim(utility, option, "unchanged")
    config = edge_config()
    model = double(option)
    if option == SUM:
        with pytest.raises(ValueError, match="not the sum of what heads and MLPs write"):
            analysis.attribution_patch(model, CLEAN, CORRUPTED, metric, config)
        return
    result = analysis.attribution_patch(model, CLEAN, CORRUPTED, metric, config)
    assert not model.cfg.use_attn_result
    switch_on(model)
    clean, corrupted = caches(model)
    live = {edge for edge, score in result.edge_scores.items() if abs(score) > 1e-6}
    dead = [edge for edge in result.edge_scores if edge not in live]
    live = [edge for edge in result.edge_scores if edge in live]
    for writer, reader in some(live, 16) + some(dead, 4):
        name = writer_hook(writer)
        difference = (clean[name] - corrupted[name])[at(writer)]
        expected = slope(model, reader.hook_name, at(reader), difference)
        assert result.edge_scores[writer, reader] == pytest.approx(expected, abs=1e-7)
    model.set_use_split_qkv_input(False)
    for node, score in some(result.node_scores.items(), 8):  # the sum over a writer's edges
        name = writer_hook(node)
        difference = (clean[name] - corrupted[name])[at(node)]
        assert score == pytest.approx(slope(model, name, at(node), difference), abs=1e-7)


# --------------------------------------------------------------------------------------------------
# faithfulness


def claim_faithfulness(claim, option):
    utility = "tools.analysis.faithfulness"
    if option == SUM:
        claim(utility, option, "refused", NO_SUM)
    elif OPTIONS[option].get("bigram_table"):
        claim(utility, option, "right", BIGRAM)
    elif "attn_out" in OPTIONS[option].get("activation_density", {}):
        claim(utility, option, "right", MASKED)
    else:
        claim(utility, option, "unchanged")


def graph(model):
    """Every edge of the two-layer model over four positions."""
    switch_on(model)
    names = attribution_patching._edge_hook_names(model.cfg.n_layers)
    cache = attribution_patching.cache_activation_and_gradient(
        model, CORRUPTED, metric, names_filter=names, compute_gradient=False
    )
    model.set_use_split_qkv_input(False)
    return attribution_patching.enumerate_edges(model, cache)


@pytest.mark.parametrize(
    ("option", "ablation"),
    [*((option, "corrupt") for option in OPTIONS), ("plain", "mean"), ("paper", "mean")],
)
def test_leaving_out_a_writer_s_edges_is_patching_the_writer(claim, option, ablation):
    """And the full circuit recovers all of the metric, the empty one none."""
    claim_faithfulness(claim, option)
    edge_config()
    model = double(option)
    calibration = torch.tensor([[1, 8, 14, 7], [1, 25, 3, 7]])
    keywords = {"mean_tokens": calibration} if ablation == "mean" else {}
    config = analysis.FaithfulnessConfig(ablation)

    def recovered(circuit):
        result = analysis.faithfulness(
            model, CLEAN, CORRUPTED, metric, circuit, config, **keywords
        )  # fmt: skip
        return result.recovered

    if option == SUM:
        with pytest.raises(ValueError, match="not the sum of what heads and MLPs write"):
            recovered([])
        return
    edges = graph(model)
    assert recovered(edges) == 1.0
    model.set_use_attn_result(True)
    top, bottom = (metric(model(tokens)).item() for tokens in (CLEAN, CORRUPTED))
    if ablation == "corrupt":
        assert recovered([]) == pytest.approx(0, abs=1e-7)
        replacements = model.run_with_cache(CORRUPTED)[1]
    else:
        replacements = model.run_with_cache(calibration)[1]
    node = attribution_patching.Node
    writers = [node("embed", 1), node("mlp_out", 1, layer=0), node("mlp_out", 3, layer=1)]
    writers += [node("attn_head_out", pos, layer, head) for pos, layer, head in
                ((1, 0, 0), (1, 0, 2), (3, 1, 1))]  # fmt: skip
    shifts = []
    for writer in writers:
        where = at(writer)
        value = replacements[writer_hook(writer)].mean(0, keepdim=True)[where]

        def patch(x, hook, where=where, value=value):
            x = x.clone()
            x[where] = value
            return x

        logits = model.run_with_hooks(CLEAN, fwd_hooks=[(writer_hook(writer), patch)])
        expected = (metric(logits).item() - bottom) / (top - bottom)
        circuit = [edge for edge in edges if edge[0] != writer]
        assert recovered(circuit) == pytest.approx(expected, abs=1e-7), writer
        shifts.append(abs(expected - 1))
    assert sum(shift > 1e-3 for shift in shifts) >= 2, "patching nothing would pass"


@pytest.mark.parametrize("option", ["bigram", "paper"])
def test_what_an_empty_circuit_recovers_is_the_bigram_row_of_the_clean_token(claim, option):
    claim_faithfulness(claim, option)
    edge_config()
    model = double(option)
    result = analysis.faithfulness(model, CLEAN, LAST_DIFFERS, metric, [])
    row = model.run_with_cache(CLEAN)[1]["hook_bigram"]
    logits = model.run_with_hooks(LAST_DIFFERS, fwd_hooks=[("hook_bigram", lambda x, hook: row)])
    expected = (metric(logits).item() - result.corrupt_metric) / (
        result.full_metric - result.corrupt_metric
    )
    assert result.recovered == pytest.approx(expected, abs=1e-7)
    assert abs(expected) > 1e-3
