"""Other scores of the same nodes."""

import pytest
import torch


@pytest.fixture(scope="module")
def splice(own_model, spliced):
    return spliced(own_model)


@pytest.mark.parametrize("method", ["gradient", "ig", "exact"])
def test_in_the_linear_world_all_are_the_attribution(splice, prompt, method) -> None:
    from tl_sparse.tracing import LogitDiff, baseline_scores

    root, tokens = LogitDiff(4, 9), prompt[:, :4]
    expected = baseline_scores(splice, tokens, root, "attribution").set_index("id")["score"]
    found = baseline_scores(splice, tokens, root, method, world="linear").set_index("id")["score"]
    assert list(found.index) == list(expected.index)
    assert float((found - expected).abs().max()) < 1e-9
    assert float(expected.abs().max()) > 0.1
    other = baseline_scores(splice, tokens, root, method, world="spliced").set_index("id")["score"]
    assert float((other - expected).abs().max()) > 1e-3


def test_integrated_gradients_of_a_site_sum_to_what_the_site_adds(splice, prompt) -> None:
    from tl_sparse.tracing import Logit, SplicedModel, baseline_scores

    scores = baseline_scores(splice, prompt, Logit(4), "ig", steps=200, batch_size=100)
    last = scores[scores["id"].str.startswith("1.mlp")]["score"].sum()
    model = SplicedModel(splice, "spliced")
    hooks = [(model.names["1.mlp"], lambda x, hook=None: torch.zeros_like(x))]
    lost = (model(prompt) - model.run_with_hooks(prompt, fwd_hooks=hooks))[0, -1, 4]
    assert last == pytest.approx(float(lost.detach()), rel=0.02)


def test_refusals(splice, prompt) -> None:
    from tl_sparse.tracing import AttentionScore, Logit, baseline_scores

    with pytest.raises(ValueError, match="one prompt"):
        baseline_scores(splice, prompt.expand(2, -1), Logit(4), "exact")
    with pytest.raises(ValueError, match="roots of the logits"):
        baseline_scores(splice, prompt, AttentionScore(0, 0, 1, 0), "exact")
