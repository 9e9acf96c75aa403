"""Released models by name and address: a server on this machine stands for the web."""

import errno
import hashlib
import json
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.openai_container import right_md5
from tl_sparse import progress
from tl_sparse.checkpoints.openai_files import BrokenAtSource, fetch_model, local_folder
from tl_sparse.circuits import read_payload
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage import download

PLAIN = {"progress": False, "tokenizer": False}
MODEL = ("beeg_config.json", "final_model.pt")


def load(base, name="csp_yolo2", **options):
    return SparseTransformer.from_openai(name, base_url=base, **{"progress": False} | options)


def same(model, folder):
    local = SparseTransformer.from_openai(folder, **PLAIN)
    return all(torch.equal(model.state_dict()[n], t) for n, t in local.state_dict().items())


def cached(tmp_path):
    """What was fetched, by name, parts and locks included."""
    return {path.name: path for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def names_asked(handler):
    return [name.rpartition("/")[2] for name, _ in handler.asked]


# --------------------------------------------------------------------------------------------------
# once and for all


def test_a_model_is_fetched_by_name_once_with_the_tokenizer_beside_models(
    container, tmp_path, capsys, monkeypatch
):
    base, root, handler = container
    monkeypatch.setattr(progress, "EVERY", 0)  # a line for every piece
    model = load(base, progress=True)
    assert same(model, root / "models" / "csp_yolo2")
    assert model.tokenizer.decode(model.to_tokens("ab").flatten().tolist()) == "ab"
    # in the model's folder the tokenizer is looked for first
    words = ("vocab.bpe", "encoder.json")
    assert names_asked(handler) == [*MODEL, *words, *words]
    assert "final_model.pt: 100%" in capsys.readouterr().err
    load(f"{base}/")
    SparseTransformer.from_openai(f"{base}/models/csp_yolo2/", progress=False)
    assert len(handler.asked) == 6
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert not [name for name in cached(tmp_path) if name.endswith((".part", ".lock", ".draft"))]


def test_the_manifest_says_where_each_file_came_from_and_what_it_is(container, tmp_path):
    base, root, _ = container
    load(base)
    folder = next((tmp_path / "cache" / "openai").glob("csp_yolo2-*"))
    manifest = json.loads((folder / "tl_sparse_manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert set(manifest["files"]) == set(MODEL)
    assert manifest["absent"] == ["vocab.bpe", "encoder.json"]
    for name, entry in manifest["files"].items():
        content = (root / "models" / "csp_yolo2" / name).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["address"] == f"{base}/models/csp_yolo2/{name}"


def test_two_at_once_fetch_once(container):
    base, _, handler = container
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: load(base, tokenizer=False), range(2)))
    assert names_asked(handler).count("final_model.pt") == 1


def test_a_payload_is_found_by_its_path_below_the_base(container):
    base, root, _ = container
    (root / "viz" / "m" / "k_optim").mkdir(parents=True)
    torch.save({"circuit_data": {}}, root / "viz" / "m" / "k_optim" / "viz_data.pt")
    folder = local_folder("viz/m/k_optim", ["viz_data.pt"], progress=False, base_url=base)
    assert read_payload(folder).n_nodes == 0
    assert read_payload(f"{base}/viz/m/k_optim", progress=False).n_nodes == 0


# --------------------------------------------------------------------------------------------------
# on the way


def broken_off(container, tmp_path, at=3000):
    """A load that breaks off at a byte of the weights; the error, and the part's size."""
    base, _, handler = container
    handler.stops["final_model.pt"] = at
    with pytest.raises(FileNotFoundError) as caught:
        load(base, tokenizer=False)
    handler.stops.clear()
    handler.asked.clear()
    part = cached(tmp_path).get(".final_model.pt.part")
    assert "final_model.pt" not in cached(tmp_path)
    return str(caught.value), part.stat().st_size if part else 0


def test_row_25_a_second_call_resumes_where_the_first_broke_off(container, tmp_path):
    base, root, handler = container
    error, kept = broken_off(container, tmp_path)
    size = (root / "models" / "csp_yolo2" / "final_model.pt").stat().st_size
    assert f"it stopped after 3,000 of {size:,} bytes; 3,000 bytes are kept" in error
    assert kept == 3000
    assert same(load(base, tokenizer=False), root / "models" / "csp_yolo2")
    assert handler.asked[0] == ("models/csp_yolo2/final_model.pt", "bytes=3000-")
    assert ".final_model.pt.part" not in cached(tmp_path)
    assert ".final_model.pt.part.json" not in cached(tmp_path)


def test_one_call_goes_on_by_itself_as_long_as_something_comes(container, monkeypatch):
    base, root, handler = container
    size = (root / "models" / "csp_yolo2" / "final_model.pt").stat().st_size
    monkeypatch.setattr(download, "TRIES", 1)

    class Breaks(dict):
        def get(self, name, whole):
            self.calls = getattr(self, "calls", 0) + (name == "final_model.pt")
            return size * self.calls // 4 if name == "final_model.pt" else whole

    handler.stops = Breaks()
    load(base, tokenizer=False)
    assert names_asked(handler).count("final_model.pt") == 4


def test_a_server_that_gives_no_parts_gives_the_whole_file(container, tmp_path):
    base, root, handler = container
    broken_off(container, tmp_path)
    handler.ranges = False
    assert same(load(base, tokenizer=False), root / "models" / "csp_yolo2")
    assert handler.asked[0][1] == "bytes=3000-"


@pytest.mark.parametrize("checks_version", [True, False])
def test_a_file_that_changed_between_two_requests_is_fetched_anew(
    container, tmp_path, checks_version
):
    base, root, handler = container
    broken_off(container, tmp_path)
    path = root / "models" / "csp_yolo2" / "final_model.pt"
    state = torch.load(path, weights_only=True)
    torch.save({name: tensor * 0.5 for name, tensor in state.items()}, path)
    handler.checks_version = checks_version  # without it the server sends the new file's end
    assert same(load(base, tokenizer=False), path.parent)


def test_a_file_that_became_shorter_is_fetched_anew(container, tmp_path):
    base, root, handler = container
    size = (root / "models" / "csp_yolo2" / "final_model.pt").stat().st_size
    broken_off(container, tmp_path, at=size - 10)
    folder = root / "models" / "csp_yolo2"
    state = torch.load(folder / "final_model.pt", weights_only=True)
    del state["final_logits_bias"]
    torch.save(state, folder / "final_model.pt")
    handler.checks_version = False
    assert same(load(base, tokenizer=False), folder)


@pytest.mark.parametrize(("etags", "modified", "resumes"), [(False, False, False),
                                                            (False, True, True)])  # fmt: skip
def test_what_shows_that_a_file_is_still_the_same(container, tmp_path, etags, modified, resumes):
    base, root, handler = container
    handler.etags, handler.modified = etags, modified
    broken_off(container, tmp_path)
    assert same(load(base, tokenizer=False), root / "models" / "csp_yolo2")
    assert (handler.asked[0][1] is not None) == resumes


def test_a_part_that_was_altered_is_noticed_where_the_server_states_the_md5(container, tmp_path):
    base, root, handler = container
    handler.md5 = right_md5
    broken_off(container, tmp_path)
    cached(tmp_path)[".final_model.pt.part"].write_bytes(b"x" * 3000)
    assert same(load(base, tokenizer=False), root / "models" / "csp_yolo2")
    handler.md5 = lambda data: right_md5(data + b"!")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="damaged on the way"):
        load(base, tokenizer=False)
    assert cached(tmp_path) == {}


