# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What CONCH's engine tests share: small random models, engines, and what to expect."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
if not ON_GPU:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
    pytest.importorskip("vllm_interpreter")

import vllm  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.v1.attention.backends import conch_attn  # noqa: E402

VOCABULARY = 128
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    # Far from uniform, so that the next token depends on what is attended to.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def random_prompts(*lengths: int, shared: int = 0) -> list[list[int]]:
    """Prompts of random tokens that begin with the same `shared` ones."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    beginning = tokens(shared)
    return [beginning + tokens(length) for length in lengths]


def expected_tokens(
    model: PreTrainedModel, prompts: list[list[int]], count: int
) -> list[list[int]]:
    """What Hugging Face generates greedily after each prompt."""
    results = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        for _ in range(count):
            with torch.no_grad():
                logits = model(tokens, use_cache=False).logits[0, -1]
            tokens = torch.cat([tokens, logits.argmax().view(1, 1)], dim=1)
        results.append(tokens[0, len(prompt) :].tolist())
    return results


def save(
    model_class: type[PreTrainedModel],
    config: Any,
    folder: Path,
    attention: str = "eager",
) -> Any:
    """Saves a random model; returns Hugging Face's."""
    torch.manual_seed(1)
    model = model_class._from_config(config, attn_implementation=attention).float()
    model = model.eval()
    if config.tie_word_embeddings:
        # Else what a token leads to is itself, whatever attention says.
        model.get_input_embeddings().weight.data *= 0.02
    model.save_pretrained(folder)
    return model


def attention_impls(worker: Any) -> list[tuple[list[str], int]]:
    """Of a worker's layers the implementations and how many ranks share their keys.

    An implementation is named with its bases: vLLM derives that of cross-attention.
    """
    config = worker.vllm_config.compilation_config
    layers = config.static_forward_context.values()
    impls = [layer.impl for layer in layers if hasattr(layer, "impl")]
    return [
        ([base.__name__ for base in type(impl).__mro__], getattr(impl, "num_shares", 1))
        for impl in impls
    ]


@contextmanager
def engine(
    folder: str,
    num_attention_layers: int = SHAPE["num_hidden_layers"],
    backend: type = conch_attn.ConchAttentionBackend,
    **options: Any,
) -> Iterator[vllm.LLM]:
    """An engine whose every attention layer runs CONCH, or another backend."""
    llm = vllm.LLM(
        folder,
        attention_config={"backend": backend.get_name()},
        disable_log_stats=False,
        seed=0,
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "gpu_memory_utilization": 0.3,
            "max_model_len": 128,
            "max_num_batched_tokens": 128,
            "max_num_seqs": 4,
            "block_size": 16,
            "num_gpu_blocks_override": 64,
            "skip_tokenizer_init": True,
        }
        | options,
    )
    try:
        num_shares = options.get("decode_context_parallel_size", 1)
        name = backend.get_impl_cls().__name__
        for impls in llm.collective_rpc(attention_impls):
            assert len(impls) == num_attention_layers
            assert all(name in names for names, _ in impls), impls
            assert all(shared == num_shares for _, shared in impls), impls
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()  # a failed test keeps a reference
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: vllm.LLM, prompts: list[Any], count: int) -> list[list[int]]:
    """The tokens that vLLM generates greedily; prompts are tokens or vLLM's inputs."""
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
    )
    inputs = [
        {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt
        for prompt in prompts
    ]
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
