# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""CONCH's attention beside FlashAttention-3, vLLM's Triton attention and cuDNN.

    python benchmarks/kernels/benchmark_conch_attention.py --suite decode
    python benchmarks/kernels/benchmark_conch_attention.py --cases 2q2k_32q1s1k,q8k
    python benchmarks/kernels/benchmark_conch_attention.py --suite prefill \
        --pages 16,128 --csv prefill.csv

`conch_attention_cases.py` has the grammar of a case and the suites: the default,
"short", takes seconds once kernels are compiled.

Each case is checked against an fp64 reference, on some rows of some sequences and
heads, with what the timed graph wrote; a wrong result is reported and has no time.
The next columns are the rate over attended pairs, the rate of reading K and V, the
floor's share of the time and how often the rivals' time holds ours. The floor is the
larger of the case's FLOP at the rate of a matrix product and its K and V at what a
kernel takes that only reads as many bytes, both measured in the same run. The
provider "read" is such a kernel, timed among the others.

Without a GPU, TRITON_INTERPRET=1 and CUDA_VISIBLE_DEVICES="" check small cases.
"""

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for tests
import conch_bench as bench
from conch_attention_cases import (
    KV_OPTIONS,
    SUITES,
    Case,
    apply_option,
    parse_case,
    parse_size,
)
from conch_attention_providers import (
    FP8_DTYPES,
    K_SCALE,
    LAYOUT_NAMES,
    PROVIDERS,
    V_SCALE,
    Inputs,
    Provider,
    Unavailable,
    make_inputs,
)

from tests.kernels.attention.conch_kv_formats import (
    INT4,
    dequantize,
    rounded_as_rotated,
    shared_out,
)
from tests.kernels.attention.conch_reference import (
    Attention,
    attention,
    first_visible_key,
    gather_pages,
    output_tolerance,
    visible_keys,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---------------------------------------------------------------- correctness


class Probe(NamedTuple):
    """Some rows and heads of the output and what they must be."""

    rows: slice
    heads: list[int]
    expected: Attention


BLOCK_ROWS = 4


def probe_blocks(query_len: int) -> list[tuple[int, int]]:
    """[begin, end) of some queries at the beginning, in the middle and at the end."""
    last = max(query_len - BLOCK_ROWS, 0)
    begins = sorted({0, last // 2, last})
    return [(begin, min(begin + BLOCK_ROWS, query_len)) for begin in begins]


def gather_rows(
    inputs: Inputs,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    scale: float,
    index: int,
) -> torch.Tensor:
    """K or V of a sequence in fp64, in which scale stands for one scale of all."""
    where = inputs.block_table[index], 0, inputs.case.lengths[index][1]
    rows = gather_pages(cache, *where)
    if inputs.has_token_scales and scales is not None:
        return dequantize(rows, gather_pages(scales, *where))
    return rows.double() * (1.0 if scales is None else scale)


def make_probes(inputs: Inputs, query: torch.Tensor) -> list[Probe]:
    """The reference on the first, the longest and the last sequence."""
    case = inputs.case
    lengths = case.lengths
    longest = max(range(len(lengths)), key=lambda i: lengths[i][1])
    kv_heads = sorted({0, case.num_kv_heads - 1})
    group = case.num_query_heads // case.num_kv_heads
    heads = [group * h + i for h in kv_heads for i in range(group)]
    starts = inputs.query_start_loc.tolist()
    probes = []
    is_int4 = inputs.has_token_scales and inputs.key_cache.dtype == INT4
    for i in sorted({0, longest, len(lengths) - 1}):
        query_len, seq_len = lengths[i]
        key, value = (
            gather_rows(inputs, cache, scales, scale, i)[:, kv_heads]
            for cache, scales, scale in (
                (inputs.key_cache, inputs.k_scale, K_SCALE),
                (inputs.value_cache, inputs.v_scale, V_SCALE),
            )
        )
        for begin, end in probe_blocks(query_len):
            # The sequence as it was when its last token was query end - 1.
            length = seq_len - query_len + end
            rule = {"causal": True, "sliding_window": case.window}
            first = first_visible_key(end - begin, length, **rule)
            visible = visible_keys(
                end - begin,
                length,
                first,
                **rule,
                device=query.device,
            )
            rows = slice(starts[i] + begin, starts[i] + end)
            seen = rounded_as_rotated(query[rows]) if is_int4 else query[rows].double()
            expected = attention(
                seen[:, heads],
                key[first:length],
                value[first:length],
                visible,
                scale=inputs.scale,
                softcap=case.softcap,
            )
            if is_int4:
                expected = shared_out(expected)
            probes.append(Probe(rows, heads, expected))
    return probes


class Errors(NamedTuple):
    """Of an output's probed elements."""

    largest: float
    rms: float


