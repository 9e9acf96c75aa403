"""Other scores of the same nodes."""

import pytest
import torch


@pytest.fixture(scope="module")
def splice(own_model, spliced):
    return spliced(own_model)


@pytest.mark.parametrize("method", ["attribution", "gradient", "ig", "exact"])
def test_in_the_linear_world_all_are_what_is_traced(splice, prompt, method) -> None:
    from tl_sparse.tracing import Gate, LogitDiff, baseline_scores, trace

    root, tokens = LogitDiff(4, 9), prompt[:, :4]
    graph = trace(splice, tokens, root, Gate.off(), edges="none")
    expected = graph.features.set_index("id")["attribution"]
    found = baseline_scores(splice, tokens, root, method, world="linear").set_index("id")["score"]
    assert set(expected.index) < set(found.index)  # a trace leaves out what scores 0
    assert float((found - expected.reindex(found.index).fillna(0)).abs().max()) < 1e-9
    assert float(expected.abs().max()) > 0.1
    if method != "attribution":
        other = baseline_scores(splice, tokens, root, method).set_index("id")["score"]
        assert float((other - found).abs().max()) > 1e-3


@pytest.mark.parametrize("method", ["gradient", "ig", "eap_ig", "exact"])
def test_many_prompts_are_scored_each_on_its_own(splice, method) -> None:
    from tl_sparse.tracing import LogitDiff, baseline_scores

    texts, others = [[3, 7], [5, 2, 8]], [[3, 6], [4, 2, 8]]
    every = baseline_scores(splice, texts, LogitDiff([4, 6], 9), method, other=others, steps=3,
                            batch_size=25 if method == "exact" else 5)  # fmt: skip
    for number, correct in enumerate((4, 6)):
        alone = baseline_scores(splice, texts[number : number + 1], LogitDiff(correct, 9), method,
                                other=others[number : number + 1], steps=3)  # fmt: skip
        mine = every[every["prompt"] == number].set_index("id")["score"]
        assert mine.index.tolist() == alone["id"].tolist()
        assert float((mine.to_numpy() - alone["score"]).abs().max()) < 1e-9


def test_integrated_gradients_of_a_site_sum_to_what_the_site_adds(splice, prompt) -> None:
    from tl_sparse.tracing import Logit, SplicedModel, baseline_scores

    scores = baseline_scores(splice, prompt, Logit(4), "ig", steps=200, batch_size=100)
    last = scores[scores["id"].str.startswith("1.mlp")]["score"].sum()
    model = SplicedModel(splice, "spliced")
    hooks = [(model.names["1.mlp"], lambda x, hook=None: torch.zeros_like(x))]
    lost = (model(prompt) - model.run_with_hooks(prompt, fwd_hooks=hooks))[0, -1, 4]
    assert last == pytest.approx(float(lost.detach()), rel=0.02)


@pytest.mark.parametrize("method", ["gradient", "ig", "exact"])
def test_against_another_prompt_all_are_the_attribution_too(splice, prompt, method) -> None:
    """Patching in features that only the other prompt has is scored as well."""
    from tl_sparse.tracing import LogitDiff, SplicedModel, baseline_scores

    root, tokens, other = LogitDiff(4, 9), prompt[:, :4], torch.tensor([[3, 7, 8, 12]])

    def scores(method):
        found = baseline_scores(splice, tokens, root, method, other=other, world="linear")
        return found.set_index("id")["score"]

    expected, found = scores("attribution"), scores(method)
    assert list(found.index) == list(expected.index)
    assert float((found - expected).abs().max()) < 1e-9
    plain = baseline_scores(splice, tokens, root, "attribution").set_index("id")["score"]
    alone = expected.index.difference(plain.index)
    assert len(alone)
    assert float(expected[alone].abs().max()) > 0.01
    # by hand: one of them patched in
    site, pos, index = max(alone, key=lambda name: abs(expected[name])).split("/")
    there = splice.dictionary(site)
    _, cache = splice.model.run_with_cache(other)
    value = there.encode(cache[there.hook_in], cache[there.hook_out])[0, int(pos), int(index)]

    def put(x, hook=None):
        x[:, int(pos), int(index)] = value
        return x

    model = SplicedModel(splice, "linear")
    changed = model.run_with_hooks(tokens, fwd_hooks=[(model.names[site], put)])[0, -1]
    lost = (model(tokens)[0, -1] - changed).detach()
    assert expected[f"{site}/{pos}/{index}"] == pytest.approx(float(lost[4] - lost[9]), abs=1e-9)


