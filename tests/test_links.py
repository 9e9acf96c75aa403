"""Links between README, the documentation and the files of the repository."""

import re

import pytest

from tests.snippets import PAGES

LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")
BUILT = "gallery/"
"""What `make docs` makes."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert [link for link in missing if not link.startswith(BUILT)] == []
