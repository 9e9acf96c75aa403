"""Run the notebooks: do their stored outputs still hold, or store new ones.

    python -m tests.notebooks check [NOTEBOOK ...]   # fails where a run tells something else
    python -m tests.notebooks write [NOTEBOOK ...]   # stores what comes out (needs a Chromium)

Figures are stored twice: as plotly's own output, and as a picture for what shows no scripts, such
as GitHub. Pictures are drawn by plotly in the machine's Chromium, without network, when outputs are
stored; a check draws none. What is compared: ``tests/notebook_outputs.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from traitlets.config import Config

from tests.chromium import NAMES, chromium_path
from tests.notebook_outputs import (
    PLOTLY,
    ROOT,
    clean,
    code_cells,
    digest,
    foreign_paths,
    other_numbers,
    stale,
)

AT_ONCE = 4
"""They take from seconds to minutes: with fewer at once, the last would run alone for long."""
TIMEOUT = 1800
"""Seconds a cell may take (on a machine that does much else)."""
WIDTH, HEIGHT = 720, 400
"""Pixels of a figure's picture, where the figure itself does not say."""

DRAW = """async ([figure, size]) => {
  const image = new Image(), canvas = Object.assign(document.createElement("canvas"), size);
  image.src = await Plotly.toImage(figure, {format: "png", scale: 1, ...size});
  await image.decode();
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, size.width, size.height);
  pixels.data.forEach((value, i, all) => { all[i] = Math.round(value / 17) * 17; });
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL("image/png");
}"""
"""Sixteen shades a colour are enough for a chart, and a quarter less to store."""


def stored_notebooks() -> list[Path]:
    """Every notebook, in the order of reading."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> NotebookNode:
    """A notebook as it is stored."""
    return nbformat.read(path, as_version=4)


def executed(path: Path) -> NotebookNode:
    """The notebook, run from top to bottom in its folder, in a process of its own; cleaned.

    Raises:
        CellExecutionError, CellTimeoutError, DeadKernelError: it does not run to its end.
        RuntimeError: its process does not start.
    """
    notebook = read(path)
    for cell in code_cells(notebook):
        cell.outputs = []
    with tempfile.TemporaryDirectory() as sockets:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            startup_timeout=TIMEOUT,
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
        )
        client.execute(env=os.environ | {"PLOTLY_RENDERER": "plotly_mimetype"})
    clean(notebook)
    return notebook


def check(path: Path) -> tuple[bool, list[str]]:
    """Whether what is stored still holds, and what there is to say."""
    stored = read(path)
    fresh = executed(path)
    if problems := stale(stored, fresh):
        return False, [*problems, f"make notebook-outputs ARGS={path.relative_to(ROOT)}"]
    numbers = other_numbers(stored, fresh)
    return True, [
        f"other numbers than stored in cells {', '.join(map(str, numbers))}"
    ] if numbers else []


def write(path: Path) -> tuple[bool, list[str]]:
    """Store what comes out."""
    import tl_sparse
    from tl_sparse.storage.atomic_write import write_atomic

    notebook = executed(path)
    if found := foreign_paths(notebook):
        return False, [f"a path of this machine is in its outputs: {found[0]} (nothing was stored)"]
    draw(notebook)
    notebook.metadata["tl_sparse"] = {"version": tl_sparse.__version__, "sources": digest(notebook)}
    text = nbformat.writes(notebook) + "\n"
    write_atomic(path, text)
    return True, [f"{len(text) / 1e3:,.0f} kB"]


def draw(notebook: NotebookNode) -> None:
    """Put a picture beside every figure of plotly."""
    from playwright.sync_api import sync_playwright
    from plotly.offline import get_plotlyjs

    figures = [
        o for cell in code_cells(notebook) for o in cell.outputs if PLOTLY in o.get("data", {})
    ]
    if not figures:
        return
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(content=get_plotlyjs())
        for output in figures:
            output.data["image/png"] = picture(page, output.data[PLOTLY])
        browser.close()


def picture(page: Any, figure: dict[str, Any]) -> str:
    """A figure as PNG, base64."""
    layout = figure["layout"]
    size = {"width": layout.get("width", WIDTH), "height": layout.get("height", HEIGHT)}
    url = page.evaluate(DRAW, [dict(figure), size])
    return str(url.partition(",")[2])


def main() -> int:
    """Do it for the notebooks that are named, or for all; 0 if all is well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("check", "write"))
    parser.add_argument("notebooks", nargs="*", type=Path)
    options = parser.parse_args()
    paths = [path.resolve() for path in options.notebooks] or stored_notebooks()
    if missing := [path for path in paths if path not in stored_notebooks()]:
        parser.error(f"no notebook: {', '.join(map(str, missing))}")
    if options.what == "write" and chromium_path() is None:
        parser.error(f"the figures' pictures need a Chromium; none of {', '.join(NAMES)} is here")
    if options.what == "write" and find_spec("playwright") is None:
        parser.error('the figures\' pictures need playwright, of the extra "dev"')

    def timed(path: Path) -> bool:
        started = time.perf_counter()
        try:
            well, remarks = (check if options.what == "check" else write)(path)
        except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError) as error:
            well, remarks = False, [str(error)]
        seconds = time.perf_counter() - started
        print(f"{'ok    ' if well else 'FAILED'} {path.stem:32s} {seconds:5.0f} s", flush=True)
        for remark in remarks:
            print("       " + remark.replace("\n", "\n       "), flush=True)
        return well

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return 0 if all(list(pool.map(timed, paths))) else 1


if __name__ == "__main__":
    sys.exit(main())
