"""The table of paths: against single hybrid passes, exact on a model bridged to itself."""

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.bridges import BridgedPair, Bridges, BridgesConfig, fit_bridges, path_table
from tl_sparse.bridges.paths import path_of


@pytest.fixture
def pair(small_model):
    """Two models of other widths with random bridges."""
    dense, sparse = small_model("standard"), small_model(d_model=12, n_heads=3)
    return BridgedPair(dense, sparse, Bridges(BridgesConfig.of(dense, sparse)))


def kl(theirs, mine):
    """KL divergence of every token's distribution, in nats."""
    logs = [x.log_softmax(-1) for x in (mine, theirs)]
    return F.kl_div(*logs, reduction="none", log_target=True).sum(-1)


def test_every_paths_kl_and_loss_are_those_of_its_hybrid_pass(pair, tokens):
    table = path_table(pair, tokens, batch_size=2, progress=False)
    kinds = [row.kind for row in table.rows]
    assert [kinds.count(k) for k in ("dense", "sparse", "d→s", "s→d", "d→s→d", "s→d→s")] == [
        1, 1, 5, 5, 10, 10,
    ]  # fmt: skip
    dense, sparse = pair(tokens, "dense"), pair(tokens, "sparse")
    for row, values in zip(table.rows, table.values, strict=True):
        if row.kind.startswith("mean"):
            continue
        logits = pair(tokens, path_of(row))
        ce = F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
        expected = [x.mean(1) for x in (kl(dense, logits), kl(sparse, logits), ce)]
        torch.testing.assert_close(values, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_anchors_run_on_from_the_mean_stream(pair, tokens):
    table = path_table(pair, tokens, back="none", progress=False)
    rows = [(row.kind, row.site) for row in table.rows]
    dense = pair(tokens, "dense")
    for side, kind in (("dense", "mean→d"), ("sparse", "mean→s")):
        hook = "blocks.1.hook_resid_mid"
        _, cache = pair.model(side).run_with_cache(tokens)
        mean = cache[hook].mean((0, 1))
        at_mean = [(hook, lambda x, hook, mean=mean: mean.expand_as(x))]
        logits = pair.model(side).run_with_hooks(tokens, fwd_hooks=at_mean)
        found = table.values[rows.index((kind, "1.mid")), 0]
        torch.testing.assert_close(found, kl(dense, logits).mean(1), atol=1e-5, rtol=1e-4)


def test_a_model_bridged_to_itself_has_no_divergence_at_all(small_model, tokens):
    model = small_model("together")
    table = path_table(BridgedPair(model, model, Bridges.identity(model)), tokens, progress=False)
    own = [i for i, row in enumerate(table.rows) if not row.kind.startswith("mean")]
    assert len(own) == 32
    assert not table.values[own, :2].any()
    loss = model(tokens, return_type="loss", loss_per_token=True).mean(1)
    assert torch.equal(table.values[own, 2], table.values[:1, 2].expand(len(own), -1))
    torch.testing.assert_close(table.values[0, 2], loss)
    assert (table.values[[i for i in range(len(table.rows)) if i not in own], 0] > 0).all()


def test_only_the_tokens_that_count_are_measured(pair, many_tokens):
    cut = path_table(pair, many_tokens[:4, :9], back="none", skip=1, progress=False)
    padded = torch.cat([many_tokens[:4, :9], torch.full((4, 3), 4)], 1)
    last = torch.full((4,), 8)
    same = path_table(pair, padded, back="none", skip=1, last=last, batch_size=3, progress=False)
    assert cut.n_tokens.tolist() == same.n_tokens.tolist() == [[8, 7]] * 4
    torch.testing.assert_close(same.values, cut.values, atol=1e-5, rtol=1e-4)
    frame = cut.to_dataframe()
    assert frame["kl"][1] == pytest.approx(float(cut.values[1, 0].mean()), rel=1e-5)


def test_other_bridges_stand_beside_the_pairs_own(pair, many_tokens):
    fitted = fit_bridges(pair.dense, pair.sparse, many_tokens, progress=False)
    table = path_table(
        pair, many_tokens[:4], others={"ridge": fitted.bridges}, back="none", progress=False
    )
    sites = table.by_site()
    assert list(sites.index) == list(pair.sites)
    assert {"d→s", "d→s, ridge", "mean→s", "s→d", "s→d, ridge", "mean→d"} == set(sites.columns)
    ridge = BridgedPair(pair.dense, pair.sparse, fitted.bridges)
    alone = path_table(ridge, many_tokens[:4], back="none", progress=False)
    assert sites["s→d, ridge"].tolist() == pytest.approx(alone.by_site()["s→d"].tolist())
    assert (sites["s→d, ridge"] < sites["s→d"]).all()
    with pytest.raises(ValueError, match="'own' is taken"):
        path_table(pair, many_tokens, others={"own": fitted.bridges})


def test_tables_show_themselves(pair, tokens):
    table = path_table(pair, tokens, back="next", progress=False)
    assert repr(table).startswith("PathTable(30 paths over 2 examples; KL(dense ‖ sparse) ")
    assert "d→s" in table._repr_html_()
    assert len(table.examples()) == 60
    assert len(table.to_plotly().data) == 4
    with pytest.raises(ValueError, match="choose from kl, kl_sparse, ce"):
        table.by_site("loss")
