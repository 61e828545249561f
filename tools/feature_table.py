# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The tables of docs/features.md: what CONCH answers vLLM, and what proves it.

    python tools/feature_table.py [--check]

Run where a vLLM with CONCH is installed: its release's table is written, or with
--check compared. The rows are the columns of vLLM's own table of attention backends;
"-" stands for no, and a row that a release does not ask for is left out.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8StaticTensorSym,
)
from vllm.v1.attention.backends.conch_attn import ConchAttentionBackend
from vllm.v1.attention.backends.conch_base import TOKEN_HEAD_FORMATS, AttentionType
from vllm.version import __version__

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "features.md"
BACKEND = "tests/v1/attention/test_conch_backend.py"
SUPPORTS = "tests/v1/attention/test_conch_backend_supports.py"
ENCODER = "tests/v1/attention/test_conch_backend_encoder.py"
GRAPHS = "tests/v1/attention/test_conch_backend_graphs.py"
TOKEN_HEAD = "releases/0.33.0/tests/v1/attention/test_conch_token_head.py"
DCP = "tests/v1/attention/test_conch_dcp.py"
ENGINE = "tests/v1/e2e/general/test_conch_engine.py"
MODELS = "tests/v1/e2e/general/test_conch_models.py"
REFUSED = f"{SUPPORTS}::test_unsupported_configurations"
TYPES = {
    AttentionType.DECODER: "decoder",
    AttentionType.ENCODER: "encoder",
    AttentionType.ENCODER_ONLY: "encoder only",
    AttentionType.ENCODER_DECODER: "encoder-decoder",
}
# Row, what the class is asked, the test where the answer is yes.
FLAGS = [
    ("Sliding window", "supports_sliding_window", f"{MODELS}::test_family"),
    ("Sinks", "supports_sink", f"{BACKEND}::test_sinks"),
    ("ALiBi, square root", "supports_alibi_sqrt", f"{BACKEND}::test_alibi"),
    ("Non-causal", "supports_non_causal", f"{BACKEND}::test_non_causal"),
    (
        "MM prefix",
        "supports_mm_prefix",
        f"{BACKEND}::test_images_are_seen_both_ways",
    ),
    (
        "R-SWA",
        "supports_rswa",
        f"{BACKEND}::test_prompts_stay_in_sight_behind_a_window",
    ),
    ("Sparse", "is_sparse", REFUSED),
    ("MLA", "is_mla", REFUSED),
    ("Per-head scales", "supports_per_head_quant_scales", REFUSED),
    (
        "Batch invariance",
        "supports_batch_invariance",
        f"{BACKEND}::test_batch_invariance",
    ),
    ("DCP", "supports_dcp", f"{DCP}::test_batches"),
    ("PCP", "supports_pcp", REFUSED),
    ("KV connector", "supports_kv_connector", f"{ENGINE}::test_kv_connector"),
    (
        "Adaptive verification",
        "supports_device_cpu_query_lens_mismatch",
        f"{SUPPORTS}::test_supported_configurations",
    ),
]


def rows() -> Iterator[tuple[str, str, str]]:
    """Feature, the class's answer, and the test that proves it."""
    backend = ConchAttentionBackend
    dtypes = ", ".join(str(d).removeprefix("torch.") for d in backend.supported_dtypes)
    yield "Dtypes", dtypes, f"{BACKEND}::test_batches"
    caches = [
        d for d in backend.supported_kv_cache_dtypes if d not in TOKEN_HEAD_FORMATS
    ]
    yield "KV cache dtypes", ", ".join(caches), f"{BACKEND}::test_fp8_cache"
    if TOKEN_HEAD_FORMATS:
        formats = ", ".join(TOKEN_HEAD_FORMATS)
        yield "Scales per token and head", formats, f"{TOKEN_HEAD}::test_every_format"
    (size,) = backend.get_supported_kernel_block_sizes()
    supported = f"{SUPPORTS}::test_supported_configurations"
    yield "Block sizes", f"multiples of {size.base}", supported
    heads = [size for size in range(1, 1025) if backend.supports_head_size(size)]
    if heads != list(range(heads[0], heads[-1] + 1)):
        raise ValueError(f"head sizes have gaps: {heads}")
    yield "Head sizes", f"{heads[0]} to {heads[-1]}", supported
    types = [name for kind, name in TYPES.items() if backend.supports_attn_type(kind)]
    yield "Attention types", ", ".join(types), f"{ENCODER}::test_encoder"
    for name, method, test in FLAGS:
        if hasattr(backend, method):
            answer = getattr(backend, method)()
            yield name, "yes" if answer else "-", test if answer else REFUSED
    impl = object.__new__(backend.get_impl_cls())
    quantises = impl.fused_output_quant_supported(kFp8StaticTensorSym)
    fused = "fp8, static scale" if quantises else "-"
    yield "Fused output quantisation", fused, f"{BACKEND}::test_output_in_fp8"
    config = SimpleNamespace(model_config=None)
    level = backend.get_builder_cls().get_cudagraph_support(config, None)
    graphs = f"{GRAPHS}::test_every_cuda_graph_mode_is_supported"
    yield "CUDA graphs", level.name, graphs


@cache
def tests_of(file: str) -> set[str]:
    module = ast.parse((ROOT / file).read_text())
    return {node.name for node in module.body if isinstance(node, ast.FunctionDef)}


def table() -> str:
    lines = ["| feature | CONCH | proved by |", "|---|---|---|"]
    for feature, answer, test in rows():
        file, _, function = test.partition("::")
        if function not in tests_of(file):
            raise ValueError(f"{feature}: there is no test {test}")
        name = file.rpartition("/")[2]
        lines.append(f"| {feature} | {answer} | [{name}](../{file})`::{function}` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    version = re.split(r"[^\d.]|\.dev", __version__)[0]
    begin, end = f"## vLLM {version}\n\n", "\n<!-- end -->\n"
    text = DOCUMENT.read_text()
    head, found, rest = text.partition(begin)
    if not found:
        sys.exit(f"{DOCUMENT} has no section for vLLM {version}")
    new = head + begin + table() + end + rest.partition(end)[2]
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(new)
    elif new != text:
        sys.exit(f"{DOCUMENT} is not current: run python tools/feature_table.py")


if __name__ == "__main__":
    main()
