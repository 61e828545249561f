# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Host time of one layer's cache write and attention, in eager mode.

    python benchmarks/kernels/benchmark_conch_host.py
    python benchmarks/kernels/benchmark_conch_host.py --kv-cache-dtype fp8

What vLLM 0.33 calls of a backend in each layer of a step, without what is around it:
the attention layer, custom ops, Python of the model. A step has 32 layers with caches
of their own and the shape of Llama-3.1-8B; the device is idle when it begins, so that
no call waits for room in its queue. Columns: microseconds until the calls return, the
median over steps of the mean over layers; and for the metadata, once a step.

--warm-up measures the compilation of CONCH's kernels instead, as it is when an engine
starts with an empty cache: set TRITON_CACHE_DIR to an empty folder. With
VLLM_TRITON_JIT_WARMUP_NUM_THREADS=1 kernels are compiled one after the other.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conch_bench as bench
import torch

from vllm import envs
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.triton_utils import triton
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 32, 32, 8, 128
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": NUM_HEADS * HEAD_SIZE,
    "intermediate_size": 14336,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_SIZE,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
PAGE = 16
NUM_BLOCKS = 4096
# (query_len, seq_len) of each sequence.
BATCHES = {
    "1q1s1k": [(1, 1024)],
    "64q1s1k": [(1, 1024)] * 64,
    "q1k": [(1024, 1024)],
    "q1k_63q1s1k": [(1024, 1024)] + [(1, 1024)] * 63,
}
STEPS = 30


def make_config(kv_cache_dtype: str) -> Any:
    """Configuration of vLLM for the model, without weights."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        return EngineArgs(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            kv_cache_dtype=kv_cache_dtype,
        ).create_engine_config()


class Engine:
    """A backend's layers, their caches and their builder."""

    def __init__(self, backend: str, kv_cache_dtype: str) -> None:
        self.device = torch.device("cuda", 0)
        self.config = make_config(kv_cache_dtype)
        cls = AttentionBackendEnum[backend].get_class()
        cache_dtype = torch.bfloat16 if kv_cache_dtype == "auto" else torch.uint8
        spec = FullAttentionSpec(
            block_size=PAGE,
            num_kv_heads=NUM_KV_HEADS,
            head_size=HEAD_SIZE,
            dtype=cache_dtype,
        )
        torch.set_default_dtype(torch.bfloat16)
        self.layers = {}
        with set_current_vllm_config(self.config):
            for i in range(NUM_LAYERS):
                self.layers[f"layers.{i}"] = self.make_layer(
                    cls, kv_cache_dtype, cache_dtype
                )
            torch.set_default_dtype(torch.float32)
            context = self.config.compilation_config.static_forward_context
            context.update(self.layers)
            self.builder = cls.get_builder_cls()(
                spec, list(self.layers), self.config, self.device
            )
        self.block_table = torch.arange(1, 64 * 64 + 1, device=self.device)
        self.block_table = (self.block_table % NUM_BLOCKS).int().view(64, 64)

    def make_layer(self, cls: Any, kv_cache_dtype: str, cache_dtype: torch.dtype):
        scale = torch.ones((), dtype=torch.float32, device=self.device)
        impl = cls.get_impl_cls()(
            NUM_HEADS,
            HEAD_SIZE,
            1 / math.sqrt(HEAD_SIZE),
            NUM_KV_HEADS,
            alibi_slopes=None,
            sliding_window=None,
            kv_cache_dtype=kv_cache_dtype,
        )
        # Packed pages, which every backend reads.
        shape = (NUM_BLOCKS, PAGE, NUM_KV_HEADS, 2 * HEAD_SIZE)
        pages = torch.zeros(shape, dtype=cache_dtype, device=self.device)
        scales = {f"_{name}_scale": scale for name in "qkv"}
        floats = {f"_{name}_scale_float": 1.0 for name in "qkv"}
        return SimpleNamespace(
            impl=impl, kv_cache=pages.transpose(1, 2), **scales, **floats
        )

    def metadata(self, lengths: list[tuple[int, int]]) -> Any:
        starts = torch.tensor([0, *(q for q, _ in lengths)]).cumsum(0).int()
        seq_lens = torch.tensor([s for _, s in lengths], dtype=torch.int32)
        num_tokens = int(starts[-1])
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(self.device),
            num_reqs=len(lengths),
            num_actual_tokens=num_tokens,
            max_query_len=max(q for q, _ in lengths),
            max_seq_len=max(s for _, s in lengths),
            block_table_tensor=self.block_table[: len(lengths)],
            slot_mapping=torch.arange(num_tokens, device=self.device),
            causal=True,
        )

    def step(self, lengths: list[tuple[int, int]]) -> tuple[float, float, float]:
        """Microseconds: metadata, and of a layer cache write and attention."""
        common = self.metadata(lengths)
        heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        rows = torch.randn(
            common.num_actual_tokens, sum(heads), HEAD_SIZE, device=self.device
        ).bfloat16()
        query, key, value = rows.split(heads, dim=1)
        output = torch.empty_like(query)
        first = next(iter(self.layers.values()))
        is_fp8 = first.kv_cache.dtype == torch.uint8
        if is_fp8 and first.impl.supports_quant_query_input:
            query = query.to(torch.float8_e4m3fn)
        torch.accelerator.synchronize()
        begin = time.perf_counter()
        metadata = self.builder.build(0, common)
        build = time.perf_counter() - begin
        torch.accelerator.synchronize()
        write = attention = 0.0
        for layer in self.layers.values():
            start = time.perf_counter()
            layer.impl.do_kv_cache_update(
                layer, key, value, layer.kv_cache, common.slot_mapping
            )
            middle = time.perf_counter()
            layer.impl.forward(
                layer, query, key, value, layer.kv_cache, metadata, output
            )
            attention += time.perf_counter() - middle
            write += middle - start
        torch.accelerator.synchronize()
        layers = len(self.layers)
        return 1e6 * build, 1e6 * write / layers, 1e6 * attention / layers


