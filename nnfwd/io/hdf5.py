"""HDF5 in pure Python: as much of it as model files use, read as data.

Groups with hard links, attributes of numbers and strings, and datasets of numbers: contiguous, compact or in chunks
(plain, gzip, shuffle). What else the format has (soft and external links, data in other files, virtual datasets,
shared messages, dense storage, other datatypes, filters and indexes) is refused by name, wherever it stands.

The sections cited are those of the HDF5 File Format Specification, version 4.0,
https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t4.html. From the outside in: a superblock holds the
address of the root group. Every object, a group or a dataset, is an object header: a list of typed messages. A
group's messages lead to its links, name and address of each member; a dataset's say its datatype, its dataspace (the
shape) and its layout (where the values are). Either may have attributes. Addresses and lengths have 8 bytes here,
as in every file of the HDF5 library's default settings; numbers are unsigned and little-endian.

A hostile file can point anywhere, so nothing is read twice without end: all metadata together has a budget of bytes,
all datasets together fit into the file, and an object has one name only.
"""

import enum
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np

from nnfwd.errors import ModelFileError
from nnfwd.io.reading import Limits, Tensor, array, check_tensor, file_size, read_exactly


@dataclass(frozen=True)
class Dataset:
    """An array of the file, not read yet, and its attributes: str, int, float, list[str] or np.ndarray."""

    tensor: Tensor
    """Its dtype is a float or an integer; its values are in the machine's byte order."""
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Groups and datasets by name, and attributes: str, int, float, list[str] or np.ndarray."""

    members: Mapping[str, "Group | Dataset"]
    """Sorted by name."""
    attributes: Mapping[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __getitem__(self, name: str) -> "Group | Dataset":
        """What has this name or path, `a/b/c`; `ModelFileError` where there is none."""
        found = self._find(name)
        if found is None:
            raise ModelFileError(f"the file has no {name}")
        return found

    def _find(self, path: str) -> "Group | Dataset | None":
        found: Group | Dataset | None = self
        for name in path.split("/"):
            found = found.members.get(name) if isinstance(found, Group) else None
        return found


def read(file: IO[bytes], limits: Limits, *, start: int = 0, size: int | None = None) -> Group:
    """The root group of an HDF5 file; all metadata is read and checked now, the values of a dataset when asked for.

    Where the HDF5 file is a part of another, it has `size` bytes from `start`.

    Raises:
        ModelFileError: for a file that is damaged, beyond the limits, or has what is not read.
    """
    source = _Source(file, limits, start, file_size(file) if size is None else size)
    root = _object(source, _superblock(source), "/", 0)
    if not isinstance(root, Group):
        raise ModelFileError("the root is not a group")
    return root


# Bytes

_OVERHEAD = 64
"""Bytes of metadata charged for each block, message and chunk over its own: even an empty one takes time and memory."""


class _Cursor:
    """A block of the file, read from front to back and never beyond its end."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._at, self.what = data, 0, what

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise ModelFileError(f"{self.what} is damaged: {size} bytes needed where {self.left} are left")
        self._at += size
        return self._data[self._at - size : self._at]

    def cut(self, size: int) -> "_Cursor":
        return _Cursor(self.take(size), self.what)

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def address(self) -> int | None:
        """A place in the file, or None for the undefined address, all bits set."""
        value = self.uint(8)
        return None if value == 2**64 - 1 else value

    def version(self, *known: int) -> int:
        """The version number, one byte, with which most structures begin."""
        version = self.uint(1)
        if version not in known:
            raise ModelFileError(f"{self.what} is damaged or too new: version {version}")
        return version