def check(output: torch.Tensor, probes: Sequence[Probe], unit: torch.dtype) -> Errors:
    """The errors of an output.

    Args:
        output: [num_tokens, num_query_heads, head_size].
        probes: what parts of it must be.
        unit: dtype whose rounding the probabilities may have.

    Raises:
        WrongResult: an element is not finite, or off by more than the tolerance.

    """
    if not bool(torch.isfinite(output).all()):
        raise WrongResult("not finite, or rows were not written")
    errors = []
    for rows, heads, expected in probes:
        error = (output[rows, heads].double() - expected.output).abs()
        errors.append(error.flatten())
        allowed = output_tolerance(expected, unit)
        if not bool((error <= allowed).all()):
            excess = (error / allowed).max().item()
            raise WrongResult(
                f"error {error.max().item():.2g} in rows {rows.start} to "
                f"{rows.stop - 1}, {excess:.1f} times the tolerance"
            )
    every = torch.cat(errors)
    return Errors(every.max().item(), every.square().mean().sqrt().item())


class WrongResult(Exception):
    """A provider computed something else."""


# ---------------------------------------------------------------- measuring


@dataclass
class Floors:
    """The device's measured limits."""

    flops: dict[str, float]  # by a case's KV dtype, "auto" for the query's
    read: bench.ReadFloor

    def us(self, case: Case, kv_bytes: int) -> float:
        compute = case.flop / self.flops.get(case.kv_dtype, self.flops["auto"]) * 1e6
        return max(compute, self.read.us(kv_bytes))

    @classmethod
    def measure(cls, cases: Iterable[Case], dtype: torch.dtype, warm_l2: bool):
        flops = {"auto": bench.gemm_flops(dtype)}
        if any(case.kv_dtype == "fp8" for case in cases):
            flops["fp8"] = bench.gemm_flops(FP8_DTYPES["fp8"])
        largest = max(case.kv_bytes(dtype.itemsize) for case in cases)
        return cls(flops, bench.ReadFloor.measure(largest, warm_l2))


CASE_FIELDS = ("case", "heads", "dtype", "kv_dtype", "page", "layout")
FIELDS = (
    *CASE_FIELDS,
    *("num_seqs", "query_len", "seq_len"),
    *("provider", "us", "TFLOP/s", "TB/s", "floor_us", "of_floor"),
    *("vs_fa3", "vs_triton", "host_us"),
    *("max_error", "rms_error", "note"),
)
HIDDEN = ("dtype", "layout", "num_seqs", "query_len", "seq_len", "floor_us")
WIDTHS = dict.fromkeys(HIDDEN, 0)
WIDTHS |= {"case": 20, "heads": 9, "kv_dtype": 8, "page": 4, "provider": 14, "note": 4}


def describe(case: Case, inputs: Inputs) -> dict[str, object]:
    uniform = len(set(case.lengths)) == 1
    query_len, seq_len = case.lengths[0]
    return {
        "case": case.name.partition("@")[0] + option_text(case),
        "heads": f"{case.num_query_heads}/{case.num_kv_heads}x{case.head_size}",
        "dtype": str(inputs.query.dtype).removeprefix("torch."),
        "kv_dtype": case.kv_dtype,
        "page": case.page,
        "layout": case.layout,
        "num_seqs": len(case.lengths),
        # Of a ragged batch: none.
        "query_len": query_len if uniform else None,
        "seq_len": seq_len if uniform else None,
    }


def option_text(case: Case) -> str:
    parts = {"window": case.window, "softcap": case.softcap, "prefix": case.prefix}
    return "".join(f"@{name}{value:g}" for name, value in parts.items() if value)


def verify(
    inputs: Inputs, provider: Provider, run: Callable, probes: dict, repeats: int
) -> Errors:
    """Runs into a poisoned output and checks it; further runs must repeat it bitwise.

    Raises:
        WrongResult: with what is wrong.

    """
    query = provider.query(inputs)
    if query.dtype not in probes:
        probes[query.dtype] = make_probes(inputs, query)
    inputs.output.fill_(math.nan)
    run()
    errors = check(provider.output(inputs), probes[query.dtype], query.dtype)
    first = provider.output(inputs).clone() if repeats else None
    for _ in range(repeats):
        run()
        if not torch.equal(first, provider.output(inputs)):
            raise WrongResult("a second run gave other bits")
    return errors


