import pytest
from tokenizers import Tokenizer

from tl_sparse.data.idioms import idiom_documents
from tl_sparse.data.tokenizer import END_OF_TEXT, build_tokenizer, load_tokenizer, split_pieces
from tl_sparse.data.words import REQUIRED_WORDS

TEXTS = list(idiom_documents(seed=0, n_chars=60_000))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, 512)


@pytest.mark.parametrize(
    "text",
    [
        'print(\'the old house\', [[1, 22], {"a": f"{b}"}])\n\n    x += 1\n',
        "  two  blanks \t tabs\t\n\t\tx = 1 \n \n",
        "é ü 漢字 🙂 \x0c \x0b \x85 end\r\nwindows",
        "",
        "\n",
        "_private __init__ x1y2 don't  ",
    ],
)
def test_decoding_returns_the_text_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encoding_adds_no_special_token_by_itself(tokenizer):
    plain = tokenizer.encode("x = 1", add_special_tokens=False)
    assert tokenizer.encode("x = 1") == plain
    assert tokenizer("x = 1")["input_ids"] == plain
    assert tokenizer.bos_token_id not in plain


def test_end_of_text_is_bos_eos_and_padding_with_the_last_id(tokenizer):
    last = len(tokenizer) - 1
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (END_OF_TEXT,) * 3
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (last,) * 3
    assert tokenizer.encode(END_OF_TEXT) == [last]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer) == 512


def test_every_punctuation_mark_is_its_own_token(tokenizer):
    text = 'f("\'")])}{[,.:=+'
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == list(text)


def test_a_newline_and_its_indent_are_one_piece_and_words_carry_their_blank():
    assert split_pieces("if x:\n        y = 10") == [
        *("if", " x", ":", "\n        ", "y", " ", "=", " ", "1", "0"),
    ]


@pytest.mark.parametrize("word", REQUIRED_WORDS)
def test_required_words_are_single_tokens(tokenizer, word):
    assert len(tokenizer.encode(word)) == 1


def test_required_words_absent_from_the_text_are_merged_at_the_cost_of_the_last_merges():
    word = " zyzzyva"
    without = build_tokenizer(TEXTS, 400)
    tokenizer = build_tokenizer(TEXTS, 400, required=(*REQUIRED_WORDS, word))
    assert len(without.encode(word)) > 1
    assert len(tokenizer.encode(word)) == 1
    assert len(tokenizer) == len(without) == 400
    for required in REQUIRED_WORDS:
        assert len(tokenizer.encode(required)) == 1


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    again = build_tokenizer(iter(TEXTS), 512)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_saved_tokenizer_loads_with_the_same_ids(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded.bos_token_id == tokenizer.bos_token_id
    assert Tokenizer.from_file(str(path)).token_to_id(END_OF_TEXT) == 511


def test_little_text_gives_a_smaller_vocabulary():
    tokenizer = build_tokenizer(["abc"], 1000)
    assert len(tokenizer) < 1000
    assert tokenizer.bos_token_id == len(tokenizer) - 1
    assert len(tokenizer.encode(" enumerate")) == 1


def test_a_vocabulary_without_room_names_the_size_that_has_it():
    with pytest.raises(ValueError, match=r"vocab_size >= (\d+)") as error:
        build_tokenizer(TEXTS, 300)
    enough = int(str(error.value).split(">= ")[1].split(";")[0])
    assert len(build_tokenizer(TEXTS, enough)) <= enough


@pytest.mark.parametrize("size", [0, 299, 65536])
def test_impossible_vocabulary_sizes_are_refused(size):
    with pytest.raises(ValueError, match="300 to 65535"):
        build_tokenizer(TEXTS, size)


def test_a_required_text_of_several_pieces_is_refused():
    with pytest.raises(ValueError, match="cannot be one token"):
        build_tokenizer(TEXTS, 512, required=(" +=",))
