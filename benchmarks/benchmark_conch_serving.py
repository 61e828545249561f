# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whole-engine latency, throughput and time between tokens of attention backends.

    python benchmarks/benchmark_conch_serving.py --out serving
    python benchmarks/benchmark_conch_serving.py --backends CONCH,FLASH_ATTN \
        --cases 1x32768/128 --kv-cache-dtype auto,fp8
    TRITON_INTERPRET=1 python benchmarks/benchmark_conch_serving.py --model tiny \
        --backends CONCH --cases 1x16/2    # without a GPU, to try it

Every backend gets a process of its own for each kind of KV cache, one after the other,
with the same model: the shape of Llama-3.1-8B, random weights. A case
PROMPTSxINPUT/OUTPUT submits all prompts at once and generates greedily. Columns:
seconds until all is done, the same relative to --baseline with the same KV cache,
output tokens a second, median milliseconds between two steps in which every sequence
got a token, and milliseconds until the first token; in the CSV file also the seconds
that the engine took to start.

The cases come in order of importance; none is begun after --budget seconds, and a
backend is stopped --limit seconds after its start. What it measured counts. At the end
each pair of backends is compared on a few prompts: log-probabilities of the prompt
itself, tokens generated until the first that differs, and their log-probabilities.

Outputs: --out/serving.csv, and --out/BACKEND-KV_CACHE.json with everything that a
backend measured.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# For trying the benchmark itself without a GPU.
TINY = LLAMA_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}
MODELS = {"llama8b": LLAMA_8B, "tiny": TINY}
ENGINE = {
    "max_model_len": 40960,
    "max_num_seqs": 256,
    "gpu_memory_utilization": 0.9,
    # The default has some 50 sizes; capturing them takes longer than the cases.
    "compilation_config": {
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]
    },
}
TINY_ENGINE = {
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 512,
    "gpu_memory_utilization": 0.1,
    "enforce_eager": True,
}
ENGINES = {"llama8b": ENGINE, "tiny": TINY_ENGINE}

# Most important first. 64 sequences of 32k tokens do not fit a GPU of 141 GB: their
# keys and values take 275 GB, in fp8 half of that; 16 stand for them.
CASES = [
    *("1x1024/128", "1x32768/128", "256x1024/128", "64x1024/128"),
    *("8x32768/64", "16x8192/256", "16x32768/32"),
]
SHORT_CASES = ["1x1024/128", "1x32768/128", "64x1024/128"]
# A case this fast is run again, and the median is reported.
FAST_SECONDS = 1.5
REPEATS = 3

AGREEMENT_LENGTHS = (5, 100, 1000, 3000)
AGREEMENT_TOKENS = 32
WEIGHT_STD = 0.02


