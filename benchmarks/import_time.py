"""What importing ``tl_sparse``, its first use and ``tl-sparse`` cost beside ``transformer_lens``.

    python benchmarks/import_time.py --repeats 5

Median seconds of CPU and of the clock, each in fresh processes that take turns, and modules.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

CALLS = {
    "import torch": "import torch",
    "import transformer_lens": "import transformer_lens",
    "import tl_sparse": "import tl_sparse",
    "tl_sparse.SparseTransformer": "import tl_sparse; tl_sparse.SparseTransformer",
    "tl_sparse.prune": "import tl_sparse; tl_sparse.prune",
    "all names of tl_sparse": "from tl_sparse import *",
    "tl-sparse --version": "from tl_sparse.cli import main; main(['--version'])",
    "tl-sparse --help": "from tl_sparse.cli import main; main(['--help'])",
    "tl-sparse prune --help": "from tl_sparse.cli import main; main(['prune', '--help'])",
}
CODE = """
import atexit, sys
atexit.register(lambda: sys.stderr.write(f"modules {{len(sys.modules)}}\\n"))
{call}
"""


def measure(call: str) -> tuple[float, float, int]:
    """Seconds of CPU and of the clock of a fresh process, Python's own start included; modules."""
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, "-c", CODE.format(call=call)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, after = time.perf_counter() - start, os.times()
    cpu = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    modules = next(row for row in run.stderr.splitlines() if row.startswith("modules "))
    return cpu, seconds, int(modules.split()[1])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="processes for each row")
    repeats = parser.parse_args().repeats
    for call in CALLS.values():
        measure(call)  # writes bytecode and warms the disk cache
    runs = [{name: measure(call) for name, call in CALLS.items()} for _ in range(repeats)]
    print("| | modules | CPU seconds (median) | seconds |\n|---|---|---|---|")
    for name in CALLS:
        cpu, seconds = (statistics.median(run[name][i] for run in runs) for i in (0, 1))
        print(f"| `{name}` | {runs[0][name][2]:,} | {cpu:.2f} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
