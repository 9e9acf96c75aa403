"""Word pools that keep generated training text and held-out task prompts apart, and the token list.

`TRAIN_WORDS` name things in the idiom generator and in the training split of every task.
`HELD_OUT_WORDS` appear in held-out task prompts only; the two pools share no word.
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

_HELD_OUT: Final = """
    name line value module path code result source message state node string method encoding socket
    context filename exception timeout handler frame action example entry info host config port
    stack support expected values names lines errors flags tests parts keys spec attr args instance
    function loop thread process header content change order section unit
    """

TRAIN_WORDS: Final[tuple[str, ...]] = tuple(_TRAIN.split())
HELD_OUT_WORDS: Final[tuple[str, ...]] = tuple(_HELD_OUT.split())

REQUIRED_WORDS: Final[tuple[str, ...]] = (
    *("\n", "\n    ", "\n        "),
    *("print", "while", "for", "if", "def", "with", "return", "self", "current"),
    *(" in", " as", " if", " else", " set", " open", " range", " enumerate", " lambda", " True"),
)
"""Texts every trained tokenizer keeps whole: words that decide a task or answer it.

Single punctuation characters need no entry: the pre-tokeniser isolates them, and each is a byte.
"""
