"""Out-of-distribution variants of the built-in tasks: the same answers, a harder context.

Gao et al. 2025 attack the circuit of bracket_counting with long lists (context dilution, Figure 8)
and with an unbalanced bracket in a comment (section 3.2). Here some other tasks have such variants
too. A prompt of a variant is never shortened: what makes it hard would be lost.
"""

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tl_sparse.tasks import builtin
from tl_sparse.tasks.contexts import Split, snippets
from tl_sparse.tasks.phrases import draw_lead, draw_names, draw_numbers, draw_target
from tl_sparse.tasks.task import Decorated, Pair, TaskSpec

Drawn = tuple[str, str] | Pair


@dataclass(frozen=True)
class Variant:
    """A harder form of some tasks; made by the decorator `variant`."""

    name: str
    """What it is called; one task has at most one variant of a name."""
    tasks: tuple[TaskSpec, ...]
    """The tasks it is a form of."""
    description: str
    """What is harder."""
    make: Callable[..., Drawn]
    """Draws a pair: `(task, rng, split, **options)`; every option is a whole number."""

    @property
    def options(self) -> dict[str, int]:
        """The options and their defaults."""
        return {
            p.name: p.default for p in list(inspect.signature(self.make).parameters.values())[3:]
        }

    def of(self, task: TaskSpec, **options: int) -> TaskSpec:
        """The variant of a task, named `task/variant` and its options.

        Raises `ValueError` for an unknown option or one that is not a whole number above 0.
        """
        known = self.options
        for option, value in options.items():
            if option not in known:
                raise ValueError(
                    f"variant {self.name!r} of {task.name} has no option {option!r}: "
                    f"choose from {', '.join(known) or 'none'}"
                )
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{option}={value!r} must be a whole number of at least 1")
        values = known | options
        return replace(
            task,
            name="/".join([task.name, self.name, *(f"{k}={v}" for k, v in values.items())]),
            description=f"{task.description}\n\n{self.description}",
            make=VariantPairs(self, task, tuple(values.items())),
            may_shorten=False,
        )


@dataclass(frozen=True)
class VariantPairs:
    """Draws the pairs of a variant of a task."""

    variant: Variant
    """The variant."""
    task: TaskSpec
    """The task that it is a variant of."""
    options: tuple[tuple[str, int], ...]
    """Each option and its value."""

    def __call__(self, rng: random.Random, split: Split) -> Drawn:
        """A pair of prompts for a split."""
        return self.variant.make(self.task, rng, split, **dict(self.options))


def variant(name: str, *tasks: TaskSpec) -> Callable[[Callable[..., Drawn]], Variant]:
    """Turn a function `(task, rng, split, **options) -> pair` into a variant of tasks."""

    def specify(make: Callable[..., Drawn]) -> Variant:
        return Variant(name, tasks, inspect.getdoc(make) or "", Decorated(make))

    return specify


@variant("dilution", builtin.bracket_counting)
def long_list(task: TaskSpec, rng: random.Random, split: Split, n: int = 23) -> Drawn:
    """The (inner) list has `n` elements; the paper tries 3 to 67."""
    start = f"{draw_lead(rng, split)}{draw_target(rng, split)} = "
    items = ", ".join(draw_numbers(rng, n))
    return f"{start}[[{items}]", f"{start}[{items}]"


@variant("dilution", builtin.bracket_brace)
def many_entries(task: TaskSpec, rng: random.Random, split: Split, n: int = 5) -> Drawn:
    """`n` entries before the last word."""
    start = f"{draw_lead(rng, split)}{draw_target(rng, split)} = "
    *keys, last = _some_names(rng, split, n + 1)
    entries = list(zip(keys, draw_numbers(rng, n), strict=True))
    pairs = "".join(f'"{key}": {value}, ' for key, value in entries)
    items = "".join(f'"{key}", {value}, ' for key, value in entries)
    return f'{start}{{{pairs}"{last}"', f'{start}[{items}"{last}"'


