"""vocab.bpe and encoder.json against a byte-level BPE written out by hand."""

import json
import random
import unicodedata
from itertools import pairwise

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from tests.checkpoints.openai_reference_model import BASE, random_state
from tl_sparse.checkpoints.openai_tokenizer import tokenizer_from_openai, tokenizer_to_openai
from tl_sparse.data.tokenizer import build_tokenizer
from tl_sparse.model.transformer import SparseTransformer

END = "<|endoftext|>"
TEXT = '''def bracket_counting(values, depth=0):
    """Return how deep the lists are nested."""
    if isinstance(values, list):
        return max([bracket_counting(v, depth + 1) for v in values] or [depth])
    return depth


class Thing:
    def __init__(self, width, height):
        self.width = width
        self.height = height
        self.names = set()

    def add(self, name):
        self.names.add(name)  # größer als naïve Wörter
        print("added", name, 'at', len(self.names), 12345)


values = [[1, 2], [3, [4, 5]], []]
aaaa = "aaaaaaaaaaaaaaaa"
print(bracket_counting(values), f"{aaaa!r}")\r\n
'''


def byte_alphabet():
    """GPT-2's characters for the 256 bytes, in the order of their ids, from the description."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]  # fmt: skip
    rest = [b for b in range(256) if b not in printable]
    spelled = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return spelled, [*printable, *rest]


def category(char):
    """L letter, N digit, S space, or M mark, as the pattern sees a character."""
    if char.isspace():
        return "S"
    return unicodedata.category(char)[0] if unicodedata.category(char)[0] in "LN" else "M"


def cut(text):
    """The pieces of a text, by the pattern's six rules in turn, without regular expressions."""
    pieces, at = [], 0
    while at < len(text):
        stop = next(end for rule in RULES if (end := rule(text, at)) is not None)
        pieces.append(text[at:stop])
        at = stop
    return pieces


def run(text, at, accept, most=None):
    stop = at
    while stop < len(text) and accept(text[stop]) and (most is None or stop - at < most):
        stop += 1
    return stop


def word(text, at):
    start = at + (category(text[at]) in "MS" and text[at] not in "\r\n")
    stop = run(text, start, lambda c: category(c) == "L")
    return stop if stop > start else None


def digits(text, at):
    stop = run(text, at, lambda c: category(c) == "N", most=3)
    return stop if stop > at else None


def marks(text, at):
    start = at + (text[at] == " ")
    stop = run(text, start, lambda c: category(c) == "M")
    return run(text, stop, lambda c: c in "\r\n/") if stop > start else None


def line_ends(text, at):
    stop = run(text, at, str.isspace)
    while stop > at and text[stop - 1] not in "\r\n":
        stop -= 1
    return stop if stop > at else None


def blanks_before_more(text, at):
    stop = run(text, at, str.isspace)
    if stop < len(text):
        stop -= 1  # the last blank belongs to what follows
    return stop if stop > at else None


def blanks(text, at):
    stop = run(text, at, str.isspace)
    return stop if stop > at else None


RULES = (word, digits, marks, line_ends, blanks_before_more, blanks)


def encode(text, ranks):
    """tiktoken's rule: of all neighbours that make a token, the lowest rank first, leftmost."""
    spelled, _ = byte_alphabet()
    out = []
    for piece in cut(text):
        parts = [spelled[b] for b in piece.encode()]
        if "".join(parts) in ranks:
            parts = ["".join(parts)]
        while True:
            joined = [a + b for a, b in pairwise(parts)]
            found = [(ranks[token], i) for i, token in enumerate(joined) if token in ranks]
            if not found:
                break
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        out += [ranks[part] for part in parts]
    return out


