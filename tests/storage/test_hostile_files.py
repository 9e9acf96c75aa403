"""Damaged and hostile files: every one is refused with a typed error, or loads, and runs nothing.

More than 2,500 of them, for every reader of the package. Each must end in a ValueError, a
FileNotFoundError or what was to be read, within two seconds of CPU time, ten of the clock, and half
a gibibyte of memory.
"""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import time
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tl_sparse.ablation import activation_means
from tl_sparse.bridges import Bridges, BridgesConfig
from tl_sparse.checkpoints.checkpoint import TrainingRecord
from tl_sparse.checkpoints.packed import training_record
from tl_sparse.circuits import Circuit
from tl_sparse.circuits.circuit import Calibration
from tl_sparse.circuits.edges import circuit_edges
from tl_sparse.config import ActivationDensity, SparseTransformerConfig
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.json_files import MAX_JSON_BYTES
from tl_sparse.storage.tokenizer_files import read_tokenizer

REFUSALS = (ValueError, FileNotFoundError)
MEMORY, SECONDS = 1 << 29, 2.0
CUTS, FLIPS, SPLASHES, EXAMPLES = 50, 150, 50, 50
NASTY: list[Any] = [
    None, True, -1, 0, 3, 10**9, 10**12, 2**31 - 1, 10**400, 0.5, -1e300, float("nan"),
    float("inf"), "", "3", "x" * 5000, [], [1, "a"], [[[]]], {}, {"a": {"b": 1}},
    {"__class__": "os.system"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def little_memory():
    """No more address space than there is in use, and MEMORY on top (where Linux tells)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def little_time():
    """A case that waits (for a pipe's other end, say) fails and does not hang."""

    def ring(*_):
        raise TimeoutError("a case took ten seconds")

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


TRIED: Counter[str] = Counter()


def outcome(load, case):
    """ "refused" or "loaded"; anything else fails, and says at which case."""
    TRIED[os.environ["PYTEST_CURRENT_TEST"]] += 1
    signal.setitimer(signal.ITIMER_REAL, 10)
    started = time.process_time()
    try:
        load()
        result = "loaded"
    except REFUSALS:
        result = "refused"
    except BaseException as error:
        error.add_note(f"case: {case!r:.300}")
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert time.process_time() - started < SECONDS, case
    return result


def outcomes(load, path, contents):
    """Outcome → how often, over what a file may hold instead; the file is restored."""
    original = path.read_bytes()
    tally = {"refused": 0, "loaded": 0}
    for case, data in contents:
        path.write_bytes(data)
        tally[outcome(load, case)] += 1
    path.write_bytes(original)
    assert outcome(load, "restored") == "loaded"
    return tally


def damaged(data: bytes, seed: int = 0):
    """Truncations, flipped bits (half of them in the first part) and overwritten stretches."""
    draw = random.Random(seed)
    for i in range(CUTS):
        yield ("cut", i), data[: len(data) * i // CUTS]
    for _ in range(FLIPS):
        end = len(data) if draw.random() < 0.5 else min(len(data), 1500)
        place, bit = draw.randrange(end), draw.randrange(8)
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        yield ("flip", place, bit), bytes(flipped)
    for _ in range(SPLASHES):
        place, length = draw.randrange(len(data)), draw.randrange(1, 40)
        stretch = draw.choice([bytes(length), b"\xff" * length, draw.randbytes(length)])
        yield ("splash", place), data[:place] + stretch + data[place + draw.choice([0, length]) :]


# --------------------------------------------------------------------------------------------------
# checkpoints


def save(model, folder):
    record = TrainingRecord(
        steps=1, tokens=2, validation_loss=3.0, l0={}, config={"seed": 1}, corpus="c"
    )
    model.save_pretrained(folder, record)
    return folder


@pytest.fixture
def folder(small_model, tmp_path):
    """A small checkpoint with every kind of tensor."""
    return save(small_model("together", zeros=0.8, n_layers=1), tmp_path / "model")


@pytest.fixture
def tokenized(small_model, make_tokenizer, tmp_path):
    """A small checkpoint with a tokenizer."""
    return save(small_model(tokenizer=make_tokenizer(), n_layers=1), tmp_path / "model")


@pytest.fixture
def load(folder):
    return lambda: SparseTransformer.from_pretrained(folder)


def test_damaged_weights(folder, load):
    path = folder / "model.safetensors"
    tally = outcomes(load, path, damaged(path.read_bytes()))
    assert tally["refused"] > 80
    assert tally["loaded"] > 20  # a flipped bit of a value is a value


def test_damaged_and_hostile_bridges(tmp_path):
    config = BridgesConfig(d_dense=4, d_sparse=6, n_dense=1, n_sparse=2, encoder="threshold")
    Bridges(config).save_pretrained(tmp_path / "bridges")
    load = lambda: Bridges.from_pretrained(tmp_path / "bridges")  # noqa: E731
    path = tmp_path / "bridges" / "bridges.json"
    tally = outcomes(load, path, written(nasty_fields(json.loads(path.read_text()))))
    assert tally["refused"] > 200
    path = tmp_path / "bridges" / "bridges.safetensors"
    tally = outcomes(load, path, damaged(path.read_bytes()))
    assert tally["refused"] > 80


def header_of(data: bytes) -> dict[str, Any]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length])


def with_header(data: bytes, header: Any) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def hostile_headers(data: bytes):
    for length in (0, 1, 7, len(data) - 8, len(data), 10**8 + 1, 2**31, 2**63, 2**64 - 1):
        yield ("length", length), struct.pack("<Q", length) + data[8:]
    for text in (b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{" * 10_000, b"[" * 10_000):
        yield ("text", text[:9]), with_header(data, text)
    for name in header_of(data):
        for key in ("dtype", "shape", "data_offsets"):
            for value in (*NASTY, "F64", "F8_E4M3", [2**62, 4], [0, 2**63], [5, 2], [-1, 5]):
                header = header_of(data)
                header[name][key] = value
                yield (name, key, value), with_header(data, header)
    header = header_of(data)
    yield "no metadata", with_header(data, {n: v for n, v in header.items() if n[0] != "_"})
    yield "all one place", with_header(data, {n: header["gaps"] for n in header if n[0] != "_"})
    yield "more data", data + bytes(1000)
    yield "a pickle", pickle.dumps({"embed.W_E": [0.0]})


def test_hostile_safetensors_headers(folder, load):
    path = folder / "model.safetensors"
    tally = outcomes(load, path, hostile_headers(path.read_bytes()))
    assert tally["loaded"] < 20
    assert tally["refused"] > 300


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
SIZES = st.one_of(st.integers(0, 40), st.integers(0, 2**41))
ROW = st.tuples(
    st.sampled_from(["float32", "float16", "float8_e4m3fn"]), st.lists(SIZES, max_size=3), SIZES,
    st.one_of(st.none(), st.integers(0, 25)),
)  # fmt: skip
many = settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(data=st.data())
def test_hostile_packing_tables(folder, load, data):
    path = folder / "model.safetensors"
    original = path.read_bytes()
    header = header_of(original)
    rows = json.loads(header["__metadata__"]["packed"])
    table: dict[str, Any] = dict(rows)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from([*rows, "surplus"]))
        kind = data.draw(st.sampled_from(["field", "row", "json", "drop"]))
        if kind == "field" and name in rows:
            place = data.draw(st.integers(0, 3))
            row = list(rows[name])
            row[place] = data.draw(st.one_of(SIZES, JSON))
            table[name] = row
        elif kind == "drop":
            table.pop(name, None)
        else:
            table[name] = data.draw(ROW if kind == "row" else JSON)
    header["__metadata__"]["packed"] = json.dumps(table)
    path.write_bytes(with_header(original, header))
    outcome(load, table)
    path.write_bytes(original)


def test_damaged_configs(folder, load):
    path = folder / "config.json"
    tally = outcomes(load, path, damaged(path.read_bytes(), seed=1))
    assert tally["refused"] > 100


def nasty_fields(values: dict[str, Any], path: tuple[str, ...] = ()):
    """Every field of a JSON object, at any depth, replaced by every nasty value, or left out."""
    for name, value in values.items():
        for nasty in NASTY:
            yield (*path, name, nasty), {**values, name: nasty}
        yield (*path, name, "left out"), {n: v for n, v in values.items() if n != name}
        if isinstance(value, dict):
            for case, inner in nasty_fields(value, (*path, name)):
                yield case, {**values, name: inner}
    yield (*path, "surplus"), {**values, "surplus": 1}


def written(cases):
    for case, values in cases:
        yield case, json.dumps(values).encode()


def test_hostile_config_fields(folder, load):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {"training": None}  # its own test is below
    tally = outcomes(load, path, written(nasty_fields(values)))
    assert tally["refused"] > 600
    assert tally["loaded"] > 20  # other seeds and densities


def test_hostile_training_records(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    cases = (
        (case, {**values, "training": record}) for case, record in nasty_fields(values["training"])
    )
    tally = outcomes(lambda: training_record(folder), path, written(cases))
    assert tally["refused"] > 80


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_bombs(tokenized, name):
    bombs = [
        b"", b"[" * 10**6, b'{"a":' * 10**5, b'{"config": {"n_layers": ' + b"9" * 10**5 + b"}}",
        b"\x00" * 1000, b'"\\ud800"', b"[1, 2]", b"NaN", b"1e999", b"\xff\xfe{}",
        b'{"a": 1, "a": 2}', b'"' + b"x" * (MAX_JSON_BYTES + 1) + b'"',
    ]  # fmt: skip
    contents = ((bomb[:20], bomb) for bomb in bombs)
    tally = outcomes(
        lambda: SparseTransformer.from_pretrained(tokenized), tokenized / name, contents
    )
    assert tally["loaded"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 10**9}, {"d_vocab": 2**31 - 1}, {"d_vocab_out": 2**31 - 1}, {"n_layers": 10**9},
        {"n_ctx": 2**31 - 1}, {"n_heads": 2**30}, {"d_head": 2**30}, {"d_mlp": 2**31 - 1},
        {"d_pos": 2**40}, {"d_model": 10**6, "d_vocab": 10**6, "n_layers": 1000},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_do_not_exist_are_refused_before_they_are_allocated(folder, load, changes):
    """Also where the table of packed tensors tells the same tale."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    values = json.loads(path.read_text())
    old = SparseTransformerConfig.from_dict(values["config"])
    values["config"].update(changes)
    path.write_text(json.dumps(values))
    assert outcome(load, changes) == "refused"
    data = weights.read_bytes()
    header = header_of(data)
    table = json.loads(header["__metadata__"]["packed"])
    for row in table.values():
        for name, size in changes.items():
            known = getattr(old, name) or old.d_vocab
            row[1] = [size if length == known else length for length in row[1]]
        row[2:] = [min(row[2], 1), 0]
    header["__metadata__"]["packed"] = json.dumps(table)
    weights.write_bytes(with_header(data, header))
    assert outcome(load, changes) == "refused"


def test_a_long_context_costs_no_memory_of_its_own(small_model, tmp_path):
    """Where positions are not embedded, no tensor tells the length of the context."""
    small_model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    values["config"]["n_ctx"] = 2**31 - 1
    path.write_text(json.dumps(values))
    assert (
        outcome(lambda: SparseTransformer.from_pretrained(tmp_path / "model"), "n_ctx") == "loaded"
    )


# --------------------------------------------------------------------------------------------------
# tokenizers


def test_damaged_tokenizers(tokenized):
    path = tokenized / "tokenizer.json"
    contents = damaged(path.read_bytes(), seed=2)
    tally = outcomes(lambda: read_tokenizer(tokenized, 30), path, contents)
    assert tally["refused"] > 80


def test_hostile_tokenizer_fields(tokenized):
    path = tokenized / "tokenizer.json"
    cases = written(nasty_fields(json.loads(path.read_text())))
    chosen = (case for i, case in enumerate(cases) if i % 3 == 0)
    assert outcomes(lambda: read_tokenizer(tokenized, 30), path, chosen)["refused"] > 100
    path = tokenized / "tokenizer_config.json"
    values = json.loads(path.read_text()) | dict.fromkeys(("unk_token", "truncation_side"))
    cases = written(nasty_fields(values))
    assert outcomes(lambda: read_tokenizer(tokenized, 30), path, cases)["refused"] > 50


def test_a_token_beyond_the_vocabulary_is_refused(tokenized):
    path = tokenized / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["w3"] = 2**31
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"token with id 2147483648, the config says d_vocab=30"):
        SparseTransformer.from_pretrained(tokenized)


# --------------------------------------------------------------------------------------------------
# code


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.fixture
def sentinel(tmp_path):
    path = tmp_path / "code-was-run"
    pickle.loads(pickle.dumps(Bomb(path)))  # it would show
    path.rmdir()
    return path


def test_pickles_in_the_place_of_weights_are_not_opened(tokenized, sentinel):
    folder = tokenized

    def load():
        return SparseTransformer.from_pretrained(folder)

    bombs = [pickle.dumps(Bomb(sentinel), protocol) for protocol in range(6)]
    torch.save({"embed.W_E": Bomb(sentinel)}, folder / "pytorch_model.bin")
    bombs.append((folder / "pytorch_model.bin").read_bytes())
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        tally = outcomes(load, folder / name, ((name, bomb) for bomb in bombs))
        assert tally["loaded"] == 0
    (folder / "model.safetensors").unlink()
    assert outcome(load, "only the pickle is left") == "refused"
    assert not sentinel.exists()


def test_no_file_of_a_folder_is_imported(tokenized, sentinel):
    """A tokenizer_config.json may name classes, other files, and templates: they are not used."""
    code = f"import os\nos.mkdir({str(sentinel)!r})\nclass Trap: pass\n"
    (tokenized / "trap.py").write_text(code)
    path = tokenized / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values |= {
        "tokenizer_class": "Trap",
        "auto_map": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]},
        "trust_remote_code": True,
        "tokenizer_file": "/etc/passwd",
        "vocab_file": "../../secret",
        "gguf_file": "model.gguf",
        "tokenizer_object": {"a": 1},
        "chat_template": "{{ ''.__class__.__mro__ }}",
        "added_tokens_decoder": {"0": {"content": "x"}},
        "name_or_path": "owner/other",
    }
    path.write_text(json.dumps(values))
    model = SparseTransformer.from_pretrained(tokenized)
    assert type(model.tokenizer).__module__.startswith("transformers.")
    assert model.tokenizer.name_or_path == str(tokenized)
    assert model.tokenizer.chat_template is None
    assert not sentinel.exists()


# --------------------------------------------------------------------------------------------------
# folders

NAMES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_refused(tokenized, name, tmp_path):
    path = tokenized / name
    path.rename(tmp_path / "original")

    def load():
        return SparseTransformer.from_pretrained(tokenized)

    # without a tokenizer.json the model has none; without the other file, no BOS token
    assert outcome(load, name) == ("loaded" if name == "tokenizer.json" else "refused")
    for make in (
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to(tmp_path / "nothing"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(tmp_path),
    ):
        make()
        assert outcome(load, name) == "refused"
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "original")  # as the hub's cache has them
    assert outcome(load, name) == "loaded"


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for name in (tmp_path / "file", tmp_path / "file" / "model", "\0", "x" * 5000, tmp_path):
        assert outcome(lambda name=name: SparseTransformer.from_pretrained(name), name) == "refused"


# --------------------------------------------------------------------------------------------------
# circuits


@pytest.fixture
def circuit(tmp_path):
    """(folder of a saved circuit, function that loads it)."""
    config = SparseTransformerConfig(
        n_layers=1, d_model=8, d_head=4, d_mlp=8, n_ctx=8, d_vocab=20,
        activation_density=ActivationDensity.paper(0.5),
    )  # fmt: skip
    model = SparseTransformer(config).eval()
    means = activation_means(model, torch.randint(0, 20, (4, 8)))
    index = NodeIndex.of(model)
    kept = torch.rand(index.n_nodes) < 0.6
    made = Circuit(
        task="t", index=index, kept=kept, tau=torch.rand(index.n_nodes), means=means,
        edges=circuit_edges(model, index, kept), losses=torch.rand(5),
        losses_calibrated=torch.rand(5), correct=torch.rand(5) < 0.5, calibration=Calibration(),
        selection_loss=0.1, model_loss=0.1, target_loss=0.15, n_active=3, seed=0,
        config={"seed": 0}, model_name="SparseTransformer", seconds=1.5,
        size_curve=pd.DataFrame({"n_nodes": [0, 5, 9], "loss": [0.7, 0.2, 0.1]}),
    )  # fmt: skip
    edges = made.edges.assign(score=np.float32(0.5))
    made = replace(
        made, groups=torch.arange(index.n_nodes), edges=edges[3:].reset_index(drop=True),
        removed_edges=edges[:3].assign(constant=0.25),
    )  # fmt: skip
    made.save(tmp_path / "circuit")
    return tmp_path / "circuit", lambda: Circuit.load(tmp_path / "circuit", model)


def test_damaged_circuits(circuit):
    folder, load = circuit
    for name in ("circuit.safetensors", "circuit.json"):
        path = folder / name
        cases = (c for i, c in enumerate(damaged(path.read_bytes(), seed=3)) if i % 3 == 0)
        assert outcomes(load, path, cases)["refused"] > 20


def test_hostile_circuit_fields(circuit):
    folder, load = circuit
    path = folder / "circuit.json"
    cases = written(nasty_fields(json.loads(path.read_text())))
    tally = outcomes(load, path, (case for i, case in enumerate(cases) if i % 2))
    assert tally["refused"] > 150


def test_hostile_curves(circuit):
    folder, load = circuit
    path = folder / "circuit.json"
    values = json.loads(path.read_text())
    rows = [[nasty, 0.1] for nasty in NASTY] + [[3, nasty] for nasty in NASTY] + NASTY
    cases = ((row, {**values, "size_curve": [[0, 0.7], row]}) for row in rows)
    tally = outcomes(load, path, written(cases))
    assert tally["refused"] > 40
    assert tally["loaded"] > 5  # any loss may be


def test_hostile_circuit_tensors(circuit):
    folder, load = circuit
    path = folder / "circuit.safetensors"
    tensors = load_file(path)
    shutil.copy(path, folder / "copy")
    n_refused = 0
    for name, tensor in tensors.items():
        others = [
            tensor[:-1], tensor[None], torch.cat([tensor, tensor]), torch.zeros(0),
            torch.tensor(1.0), torch.full(tensor.shape, 10**9), torch.full(tensor.shape, -1),
            tensor.to(torch.complex64), tensor.to(torch.float8_e4m3fn),
        ]  # fmt: skip
        for other in others:
            save_file(tensors | {name: other.contiguous()}, path)
            n_refused += outcome(load, (name, other.shape, other.dtype)) == "refused"
    assert n_refused > 50
    shutil.copy(folder / "copy", path)
    assert outcome(load, "restored") == "loaded"


# --------------------------------------------------------------------------------------------------
# OpenAI's format, whose weights are a pickle


REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture
def openai(tmp_path):
    """(folder with a model in OpenAI's format, function that loads it)."""
    shutil.copytree(REFERENCE / "yolo_like", tmp_path / "openai")
    return tmp_path / "openai", lambda: SparseTransformer.from_openai(tmp_path / "openai")


def test_damaged_openai_models(openai):
    folder, load = openai
    path = folder / "final_model.pt"
    cases = (c for i, c in enumerate(damaged(path.read_bytes(), seed=4)) if i % 3 == 0)
    assert outcomes(load, path, cases)["refused"] > 15
    path = folder / "beeg_config.json"
    assert outcomes(load, path, damaged(path.read_bytes(), seed=5))["refused"] > 100


def test_hostile_openai_config_fields(openai):
    folder, load = openai
    path = folder / "beeg_config.json"
    cases = written(nasty_fields(json.loads(path.read_text())))
    chosen = (case for i, case in enumerate(cases) if i % 2)
    assert outcomes(load, path, chosen)["refused"] > 100


def test_hostile_hub_configs(openai):
    folder, _ = openai
    values = json.loads((folder / "beeg_config.json").read_text())
    path = folder / "config.json"
    path.write_text(json.dumps(values | {"model_type": "circuitgpt", "mup": False}))
    (folder / "beeg_config.json").unlink()
    (folder / "final_model.pt").rename(folder / "pytorch_model.bin")

    def load():
        return SparseTransformer.from_pretrained(folder)

    cases = written(nasty_fields(json.loads(path.read_text())))
    chosen = (case for i, case in enumerate(cases) if i % 5 == 0)
    assert outcomes(load, path, chosen)["refused"] > 50


def test_hostile_manifests(tmp_path):
    from tl_sparse.storage.download import Fetched
    from tl_sparse.storage.manifest import MANIFEST, Manifest, changed_files, write_manifest

    entry = Fetched("http://a/b", 3, "0" * 64, "e")
    write_manifest(tmp_path, Manifest({"b.json": entry}, ("c",), {"d": "broken"}))
    path = tmp_path / MANIFEST

    def load():
        return changed_files(tmp_path)

    assert outcomes(load, path, damaged(path.read_bytes(), seed=21))["refused"] > 50
    cases = written(nasty_fields(json.loads(path.read_text())))
    assert outcomes(load, path, cases)["refused"] > 100
    for name in ("../x", "/etc/passwd", "..", ""):
        path.write_text(json.dumps({"schema_version": 1, "files": {name: vars(entry)}}))
        with pytest.raises(ValueError, match="is no name of a file in a folder"):
            load()


def test_pickles_in_openai_models_run_nothing(openai, sentinel):
    folder, load = openai
    path = folder / "final_model.pt"
    state = torch.load(path, weights_only=True)
    bombs = []
    for value in ({**state, "bomb": Bomb(sentinel)}, Bomb(sentinel), [Bomb(sentinel)]):
        for zipped in (True, False):
            torch.save(value, path, _use_new_zipfile_serialization=zipped)
            bombs.append(path.read_bytes())
        bombs += [pickle.dumps(Bomb(sentinel), protocol) for protocol in range(6)]
    torch.save(state, path)
    assert outcomes(load, path, (("bomb", bomb) for bomb in bombs))["loaded"] == 0
    assert not sentinel.exists()


def test_tensors_larger_than_their_storage_are_refused(openai):
    """A stride of zero makes any shape out of one number."""
    folder, load = openai
    path, config = folder / "final_model.pt", folder / "beeg_config.json"
    state = torch.load(path, weights_only=True)
    values = json.loads(config.read_text())
    d_model = state["transformer.wte.weight"].shape[1]
    wide = torch.zeros(1).expand(10**9, d_model)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = wide
    state["final_logits_bias"] = torch.zeros(1).expand(10**9)
    if "bigram_table" in state:
        state["bigram_table"] = torch.zeros(1).expand(10**9, 10**9)
    torch.save(state, path)
    config.write_text(json.dumps(values | {"vocab_size": 10**9}))
    assert outcome(load, "stride 0") == "refused"


def test_compressed_openai_models_do_not_grow(openai):
    """A zip archive may be compressed a thousandfold; torch.save never does that."""
    folder, load = openai
    path = folder / "final_model.pt"
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            with archive.open(name, "w") as part:
                part.write(data)
                for _ in range(5 if name.endswith("data/0") else 0):
                    part.write(bytes(1 << 24))
    assert path.stat().st_size < 10**6  # and more than 80 in the archive
    assert outcome(load, "zip bomb") == "refused"


# --------------------------------------------------------------------------------------------------
# training: a checkpoint's state, its optimizer, the metrics

RUN = {
    "training": {"steps": 6, "lr": 0.1, "sparsity": None},
    "model": {"d_model": 4},
    "corpus": "c",
}
METRICS = {"tokens": 8, "loss": 2.5, "lr": 0.1, "density": 1.0, "l0": 9, "validation_loss": None}


@pytest.fixture
def training(small_model, tmp_path):
    """(folder of a checkpoint at step 2 of 6, function that goes on from it)."""
    from tl_sparse.training import resume
    from tl_sparse.training.config import TrainingConfig
    from tl_sparse.training.train_step import make_optimizer

    model = small_model(n_layers=1)
    optimizer = make_optimizer(model, TrainingConfig(lr=0.1))
    for _ in range(2):
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
    record = TrainingRecord(
        steps=2, tokens=2, validation_loss=3.0, l0={}, config={"seed": 1}, corpus="c"
    )
    parts = resume.Parts(model, optimizer, {})
    resume.save_checkpoint(tmp_path, 2, RUN, parts, record)
    for step in (1, 2, 3):
        resume.append_metrics(tmp_path, {"step": step, **METRICS})

    def load():
        step = resume.load_checkpoint(tmp_path, RUN, parts)
        if step is None:
            raise ValueError("what has no state is no checkpoint of ours")
        assert step == 2
        optimizer.step()  # with moments that do not fit it would fail
        assert len(resume.read_metrics(tmp_path, step)) <= 2

    assert outcome(load, "whole") == "loaded"
    return tmp_path / "checkpoint-00000002", load


def test_hostile_training_states(training):
    folder, load = training
    path = folder / "trainer.json"
    values = json.loads(path.read_text())
    tally = outcomes(load, path, written(nasty_fields(values)))
    assert tally["refused"] > 200
    assert outcomes(load, path, damaged(path.read_bytes(), seed=6))["refused"] > 150
    steps = (({"step": step}, {**values, "step": step}) for step in (0, 1, 3, 6, 7, -2, 2.0, "2"))
    assert outcomes(load, path, written(steps))["loaded"] == 0


def test_damaged_and_hostile_optimizers(training):
    folder, load = training
    path = folder / "optimizer.pt"
    cases = (c for i, c in enumerate(damaged(path.read_bytes(), seed=7)) if i % 3 == 0)
    assert outcomes(load, path, cases)["refused"] > 15

    def others():
        whole = torch.load(path, weights_only=True)
        for value in NASTY[::4]:
            for key in whole:
                yield (key, value), {**whole, key: value}
            yield ("state of 0", value), {**whole, "state": {**whole["state"], 0: value}}
            yield ("parameters", value), {**whole, "param_groups": [{"params": value}]}
            for name in ("step", "exp_avg", "exp_avg_sq"):
                yield (name, value), moments(whole, name, value)
        for name in ("exp_avg", "exp_avg_sq"):
            tensor = whole["state"][0][name]
            for other in (
                tensor[:1], tensor[None], tensor * torch.nan, -1 - tensor.abs() / (name[-1] == "q"),
                tensor.to(torch.complex64), torch.zeros(1).expand(tensor.shape), tensor.long(),
                tensor.to_sparse(), tensor * torch.inf * (name[-1] != "q"),
            ):  # fmt: skip
                yield (name, other.shape, other.dtype), moments(whole, name, other)
        for step in (-1.0, 3.0, 0.5, torch.nan, torch.inf):
            yield ("step", step), moments(whole, "step", torch.tensor(step))
        yield "more", {**whole, "more": 1}
        yield "another parameter", {**whole, "state": {**whole["state"], 999: whole["state"][0]}}

    def moments(whole, name, value):
        return {**whole, "state": {**whole["state"], 0: {**whole["state"][0], name: value}}}

    def files():
        for case, values in others():
            torch.save(values, folder / "other.pt")
            data = (folder / "other.pt").read_bytes()
            (folder / "other.pt").unlink()
            yield case, data

    assert outcomes(load, path, files())["loaded"] == 0


def test_hostile_metrics(training):
    from tl_sparse.training.resume import read_metrics

    path = training[0].parent / "metrics.jsonl"

    def load():
        assert len(read_metrics(path.parent, 2)) <= 2

    lines = path.read_text().splitlines(keepends=True)
    values = json.loads(lines[1])
    cases = (
        (case, "".join([lines[0], json.dumps(row) + "\n", lines[2]]).encode())
        for case, row in nasty_fields(values)
    )
    assert outcomes(load, path, cases)["refused"] > 100
    assert outcomes(load, path, damaged(path.read_bytes(), seed=8))["refused"] > 100
    rows = [lines[0] * 2, "".join(reversed(lines)), "\n", "[" * 5000, "x" * 20_000, "\0" * 100]
    assert outcomes(load, path, ((r[:9], (r + "\n").encode()) for r in rows))["loaded"] == 0


# --------------------------------------------------------------------------------------------------
# a corpus


@pytest.fixture
def corpus(tmp_path):
    """(folder of a small corpus, function that opens it)."""
    from tl_sparse.data import CorpusConfig, TokenizedCorpus
    from tl_sparse.data.tokenizer import build_tokenizer
    from tl_sparse.data.tokens import CorpusStats, write_corpus

    tokenizer = build_tokenizer(["a bc"], 300, required=())
    train, validation = np.arange(40, dtype=np.uint16), np.arange(20, dtype=np.uint16)
    write_corpus(
        tmp_path / "corpus", train=train, validation=validation, tokenizer=tokenizer,
        config=CorpusConfig(vocab_size=300, required_words=()), fingerprint="f", version="0",
        stats=CorpusStats(1, 1, 0, 0, 0, 60, 40, 20, 0), dropped=("a",),
    )  # fmt: skip
    return tmp_path / "corpus", lambda: TokenizedCorpus.load(tmp_path / "corpus")


def test_hostile_corpora(corpus):
    folder, load = corpus
    path = folder / "corpus.json"
    tally = outcomes(load, path, written(nasty_fields(json.loads(path.read_text()))))
    assert tally["refused"] > 500
    cases = (c for i, c in enumerate(damaged(path.read_bytes(), seed=9)) if i % 2)
    assert outcomes(load, path, cases)["refused"] > 80
    for name in ("train.bin", "validation.bin", "tokenizer.json"):
        data = (folder / name).read_bytes()
        cases = [
            ("cut", data[:-1]),
            ("empty", b""),
            ("more", data + b"x"),
            ("flip", data[:-1] + b"~"),
        ]
        assert outcomes(load, folder / name, cases)["loaded"] == 0


def test_a_corpus_whose_index_agrees_with_its_hostile_files(corpus):
    """Hashes and sizes can be forged: what is in the files is looked at too."""
    from tl_sparse.data import tokens

    folder, load = corpus
    path = folder / "corpus.json"
    values = json.loads(path.read_text())
    text = json.loads((folder / "tokenizer.json").read_text())
    merged = {**text["model"], "continuing_subword_prefix": "é", "merges": [["a", "b"]]}
    broken = [
        ("train.bin", np.full(40, 9999, np.uint16).tobytes()), ("train.bin", bytes(78)),
        ("train.bin", bytes(81)), ("train.bin", b""), ("validation.bin", b"\xff" * 40),
        ("tokenizer.json", b"{}"), ("tokenizer.json", b"[" * 10**5),
        ("tokenizer.json", json.dumps({**text, "model": merged}).encode()),
    ]  # fmt: skip
    for name, data in broken:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        files = {**values["files"], name: tokens._describe(folder / name)}
        path.write_text(json.dumps({**values, "files": files}))
        assert outcome(load, (name, data[:20])) == "refused"
        (folder / name).write_bytes(whole)
    path.write_text(json.dumps(values))
    assert outcome(load, "restored") == "loaded"


def test_tokenizers_that_ask_for_memory_or_panic(tokenized):
    """The library aborts the process where memory is short, and panics are no Exceptions."""
    path = tokenized / "tokenizer.json"
    values = json.loads(path.read_text())
    model = values["model"]
    padding = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "w3"}
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    around = {"x": {"id": "x", "ids": [10**6], "tokens": ["x"]}}
    pieces = [{"SpecialToken": {"id": "x", "type_id": 0}}]
    cases = [
        {"padding": {**padding, "strategy": {"Fixed": 10**12}, "pad_to_multiple_of": None}},
        {"padding": {**padding, "strategy": "BatchLongest", "pad_to_multiple_of": 10**12}},
        {"post_processor": {**template, "single": pieces}},
        {"post_processor": {**template, "single": pieces, "special_tokens": around}},
        {"model": {**model, "type": "BPE", "continuing_subword_prefix": "xyz",
                   "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}},
        *(
            {"normalizer": normalizer}
            for table in ("/////w==", "AAAA", "", "%", "AAAAAA==")
            for inner in [{"type": "Precompiled", "precompiled_charsmap": table}]
            for normalizer in (inner, {"type": "Sequence", "normalizers": [inner]})
        ),
    ]  # fmt: skip
    contents = written((case, {**values, **case}) for case in cases)
    assert outcomes(lambda: read_tokenizer(tokenized, 30), path, contents)["refused"] >= 14


# --------------------------------------------------------------------------------------------------
# reports, tasks, units of work, OpenAI's tokenizer and circuits, searches


@pytest.fixture
def report(tmp_path):
    """(a report's file, function that reads it)."""
    from tl_sparse.faithfulness import CheckResult, EvaluationConfig, FaithfulnessReport, Measure
    from tl_sparse.faithfulness.verdict import thresholds_of

    own = Measure("f", "zero", 0.9, 0.8, 1.0, 0.1, 0.0, 0.2, "random", torch.tensor([0.5, np.nan]))
    table = pd.DataFrame({"layer": [0, 1], "hook": ["x", None], "loss": [0.5, np.nan]})
    FaithfulnessReport(
        task="t", model_name="M", model_fingerprint="ab", n_components=2, n_universe=4, n_edges=9,
        target_loss=0.15, prompts=("a", "b"), origin_known=True, config=EvaluationConfig(pairs=2),
        results=(CheckResult((own,), {"curve": table}, ("note",), "sufficiency", 1.5),),
        thresholds=thresholds_of({}), versions={"tl_sparse": "0"},
    ).save(tmp_path / "r.json")  # fmt: skip
    return tmp_path / "r.json", lambda: FaithfulnessReport.load(tmp_path / "r.json")


def test_hostile_reports(report):
    path, load = report
    values = json.loads(path.read_text())
    values["thresholds"] = dict(list(values["thresholds"].items())[:2])
    assert outcomes(load, path, written(nasty_fields(values)))["refused"] > 300
    cases = (c for i, c in enumerate(damaged(path.read_bytes(), seed=10)) if i % 2)
    assert outcomes(load, path, cases)["refused"] > 50

    def within(*place):
        """Every nasty value at a place inside of lists."""
        for nasty in NASTY[::2]:
            copy = json.loads(json.dumps(values))
            spot = copy
            for step in place[:-1]:
                spot = spot[step]
            spot[place[-1]] = nasty
            yield (*place, nasty), copy

    result, measure = ("results", 0), ("results", 0, "measures", 0)
    column = (*result, "tables", "curve", "loss")
    places = [
        result, measure, column, (*column, "type"), (*column, "values"), (*column, "values", 0),
        (*result, "check"), (*result, "notes"), (*result, "tables"), (*result, "tables", "curve"),
        (*result, "seconds"), (*measure, "name"), (*measure, "value"), (*measure, "examples"),
        (*measure, "examples", 0), (*result, "tables", "curve", "layer", "values", 0),
        (*result, "tables", "curve", "hook", "values", 0), ("prompts", 0),
    ]  # fmt: skip
    cases = (case for place in places for case in within(*place))
    assert outcomes(load, path, written(cases))["refused"] > 120


def test_hostile_tasks(tmp_path):
    from tl_sparse.data.tokenizer import build_tokenizer
    from tl_sparse.tasks import from_jsonl

    tokenizer, path = build_tokenizer(["a bc"], 300, required=()), tmp_path / "t.jsonl"
    rows = [{"prompts": [f"a{i}", f"b{i}"], "answers": ["c", "d"], "split": "train"} for i in "012"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load():
        return from_jsonl(path, tokenizer)

    first, _, last = path.read_bytes().splitlines(keepends=True)
    cases = (
        (case, first + json.dumps(row).encode() + b"\n" + last)
        for case, row in [*nasty_fields(rows[1]), *((n, n) for n in NASTY)]
    )
    assert outcomes(load, path, cases)["refused"] > 80
    assert outcomes(load, path, damaged(path.read_bytes(), seed=11))["refused"] > 100


def test_hostile_contrastive_prompts(tmp_path, small_model):
    from tl_sparse.data.tokenizer import build_tokenizer
    from tl_sparse.heads import contrastive_from_jsonl

    tokenizer, path = build_tokenizer(["a bc"], 300, required=()), tmp_path / "p.jsonl"
    model = small_model(tokenizer=tokenizer, d_vocab=300)
    rows = [{"positive": f"a{i}", "negative": f"b{i}", "answers": ["c", "d"], "roles": {"x": "a"}}
            for i in "012"]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load():
        return contrastive_from_jsonl(path, model)

    assert load().roles["x"].tolist() == [1] * 6
    first, _, last = path.read_bytes().splitlines(keepends=True)
    cases = (
        (case, first + json.dumps(row).encode() + b"\n" + last)
        for case, row in [*nasty_fields(rows[1]), *((n, n) for n in NASTY)]
    )
    assert outcomes(load, path, cases)["refused"] > 80


@pytest.mark.filterwarnings("ignore:.*done again")
def test_hostile_units_of_work(tmp_path):
    from tl_sparse.studies.runner import Unit, UnitRecord, read_unit, write_record
    from tl_sparse.studies.trained import training_time

    unit = Unit(tmp_path, "one", {"a": {"steps": 3}}, {})
    unit.folder.mkdir()
    write_record(unit.folder, UnitRecord(unit.settings, {"nodes": 4}, None, 1.5))
    path, sessions = unit.folder / "unit.json", unit.folder / "sessions.jsonl"
    values = json.loads(path.read_text())

    def load():
        record = read_unit(unit)
        if record is None:
            raise ValueError("to be done again")
        assert isinstance(record.result, dict)
        assert isinstance(record.seconds, float)

    assert outcomes(load, path, written(nasty_fields(values)))["refused"] > 100
    cases = (c for i, c in enumerate(damaged(path.read_bytes(), seed=12)) if i % 2)
    assert outcomes(load, path, cases)["refused"] > 50
    row = {"steps": 4, "seconds": 2.0, "machine": "m"}
    sessions.write_text(json.dumps(row) + "\n")
    cases = ((case, json.dumps(row).encode() + b"\n") for case, row in nasty_fields(row))
    assert outcomes(lambda: training_time(unit.folder, 4), sessions, cases)["refused"] > 40
    cases = [("[", b"[" * 5000 + b"\n"), ("[1]", b"[1]\n"), ("long", b"x" * 10**6 + b"\n")]
    assert outcomes(lambda: training_time(unit.folder, 4), sessions, cases)["loaded"] == 0


def test_hostile_openai_tokenizers(tmp_path):
    from tl_sparse.checkpoints.openai_tokenizer import BYTES, tokenizer_from_openai

    merges, ids = tmp_path / "vocab.bpe", tmp_path / "encoder.json"
    merges.write_text("#version: 0.2\na b\nab c\n", encoding="utf-8")
    ids.write_text(json.dumps({token: i for i, token in enumerate([*BYTES, "ab", "abc"])}))

    def load():
        return tokenizer_from_openai(tmp_path, 300)

    assert outcomes(load, merges, damaged(merges.read_bytes(), seed=13))["refused"] > 150
    cases = (c for i, c in enumerate(damaged(ids.read_bytes(), seed=14)) if i % 3 == 0)
    assert outcomes(load, ids, cases)["refused"] > 60
    bombs = [b'{"a": 0, "a": 0}', b"[" * 10**6, b'{"<|endoftext|>": 1e999}', b"NaN", b"", b"[]"]
    assert outcomes(load, ids, ((bomb[:20], bomb) for bomb in bombs))["loaded"] == 0


def test_damaged_released_circuits(tmp_path):
    from tl_sparse.checkpoints.openai_payload import read_payload

    path = tmp_path / "viz_data.pt"
    kept = {"0.attn.q": torch.arange(3), "0.mlp.in": torch.arange(2)}
    losses = {name: [0.5] * len(channels) for name, channels in kept.items()}
    pair = [torch.ones(3, 2), [0, 1, "bias"], [0, 1], ("0.attn.q", "0.mlp.in")]
    tokens = torch.tensor([[1, 2, 0]])
    importances = {
        "ch_interv_losses": losses, "interv_loss": 0.3, "loss": 0.1, "pair_data": [pair],
        "layer_interv_losses": {"0.attn": 0.1},
        "task_samples": (tokens, {"0.attn.q": {1: torch.rand(1, 3)}}),
    }  # fmt: skip
    samples = {"0.attn.q": {1: {0.5: ([(tokens[0], torch.rand(3), 1)], [])}}}
    values = {"circuit_data": kept, "importances": importances, "all_loss": [(0, 1.0)]}
    torch.save(values | {"samples": samples}, path)
    cases = (c for i, c in enumerate(damaged(path.read_bytes(), seed=15)) if i % 3 == 0)
    assert outcomes(lambda: read_payload(path), path, cases)["refused"] > 15
    for table, key in ((importances, "pair_data"), (importances, "task_samples"),
                       (importances, "layer_interv_losses"), (values, "samples")):  # fmt: skip
        for nasty in (
            *NASTY[::3],
            torch.tensor(0.5),
            {"0.attn.q": tokens},
            (tokens, tokens),
            [pair[:2]],
        ):
            torch.save(values | {"importances": importances} | {key: nasty} if table is values
                       else values | {"importances": importances | {key: nasty}}, path)  # fmt: skip
            outcome(lambda: read_payload(path), (key, nasty))


def test_damaged_released_means_and_curves(small_model, tmp_path):
    from tl_sparse.ablation import means_from_openai
    from tl_sparse.checkpoints.openai_artifacts import locations, train_curves

    model = small_model(n_layers=1)
    index = NodeIndex.of(model)
    path = tmp_path / "mean_baseline_pretrain.pt"
    widths = {name: index.slices[hook] for name, hook in locations(index).items()}
    torch.save({name: torch.rand(s.stop - s.start) for name, s in widths.items()}, path)
    cases = (c for i, c in enumerate(damaged(path.read_bytes(), seed=17)) if i % 6 == 0)
    assert outcomes(lambda: means_from_openai(path, model), path, cases)["refused"] > 8
    path = tmp_path / "progress.json"
    path.write_text('{"step": 0, "test_xent": 7.6}\n{"step": 1, "test_xent": 7.5}\n')
    cases = [
        *(c for i, c in enumerate(damaged(path.read_bytes(), seed=18)) if i % 6 == 0),
        *((n, f'{{"step": {json.dumps(n)}}}'.encode()) for n in NASTY),
    ]
    assert outcomes(lambda: train_curves(path), path, cases)["refused"] > 15


def test_damaged_searches(tmp_path):
    from tl_sparse.circuits.pruning_config import PruningConfig
    from tl_sparse.circuits.search_config import SearchConfig
    from tl_sparse.circuits.search_study import SlotSampler, open_study, quiet, space

    path = tmp_path / "s.db"
    sampler = SlotSampler(SearchConfig(), PruningConfig(), space(None))

    def load():
        with quiet():
            return open_study(path, sampler, {"a": 1})

    study = load()
    for _ in range(3):
        study.tell(study.ask(space(None)), 1.0)
    data = path.read_bytes()
    rows = data.index(b'"FloatDistribution"')
    draw = random.Random(16)
    cuts = [("cut", size) for size in range(0, len(data), len(data) // 6)]
    contents = [(cut, data[: cut[1]]) for cut in cuts]
    for i in range(10):
        at = draw.randrange(rows - 300, rows + 300) if i % 2 else draw.randrange(len(data))
        contents.append((("splash", at), data[:at] + draw.randbytes(30) + data[at + 30 :]))
    assert outcomes(load, path, contents)["refused"] > 5


# --------------------------------------------------------------------------------------------------
# tracing: dictionaries of this and of other packages, graphs, sessions


@pytest.fixture
def dictionaries(tmp_path):
    """(folder of dictionaries, function that reads it)."""
    from tl_sparse.tracing import load_dictionaries, save_dictionaries
    from tl_sparse.tracing.dictionary import Dictionary

    draw = torch.Generator().manual_seed(0)
    d = Dictionary("hook_embed", "hook_embed", torch.randn(4, 6, generator=draw), torch.zeros(6),
                   torch.randn(6, 4, generator=draw), torch.zeros(4), activation="jumprelu",
                   threshold=torch.rand(6, generator=draw), metadata={"steps": 3})  # fmt: skip
    save_dictionaries([d], tmp_path / "d")
    return tmp_path / "d", lambda: load_dictionaries(tmp_path / "d")


def test_hostile_dictionaries(dictionaries):
    folder, load = dictionaries
    path = folder / "dictionaries.json"
    values = json.loads(path.read_text())
    assert outcomes(load, path, written(nasty_fields(values)))["refused"] > 60
    (row,) = values["dictionaries"]
    cases = ((case, values | {"dictionaries": [each]}) for case, each in nasty_fields(row))
    assert outcomes(load, path, written(cases))["refused"] > 200
    path = folder / "dictionaries.safetensors"
    cases = (c for i, c in enumerate(damaged(path.read_bytes(), seed=20)) if i % 2)
    assert outcomes(load, path, cases)["refused"] > 40


def test_hostile_dictionaries_of_other_packages(tmp_path):
    from tl_sparse.tracing import read_dictionary

    hook = "blocks.0.hook_mlp_out"
    tensors = {"W_enc": torch.ones(4, 4), "b_enc": torch.ones(4), "W_dec": torch.ones(4, 4),
               "b_dec": torch.ones(4)}  # fmt: skip
    (tmp_path / "lens").mkdir()
    save_file(tensors, tmp_path / "lens" / "sae_weights.safetensors")
    config = {"architecture": "standard", "k": 2, "metadata": {"hook_name": hook}}
    (tmp_path / "lens" / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "layer_0.safetensors")
    np.savez_compressed(tmp_path / "params.npz", **{n: x.numpy() for n, x in tensors.items()})
    torch.save({"cfg": {"hook_point": hook}, "state_dict": tensors}, tmp_path / "t.pt")

    def of(path):
        return lambda: read_dictionary(path, hook, hook)

    path = tmp_path / "lens" / "cfg.json"
    tally = outcomes(
        lambda: read_dictionary(tmp_path / "lens"), path, written(nasty_fields(config))
    )
    assert tally["refused"] > 40
    for place, path in ((tmp_path / "lens", tmp_path / "lens" / "sae_weights.safetensors"),
                        *((tmp_path / name,) * 2 for name in
                          ("layer_0.safetensors", "params.npz", "t.pt"))):  # fmt: skip
        cases = (c for i, c in enumerate(damaged(path.read_bytes(), seed=21)) if i % 4 == 0)
        assert outcomes(of(place), path, cases)["refused"] > 15, path
    beside = tmp_path / "config.yaml"
    beside.write_text("feature_input_hook: hook_embed\nfeature_output_hook: hook_mlp_out\n")
    load = lambda: read_dictionary(tmp_path / "layer_0.safetensors")  # noqa: E731
    cases = [("binary", b"\xff\xfe\x00"), ("long", b"a: b\n" * 10**6), ("none", b"")]
    assert outcomes(load, beside, cases)["loaded"] == 0


def test_hostile_graphs_and_sessions(small_model, tmp_path):
    from tests.tracing.graphs import hand_graph
    from tl_sparse.tracing import Logit, Splice, TraceSession, load_graph, save_graph

    path = tmp_path / "g.json"
    save_graph(hand_graph(), path)
    values = json.loads(path.read_text())
    load = lambda: load_graph(path)  # noqa: E731
    some = (c for i, c in enumerate(written(nasty_fields(values))) if i % 4 == 0)
    assert outcomes(load, path, some)["refused"] > 70
    cases = (c for i, c in enumerate(damaged(path.read_bytes(), seed=22)) if i % 4 == 0)
    assert outcomes(load, path, cases)["refused"] > 20
    splice, path = Splice(small_model(n_layers=1), ()), tmp_path / "s.json"
    TraceSession(splice, [[1, 4, 5]], Logit(4)).expand_best(1).save(path)
    values = json.loads(path.read_text())
    load = lambda: TraceSession.replay(splice, path)  # noqa: E731
    some = (c for i, c in enumerate(written(nasty_fields(values))) if i % 2)
    assert outcomes(load, path, some)["refused"] > 60
    cases = [(x, values | {name: [x]}) for name in ("prompt", "expansions")
             for x in (-1, 10**9, 10**400, "nothing/0/0", "embed/-1/0", None)]  # fmt: skip
    assert outcomes(load, path, written(cases))["loaded"] == 0


# --------------------------------------------------------------------------------------------------
# what is no file, for every reader


@pytest.mark.filterwarnings("ignore:.*done again")
def test_no_reader_opens_what_is_no_file(
    training, corpus, report, circuit, dictionaries, small_model, tmp_path
):
    from tl_sparse.ablation import means_from_openai
    from tl_sparse.checkpoints.openai_artifacts import train_curves
    from tl_sparse.checkpoints.openai_payload import read_payload
    from tl_sparse.circuits.search_study import check_database
    from tl_sparse.data.sources import read_source
    from tl_sparse.heads import contrastive_from_jsonl
    from tl_sparse.studies.runner import Unit, holder, read_unit
    from tl_sparse.studies.trained import training_time
    from tl_sparse.tasks import from_jsonl
    from tl_sparse.tracing import load_graph, read_dictionary

    unit = Unit(tmp_path, "one", {}, {})
    unit.folder.mkdir()
    tokenizer, model = build_small_tokenizer(), small_model(n_layers=1)
    training, go_on = training
    readers = {
        training / "trainer.json": go_on, training / "optimizer.pt": go_on,
        training / "model" / "model.safetensors": go_on, training.parent / "metrics.jsonl": go_on,
        **{corpus[0] / name: corpus[1] for name in os.listdir(corpus[0])},
        **{circuit[0] / name: circuit[1] for name in os.listdir(circuit[0])},
        **{dictionaries[0] / name: dictionaries[1] for name in os.listdir(dictionaries[0])},
        report[0]: report[1],
        tmp_path / "g.json": lambda: load_graph(tmp_path / "g.json"),
        tmp_path / "params.npz": lambda: read_dictionary(tmp_path / "params.npz", "a", "a"),
        tmp_path / "t.jsonl": lambda: from_jsonl(tmp_path / "t.jsonl", tokenizer),
        tmp_path / "p.jsonl": lambda: contrastive_from_jsonl(tmp_path / "p.jsonl", model),
        tmp_path / "viz_data.pt": lambda: read_payload(tmp_path / "viz_data.pt"),
        tmp_path / "mean_baseline_pretrain.pt": lambda: means_from_openai(
            tmp_path / "mean_baseline_pretrain.pt", model
        ),
        tmp_path / "progress.json": lambda: train_curves(tmp_path / "progress.json"),
        tmp_path / "s.db": lambda: check_database(tmp_path / "s.db", 1.0),
        unit.folder / "unit.json": lambda: read_unit(unit),
        unit.folder / "sessions.jsonl": lambda: training_time(unit.folder, 4),
        tmp_path / f".{unit.folder.name}.lock": lambda: holder(unit),
        tmp_path / "source.py": lambda: list(read_source(str(tmp_path / "source.py"))),
    }  # fmt: skip
    for path, load in readers.items():
        if path.exists():
            path.rename(tmp_path / "original")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "socket"))
        for make in (
            path.mkdir, lambda path=path: os.mkfifo(path),
            *(
                lambda path=path, place=place: path.symlink_to(place)
                for place in ("/dev/zero", "/dev/null", "/dev/tty", path, tmp_path / "nothing",
                              tmp_path, tmp_path / "socket", tmp_path / "pipe")
            ),
        ):  # fmt: skip
            if not (tmp_path / "pipe").exists():
                os.mkfifo(tmp_path / "pipe")
            make()
            outcome(load, (path.name, os.readlink(path) if path.is_symlink() else "itself"))
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        (tmp_path / "socket").unlink()
        if (tmp_path / "original").exists():
            (tmp_path / "original").rename(path)


def build_small_tokenizer():
    from tl_sparse.data.tokenizer import build_tokenizer

    return build_tokenizer(["a bc"], 300, required=())


def test_these_were_more_than_2500_cases(request):
    """Of those that ran, none counted twice: a case is a file's contents and the reader it met."""
    here = {item.originalname for item in request.session.items if item.path == request.path}
    if not {name for name in globals() if name.startswith("test_")} <= here:
        pytest.skip("counted where the whole file is run")
    print("\n".join(f"{n:5} {name}" for name, n in TRIED.items()))
    assert sum(TRIED.values()) > 2500
