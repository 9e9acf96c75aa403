"""Tensors of mostly zeros as a few plain tensors for one safetensors file, and back, to the bit.

A nonzero is an entry with any bit set, so that -0.0 and every NaN come back as they were. The
nonzeros of a tensor, in row-major order, are described by the number of zeros before each (its
gap), Rice coded: a gap of ``q * 2**r + s`` is q zeros and a one in the stream ``gaps``, and the r
bits of s in the stream ``remainders`` (Golomb 1966; Rice 1979). With the best r this is within
four per cent of the information in a random set, log2 C(n, k) bits, up to a density of about a
third; r = 0 is a bitmap. The nonzeros' own bits stand in one stream per dtype, such as
``values.float16``. A tensor that would need more bits so than as it is has all its entries there,
and nothing in the other two streams.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from tl_sparse.storage.json_files import parse_json

# The bits of each dtype, as a type that both numpy and torch have.
BITS: dict[str, type[np.integer[Any]]] = {
    "float64": np.int64,
    "float32": np.int32,
    "float16": np.int16,
    "bfloat16": np.int16,
}
GAPS, REMAINDERS, VALUES = "gaps", "remainders", "values."
METADATA = "packed"
MAX_RICE = 20
"""Largest r: with it, sums of gaps stay far below 2**63."""
MAX_DIMS = 8
EXPANSION, ALLOWANCE = 1024, 1 << 26
"""A file unpacks to at most EXPANSION times its own bytes and ALLOWANCE more. Zeros cost nothing,
so without a limit a file of one kilobyte could ask for all of a machine's memory."""


