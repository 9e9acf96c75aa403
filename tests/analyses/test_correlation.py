import math

import numpy as np
import pandas as pd
import pytest
import torch

from tl_sparse.analyses import token_loss_correlation, token_losses


@pytest.fixture
def text():
    return torch.randint(3, 30, (6, 10), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("batch_size", [4, 64])
def test_token_losses_are_the_models_own(small_model, text, batch_size):
    model = small_model("together")
    expected = model(text, return_type="loss", loss_per_token=True)
    found = token_losses(model, text, batch_size=batch_size)
    torch.testing.assert_close(found, expected.detach())


def test_token_losses_see_the_hooks(small_model, text):
    model = small_model()
    hooks = [("blocks.1.hook_resid_post", lambda x, hook: torch.zeros_like(x))]
    changed = token_losses(model, text, hooks)
    assert not torch.allclose(changed, token_losses(model, text))


def test_a_model_correlates_perfectly_with_itself(small_model, text):
    model = small_model()
    found = token_loss_correlation(model, model, text)
    assert found.pearson == pytest.approx(1.0)
    assert found.spearman == pytest.approx(1.0)
    assert found.interval == pytest.approx((1.0, 1.0))


def test_the_numbers_are_numpys_and_pandas(small_model, text):
    model, other = small_model(), small_model("relu", seed=9)
    found = token_loss_correlation(model, other, text, names=("one", "two"))
    a, b = found.losses_a.flatten().numpy(), found.losses_b.flatten().numpy()
    assert found.pearson == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    table = pd.DataFrame({"a": a, "b": b})
    assert found.spearman == pytest.approx(table.corr(method="spearman").iloc[0, 1], abs=1e-6)
    assert found.interval[0] < found.pearson < found.interval[1]


def test_the_interval_is_of_resampled_sequences(small_model, text):
    model, other = small_model(), small_model("relu", seed=9)
    found = token_loss_correlation(model, other, text, resamples=20, seed=4)
    drawn = torch.randint(6, (20, 6), generator=torch.Generator().manual_seed(4))
    each = [
        np.corrcoef(found.losses_a[rows].flatten(), found.losses_b[rows].flatten())[0, 1]
        for rows in drawn
    ]
    assert found.interval == pytest.approx(np.quantile(each, [0.025, 0.975]), abs=1e-5)
    single = token_loss_correlation(model, other, text[:1])
    assert all(map(math.isnan, single.interval))


def test_table_and_figure_hold_every_token(small_model, text):
    model, other = small_model(), small_model("relu", seed=9)
    found = token_loss_correlation(model, other, text, names=("<one>", "two"))
    frame = found.to_dataframe()
    assert len(frame) == 6 * 9
    row = frame[(frame["sequence"] == 2) & (frame["position"] == 4)].iloc[0]
    assert row["loss_a"] == found.losses_a[2, 3].item()
    assert row["loss_b"] == found.losses_b[2, 3].item()
    figure = found.to_plotly(max_points=10)
    assert 0 < len(figure.data[0].x) <= 10
    assert "<one>" not in found._repr_html_()


def test_models_of_other_texts_are_refused(small_model, make_tokenizer, text):
    with pytest.raises(ValueError, match="30 and 31 tokens"):
        token_loss_correlation(small_model(), small_model(d_vocab=31), text)
    other = make_tokenizer()
    other.add_tokens(["another"])
    models = small_model(tokenizer=make_tokenizer()), small_model()
    models[1].tokenizer = other
    with pytest.raises(ValueError, match="tokenizers differ"):
        token_loss_correlation(*models, text)


def test_nothing_to_predict_is_an_error(small_model):
    with pytest.raises(ValueError, match="at least 2"):
        token_losses(small_model(), torch.zeros(3, 1, dtype=torch.long))