class _Source:
    """The file, and what may still be read of it."""

    def __init__(self, file: IO[bytes], limits: Limits, start: int, size: int) -> None:
        self._file, self.limits, self._start, self._size = file, limits, start, size
        # An honest file has every block once; the rest is for the overhead, and for names and strings, charged again.
        self._metadata = min(8 * self._size, limits.metadata)
        self._stored = self._size
        self._expanded = max(limits.expansion * self._size, 2**24)
        self.objects: set[int] = set()
        self.heaps: dict[int, dict[int, bytes]] = {}

    def check(self, address: int | None, size: int, what: str) -> int:
        """The address, if so many bytes are there."""
        if address is None or address + size > self._size:
            where = "nowhere" if address is None else f"at byte {address}"
            raise ModelFileError(f"{what} of {size} bytes is {where}: the file has {self._size} bytes")
        return address

    def raw(self, address: int | None, size: int, what: str) -> bytes:
        self._file.seek(self._start + self.check(address, size, what))
        return read_exactly(self._file, size, what)

    def spend(self, size: int) -> None:
        """Charges bytes of metadata to their budget."""
        self._metadata -= size
        if self._metadata < 0:
            raise ModelFileError("more metadata than the file can have: blocks overlap, or limits.metadata is too low")

    def block(self, address: int | None, size: int, what: str, signature: bytes = b"") -> _Cursor:
        """A block of metadata, the signature taken off."""
        self.check(address, size, what)
        self.spend(size + _OVERHEAD)
        cursor = _Cursor(self.raw(address, size, what), what)
        if cursor.take(len(signature)) != signature:
            raise ModelFileError(f"{what} at byte {address} is damaged: its signature is not {signature.decode()}")
        return cursor

    def checked(self, address: int | None, size: int, what: str, signature: bytes = b"") -> _Cursor:
        """A block of metadata that ends in its checksum, the signature and the checksum taken off."""
        cursor = self.block(address, size, what)
        data = cursor.take(size - 4)
        if _lookup3(data) != cursor.uint(4):
            raise ModelFileError(f"{what} at byte {address} is damaged: its checksum differs")
        if not data.startswith(signature):
            raise ModelFileError(f"{what} at byte {address} is damaged: its signature is not {signature.decode()}")
        return _Cursor(data[len(signature) :], what)

    def charge(self, what: str, stored: int, expanded: int) -> None:
        """Charges a dataset: its bytes in the file, and how many they become."""
        self._stored -= stored
        self._expanded -= expanded
        if self._stored < 0:
            raise ModelFileError(f"{what}: the datasets have more bytes than the file: they overlap")
        if self._expanded < 0:
            raise ModelFileError(f"{what} expands to {expanded} bytes: raise limits.expansion if you trust it")


def _lookup3(data: bytes) -> int:
    """Bob Jenkins' hash, the checksum of all newer metadata; https://burtleburtle.net/bob/c/lookup3.c, `hashlittle`."""
    a = b = c = (0xDEADBEEF + len(data)) & 0xFFFFFFFF
    words = np.frombuffer(data + bytes(-len(data) % 12), "<u4").tolist()
    for i in range(0, len(words), 3):
        a, b, c = (a + words[i]) & 0xFFFFFFFF, (b + words[i + 1]) & 0xFFFFFFFF, (c + words[i + 2]) & 0xFFFFFFFF
        if i + 3 == len(words):
            break
        for turn in (4, 6, 8, 16, 19, 4):
            turned = (c << turn | c >> 32 - turn) & 0xFFFFFFFF
            a, b, c = b, (c + b) & 0xFFFFFFFF, (a - c & 0xFFFFFFFF) ^ turned
    for turn in (14, 11, 25, 16, 4, 14, 24):
        turned = (b << turn | b >> 32 - turn) & 0xFFFFFFFF
        a, b, c = b, (c ^ b) - turned & 0xFFFFFFFF, a
    return b


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{what} is not UTF-8 text") from error


# II. The superblock