def test_a_note_that_is_broken_makes_a_new_beginning(container, tmp_path):
    base, root, handler = container
    broken_off(container, tmp_path)
    cached(tmp_path)[".final_model.pt.part.json"].write_text('{"address": 3}')
    assert same(load(base, tokenizer=False), root / "models" / "csp_yolo2")
    assert handler.asked[0][1] is None


def test_a_server_that_is_busy_is_asked_again(container):
    base, _, handler = container
    handler.answers["final_model.pt"] = [503, 429, 500]
    load(base, tokenizer=False)
    assert names_asked(handler).count("final_model.pt") == 4
    handler.answers["beeg_config.json"] = [403]
    with pytest.raises(FileNotFoundError, match="403"):
        load(base, "csp_bridge1")


def test_an_answer_that_is_no_config_is_explained(container, tmp_path):
    base, root, _ = container
    (root / "models" / "csp_yolo2" / "beeg_config.json").write_text("<html>log in</html>")
    with pytest.raises(ValueError, match=r"no valid JSON.* it is what the server sent"):
        load(base, tokenizer=False)


def test_a_full_disk_is_named_before_anything_is_fetched(container, tmp_path, monkeypatch):
    base, _, _ = container
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="disk is full") as caught:
        load(base)
    assert caught.value.errno == errno.ENOSPC
    assert "beeg_config.json" in str(caught.value.filename)


