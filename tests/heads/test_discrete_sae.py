"""The autoencoder: the published procedure step by step, and what is corrected in it."""

import math

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.heads import (
    Component,
    ContrastiveDataset,
    DiscreteSAE,
    HeadOutputs,
    agreement,
    extract_head_outputs,
    identify,
)


def outputs_of(values, n_positive):
    components = tuple(Component(0, "head", i) for i in range(values.shape[1]))
    positive = torch.arange(len(values)) < n_positive
    return HeadOutputs(values, None, components, positive, "last", "made", 0.0)


def planted(n=40, components=12, width=16, seed=0):
    """One component that writes in one direction on positive prompts, in another on negative ones;
    the others write noise."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2 * n, components, width, generator=generator)
    directions = F.normalize(torch.randn(2, width, generator=generator), dim=1) * width**0.5
    values[:n, 7] = directions[0] + 0.3 * values[:n, 7]
    values[n:, 7] = directions[1] + 0.3 * values[n:, 7]
    return outputs_of(values, n)


def published_loss(x, W_e, b_e, W_d, b_t, lam):
    """As part of the paper's code computes it, on rows [prompt, head, d]."""
    f = F.relu((x - b_t) @ W_e.T + b_e)
    x_hat = f @ W_d.T + b_t
    return F.mse_loss(x_hat, x) + lam * f.abs().sum(-1).mean()


def test_paper_mode_is_the_published_training_step_by_step():
    outputs = planted()
    start = DiscreteSAE.fit(outputs, "paper", n_codes=6, epochs=0, n_train=5, seed=3)
    sae = DiscreteSAE.fit(outputs, "paper", n_codes=6, epochs=4, n_train=5, seed=3, lam=0.05)
    assert torch.equal(start.rows, sae.rows)
    x = outputs.values[sae.rows]
    weights = [start.W_enc[0], start.b_enc[0], start.W_dec[0], start.bias[0]]
    weights = [w.clone().requires_grad_() for w in weights]
    adam = torch.optim.Adam(weights, lr=1e-3)
    losses = []
    for _ in range(4):
        for i in (0, 2):  # along the last dimension, which of the decoder is that of the units
            weights[i].data = F.normalize(weights[i].data, dim=-1)
        loss = published_loss(x, *weights, lam=0.05)
        losses.append(float(loss))
        adam.zero_grad()
        loss.backward()
        for i in (0, 2):
            w, gradient = weights[i].data, weights[i].grad
            gradient -= (gradient * w).sum(-1, keepdim=True) * w
        adam.step()
    assert sae.losses.tolist() == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(sae.W_enc[0], F.normalize(weights[0].data, dim=-1))
    torch.testing.assert_close(sae.W_dec[0], F.normalize(weights[2].data, dim=-1))
    torch.testing.assert_close(sae.bias[0], weights[3].data)


def test_the_start_is_the_published_one():
    sae = DiscreteSAE.fit(planted(), "paper", n_codes=500, epochs=0)
    assert sae.b_enc.abs().max() <= 1 / math.sqrt(16)
    assert float(sae.b_enc.std()) == pytest.approx(2 / math.sqrt(16) / math.sqrt(12), rel=0.1)
    assert bool((sae.bias == 0).all())
    torch.testing.assert_close(sae.W_enc.norm(dim=2), torch.ones(1, 500))


@pytest.mark.parametrize(("mode", "dim"), [("paper", 2), ("corrected", 1)])
@pytest.mark.parametrize("shared", [True, False])
def test_norms_are_one_and_training_lowers_the_loss(mode, dim, shared):
    outputs = planted()
    sae = DiscreteSAE.fit(outputs, mode, n_codes=20, epochs=40, shared=shared, lr=0.01)
    assert len(sae.W_enc) == (1 if shared else 12)
    torch.testing.assert_close(sae.W_enc.norm(dim=2), torch.ones(len(sae.W_enc), 20))
    norms = sae.W_dec.norm(dim=dim)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert sae.losses[-1] < 0.9 * sae.losses[0]
    x = outputs.values[sae.rows].transpose(0, 1)
    made, units = sae.reconstruct(x.reshape(1, -1, 16) if shared else x)
    loss = (made - x.reshape(made.shape)).square().mean((1, 2)) + 0.02 * units.sum(2).mean(1)
    assert float(loss.sum()) == pytest.approx(float(sae.losses[-1]), rel=0.05)


