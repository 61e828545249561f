# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""CONCH's cache write and fp8 quantisation beside vLLM's kernels.

    python benchmarks/kernels/benchmark_conch_cache.py            about a minute
    python benchmarks/kernels/benchmark_conch_cache.py --quick    a few rows of each
    python benchmarks/kernels/benchmark_conch_cache.py --host     eager host time
    python benchmarks/kernels/benchmark_conch_cache.py --tune     tile sizes of CONCH

Kernels are timed as `conch_bench.py` says, each only if its result is right.  TB/s
counts each byte that must be read or written once per pass: a scale found for a whole
tensor takes two passes over the input.  "past empty" are the microseconds beyond those
of an empty kernel, which the head has.  Rows of the provider "floor" are a copy of the
same bytes without slots, scales or checks, the fastest of several.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import conch_bench as bench
import torch

from vllm.triton_utils import tl, triton

NUM_KV_HEADS, HEAD_SIZE = 8, 128
FP8 = torch.float8_e4m3fn
SCALE = 0.5


# Where the installed release keeps its attention kernels.
OPS = "vllm.attention.ops"
if importlib.util.find_spec("vllm.attention") is None:
    OPS = "vllm.v1.attention.ops"


def conch(module: str):
    return importlib.import_module(f"{OPS}.conch.{module}")


@dataclass(frozen=True)
class Case:
    op: str  # "cache", or the kind of scale: "static", "per_tensor", "per_token"
    rows: int  # tokens
    columns: int  # elements of a token in K, or hidden size
    dtype: str  # of the cache, or of the input
    layout: str = ""
    page: int = 0

    @property
    def bytes(self) -> int:
        elements = self.rows * self.columns
        if self.op == "cache":
            return 2 * elements * (2 + (1 if self.dtype == "fp8" else 2))
        reads = 2 if self.op == "per_tensor" else 1
        return elements * (2 * reads + 1)


def cases(quick: bool) -> Iterator[Case]:
    tokens = [16, 256, 4096] if quick else [1, 16, 64, 256, 1024, 4096, 16384, 65536]
    columns = NUM_KV_HEADS * HEAD_SIZE
    for dtype in ("bf16", "fp8"):
        for layout in ("packed",) if quick else ("packed", "NHD"):
            for rows in tokens:
                yield Case("cache", rows, columns, dtype, layout, 16)
        for page in () if quick else (64, 128):
            for rows in (64, 4096):
                yield Case("cache", rows, columns, dtype, "packed", page)
    shapes = [(4096, 4096)]
    if not quick:
        shapes += [(16, 4096), (16384, 4096), (4096, 14336), (8192, 8192)]
        shapes += [(16384, 8192)]
    for op in ("static", "per_tensor", "per_token"):
        for rows, hidden_size in shapes:
            yield Case(op, rows, hidden_size, "bf16")