@variant("dilution", builtin.single_double_quote)
def long_text(task: TaskSpec, rng: random.Random, split: Split, n: int = 20) -> Drawn:
    """The text has `n` words."""
    name, other = draw_names(rng, split, 2)
    start = f"{name}.write(" if split == "train" else f"raise {name}({other}, "
    text = " ".join(_some_names(rng, split, n))
    return f"{start}'{text}", f'{start}"{text}'


@variant("dilution", builtin.fstring_brace)
def long_message(task: TaskSpec, rng: random.Random, split: Split, n: int = 20) -> Drawn:
    """The text before the brace has `n` words."""
    return builtin.fstring_pair(rng, split, " ".join(_some_names(rng, split, n)))


@variant("dilution", builtin.set_or_string, builtin.set_or_string_fixedvarname)
def late_use(task: TaskSpec, rng: random.Random, split: Split, n: int = 4) -> Drawn:
    """`n` quoted lines between the variable's start and its use."""
    if n > (most := len(snippets(split).lines)):
        raise ValueError(f"n={n}: there are only {most} lines to quote")
    return builtin.type_pair(rng, split, _variable(task, rng, split), n_lines=n)


@variant("distractor", builtin.set_or_string, builtin.set_or_string_fixedvarname)
def other_kind(task: TaskSpec, rng: random.Random, split: Split) -> Drawn:
    """On the next line a second variable begins as the other kind, in each member."""
    variable = _variable(task, rng, split)
    other = rng.choice([name for name in draw_names(rng, split, 2) if name != variable])
    return builtin.type_pair(rng, split, variable, other=other)


@variant("distractor", builtin.bracket_counting)
def open_bracket(task: TaskSpec, rng: random.Random, split: Split) -> Drawn:
    """A comment on the line before has a `[` that is not closed."""
    return _commented(task, rng, split, ("[",))


@variant("distractor", builtin.bracket_brace)
def other_bracket(task: TaskSpec, rng: random.Random, split: Split) -> Drawn:
    """A comment on the line before has a `[` or `{` that is not closed."""
    return _commented(task, rng, split, ("[", "{"))


@variant("distractor", builtin.single_double_quote)
def lone_quote(task: TaskSpec, rng: random.Random, split: Split) -> Drawn:
    """A comment on the line before has one quote, of either kind."""
    return _commented(task, rng, split, ("'", '"'))


@variant("distractor", builtin.fstring_brace)
def lone_brace(task: TaskSpec, rng: random.Random, split: Split) -> Drawn:
    """A comment on the line before has a `{` that is not closed."""
    return _commented(task, rng, split, ("{",))


def variants_of(task: str) -> tuple[Variant, ...]:
    """The variants of a built-in task."""
    every = [item for item in globals().values() if isinstance(item, Variant)]
    return tuple(item for item in every if task in [of.name for of in item.tasks])


def _commented(task: TaskSpec, rng: random.Random, split: Split, marks: Sequence[str]) -> Drawn:
    first, last = draw_names(rng, split, 2)
    comment = f"# {first} {rng.choice(marks)} {last}\n"
    drawn = task.make(rng, split)
    pair = drawn.prompts if isinstance(drawn, Pair) else drawn
    before = [prompt.rpartition("\n") for prompt in pair]
    one, other = (f"{lines}{newline}{comment}{probe}" for lines, newline, probe in before)
    return one, other


def _some_names(rng: random.Random, split: Split, count: int) -> list[str]:
    """Names of the split's pool, which may repeat."""
    return [draw_names(rng, split, 1)[0] for _ in range(count)]


def _variable(task: TaskSpec, rng: random.Random, split: Split) -> str:
    fixed = task == builtin.set_or_string_fixedvarname
    return "current" if fixed else draw_names(rng, split, 1)[0]