def test_own_autoencoders_are_those_of_each_component_alone():
    outputs = planted(components=8)
    both = DiscreteSAE.fit(outputs, n_codes=5, epochs=0, shared=False, seed=4)
    assert not torch.equal(both.W_enc[0], both.W_enc[1])
    codes = both.codes(outputs)
    units = torch.relu(torch.einsum("pcw,cuw->pcu", outputs.values, both.W_enc) + both.b_enc[None])
    expected = torch.where(units.amax(2) > 0, units.argmax(2), 5)
    assert torch.equal(codes.values[..., 0], expected)


def test_training_prompts_are_stratified_only_in_corrected_mode():
    outputs = outputs_of(torch.randn(100, 3, 8), 80)
    counts = {
        mode: [
            int(outputs.positive[DiscreteSAE.fit(outputs, mode, epochs=0, seed=s).rows].sum())
            for s in range(20)
        ]
        for mode in ("paper", "corrected")
    }
    assert set(counts["corrected"]) == {5}
    assert len(set(counts["paper"])) > 1
    assert sum(counts["paper"]) / 20 == pytest.approx(8, abs=1)  # of the union, whatever its labels
    few = outputs_of(torch.randn(12, 3, 8), 2)
    rows = DiscreteSAE.fit(few, epochs=0, n_train=10).rows
    assert len(rows.unique()) == 10
    assert int(few.positive[rows].sum()) == 2


def test_kinds_of_codes_by_hand():
    outputs = planted()
    sae = DiscreteSAE.fit(outputs, n_codes=10, epochs=0, seed=1)
    units = outputs.values @ sae.W_enc[0].T + sae.b_enc[0]
    assert torch.equal(sae.codes(outputs).values[..., 0], units.argmax(2))
    top = sae.codes(outputs, "top", 3).values
    for prompt, component in ((0, 0), (5, 7), (79, 11)):
        here = units[prompt, component]
        expected = [i for i in here.argsort(descending=True).tolist()[:3] if here[i] > 0]
        assert [i for i in top[prompt, component].tolist() if i >= 0] == expected
    sign = sae.codes(outputs, "sign", 4)
    expected = sum((units[..., i] > 0).long() * 2**i for i in range(4))
    assert sign.n_codes == 16
    assert torch.equal(sign.values[..., 0], expected)


def test_no_active_unit_is_unit_0_as_published_and_a_code_of_its_own_when_corrected():
    outputs = outputs_of(torch.zeros(4, 2, 8), 2)
    for mode, code in (("paper", 0), ("corrected", 30)):
        sae = DiscreteSAE.fit(outputs, mode, n_codes=30, epochs=0, n_train=2)
        sae.b_enc.fill_(-1.0)
        assert sae.codes(outputs).values.unique().tolist() == [code]
        assert sae.codes(outputs, "top", 3).values[0, 0].tolist() == [code, -1, -1]


