import math

import pytest
import torch
from torch import nn

from tl_sparse import tasks
from tl_sparse.tasks import evaluate_task, select_last, task_accuracy, task_losses


class Oracle(nn.Module):
    """Gives the right answer of every prompt it was told about a logit of `logit_diff`."""

    def __init__(self, size, batch, logit_diff):
        super().__init__()
        self.size = size
        self.logit_diff = nn.Parameter(torch.tensor(logit_diff))
        self.known = {
            tuple(row[: int(last) + 1].tolist()): int(answer)
            for row, last, answer in zip(batch.tokens, batch.last, batch.correct_token, strict=True)
        }
        self.calls = []

    def forward(self, tokens, return_type):
        assert return_type == "logits"
        assert not torch.is_grad_enabled()
        self.calls.append(len(tokens))
        logits = torch.zeros(*tokens.shape, self.size)
        for i, row in enumerate(tokens.tolist()):
            for stop in range(1, len(row) + 1):
                answer = self.known.get(tuple(row[:stop]))
                if answer is not None:
                    logits[i, stop - 1, answer] = self.logit_diff
        return logits


@pytest.fixture
def bound(tokenizer):
    return tasks.get("bracket_counting", tokenizer)


def test_losses_are_the_two_way_cross_entropy(bound, tokenizer):
    batch = bound.batch(4, split="train", seed=0)
    logits = torch.randn(8, len(tokenizer))
    losses = task_losses(logits, batch)
    for i in range(8):
        two = logits[i, [int(batch.correct_token[i]), int(batch.incorrect_token[i])]]
        assert losses[i].item() == pytest.approx(-two.log_softmax(0)[0].item(), abs=1e-6)
    assert task_accuracy(logits, batch).tolist() == (losses < math.log(2)).tolist()


def test_equal_logits_are_chance_and_not_correct(bound, tokenizer):
    batch = bound.batch(4, split="train", seed=0)
    logits = torch.zeros(8, len(tokenizer))
    assert task_losses(logits, batch).tolist() == pytest.approx([math.log(2)] * 8)
    assert not task_accuracy(logits, batch).any()


def test_losses_can_be_differentiated(bound, tokenizer):
    batch = bound.batch(2, split="train", seed=0)
    logits = torch.zeros(4, len(tokenizer), requires_grad=True)
    task_losses(logits, batch).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, batch.correct_token[0]].item() == pytest.approx(-0.5)
    assert logits.grad[0, batch.incorrect_token[0]].item() == pytest.approx(0.5)


def test_select_last_takes_the_last_real_position(bound):
    batch = bound.batch(4, split="train", seed=0)
    positions = torch.arange(batch.tokens.shape[1]).float().expand(8, -1)[..., None]
    assert torch.equal(select_last(positions, batch)[:, 0].long(), batch.last)


@pytest.mark.parametrize(("logit_diff", "accuracy"), [(5.0, 1.0), (-5.0, 0.0)])
def test_a_model_that_knows_is_right_and_one_that_inverts_is_wrong(
    bound, tokenizer, logit_diff, accuracy
):
    batch = bound.batch(100, split="held_out", seed=4)
    model = Oracle(len(tokenizer), batch, logit_diff)
    result = evaluate_task(model, bound, n_pairs=100, split="held_out", seed=4)
    assert result.accuracy == accuracy
    assert result.loss == pytest.approx(math.log1p(math.exp(-logit_diff)), rel=1e-4)
    assert result.prompts == batch.prompts
    assert sum(model.calls) == 200
    assert max(model.calls) <= 128


def test_the_table_has_a_row_per_prompt(bound, tokenizer):
    batch = bound.batch(3, split="train", seed=0)
    result = evaluate_task(Oracle(len(tokenizer), batch, 5.0), bound, 3, split="train", seed=0)
    frame = result.to_dataframe()
    assert list(frame.columns) == [
        *("task", "split", "pair", "member", "prompt", "answer", "loss", "correct"),
    ]
    assert frame["pair"].tolist() == [0, 0, 1, 1, 2, 2]
    assert frame["member"].tolist() == list("ABABAB")
    assert frame["answer"].tolist() == list(bound.answers) * 3
    assert frame["loss"].mean() == pytest.approx(result.loss)
    assert frame["correct"].all()


def test_any_callable_will_do(bound, tokenizer):
    def model(tokens, return_type):
        return torch.zeros(*tokens.shape, len(tokenizer))

    assert evaluate_task(model, bound, 4).loss == pytest.approx(math.log(2))