# --------------------------------------------------------------------------------------------------
# at its source


def test_row_25_a_file_that_is_broken_at_its_source_is_told_apart(container, tmp_path):
    base, root, handler = container
    folder = shutil.copytree(root / "models" / "csp_yolo2", root / "models" / "csp_bridges1")
    whole = (folder / "final_model.pt").read_bytes()
    (folder / "final_model.pt").write_bytes(whole[:-200])  # a zip archive without its directory
    (folder / "final_bridges.pt").write_bytes(b"")
    words = (
        r"final_model.pt is broken on the server itself: it is no zip archive.*came whole.*does "
        r"not help.*csp_bridges1 was a zip archive without its directory on the server \(January"
    )
    with pytest.raises(BrokenAtSource, match=words):
        load(base, "csp_bridge1", tokenizer=False)
    assert "final_model.pt" not in cached(tmp_path)
    asked = len(handler.asked)
    with pytest.raises(BrokenAtSource, match=r"delete .* to fetch it all the same"):
        load(base, "csp_bridges1", tokenizer=False)
    assert len(handler.asked) == asked  # 800 MB for nothing
    (folder / "final_model.pt").write_bytes(whole)
    with pytest.raises(BrokenAtSource, match=r"final_bridges.pt is broken on the server itself: it "
                       r"is empty \(0 bytes\)"):  # fmt: skip
        fetch_model("csp_bridges1", None, ["final_bridges.pt"], base, False)
    assert same(load(base, "csp_bridges1", tokenizer=False), folder)


def test_a_copy_that_users_fetched_themselves_is_explained(openai, tmp_path):
    folder = openai.rename(tmp_path / "csp_bridges1")
    path = folder / "final_model.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"truncated or no weights-only.*csp_bridges1 was a zip"):
        SparseTransformer.from_openai(folder, **PLAIN)


def test_a_fetched_file_that_was_altered_is_fetched_anew_or_explained(container, tmp_path):
    base, root, handler = container
    load(base, tokenizer=False)
    path = cached(tmp_path)["final_model.pt"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.warns(UserWarning, match="final_model.pt is not as it came: it is fetched anew"):
        assert same(load(base, tokenizer=False), root / "models" / "csp_yolo2")
    path.write_bytes(b"\0" * len(whole))
    with pytest.raises(ValueError, match=r"it is not what was fetched \(another SHA-256\)"):
        load(base, tokenizer=False)
    handler.asked.clear()
    fetch_model("csp_yolo2", None, (), base, False)
    assert "final_model.pt" in names_asked(handler)
    assert path.read_bytes() == whole


def test_a_broken_manifest_is_one_clear_error(container, tmp_path):
    load(container[0], tokenizer=False)
    path = cached(tmp_path)["tl_sparse_manifest.json"]
    values = json.loads(path.read_text())
    for text, message in [("{", "no valid JSON"), ('{"schema_version": 2}', "schema_version 2"),
                          (json.dumps(values | {"files": 3}), "is broken: files=3"),
                          (json.dumps(values | {"x": 3}), "is broken: unknown")]:  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(container[0], tokenizer=False)


# --------------------------------------------------------------------------------------------------
# to a folder, from other places


def test_a_model_is_fetched_to_a_folder_with_its_tokenizer(container, tmp_path):
    base, root, _ = container
    assert fetch_model("csp_yolo2", tmp_path / "out", (), base, False) == tmp_path / "out"
    model = SparseTransformer.from_openai(tmp_path / "out")
    assert same(model, root / "models" / "csp_yolo2")
    assert len(model.tokenizer) == 258
    path = tmp_path / "out" / "final_model.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"final_model.pt has .* bytes, and had .* fetch it again"):
        SparseTransformer.from_openai(tmp_path / "out")
    with pytest.raises(ValueError, match="nothing to fetch"):
        fetch_model(str(root / "models" / "csp_yolo2"))
    with pytest.raises(ValueError, match=r"'\.\./x' is no name of a file"):
        fetch_model("csp_yolo2", tmp_path / "out", ["../x"], base, False)
    (tmp_path / "out" / "tl_sparse_manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"holds beeg_config.json.* not fetched by tl_sparse: move"
    ):
        fetch_model("csp_yolo2", tmp_path / "out", (), base, False)


def test_folders_that_a_model_cannot_be_fetched_to(container, tmp_path, monkeypatch):
    base, _, _ = container
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        fetch_model("csp_yolo2", tmp_path / "file", (), base, False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "empty").mkdir()
    fetch_model("csp_yolo2", Path(), (), [str(tmp_path / "empty"), base], False)
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        *MODEL, "vocab.bpe", "encoder.json", "tl_sparse_manifest.json",
    }  # fmt: skip


