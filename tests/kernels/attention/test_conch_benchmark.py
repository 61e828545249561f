# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The benchmarks' own arithmetic: a wrong rate would be published as a result."""

import argparse
import csv
import math
import os
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip(f"{BENCHMARKS} is not there", allow_module_level=True)
if torch.cuda.is_available() == (os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
sys.path[:0] = [str(BENCHMARKS / "kernels"), str(BENCHMARKS)]

import benchmark_conch_attention as benchmark  # noqa: E402
import benchmark_conch_serving as serving  # noqa: E402
import conch_attention_cases as cases  # noqa: E402
import conch_attention_providers as providers  # noqa: E402
import conch_bench as bench  # noqa: E402

from tests.kernels.attention.conch_reference import (  # noqa: E402
    paged_attention,
    visible_keys,
)

PLAIN = cases.Case("", ())
SMALL = cases.apply_option(PLAIN, "4/2x32")
FLOAT32 = torch.float32


def parse(text: str, defaults: cases.Case = PLAIN) -> cases.Case:
    return cases.parse_case(text, defaults)


# ---------------------------------------------------------------- cases


@pytest.mark.parametrize(
    "text, lengths",
    [
        ("q8k", [(8192, 8192)]),
        ("q1s1k", [(1, 1024)]),
        ("2q2k_3q1s1k", [(2048, 2048)] * 2 + [(1, 1024)] * 3),
        ("q2ks32k", [(2048, 32768)]),
        ("1q1s100_16q5s8k", [(1, 100)] + [(5, 8192)] * 16),
    ],
)
def test_a_batch_is_read(text, lengths):
    assert parse(text).lengths == tuple(lengths)


def test_options_are_read():
    case = parse("q8k@16/2x64@fp8@window4k@softcap30")
    heads = case.num_query_heads, case.num_kv_heads, case.head_size
    assert heads == (16, 2, 64)
    assert (case.kv_dtype, case.window, case.softcap) == ("fp8", 4096, 30)
    assert parse("2q1s2k@prefix1k").prefix == 1024


@pytest.mark.parametrize(
    "text, named",
    [
        ("", "''"),
        ("8k", "'8k'"),
        ("q8k_", "''"),
        ("q8ks", "'q8ks'"),
        ("q8m", "'q8m'"),
        ("0q8", "'0q8'"),
        ("q0", "'q0'"),
        ("q20s10", "'q20s10'"),
        ("q8@9/2x64", "'9/2x64'"),
        ("q8@0/0x64", "'0/0x64'"),
        ("q8@fp4", "'fp4'"),
        ("q8@window", "'window'"),
        ("2q1s8_q4@prefix8", "prefix"),
        ("2q1s8@prefix8@window4", "prefix"),
    ],
)
def test_a_wrong_case_is_named(text, named):
    with pytest.raises(ValueError, match=f"cases: .*{named}"):
        parse(text)


@pytest.mark.parametrize("suite", cases.SUITES)
def test_suites_can_be_read(suite):
    for text in cases.SUITES[suite]:
        assert parse(text).flop > 0


@pytest.mark.parametrize("window", [None, 1, 3, 7, 20, 50])
@pytest.mark.parametrize("query_len, seq_len", [(1, 1), (1, 20), (7, 7), (7, 20)])
def test_pairs_are_those_of_the_mask(query_len, seq_len, window):
    mask = visible_keys(query_len, seq_len, 0, causal=True, sliding_window=window)
    assert cases.attended_pairs(query_len, seq_len, window) == int(mask.sum())
    case = cases.replace(PLAIN, lengths=((query_len, seq_len),), window=window)
    assert case.num_keys == int(mask.any(0).sum())


def test_work_of_known_cases():
    # 4 * heads * size * n (n + 1) / 2, and 4 KiB of K and V a token.
    assert parse("q1k").flop == 4 * 32 * 128 * 1024 * 1025 // 2
    assert parse("64q1s8k").kv_bytes(2) == 64 * 8192 * 4096
    assert parse("64q1s8k@fp8").kv_bytes(1) == 64 * 8192 * 2048
    # What all share is read once.
    assert parse("64q1s33k@prefix32k").kv_bytes(2) == (64 + 32) * 1024 * 4096
    assert parse("3q4s64_q64@window16").num_keys == 3 * 19 + 64


# ---------------------------------------------------------------- inputs and checks


@pytest.mark.parametrize("layout", providers.LAYOUT_NAMES)
def test_inputs_are_what_the_case_says(layout):
    case = cases.replace(parse("2q1s50_q40@prefix33", SMALL), layout=layout)
    inputs = providers.make_inputs(case, FLOAT32, "cpu")
    assert inputs.query.shape == (42, 4, 32)
    assert inputs.query_start_loc.tolist() == [0, 1, 2, 42]
    assert inputs.seq_lens.tolist() == [50, 50, 40]
    for cache in (inputs.key_cache, inputs.value_cache):
        assert cache.shape[1:] == (16, 2, 32)
        assert cache.stride(-1) == 1
    table = inputs.block_table
    assert torch.equal(table[0, :2], table[1, :2])
    assert torch.equal(table[0, :2], table[2, :2])
    owned = [*table[0, :4].tolist(), *table[1, 2:4].tolist(), table[2, 2].item()]
    assert sorted(owned) == list(range(1, inputs.key_cache.shape[0]))


@pytest.mark.parametrize("text", ["q40", "3q1s50@window20", "2q30s50_q5@softcap5"])
def test_probes_agree_with_the_whole_reference(text):
    case = parse(text, SMALL)
    inputs = providers.make_inputs(case, FLOAT32, "cpu")
    whole = paged_attention(
        inputs.query,
        inputs.key_cache,
        inputs.value_cache,
        inputs.query_start_loc,
        inputs.seq_lens,
        inputs.block_table,
        scale=inputs.scale,
        softcap=case.softcap,
        sliding_window=case.window,
    )
    probes = benchmark.make_probes(inputs, inputs.query)
    for rows, heads, expected in probes:
        torch.testing.assert_close(whole.output[rows, heads], expected.output)
    output = whole.output.float()
    errors = benchmark.check(output, probes, FLOAT32)
    assert 0 < errors.rms < errors.largest < 1e-6
    # The last row of the last sequence is always among them.
    output[-1, -1, 0] += 1e-3
    with pytest.raises(benchmark.WrongResult, match="times the tolerance"):
        benchmark.check(output, probes, FLOAT32)
    output[0, 0, 0] = math.nan
    with pytest.raises(benchmark.WrongResult, match="not finite"):
        benchmark.check(output, probes, FLOAT32)


def test_probes_with_an_fp8_cache():
    case = parse("q20s40@fp8", SMALL)
    inputs = providers.make_inputs(case, FLOAT32, "cpu")
    whole = paged_attention(
        inputs.query,
        inputs.key_cache,
        inputs.value_cache,
        inputs.query_start_loc,
        inputs.seq_lens,
        inputs.block_table,
        scale=inputs.scale,
        k_scale=inputs.k_scale,
        v_scale=inputs.v_scale,
    )
    for rows, heads, expected in benchmark.make_probes(inputs, inputs.query):
        torch.testing.assert_close(whole.output[rows, heads], expected.output)


@pytest.mark.parametrize("kv_dtype", cases.TOKEN_HEAD_OPTIONS)
def test_caches_with_a_scale_per_token_and_head(kv_dtype):
    case = parse(f"q1s40_q20s40@{kv_dtype}", SMALL)
    inputs = providers.make_inputs(case, FLOAT32, "cpu")
    width = 16 if kv_dtype.startswith("int4") else 32
    assert case.kv_bytes(1) == 2 * 80 * 2 * (width + 4)
    assert inputs.key_cache.shape[1:] == (16, 2, width)
    probes = benchmark.make_probes(inputs, providers.Conch().query(inputs))
    providers.Conch().make(inputs)()
    benchmark.check(inputs.output, probes, FLOAT32)


# ---------------------------------------------------------------- measuring


class Wrong(providers.Conch):
    name = "wrong"

    def make(self, inputs):
        call = super().make(inputs)
        return lambda: (call(), inputs.output[-1].add_(0.1))


class Broken(providers.Conch):
    name = "broken"

    def make(self, inputs):
        raise RuntimeError("no such kernel\nand a long explanation")


class Unstable(providers.Conch):
    name = "unstable"
    calls = 0

    def make(self, inputs):
        call = super().make(inputs)

        def run():
            call()
            self.calls += 1
            inputs.output[0, 0, 0].mul_(1 + self.calls * 2.0**-22)

        return run


class FakeGraph:
    def __init__(self, call):
        self.replay = call


OPTIONS = argparse.Namespace(
    dtype=FLOAT32, repro=False, budget_ms=1.0, warm_l2=False, host=False
)
FLOORS = benchmark.Floors({"auto": 1e9}, bench.ReadFloor([(0, 1.0), (2**20, 5.0)]))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Times that stand for a GPU's; by provider."""
    times = {"conch": 20.0, "fa3": 30.0, "triton": 100.0}
    monkeypatch.setattr(bench, "capture", FakeGraph)
    monkeypatch.setattr(
        bench, "take_turns", lambda graphs, *_: {name: times[name] for name in graphs}
    )
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    return times


class Fast(providers.Conch):
    name = "fa3"


def test_rates_and_ratios(timed):
    case = parse("q32", SMALL)
    rows = benchmark.measure(case, [providers.Conch(), Fast()], FLOORS, OPTIONS)
    conch, fa3 = rows
    flop = 4 * 4 * 32 * 32 * 33 // 2
    assert conch["TFLOP/s"] == pytest.approx(flop / 20e-6 / 1e12)
    assert conch["TB/s"] == pytest.approx(2 * 32 * 2 * 32 * 4 / 20e-6 / 1e12)
    assert conch["floor_us"] == pytest.approx(flop / 1e9 * 1e6)
    assert conch["of_floor"] == pytest.approx(conch["floor_us"] / 20)
    assert (conch["vs_fa3"], fa3["vs_fa3"]) == (1.5, 1.0)
    assert 0 < conch["rms_error"] < conch["max_error"] < 1e-5
    assert "vs_triton" not in conch


def test_the_query_is_quantised_where_the_backend_does_it(monkeypatch):
    chosen = [providers.Conch(), providers.Conch16()]
    case = parse("20q1s30_q20@fp8", SMALL)
    plain, skipped = benchmark.measure(case, chosen, None, OPTIONS)
    assert "note" not in plain and "not quantised" in skipped["note"]
    monkeypatch.setattr(providers, "hopper_kernel", lambda shape, device: "fp8")
    quantised, wide = benchmark.measure(case, chosen, None, OPTIONS)
    assert "note" not in quantised and "note" not in wide
    assert wide["rms_error"] == plain["rms_error"] < quantised["rms_error"]


def test_what_is_wrong_has_no_time(timed):
    chosen = [Wrong(), Broken(), providers.Conch()]
    wrong, broken, good = benchmark.measure(
        parse("q20", SMALL), chosen, FLOORS, OPTIONS
    )
    assert "us" not in wrong and wrong["note"].startswith("WRONG: error 0.1")
    assert "us" not in broken
    assert broken["note"] == "FAILED: RuntimeError: no such kernel"
    assert good["us"] == 20


def test_results_that_change_are_wrong(timed):
    options = argparse.Namespace(**vars(OPTIONS) | {"repro": True})
    chosen = [Unstable(), providers.Conch()]
    unstable, good = benchmark.measure(parse("q1s20", SMALL), chosen, FLOORS, options)
    assert "other bits" in unstable["note"] and "us" not in unstable
    assert good["us"] == 20


def test_memory_decides_the_floor_of_a_decode():
    case = parse("64q1s8k")
    floors = benchmark.Floors({"auto": 1e15}, bench.ReadFloor([(0, 4.0), (2**31, 504)]))
    assert floors.us(case, case.kv_bytes(2)) == 504


def test_read_floor_is_linear_between_and_beyond():
    floor = bench.ReadFloor([(100, 10.0), (200, 15.0), (400, 19.0)])
    assert [floor.us(size) for size in (100, 150, 200, 300, 400, 600)] == [
        *(10.0, 12.5, 15.0),
        *(17.0, 19.0, 23.0),
    ]


def test_take_turns_alternates_and_repeats_less_what_is_slow(monkeypatch):
    order = []
    speeds = {"fast": 10.0, "slow": 2_000.0, "very slow": 1e6}

    def replay(name, repeats, warm_l2):
        order.append((name, repeats))
        return [speeds[name]] * repeats

    monkeypatch.setattr(bench, "replay_us", replay)
    assert bench.take_turns({name: name for name in speeds}, 12.0) == speeds
    counts = {name: sum(n for who, n in order if who == name) for name in speeds}
    assert counts == {"fast": 61, "slow": 7, "very slow": 1}
    assert [name for name, _ in order] == [*speeds] + ["fast", "slow"] * 3


def test_mixed_batches_are_compared_with_their_parts():
    same = {"heads": "h", "dtype": "d", "kv_dtype": "auto", "page": 16, "layout": "l"}
    rows = [
        same | {"case": case, "provider": provider, "us": us}
        for case, provider, us in (
            *(("q2k_4q1s4k", "conch", 9.0), ("q2k", "conch", 8.0)),
            *(("4q1s4k", "conch", 4.0), ("q2k_4q1s4k", "fa3", 9.0)),
        )
    ]
    (line,) = benchmark.sums_of_parts(rows)
    assert "8.0 + 4.0 = 12.0 us: 0.75" in line


def test_variants_that_share_kernels_are_compiled_once():
    chosen = benchmark.distinct_variants(
        parse(text) for text in ("q8k", "q2k", "1q1s8k", "q2k@fp8", "q2k@window4k")
    )
    names = {case.name for case in chosen}
    assert names == {"q2k", "1q1s8k", "q2k@fp8", "q2k@window4k"}


# ---------------------------------------------------------------- command line, tables


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    table = tmp_path / "table.csv"
    status = benchmark.main([*arguments, "--csv", str(table)])
    lines = table.read_text().splitlines()
    head = [line for line in lines if line.startswith("# ")]
    assert any(line.startswith("# torch: ") for line in head)
    return status, list(csv.DictReader(lines[len(head) :]))


def test_from_command_line_to_table(tmp_path):
    status, rows = run(
        tmp_path,
        *("--providers", "conch,conch_portable", "--cases", "q32,2q1s64"),
        *("--heads", "4/2x32", "--pages", "16,32"),
    )
    assert status == 0
    assert [(r["case"], r["page"], r["provider"]) for r in rows] == [
        (case, page, provider)
        for page in ("16", "32")
        for case in ("q32", "2q1s64")
        for provider in ("conch", "conch_portable")
    ]
    for row in rows:
        assert 0 < float(row["max_error"]) < 0.02
        assert not row["note"]
        assert bool(row["us"]) == torch.cuda.is_available()


def test_a_wrong_conch_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(Wrong, "name", "conch")
    monkeypatch.setitem(benchmark.PROVIDERS, "conch", Wrong)
    arguments = ("--providers", "conch", "--cases", "q20", "--heads", "4/2x32")
    status, (row,) = run(tmp_path, *arguments)
    assert status == 1
    assert row["note"].startswith("WRONG") and not row["us"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--providers", "fa9"], "fa9"),
        (["--suite", "tiny"], "tiny"),
        (["--cases", "8q"], "8q"),
        (["--pages", "24"], "24"),
        (["--heads", "many"], "many"),
        (["--layout", "diagonal"], "diagonal"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def fake_rows(tmp_path: Path) -> Path:
    """A table as a GPU would give it."""
    path = tmp_path / "table.csv"
    table = bench.Table(benchmark.FIELDS, {"device": "some GPU"}, path)
    texts = ("q1k", "q8k", "q8k@16/8x64", "1q1s1k", "1q1s8k", "q2k_4q1s4k")
    for text in texts:
        case = parse(text)
        inputs = argparse.Namespace(query=torch.empty(0, dtype=torch.bfloat16))
        for provider, factor in (("conch", 1.5), ("fa3", 2.0), ("read", 1.0)):
            kv_bytes = case.kv_bytes(2)
            floor = case.flop / 800e6 + kv_bytes / 4e6
            row = benchmark.describe(case, inputs) | {"provider": provider}
            table.add(row | benchmark.rates(case, factor * floor, kv_bytes, floor))
        table.add(benchmark.describe(case, inputs) | {"provider": "triton"})
    return path


def test_tables_become_plots(tmp_path):
    pytest.importorskip("matplotlib")
    import plot_conch

    path = fake_rows(tmp_path)
    head, rows = plot_conch.read_table(path)
    assert head == {"device": "some GPU"}
    figures = {one.name: one.rows for one in plot_conch.select_figures(rows)}
    found = {
        name: {(row["case"], row["provider"]) for row in chosen}
        for name, chosen in figures.items()
    }
    both = lambda *texts: {(text, p) for text in texts for p in ("conch", "fa3")}
    assert found == {
        "prefill_page16": both("q1k", "q8k"),
        "decode_page16": both("1q1s1k", "1q1s8k"),
        "mixed_page16": both("q2k_4q1s4k"),
    }
    assert plot_conch.main([str(path), "--out", str(tmp_path / "plots")]) == 0
    names = sorted(path.stem for path in (tmp_path / "plots").glob("*.svg"))
    assert names == sorted(found)


def test_a_table_without_times_has_no_plot(tmp_path):
    pytest.importorskip("matplotlib")
    import plot_conch

    path = tmp_path / "table.csv"
    bench.Table(benchmark.FIELDS, {}, path).add({"case": "q1k", "provider": "conch"})
    with pytest.raises(SystemExit, match="row with a time"):
        plot_conch.main([str(path), "--out", str(tmp_path)])


# ---------------------------------------------------------------- serving


def test_serving_cases_are_read():
    assert serving.Case.parse("8x32768/64") == (8, 32768, 64)
    assert str(serving.Case(8, 32768, 64)) == "8x32768/64"
    for text in (*serving.CASES, *serving.SHORT_CASES):
        assert str(serving.Case.parse(text)) == text
    for text in ("", "8", "8x4", "8x4/2/1", "0x4/2", "8x4/a"):
        with pytest.raises(ValueError, match="--cases"):
            serving.Case.parse(text)


def test_only_full_steps_count_between_tokens():
    # Two prompts: the second joins at 0.3 s, the first leaves after 0.9 s.
    steps = [(0.1, 1), (0.2, 1), (0.3, 2), (0.5, 2), (0.6, 2), (0.9, 2), (1.9, 1)]
    assert serving.between_tokens(steps, 2) == pytest.approx(200)
    assert serving.between_tokens(steps, 3) is None
    assert serving.between_tokens([], 1) is None


def test_agreement_ends_at_the_first_difference():
    def generated(tokens, logprobs, prompt):
        return {"tokens": tokens, "logprobs": logprobs, "prompt_logprobs": prompt}

    a = [
        generated([1, 2, 3, 4], [-1.0, -1.0, -1.0, -1.0], [-2.0, -3.0]),
        generated([7, 8], [-1.0, -1.0], []),
    ]
    b = [
        generated([1, 2, 9, 9], [-1.1, -1.0, -1.3, -9.0], [-2.0, -3.5]),
        generated([7, 8], [-1.0, -1.2], []),
    ]
    assert serving.compare(a, b) == {
        "agreeing": 4,
        "total": 6,
        "generated": pytest.approx(0.3),
        "prompt": pytest.approx(0.5),
    }


def test_serving_ratios_are_to_the_baseline():
    def backend(name, seconds, cases_, kv_cache_dtype="auto"):
        result = {"seconds": seconds, "ms_between_tokens": None}
        head = {"kv_cache_dtype": kv_cache_dtype, "start_seconds": 9.0}
        head |= {"vllm": "", "torch": "", "device": ""}
        results = [result | {"case": case} for case in cases_]
        return head | {"backend": name, "results": results}

    found = [backend("CONCH", 3.0, ["a", "b"]), backend("FLASH_ATTN", 4.0, ["a"])]
    found += [backend("CONCH", 2.0, ["a"], "fp8"), backend("FLASH_ATTN", 1, "a", "fp8")]
    rows = serving.make_rows(found, "FLASH_ATTN")
    assert [row["time_ratio"] for row in rows] == [0.75, None, 1.0, 2.0, 1.0]
    assert {row["tokens_ratio"] for row in rows} == {None}


def test_serving_tables_become_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    import plot_conch

    result = {"seconds": 3.0, "ms_between_tokens": 5.0, "case": "1x1024/128"}
    head = {"start_seconds": 9.0, "vllm": "", "torch": "", "device": "some GPU"}
    found = [
        head | {"backend": name, "kv_cache_dtype": kv, "results": [result]}
        for kv in ("auto", "fp8")
        for name in ("CONCH", "FLASH_ATTN")
    ]
    path = tmp_path / "serving.csv"
    serving.write_csv(serving.make_rows(found, "FLASH_ATTN"), path)
    assert plot_conch.main([str(path), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "serving.svg").read_text()
    assert text.count("<!-- 5 ms -->") == 4 and "some GPU" in text


def test_every_backend_gets_the_same_prompts_and_weights():
    first, again, other = (
        serving.random_prompts(2, 5, 100, seed) for seed in ("a", "a", "b")
    )
    assert first == again != other
    assert [len(prompt["prompt_token_ids"]) for prompt in first] == [5, 5]
    parts = [(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)) for _ in range(2)]
    models = [torch.nn.Sequential(*layers) for layers in parts]
    for model in models:
        serving.randomize(model)
    for a, b in zip(*(model.parameters() for model in models)):
        assert torch.equal(a, b)
    assert models[0][0].weight.std() > 0
    assert bool((models[0][1].weight == 1).all())
