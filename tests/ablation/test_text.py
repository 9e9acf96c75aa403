import pytest
import torch

from tl_sparse.ablation import activation_means
from tl_sparse.ablation.text import sequences_of
from tl_sparse.model.transformer import SparseTransformer


@pytest.fixture(scope="module")
def sparse():
    return SparseTransformer.from_pretrained("python-sparse")


def test_ids_stay_as_they_are(sparse):
    ids = torch.arange(6).reshape(2, 3)
    assert sequences_of(sparse, ids) is ids


def test_a_long_text_becomes_sequences_of_the_context_that_begin_with_bos(sparse):
    text = "value = [1, 2]\n" * 200
    rows = sequences_of(sparse, text)
    tokenizer = sparse.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert rows.shape == (len(ids) // 64, 64)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert rows[0].tolist() == ids[:64]
    assert rows[-1, 1:].tolist() == ids[-63:]


def test_a_short_text_is_one_row_and_documents_follow_each_other(sparse):
    tokenizer = sparse.tokenizer
    one, other = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in ("a = 1", "b"))
    bos = tokenizer.bos_token_id
    assert sequences_of(sparse, "a = 1").tolist() == [[bos, *one]]
    assert sequences_of(sparse, ["a = 1", "b"]).tolist() == [[bos, *one, bos, *other]]


def test_means_over_text_are_those_over_its_tokens(sparse):
    text = "for name in names:\n    print(name)\n" * 30
    means = activation_means(sparse, text)
    rows = sequences_of(sparse, text)
    assert torch.equal(means.values, activation_means(sparse, rows).values)
    assert means.n_tokens == rows.numel()


def test_what_is_no_text_or_cannot_be_read_is_refused(sparse):
    with pytest.raises(ValueError, match="the text has no tokens"):
        activation_means(sparse, "")
    with pytest.raises(TypeError):
        activation_means(sparse, [[1, 2]])
    model = SparseTransformer.from_pretrained("python-sparse")
    model.set_tokenizer(None)
    with pytest.raises(ValueError, match="the model has no tokenizer: give token ids"):
        activation_means(model, "a = 1")
