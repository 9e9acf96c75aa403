"""Ridge bridges: against scikit-learn, on a stream that is another one turned, and errors."""

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from tl_sparse.bridges import BridgedPair, BridgesConfig, fit_bridges
from tl_sparse.bridges.fit import held_out_rows


@pytest.fixture
def unlike(small_model):
    """Two models of other widths, which were made independently."""
    return small_model("standard", seed=1), small_model(d_model=12, n_heads=3)


@pytest.mark.parametrize("map_name", ["encoder", "decoder"])
def test_a_fitted_bridge_is_scikit_learns_ridge(unlike, many_tokens, map_name):
    dense, sparse = unlike
    fitted = fit_bridges(dense, sparse, many_tokens, penalties=(1e-3, 0.1), progress=False)
    held = held_out_rows(30, 0.1)
    assert held.sum() == 3
    assert (fitted.n_tokens, fitted.n_held_out) == (27 * 12, 3 * 12)
    site = fitted.bridges.site("1.mid")
    x, y = (
        model.run_with_cache(many_tokens)[1][hook].detach().double()
        for model, hook in ((dense, site.dense_hook), (sparse, site.sparse_hook))
    )
    encoder, decoder = fitted.bridges.encoders[3], fitted.bridges.decoders[3]
    ours = encoder.W_enc, encoder.b_enc
    if map_name == "decoder":
        x, y, ours = y, x, (decoder.W_dec, decoder.b_dec)
    data = [stream[rows].flatten(0, 1).numpy() for rows in (~held, held) for stream in (x, y)]
    rows = fitted.penalties.query("site == '1.mid' and map == @map_name")
    assert rows["fvu"].idxmin() == rows.index[rows["chosen"]].item()
    for row in rows.itertuples():
        theirs = Ridge(alpha=row.alpha).fit(*data[:2])
        guess = theirs.predict(data[2])
        r2 = r2_score(data[3], guess, multioutput="variance_weighted")
        assert row.fvu == pytest.approx(1 - r2, rel=1e-6)
        if row.chosen:
            for mine, its in zip(ours, (theirs.coef_.T, theirs.intercept_), strict=True):
                torch.testing.assert_close(
                    mine.detach().double(), torch.tensor(its), rtol=1e-5, atol=1e-6
                )


def test_a_known_linear_image_is_recovered(rotated, many_tokens):
    model, other, turn = rotated()
    torch.testing.assert_close(model(many_tokens), other(many_tokens), atol=1e-4, rtol=1e-4)
    fitted = fit_bridges(model, other, many_tokens, penalties=(0.0,), progress=False)
    for encoder, decoder in zip(fitted.bridges.encoders, fitted.bridges.decoders, strict=True):
        # where streams span fewer directions than channels the rest is free, and stays zero
        assert (encoder.W_enc @ decoder.W_dec - torch.eye(16)).abs().max() < 1e-3
        assert (encoder.W_enc - turn).abs().max() < 1e-3
        assert encoder.b_enc.abs().max() < 1e-3
    assert fitted.to_dataframe()["fvu"].max() < 1e-9


def test_batches_padding_and_skipped_positions_change_only_what_they_should(unlike, many_tokens):
    kwargs = {"penalties": (1e-2,), "progress": False}
    whole = fit_bridges(*unlike, many_tokens, batch_size=30, **kwargs)
    split = fit_bridges(*unlike, many_tokens, batch_size=7, **kwargs)
    shorter = torch.cat([many_tokens[:, :9], torch.full((30, 3), 4)], 1)
    cut = fit_bridges(*unlike, many_tokens[:, :9], **kwargs)
    padded = fit_bridges(*unlike, shorter, last=torch.full((30,), 8), **kwargs)
    skipped = fit_bridges(*unlike, many_tokens, skip=2, **kwargs)
    assert skipped.n_tokens == 27 * 10
    for name, weight in whole.bridges.state_dict().items():
        torch.testing.assert_close(split.bridges.state_dict()[name], weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            padded.bridges.state_dict()[name], cut.bridges.state_dict()[name], atol=1e-5, rtol=1e-4
        )
        assert not torch.allclose(skipped.bridges.state_dict()[name], weight, atol=1e-3)


def test_models_of_different_depths_are_bridged_where_their_layers_go_together(
    small_model, many_tokens
):
    dense, sparse = small_model(n_layers=4), small_model(n_layers=2)
    fitted = fit_bridges(dense, sparse, many_tokens, progress=False)
    assert [s.dense for s in fitted.bridges.sites] == [0, 1, 4, 5, 8]
    pair = BridgedPair(dense, sparse, fitted.bridges)
    encoded = pair.encode(dense.run_with_cache(many_tokens)[1])
    assert list(encoded) == [s.sparse_hook for s in fitted.bridges.sites]
    config = BridgesConfig.of(dense, sparse, layer_map=((1, 0), (3, 1)), mid=False)
    assert [s.name for s in config.sites] == ["0.pre", "1.pre", "final"]
    assert [s.dense for s in config.sites] == [2, 6, 8]
    for wrong in (((0, 0), (0, 1)), ((4, 0),), ((0, 1), (1, 0))):
        with pytest.raises(ValueError, match="layer_map="):
            BridgesConfig.of(dense, sparse, layer_map=wrong)


def test_bridges_know_the_models_that_they_were_fitted_to(unlike, many_tokens):
    dense, sparse = unlike
    fitted = fit_bridges(dense, sparse, many_tokens, progress=False)
    BridgedPair(dense, sparse, fitted.bridges)
    with torch.no_grad():
        sparse.embed.W_E[3, 0] += 1
    with pytest.raises(ValueError, match="made for another sparse model"):
        BridgedPair(dense, sparse, fitted.bridges)
    with pytest.raises(ValueError, match="are for a dense model of 2 layers of 16 channels"):
        BridgedPair(sparse, sparse, fitted.bridges)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalties": (-1.0,)}, "none negative"),
        ({"held_out": 0.0}, "hold out up to half"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"skip": 12}, "no position is left"),
        ({"last": torch.full((30,), 12)}, "sequences have 12 positions"),
    ],
)
def test_what_cannot_be_fitted_is_refused(unlike, many_tokens, changes, message):
    with pytest.raises(ValueError, match=message):
        fit_bridges(*unlike, many_tokens, progress=False, **changes)


def test_nan_weights_are_refused(unlike, many_tokens):
    with torch.no_grad():
        unlike[0].embed.W_E[5, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_bridges(*unlike, many_tokens, progress=False)


def test_results_show_themselves(unlike, many_tokens):
    fitted = fit_bridges(*unlike, many_tokens, progress=False)
    assert repr(fitted) == "FittedBridges(5 sites; 324 tokens fitted, 36 held out)"
    assert list(fitted.to_dataframe().columns) == ["site", "map", "penalty", "alpha", "fvu"]
    assert len(fitted.to_dataframe()) == 10
    assert "FVU, encoder" in fitted._repr_html_()
