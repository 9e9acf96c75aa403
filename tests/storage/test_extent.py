import pickle
import time
from collections import OrderedDict

import pytest
import torch

from tl_sparse.checkpoints.openai_payload import read_payload
from tl_sparse.storage.extent import check_extent, check_pickle
from tl_sparse.storage.torch_files import read_pt

LEVELS = 60  # each says the one below it twice: 2 ** 60 entries


def shared(make, inmost=0):
    """A small object that is immense written out."""
    value = make([inmost])
    for _ in range(LEVELS):
        value = make([value, value])
    return value


def lists(values):
    return list(values)


def objects(values):
    return dict(enumerate(values))


def itself():
    value = []
    value.append([value])
    return value


PAYLOADS = {
    "settings": lambda: {"circuit_data": {}, "prune_config": {"a": shared(lists)}},
    "settings of dicts": lambda: {"circuit_data": {}, "prune_config": shared(objects)},
    "settings of tuples": lambda: {"circuit_data": {}, "prune_config": {"a": shared(tuple)}},
    "settings that are wide": lambda: {"circuit_data": {}, "prune_config": {"a": wide()}},
    "model config": lambda: {
        "circuit_data": {},
        "importances": {"beeg_model_config": {"a": shared(lists)}},
    },
    "loss": lambda: {"circuit_data": {}, "importances": {"loss": shared(lists)}},
    "rounds": lambda: {"circuit_data": {}, "all_loss": shared(lists)},
    "a location": lambda: {"circuit_data": {"0.attn.q": shared(lists)}},
    "what is not read": lambda: {"circuit_data": {}, "else": shared(lists)},
    "what contains itself": lambda: {"circuit_data": {}, "prune_config": {"a": itself()}},
}


def wide():
    """Few levels, within any bound of depth, of a thousand mentions each."""
    value = [0]
    for _ in range(6):
        value = [value] * 1000
    return value


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_that_says_one_thing_again_and_again_is_refused_at_once(tmp_path, name):
    path = tmp_path / "viz_data.pt"
    torch.save(PAYLOADS[name](), path)
    assert path.stat().st_size < 20_000
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"entries|nested") as caught:
        read_payload(path)
    assert time.perf_counter() - started < 5
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("place", ["key", "key of an ordered one", "element", "deep in a key"])
def test_tuples_are_measured_before_they_are_hashed(tmp_path, place):
    """A pickle as no pickler writes it: its key could be hashed, but not in our lifetime."""
    key = pickle.dumps(shared(tuple, (1, 2)), 2)[2:-1]
    start, end = {
        "key": (b"}(", b"K\x01u"),
        "key of an ordered one": (b"ccollections\nOrderedDict\n)R(", b"K\x01u"),
        "element": (b"\x8f(", b"\x90"),
        "deep in a key": (b"}(", b"N\x86\x85K\x01u"),
    }[place]
    with pytest.raises(ValueError, match="a tuple of more than"):
        check_pickle(b"\x80\x02" + start + key + end + b".")


def test_a_bytearray_of_any_size_is_refused():
    with pytest.raises(ValueError, match="bytearray"):
        check_pickle(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.")


def test_entries_are_counted_as_written_out():
    pair = [1, 2]  # three entries: the list and two numbers
    check_extent([pair, pair], most=7)
    with pytest.raises(ValueError, match="more than 6 entries"):
        check_extent([pair, pair], most=6)
    check_extent({"a": pair, "b": (pair,)}, most=10)
    with pytest.raises(ValueError, match="more than 9 entries"):
        check_extent({"a": pair, "b": (pair,)}, most=9)


def test_depth_is_the_longest_way_down_however_it_is_met():
    deep = [0]
    for _ in range(40):
        deep = [deep]
    check_extent(deep)
    for nested in ([deep, [[deep] for _ in range(3)]], {"a": deep}):
        check_extent(nested)
    longer = deep
    for _ in range(30):
        longer = [longer]
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        check_extent([deep, longer])  # the inner part is known when the longer way is gone


def test_what_files_share_in_earnest_is_read(tmp_path):
    betas, names = (0.9, 0.95), ["a", "b"]
    weight = torch.arange(3.0)
    value = OrderedDict(
        groups=[{"betas": betas, "names": names, "lr": 0.1} for _ in range(50)],
        state={0: weight, (1, "x"): weight},
        numbers=list(range(3_000)),
    )
    torch.save(value, tmp_path / "a.pt")
    found = read_pt(tmp_path / "a.pt")
    assert found["groups"] == value["groups"]
    assert found["numbers"] == value["numbers"]
    assert torch.equal(found["state"][(1, "x")], weight)