@pytest.fixture(scope="module")
def trained():
    """Merges that a trainer found in a text, with a pre-tokeniser of its own: cut at blanks."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = Sequence(
        [
            Split(Regex(r"\s*\S+|\s+"), "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    learner.train_from_iterator([TEXT], trainer)
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]


@pytest.fixture
def files(trained, tmp_path):
    """A folder with the two files, written from the description alone, and the ids."""
    spelled, order = byte_alphabet()
    tokens = [spelled[b] for b in order] + [a + b for a, b in trained]
    ranks = {token: i for i, token in enumerate(tokens)}
    assert len(ranks) == len(tokens)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in trained), ""]
    (folder / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")
    (folder / "encoder.json").write_text(json.dumps(ranks | {END: len(ranks)}))
    return folder, ranks


SAMPLES = [
    TEXT,
    "",
    " ",
    "   x",
    "\n\n  \n\t return  \r\n  ",
    "]]\n], (' (\" ') \") .add += set()",
    "x1234567 2 34",
    "été ñandú 漢字かな 🙂🙂 ½²",
    "a'b \u00a0c\u2003 d",
    "//\n/* */ // x\r\n\r\n",
    "aaaaaaaaaaa aa aaa",
]


def random_text(draw):
    pieces = ["a", "aa", "aaa", "self", ".", "names", " ", "  ", "\n", "\t", "(", '"', "'", "12",
              "é", "/", "\r", "_", "width", "ing", "漢"]  # fmt: skip
    return "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 30)))


def test_ids_of_an_independent_implementation(files):
    folder, ranks = files
    tokenizer = tokenizer_from_openai(folder, d_vocab=len(ranks) + 1)
    draw = random.Random(0)
    for text in SAMPLES + [random_text(draw) for _ in range(400)]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == encode(text, ranks), repr(text)
        assert tokenizer.decode(ids) == text


def test_the_end_of_text_has_the_last_id_or_the_files(files):
    folder, ranks = files
    for d_vocab in (len(ranks) + 1, 2048):
        tokenizer = tokenizer_from_openai(folder, d_vocab)
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        assert ends == {len(ranks)}
        assert tokenizer.encode(f"x{END}", add_special_tokens=False)[-1] == len(ranks)
    (folder / "encoder.json").write_text(json.dumps(ranks))
    tokenizer = tokenizer_from_openai(folder, d_vocab=2048)
    assert tokenizer.encode(END, add_special_tokens=False) == [2047]
    assert tokenizer.decode([2047]) == END


def test_a_piece_that_is_a_token_is_that_token_although_merging_does_not_lead_there(tmp_path):
    spelled, order = byte_alphabet()
    tokens = [*(spelled[b] for b in order), "bc", "ab", "cd", "abcd"]
    ranks = {token: i for i, token in enumerate(tokens)}
    lines = "#version: 0.2\nb c\na b\nc d\nab cd\n"
    (tmp_path / "vocab.bpe").write_text(lines)
    (tmp_path / "encoder.json").write_text(json.dumps(ranks))
    tokenizer = tokenizer_from_openai(tmp_path, d_vocab=300)
    for text, cut_up in (("abcd", ["abcd"]), ("xabcd", ["x", "a", "bc", "d"])):
        assert encode(text, ranks) == [ranks[token] for token in cut_up]
        assert tokenizer.encode(text, add_special_tokens=False) == encode(text, ranks)
    tokenizer_to_openai(tokenizer, tmp_path)
    assert (tmp_path / "vocab.bpe").read_text() == lines


def test_files_there_and_back_to_the_byte(files, tmp_path):
    folder, _ = files
    tokenizer = tokenizer_from_openai(folder, d_vocab=2048)
    tokenizer_to_openai(tokenizer, tmp_path)
    for name in ("vocab.bpe", "encoder.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    tokenizer.padding_side = "left"
    tokenizer(["a", "a b c"], padding=True)  # which switches padding on inside
    tokenizer_to_openai(tokenizer, tmp_path)


@pytest.mark.parametrize("place", [257, 3])
def test_a_token_for_the_start_of_a_text_is_dropped_as_tiktoken_does(tmp_path, place):
    spelled, order = byte_alphabet()
    ids = {spelled[byte]: i for i, byte in enumerate(order)} | {"ab": 256}
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\n", encoding="utf-8")
    text = json.dumps(ids | {END: 299, "<|startoftext|>": place})
    (tmp_path / "encoder.json").write_text(text, encoding="utf-8")
    tokenizer = tokenizer_from_openai(tmp_path, d_vocab=300)
    assert "<|startoftext|>" not in tokenizer.get_vocab()
    assert tokenizer.encode("ab", add_special_tokens=False) == [256]
    assert tokenizer.eos_token_id == 299


def test_a_model_takes_the_tokenizer_in_its_folder_and_writes_it_again(files, write, tmp_path):
    tokens, ranks = files
    config = BASE | {"vocab_size": len(ranks) + 1}
    folder = write(config, random_state(config))
    with pytest.warns(UserWarning, match="no tokenizer for"):
        assert SparseTransformer.from_openai(folder).tokenizer is None
    model = SparseTransformer.from_openai(folder, tokenizer=tokens)
    assert model.to_tokens("self.names")[0].tolist() == encode("self.names", ranks)
    assert model.to_tokens("x", prepend_bos=True)[0, 0] == len(ranks)
    for name in ("vocab.bpe", "encoder.json"):
        (folder / name).write_bytes((tokens / name).read_bytes())
    model = SparseTransformer.from_openai(folder)
    assert model.to_string(model.to_tokens("max(values)")[0]) == "max(values)"
    model.to_openai(tmp_path / "back")
    again = SparseTransformer.from_openai(tmp_path / "back")
    assert torch.equal(again.to_tokens(TEXT), model.to_tokens(TEXT))
    model.to_openai(tmp_path / "bare", with_tokenizer=False)
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {
        "beeg_config.json", "final_model.pt"
    }  # fmt: skip
    (folder / "vocab.bpe").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab.bpe is missing"):
        SparseTransformer.from_openai(folder)


def test_other_tokenizers_are_refused(small_model, make_tokenizer, tmp_path):
    cutting_otherwise = build_tokenizer([TEXT], 300, required=())
    for tokenizer in (cutting_otherwise, make_tokenizer()):
        with pytest.raises(ValueError, match=r"cannot express this .*with_tokenizer=False"):
            tokenizer_to_openai(tokenizer, tmp_path)
    with pytest.raises(ValueError, match="cannot express this str"):
        tokenizer_to_openai("name", tmp_path)
    model = small_model(tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match="cannot express this"):
        model.to_openai(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    model.to_openai(tmp_path / "model", with_tokenizer=False)


def test_a_tokenizer_with_a_token_more_is_refused(files, tmp_path):
    folder, _ = files
    tokenizer = tokenizer_from_openai(folder, d_vocab=2048)
    tokenizer.add_tokens(["extra"])
    with pytest.raises(ValueError, match="cannot express this"):
        tokenizer_to_openai(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.bpe", "a b\n", "must begin with '#version: 0.2'"),
        ("vocab.bpe", "#version: 0.2\na b", "end with a line's end"),
        ("vocab.bpe", "#version: 0.2\na b c\n", "line 2 of .* must join two earlier tokens"),
        ("vocab.bpe", "#version: 0.2\na bc\n", "line 2 of .* must join two earlier tokens"),
        ("vocab.bpe", "#version: 0.2\na b\na b\n", "line 3 of .* must join two earlier tokens"),
        ("vocab.bpe", "#version: 0.2\na b\n", "does not number the 257 tokens"),
        ("vocab.bpe", b"#version: 0.2\n\xff\xfe \xff\n", "is no text"),
        ("vocab.bpe", "#version\n" + "".join(f"{'a' * 2**i} {'a' * 2**i}\n" for i in range(12)),
         "line 12 of .* makes a token of 2048 characters"),
        ("encoder.json", "{}", "does not number"),
        ("encoder.json", "[", "is no valid JSON"),
    ],
)  # fmt: skip
def test_broken_tokenizer_files(files, name, content, message):
    folder, _ = files
    raw = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        tokenizer_from_openai(folder, d_vocab=2048)


@pytest.mark.parametrize("end", [0, 2048, True, "x", None, 1.5])
def test_an_impossible_end_of_text(files, end):
    folder, ranks = files
    (folder / "encoder.json").write_text(json.dumps(ranks | {END: end}))
    with pytest.raises(ValueError, match=f"it must lie from {len(ranks)} to 2047"):
        tokenizer_from_openai(folder, d_vocab=2048)


def test_more_tokens_than_the_model_has(files):
    folder, ranks = files
    with pytest.raises(ValueError, match="must lie from"):
        tokenizer_from_openai(folder, d_vocab=len(ranks))
