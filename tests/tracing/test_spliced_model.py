"""Features as nodes: interventions, circuits over features, three worlds."""

from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def graph(own_model, spliced, prompt) -> Any:
    from tl_sparse.tracing import Gate, Logit, trace

    return trace(spliced(own_model), prompt, Logit(4), Gate(tau=0.05, sign="absolute"))


def logit(model: Any, prompt: torch.Tensor, hooks: Any = ()) -> float:
    return float(model.run_with_hooks(prompt, fwd_hooks=list(hooks))[0, -1, 4].detach())


def test_ablating_a_direct_parent_takes_its_weight_off_the_root(
    own_model, spliced, prompt, graph
) -> None:
    from tl_sparse.tracing import FeatureChange, feature_hooks

    splice = spliced(own_model)
    clean = logit(own_model, prompt)
    edges = graph.edges[(graph.edges["target"] == graph.root)].set_index("source")["weight"]
    rows = graph.features[graph.features["id"].isin(edges.index)].sort_values("layer")
    for node in (rows.iloc[0], rows.iloc[len(rows) // 2], rows.iloc[-1]):
        change = FeatureChange(node["site"], int(node["index"]), pos=int(node["pos"]))
        now = logit(own_model, prompt, feature_hooks(splice, [change], tokens=prompt))
        assert clean - now == pytest.approx(edges[node["id"]], abs=1e-9)


def test_ablating_a_direct_parent_takes_its_weight_off_a_feature(
    own_model, spliced, prompt, graph
) -> None:
    from tl_sparse.tracing import FeatureChange, feature_hooks

    splice = spliced(own_model)
    target = graph.features[graph.features["site"] == "1.mlp"].iloc[0]
    edges = graph.edges[graph.edges["target"] == target["id"]].set_index("source")["weight"]
    source = graph.features[graph.features["id"].isin(edges.index)].iloc[0]
    d = splice.dictionary("1.mlp")
    seen: list[float] = []

    def read(x: torch.Tensor, hook: Any = None) -> None:
        pre = x[0, int(target["pos"])] @ d.W_enc[:, int(target["index"])]
        seen.append(float(pre.detach()))

    change = FeatureChange(source["site"], int(source["index"]), pos=int(source["pos"]))
    for hooks in ([], feature_hooks(splice, [change], tokens=prompt)):
        own_model.run_with_hooks(prompt, fwd_hooks=[*hooks, (d.hook_in, read)])
    assert seen[0] - seen[1] == pytest.approx(edges[source["id"]], abs=1e-9)


def test_changes_of_features(own_model, spliced, prompt) -> None:
    from tl_sparse.tracing import FeatureChange, feature_hooks

    splice = spliced(own_model)
    d = splice.dictionary("1.attn")
    _, cache = own_model.run_with_cache(prompt)
    x = cache[d.hook_out].detach()
    was = d.encode(x)
    index = int(was[0, 3].argmax())
    for how, value, expected in (
        ("ablate", 0.0, 0 * was[..., index]), ("scale", 2.0, 2 * was[..., index]),
        ("add", 1.5, was[..., index] + 1.5), ("set", 3.0, torch.full_like(was[..., index], 3)),
    ):  # fmt: skip
        hooks = feature_hooks(splice, [FeatureChange("1.attn", index, how, value)])
        with own_model.hooks(fwd_hooks=hooks):
            _, now = own_model.run_with_cache(prompt)
        change = (expected - was[..., index])[..., None] * d.W_dec[index]
        assert torch.allclose(now[d.hook_out], x + change, atol=1e-12)


def test_changes_go_on_while_text_is_generated(own_model, spliced) -> None:
    from tl_sparse.tracing import FeatureChange, feature_hooks

    splice = spliced(own_model)
    prompt = torch.tensor([[3, 7, 1]])

    def generated(cached: bool) -> torch.Tensor:
        changes = [FeatureChange("1.mlp", 5, "set", 40.0, slice(2, None))]
        with own_model.hooks(fwd_hooks=feature_hooks(splice, changes)):
            return own_model.generate(
                prompt, max_new_tokens=4, do_sample=False, use_past_kv_cache=cached, verbose=False,
                stop_at_eos=False,
            )  # fmt: skip

    assert torch.equal(generated(True), generated(False))


@pytest.mark.parametrize("world", ["original", "spliced", "linear"])
def test_unchanged_features_change_nothing(any_model, spliced, prompt, world) -> None:
    from tl_sparse.tracing import SplicedModel

    model = SplicedModel(spliced(any_model), world)
    assert torch.equal(model(prompt), any_model(prompt))
    hooks = [(name, lambda x, hook=None: x) for name in model.names.values()]
    assert torch.allclose(
        model.run_with_hooks(prompt, fwd_hooks=hooks), any_model(prompt), atol=1e-10
    )


def test_in_the_linear_world_what_is_cut_is_what_was_traced(own_model, spliced, prompt) -> None:
    """Without every feature but some, the logit is the sum over paths through these alone."""
    from tl_sparse.tracing import Gate, Logit, SplicedModel, trace

    splice = spliced(own_model)
    model = SplicedModel(splice, "linear")
    index = model.index()
    # all features of the last layer's MLP go: their contributions to the logit do
    hooks = [(model.names["1.mlp"], lambda x, hook=None: torch.zeros_like(x))]
    full = trace(splice, prompt, Logit(4), Gate.off(), edges="none").features
    last = full[full["site"] == "1.mlp"]["attribution"].sum()
    change = logit(own_model, prompt) - logit(model, prompt, hooks)
    assert change == pytest.approx(last, abs=1e-9)
    # and an earlier one's effect is its whole attribution
    first = full[full["site"] == "0.attn"].iloc[0]

    def ablate(x: torch.Tensor, hook: Any = None) -> torch.Tensor:
        x = x.clone()
        x[0, int(first["pos"]), int(first["index"])] = 0
        return x

    change = logit(own_model, prompt) - logit(model, prompt, [(model.names["0.attn"], ablate)])
    assert change == pytest.approx(first["attribution"], abs=1e-9)
    assert index.n_nodes == 5 * 24


def test_in_the_spliced_world_errors_stay_and_everything_else_is_computed(
    own_model, spliced, prompt
) -> None:
    """Against the same done here: reconstructions and the errors of the unchanged run."""
    from tl_sparse.tracing import SplicedModel

    splice = spliced(own_model)
    _, cache = own_model.run_with_cache(prompt)
    live: dict[str, torch.Tensor] = {}

    def read(name: str) -> Any:
        return name, lambda x, hook=None: live.__setitem__(name, x)

    def write(d: Any) -> Any:
        error = cache[d.hook_out] - d.decode(d.encode(cache[d.hook_in]))

        def hook_(x: torch.Tensor, hook: Any = None) -> torch.Tensor:
            features = d.encode(live[d.hook_in] if d.transcoder else x)
            return d.decode(features * (0 if d.name == "0.attn" else 1)) + error

        return d.hook_out, hook_

    hooks = [read(d.hook_in) for d in splice.dictionaries if d.transcoder]
    expected = logit(own_model, prompt, [*hooks, *map(write, splice.dictionaries)])
    change = [("blocks.0.attn.hook_features", lambda x, hook=None: torch.zeros_like(x))]
    found = {world: logit(SplicedModel(splice, world), prompt, change)
             for world in ("original", "spliced", "linear")}  # fmt: skip
    assert found["spliced"] == pytest.approx(expected, abs=1e-9)
    assert len({round(value, 3) for value in found.values()}) == 3


def test_a_graph_becomes_a_circuit_that_the_suite_judges(own_model, spliced, graph) -> None:
    from tl_sparse.ablation.interventions import check_fired
    from tl_sparse.tracing import SplicedModel, feature_circuit

    tokens = torch.randint(0, 20, (6, 8))
    model = SplicedModel(spliced(own_model), "original")
    circuit = feature_circuit(model, graph, "some task", tokens)
    kept = set(zip(graph.features["site"], graph.features["index"], strict=True))
    assert circuit.n_nodes == len(kept)
    d = model.splice.dictionary("0.attn")
    _, cache = own_model.run_with_cache(tokens)
    means = d.encode(cache[d.hook_out]).mean((0, 1)).detach()
    place = circuit.index.slices[model.names["0.attn"]]
    assert torch.allclose(circuit.means.values[place].double(), means.double(), atol=1e-5)
    hooks = circuit.hooks()
    ablated = model.run_with_hooks(tokens, fwd_hooks=hooks)
    check_fired([(name, hook) for name, hook in hooks if hasattr(hook, "fired")])
    assert not torch.allclose(ablated, own_model(tokens), atol=1e-3)


def test_what_features_have_no_weights_for_is_not_measured(own_model, spliced) -> None:
    """Not an error: the suite goes on without random sets of the same degree."""
    from tl_sparse.faithfulness.controls import NotMeasured, degrees
    from tl_sparse.tracing import SplicedModel

    model = SplicedModel(spliced(own_model))
    with pytest.raises(NotMeasured, match="no weights are known to meet the channels of embed"):
        degrees(model, model.index())


def test_a_circuit_belongs_to_its_dictionaries(own_model, spliced, prompt) -> None:
    from tl_sparse.tracing import SplicedModel, feature_circuit

    circuit = feature_circuit(SplicedModel(spliced(own_model)), [("1.mlp", 3)], "t", prompt)
    circuit.check_model(SplicedModel(spliced(own_model), "linear"))
    other = spliced(own_model, changes={"1.mlp": {"b_enc": torch.zeros(24, dtype=torch.float64)}})
    with pytest.raises(ValueError, match="model"):
        circuit.check_model(SplicedModel(other))