@dataclass(frozen=True)
class Packed:
    """How one tensor is packed."""

    dtype: str
    """Its dtype, such as float16."""
    shape: tuple[int, ...]
    """Its shape."""
    count: int
    """Entries that are stored."""
    rice: int | None
    """r of its gaps' code; None: every entry is stored."""

    @property
    def numel(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes per entry."""
        return np.dtype(BITS[self.dtype]).itemsize

    @property
    def remainder_bytes(self) -> int:
        """Bytes of its part of the stream of remainders."""
        return -(-self.count * (self.rice or 0) // 8)


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Streams and safetensors metadata that :func:`unpack` turns into these tensors again.

    Raises:
        ValueError: a tensor's dtype is none of float64, float32, float16 and bfloat16.
    """
    table: dict[str, list[Any]] = {}
    quotients, remainders = [np.zeros(0, np.int64)], [np.zeros(0, np.uint8)]
    values: dict[str, list[np.ndarray[Any, Any]]] = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in BITS:
            raise ValueError(f"{name} is {dtype}; packed are {', '.join(BITS)}")
        bits = bits_of(tensor)
        where = np.flatnonzero(bits)
        gaps = np.diff(where, prepend=-1) - 1
        rice, cost = best_rice(gaps)
        if cost + 8 * bits.itemsize * len(where) < 8 * bits.nbytes:
            quotients.append(gaps >> rice)
            remainders.append(low_bits(gaps, rice))
            values.setdefault(dtype, []).append(bits[where])
            table[name] = [dtype, list(tensor.shape), len(where), rice]
        else:
            values.setdefault(dtype, []).append(bits)
            table[name] = [dtype, list(tensor.shape), bits.size, None]
    streams = {
        GAPS: torch.from_numpy(unary(np.concatenate(quotients))),
        REMAINDERS: torch.from_numpy(np.concatenate(remainders)),
    }
    for dtype, parts in values.items():
        stream = torch.from_numpy(np.concatenate(parts))
        streams[VALUES + dtype] = stream.view(getattr(torch, dtype))
    return streams, {METADATA: json.dumps(table, separators=(",", ":"))}


def unpack(streams: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that :func:`pack` was given.

    Raises:
        ValueError: streams and metadata contradict each other, or ask for far more memory than
            their own size (see EXPANSION).
    """
    table = packing_table(metadata)
    check_streams(table, streams)
    sparse = [entry for entry in table.values() if entry.rice is not None]
    quotients = from_unary(streams[GAPS].numpy(), sum(entry.count for entry in sparse))
    remainders = streams[REMAINDERS].numpy()
    values = {name: bits_of(stream) for name, stream in streams.items() if name.startswith(VALUES)}
    out = {}
    at = byte = 0
    starts = dict.fromkeys(values, 0)
    for name, entry in table.items():
        stream = VALUES + entry.dtype
        stored = values[stream][starts[stream] : starts[stream] + entry.count]
        starts[stream] += entry.count
        if entry.rice is None:
            bits = stored.copy()
        else:
            gaps = quotients[at : at + entry.count] << entry.rice
            gaps |= from_low_bits(remainders[byte:], entry.count, entry.rice)
            at, byte = at + entry.count, byte + entry.remainder_bytes
            # gaps are not negative, so that positions ascend: the last one is the largest
            where = np.cumsum(gaps + 1) - 1
            if entry.count and where[-1] >= entry.numel:
                raise ValueError(
                    f"{name} has an entry at {where[-1]}, beyond its {entry.numel} entries"
                )
            bits = np.zeros(entry.numel, BITS[entry.dtype])
            bits[where] = stored
        out[name] = torch.from_numpy(bits).view(getattr(torch, entry.dtype)).reshape(entry.shape)
    return out


def packing_table(metadata: Mapping[str, str]) -> dict[str, Packed]:
    """How each tensor is packed, from the metadata of a packed file, every field checked.

    Raises:
        ValueError: there is no such table, or it is broken.
    """
    if METADATA not in metadata:
        raise ValueError(f"no packed weights: the header has no entry {METADATA!r}")
    values = parse_json(metadata[METADATA], "the table of packed tensors")
    if not isinstance(values, dict):
        raise ValueError("the table of packed tensors must be a JSON object")
    return {name: packed(name, row) for name, row in values.items()}


def packed(name: str, row: Any) -> Packed:
    """One row of the table; ValueError unless it is sound."""
    if not isinstance(row, list) or len(row) != 4:
        raise ValueError(
            f"{name} must be packed as [dtype, shape, count, rice], not as {row!r:.80}"
        )
    dtype, shape, count, rice = row
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} has dtype {dtype!r:.80}; choose from {', '.join(BITS)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(is_size, shape)):
        raise ValueError(f"{name} has shape {shape!r:.80}, not up to {MAX_DIMS} sizes")
    numel = math.prod(shape)
    if not is_size(count) or count > numel:
        raise ValueError(f"{name} stores {count!r:.80} of {numel} entries")
    if rice is None and count != numel:
        raise ValueError(f"{name} stores {count} entries and says it stores all {numel}")
    if rice is not None and not (is_size(rice) and rice <= MAX_RICE):
        raise ValueError(f"{name} has rice={rice!r:.80}, not null or 0 to {MAX_RICE}")
    return Packed(dtype, tuple(shape), count, rice)


def is_size(value: Any) -> bool:
    """Whether a JSON value is an integer that a size can have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def check_streams(table: Mapping[str, Packed], streams: Mapping[str, Tensor]) -> None:
    """ValueError unless the streams are those that the table needs, of the lengths it needs."""
    counts: dict[str, int] = {}
    for entry in table.values():
        counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.count
    expected = {GAPS: "uint8", REMAINDERS: "uint8"} | {VALUES + dtype: dtype for dtype in counts}
    if set(streams) != set(expected):
        raise ValueError(
            f"packed weights consist of {', '.join(sorted(expected))}, not of "
            f"{', '.join(sorted(streams))}"
        )
    lengths = {VALUES + dtype: count for dtype, count in counts.items()}
    lengths[REMAINDERS] = sum(entry.remainder_bytes for entry in table.values())
    lengths[GAPS] = streams[GAPS].numel()  # it is as long as its last one says: see from_unary
    for name, stream in streams.items():
        if stream.dtype != getattr(torch, expected[name]) or stream.shape != (lengths[name],):
            raise ValueError(
                f"stream {name} is {stream.dtype} {tuple(stream.shape)}, the table of packed "
                f"tensors says torch.{expected[name]} ({lengths[name]},)"
            )
    held = sum(stream.numel() * stream.element_size() for stream in streams.values())
    wanted = sum(entry.nbytes for entry in table.values())
    if wanted > EXPANSION * held + ALLOWANCE:
        raise ValueError(
            f"{held} bytes of packed weights would unpack to {wanted}: more than {EXPANSION} times "
            f"as many and {ALLOWANCE} is refused"
        )


def set_bits(n_entries: int, n_nonzero: int, value_bits: int) -> float:
    """The bound that packing is measured by: log2 C(n, k) + k * value_bits, in bits."""
    n, k = n_entries, n_nonzero
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways / math.log(2) + k * value_bits


# --------------------------------------------------------------------------------------------------
# bits


def bits_of(tensor: Float[Tensor, "..."]) -> Shaped[np.ndarray, " entry"]:
    """A tensor's entries, row by row, as integers with the same bits."""
    flat = tensor.detach().cpu().contiguous().flatten()
    kind = BITS[str(tensor.dtype).removeprefix("torch.")]
    return flat.view(getattr(torch, np.dtype(kind).name)).numpy()


def best_rice(gaps: Int64[np.ndarray, " nonzero"]) -> tuple[int, int]:
    """The r that needs the fewest bits for these gaps, and how many bits that is."""
    if not len(gaps):
        return 0, 0
    # the best r is within one or two of the logarithm of the mean gap
    centre = math.log2(max(float(gaps.mean()), 1.0))
    low, high = max(int(centre) - 2, 0), min(int(centre) + 2, MAX_RICE)
    costs = {r: len(gaps) * (r + 1) + int((gaps >> r).sum()) for r in range(low, high + 1)}
    best = min(costs, key=lambda r: costs[r])
    return best, costs[best]


def unary(quotients: Int64[np.ndarray, " nonzero"]) -> UInt8[np.ndarray, " byte"]:
    """Each number as so many zeros and a one."""
    ones = np.cumsum(quotients + 1) - 1
    bits = np.zeros(ones[-1] + 1 if len(ones) else 0, np.uint8)
    bits[ones] = 1
    return np.packbits(bits)


def from_unary(stream: UInt8[np.ndarray, " byte"], count: int) -> Int64[np.ndarray, " nonzero"]:
    """The numbers that :func:`unary` was given; ValueError unless there are ``count``."""
    bits = np.unpackbits(stream).view(bool)
    if (found := np.count_nonzero(bits)) != count:
        raise ValueError(f"stream {GAPS} holds {found} gaps, its table says {count}")
    ones = np.flatnonzero(bits)
    length = int(ones[-1]) // 8 + 1 if count else 0
    if len(stream) != length:
        raise ValueError(f"stream {GAPS} has {len(stream)} bytes, its gaps end after {length}")
    return np.diff(ones, prepend=-1) - 1


def low_bits(gaps: Int64[np.ndarray, " nonzero"], rice: int) -> UInt8[np.ndarray, " byte"]:
    """The lowest ``rice`` bits of each number: first every number's lowest bit, and so on."""
    planes = [(gaps >> bit & 1).astype(np.uint8) for bit in range(rice)]
    return np.packbits(np.concatenate(planes)) if planes else np.zeros(0, np.uint8)


def from_low_bits(
    stream: UInt8[np.ndarray, " byte"], count: int, rice: int
) -> Int64[np.ndarray, " nonzero"]:
    """The first ``count`` numbers that :func:`low_bits` was given, their lowest bits only."""
    out = np.zeros(count, np.int64)
    planes = np.unpackbits(stream[: -(-count * rice // 8)], count=count * rice)
    for bit, plane in enumerate(planes.reshape(rice, count)):
        out |= plane.astype(np.int64) << bit
    return out