def test_only_some_features_are_patched(splice, prompt) -> None:
    from tl_sparse.tracing import LogitDiff, baseline_scores

    root, tokens = LogitDiff(4, 9), prompt[:, :4]
    every = baseline_scores(splice, tokens, root, "exact")
    only = every.iloc[[7, len(every) - 2]]
    found = baseline_scores(splice, tokens, root, "exact", only=only)
    assert found["id"].tolist() == only["id"].tolist()
    assert float((found["score"].to_numpy() - only["score"]).abs().max()) < 1e-12
    for wrong in ({"pos": 99}, {"index": 999}, {"site": "3.mlp"}, {"prompt": 1}, {"pos": -1}):
        with pytest.raises(ValueError, match="none of the features that are active"):
            baseline_scores(splice, tokens, root, "exact", only=only.assign(**wrong))


def test_eap_ig_is_the_mean_gradient_along_the_embeddings(splice, prompt) -> None:
    """Against finite differences of one feature at each step of a plain loop."""
    from tl_sparse.tracing import Logit, SplicedModel, baseline_scores

    tokens, other, steps = prompt[:, :4], torch.tensor([[3, 7, 8, 12]]), 3
    found = baseline_scores(splice, tokens, Logit(4), "eap_ig", other=other, steps=steps,
                            batch_size=2).set_index("id")["score"]  # fmt: skip
    name = found[found.index.str.startswith("0.mlp/2")].abs().idxmax()
    site, pos, index = name.split("/")
    model = SplicedModel(splice, "spliced")
    from_, to = (splice.model.W_E[row].detach() for row in (other, tokens))
    mean = 0.0
    for step in range(steps):

        def value(change, share=step / steps):
            def put(x, hook=None):
                x[:, int(pos), int(index)] += change
                return x

            hooks = [("hook_embed", lambda x, hook=None: from_ + share * (to - from_)),
                     (model.names[site], put)]  # fmt: skip
            return float(model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1, 4].detach())

        mean += (value(1e-6) - value(-1e-6)) / 2e-6 / steps
    there = splice.dictionary(site)
    at = []
    for text in (tokens, other):
        _, cache = splice.model.run_with_cache(text)
        features = there.encode(cache[there.hook_in], cache[there.hook_out])
        at.append(float(features[0, int(pos), int(index)].detach()))
    assert found[name] == pytest.approx(mean * (at[0] - at[1]), rel=1e-5)
    assert abs(found[name]) > 1e-3
    apart = baseline_scores(splice, tokens, Logit(4), "gradient", other=other)
    assert float((apart.set_index("id")["score"] - found).abs().max()) > 1e-3


def test_refusals(splice, prompt) -> None:
    from tl_sparse.tracing import AttentionScore, Logit, baseline_scores

    for other in (prompt[:, :3], prompt.expand(2, -1)):
        with pytest.raises(ValueError, match="as many prompts, each with as many tokens"):
            baseline_scores(splice, prompt, Logit(4), "exact", other=other)
    with pytest.raises(ValueError, match="linear world"):
        baseline_scores(splice, prompt, Logit(4), "eap_ig", world="linear")
    with pytest.raises(ValueError, match="at least 1"):
        baseline_scores(splice, prompt, Logit(4), "ig", steps=0)

    with pytest.raises(ValueError, match="roots of the logits"):
        baseline_scores(splice, prompt, AttentionScore(0, 0, 1, 0), "exact")
