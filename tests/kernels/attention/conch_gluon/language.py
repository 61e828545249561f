# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a kernel finds under the names of Gluon's modules: functions on `values`."""

import math
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import regex as re
import torch

from . import values
from .memory import (
    RAW,
    BarrierLayout,
    Barriers,
    Block,
    Descriptor,
    Shared,
    SharedLayout,
    atomic_add,
    check_fenced,
    from_raw,
    load,
    places_of,
    raw,
    store,
)
from .program import Barrier, Product, program
from .values import (
    DType,
    Tensor,
    binary,
    check_shapes,
    common_dtype,
    data_of,
    float32,
    int16,
    int32,
)

# ------------------------------------------------------- scalars and tensors


def to_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return Tensor(value, float32 if isinstance(value, float) else int32)


def kernel_range(*bounds: Any):
    """Numbers of a loop: scalars where a bound is one."""
    numbers = range(*map(operator.index, bounds))
    if any(isinstance(bound, Tensor) for bound in bounds):
        return (Tensor(number, int32) for number in numbers)
    return numbers


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    return Tensor(torch.arange(start, end), int32)


def full(shape: list[int], value: Any, dtype: DType, layout: Any = None) -> Tensor:
    return Tensor(torch.full(tuple(shape), data_of(value), dtype=dtype.held), dtype)


def zeros(shape: list[int], dtype: DType, layout: Any = None) -> Tensor:
    return full(shape, 0, dtype)


def full_like(like: Tensor, value: Any) -> Tensor:
    return full(list(like.shape), value, like.dtype)


def zeros_like(like: Tensor) -> Tensor:
    return full_like(like, 0)


def where(condition: Any, a: Any, b: Any) -> Any:
    check_shapes(condition, a, b)
    condition = data_of(condition)
    if not isinstance(condition, torch.Tensor):
        chosen = a if condition else b
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return chosen
        return Tensor(data_of(chosen), common_dtype(a, b))
    dtype = common_dtype(a, b)
    a, b = (torch.as_tensor(data_of(x)).to(dtype.held) for x in (a, b))
    return Tensor(torch.where(condition, a, b), dtype)


def minimum(a: Any, b: Any) -> Any:
    return binary(values.smaller, a, b)


def maximum(a: Any, b: Any) -> Any:
    return binary(values.larger, a, b)


def cdiv(a: Any, b: Any) -> Any:
    return (a + b - 1) // b


def exp2(x: Tensor) -> Tensor:
    return Tensor(torch.exp2(torch.as_tensor(x.data)), x.dtype)


def log2(x: Tensor) -> Tensor:
    return Tensor(torch.log2(torch.as_tensor(x.data)), x.dtype)


def reduce_max(x: Tensor, axis: int) -> Tensor:
    data = torch.where(x.data.isnan(), -math.inf, x.data)
    return Tensor(data.amax(axis), x.dtype)


def reduce_sum(x: Tensor, axis: int) -> Tensor:
    return Tensor(x.data.sum(axis), x.dtype)


def expand_dims(x: Tensor, axis: int) -> Tensor:
    return Tensor(x.data.unsqueeze(axis), x.dtype)


def broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    check_shapes(a, b)
    pair = torch.broadcast_tensors(a.data, b.data)
    return Tensor(pair[0], a.dtype), Tensor(pair[1], b.dtype)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.data.unbind(-1)
    return Tensor(first, x.dtype), Tensor(second, x.dtype)


def join(a: Tensor, b: Tensor) -> Tensor:
    return Tensor(torch.stack((a.data, b.data), -1), a.dtype)