def _superblock(source: _Source) -> int | None:
    """The address of the root group's object header (II.A)."""
    what = "the superblock"
    head = source.block(0, 9, what)
    if head.take(8) != b"\x89HDF\r\n\x1a\n":
        raise ModelFileError("not an HDF5 file, or one with a user block before its contents")
    version = head.version(0, 1, 2, 3)
    if version < 2:
        rest = source.block(9, 15 + 4 * version + 32 + 24, what)
        rest.take(4)
        widths = rest.take(2)
        rest.take(9 + 4 * version)
        base, _, end, driver = rest.address(), rest.address(), rest.address(), rest.address()
        rest.address()  # the name of the root group, which is empty
        root = rest.address()
    else:
        rest = source.checked(0, 48, what)
        rest.take(9)
        widths = rest.take(2)
        rest.take(1)
        base, _, end, root = rest.address(), rest.address(), rest.address(), rest.address()
        driver = None
    if widths != b"\x08\x08":
        raise ModelFileError(f"addresses of {widths[0]} and lengths of {widths[1]} bytes: only files with 8 are read")
    if base != 0 or driver is not None:
        raise ModelFileError("the file has a base address or a driver of its own: only plain files are read")
    source.check(end, 0, "the end of the file")
    return root


# IV. Objects


class _Kind(enum.IntEnum):
    """The types of messages (IV.A.2) that are read."""

    DATASPACE = 1
    LINK_INFO = 2
    DATATYPE = 3
    OLD_FILL_VALUE = 4
    FILL_VALUE = 5
    LINK = 6
    EXTERNAL_FILES = 7
    LAYOUT = 8
    FILTERS = 11
    ATTRIBUTE = 12
    CONTINUATION = 16
    SYMBOL_TABLE = 17
    ATTRIBUTE_INFO = 21


# NIL, group info, comment, both modification times, reference count: they say nothing about the contents.
_IGNORED = (0, 10, 13, 14, 18, 22)


