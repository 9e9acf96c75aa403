"""Words and sentences of the prompt families."""

from __future__ import annotations

from collections.abc import Iterable


def blank(words: Iterable[str]) -> tuple[str, ...]:
    """Words with the blank before them, as they stand in a sentence."""
    return tuple(f" {word}" for word in words)


def listed(text: str) -> tuple[str, ...]:
    """The words of a text, each once."""
    return tuple(dict.fromkeys(text.split()))


FEMALE = listed(
    "Mary Anna Laura Emma Sarah Julia Kate Lisa Rachel Susan Jane Helen Alice Emily Amy Claire "
    "Jessica Jennifer Linda Karen Nancy Ruth Grace Rose Lucy Sophie Hannah Maria Victoria Diana "
    "Elizabeth Margaret Patricia Barbara Amanda Melissa Michelle Stephanie Rebecca Catherine "
    "Christine Sandra Martha Carol Donna Anne Ellen Charlotte Olivia"
)
MALE = listed(
    "John Tom James Robert David William Richard Joseph Thomas Daniel Matthew Anthony Mark Paul "
    "Steven Andrew George Kevin Brian Edward Jason Jeff Ryan Jacob Gary Nick Eric Stephen Scott "
    "Justin Brandon Frank Gregory Patrick Jack Dennis Peter Henry Adam Simon Carl Arthur Roger "
    "Keith Jeremy Terry Sean Christian Aaron Luke"
)
NAMES = FEMALE + MALE
NEUTRAL = ("Alex", "Jordan", "Taylor", "Casey", "Morgan", "Jamie", "Robin", "Sam", "Chris", "Riley")

IOI = (
    "When {first} and {second} came to the {place}, {giver} gave a {thing} to",
    "As {first} and {second} left the {place}, {giver} handed a {thing} to",
    "Yesterday {first} and {second} met at the {place}, and {giver} gave a {thing} to",
    "After {first} and {second} had been at the {place}, {giver} gave a {thing} to",
    "While {first} and {second} were waiting at the {place}, {giver} passed a {thing} to",
    "Once {first} and {second} got to the {place}, {giver} decided to give a {thing} to",
    "Before {first} and {second} went home from the {place}, {giver} gave a {thing} to",
    "There were {first} and {second} in the {place}. Then {giver} gave a {thing} to",
    "It was late when {first} and {second} found the {place}, so {giver} offered a {thing} to",
    "Last week {first} and {second} worked at the {place}. On Friday {giver} sent a {thing} to",
    "Since {first} and {second} both liked the {place}, {giver} brought a {thing} to",
    "Everyone saw {first} and {second} at the {place}, where {giver} showed a {thing} to",
    "On the way to the {place} with {first} and {second}, it was {giver} who gave a {thing} to",
    "The friends {first} and {second} stayed near the {place}. Later {giver} lent a {thing} to",
    "Although {first} and {second} had no time for the {place}, {giver} gave a {thing} to",
)
"""A name is in the place of each of ``first`` and ``second``, one of them again as ``giver``."""
PLACES = ("store", "garden", "station", "school", "office", "beach", "house", "market")
THINGS = ("book", "ring", "drink", "letter", "basket", "key", "ball", "map")

EVENTS = listed(
    "war siege famine drought dispute reign marriage trial voyage strike rebellion occupation "
    "construction campaign expedition alliance boycott contract crisis debate dynasty embargo "
    "epidemic exhibition experiment feud flood friendship hunt investigation journey lease "
    "negotiation partnership plague project prosecution quarrel recession reform research "
    "restoration retreat rivalry search settlement shortage study survey tour treaty truce "
    "uprising visit vogue walkout"
)
YEARS = tuple(f" {century}{year:02}" for century in range(12, 20) for year in range(2, 99))
"""Years that a span can begin in."""

FUNCTIONS = ("load", "update", "get_state", "process", "convert", "build_index", "find", "store")
NOUNS = listed(
    "file name size value path text list user key state table model image color time date line "
    "page code word group level field test data order note type count index result number object "
    "string target source image shape label item option server client message token report event "
    "action title body header window button width height weight range limit start end title "
    "version status password account address country city street river mountain forest animal "
    "horse bird fish tree flower stone water fire metal glass paper music song dance game sport "
    "team player coach doctor teacher student"
)

PRONOUN = (
    "Everyone in town knows {name} as a good {noun}, because",
    "Last summer {name} worked as a {noun}, and then",
    "My friends all like {name}, the new {noun}, since",
    "Nobody believed that {name} was a {noun} until",
    "People say that {name} became a {noun} when",
    "We did not see {name}, the {noun}, after",
)
ROLES = ("singer", "doctor", "teacher", "driver", "student", "writer", "lawyer", "player")
