import subprocess
import sys

import pytest

from tl_sparse.cli.commands import COMMANDS
from tl_sparse.cli.help import help_of, kept_help


def words(text):
    """What a help says, however wide its lines are."""
    return [word.strip("-─│╭╮╰╯|") for word in text.split() if word.strip("-─│╭╮╰╯|")]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_kept_help_is_what_the_options_say(name):
    kept = kept_help(name, ["--help"])
    assert kept is not None, "python -m tl_sparse.cli.help"
    assert words(kept) == words(help_of(name)), "python -m tl_sparse.cli.help"


def test_help_of_a_recipe_is_made_of_its_defaults():
    assert kept_help("train", ["--recipe", "paper", "--help"]) is None
    assert kept_help("train", ["--recipe=paper", "-h"]) is None
    assert kept_help("train", ["--out", "o"]) is None


def test_the_help_of_every_command_comes_without_torch():
    code = (
        "import sys; from tl_sparse import cli\n"
        "for name in sys.argv[1:]:\n"
        "    try: cli.main([name, '--help'])\n"
        "    except SystemExit as ended: assert not ended.code\n"
        "print(sorted({'torch', 'transformer_lens', 'numpy', 'tyro'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=True
    )
    for name in COMMANDS:
        assert f"usage: tl-sparse {name}" in run.stdout
    assert run.stdout.endswith("\n[]\n")