def test_mirrors_are_tried_in_turn(container, tmp_path, monkeypatch):
    base, root, _ = container
    monkeypatch.setenv("TL_SPARSE_OPENAI_URL", f"http://127.0.0.1:9/c {base}")
    assert same(SparseTransformer.from_openai("csp_yolo2", **PLAIN), root / "models" / "csp_yolo2")
    assert load([f"{base}/elsewhere", str(root)]).tokenizer is not None  # a folder is a mirror too
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched.*404.*mine/beeg_config.json"):
        load([base, str(root)], "mine")


def test_a_model_in_a_folder_called_models_has_the_tokenizer_beside_it(container, monkeypatch):
    _, root, handler = container
    model = SparseTransformer.from_openai(root / "models" / "csp_yolo2")
    assert len(model.tokenizer) == 258
    moved = (root / "tinypython").rename(root / "elsewhere")
    with pytest.warns(UserWarning, match=r"no tokenizer for .*csp_yolo2.*tinypython"):
        assert SparseTransformer.from_openai(root / "models" / "csp_yolo2").tokenizer is None
    monkeypatch.setenv("TINYPYTHON_TOK_DIR", str(moved))
    assert len(SparseTransformer.from_openai(root / "models" / "csp_yolo2").tokenizer) == 258
    assert handler.asked == []


def test_without_a_tokenizer_on_the_server_there_is_a_warning(container):
    base, root, _ = container
    shutil.rmtree(root / "tinypython")
    with pytest.warns(UserWarning, match=r"takes token ids only .*vocab.bpe cannot be fetched"):
        assert load(base).tokenizer is None


# --------------------------------------------------------------------------------------------------
# what is no model


def test_what_is_not_there(container, tmp_path):
    base, _, _ = container
    with pytest.raises(FileNotFoundError, match=r"beeg_config.json cannot be fetched: .*404"):
        load(base, "dense1_1x")
    with pytest.raises(FileNotFoundError, match=r"viz_data.pt cannot be fetched"):
        read_payload(f"{base}/viz_data.pt", progress=False)
    assert not list((tmp_path / "cache").rglob("*-*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("csp_yolo", "neither a folder here nor a released model .did you mean csp_yolo.?"),
        ("frobnicate", r"nor a released model; released are csp_yolo1, .*dense1_4x, and more"),
        ("csp_sweep1_3x_0.9Mnonzero_afrac0.125", "did you mean csp_sweep1_"),
    ],
)
def test_a_name_that_is_unknown(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TL_SPARSE_OPENAI_URL", raising=False)
    with pytest.raises(FileNotFoundError, match=message):
        SparseTransformer.from_openai(name)
    (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=r"beeg_config.json is missing"):
        SparseTransformer.from_openai(name)


def test_a_server_that_does_not_answer(container, tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        SparseTransformer.from_openai("http://127.0.0.1:9/model", progress=False)
    assert cached(tmp_path) == {}


def test_a_server_that_speaks_no_http(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "TRIES", 0)
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
    assert cached(tmp_path) == {}


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a b", "http://127.0.0.1:port/m"])
def test_an_address_that_is_none(tmp_path, monkeypatch, address):
    monkeypatch.setenv("TL_SPARSE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        SparseTransformer.from_openai(address, progress=False)


@pytest.mark.parametrize("address", ["file:///etc/m", "ftp://host/m", "az://oaipublic/m"])
def test_other_schemes_are_refused(address):
    with pytest.raises(ValueError, match="is no http or https address"):
        SparseTransformer.from_openai(address)
    with pytest.raises(ValueError, match="is no http or https address"):
        SparseTransformer.from_openai("csp_yolo2", base_url=address)


def test_tokenizer_files_elsewhere_on_the_web(container):
    base, root, _ = container
    folder = root / "models" / "csp_yolo2"
    with pytest.raises(FileNotFoundError, match=r"vocab.bpe cannot be fetched"):
        SparseTransformer.from_openai(folder, tokenizer=f"{base}/nowhere", progress=False)
    model = SparseTransformer.from_openai(folder, tokenizer=f"{base}/tinypython", progress=False)
    assert len(model.tokenizer) == 258
