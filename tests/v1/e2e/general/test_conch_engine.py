# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's engine generates with CONCH what Hugging Face generates, token by token.

Small random models in fp32, greedily. Without a GPU the kernels run in Triton's
interpreter, on the platform of the `vllm_interpreter` plugin.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import vllm
from tests.kernels.attention.conch_harness import record_launches, use_hopper
from tests.v1.e2e.general.conch_engine import (
    ON_GPU,
    SHAPE,
    engine,
    expected_tokens,
    generate,
    random_prompts,
    save,
)
from vllm.attention.ops.conch import schedule as schedule_module
from vllm.attention.ops.conch.overlap import Work
from vllm.v1.attention.backends import conch_attn
from vllm.v1.worker import cpu_model_runner


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("llama")
    return str(folder), save(LlamaForCausalLM, LlamaConfig(**SHAPE), folder)


class Steps:
    """The batches that CONCH attended to: (query_len, seq_len) of each sequence."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[tuple[int, int]]] = []
        self.num_calls = 0
        builder = conch_attn.ConchAttentionMetadataBuilder
        build, attention = builder.build, conch_attn.varlen_attention

        def recording_build(*args: Any, **kwargs: Any) -> Any:
            metadata = build(*args, **kwargs)
            query_lens = metadata.query_start_loc.diff().tolist()
            self.batches.append(list(zip(query_lens, metadata.seq_lens.tolist())))
            return metadata

        def counting_attention(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            return attention(*args, **kwargs)

        monkeypatch.setattr(builder, "build", recording_build)
        monkeypatch.setattr(conch_attn, "varlen_attention", counting_attention)

    def any_sequence(self, condition: Callable[[int, int], bool]) -> bool:
        return any(condition(*lengths) for batch in self.batches for lengths in batch)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine and its worker run in this process, where a test can look."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def runs_speculation_on_cpu() -> bool:
    """The CPU runner of some releases asserts that there is no speculation."""
    source = inspect.getsource(cpu_model_runner.CPUModelRunner.__init__)
    return "spec decode is not supported" not in source


def metric(llm: vllm.LLM, name: str) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def is_chunk(query_len: int, seq_len: int) -> bool:
    """A prefill that continues what is in the cache: 1 < query_len < seq_len."""
    return 1 < query_len < seq_len


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_chunked_prefill_and_prefix_caching(
    prefix_caching: bool, llama: tuple[str, PreTrainedModel], steps: Steps
) -> None:
    """Prompts longer than a step's budget, the same ones twice."""
    folder, model = llama
    prompts = random_prompts(50, 3, 21, shared=37)
    expected = expected_tokens(model, prompts, 6)
    with engine(
        folder, max_num_batched_tokens=32, enable_prefix_caching=prefix_caching
    ) as llm:
        assert generate(llm, prompts, 6) == expected
        assert generate(llm, prompts, 6) == expected
        assert (metric(llm, "prefix_cache_hits") > 0) == prefix_caching
    assert steps.any_sequence(is_chunk)
    mixed = [{query_len == 1 for query_len, _ in batch} for batch in steps.batches]
    assert {True, False} in mixed  # decodes and prefills in one batch
    assert steps.num_calls > 0