def measure(
    case: Case,
    providers: Sequence[Provider],
    floors: Floors | None,
    options: argparse.Namespace,
) -> list[dict[str, object]]:
    """A row for each provider; without floors, which need a GPU, there are no times."""
    inputs = make_inputs(case, options.dtype, DEVICE)
    on_gpu = floors is not None
    rows, graphs, calls, probes = [], {}, {}, {}
    for provider in providers:
        row = describe(case, inputs) | {"provider": provider.name}
        rows.append(row)
        try:
            call = provider.make(inputs)
            run = call
            if on_gpu:
                graphs[provider.name] = bench.capture(call)
                run = graphs[provider.name].replay
            if provider.checked:
                repeats = 5 if options.repro else 0
                errors = verify(inputs, provider, run, probes, repeats)
                row |= {"max_error": errors.largest, "rms_error": errors.rms}
            calls[provider.name] = call
        except Unavailable as reason:
            row["note"] = f"skipped: {reason}"
        except WrongResult as reason:
            row["note"] = f"WRONG: {reason}"
            graphs.pop(provider.name, None)
        except Exception as error:  # one that fails must not end the others' run
            text = str(error).strip().partition("\n")[0]
            row["note"] = f"FAILED: {type(error).__name__}: {text[:200]}"
            graphs.pop(provider.name, None)
    if not on_gpu:
        return rows
    times = bench.take_turns(graphs, options.budget_ms, options.warm_l2)
    kv_bytes = case.kv_bytes(inputs.key_cache.element_size())
    floor = floors.us(case, kv_bytes)
    for row in rows:
        us = times.get(row["provider"])
        if us is None:
            continue
        row |= rates(case, us, kv_bytes, floor)
        if row["provider"] == "read":
            row["TFLOP/s"] = None
        for rival in ("fa3", "triton"):
            if rival in times:
                row[f"vs_{rival}"] = times[rival] / us
        if options.host and row["provider"] != "read":
            repeats = min(max(int(20_000 / us), 3), 100)
            row["host_us"] = bench.host_us(calls[row["provider"]], repeats)
    return rows


def rates(case: Case, us: float, kv_bytes: int, floor_us: float) -> dict[str, float]:
    return {
        "us": us,
        "TFLOP/s": case.flop / us / 1e6,
        "TB/s": kv_bytes / us / 1e6,
        "floor_us": floor_us,
        "of_floor": floor_us / us,
    }


def sums_of_parts(rows: Iterable[dict[str, object]]) -> list[str]:
    """Mixed batches beside the sum of their parts, where those were measured too."""
    times = {
        tuple(row[k] for k in (*CASE_FIELDS, "provider")): row["us"]
        for row in rows
        if row.get("us") is not None and row["provider"] != "read"
    }
    lines = []
    for (name, *rest, provider), us in times.items():
        parts = [times.get((part, *rest, provider)) for part in name.split("_")]
        if len(parts) > 1 and None not in parts:
            total = sum(parts)
            lines.append(
                f"{name} page {rest[3]} {provider}: {us:.1f} us, its parts alone "
                f"{' + '.join(f'{x:.1f}' for x in parts)} = {total:.1f} us: "
                f"{us / total:.2f}"
            )
    return lines


# ---------------------------------------------------------------- compiling

COMPILE_BLOCKS = 256


def distinct_variants(cases: Iterable[Case]) -> list[Case]:
    """The least work of those cases that need the same compiled kernels."""
    chosen: dict[tuple, Case] = {}
    for case in sorted(cases, key=lambda case: case.flop):
        num_seqs = (len(case.lengths) - 1).bit_length()
        layer = replace(case, name="", lengths=(), window=case.window and 1, prefix=0)
        chosen.setdefault((layer, num_seqs, min(case.max_query_len, 17)), case)
    return list(chosen.values())


def compile_variant(case: Case, provider: str, dtype: torch.dtype) -> None:
    """Runs a case once, for what it leaves in Triton's cache on disk."""
    try:
        PROVIDERS[provider]().make(make_inputs(case, dtype, DEVICE, COMPILE_BLOCKS))()
        torch.accelerator.synchronize()
    except Exception:
        return  # the measurement will say what is wrong


