"""What a container on a server lists: names and sizes of its files (Azure's XML, page by page)."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from http.client import HTTPException
from urllib.parse import urlencode
from urllib.request import urlopen

from tl_sparse.storage.download import TIMEOUT

MAX_BYTES = 1 << 24
"""Of one page, which holds at most 5000 names."""
MAX_PAGES = 1000


def listed(bases: Sequence[str], prefix: str) -> dict[str, int]:
    """The files of the first container that answers, whose names begin with a prefix, and their
    sizes in bytes.

    Raises:
        FileNotFoundError: none answers; folders do not.
        ValueError: an answer is no list of a container.
    """
    reasons = []
    for base in bases:
        if not base.startswith(("http://", "https://")):
            reasons.append(f"{base} is no http or https address")
            continue
        try:
            return container(base, prefix)
        except (OSError, HTTPException) as error:
            reasons.append(f"{base} cannot be listed: {error}")
    raise FileNotFoundError("; ".join(reasons))


def container(base: str, prefix: str) -> dict[str, int]:
    """All pages of a container's list; errors as in :func:`listed`, and those of ``urlopen``."""
    files: dict[str, int] = {}
    marker, seen = "", set[str]()
    for _ in range(MAX_PAGES):
        query = {"restype": "container", "comp": "list", "prefix": prefix, "marker": marker}
        asked = urlencode({key: value for key, value in query.items() if value})
        with urlopen(f"{base}?{asked}", timeout=TIMEOUT) as response:
            found, marker = page(response.read(MAX_BYTES + 1), base)
        files |= found
        if not marker:
            return files
        if marker in seen:
            raise ValueError(f"the list of {base} leads in a circle")
        seen.add(marker)
    raise ValueError(f"the list of {base} has more than {MAX_PAGES} pages")


def page(text: bytes, origin: str) -> tuple[dict[str, int], str]:
    """One page's files and their sizes, and the marker of the next page; empty on the last.

    Raises:
        ValueError: it is too long, no XML, declares entities, or is no list of a container.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        decoded = text.decode("utf-8-sig")
        if "<!DOCTYPE" in decoded:  # its entities could unpack to any size
            raise ValueError("it has a document type of its own")
        root = ET.fromstring(decoded)
        if root.tag != "EnumerationResults":
            raise ValueError(f"it is a {root.tag:.80}")
        files = {}
        for blob in root.iterfind("Blobs/Blob"):
            name = blob.findtext("Name") or ""
            size = blob.findtext("Properties/Content-Length") or ""
            if (
                not name
                or not name.isprintable()
                or not size.isascii()
                or not size.isdigit()
                or len(size) > 15
            ):
                raise ValueError(f"a file {name!r:.80} of {size!r:.80} bytes")
            files[name] = int(size)
    except (ValueError, ET.ParseError) as error:
        raise ValueError(f"{origin} answers with no list of a container: {error}") from error
    return files, root.findtext("NextMarker") or ""