class _Messages:
    """The messages of an object header, by type."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._found: dict[_Kind, list[_Cursor]] = {}

    def add(self, kind: _Kind, message: _Cursor) -> None:
        self._found.setdefault(kind, []).append(message)

    def __contains__(self, kind: _Kind) -> bool:
        return kind in self._found

    def all(self, kind: _Kind) -> list[_Cursor]:
        return self._found.get(kind, [])

    def one(self, kind: _Kind) -> _Cursor:
        found = self.all(kind)
        if len(found) != 1:
            raise ModelFileError(f"{self.what} is damaged: it has {len(found)} messages {kind.name}, not one")
        return found[0]


def _object(source: _Source, address: int | None, path: str, depth: int) -> Group | Dataset:
    source.spend(len(path))
    where = source.check(address, 0, path)
    if where in source.objects:
        raise ModelFileError(f"{path} is an object that has another name already: only one name for each is read")
    source.objects.add(where)
    if len(source.objects) > 2 * source.limits.tensors:
        raise ModelFileError(f"more than {2 * source.limits.tensors} groups and datasets: raise limits.tensors")
    if depth > source.limits.depth:
        raise ModelFileError(f"groups nested deeper than {source.limits.depth}")
    messages = _messages(source, where, path)
    attributes = _attributes(source, messages)
    if _Kind.LAYOUT in messages:
        return Dataset(_dataset(source, messages, attributes), attributes)
    if _Kind.SYMBOL_TABLE not in messages and _Kind.LINK_INFO not in messages:
        raise ModelFileError(f"{path} is neither a group nor a dataset: a named datatype is not read")
    links: dict[str, int | None] = {}
    for name, target in _links(source, messages):
        if name in links or name in ("", ".", "..") or "/" in name:
            raise ModelFileError(f"{path} has the name {name[:80]!r} twice, or it is not a name")
        links[name] = target
    inside = "/" if path == "/" else f"{path}/"
    members = {name: _object(source, links[name], inside + name, depth + 1) for name in sorted(links)}
    return Group(members, attributes)


def _messages(source: _Source, address: int, what: str) -> _Messages:
    """The messages of an object header (IV.A.1) and of the blocks it is continued in (IV.A.2.q)."""
    found = _Messages(what)
    is_new = source.raw(address, 4, what) == b"OHDR"
    if is_new:
        head = source.block(address, 6, what, b"OHDR")
        head.version(2)
        flags = head.uint(1)
        before = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        size = source.block(address + before, width, what).uint(width)
        blocks = [source.checked(address, before + width + size + 4, what, b"OHDR")]
        blocks[0].take(before + width - 4)
        kind_width, more = 1, 2 if flags & 4 else 0
    else:
        head = source.block(address, 16, what)
        head.version(1)
        head.take(7)
        blocks = [source.block(address + 16, head.uint(4), what)]
        kind_width, more = 2, 3
    for block in blocks:  # which grows as continuations are found
        while block.left >= kind_width + 3 + more:
            number, size, flags = block.uint(kind_width), block.uint(2), block.uint(1)
            block.take(more)
            message = block.cut(size)
            source.spend(_OVERHEAD)
            if number in _IGNORED:
                continue
            if number not in tuple(_Kind):
                raise ModelFileError(f"{what} has a message of type {number}, which is not read")
            kind = _Kind(number)
            if flags & 2:
                raise ModelFileError(f"{what} shares its message {kind.name} with other objects, which is not read")
            if kind != _Kind.CONTINUATION:
                found.add(kind, message)
                continue
            at, size = message.address(), message.uint(8)
            blocks.append(source.checked(at, size, what, b"OCHK") if is_new else source.block(at, size, what))
    return found


# Groups: a symbol table in old files, link messages in new ones


def _links(source: _Source, messages: _Messages) -> Iterator[tuple[str, int | None]]:
    what = f"the list of {messages.what}"
    if _Kind.SYMBOL_TABLE in messages:
        message = messages.one(_Kind.SYMBOL_TABLE)
        tree, heap = message.address(), message.address()
        yield from _symbols(source, tree, heap, what)
        return
    for message in messages.all(_Kind.LINK):
        yield _link(message, messages.what)
    info = messages.one(_Kind.LINK_INFO)  # IV.A.2.c
    info.version(0)
    info.take(8 if info.uint(1) & 1 else 0)
    _check_compact(info, what)


def _check_compact(info: _Cursor, what: str) -> None:
    """Raises `ModelFileError` where links or attributes are not in messages but in a heap, as new files have many."""
    if info.address() is not None:
        raise ModelFileError(
            f"{what} is in dense storage, which is not read: write the file with libver='earliest', "
            "and without track_order"
        )


def _symbols(source: _Source, tree: int | None, heap: int | None, what: str) -> Iterator[tuple[str, int | None]]:
    """A B-tree (III.A.1) of symbol table nodes (III.B, III.C); the names are in a local heap (III.D)."""
    head = source.block(heap, 32, what, b"HEAP")
    head.version(0)
    head.take(3)
    size, _ = head.uint(8), head.uint(8)
    names = source.block(head.address(), size, what).take(size)
    for _, child in _tree(source, tree, 0, 8, what):
        head = source.block(child, 8, what, b"SNOD")
        head.version(1)
        head.take(1)
        count = head.uint(2)
        node = source.block(source.check(child, 8, what) + 8, 40 * count, what)
        for _ in range(count):
            start, target, cached = node.uint(8), node.address(), node.uint(4)
            node.take(20)
            end = names.find(b"\0", start)
            if end < 0:
                raise ModelFileError(f"{what} is damaged: a name is outside its heap")
            source.spend(end - start)
            name = _text(names[start:end], f"a name in {what}")
            if cached == 2:
                raise ModelFileError(f"{name[:80]} in {what} is a soft link: only hard links are read")
            yield name, target


def _link(message: _Cursor, what: str) -> tuple[str, int | None]:
    """A link message (IV.A.2.g)."""
    message.version(1)
    flags = message.uint(1)
    kind = message.uint(1) if flags & 8 else 0
    message.take((8 if flags & 4 else 0) + (1 if flags & 16 else 0))
    name = _text(message.take(message.uint(1 << (flags & 3))), f"a name in {what}")
    if kind != 0:
        kinds = {1: "a soft link", 64: "an external link"}
        found = kinds.get(kind, "a user-defined link")
        raise ModelFileError(f"{name[:80]} in {what} is {found}: only hard links are read")
    return name, message.address()


# III.A. B-trees


def _tree(
    source: _Source, address: int | None, kind: int, key_size: int, what: str, level: int | None = None
) -> Iterator[tuple[_Cursor, int | None]]:
    """The keys and children of the leaves of a version 1 B-tree (III.A.1), in order."""
    head = source.block(address, 24, what, b"TREE")
    node_kind, node_level, count = head.uint(1), head.uint(1), head.uint(2)
    # A child is one level further down, so no path is endless.
    if node_kind != kind or node_level > source.limits.depth or level not in (None, node_level):
        raise ModelFileError(f"{what} is damaged: a B-tree node of type {node_kind} and level {node_level}")
    node = source.block(source.check(address, 24, what) + 24, count * (key_size + 8) + key_size, what)
    for _ in range(count):
        key, child = node.cut(key_size), node.address()
        if node_level:
            yield from _tree(source, child, kind, key_size, what, node_level - 1)
        else:
            yield key, child


# IV.A.2.m Attributes


def _attributes(source: _Source, messages: _Messages) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if _Kind.ATTRIBUTE_INFO in messages:
        info = messages.one(_Kind.ATTRIBUTE_INFO)  # IV.A.2.v
        info.version(0)
        info.take(2 if info.uint(1) & 1 else 0)
        _check_compact(info, f"the list of attributes of {messages.what}")
    for message in messages.all(_Kind.ATTRIBUTE):
        name, value = _attribute(source, message, messages.what)
        if name in found:
            raise ModelFileError(f"{messages.what} has the attribute {name[:80]} twice")
        found[name] = value
    return found


def _attribute(source: _Source, message: _Cursor, owner: str) -> tuple[str, Any]:
    version = message.version(1, 2, 3)
    flags = message.uint(1)
    sizes = message.uint(2), message.uint(2), message.uint(2)
    message.take(1 if version == 3 else 0)  # the character set: ASCII is UTF-8 too
    parts = []
    for size in sizes:
        parts.append(message.take(size))
        message.take(-size % 8 if version == 1 else 0)
    name = _text(parts[0].split(b"\0")[0], f"the name of an attribute of {owner}")
    what = f"the attribute {name[:80]} of {owner}"
    if flags and version > 1:
        raise ModelFileError(f"{what} shares its datatype or dataspace with others, which is not read")
    kind, shape = _datatype(_Cursor(parts[1], what)), _dataspace(_Cursor(parts[2], what))
    data = message.take(math.prod(shape) * kind.size)
    if kind.name in _TEXTS:
        if len(shape) > 1:
            raise ModelFileError(f"{what} is an array of strings of shape {shape}: only lists of them are read")
        texts = list(_strings(source, kind, _Cursor(data, what), math.prod(shape)))
        return name, texts if shape else texts[0]
    if kind.name == _OPAQUE:
        raise ModelFileError(f"{what} is opaque bytes: only numbers and strings are read")
    check_tensor(what, shape, kind.name, source.limits)
    values = _numbers(data, kind, kind.name, shape)
    return name, values if shape else values.item()


def _strings(source: _Source, kind: "_Type", data: _Cursor, count: int) -> Iterator[str]:
    for _ in range(count):
        if kind.name == _VARIABLE:
            length, heap, index = data.uint(4), data.address(), data.uint(4)
            source.spend(length)
            found = _global_heap(source, heap, data.what).get(index, b"") if length else b""
            if len(found) < length:
                raise ModelFileError(f"{data.what} is damaged: a string of {length} bytes where {len(found)} are")
            text = found[:length]
        else:
            text = data.take(kind.size)
            # Ended by a null byte, padded by null bytes, or padded by spaces.
            text = (text.split(b"\0")[0], text.rstrip(b"\0"), text.rstrip(b" "))[kind.padding]
        yield _text(text, data.what)


def _global_heap(source: _Source, address: int | None, what: str) -> dict[int, bytes]:
    """The strings of one collection of the global heap (III.E), by their numbers."""
    address = source.check(address, 0, what)
    if address not in source.heaps:
        head = source.block(address, 16, what, b"GCOL")
        head.version(1)
        head.take(3)
        size = head.uint(8)
        heap = source.block(address + 16, size - 16 if size > 16 else 0, what)
        objects = source.heaps[address] = {}
        while heap.left >= 16:
            index = heap.uint(2)
            heap.take(6)
            length = heap.uint(8)
            if index == 0:  # the rest is free
                break
            objects[index] = heap.take(length)
            heap.take(-length % 8)
    return source.heaps[address]


# IV.A.2.d Datatypes, IV.A.2.b dataspaces


class _Type(NamedTuple):
    name: str
    """Of a dtype, or one of the three below."""
    size: int
    order: str = "<"
    padding: int = 0


_FIXED, _VARIABLE, _OPAQUE = "string", "variable string", "opaque"
_TEXTS = (_FIXED, _VARIABLE)
_NOT_READ = ("", "", "a time", "", "a bit field", "", "a compound", "a reference", "an enumeration", "", "an array")
# Bytes; sign, exponent and mantissa: where, where and how wide, where and how wide; bias of the exponent.
_FLOATS: dict[tuple[int, ...], str] = {
    (2, 15, 10, 5, 0, 10, 15): "float16",
    (2, 15, 7, 8, 0, 7, 127): "bfloat16",
    (4, 31, 23, 8, 0, 23, 127): "float32",
    (8, 63, 52, 11, 0, 52, 1023): "float64",
}


def _datatype(message: _Cursor) -> _Type:
    what = message.what
    first, bits, size = message.uint(1), message.uint(3), message.uint(4)
    version, kind = first >> 4, first & 0x0F
    if version not in (1, 2, 3, 4, 5) or size == 0:
        raise ModelFileError(f"{what} is damaged or too new: a datatype of version {version} and {size} bytes")
    order = ">" if bits & 1 else "<"
    if kind == 0:
        offset, precision = message.uint(2), message.uint(2)
        if offset == 0 and precision == 8 * size and size in (1, 2, 4, 8):
            return _Type(f"{'int' if bits & 8 else 'uint'}{precision}", size, order)
        raise ModelFileError(f"{what} is an integer of {precision} bits in {size} bytes, which is not read")
    if kind == 1:
        offset, precision = message.uint(2), message.uint(2)
        fields = [message.uint(1) for _ in range(4)]
        name = _FLOATS.get((size, bits >> 8 & 0xFF, *fields, message.uint(4)))
        # Bits 4 and 5: the first bit of the mantissa is implied. Bit 6: the order of the bytes is that of a VAX.
        if name and offset == 0 and precision == 8 * size and bits & 0x70 == 0x20:
            return _Type(name, size, order)
        raise ModelFileError(f"{what} is a float of {precision} bits that is neither IEEE's nor bfloat16")
    if kind == 3 and bits & 0x0F < 3:
        return _Type(_FIXED, size, padding=bits & 0x0F)
    if kind == 5:
        return _Type(_OPAQUE, size)
    if kind == 9 and bits & 0x0F == 1 and size == 16:
        return _Type(_VARIABLE, size)
    name = _NOT_READ[kind] if kind < len(_NOT_READ) and _NOT_READ[kind] else f"a datatype of class {kind}"
    raise ModelFileError(f"{what} is {name}: only numbers and strings are read")


def _dataspace(message: _Cursor) -> tuple[int, ...]:
    """The shape. A null dataspace, which has no elements, is taken as (0,)."""
    version = message.version(1, 2)
    rank, _ = message.uint(1), message.uint(1)
    kind = message.uint(1) if version == 2 else 1
    message.take(5 if version == 1 else 0)
    return (0,) if kind == 2 else tuple(message.uint(8) for _ in range(rank))


def _numbers(data: bytes, kind: _Type, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    values = array(data, dtype, shape, order=kind.order)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


# Datasets: the layout message (IV.A.2.i) says where the values are


def _dataset(source: _Source, messages: _Messages, attributes: Mapping[str, Any]) -> Tensor:
    what = messages.what
    kind, shape = _datatype(messages.one(_Kind.DATATYPE)), _dataspace(messages.one(_Kind.DATASPACE))
    dtype = kind.name
    if dtype == _OPAQUE and kind.size == 2 and str(attributes.get("dtype")) == "bfloat16":
        dtype = "bfloat16"  # as Keras 3 writes it, in `H5Entry.__setitem__`
    if dtype in (*_TEXTS, _OPAQUE):
        raise ModelFileError(f"{what} is a dataset of type {dtype}: only numbers are read")
    size = check_tensor(what, shape, dtype, source.limits)
    load = _layout(source, messages, kind, shape, size)
    return Tensor(shape, dtype, lambda: _numbers(load(), kind, dtype, shape))


def _layout(
    source: _Source, messages: _Messages, kind: _Type, shape: tuple[int, ...], size: int
) -> Callable[[], bytes]:
    """What reads the bytes of a dataset, once these are known to be in the file."""
    what = messages.what
    if _Kind.EXTERNAL_FILES in messages:
        raise ModelFileError(f"{what} has its values in another file, which is not read")
    layout = messages.one(_Kind.LAYOUT)
    version, layout_class = layout.version(3, 4, 5), layout.uint(1)
    if layout_class == 0:  # compact: in the message itself
        data = layout.take(layout.uint(2))
        _check_fills(what, len(data), size)
        return lambda: data
    if layout_class == 1:  # contiguous
        address = layout.address()
        _check_fills(what, layout.uint(8), size)
        if address is None:  # nothing was ever written
            fill = _fill_value(messages, kind.size)
            source.charge(what, 0, size)
            return lambda: fill * (size // kind.size)
        source.charge(what, size, 0)
        source.check(address, size, what)
        return lambda: source.raw(address, size, what)
    if layout_class == 2:
        return _chunked(source, messages, layout, version, kind, shape)
    if layout_class == 3:
        raise ModelFileError(f"{what} is a virtual dataset, made of others, which is not read")
    raise ModelFileError(f"{what} is damaged: a layout of class {layout_class}")


def _check_fills(what: str, stored: int, size: int) -> None:
    if stored != size:
        raise ModelFileError(f"{what} needs {size} bytes by its shape and datatype: {stored} are stored")


def _fill_value(messages: _Messages, size: int) -> bytes:
    """What stands where nothing was written: IV.A.2.f, in files before HDF5 1.6 IV.A.2.e; zero by default."""
    data = b""
    if _Kind.FILL_VALUE in messages:
        message = messages.one(_Kind.FILL_VALUE)
        if message.version(1, 2, 3) == 3:
            is_stated = bool(message.uint(1) & 0x20)
        else:
            message.take(2)
            is_stated = bool(message.uint(1))
        data = message.take(message.uint(4)) if is_stated else b""
    elif _Kind.OLD_FILL_VALUE in messages:
        message = messages.one(_Kind.OLD_FILL_VALUE)
        data = message.take(message.uint(4))
    if len(data) not in (0, size):
        raise ModelFileError(f"{messages.what} is damaged: a fill value of {len(data)} bytes")
    return data or bytes(size)


# IV.A.2.l Filters


def _filters(messages: _Messages) -> list[tuple[int, int]]:
    """Each filter's number and its first parameter, in the order of writing."""
    if _Kind.FILTERS not in messages:
        return []
    message = messages.one(_Kind.FILTERS)
    version, count = message.version(1, 2), message.uint(1)
    message.take(6 if version == 1 else 0)
    found = []
    for _ in range(count):
        number = message.uint(2)
        if number not in (_GZIP, _SHUFFLE):
            name = {3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}.get(number, str(number))
            raise ModelFileError(f"{messages.what} has the filter {name}: only gzip and shuffle are read")
        name_size = message.uint(2) if version == 1 else 0
        message.take(2)
        parameters = message.uint(2)
        message.take(-(-name_size // 8) * 8)
        values = [message.uint(4) for _ in range(parameters)]
        message.take(4 if version == 1 and parameters % 2 else 0)
        found.append((number, values[0] if values else 0))
    if len({number for number, _ in found}) != count:
        raise ModelFileError(f"{messages.what} has a filter twice")
    return found


_GZIP, _SHUFFLE = 1, 2


def _unfilter(data: bytes, filters: list[tuple[int, int]], skipped: int, size: int, what: str) -> bytes:
    """A chunk of `size` bytes as it was before the filters, of which those whose bit is in `skipped` were not used."""
    for i, (number, parameter) in reversed(list(enumerate(filters))):
        if skipped >> i & 1:
            continue
        if number == _GZIP:
            stream = zlib.decompressobj()
            try:
                data = stream.decompress(data, size + 1)
            except zlib.error as error:
                raise ModelFileError(f"a chunk of {what} is damaged: {error}") from error
            if not stream.eof:
                raise ModelFileError(f"a chunk of {what} is damaged: it does not decompress to {size} bytes")
        else:
            count = len(data) // max(parameter, 1)
            whole = np.frombuffer(data, "u1", parameter * count).reshape(parameter, count)
            data = whole.T.tobytes() + data[parameter * count :]
    if len(data) != size:
        raise ModelFileError(f"a chunk of {what} has {len(data)} bytes, not {size}")
    return data


# Chunks: an array in blocks of one shape; those at its end are whole in the file, those missing hold the fill value


class _Chunk(NamedTuple):
    start: tuple[int, ...]
    """The place of its first element in the array."""
    address: int | None
    size: int
    skipped: int
    """Which filters were not used for it, bit by bit."""


def _chunked(
    source: _Source, messages: _Messages, layout: _Cursor, version: int, kind: _Type, shape: tuple[int, ...]
) -> Callable[[], bytes]:
    """What reads all chunks; they are in a B-tree, in files of newer versions also as a single one."""
    what = messages.what
    filters, fill = _filters(messages), _fill_value(messages, kind.size)
    flags = layout.uint(1) if version > 3 else 0
    rank = layout.uint(1)
    tree = layout.address() if version == 3 else None
    width = layout.uint(1) if version > 3 else 4
    block, element = [layout.uint(width) for _ in range(rank - 1)], layout.uint(width)
    if element != kind.size or len(block) != len(shape) or 0 in block or flags & ~2:
        raise ModelFileError(f"{what} of shape {shape} has chunks of shape {tuple(block)}, which are not read")
    size = check_tensor(f"a chunk of {what}", block, f"u{element}", source.limits)
    chunks = []
    if version > 3:
        index = layout.uint(1)
        if index != 1:
            names = {2: "an implicit index", 3: "a fixed array", 4: "an extensible array", 5: "a version 2 B-tree"}
            raise ModelFileError(
                f"{what} has its chunks in {names.get(index, f'an index of type {index}')}, which is not read: "
                "write the file with libver='earliest', or without chunks"
            )
        stored, skipped = (layout.uint(8), layout.uint(4)) if flags & 2 else (size, 0)
        address = layout.address()
        if address is not None:
            chunks.append(_Chunk((0,) * len(block), address, stored, skipped))
    elif tree is not None:
        for key, child in _tree(source, tree, 1, 8 + 8 * rank, what):
            source.spend(_OVERHEAD)
            stored, skipped = key.uint(4), key.uint(4)
            chunks.append(_Chunk(tuple(key.uint(8) for _ in block), child, stored, skipped))
    for chunk in chunks:
        source.check(chunk.address, chunk.size, what)
        if not filters and chunk.size != size:
            raise ModelFileError(f"{what} is damaged: a chunk of {chunk.size} bytes, not {size}")
        if any(at % n or at >= end for at, n, end in zip(chunk.start, block, shape, strict=True)):
            raise ModelFileError(f"{what} is damaged: a chunk at {chunk.start}")
    whole = max(math.prod(shape) * element, size * len(chunks))
    source.charge(what, sum(chunk.size for chunk in chunks), whole)

    def load() -> bytes:
        # As unsigned integers: the bytes, whatever they mean.
        raw = np.dtype(f"u{element}")
        values = np.full(shape, np.frombuffer(fill, raw)[0], raw)
        for start, address, stored, skipped in chunks:
            data = _unfilter(source.raw(address, stored, what), filters, skipped, size, what)
            place = tuple(slice(at, at + n) for at, n in zip(start, block, strict=True))
            inside = tuple(slice(end - at) for at, end in zip(start, shape, strict=True))
            values[place] = np.frombuffer(data, raw).reshape(block)[inside]
        return values.tobytes()

    return load