class Case(NamedTuple):
    prompts: int
    input_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Reads PROMPTSxINPUT/OUTPUT.

        Raises:
            ValueError: if it is not that.

        """
        try:
            prompts, lengths = text.split("x")
            case = cls(int(prompts), *(int(n) for n in lengths.split("/")))
        except (TypeError, ValueError):
            case = cls(0, 0, 0)
        if min(case) < 1:
            raise ValueError(
                f"--cases {text!r} is not PROMPTSxINPUT/OUTPUT, such as 1x1024/128"
            )
        return case

    def __str__(self) -> str:
        return f"{self.prompts}x{self.input_len}/{self.output_len}"


@dataclass
class Result:
    """One case of one backend."""

    case: str
    seconds: float
    output_tokens_per_second: float
    ms_between_tokens: float | None
    ms_to_first_token: float


# ---------------------------------------------------------------- one backend


def random_prompts(count: int, length: int, vocabulary: int, seed: str):
    """Token ids; the same for every backend."""
    tokens = random.Random(seed).choices(range(3, vocabulary), k=count * length)
    return [
        {"prompt_token_ids": tokens[i * length : (i + 1) * length]}
        for i in range(count)
    ]


def randomize(model: Any) -> int:
    """Gives a model weights with which attention matters; the same in every process.

    vLLM's dummy weights are so small that all tokens are equally likely.
    """
    import torch

    for name, weight in model.named_parameters():
        if weight.dim() == 0:
            continue  # a scale
        if weight.dim() == 1:
            weight.data.fill_(1.0)
            continue
        generator = torch.Generator(weight.device)
        generator.manual_seed(zlib.crc32(name.encode()))
        weight.data.normal_(0.0, WEIGHT_STD, generator=generator)
    return 1


def between_tokens(steps: Sequence[tuple[float, int]], prompts: int) -> float | None:
    """Median milliseconds between consecutive steps that gave every sequence a token.

    Args:
        steps: time in seconds and number of sequences that got a token, of each step.
        prompts: the number of sequences.

    """
    full = [
        1e3 * (end - begin)
        for (begin, count0), (end, count1) in itertools.pairwise(steps)
        if count0 == count1 == prompts
    ]
    return statistics.median(full) if full else None


def run_case(llm: Any, case: Case, vocabulary: int, seed: str) -> Result:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    prompts = random_prompts(case.prompts, case.input_len, vocabulary, seed)
    params = SamplingParams(
        temperature=0.0,
        max_tokens=case.output_len,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    engine = llm.llm_engine
    steps: list[tuple[float, int]] = []
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{seed}-{i}", prompt, params)
    while engine.has_unfinished_requests():
        if outputs := engine.step():
            steps.append((time.perf_counter() - begin, len(outputs)))
    seconds = steps[-1][0]
    return Result(
        str(case),
        seconds,
        case.prompts * case.output_len / seconds,
        between_tokens(steps, case.prompts),
        1e3 * steps[0][0],
    )


def measure(llm: Any, case: Case, vocabulary: int) -> Result:
    """A case; if it is fast, the median of further runs."""
    first = run_case(llm, case, vocabulary, f"{case} first")
    if first.seconds >= FAST_SECONDS:
        return first
    seeds = [f"{case} {i}" for i in range(REPEATS)]
    results = [run_case(llm, case, vocabulary, seed) for seed in seeds]
    return sorted(results, key=lambda result: result.seconds)[REPEATS // 2]


def generate(llm: Any, vocabulary: int, max_len: int) -> list[dict[str, list]]:
    """Log-probabilities of prompts, and what follows them greedily."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=AGREEMENT_TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=0,
    )
    prompts = [
        prompt
        for length in AGREEMENT_LENGTHS
        if length + AGREEMENT_TOKENS <= max_len
        for prompt in random_prompts(2, length, vocabulary, f"agreement-{length}")
    ]
    generated = []
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False)):
        tokens = list(output.outputs[0].token_ids)
        given = prompt["prompt_token_ids"]
        generated.append(
            {
                "prompt_logprobs": [
                    found[token].logprob
                    for token, found in zip(given, output.prompt_logprobs)
                    if found
                ],
                "tokens": tokens,
                "logprobs": [
                    found[token].logprob
                    for token, found in zip(tokens, output.outputs[0].logprobs)
                ],
            }
        )
    return generated


def start_engine(backend: str, options: argparse.Namespace) -> Any:
    import dataclasses

    import vllm
    from vllm.engine.arg_utils import EngineArgs

    arguments = ENGINES[options.model] | json.loads(options.engine_args)
    if "attention_backend" in {field.name for field in dataclasses.fields(EngineArgs)}:
        arguments["attention_backend"] = backend
    else:
        os.environ["VLLM_ATTENTION_BACKEND"] = backend
    return vllm.LLM(
        str(options.out / "model"),
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_dtype=options.kv_cache_dtype,
        enable_prefix_caching=False,
        seed=0,
        **arguments,
    )


