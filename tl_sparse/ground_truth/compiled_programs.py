"""Three compiled programs with their tasks: reversing, proportions, induction.

The first two are those of Tracr that circuit discovery is tested on (Conmy et al. 2023), for a
decoder: what is reversed stands before a colon, and the model writes it backwards after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split as SplitText
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_sparse.ground_truth.ground_truth_model import GroundTruthModel
from tl_sparse.ground_truth.programs import (
    Copy,
    Map,
    Positions,
    Select,
    Tokens,
    Variable,
    compile_program,
)
from tl_sparse.ground_truth.wiring import build
from tl_sparse.tasks import Pair, Split, Task, TaskSpec, task

PAD, BOS, UNKNOWN = "<pad>", "<bos>", "<unk>"
LETTERS = tuple(f" {letter}" for letter in "abcdefgh")
COUNTED, COLON, QUERY = " x", " :", " ?"
YES, NO = " yes", " no"
N_CTX = 12
TEXT = 512  # sequences that means are taken over


def program_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of letters and signs, each with the blank before it."""
    names = [PAD, BOS, UNKNOWN, *LETTERS, COUNTED, COLON, QUERY, YES, NO]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNKNOWN))
    core.pre_tokenizer = SplitText(Regex(r" [a-z:?]+"), "isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, pad_token=PAD, unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@task(source="Tracr's reverse (Lindner et al. 2023), for a decoder")
def reversing(rng: random.Random, split: Split) -> Pair:
    """Which letter comes next where letters before a colon are written backwards after it."""
    letters = [rng.choice(LETTERS) for _ in range(rng.randint(2, 5))]
    done = rng.randrange(len(letters))
    asked = len(letters) - 1 - done
    other = letters.copy()
    other[asked] = rng.choice([letter for letter in LETTERS if letter != letters[asked]])
    prompts = ["".join([*row, COLON, *row[::-1][:done]]) for row in (letters, other)]
    return Pair((prompts[0], prompts[1]), (letters[asked], other[asked]))


@task(answers=(YES, NO), source="Tracr's frac_prevs (Lindner et al. 2023), with a question")
def proportion(rng: random.Random, split: Split) -> tuple[str, str]:
    """Whether more than half of the letters are an x."""
    half = rng.randint(1, 4)
    prompts = []
    for n_counted in (half + 1, half):
        others = [rng.choice(LETTERS) for _ in range(2 * half + 1 - n_counted)]
        row = [COUNTED] * n_counted + others
        rng.shuffle(row)
        prompts.append("".join([*row, QUERY]))
    return prompts[0], prompts[1]


@task(source="induction (Olsson et al. 2022)")
def induction(rng: random.Random, split: Split) -> Pair:
    """Which letter followed the last letter where that stood before."""
    row = rng.sample(LETTERS, rng.randint(4, 8))
    first = rng.randrange(len(row) - 1)
    answer = first + 1
    swapped = rng.choice([i for i in range(len(row)) if i not in (first, answer)])
    other = row.copy()
    other[answer], other[swapped] = row[swapped], row[answer]
    prompts = ["".join([*letters, row[first]]) for letters in (row, other)]
    return Pair((prompts[0], prompts[1]), (row[answer], other[answer]))


def reversing_program() -> Variable:
    """The letter at the place that is as far before the colon as the next place is after it."""
    tokens, places = Tokens((*LETTERS, COLON)), Positions(N_CTX)
    colon = Copy("colon at", Select(tokens, places, lambda key, query: key == COLON), places)
    wanted = Map("wanted position", (colon, places), mirrored)
    return Copy("letter", Select(places, wanted, lambda key, query: key == query), tokens)


def mirrored(colon: int, place: int) -> int | None:
    """The place whose letter comes after ``place``, or None outside of what is reversed."""
    wanted = 2 * colon - 1 - place
    return wanted if 0 < wanted < colon <= place else None


def proportion_program() -> Variable:
    """The share of letters that are an x, and of those that are not."""
    tokens, places = Tokens((*LETTERS, COUNTED)), Positions(N_CTX)
    counted = Map("is an x", (tokens,), lambda token: YES if token == COUNTED else NO)
    return Copy("share", Select(places, places, lambda key, query: key <= query), counted)


def induction_program() -> Variable:
    """The letter at the token before which the same letter stood as is here."""
    tokens, places = Tokens(LETTERS), Positions(N_CTX)
    previous = Copy(
        "previous letter", Select(places, places, lambda key, query: key == query - 1), tokens
    )
    return Copy("next letter", Select(previous, tokens, lambda key, query: key == query), tokens)


@dataclass(frozen=True)
class Program:
    """A program, the task that it solves, and how its result is said."""

    variable: Callable[[], Variable]
    """Makes the program."""
    spec: TaskSpec
    """The task."""
    answers: Mapping[str, str]
    """Result → token."""
    gain: float
    """Logit of a result of 1."""


PROGRAMS: Mapping[str, Program] = {
    "reversing": Program(reversing_program, reversing, {x: x for x in LETTERS}, 6.0),
    "proportion": Program(proportion_program, proportion, {YES: YES, NO: NO}, 40.0),
    "induction": Program(induction_program, induction, {x: x for x in LETTERS}, 6.0),
}
"""The programs by name."""


def compiled(name: str, seed: int = 0, heads: int = 3) -> GroundTruthModel:
    """The model of a program, with heads of distractors beside the program's one a layer.

    Its ``kept`` are all nodes of the compiled circuit, ``heads`` and ``mlps`` the parts that have
    any; :func:`~tl_sparse.ground_truth.component_edges` has the edges between these.

    Args:
        name: One of :data:`PROGRAMS`.
        seed: Decides where everything stands in the model, and the distractors.
        heads: Heads a layer.

    Raises:
        ValueError: unknown name.
    """
    if name not in PROGRAMS:
        raise ValueError(f"unknown program {name!r}: choose from {', '.join(PROGRAMS)}")
    program = PROGRAMS[name]
    plan = compile_program(program.variable(), program.answers, program.gain)
    tokenizer = program_tokenizer()
    bound = Task.bind(program.spec, tokenizer, max_tokens=N_CTX)
    return build(
        plan, bound, filled(bound), description=program.spec.description, heads=heads, d_head=N_CTX,
        neurons=64, seed=seed,
    )  # fmt: skip


def filled(bound: Task) -> Int[Tensor, "sequence pos"]:
    """Training prompts of a task, filled up with random letters."""
    batch = bound.batch(TEXT // 2, split="train", seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor(bound.tokenizer.convert_tokens_to_ids(list(LETTERS)))
    text = ids[torch.randint(len(ids), (len(batch), bound.max_tokens), generator=generator)]
    for row, tokens, last in zip(text, batch.tokens, batch.last.tolist(), strict=True):
        row[: last + 1] = tokens[: last + 1]
    return text
