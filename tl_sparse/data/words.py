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
    cache block page book title author note event time day month year hour minute second date place
    city street house room door window wall floor garden river lake hill road bridge car train boat
    ship plane bird cat dog horse fish cow apple bread water milk tea sugar salt music song dance
    red green blue black white old new big small fast slow happy warm cold long short high low early
    late head tail body hand foot face friend mother father sister brother woman girl boy box bag
    cup ball toy coat hat shoe bed lamp clock phone label option flag step job goal rule test check
    limit length depth area speed error answer question reason part side top bottom center middle
    """

_HELD_OUT: Final = """
    name path line code value result source message version mode state node token address target
    module string method encoding socket context parser filename output exception server command
    prefix timeout widget stream signal handler frame action example loader pattern protocol client
    callback entry info request host array response script logger config operator platform master
    policy port buffer stack offset status
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