def run_backend(backend: str, options: argparse.Namespace) -> None:
    """Measures one backend and writes its JSON file, after every case."""
    import torch

    import vllm

    config = MODELS[options.model]
    vocabulary = config["vocab_size"]
    begin = time.perf_counter()
    llm = start_engine(backend, options)
    llm.apply_model(randomize)
    run_case(llm, Case(4, 64, 4), vocabulary, "warm-up")
    started = time.perf_counter()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found: dict[str, Any] = {
        "backend": backend,
        "device": device,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "kv_cache_dtype": options.kv_cache_dtype,
        "start_seconds": started - begin,
        "skipped": [],
        "results": [],
        "generated": [],
    }

    def save() -> None:
        """At once, as the process may be stopped at any time."""
        path = result_path(options.out, backend, options.kv_cache_dtype)
        path.with_suffix(".part").write_text(json.dumps(found))
        path.with_suffix(".part").replace(path)

    for case in options.cases:
        if time.perf_counter() - started > options.budget:
            found["skipped"].append(str(case))
        else:
            result = asdict(measure(llm, case, vocabulary))
            found["results"].append(result)
            print(f"{backend} {result}", flush=True)
        save()
    max_len = llm.llm_engine.model_config.max_model_len
    found["generated"] = generate(llm, vocabulary, max_len)
    save()


# ---------------------------------------------------------------- all backends


def result_path(folder: Path, backend: str, kv_cache_dtype: str) -> Path:
    return folder / f"{backend}-{kv_cache_dtype}.json"


def run_all(options: argparse.Namespace, cache: str) -> list[dict[str, Any]]:
    """Runs backends in processes; returns what those that came through found.

    cache: folder for what vLLM compiles, which backends share.
    """
    (options.out / "model").mkdir(parents=True, exist_ok=True)
    config = json.dumps(MODELS[options.model])
    (options.out / "model" / "config.json").write_text(config)
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CACHE_ROOT": cache,
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, *sys.argv[1:], "--out", str(options.out)]
    found = []
    for kv_cache_dtype, backend in itertools.product(
        options.kv_cache_dtype.split(","), options.backends
    ):
        path = result_path(options.out, backend, kv_cache_dtype)
        path.unlink(missing_ok=True)
        begin = time.perf_counter()
        with path.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(
                [*command, "--worker", backend, "--kv-cache-dtype", kv_cache_dtype],
                env=defaults | os.environ,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: object = process.wait(options.limit)
            except subprocess.TimeoutExpired:
                status = f"stopped after {options.limit:.0f} s"
            finally:
                # With the processes that it started; none if it ended by itself.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.perf_counter() - begin
        print(f"# {path.stem}: {seconds:.0f} s, exit status: {status}", flush=True)
        if status != 0:
            lines = Path(log.name).read_text().splitlines()
            print("\n".join(f"    {line}" for line in lines[-options.log_lines :]))
        if path.exists():
            found.append(json.loads(path.read_text()))
    return found


def make_rows(found: Iterable[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """The table: a row for each backend and case, with the time over the baseline's."""
    found = list(found)
    reference = {
        (one["kv_cache_dtype"], result["case"]): result
        for one in found
        if one["backend"] == baseline
        for result in one["results"]
    }
    rows = []
    for one in found:
        for result in one["results"]:
            other = reference.get((one["kv_cache_dtype"], result["case"]))
            row = {
                "backend": one["backend"],
                "kv_cache_dtype": one["kv_cache_dtype"],
                "vllm": one["vllm"],
                "torch": one["torch"],
                "device": one["device"],
                "start_seconds": one["start_seconds"],
            }
            row |= result
            for key, name in (("seconds", "time"), ("ms_between_tokens", "tokens")):
                ours, theirs = result[key], other[key] if other else None
                row[f"{name}_ratio"] = ours / theirs if ours and theirs else None
            rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]], baseline: str) -> None:
    print(
        f"{'case':>14} {'KV cache':>8} {'backend':>14} {'seconds':>9} {'ratio':>6} "
        f"{'tokens/s':>9} {'ms/token':>9} {'ratio':>6} {'first ms':>9}   "
        f"ratios: time over {baseline}'s"
    )

    def text(value: float | None, width: int, digits: int) -> str:
        return " " * width if value is None else f"{value:{width}.{digits}f}"

    def group(row: dict[str, Any]) -> tuple:
        return row["kv_cache_dtype"], row["case"]

    order = list(dict.fromkeys(map(group, rows)))
    for row in sorted(rows, key=lambda row: order.index(group(row))):
        print(
            f"{row['case']:>14} {row['kv_cache_dtype']:>8} {row['backend']:>14} "
            f"{text(row['seconds'], 9, 3)} "
            f"{text(row['time_ratio'], 6, 3)} "
            f"{text(row['output_tokens_per_second'], 9, 1)} "
            f"{text(row['ms_between_tokens'], 9, 3)} "
            f"{text(row['tokens_ratio'], 6, 3)} {text(row['ms_to_first_token'], 9, 2)}"
        )


