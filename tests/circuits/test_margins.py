import pytest
import torch

from tl_sparse.circuits import answer_margins
from tl_sparse.circuits.margins import trimmed


def test_trimming_drops_padding_only(marks):
    batch = marks.batch(16, split="train", seed=0)
    shortest = int(batch.last.min())
    rows = batch.last[::2].argmin()
    short = trimmed(batch.pairs(int(rows), int(rows) + 1))
    assert short.tokens.shape[1] == shortest + 1 < batch.tokens.shape[1]
    assert (short.tokens != marks.tokenizer.pad_token_id).all()
    assert torch.equal(trimmed(batch).tokens, batch.tokens)


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_margins_are_the_logit_differences_at_the_last_token(request, planted, marks, kind):
    model = planted(bigram_table="learned")[0]
    if kind == "dense":
        model = request.getfixturevalue("dense_planted")[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    batch = marks.batch(5, split="train", seed=1)
    assert len(set(batch.last.tolist())) > 1
    margins = answer_margins(model, batch)
    logits = model(batch.tokens, return_type="logits")
    for i in range(10):
        right, wrong = (3, 4) if i % 2 == 0 else (4, 3)
        last = logits[i, int(batch.last[i])]
        assert float(margins[i]) == pytest.approx(float(last[right] - last[wrong]), abs=1e-4)
