"""The papers are cited the same everywhere."""

import re

import yaml

from tests.snippets import ROOT

ENTRY = re.compile(r"@article\{(\w+),(.*?)\n\}", re.DOTALL)
FIELD = re.compile(r"(\w+) = \{(.*?)\}(?:,|$)", re.MULTILINE)


def test_the_bibtex_of_the_papers_is_that_of_the_citation_file():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    text = (ROOT / "docs" / "citing.md").read_text()
    entries = [dict(FIELD.findall(body)) for _, body in ENTRY.findall(text)]
    assert len(entries) == 3
    for paper, entry in zip(cited, entries, strict=True):
        authors = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
        assert entry["title"] == paper["title"]
        assert entry["author"].split(" and ") == authors
        assert entry["year"] == str(paper["year"])
        assert entry["journal"].removeprefix("arXiv preprint arXiv:") == paper["url"].split("/")[-1]
