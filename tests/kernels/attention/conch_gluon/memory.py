# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Global and shared memory of a Gluon kernel, and TMA's descriptors.

Accesses outside a tensor's storage fail. What is not initialised, and what a copy is
about to fill, has all bits set: NaN, in floating point.
"""

import ctypes
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .program import Barrier, program
from .values import DType, Tensor, data_of, dtype_of

RAW = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def raw(data: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Elements, held as `Tensor` does, as integers of the same bits."""
    return data.to(dtype.torch).view(RAW[dtype.bits])


def from_raw(bits: torch.Tensor, dtype: DType) -> Tensor:
    return Tensor(bits.view(dtype.torch), dtype)


# ------------------------------------------------------------- global memory


class PointerType(NamedTuple):
    element_ty: DType


class Pointer:
    """A pointer, or a tensor of them, into the storage of a tensor of torch's."""

    def __init__(self, storage: torch.Tensor, offset: Any, element: DType) -> None:
        self.storage = storage  # all of it, in integers of the element's bits
        self.offset = offset  # an int or int64 tensor, in elements
        self.element = element

    @classmethod
    def to_tensor(cls, tensor: torch.Tensor) -> "Pointer":
        element = dtype_of(tensor.dtype)
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        storage = tensor.as_strided((size,), (1,), 0).view(RAW[element.bits])
        return cls(storage, tensor.storage_offset(), element)

    @property
    def dtype(self) -> PointerType:
        return PointerType(self.element)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.storage, self.offset + data_of(other), self.element)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets and whether each is accessed, of the same shape."""
        offset = torch.as_tensor(self.offset)
        mask = torch.as_tensor(True if mask is None else data_of(mask))
        offset, mask = torch.broadcast_tensors(offset, mask)
        outside = mask & ((offset < 0) | (offset >= len(self.storage)))
        if bool(outside.any()):
            worst = int(offset[outside][0])
            raise IndexError(f"element {worst} of {len(self.storage)} is accessed")
        return offset, mask


def load(
    pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = ""
) -> Tensor:
    offset, mask = pointer.places(mask)
    bits = pointer.storage[torch.where(mask, offset, 0)]
    fill = torch.full_like(bits, -1)  # where none is given, anything
    if other is not None:
        element = pointer.element
        filling = torch.as_tensor(data_of(other)).to(element.held)
        fill = raw(filling, element).expand(bits.shape)
    loaded = from_raw(torch.where(mask, bits, fill), pointer.element)
    return loaded if loaded.shape else Tensor(loaded.data.item(), loaded.dtype)


def store(
    pointer: Pointer, value: Any, mask: Any = None, cache_modifier: str = ""
) -> None:
    offset, mask = pointer.places(mask)
    data = torch.as_tensor(data_of(value)).to(pointer.element.held)
    bits = raw(data, pointer.element).expand(offset.shape)
    pointer.storage[offset[mask]] = bits[mask]


def atomic_add(pointer: Pointer, value: Any, sem: str = "acq_rel") -> Tensor:
    before = load(pointer)
    store(pointer, before + value)
    return before


# ------------------------------------------------------------- shared memory


class SharedLayout(NamedTuple):
    """Panels as wide as the swizzle, one behind the other, row by row. The swizzle
    itself permutes bytes of a panel, always alike, and is left out."""

    swizzle_byte_width: int
    element_bitwidth: int
    rank: int = 2


class BarrierLayout(NamedTuple):
    """Of memory that holds barriers."""


@lru_cache
def places_of(shape: tuple[int, ...], layout: SharedLayout, bits: int) -> torch.Tensor:
    """Where the elements [tiles, rows, columns] of tiles in this layout lie."""
    if layout.element_bitwidth != bits:
        raise TypeError(f"{layout} holds elements of {bits} bits")
    tiles, rows, columns = shape
    panel = min(columns, layout.swizzle_byte_width * 8 // bits)
    places = torch.arange(math.prod(shape))
    places = places.reshape(tiles, columns // panel, rows, panel)
    return places.transpose(1, 2).reshape(shape)


class Block:
    """Some bytes of shared memory."""

    def __init__(self, num_bytes: int) -> None:
        self.bytes = torch.full((num_bytes,), -1, dtype=torch.int8)
        self.typed = {bits: self.bytes.view(dtype) for bits, dtype in RAW.items()}


class Shared:
    """A view of tiles in shared memory."""

    def __init__(self, block: Block, dtype: DType, places: torch.Tensor) -> None:
        self.block = block
        self.dtype = dtype
        self.places = places
        self.memory = block.typed[dtype.bits]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.places.shape)

    def view(self, places: torch.Tensor) -> "Shared":
        return Shared(self.block, self.dtype, places)

    def index(self, number: Any) -> "Shared":
        number = int(data_of(number))
        if not 0 <= number < len(self.places):
            raise IndexError(f"tile {number} of {len(self.places)}")
        return self.view(self.places[number])

    def slice(self, start: Any, length: int, dim: int = 0) -> "Shared":
        return self.view(self.places.narrow(dim, int(data_of(start)), length))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return self.view(self.places.permute(order))

    def _reinterpret(self, dtype: DType, shape: list[int], layout: SharedLayout):
        places = places_of(tuple(shape), layout, dtype.bits)
        num_bytes = len(self.block.bytes)
        if self.places.numel() * self.dtype.bits != 8 * num_bytes:
            raise TypeError("only all of an allocation is taken as something else")
        if places.numel() * dtype.bits != 8 * num_bytes:
            raise TypeError(f"{shape} of {dtype} in {num_bytes} bytes")
        return Shared(self.block, dtype, places)

    def load(self, layout: Any = None) -> Tensor:
        return from_raw(self.memory[self.places], self.dtype)

    def store(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype is not self.dtype:
            raise TypeError(f"{value.dtype}{list(value.shape)} to {self.shape}")
        self.write(raw(value.data, self.dtype))
        program().current.unfenced.append(self)

    def write(self, bits: torch.Tensor) -> None:
        self.memory[self.places] = bits.reshape(self.places.shape)

    def poison(self) -> None:
        self.memory[self.places] = -1

    def span(self) -> tuple[int, int]:
        """The bytes within which all of it lies."""
        size = self.dtype.bits // 8
        return int(self.places.min()) * size, (int(self.places.max()) + 1) * size

    def overlaps(self, other: "Shared") -> bool:
        if self.block is not other.block:
            return False
        begin, end = self.span()
        other_begin, other_end = other.span()
        return begin < other_end and other_begin < end


class Barriers(list[Barrier]):
    """Barriers in shared memory."""

    def index(self, number: Any) -> Barrier:  # type: ignore[override]
        return self[int(data_of(number))]


def check_fenced(operand: Shared) -> None:
    """Fails if the tensor cores would miss what threads have stored."""
    for partition in program().everybody:
        if any(operand.overlaps(stored) for stored in partition.unfenced):
            raise RuntimeError(f"{partition.name} stored an operand without a fence")


# ----------------------------------------------------------------------- TMA


class Descriptor:
    """A TMA descriptor that the host has made."""

    def __init__(self, host: Any) -> None:
        self.dtype = dtype_of(host.base.dtype)
        self.shape = list(host.shape)
        self.strides = list(host.strides)
        self.block_shape = list(host.block_shape)
        size = self.dtype.bits // 8
        address = host.base.data_ptr()
        unaligned = [s for s in self.strides[:-1] if s * size % 16]
        if address % 16 or unaligned or self.strides[-1] != 1:
            raise ValueError(f"TMA reads nothing at {address:#x}, {self.strides}")
        if self.block_shape[-1] * size > 128 or max(self.block_shape) > 256:
            raise ValueError(f"TMA has no boxes {self.block_shape} of {self.dtype}")
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides))
        memory = (ctypes.c_char * ((last + 1) * size)).from_address(address)
        self.elements = torch.frombuffer(memory, dtype=RAW[self.dtype.bits])

    @property
    def box_bytes(self) -> int:
        return math.prod(self.block_shape) * self.dtype.bits // 8

    def read(self, corner: list[int]) -> torch.Tensor:
        """A box as integers of its elements' bits; 0 outside the tensor."""
        box = torch.zeros(self.block_shape, dtype=self.elements.dtype)
        begins = [max(c, 0) for c in corner]
        ends = [min(c + b, n) for c, b, n in zip(corner, self.block_shape, self.shape)]
        sizes = [end - begin for begin, end in zip(begins, ends)]
        if min(sizes) > 0:
            offset = sum(b * s for b, s in zip(begins, self.strides))
            inside = self.elements.as_strided(sizes, self.strides, offset)
            lows = [begin - c for begin, c in zip(begins, corner)]
            box[tuple(slice(low, low + n) for low, n in zip(lows, sizes))] = inside
        return box