def compare(a: Sequence[dict], b: Sequence[dict]) -> dict[str, float]:
    """How far two backends' generations of the same prompts agree.

    Returns:
        prompt: largest difference of the prompts' log-probabilities; agreeing, total:
        generated tokens before the first that differs, and all; generated: largest
        difference of their log-probabilities, the first different token's included.

    """
    found = {"prompt": 0.0, "agreeing": 0, "total": 0, "generated": 0.0}
    for one, other in zip(a, b, strict=True):
        pairs = zip(one["prompt_logprobs"], other["prompt_logprobs"], strict=True)
        found["prompt"] = max([found["prompt"], *(abs(x - y) for x, y in pairs)])
        equal = [x == y for x, y in zip(one["tokens"], other["tokens"], strict=True)]
        same = [*equal, False].index(False)
        found["agreeing"] += same
        found["total"] += len(one["tokens"])
        pairs = zip(one["logprobs"][: same + 1], other["logprobs"][: same + 1])
        found["generated"] = max([found["generated"], *(abs(x - y) for x, y in pairs)])
    return found


def show_agreement(found: Sequence[dict[str, Any]]) -> None:
    for a, b in itertools.combinations(found, 2):
        same_kind = a["kv_cache_dtype"] == b["kv_cache_dtype"]
        if not (same_kind and a["generated"] and b["generated"]):
            continue
        one = compare(a["generated"], b["generated"])
        print(
            f"{a['backend']} and {b['backend']}, KV cache {a['kv_cache_dtype']}: "
            f"{one['agreeing']} of {one['total']} tokens before the first difference; "
            f"largest difference of log-probabilities {one['generated']:.3g}, "
            f"in prompts {one['prompt']:.3g}"
        )


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    if not rows:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commas = lambda text: text.split(",")
    parser.add_argument(
        "--backends", type=commas, default=["CONCH", "FLASH_ATTN", "TRITON_ATTN"]
    )
    parser.add_argument("--baseline", default="FLASH_ATTN")
    parser.add_argument("--cases", type=commas, help="such as 1x1024/128,64x1024/128")
    parser.add_argument("--short", action="store_true", help=", ".join(SHORT_CASES))
    parser.add_argument(
        "--kv-cache-dtype", default="auto", help="one, or several: auto,fp8"
    )
    parser.add_argument("--model", choices=MODELS, default="llama8b")
    parser.add_argument("--out", type=Path, help="default: a new temporary folder")
    parser.add_argument(
        "--budget", type=float, default=75.0, help="seconds for a backend's cases"
    )
    parser.add_argument(
        "--limit", type=float, default=178.0, help="a backend is stopped after these"
    )
    parser.add_argument("--log-lines", type=int, default=15, help="shown of a failure")
    parser.add_argument(
        "--engine-args", default="{}", help="JSON, more arguments of vllm.LLM"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    texts = options.cases or (SHORT_CASES if options.short else CASES)
    try:
        options.cases = [Case.parse(text) for text in texts]
    except ValueError as error:
        parser.error(str(error))
    if options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="conch-serving-"))
    options.out = options.out.resolve()
    return options


def main() -> int:
    options = parse_arguments()
    if options.worker:
        run_backend(options.worker, options)
        return 0
    with tempfile.TemporaryDirectory(prefix="conch-serving-cache-") as cache:
        found = run_all(options, cache)
    rows = make_rows(found, options.baseline)
    show(rows, options.baseline)
    for one in found:
        print(
            f"# {one['backend']}, KV cache {one['kv_cache_dtype']}: "
            f"started in {one['start_seconds']:.0f} s; "
            f"skipped: {', '.join(one['skipped']) or 'nothing'}"
        )
    show_agreement(found)
    write_csv(rows, options.out / "serving.csv")
    print(f"# written to {options.out}")
    kinds = options.kv_cache_dtype.split(",")
    return 0 if len(found) == len(options.backends) * len(kinds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
