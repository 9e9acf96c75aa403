import pytest
import torch


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


def test_strings_of_different_length_need_a_pad_token(small_model, make_tokenizer):
    model = small_model(tokenizer=make_tokenizer(pad=None))
    assert model.to_tokens(["w4", "w5"]).shape == (2, 2)
    with pytest.raises(ValueError, match="need a tokenizer with a pad token"):
        model.to_tokens(["w4", "w5 w6"])


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
    assert model.to_str_tokens([4, 5]) == ["w4", "w5"]
    with pytest.raises(ValueError, match="one row"):
        model.to_str_tokens(torch.tensor([[4], [5]]))


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
    with pytest.raises(ValueError, match="one row"):
        model.get_token_position(5, torch.tensor([[4, 6], [5, 6]]))


def test_residual_directions_are_unembedding_columns(model):
    assert torch.equal(model.tokens_to_residual_directions("w4"), model.W_U[:, 4])
    assert torch.equal(model.tokens_to_residual_directions(4), model.W_U[:, 4])
    assert torch.equal(model.tokens_to_residual_directions(torch.tensor(4)), model.W_U[:, 4])
    ids = torch.tensor([[4, 5], [6, 7]])
    directions = model.tokens_to_residual_directions(ids)
    assert directions.shape == (2, 2, 16)
    assert torch.equal(directions[1, 0], model.W_U[:, 6])
