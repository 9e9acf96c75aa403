"""What mkdocs calls: README is the site's first page."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add README as index.md, its links as they are from there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    # other files of the repository are no pages: their names stay, without a link
    text = re.sub(r"\[([^]]*)\]\((?:CITATION\.cff|LICENSE|CHANGELOG\.md)\)", r"\1", text)
    files.append(File.generated(config, "index.md", content=text))
    return files
