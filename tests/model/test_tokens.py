import numpy as np
import pytest
import torch

from tl_sparse import compat


@pytest.fixture
def model(small_model, make_tokenizer):
    return small_model(tokenizer=make_tokenizer())


def test_bos_is_prepended_as_the_config_or_the_call_says(small_model, make_tokenizer, model):
    assert model.to_tokens("w4 w5").tolist() == [[1, 4, 5]]
    assert model.to_tokens("w4 w5", prepend_bos=False).tolist() == [[4, 5]]
    other = small_model(tokenizer=make_tokenizer(), default_prepend_bos=False)
    assert other.to_tokens("w4 w5").tolist() == [[4, 5]]
    assert other.to_tokens("w4 w5", prepend_bos=True).tolist() == [[1, 4, 5]]


def test_padding_goes_to_the_side_asked_for(model):
    texts = ["w4 w5", "w6"]
    assert model.to_tokens(texts).tolist() == [[1, 4, 5], [1, 6, 0]]
    assert model.to_tokens(texts, padding_side="left").tolist() == [[1, 4, 5], [0, 1, 6]]


def test_the_tokenizers_own_padding_side_counts_unless_another_is_given(
    small_model, make_tokenizer
):
    tokenizer, texts = make_tokenizer(), ["w4 w5", "w6"]
    tokenizer.padding_side = "left"
    model = small_model(tokenizer=tokenizer)
    assert model.padding_side == "left"
    assert model.to_tokens(texts).tolist() == [[1, 4, 5], [0, 1, 6]]
    torch.testing.assert_close(model(texts)[1, 1:], model("w6")[0])
    model.set_tokenizer(tokenizer, default_padding_side="right")
    assert model.to_tokens(texts).tolist() == [[1, 4, 5], [1, 6, 0]]
    model.set_tokenizer(None)
    assert model.padding_side == "right"


def test_long_strings_are_cut_at_the_context_unless_told_not_to(model):
    text = " ".join(["w7"] * 20)
    assert model.to_tokens(text).shape == (1, 12)
    assert model.to_tokens(text, truncate=False).shape == (1, 21)


def test_without_a_pad_token_rows_are_padded_with_eos(small_model, make_tokenizer):
    """As TransformerLens pads them."""
    tokenizer = make_tokenizer(pad=None)
    model = small_model(tokenizer=tokenizer)
    assert model.to_tokens(["w4", "w5 w6"]).tolist() == [[1, 4, 2], [1, 5, 6]]
    assert tokenizer.pad_token is None
    tokenizer.eos_token = None
    assert model.to_tokens(["w4", "w5"]).shape == (2, 2)
    with pytest.raises(ValueError, match="need a tokenizer with a pad token or an EOS token"):
        model.to_tokens(["w4", "w5 w6"])