def convert_layout(x: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    return x


def no_layout(*arguments: Any, **options: Any) -> None:
    """A layout of registers: nothing depends on it here."""


def wgmma_layout(
    version: list[int], warps_per_cta: list[int], instr_shape: list[int]
) -> SimpleNamespace:
    return SimpleNamespace(warps_per_cta=warps_per_cta)


# ------------------------------------------------------------------ assembly


def tanh(x: Tensor) -> Tensor:
    return Tensor(torch.tanh(x.data), float32)


def keep(s: Tensor, keys: Tensor, bound: Tensor, relation: str) -> Tensor:
    """setp, selp: scores where keys and bound are so related, else -inf."""
    kept = getattr(operator, relation)(keys.data, bound.data)
    return Tensor(torch.where(kept, s.data, -math.inf), float32)


def words_of(halves: torch.Tensor, bits: int) -> Tensor:
    """int32 [...] of integers [..., 32 / bits], the lowest bits first."""
    parts = halves.to(torch.int64) & (2**bits - 1)
    shifts = torch.arange(0, 32, bits)
    words = (parts << shifts).sum(-1)
    return Tensor(words - ((words >> 31) << 32), int32)


def pair_words(even: Tensor, odd: Tensor, dtype: DType) -> Tensor:
    """cvt.rn.*x2: two fp32 as one word of 16-bit halves."""
    pairs = torch.stack([raw(x.data, dtype) for x in (even, odd)], -1)
    return words_of(pairs, 16)


def quad_words(*probabilities: Tensor) -> Tensor:
    """cvt.rn.satfinite.e4m3x2, twice: four fp32 as one word of bytes."""
    dtype = values.float8e4nv
    quads = [raw(p.to(dtype).data, dtype) for p in probabilities]
    return words_of(torch.stack(quads, -1), 8)


def merge_words(words: Tensor, dtype: DType) -> Tensor:
    """or: of the words of a register's elements the first two, taken apart."""
    pack = 32 // dtype.bits
    lanes = words.data.unflatten(-1, (-1, pack))
    if pack > 2 and bool(lanes[..., 2:].any()):
        raise RuntimeError("words that are not joined are lost")
    word = (lanes[..., 0] | lanes[..., 1]).to(torch.int32).contiguous()
    return from_raw(word.view(RAW[dtype.bits]), dtype)


def permute_bytes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Prmt with 0x6420 and 0x7531: even bytes of two words, and odd ones."""
    pairs = [x.data.to(torch.int16).contiguous().view(torch.int8) for x in (a, b)]
    pairs = [x.unflatten(-1, (-1, 4)) for x in pairs]

    def taken(first: int) -> Tensor:
        chosen = torch.cat([x[..., first::2] for x in pairs], -1)
        return from_raw(chosen.flatten(-2).contiguous().view(torch.int16), int16)

    return taken(0), taken(1)


def inline_asm_elementwise(
    asm: str, constraints: str, args: list[Tensor], dtype: Any, is_pure: bool, pack: int
) -> Any:
    """The few pieces of assembly that the kernels have."""
    relation = re.search(r"setp\.(lt|ge)\.s32 p, \$2, \$3; selp\.f32 \$0, \$1", asm)
    if relation:
        return keep(*args, relation[1])
    if asm.startswith("tanh.approx.f32 $0, $1;"):
        return tanh(*args)
    if asm.startswith("shfl.sync.bfly.b32 $0, $1, 0,"):
        return args[0]
    halves = re.match(r"cvt\.rn\.(bf16|f16)x2\.f32 \$0, \$2, \$1;", asm)
    if halves:
        half = values.bfloat16 if halves[1] == "bf16" else values.float16
        return pair_words(*args, half)
    if asm.count("cvt.rn.satfinite.e4m3x2.f32") == 2:
        return quad_words(*args)
    if asm == "or.b32 $0, $1, $2;":
        return merge_words(*args, dtype)
    if "0x6420" in asm and "0x7531" in asm:
        return permute_bytes(*args)
    if asm.startswith("griddepcontrol."):  # launches follow each other
        return to_tensor(0)
    raise NotImplementedError(f"what does {asm!r} do?")


# -------------------------------------- shared memory, barriers, copies, products


def allocate_shared_memory(dtype: DType, shape: list[int], layout: Any) -> Any:
    if isinstance(layout, BarrierLayout):
        here = len(program().barriers)
        made = Barriers(Barrier(f"barrier {here}.{i}") for i in range(shape[0]))
        program().barriers.append(made)
        return made
    block = Block(math.prod(shape) * dtype.bits // 8)
    return Shared(block, dtype, places_of(tuple(shape), layout, dtype.bits))


def arrive(barrier: Barrier) -> None:
    barrier.arrive()
    program().go_on()


def wait(barrier: Barrier, phase: Any) -> None:
    program().wait(barrier, int(data_of(phase)))


def fence_async_shared() -> None:
    program().current.unfenced.clear()


def thread_barrier() -> None:
    """All threads of a partition do everything together."""


def async_copy_global_to_shared(
    descriptor: Descriptor, corner: list, barrier: Barrier, target: Shared
) -> None:
    if target.places.numel() != math.prod(descriptor.block_shape):
        raise TypeError(f"a box {descriptor.block_shape} to {target.shape}")
    first = [int(data_of(c)) for c in corner]

    def land() -> None:
        target.write(descriptor.read(first))
        barrier.receive(descriptor.box_bytes)

    target.poison()
    program().start_copy(land)


def operand_data(operand: Tensor | Shared) -> torch.Tensor:
    if isinstance(operand, Shared):
        check_fenced(operand)
        operand = operand.load()
    return operand.data.float()


def warpgroup_mma(
    a: Tensor | Shared,
    b: Shared,
    acc: Tensor,
    use_acc: bool = True,
    is_async: bool = False,
) -> Tensor:
    result = zeros_like(acc)
    result.pending = True

    def multiply() -> None:
        product = operand_data(a) @ operand_data(b)
        result.set(product + acc.known if use_acc else product)

    program().start_product(Product(multiply, result))
    if not is_async:
        program().await_products(0, [result])
    return result


def warpgroup_mma_wait(num_outstanding: int = 0, deps: list | None = None) -> Any:
    deps = deps or []
    program().await_products(num_outstanding, deps)
    program().go_on()
    return deps[0] if len(deps) == 1 else tuple(deps)


mbarrier = SimpleNamespace(
    MBarrierLayout=BarrierLayout, init=Barrier.init, arrive=arrive,
    expect=Barrier.expect, wait=wait,
)  # fmt: skip
tma = SimpleNamespace(async_copy_global_to_shared=async_copy_global_to_shared)
hopper = SimpleNamespace(
    fence_async_shared=fence_async_shared, mbarrier=mbarrier, tma=tma,
    warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
)  # fmt: skip


def make_language() -> SimpleNamespace:
    """What stands for triton.experimental.gluon.language."""
    functions: list[Callable] = [
        allocate_shared_memory, arange, atomic_add, broadcast, cdiv, convert_layout,
        exp2, expand_dims, full, full_like, inline_asm_elementwise, join, load, log2,
        maximum, minimum, split, store, thread_barrier, to_tensor, where, zeros,
        zeros_like,
    ]  # fmt: skip
    return SimpleNamespace(
        **{function.__name__: function for function in functions},
        **{dtype.name: dtype for dtype in values.DTYPES},
        max=reduce_max,
        sum=reduce_sum,
        constexpr=lambda value: value,
        static_range=range,
        program_id=lambda axis: Tensor(program().index, int32),
        num_programs=lambda axis: Tensor(program().num_programs, int32),
        warp_specialize=lambda parts, *sizes: program().specialize(parts),
        NVMMASharedLayout=SharedLayout,
        NVMMADistributedLayout=wgmma_layout,
        BlockedLayout=no_layout,
        DistributedLinearLayout=no_layout,
        DotOperandLayout=no_layout,
        SliceLayout=no_layout,
        nvidia=SimpleNamespace(hopper=hopper),
    )


LANGUAGE = make_language()
