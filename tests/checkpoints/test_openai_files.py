"""Models at a web address: a server on this machine stands for the web."""

import functools
import http.server
import shutil
import socket
import threading

import pytest
import torch

from tl_sparse.circuits.openai_payload import read_payload
from tl_sparse.model.transformer import SparseTransformer


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, counts what it is asked for, and stops halfway through ``truncated``."""

    asked: list[str]
    truncated = ""

    def do_GET(self):
        self.asked.append(self.path.rpartition("/")[2])
        super().do_GET()

    def copyfile(self, source, outputfile):
        content = source.read()
        half = self.truncated and self.path.endswith(self.truncated)
        outputfile.write(content[: len(content) // 2] if half else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(request, tmp_path, monkeypatch):
    """(address, folder, handler) of a server of the reference model; its cache is empty."""
    folder = tmp_path / "web"
    shutil.copytree(request.config.rootpath / "tests" / "reference" / "yolo_like", folder / "m")
    monkeypatch.setenv("TL_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    handler = type("Handler", (Handler,), {"asked": []})
    serve = functools.partial(handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/m", folder / "m", handler
        server.shutdown()
        thread.join()


def cached(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_model_is_fetched_once(served, tmp_path, capsys):
    address, folder, handler = served
    model = SparseTransformer.from_openai(address)
    local = SparseTransformer.from_openai(folder)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in local.state_dict().items())
    assert handler.asked == ["beeg_config.json", "final_model.pt", "vocab.bpe", "encoder.json"]
    assert {p.name for p in cached(tmp_path)} == {"beeg_config.json", "final_model.pt"}
    assert "final_model.pt: 100%" in capsys.readouterr().err
    SparseTransformer.from_openai(f"{address}/", progress=False)
    assert len(handler.asked) == 4


def test_without_progress_nothing_is_shown(served, capsys):
    SparseTransformer.from_openai(served[0], progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_download_that_stops_leaves_nothing(served, tmp_path):
    address, _, handler = served
    handler.truncated = "final_model.pt"
    with pytest.raises(FileNotFoundError, match=r"final_model.pt cannot be fetched: .*stopped"):
        SparseTransformer.from_openai(address, progress=False)
    assert cached(tmp_path) == []
    handler.truncated = ""
    assert SparseTransformer.from_openai(address, progress=False).config.n_layers == 2


def test_what_is_not_there(served, tmp_path):
    address, folder, _ = served
    (folder / "final_model.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"final_model.pt cannot be fetched: .*404"):
        SparseTransformer.from_openai(address, progress=False)
    with pytest.raises(FileNotFoundError, match=r"viz_data.pt cannot be fetched"):
        read_payload(f"{address}/viz_data.pt", progress=False)
    assert cached(tmp_path) == []


def test_a_server_that_does_not_answer(served, tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        SparseTransformer.from_openai("http://127.0.0.1:9/model", progress=False)
    assert cached(tmp_path) == []


def test_a_server_that_speaks_no_http(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    answers = [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nab"]
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            for answer in answers:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        for _ in answers:
            with pytest.raises(FileNotFoundError, match="cannot be fetched"):
                SparseTransformer.from_openai(
                    f"http://127.0.0.1:{server.getsockname()[1]}/m", progress=False
                )
        thread.join()
    assert cached(tmp_path) == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a b", "http://127.0.0.1:port/m"])
def test_an_address_that_is_none(tmp_path, monkeypatch, address):
    monkeypatch.setenv("TL_SPARSE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        SparseTransformer.from_openai(address, progress=False)


@pytest.mark.parametrize("address", ["file:///etc/m", "ftp://host/m", "az://oaipublic/m"])
def test_other_schemes_are_refused(address):
    with pytest.raises(ValueError, match="is no http or https address"):
        SparseTransformer.from_openai(address)


def test_tokenizer_files_elsewhere_on_the_web(served, tmp_path):
    address, folder, _ = served
    with pytest.raises(FileNotFoundError, match=r"vocab.bpe cannot be fetched"):
        SparseTransformer.from_openai(folder, tokenizer=address, progress=False)
    payload = folder / "k_optim"
    payload.mkdir()
    torch.save({"circuit_data": {}}, payload / "viz_data.pt")
    assert read_payload(f"{address}/k_optim", progress=False).n_nodes == 0
