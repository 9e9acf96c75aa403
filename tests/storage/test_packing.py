import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_sparse.storage import packing
from tl_sparse.storage.packing import best_rice, bits_of, pack, set_bits, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_tensor(*shape, density, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < density, values, 0.0).to(dtype)


def stored_bytes(streams):
    return sum(stream.numel() * stream.element_size() for stream in streams.values())


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[name].dtype, b[name].shape)
        assert bits_of(tensor).tobytes() == bits_of(b[name]).tobytes()


# --------------------------------------------------------------------------------------------------
# the format


def test_streams_are_as_described():
    tensor = torch.zeros(2, 6)
    tensor[0, 5], tensor[1, 4] = 2.0, -3.0  # gaps 5 and 4 cost least with r = 1: q 2 and 2, s 1, 0
    streams, metadata = pack({"w": tensor, "dense": torch.ones(2)})
    assert json.loads(metadata["packed"]) == {
        "w": ["float32", [2, 6], 2, 1],
        "dense": ["float32", [2], 2, None],
    }
    assert streams["gaps"].tolist() == [0b00100100]
    assert streams["remainders"].tolist() == [0b10000000]
    assert streams["values.float32"].tolist() == [2.0, -3.0, 1.0, 1.0]


def slow_unpack(streams, metadata):
    """The format as its description says, an entry at a time."""
    gaps = "".join(f"{byte:08b}" for byte in streams["gaps"].tolist())
    remainders = "".join(f"{byte:08b}" for byte in streams["remainders"].tolist())
    values = {name: iter(stream.tolist()) for name, stream in streams.items() if "." in name}
    out = {}
    for name, (dtype, shape, count, rice) in json.loads(metadata["packed"]).items():
        taken = values[f"values.{dtype}"]
        flat = [0.0] * math.prod(shape)
        place = -1
        for i in range(count):
            gap = 0
            if rice is not None:
                quotient, gaps = gaps.index("1"), gaps[gaps.index("1") + 1 :]
                gap = quotient * 2**rice
                gap += sum(2**bit * int(remainders[bit * count + i]) for bit in range(rice))
            place += gap + 1
            flat[place] = next(taken)
        if rice is not None:
            remainders = remainders[-(-count * rice // 8) * 8 :]
        out[name] = torch.tensor(flat, dtype=getattr(torch, dtype)).reshape(shape)
    return out


def test_an_independent_reader_agrees():
    tensors = {
        f"{density}": random_tensor(13, 29, density=density, seed=i)
        for i, density in enumerate((0.0, 0.01, 0.1, 0.5, 0.95, 1.0))
    } | {"half": random_tensor(40, density=0.2, dtype=torch.float16)}
    streams, metadata = pack(tensors)
    assert_same_bits(slow_unpack(streams, metadata), tensors)
    assert_same_bits(unpack(streams, metadata), tensors)


# --------------------------------------------------------------------------------------------------
# to the bit


@every_dtype
@pytest.mark.parametrize("density", [0.0, 0.002, 1 / 16, 0.4, 0.97, 1.0])
def test_round_trip_at_every_density(dtype, density):
    tensors = {
        "a": random_tensor(64, 48, density=density, dtype=dtype),
        "transposed": random_tensor(30, 20, density=density, dtype=dtype, seed=1).T,
        "none": torch.zeros(0, 3, dtype=dtype),
        "scalar": torch.tensor(2.5, dtype=dtype),
        "zero": torch.tensor(0.0, dtype=dtype),
        "zeros": torch.zeros(3, 1, 4, dtype=dtype),
    }
    assert_same_bits(unpack(*pack(tensors)), tensors)


@every_dtype
def test_every_bit_pattern_survives(dtype):
    """Negative zeros, infinities, subnormals, and NaNs with all their payloads."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    limits = torch.iinfo(kind)
    bits = torch.arange(-(2**15), 2**15, dtype=kind)  # of half precision, every pattern there is
    extremes = torch.tensor([limits.min, limits.max, limits.min + 1, -1, 1], dtype=kind)
    full = torch.cat([bits, extremes]).view(dtype)
    spread = torch.zeros(len(full), 5, dtype=dtype)
    spread[:, 2] = full
    assert_same_bits(
        unpack(*pack({"full": full, "spread": spread})), {"full": full, "spread": spread}
    )


@given(
    st.lists(
        st.lists(st.sampled_from([0, 0, 0, 0, 1, -(2**31), 2**31 - 1, 0x7FC00001]), max_size=60),
        max_size=5,
    )
)
def test_any_tensors_survive(rows):
    tensors = {
        str(i): torch.tensor(row, dtype=torch.int32).view(torch.float32)
        for i, row in enumerate(rows)
    }
    assert_same_bits(unpack(*pack(tensors)), tensors)


def test_unpacked_tensors_are_their_own():
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    streams, metadata = pack(tensors)
    out = unpack(streams, metadata)
    out["a"].zero_()
    assert out["b"].tolist() == streams["values.float32"][:4].tolist() == [1.0] * 4


# --------------------------------------------------------------------------------------------------
# size


def test_the_bound_is_the_information_of_a_set_and_its_values():
    assert set_bits(5, 2, 16) == pytest.approx(math.log2(10) + 32)
    assert set_bits(7, 7, 32) == pytest.approx(7 * 32)
    assert set_bits(7, 0, 32) == pytest.approx(0)


@every_dtype
@pytest.mark.parametrize("density", [0.001, 1 / 64, 1 / 16, 0.2, 0.4, 0.7, 1.0])
def test_streams_stay_within_a_twentieth_of_the_bound(dtype, density):
    tensor = random_tensor(256, 512, density=density, dtype=dtype)
    streams, _ = pack({"w": tensor})
    bound = set_bits(tensor.numel(), int(tensor.count_nonzero()), 8 * dtype.itemsize) / 8
    assert bound - 1 <= stored_bytes(streams) < 1.05 * bound + 2


@pytest.mark.parametrize("density", [1 / 256, 1 / 16, 0.25])
def test_positions_alone_are_near_their_entropy(density):
    where = np.flatnonzero(np.random.default_rng(0).random(1 << 18) < density)
    _, cost = best_rice(np.diff(where, prepend=-1) - 1)
    assert 1.0 <= cost / set_bits(1 << 18, len(where), 0) < 1.03


def test_the_chosen_r_is_the_best_of_all():
    for seed, density in enumerate((0.003, 0.03, 0.3, 0.9)):
        where = np.flatnonzero(np.random.default_rng(seed).random(4000) < density)
        gaps = np.diff(where, prepend=-1) - 1
        costs = [len(gaps) * (r + 1) + int((gaps >> r).sum()) for r in range(packing.MAX_RICE + 1)]
        assert best_rice(gaps)[1] == min(costs)


@pytest.mark.parametrize("where", ["front", "back", "ends", "rows"])
def test_no_arrangement_costs_more_than_the_plain_tensor(where):
    tensor = torch.zeros(64, 64, dtype=torch.float16)
    places = {"front": [0], "back": [-1], "ends": [0, -1], "rows": range(0, 64, 3)}[where]
    for row in places:
        tensor[row] = 1.0
    streams, metadata = pack({"w": tensor})
    assert stored_bytes(streams) <= 2 * tensor.numel()
    assert_same_bits(unpack(streams, metadata), {"w": tensor})


# --------------------------------------------------------------------------------------------------
# contradictions


def sound():
    return pack({"w": random_tensor(16, 16, density=0.1), "b": torch.ones(3)})


def with_row(metadata, name, **changes):
    table = json.loads(metadata["packed"])
    row = dict(zip(("dtype", "shape", "count", "rice"), table[name], strict=True)) | changes
    return {"packed": json.dumps(table | {name: list(row.values())})}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("w", {"dtype": "int8"}, "w has dtype 'int8'; choose from float64"),
        ("w", {"dtype": None}, "w has dtype None"),
        ("w", {"dtype": "float16"}, "packed weights consist of"),
        ("w", {"shape": 7}, "w has shape 7"),
        ("w", {"shape": [-1, 16]}, "w has shape"),
        ("w", {"shape": [16.0, 16]}, "w has shape"),
        ("w", {"shape": [True, 16]}, "w has shape"),
        ("w", {"shape": [1] * 9}, "w has shape"),
        ("w", {"shape": [10**30]}, "w has shape"),
        ("w", {"shape": [1]}, "w stores .* of 1 entries"),
        ("w", {"shape": [16, 8]}, "w has an entry at .* beyond its 128 entries"),
        ("w", {"count": -1}, "w stores -1 of"),
        ("w", {"count": 2.5}, "w stores 2.5 of"),
        ("w", {"count": 3}, "the table of packed tensors says torch"),
        ("w", {"rice": None}, "says it stores all 256"),
        ("w", {"rice": 21}, "w has rice=21"),
        ("w", {"rice": "3"}, "w has rice='3'"),
        ("w", {"rice": -1}, "w has rice=-1"),
        ("w", {"rice": 0}, "stream remainders is"),
        ("b", {"rice": 0}, "stream gaps holds .* gaps, its table says"),
        ("w", {"more": 1}, "must be packed as"),
    ],
)
def test_a_row_that_contradicts_the_streams_is_refused(name, changes, message):
    streams, metadata = sound()
    with pytest.raises(ValueError, match=message):
        unpack(streams, with_row(metadata, name, **changes))


@pytest.mark.parametrize("table", ["", "{", "[]", "null", '{"w": 3}', '{"w": []}', "[" * 100_000])
def test_a_broken_table_is_refused(table):
    streams, _ = sound()
    with pytest.raises(ValueError, match=r"table of packed tensors|must be packed as"):
        unpack(streams, {"packed": table})
    with pytest.raises(ValueError, match="no packed weights"):
        unpack(streams, {"format": "pt"})


@pytest.mark.parametrize(
    ("stream", "change", "message"),
    [
        ("gaps", lambda s: s[:-1], "holds .* gaps"),
        ("gaps", lambda s: torch.cat([s, s.new_zeros(1)]), "its gaps end after"),
        ("gaps", lambda s: torch.cat([s, s.new_ones(1)]), "holds .* gaps"),
        ("gaps", lambda s: s.new_zeros(len(s)), "holds 0 gaps"),
        ("gaps", lambda s: s[None], "stream gaps is"),
        ("gaps", lambda s: s.to(torch.int8), "stream gaps is torch.int8"),
        ("gaps", lambda s: s.flip(0), "gaps end after|beyond its|holds"),
        ("remainders", lambda s: s[:-1], "stream remainders is"),
        ("remainders", lambda s: torch.cat([s, s]), "stream remainders is"),
        ("remainders", lambda s: s | 255, "beyond its 256 entries"),
        ("values.float32", lambda s: s[:-1], "stream values.float32 is"),
        ("values.float32", lambda s: s.double(), "stream values.float32 is torch.float64"),
        ("values.float32", lambda s: s[:0], "stream values.float32 is"),
    ],
)
def test_a_changed_stream_is_refused(stream, change, message):
    streams, metadata = sound()
    with pytest.raises(ValueError, match=message):
        unpack(streams | {stream: change(streams[stream])}, metadata)


def test_missing_and_further_streams_are_refused():
    streams, metadata = sound()
    for name in streams:
        with pytest.raises(ValueError, match="packed weights consist of"):
            unpack({n: s for n, s in streams.items() if n != name}, metadata)
    with pytest.raises(ValueError, match="packed weights consist of"):
        unpack(streams | {"more": torch.zeros(1)}, metadata)


def test_few_bytes_do_not_ask_for_much_memory():
    streams, _ = pack({})
    for shape in ([10**9, 10**9], [1 << 39], [1 << 20, 1 << 10]):
        table = {"w": ["float32", shape, 0, 0]}
        streams["values.float32"] = torch.zeros(0)
        with pytest.raises(ValueError, match=r"0 bytes of packed weights would unpack to \d+"):
            unpack(streams, {"packed": json.dumps(table)})


def test_other_dtypes_are_not_packed():
    with pytest.raises(ValueError, match="w is int64; packed are float64, float32"):
        pack({"w": torch.zeros(3, dtype=torch.int64)})
