"""What ``import tl_sparse`` costs beside ``import transformer_lens`` alone.

    python benchmarks/import_time.py --repeats 5

Modules and median seconds, each import in fresh processes that take turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

PACKAGES = ("transformer_lens", "tl_sparse")
CODE = """
import sys, time
start = time.perf_counter()
import {package}
print(time.perf_counter() - start, len(sys.modules))
"""


def measure(package: str) -> tuple[float, int]:
    """Seconds and modules of an import in a fresh process."""
    command = [sys.executable, "-c", CODE.format(package=package)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, modules = out.split()
    return float(seconds), int(modules)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="processes for each package")
    repeats = parser.parse_args().repeats
    for package in PACKAGES:
        measure(package)  # writes bytecode and warms the disk cache
    runs = [{package: measure(package) for package in PACKAGES} for _ in range(repeats)]
    print("| import | modules | seconds (median) |\n|---|---|---|")
    for package in PACKAGES:
        seconds = statistics.median(run[package][0] for run in runs)
        print(f"| {package} | {runs[0][package][1]} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
