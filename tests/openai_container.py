"""A server on this machine in the place of OpenAI's: files, ranges, lists, and what goes wrong."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
import torch


class Container(http.server.BaseHTTPRequestHandler):
    """Serves ``root`` as Azure does. Subclass it (``serve`` does) and set what should go wrong."""

    root = None
    asked: list
    """(file, Range header) of every request for a file."""
    stops: dict
    """File name → byte at which the connection breaks off."""
    answers: dict
    """File name → codes to answer with before serving it."""
    etags, modified, ranges, checks_version, lengths = True, False, True, True, True
    md5 = None
    page = 1000
    raw_list = None

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if "comp=list" in query:
            self.send_list(parse_qs(query))
            return
        name = unquote(path).removeprefix("/c/")
        part = self.headers.get("Range")
        self.asked.append((name, part))
        file = self.root / name
        if codes := self.answers.get(file.name):
            self.send_error(codes.pop(0))
            return
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        day = f"Mon, 01 Jan 2024 00:00:{int(hashlib.sha1(data).hexdigest(), 16) % 60:02} GMT"
        same = self.headers.get("If-Range") in (etag, day) or not self.checks_version
        start = int(part[6:-1]) if part and self.ranges and same else None
        if start is not None and start >= len(data):
            self.send_error(416)
            return
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.etags:
            self.send_header("ETag", etag)
        if self.modified:
            self.send_header("Last-Modified", day)
        if stated := type(self).md5:
            self.send_header("x-ms-blob-content-md5", stated(data))
        start = start or 0
        if self.lengths:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : self.stops.get(file.name, len(data))])

    def send_list(self, query):
        prefix, marker = query.get("prefix", [""])[0], query.get("marker", [""])[0]
        names = sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*")
            if path.is_file() and path.relative_to(self.root).as_posix().startswith(prefix)
        )
        rest = [name for name in names if name >= marker]
        blobs = "".join(
            f"<Blob><Name>{name}</Name><Properties><Content-Length>"
            f"{(self.root / name).stat().st_size}</Content-Length></Properties></Blob>"
            for name in rest[: self.page]
        )
        following = rest[self.page] if len(rest) > self.page else ""
        text = self.raw_list or (
            '<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs>'
            f"{blobs}</Blobs><NextMarker>{following}</NextMarker></EnumerationResults>"
        )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode("utf-8-sig"))

    def log_message(self, *args):
        pass


def right_md5(data):
    """What Azure says of a file."""
    return base64.b64encode(hashlib.md5(data).digest()).decode()


@contextlib.contextmanager
def serve(root):
    """(base address, handler class) of a running server of a folder."""
    handler = type("Handler", (Container,), {"root": root, "asked": [], "stops": {}, "answers": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/c", handler
        server.shutdown()
        thread.join()


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """(base address, root, handler) of a server of one released model, ``csp_yolo2``, with a
    tokenizer; the cache is empty, and nothing waits between attempts."""
    from tests.checkpoints.openai_reference_model import BASE, random_state
    from tl_sparse.checkpoints.openai_tokenizer import BYTES
    from tl_sparse.storage import download

    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setenv("TL_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    root = tmp_path / "web"
    config = BASE | {"vocab_size": 300}
    (root / "models" / "csp_yolo2").mkdir(parents=True)
    (root / "models" / "csp_yolo2" / "beeg_config.json").write_text(json.dumps(config))
    torch.save(random_state(config), root / "models" / "csp_yolo2" / "final_model.pt")
    (root / "tinypython").mkdir()
    (root / "tinypython" / "vocab.bpe").write_text("#version: 0.2\na b\n", encoding="utf-8")
    ids = {token: i for i, token in enumerate([*BYTES, "ab"])}
    (root / "tinypython" / "encoder.json").write_text(json.dumps(ids), encoding="utf-8")
    with serve(root) as (base, handler):
        yield base, root, handler