def measure_steps(options: argparse.Namespace) -> None:
    print(f"{'backend':>12} {'batch':>12} {'metadata':>9} {'write':>7} {'attention':>9}"
          f" {'both':>7}   us")  # fmt: skip
    for backend in options.backends:
        try:
            engine = Engine(backend, options.kv_cache_dtype)
            for name, lengths in BATCHES.items():
                for _ in range(3):
                    engine.step(lengths)
                steps = [engine.step(lengths) for _ in range(STEPS)]
                build, write, attention = map(statistics.median, zip(*steps))
                print(
                    f"{backend:>12} {name:>12} {build:9.1f} {write:7.2f} "
                    f"{attention:9.2f} {write + attention:7.2f}",
                    flush=True,
                )
        except Exception as error:  # one that fails must not end the others' run
            print(f"{backend:>12} FAILED: {type(error).__name__}: {error}", flush=True)


def measure_warm_up(options: argparse.Namespace) -> None:
    """Time of `ConchWarmUpKernel`, and what it compiles."""
    from vllm.v1.attention.backends import conch_base

    engine = Engine("CONCH", options.kv_cache_dtype)
    compiled: list[tuple[str, float]] = []
    begin = time.perf_counter()
    triton.knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(
        (event["fn"].name.rpartition(".")[2], time.perf_counter() - begin)
    )
    threads = envs.VLLM_TRITON_JIT_WARMUP_NUM_THREADS
    with set_current_vllm_config(engine.config):
        conch_base.warm_up_kernel.warmup(engine.config)
    seconds = time.perf_counter() - begin
    for name, when in compiled:
        print(f"{name} after {when:.1f} s")
    print(f"{len(compiled)} kernels in {seconds:.1f} s, {threads} threads", flush=True)
    begin = time.perf_counter()
    engine.step(BATCHES["q1k_63q1s1k"])
    torch.accelerator.synchronize()
    print(f"the first step then {time.perf_counter() - begin:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commas: Callable[[str], list[str]] = lambda text: text.split(",")
    parser.add_argument(
        "--backends", type=commas, default=["CONCH", "FLASH_ATTN", "TRITON_ATTN"]
    )
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--warm-up", action="store_true", help="see above")
    parser.add_argument("--commit", help="for the head; default: asks git")
    options = parser.parse_args()
    for name, value in bench.environment(options.commit).items():
        print(f"# {name}: {value}")
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a GPU.")
    (measure_warm_up if options.warm_up else measure_steps)(options)


if __name__ == "__main__":
    main()