def test_a_seed_decides_everything():
    outputs = planted()
    one, same, other = (DiscreteSAE.fit(outputs, epochs=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.W_enc, same.W_enc)
    assert torch.equal(one.rows, same.rows)
    assert not torch.equal(one.W_enc, other.W_enc)


@pytest.mark.parametrize("mode", ["paper", "corrected"])
@pytest.mark.parametrize("kind", ["argmax", "top", "sign"])
def test_a_planted_component_is_found_with_auc_1(mode, kind):
    outputs = planted()
    sae = DiscreteSAE.fit(outputs, mode, n_codes=20, epochs=30)
    found = identify(sae.codes(outputs, kind, 8), score="mi", permutations=500)
    judged = agreement(found.scores, ["L0H7"], found.components, found.named)
    assert judged.auc == 1.0
    assert judged.f1 == 1.0


def test_with_shuffled_labels_the_auc_is_a_coin():
    outputs, sums = planted(n=20, components=30), []
    codes = DiscreteSAE.fit(outputs, n_codes=20, epochs=10).codes(outputs)
    truth = torch.arange(30) % 2 == 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        labels = codes.positive[torch.randperm(40, generator=generator)]
        found = identify(codes, labels, score="unique", permutations=0)
        sums.append(agreement(found.scores, truth, found.components).auc)
    assert sum(sums) / 20 == pytest.approx(0.5, abs=0.06)


def test_a_head_planted_in_a_model_is_found_among_all(small_model):
    """Tokens 5 and 6 differ in channel 0 of the stream alone, which one head reads."""
    model = small_model(n_layers=2, normalization_type="RMS")
    with torch.no_grad():
        model.embed.W_E[6] = model.embed.W_E[5]
        model.embed.W_E[5, 0], model.embed.W_E[6, 0] = 2.0, -2.0
        for block in model.blocks:
            for weight in (block.attn.W_Q, block.attn.W_K, block.attn.W_V):
                weight[:, 0] = 0.0
            block.mlp.W_in[0] = 0.0
            block.attn.W_O[..., 0] = 0.0
            block.mlp.W_out[:, 0] = 0.0
        model.embed.W_E[7:, 0] = 0.0
        model.blocks[1].attn.W_V[2] = 0.0
        model.blocks[1].attn.b_V[2] = 0.0
        model.blocks[1].attn.W_V[2, 0] = torch.tensor([30.0, -30.0, 30.0, -30.0])
    tokens = torch.randint(7, 30, (40, 8))
    positives, negatives = tokens.clone(), tokens.clone()
    positives[:, -1], negatives[:, -1] = 5, 6
    dataset = ContrastiveDataset.of("planted", model, positives, negatives)
    outputs = extract_head_outputs(model, dataset, "last")
    found = identify(DiscreteSAE.fit(outputs, n_codes=30).codes(outputs))
    assert [str(c) for c in found.named] == ["L1H2"]
    circuit = found.circuit(model, dataset)
    assert circuit.components[["layer", "head"]].values.tolist() == [[1, 2]]
    negative = dataset.prompts.tokens[~dataset.positive]
    _, cache = model.run_with_cache(negative)
    means = cache["blocks.1.attn.hook_z"].flatten(2).mean((0, 1))
    torch.testing.assert_close(circuit.means.values[16:], means)


def test_what_makes_no_sense_is_refused():
    outputs = planted()
    for wrong, message in (
        ({"mode": "best"}, "mode='best': choose from paper, corrected"),
        ({"n_codes": 1}, "n_codes=1"),
        ({"lam": -1.0}, "lam=-1.0"),
        ({"n_train": 100}, "n_train=100: there are 80 prompts"),
        ({"epochs": 3, "lr": 1e30, "lam": 1e30}, "training the autoencoder"),
    ):
        with pytest.raises(ValueError, match=message):
            DiscreteSAE.fit(outputs, **wrong)
    sae = DiscreteSAE.fit(outputs, epochs=0, n_codes=10)
    with pytest.raises(ValueError, match="kind='hash': choose from argmax, top, sign"):
        sae.codes(outputs, "hash")
    with pytest.raises(ValueError, match="k=11: codes of kind 'top' are of 1 to 10 units"):
        sae.codes(outputs, "top", 11)
    with pytest.raises(ValueError, match="do not fit an autoencoder of width 16"):
        sae.codes(outputs_of(torch.zeros(4, 2, 8), 2))
