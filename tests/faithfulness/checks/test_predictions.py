from dataclasses import replace

import numpy as np
import pytest
import torch

from tl_sparse import SparseTransformer, tasks
from tl_sparse.ablation import activation_means
from tl_sparse.circuits import PruningConfig
from tl_sparse.circuits.pruning_run import build_circuit, set_up
from tl_sparse.faithfulness import EvaluationConfig, under_test
from tl_sparse.faithfulness.checks.predictions import (
    agreement_of_signs,
    correlation_of_changes,
    correlation_of_moments,
    diluted_prompts,
    predictions,
)


def moments(x, y):
    return torch.stack([x, y, x * x, y * y, x * y]).mean(1)[None]


def test_correlations_are_numpys():
    x, y = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = y + 0.5 * x
    expected = np.corrcoef(x, y)[0, 1]
    assert float(correlation_of_moments(moments(x, y))) == pytest.approx(expected)
    assert float(correlation_of_changes(torch.cat([x, y])[None])) == pytest.approx(expected)
    changes = torch.cat([x - x[0], y - y[0]])[None]
    assert float(correlation_of_changes(changes)) == pytest.approx(expected)


def test_what_does_not_change_predicts_nothing():
    x, y = torch.randn(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(correlation_of_moments(moments(torch.full_like(x, 0.3), y))) == 0
    assert float(correlation_of_changes(torch.cat([x * 0 + 2, y])[None])) == 0


def test_signs_are_compared_with_the_first_length():
    means = torch.tensor([[1.0, 2.0, 0.0, 3.0, 5.0, 6.0, 4.0, 4.0]])
    assert float(agreement_of_signs(means)) == pytest.approx(2 / 3)


def test_a_task_without_variants_is_said_so(whole):
    found = predictions(whole)
    assert not found.measures
    assert found.notes == (
        "distractor: the task marked has no such variant",
        "dilution: the task marked has no such variant",
    )


@pytest.fixture(scope="module")
def bundled():
    """A circuit of the bundled model's first layer and half of its second, and a few prompts."""
    model = SparseTransformer.from_pretrained("python-sparse")
    task = tasks.get("bracket_brace", model.tokenizer)
    tokens = task.batch(16, split="train", seed=0).tokens
    means = activation_means(model, tokens)
    config = PruningConfig(
        headroom=0.0, steps=4, selection_pairs=8, report_pairs=8, must_solve=False
    )
    kept = torch.arange(means.index.n_nodes) < 3 * means.index.n_nodes // 4
    problem = set_up(model, task, config, means=means)
    circuit = build_circuit(problem, kept, kept.float(), n_active=int(kept.sum()))
    config = EvaluationConfig(pairs=4, draws=100, controls=2)
    return under_test(model, circuit, task, config)


def of_nodes(test, kept):
    return replace(test, circuit=replace(test.circuit, kept=kept))


def test_the_whole_model_predicts_itself_and_nothing_predicts_nothing(bundled):
    every = predictions(of_nodes(bundled, torch.ones_like(bundled.kept)))
    assert not every.notes
    for name in ("prediction_agreement", "sign_agreement"):
        for variant in ("distractor", "dilution"):
            m = every.measure(name, variant)
            assert m.value == pytest.approx(1, abs=1e-5)
            assert m.low == pytest.approx(1, abs=1e-5)
    nothing = predictions(of_nodes(bundled, torch.zeros_like(bundled.kept)))
    assert nothing.measure("prediction_agreement", "distractor").value == pytest.approx(0, abs=0.5)


def test_changes_are_those_of_plain_runs(bundled):
    found = predictions(bundled)
    model, table = bundled.model, found.tables["distractor"]
    tokenizer = model.tokenizer
    hooks = bundled.circuit.hooks()
    posed = tasks.get("bracket_brace", tokenizer, model.config.n_ctx, variant="distractor")
    batch = posed.batch(32, split="held_out", seed=0)
    assert table["prompt"].tolist() == list(batch.prompts)
    for row in range(0, 12, 3):
        text = batch.prompts[row]
        comment = next(line for line in text.splitlines(True) if line.startswith("# "))
        for prompt, column in ((text, ""), (text.replace(comment, "", 1), "_plain")):
            ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
            for run, fwd_hooks in (("model", []), ("circuit", hooks)):
                with torch.no_grad():
                    logits = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=fwd_hooks)[0, -1]
                logit_diff = float(
                    logits[batch.correct_token[row]] - logits[batch.incorrect_token[row]]
                )
                assert table[run + column][row] == pytest.approx(logit_diff, abs=1e-3)
    change = {run: table[run] - table[f"{run}_plain"] for run in ("model", "circuit")}
    m = found.measure("prediction_agreement", "distractor")
    assert m.value == pytest.approx(np.corrcoef(change["model"], change["circuit"])[0, 1], abs=1e-4)
    assert m.examples.tolist() == pytest.approx(change["circuit"].tolist(), abs=1e-4)
    signs = (np.sign(change["model"]) == np.sign(change["circuit"])).mean()
    assert found.measure("sign_agreement", "distractor").value == pytest.approx(signs)
    lengths = found.tables["dilution"]
    assert found.measure("prediction_agreement", "dilution").value == pytest.approx(
        np.corrcoef(lengths["model"], lengths["circuit"])[0, 1], abs=1e-4
    )
    for name in ("prediction_agreement", "sign_agreement"):
        for variant in ("distractor", "dilution"):
            m = found.measure(name, variant)
            assert m.low <= m.value <= m.high
            assert m.null_low <= m.null <= m.null_high


def test_only_lengths_that_fit_are_run(bundled):
    found = diluted_prompts(bundled)
    assert list(found)[:3] == [1, 2, 4]
    assert 3 <= len(found) < 10
    assert max(int(batch.last.max()) for batch in found.values()) < 64
    short = replace(bundled, task=tasks.get("bracket_counting", bundled.model.tokenizer))
    assert max(diluted_prompts(short)) < 40