def compile_all(options: argparse.Namespace) -> None:
    """Fills Triton's cache on disk from several processes at once."""
    names = [name for name in options.providers if PROVIDERS[name].compiles]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        for case in distinct_variants(options.cases):
            for name in names:
                pool.submit(compile_variant, case, name, options.dtype)


# ---------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commas = lambda text: text.split(",")
    parser.add_argument("--suite", type=commas, default=[], metavar="NAMES")
    parser.add_argument("--cases", type=commas, default=[], help="comma-separated")
    parser.add_argument("--heads", default="32/8x128", help="where a case says none")
    parser.add_argument("--dtype", choices=DTYPES, help="of queries; default bf16")
    parser.add_argument("--kv-dtype", default="auto", choices=["auto", *KV_OPTIONS])
    parser.add_argument("--pages", type=commas, default=["16"], help="such as 16,128")
    parser.add_argument("--layout", type=str.lower, default="packed")
    parser.add_argument("--window", type=parse_size, help="where a case says none")
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--providers", type=commas, default=[], metavar="NAMES")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    parser.add_argument("--warm-l2", action="store_true", help="do not flush the L2")
    parser.add_argument("--host", action="store_true", help="host time of eager calls")
    parser.add_argument(
        "--repro", action="store_true", help="results must repeat bit for bit"
    )
    parser.add_argument(
        "--budget-ms", type=float, default=40.0, help="replays of a case and provider"
    )
    parser.add_argument(
        "--jobs", type=int, default=0, help="processes that compile kernels before"
    )
    parser.add_argument("--commit", help="for the table's head; default: asks git")
    options = parser.parse_args(arguments)
    for flag, names, known in (
        ("--suite", options.suite, SUITES),
        ("--providers", options.providers, PROVIDERS),
        ("--layout", [options.layout], LAYOUT_NAMES),
    ):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{flag} {unknown[0]!r}: choose from {', '.join(known)}")
    if not options.cases and not options.suite:
        options.suite = ["short"]
    options.dtype = DTYPES[options.dtype or ("bf16" if DEVICE == "cuda" else "fp32")]
    if not options.providers:
        options.providers = ["conch", "fa3", "triton", "read"]
    try:
        options.cases = select_cases(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def select_cases(options: argparse.Namespace) -> list[Case]:
    """The cases of all suites and of --cases, for each page size; each once."""
    defaults = Case(
        name="",
        lengths=(),
        kv_dtype=options.kv_dtype,
        window=options.window,
        softcap=options.softcap,
        layout=options.layout,
    )
    defaults = apply_option(defaults, options.heads)
    texts = [text for suite in options.suite for text in SUITES[suite]]
    texts += options.cases
    cases = []
    for page in options.pages:
        if not page.isdecimal() or int(page) % 16 or int(page) == 0:
            raise ValueError(f"--pages {page!r} is not a multiple of 16")
        for text in texts:
            cases.append(parse_case(text, replace(defaults, page=int(page))))
    return list(dict.fromkeys(cases))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    began = time.perf_counter()
    if options.jobs and DEVICE == "cuda":
        compile_all(options)
        print(f"# compiled in {time.perf_counter() - began:.0f} s", flush=True)
    head = bench.environment(options.commit)
    head["L2"] = "warm" if options.warm_l2 else "flushed"
    floors = None
    if DEVICE == "cuda":
        floors = Floors.measure(options.cases, options.dtype, options.warm_l2)
        for name, flops in floors.flops.items():
            name = str(options.dtype) if name == "auto" else name
            head[f"matrix product {name}"] = f"{flops / 1e12:.0f} TFLOP/s"
        head["read"] = ", ".join(
            f"{size / 1e6:.1f} MB {us:.1f} us" for size, us in floors.read.points
        )
        head["empty kernel"] = f"{bench.empty_us(options.warm_l2):.2f} us"
    providers = [PROVIDERS[name]() for name in options.providers]
    table = bench.Table(FIELDS, head, options.csv, WIDTHS)
    for case in options.cases:
        for row in measure(case, providers, floors, options):
            table.add(row)
    for line in sums_of_parts(table.rows):
        print(line)
    print(f"# {len(options.cases)} cases in {time.perf_counter() - began:.0f} s")
    return int(any(is_failure(row) for row in table.rows))


def is_failure(row: dict[str, object]) -> bool:
    """Whether CONCH could not do a case."""
    bad = str(row.get("note", "")).startswith(("WRONG", "FAILED"))
    return bad and str(row["provider"]).startswith("conch")


if __name__ == "__main__":
    raise SystemExit(main())
