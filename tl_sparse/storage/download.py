"""Files from the web: resumed where they broke off, and never taken for whole before they are.

What has come of a file lies beside its place as ``.NAME.part``; ``.NAME.part.json`` says what it is
a part of. A download goes on from there if the server still has the same file (by its ETag, or the
time it was changed), and begins anew if not, or if that cannot be known.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import time
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tl_sparse.progress import progress_bar
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.storage.disk_full import is_disk_full
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.read_file import open_file

CHUNK = 1 << 20
PART = ".part"
MAX_BYTES, MAX_NOTE_BYTES = 1 << 38, 1 << 16
TIMEOUT = 60
"""Seconds without a byte after which a connection is given up."""
TRIES = 4
"""Attempts without a new byte after which a download is given up."""
PAUSE = 1.0
"""Seconds before the second attempt; twice as long before each further one."""
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may give another one in a moment."""
GONE = (403, 404, 410)
"""Answers for a file that is not there (403 is S3's, where a list is not public)."""


class NotOnServer(FileNotFoundError):
    """The server answers, and says that it has no such file."""


class BrokeOff(Exception):
    """A download stopped on the way; another attempt may go on."""


@dataclass(frozen=True)
class Version:
    """Which version of which file a server gives."""

    address: str
    """Where it is."""
    etag: str = ""
    """The server's name for the version; empty without one."""
    modified: str = ""
    """When the server says it was changed."""
    bytes: int | None = None
    """Its size; None if the server does not say."""
    md5: str = ""
    """Its MD5 in base64, if the server says (Azure does)."""

    @property
    def validator(self) -> str:
        """What the server can tell by that it is still this version; empty if nothing can."""
        return self.modified if self.etag.startswith("W/") or not self.etag else self.etag

    def same_as(self, other: Version | None) -> bool:
        """Whether this is another's version, as far as the server tells."""
        return other is not None and (self.validator, self.bytes) == (other.validator, other.bytes)


@dataclass(frozen=True)
class Fetched:
    """A file that has come whole."""

    address: str
    """Where from."""
    bytes: int
    """Its size."""
    sha256: str
    """Its SHA-256, in hexadecimal digits."""
    etag: str = ""
    """The server's name for the version; empty without one."""


def fetch(address: str, path: Path, progress: bool = True) -> Fetched:
    """Write what is at an http(s) address to a file, going on where an earlier call broke off.

    Raises:
        NotOnServer: the server has no such file.
        FileNotFoundError: the server does not answer, refuses, or breaks off again and again. What
            has come is kept for the next call.
        OSError: the disk is full (``errno.ENOSPC``); what has come is kept.
    """
    most, tries = 0, TRIES
    while True:
        try:
            return attempt(address, path, progress)
        except BrokeOff as error:
            size = size_of(part_of(path))
            tries = TRIES if size > most else tries - 1
            most = max(most, size)
            if tries < 1:
                if not size:
                    forget(path)
                kept = f"; {size:,} bytes are kept, from which the next call goes on" * (size > 0)
                raise FileNotFoundError(f"{address} cannot be fetched: {error}{kept}") from error
            time.sleep(PAUSE * 2 ** (TRIES - tries))
        except HTTPError as error:
            kind = NotOnServer if error.code in GONE else FileNotFoundError
            raise kind(f"{address} cannot be fetched: {error}") from error
        except (ValueError, HTTPException, URLError) as error:
            raise FileNotFoundError(f"{address} cannot be fetched: {error}") from error
        except OSError as error:
            if not is_disk_full(error):
                raise
            message = "the disk is full or a quota reached; the next call goes on with what came"
            raise OSError(errno.ENOSPC, message, str(path)) from error


def attempt(address: str, path: Path, progress: bool) -> Fetched:
    """Fetch what is missing of a file in one request, and put it in its place when it is whole.

    Raises:
        BrokeOff: it stopped on the way, or another attempt may succeed for another reason.
        HTTPError, URLError, HTTPException, ValueError: another attempt will not.
    """
    part, note = part_of(path), note_of(path)
    version = version_of_part(note, address)
    have = size_of(part) if version is not None else 0
    if version is None or not have or have != version.bytes:
        with answer(address, path, version if have else None, have) as response:
            found = version_of(response, address, have)
            if response.status != 206:  # it changed, or the server gives no parts
                have = 0
                write_atomic(note, json.dumps(asdict(found)))
            elif first_byte(response) != have or not found.same_as(version):
                forget(path)
                raise BrokeOff("the server gave another part than the one that is missing")
            # for a part the server may not state it again
            md5 = found.md5 or (version.md5 if have and version is not None else "")
            version = replace(found, md5=md5)
            receive(response, part, have, version.bytes, progress)
    size = size_of(part)
    if version.bytes is not None and size < version.bytes:
        raise BrokeOff(f"it stopped after {size:,} of {version.bytes:,} bytes")
    damaged = version.md5 and version.md5 != base64.b64encode(digest(part, "md5")).decode()
    if damaged or (version.bytes is not None and size > version.bytes):
        forget(path)
        raise BrokeOff("it was damaged on the way: it is not what the server says that it sends")
    os.replace(part, path)
    note.unlink(missing_ok=True)
    return Fetched(address, size, digest(path, "sha256").hex(), version.etag)