class CacheWrite:
    """The tensors of one cache case, and what the caches must hold afterwards."""

    def __init__(self, case: Case):
        generator = torch.Generator("cuda").manual_seed(0)
        random = {"generator": generator, "device": "cuda"}
        heads = (NUM_KV_HEADS, HEAD_SIZE)
        # The projection of 32 query heads and 8 of K and V each.
        width = 6 * case.columns
        fused = torch.randn(case.rows, width, dtype=torch.bfloat16, **random)
        self.key = fused[:, 4 * case.columns : 5 * case.columns].unflatten(1, heads)
        self.value = fused[:, 5 * case.columns :].unflatten(1, heads)
        num_blocks = -(-case.rows // case.page) + 16
        # Whole pages in random order, as a prefill fills them.
        pages = torch.randperm(num_blocks, **random)
        slots = pages[:, None] * case.page + torch.arange(case.page, device="cuda")
        self.slots = slots.flatten()[: case.rows].contiguous()
        dtype = FP8 if case.dtype == "fp8" else torch.bfloat16
        self.kv_cache_dtype = "fp8" if case.dtype == "fp8" else "auto"
        if case.layout == "packed":
            shape = (num_blocks, case.page, NUM_KV_HEADS, 2 * HEAD_SIZE)
            caches = torch.zeros(shape, device="cuda").to(dtype).split(HEAD_SIZE, -1)
        else:
            shape = (2, num_blocks, case.page, *heads)
            caches = torch.zeros(shape, device="cuda").to(dtype)
        self.key_cache, self.value_cache = caches
        self.scale = torch.full((1,), SCALE, device="cuda")

    def conch(self) -> Callable[[], None]:
        write = conch("reshape_and_cache").reshape_and_cache
        return lambda: write(
            self.key,
            self.value,
            self.key_cache,
            self.value_cache,
            self.slots,
            k_scale=self.scale,
            v_scale=self.scale,
        )

    def vllm_cuda(self) -> Callable[[], None]:
        import vllm._custom_ops  # noqa: F401  registers the op

        write = torch.ops._C_cache_ops.reshape_and_cache_flash
        caches = [self.key_cache, self.value_cache]
        if self.kv_cache_dtype == "fp8":
            caches = [pages.view(torch.uint8) for pages in caches]
        kind, scale = self.kv_cache_dtype, self.scale
        return lambda: write(
            self.key, self.value, *caches, self.slots, kind, scale, scale
        )

    def vllm_triton(self) -> Callable[[], None]:
        module = importlib.import_module(f"{OPS}.triton_reshape_and_cache_flash")
        write, scale = module.triton_reshape_and_cache_flash, self.scale
        return lambda: write(
            self.key,
            self.value,
            self.key_cache,
            self.value_cache,
            self.slots,
            self.kv_cache_dtype,
            scale,
            scale,
        )

    def floor(self) -> Callable[[], None]:
        source = torch.cat([self.key.flatten(1), self.value.flatten(1)], 1).flatten()
        target = torch.empty(source.shape, dtype=self.key_cache.dtype, device="cuda")
        return copy_launch(source, target)

    def reset(self) -> None:
        for pages in (self.key_cache, self.value_cache):
            pages.copy_(torch.zeros((), device="cuda"))

    def check(self) -> None:
        for rows, pages in ((self.key, self.key_cache), (self.value, self.value_cache)):
            written = pages.flatten(0, 1)
            if pages.dtype == FP8:
                rows = (rows.float() / SCALE).clamp(-448, 448).to(FP8)
                written, rows = written.view(torch.uint8), rows.view(torch.uint8)
            assert torch.equal(written[self.slots], rows), "wrong cache contents"


class Quantization:
    """The input of one quantisation case, and what must come out."""

    def __init__(self, case: Case):
        self.op = case.op
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (case.rows, case.columns)
        self.input = torch.randn(shape, generator=generator, device="cuda").bfloat16()
        self.scale = torch.full((1,), SCALE, device="cuda")
        self.result: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep(self, call: Callable) -> Callable[[], None]:
        def run() -> None:
            self.result = call()

        return run

    def conch(self) -> Callable[[], None]:
        quantize = conch("scaled_fp8_quant").scaled_fp8_quant
        if self.op == "static":
            return self.keep(lambda: quantize(self.input, self.scale))
        per_token = self.op == "per_token"
        return self.keep(lambda: quantize(self.input, per_token=per_token))

    def vllm_cuda(self) -> Callable[[], None]:
        from vllm import _custom_ops

        quantize = _custom_ops.scaled_fp8_quant
        if self.op == "static":
            return self.keep(lambda: quantize(self.input, self.scale))
        return self.keep(
            lambda: quantize(
                self.input, use_per_token_if_dynamic=self.op == "per_token"
            )
        )

    def floor(self) -> Callable[[], None]:
        source = self.input.flatten()
        target = torch.empty(source.shape, dtype=FP8, device="cuda")
        once = copy_launch(source, target)
        if self.op != "per_tensor":
            return once
        read = bench.read_call(
            source.view(torch.int32), source.nbytes, bench.READ_CONFIGS[0]
        )
        return lambda: (read(), once())

    def reset(self) -> None:
        self.result = None

    def check(self) -> None:
        output, scale = self.result
        x = self.input.float()
        limit = torch.full((), 448.0, device="cuda")  # torch divides exactly by tensors
        if self.op == "static":
            expected = x / SCALE
        elif self.op == "per_tensor":
            assert torch.equal(scale.view(()), x.abs().amax() / limit), "wrong scale"
            expected = x * (1 / scale)
        else:
            wanted = x.abs().amax(1, keepdim=True) / limit
            assert torch.equal(scale.view(wanted.shape), wanted), "wrong scale"
            expected = x / scale
        expected = expected.clamp(-448, 448).to(FP8).view(torch.uint8)
        assert torch.equal(output.view(torch.uint8), expected), "wrong output"


@triton.jit
def copy_kernel(target_ptr, source_ptr, size, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(source_ptr + offset, mask=offset < size)
    tl.store(target_ptr + offset, x.to(target_ptr.dtype.element_ty), mask=offset < size)


# Elements of a program, and its warps.
COPY_CONFIGS = [(1024, 2), (1024, 4), (2048, 8), (4096, 8), (8192, 8), (16384, 16)]


def copy_launch(source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """The fastest copy of one tensor to another, which may have another dtype."""
    size = source.numel()

    def launch(tile: int, num_warps: int) -> Callable[[], None]:
        grid = (triton.cdiv(size, tile),)
        return lambda: copy_kernel[grid](
            target, source, size, tile, num_warps=num_warps
        )

    launches = {str(config): launch(*config) for config in COPY_CONFIGS}
    graphs = {name: bench.capture(call) for name, call in launches.items()}
    times = bench.take_turns(graphs, 3)
    return launches[min(times, key=times.__getitem__)]


def make(case: Case) -> CacheWrite | Quantization:
    return CacheWrite(case) if case.op == "cache" else Quantization(case)


def prepare(work: CacheWrite | Quantization, provider: str) -> Callable | str:
    """A provider's call, after its result was checked; or why there is none."""
    work.reset()
    try:
        call = getattr(work, provider)()
        call()
        torch.accelerator.synchronize()
        if provider != "floor":
            work.check()
    except AssertionError as error:
        return f"WRONG: {error}"
    except (AttributeError, ImportError, RuntimeError) as error:
        if provider == "conch":
            raise
        return f"not available: {error}"
    return call


def measure(case: Case, options: argparse.Namespace) -> list[dict]:
    work = make(case)
    calls = {
        name: prepare(work, name) for name in options.providers if hasattr(work, name)
    }
    graphs = {
        n: bench.capture(call) for n, call in calls.items() if not isinstance(call, str)
    }
    times = bench.take_turns(graphs, options.budget_ms, options.warm_l2)
    rows = []
    for name, call in calls.items():
        row = asdict(case) | {"provider": name, "us": "", "TB/s": "", "note": ""}
        if isinstance(call, str):
            row["note"] = call.splitlines()[0]
        else:
            us = times[name]
            row |= {"us": us, "TB/s": case.bytes / us / 1e6}
            row["past empty"] = us - options.empty_us
        rows.append(row)
    return rows


def measure_host(case: Case, options: argparse.Namespace) -> list[dict]:
    work = make(case)
    rows = []
    for name in options.providers:
        call = prepare(work, name) if hasattr(work, name) else None
        if callable(call) and name != "floor":
            row = asdict(case) | {"provider": name, "host us": bench.host_us(call)}
            rows.append(row)
    return rows


def measure_tiles(case: Case, options: argparse.Namespace) -> list[dict]:
    """CONCH with each tile that it might use: what `plan_tile` is made from."""
    module = conch("reshape_and_cache")
    chosen = module.plan_tile
    rows = []
    try:
        for elements in (512, 1024):
            for tokens in (1, 2, 4, 8):
                for num_warps in (2, 4, 8):
                    per_thread = tokens * elements // (32 * num_warps)
                    if not 8 <= per_thread <= 32:
                        continue
                    tile = module.Tile(tokens, elements, num_warps)
                    module.plan_tile = lambda *_, tile=tile: tile
                    forget_plans(module)
                    found = measure(case, options)
                    rows += [row | {"note": str(tuple(tile))} for row in found]
    finally:
        module.plan_tile = chosen
        forget_plans(module)
    return rows


def forget_plans(module) -> None:
    module.prepare.cache_clear()
    module.plan_launches.cache_clear()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rows, about 15 s")
    parser.add_argument("--host", action="store_true", help="host time of eager calls")
    parser.add_argument("--tune", action="store_true", help="tiles of the cache write")
    parser.add_argument("--warm-l2", action="store_true", help="do not flush the L2")
    parser.add_argument("--op", help="only this op", choices=[
        "cache", "static", "per_tensor", "per_token",
    ])  # fmt: skip
    parser.add_argument("--csv", type=Path, help="write the table there too")
    parser.add_argument(
        "--budget-ms", type=float, default=20.0, help="replays of a case and provider"
    )
    parser.add_argument("--commit", help="for the table's head; default: asks git")
    parser.add_argument(
        "--providers",
        type=lambda text: text.split(","),
        default=["conch", "vllm_cuda", "vllm_triton", "floor"],
        help="comma-separated, of conch, vllm_cuda, vllm_triton, floor",
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a GPU.")
    selected = [c for c in cases(options.quick) if options.op in (None, c.op)]
    measure_case, figures = measure, ("us", "past empty", "TB/s", "note")
    if options.host:
        measure_case, figures = measure_host, ("host us",)
        selected = [replace(c, rows=16) for c in selected if c.page in (0, 16)]
        selected = list(dict.fromkeys(selected))
    elif options.tune:
        measure_case, options.providers = measure_tiles, ["conch"]
        selected = [
            Case("cache", rows, NUM_KV_HEADS * HEAD_SIZE, dtype, "packed", 16)
            for dtype in ("bf16", "fp8")
            for rows in (64, 256, 1024, 2048, 4096, 16384, 65536)
        ]
    fields = [*Case.__dataclass_fields__, "provider", *figures]
    head = bench.environment(options.commit)
    head["L2"] = "warm" if options.warm_l2 else "flushed"
    options.empty_us = bench.empty_us(options.warm_l2)
    head["empty kernel"] = f"{options.empty_us:.2f} us"
    widths = {"provider": 11, "op": 10, "note": 4}
    table = bench.Table(fields, head, options.csv, widths)
    for case in selected:
        for row in measure_case(case, options):
            table.add(row)
    wrong = [row for row in table.rows if str(row.get("note", "")).startswith("WRONG")]
    if any(row["provider"] == "conch" for row in wrong):
        raise SystemExit("CONCH's result is wrong: see the notes.")


if __name__ == "__main__":
    main()
