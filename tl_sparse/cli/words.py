"""What the commands share: telling the person at the terminal."""

import sys


def say(line: str) -> None:
    """Tell the person at the terminal."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