def answer(address: str, path: Path, version: Version | None, have: int) -> HTTPResponse:
    """The server's answer to a request for a file, or for what is missing of this version of it.

    Raises:
        BrokeOff: another request may be answered otherwise.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "tl_sparse"}
    if version is not None:
        headers |= {"Range": f"bytes={have}-", "If-Range": version.validator}
    try:
        response: HTTPResponse = urlopen(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # there is no such part: the file is shorter now
            forget(path)
        elif error.code not in BUSY:
            raise
        raise BrokeOff(f"{error}") from error
    except URLError as error:
        lasting = (socket.gaierror, ConnectionRefusedError, ssl.SSLError)
        if isinstance(error.reason, lasting) or not isinstance(error.reason, OSError):
            raise
        raise BrokeOff(f"{error.reason}") from error
    except (ConnectionError, TimeoutError) as error:  # the server hangs up without an answer
        raise BrokeOff(f"{error}") from error
    if not response.url.startswith(("http://", "https://")):
        raise ValueError(f"it leads to {response.url:.200}, which is no http or https address")
    if (coding := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise ValueError(f"it comes encoded as {coding:.80}, which nobody asked for")
    return response


def version_of(response: HTTPResponse, address: str, have: int) -> Version:
    """The version that an answer is, or, where ``have`` bytes are there, is the rest of."""
    headers, size, whole = response.headers, response.length, response.status == 200
    if not whole and size is not None:
        size += have
    md5 = headers.get("x-ms-blob-content-md5") or (headers.get("Content-MD5") if whole else "")
    etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
    return Version(address, etag, modified, size, md5 or "")


def first_byte(response: HTTPResponse) -> int | None:
    """Where a part of a file begins; None if the answer does not say."""
    found = re.match(r"bytes (\d{1,15})-", response.headers.get("Content-Range", ""))
    return None if found is None else int(found[1])


def receive(
    response: HTTPResponse, part: Path, have: int, total: int | None, progress: bool
) -> None:
    """Add an answer to the part of a file that is there.

    Raises:
        BrokeOff: the connection was lost.
        OSError: there is no room for it on the disk (``errno.ENOSPC``).
    """
    if total is not None and total - have > shutil.disk_usage(part.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        part.open("ab" if have else "wb") as file,
        progress_bar(
            desc=part.name[1 : -len(PART)], total=total, initial=have, unit="B", unit_scale=True,
            disable=not progress,
        ) as bar,
    ):  # fmt: skip
        try:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        except (HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            raise BrokeOff(f"it stopped: {error}") from error


# --------------------------------------------------------------------------------------------------
# what has come so far


def part_of(path: Path) -> Path:
    """Where what has come of a file is kept."""
    return path.with_name(f".{path.name}{PART}")


def note_of(path: Path) -> Path:
    """Where it is said what that is a part of."""
    return path.with_name(f".{path.name}{PART}.json")


def forget(path: Path) -> None:
    """Remove what has come of a file."""
    part_of(path).unlink(missing_ok=True)
    note_of(path).unlink(missing_ok=True)


def version_of_part(note: Path, address: str) -> Version | None:
    """What there is a part of; None where going on with it would not be safe."""
    try:
        version: Version = dataclass_from_json(Version, read_json(note, MAX_NOTE_BYTES))
    except (FileNotFoundError, ValueError):
        return None
    fits = version.address == address and version.validator and version.bytes is not None
    return version if fits else None


def size_of(path: Path) -> int:
    """A file's size in bytes; 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def digest(path: Path, kind: str) -> bytes:
    """A file's hash, by the name that ``hashlib`` has for its kind."""
    with open_file(path, MAX_BYTES) as file:
        return hashlib.file_digest(file, kind).digest()
