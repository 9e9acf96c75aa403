import pytest
import torch

from tl_sparse.studies.frontier import token_loss


def test_the_loss_of_a_transformer_lens_model_is_the_mean_cross_entropy(dense_model):
    tokens = torch.randint(3, 30, (70, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 1
    logits = dense_model(tokens, return_type="logits")
    rows = logits[:, :-1].flatten(0, 1)
    by_hand = torch.nn.functional.cross_entropy(rows, tokens[:, 1:].flatten())
    assert token_loss(dense_model, tokens) == pytest.approx(by_hand.item(), rel=1e-5)