@pytest.mark.parametrize("pad", ["<pad>", "<bos>", "<eos>", None])
def test_the_mask_of_texts_is_their_lengths(small_model, make_tokenizer, pad):
    model = small_model(tokenizer=make_tokenizer(pad))
    texts = ["<bos> <pad> w5 <eos>", "<eos>", ""]
    for side, mask in (
        ("right", [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
        ("left", [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]),
    ):
        tokens, found = model.to_padded_tokens(texts, padding_side=side)
        assert found.tolist() == [[bool(x) for x in row] for row in mask]
        assert tokens[found].tolist() == [1, 1, 0, 5, 2, 1, 2, 1]
    assert model.to_padded_tokens(texts[:1]).attention_mask is None
    assert model.to_padded_tokens(["w3", "w4"], padding_side="left").attention_mask is None
    cut = model.to_padded_tokens(["w3 " * 20, "w4"])
    assert cut.attention_mask.sum(1).tolist() == [12, 2]


def test_the_padding_side_is_read_from_the_tokenizer_at_every_call(small_model, make_tokenizer):
    tokenizer, texts = make_tokenizer(), ["w4 w5", "w6"]
    model = small_model("standard", tokenizer=tokenizer)
    left, right = [[1, 4, 5], [0, 1, 6]], [[1, 4, 5], [1, 6, 0]]
    alone = model("w6")[0, -1]
    with compat.tl_utils.LocallyOverridenDefaults(model, padding_side="left", prepend_bos=True):
        assert model.to_tokens(texts).tolist() == left
        torch.testing.assert_close(model(texts)[1, -1], alone)
    assert model.to_tokens(texts).tolist() == right
    tokenizer.padding_side = "left"
    assert model.padding_side == "left"
    assert model.to_tokens(texts).tolist() == left
    torch.testing.assert_close(model(texts)[1, -1], alone)
    _, cache = model.run_with_cache(texts)
    assert (cache["pattern", 0][1, :, 1:, 0] == 0).all()
    model.tokenizer = make_tokenizer()
    assert model.to_tokens(texts).tolist() == right


def test_a_side_given_to_a_model_is_its_tokenizers_and_no_other_models(small_model, make_tokenizer):
    shared, texts = make_tokenizer("<bos>"), ["w4 w5", "w6"]
    one, other = small_model(tokenizer=shared), small_model(tokenizer=shared)
    one.set_tokenizer(shared, default_padding_side="left")
    assert (one.tokenizer.padding_side, shared.padding_side) == ("left", "right")
    assert one.to_tokens(texts).tolist() == [[1, 4, 5], [1, 1, 6]]
    assert other.to_tokens(texts).tolist() == [[1, 4, 5], [1, 6, 1]]
    mask = compat.tl_utils.get_attention_mask(one.tokenizer, one.to_tokens(texts), True)
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    other.padding_side = "left"
    assert other.tokenizer.padding_side == "left"
    assert shared.padding_side == "right"


@pytest.mark.parametrize("pad", ["<pad>", "<bos>", None])
def test_a_tokenizer_that_adds_bos_itself_adds_it_once_and_only_where_wanted(
    small_model, make_tokenizer, pad
):
    model = small_model(tokenizer=make_tokenizer(pad, adds_bos=True))
    assert model.tokenizer("w4")["input_ids"] == [1, 4]
    assert model.to_tokens("w4 w5").tolist() == [[1, 4, 5]]
    assert model.to_tokens("w4 w5", prepend_bos=False).tolist() == [[4, 5]]
    assert model.to_single_token("w9") == 9
    assert model.generate("w4", max_new_tokens=0) == "w4"


@pytest.mark.parametrize("bad", [[], [3, 4], 7])
def test_what_is_no_text_is_refused(model, bad):
    with pytest.raises((ValueError, TypeError)):
        model.to_tokens(bad)
    with pytest.raises(ValueError, match="non-empty list of strings"):
        model.to_tokens([])


def test_no_tokenizer_is_one_clear_error(small_model, tokens):
    model = small_model()
    assert model(tokens).shape == (2, 8, 30)
    for call in (model.to_tokens, model.to_str_tokens, model.to_single_token, model):
        with pytest.raises(
            ValueError, match="has no tokenizer: pass tokens, or call set_tokenizer"
        ):
            call("w4")


def test_tokenizer_larger_than_the_model_is_refused(small_model, make_tokenizer):
    with pytest.raises(ValueError, match="tokenizer has 30 tokens, the model d_vocab=20"):
        small_model(d_vocab=20, tokenizer=make_tokenizer())


def test_tokenizer_without_a_wanted_bos_is_refused(small_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no BOS token"):
        small_model(tokenizer=tokenizer)
    assert small_model(tokenizer=tokenizer, default_prepend_bos=False).to_tokens("w4").tolist() == [
        [4]
    ]


def test_a_bos_that_the_tokenizer_does_not_have_is_one_clear_error(small_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    model = small_model(tokenizer=tokenizer, default_prepend_bos=False)
    for call in (model.to_tokens, model.to_str_tokens, model, model.generate):
        with pytest.raises(ValueError, match="tokenizer has no BOS token"):
            call("w4", prepend_bos=True)


def test_tokens_back_to_strings(model):
    tokens = model.to_tokens("w4 w5")
    assert model.to_string(tokens) == ["<bos> w4 w5"]
    assert model.to_string(tokens[0]) == "<bos> w4 w5"
    assert model.to_string(5) == "w5"
    assert model.to_string([4, 5]) == "w4 w5"


def test_str_tokens_of_every_kind_of_input(model):
    assert model.to_str_tokens("w4 w5") == ["<bos>", "w4", "w5"]
    assert model.to_str_tokens("w4 w5", prepend_bos=False) == ["w4", "w5"]
    assert model.to_str_tokens(["w4", "w5 w6"]) == [["<bos>", "w4"], ["<bos>", "w5", "w6"]]
    assert model.to_str_tokens(torch.tensor([4, 5])) == ["w4", "w5"]
    assert model.to_str_tokens(torch.tensor([[4, 5]])) == ["w4", "w5"]
    for row in ([4, 5], (4, 5), np.array([4, 5]), np.array([[4, 5]]), [np.int64(4), 5],
                [torch.tensor(4), torch.tensor(5)]):  # fmt: skip
        assert model.to_str_tokens(row) == ["w4", "w5"]
    assert model.to_str_tokens(4) == model.to_str_tokens(torch.tensor(4)) == ["w4"]
    assert model.to_str_tokens([]) == []


@pytest.mark.parametrize("of", [list, tuple, torch.tensor, np.array])
def test_a_list_of_rows_is_a_list_for_each(model, of):
    rows = [of([4, 5]), of([6]), of([7, 8])]
    assert model.to_str_tokens(rows) == [["w4", "w5"], ["w6"], ["w7", "w8"]]
    assert model.to_string(rows) == ["w4 w5", "w6", "w7 w8"]
    even = [of([4, 5]), of([6, 7])]  # which could be taken for one row of four tokens
    assert model.to_str_tokens(even) == [["w4", "w5"], ["w6", "w7"]]


@pytest.mark.parametrize("of", [torch.tensor, np.array])
@pytest.mark.parametrize("rows", [[[4, 6], [5, 6]], [[4], [5]], [[[4, 5], [6, 7]]]])
def test_a_tensor_or_array_of_several_rows_is_refused(model, of, rows):
    """TransformerLens refuses it, too."""
    for call in (model.to_str_tokens, lambda tokens: model.get_token_position(5, tokens)):
        with pytest.raises(ValueError, match="takes one row of tokens at a time"):
            call(of(rows))


@pytest.mark.parametrize("bad", [None, 1.5, [1.5], torch.tensor([0.5]), ["w4", 5], {4: 5}, [None],
                                 [-1], np.array(["w4", None]), [True]])  # fmt: skip
def test_what_is_neither_text_nor_token_ids_is_refused(model, bad):
    for call in (model.to_str_tokens, model.to_string):
        with pytest.raises(ValueError, match="token ids"):
            call(bad)


def test_single_tokens(model):
    assert model.to_single_token("w9") == 9
    assert model.to_single_str_token(9) == "w9"
    with pytest.raises(AssertionError, match="'w4 w5' is not a single token; it splits into"):
        model.to_single_token("w4 w5")


def test_token_position(model):
    text = "w4 w5 w4"
    assert model.get_token_position("w4", text) == 1
    assert model.get_token_position("w4", text, mode="last") == 3
    assert model.get_token_position("w4", text, prepend_bos=False) == 0
    assert model.get_token_position(5, torch.tensor([[4, 5, 6]])) == 1
    with pytest.raises(ValueError, match="mode='final' is unknown; choose from 'first', 'last'"):
        model.get_token_position("w4", text, mode="final")
    with pytest.raises(AssertionError, match="does not occur"):
        model.get_token_position("w8", text)


def test_residual_directions_are_unembedding_columns(model):
    assert torch.equal(model.tokens_to_residual_directions("w4"), model.W_U[:, 4])
    assert torch.equal(model.tokens_to_residual_directions(4), model.W_U[:, 4])
    assert torch.equal(model.tokens_to_residual_directions(torch.tensor(4)), model.W_U[:, 4])
    ids = torch.tensor([[4, 5], [6, 7]])
    directions = model.tokens_to_residual_directions(ids)
    assert directions.shape == (2, 2, 16)
    assert torch.equal(directions[1, 0], model.W_U[:, 6])
