"""What mkdocs calls: README is the site's first page, the gallery's pages are files of the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "build" / "gallery"
# other files of the repository are no pages: their names stay, without a link
ELSEWHERE = re.compile(
    r"\[([^]]*)\]\((?:CITATION\.cff|LICENSE|CHANGELOG\.md|(?:\.\./)?notebooks/[^)]*)\)"
)


def on_files(files: Files, config: Any) -> Files:
    """Add README as index.md, its links as they are from there, and the gallery."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=re.sub(r"\]\(docs/", "](", text)))
    pages = sorted(GALLERY.glob("*"))
    if not pages:
        raise PluginError(f"{GALLERY} is empty: `make docs` fills it")
    for path in pages:
        files.append(File.generated(config, f"gallery/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page as the site has it."""
    return ELSEWHERE.sub(r"\1", markdown)
