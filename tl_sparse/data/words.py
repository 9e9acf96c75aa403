"""Word pools that keep generated training text and held-out task prompts apart, and the token list.

`TRAIN_WORDS` name things in the idiom generator and in the training split of every task,
`FURTHER_WORDS` in the second mix of idioms only. `HELD_OUT_WORDS` appear in held-out task prompts
only; no two pools share a word.
"""

from typing import Final

# Common words, so that a small vocabulary keeps most of them whole; the held-out ones are common in
# real code, where every model meets them.
_TRAIN: Final = """
    data item index key text count total size start end first last left right width height color
    shape row column table cell file folder word letter number score weight rate price cost user
    member group team player game level point edge graph tree root leaf branch parent child queue
    cache block page book title note event time day month year hour minute second date place city
    street house room door window wall road car train boat cat dog fish apple tea red green blue
    black white old new big small fast slow long short high low head tail body hand box bag cup
    ball hat label option flag step job goal rule test check limit length area error part side
    """

# Further names in the second mix of idioms, so that a rule is not learned for a few words: common
# in code or in speech, most of them cut into pieces by a small vocabulary.
_FURTHER: Final = """
    arg app col res val obj ref pos idx num pro con use mod doc dest src cls func
    client server request reply parser reader writer buffer stream signal pattern match token
    symbol scope record field schema query batch sample model layer kernel vector matrix
    tensor array figure axis plot legend marker style theme image pixel screen mouse menu button
    panel layout widget dialog bank account payment invoice product stock basket store
    customer seller delivery package address phone email password profile session role permission
    policy network router gateway packet proxy domain peer cluster task worker scheduler timer
    clock delay retry attempt budget quota metric counter gauge report summary detail chapter
    paragraph sentence phrase author editor library shelf volume register
    memory device sensor camera engine wheel motor battery fuel speed distance direction angle
    radius circle square triangle corner center origin offset margin border padding grid
    tile board piece dice hero monster weapon armor castle bridge river mountain forest ocean
    island desert cloud rain snow wind storm season summer winter spring flower garden farm horse
    sheep chicken bird eagle insect spider bread butter cheese sugar salt pepper soup rice onion
    carrot banana orange lemon grape peach coffee water juice plate bowl knife spoon kitchen
    chair sofa lamp mirror carpet curtain pillow blanket shirt jacket shoe sock glove ring
    ticket flight hotel guest passport luggage compass tent camp trail
    doctor nurse patient clinic medicine lawyer judge teacher student lesson exam school
    college degree science physics energy force mass charge atom molecule gene
    """

_HELD_OUT: Final = """
    name line value module path code result source message state node string method encoding socket
    context filename exception timeout handler frame action example entry info host config port
    stack support expected values names lines errors flags tests parts keys spec attr args instance
    function loop thread process header content change order section unit
    """

TRAIN_WORDS: Final[tuple[str, ...]] = tuple(_TRAIN.split())
FURTHER_WORDS: Final[tuple[str, ...]] = tuple(_FURTHER.split())
HELD_OUT_WORDS: Final[tuple[str, ...]] = tuple(_HELD_OUT.split())

REQUIRED_WORDS: Final[tuple[str, ...]] = (
    *("\n", "\n    ", "\n        "),
    *("print", "while", "for", "if", "def", "with", "return", "self", "current"),
    *(" in", " as", " if", " else", " set", " open", " range", " enumerate", " lambda", " True"),
)
"""Texts every trained tokenizer keeps whole: words that decide a task or answer it.

Single punctuation characters need no entry: the pre-tokeniser isolates them, and each is a byte.
"""

_COPIED: Final = (
    *("name", "line", "value", "module", "path", "code", "result", "string"),
    *("open", "enumerate", "range"),
)

WHOLE_NAMES: Final[tuple[str, ...]] = (
    *REQUIRED_WORDS,
    *(f" {word}" for word in TRAIN_WORDS),
    *TRAIN_WORDS,
    *(f" {word}" for word in _COPIED if f" {word}" not in REQUIRED_WORDS),
    *_COPIED,
    *("input", "output", "_input", "_output", "set"),
)
"""`REQUIRED_WORDS` and the names that tasks copy, at the beginning of a piece and after a blank: a
name cut into pieces can be copied piece by piece only, which is another skill. They take about a
tenth of a vocabulary of 1024."""
