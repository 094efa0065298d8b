"""A check of a GGUF file's header: that its counts and lengths fit into the file."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from gguf import GGUFValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ARRAY_ENTRIES = 2**21  # of all arrays together; a vocabulary of 152,000 tokens has three of that length
MAX_DIMENSIONS = 4  # of a tensor, as in ggml
MIN_FIELD_BYTES = 13  # an empty key's length, the kind of a value, and the value
MIN_TENSOR_BYTES = 24  # an empty name's length, the number of dimensions, the data type and the offset
SCALAR_BYTES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}
MIN_BYTES = {**SCALAR_BYTES, GGUFValueType.STRING: 8, GGUFValueType.ARRAY: 12}


def check_header(path: Path) -> None:
    """Raise ValueError where a GGUF file's header states a count or a length that the file can't hold.

    ``GGUFReader`` trusts them all: one flipped bit makes it read on until the machine has no memory left.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _Header(content).check()


class _Header:
    """A walk over a header; ``at`` is the position of the next byte."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at, self.order, self.array_entries = content, 0, "<", 0

    def check(self) -> None:
        if self.content[: len(MAGIC)] != MAGIC:
            raise ValueError("it doesn't begin with 'GGUF'.")
        self.at = len(MAGIC)
        version = self.number("the version", 4)
        if version & 0xFFFF == 0:  # a file of the other byte order
            self.order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, and only {' and '.join(map(str, VERSIONS))} can be read.")
        tensors = self.number("the number of tensors", 8)
        fields = self.number("the number of metadata fields", 8)
        self.check_fits(f"a list of {fields} metadata fields", fields * MIN_FIELD_BYTES)
        for _ in range(fields):
            key = repr(self.string("a metadata key").decode())
            self.value(key, self.number(key, 4))
        self.check_fits(f"a list of {tensors} tensors", tensors * MIN_TENSOR_BYTES)
        for _ in range(tensors):
            self.tensor()

    def value(self, key: str, number: int) -> None:
        kind = GGUFValueType(number)
        if kind == GGUFValueType.STRING:
            self.string(key)
        elif kind == GGUFValueType.ARRAY:
            self.array(key)
        else:
            self.take(key, SCALAR_BYTES[kind])

    def array(self, key: str) -> None:
        number, length = self.number(key, 4), self.number(key, 8)
        kind = GGUFValueType(number)
        self.check_fits(f"the array {key} of {length} entries", length * MIN_BYTES[kind])
        self.array_entries += length
        if self.array_entries > MAX_ARRAY_ENTRIES:
            raise ValueError(f"the arrays of its metadata have more than {MAX_ARRAY_ENTRIES:,} entries.")
        if kind in SCALAR_BYTES:
            self.take(key, length * SCALAR_BYTES[kind])
            return
        for _ in range(length):
            self.value(key, number)

    def tensor(self) -> None:
        name = repr(self.string("the name of a tensor").decode())
        dimensions = self.number(name, 4)
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"its tensor {name} has {dimensions} dimensions, more than {MAX_DIMENSIONS}.")
        self.take(name, 8 * dimensions + 12)  # the shape, the data type and the offset

    def string(self, what: str) -> bytes:
        length = self.number(what, 8)
        start = self.take(what, length)
        return self.content[start : start + length]

    def number(self, what: str, size: int) -> int:
        """The unsigned integer of 4 or 8 bytes that comes next."""
        (value,) = struct.unpack_from(self.order + {4: "I", 8: "Q"}[size], self.content, self.take(what, size))
        return value

    def take(self, what: str, size: int) -> int:
        """Where the next bytes begin; the walk goes on after them."""
        self.check_fits(what, size)
        self.at += size
        return self.at - size

    def check_fits(self, what: str, size: int) -> None:
        left = len(self.content) - self.at
        if size > left:
            raise ValueError(f"{what} takes {size} bytes or more from byte {self.at} on, where only {left} are left.")