def test_kernels_for_hopper(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of 128 in 16 bits, which Hopper's own kernels take, decodes too.

    Prefills have one multiprocessor where decodes are beside them, decodes the others.
    """
    use_hopper(monkeypatch)
    launched = record_launches(monkeypatch)
    shares = []

    def share(work: Work, *_: Any) -> int | None:
        shares.append(1 if work.decode_keys else None)
        return shares[-1]

    monkeypatch.setattr(schedule_module, "can_share", lambda *_: True)
    monkeypatch.setattr(schedule_module, "prefill_units", share)
    model = save(LlamaForCausalLM, LlamaConfig(**SHAPE | {"head_dim": 128}), tmp_path)
    prompts = random_prompts(50, 3, 21, shared=37)
    expected = expected_tokens(model, prompts, 6)
    budget = {"max_num_batched_tokens": 32}
    with engine(str(tmp_path), dtype="float16", **budget) as llm:
        assert generate(llm, prompts, 6) == expected
        assert generate(llm, prompts, 6) == expected
    assert steps.any_sequence(is_chunk)
    kernels = {
        name for name in launched if name.endswith(("prefill_kernel", "decode_kernel"))
    }
    assert kernels == {"hopper_prefill_kernel", "hopper_decode_kernel"}
    # Where decodes are beside prefills, and only there.
    assert set(shares) == {1}
    mixed = [{query_len == 1 for query_len, _ in batch} for batch in steps.batches]
    assert {True, False} in mixed and {False} in mixed


def test_preemption(llama: tuple[str, PreTrainedModel], steps: Steps) -> None:
    """Too few pages for all sequences: some lose theirs and begin again."""
    folder, model = llama
    prompts = random_prompts(30, 28, 25, 31)
    with engine(folder, num_gpu_blocks_override=11, enable_prefix_caching=False) as llm:
        assert generate(llm, prompts, 12) == expected_tokens(model, prompts, 12)
        assert metric(llm, "num_preemptions") > 0
    assert steps.num_calls > 0


def test_kv_connector(
    llama: tuple[str, PreTrainedModel], steps: Steps, tmp_path: Path
) -> None:
    """KV of whole pages, saved by one run, saves another the prefill."""
    if not hasattr(conch_attn.ConchAttentionBackend, "supports_kv_connector"):
        pytest.skip("this release's example connector knows no cache but FLASH_ATTN's")
    folder, model = llama
    prompts = random_prompts(50, 37)
    expected = expected_tokens(model, prompts, 4)
    with engine(
        folder,
        enable_prefix_caching=False,
        kv_transfer_config={
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        },
    ) as llm:
        assert generate(llm, prompts, 4) == expected
        assert list(tmp_path.rglob("*.safetensors"))
        steps.batches.clear()
        assert generate(llm, prompts, 4) == expected
    assert {(2, 50), (5, 37)} <= {pair for batch in steps.batches for pair in batch}


def test_sliding_window(tmp_path: Path, steps: Steps) -> None:
    config = MistralConfig(**SHAPE, sliding_window=24)
    model = save(MistralForCausalLM, config, tmp_path)
    prompts = random_prompts(70, 20, 41)
    expected = expected_tokens(model, prompts, 8)
    with engine(str(tmp_path), max_num_batched_tokens=48) as llm:
        assert generate(llm, prompts, 8) == expected
    assert steps.any_sequence(lambda query_len, seq_len: seq_len > 24 + query_len)


def test_softcap_and_two_windows_in_one_group(tmp_path: Path, steps: Steps) -> None:
    """Gemma 2 caps logits; every other layer has a window. One KV cache for all."""
    config = Gemma2Config(
        **SHAPE,
        hidden_act="gelu_pytorch_tanh",
        sliding_window=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=20.0,
        query_pre_attn_scalar=16,
    )
    model = save(Gemma2ForCausalLM, config, tmp_path)
    prompts = random_prompts(70, 20, 41)
    expected = expected_tokens(model, prompts, 8)
    model.config.attn_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert expected_tokens(model, prompts, 8) != expected
    with engine(
        str(tmp_path),
        max_num_batched_tokens=48,
        disable_hybrid_kv_cache_manager=True,
    ) as llm:
        assert generate(llm, prompts, 8) == expected
    assert steps.any_sequence(lambda query_len, seq_len: seq_len > 24 + query_len)


def test_speculative_decoding(llama: tuple[str, PreTrainedModel], steps: Steps) -> None:
    """Several tokens of a sequence are verified at once, some of them wrong."""
    folder, model = llama
    pattern = random_prompts(7)[0]
    prompts = [pattern * 5, (pattern * 4)[:25], random_prompts(30)[0]]
    expected = expected_tokens(model, prompts, 16)
    speculative_config = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    if not ON_GPU and not runs_speculation_on_cpu():
        pytest.skip("this release speculates on GPUs only")
    with engine(folder, speculative_config=speculative_config) as llm:
        assert generate(llm, prompts, 16) == expected
        drafted = metric(llm, "spec_decode_num_draft_tokens")
        accepted = metric(llm, "spec_decode_num_accepted_tokens")
        assert drafted > accepted > 0
    assert steps.any_sequence(
        lambda query_len, seq_len: 1 < query_len <= 4 and seq_len > 30
    )
