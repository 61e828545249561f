# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Families of models that ask different things of attention, in vLLM's engine.

Tiny random models in fp32; greedy tokens equal Hugging Face's. Each has a check that
the model needs the feature which it is here for: without it the tokens are others.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel

from tests.v1.e2e.general.conch_engine import (
    ON_GPU,
    SHAPE,
    VOCABULARY,
    engine,
    expected_tokens,
    generate,
    random_prompts,
    save,
)
from vllm import ModelRegistry
from vllm.model_executor.models import registry

WINDOW = 24
NUM_TOKENS = 6
# More than a step takes; the longest is several windows long.
PROMPT_LENGTHS = (70, 17, 41)


@dataclass
class Family:
    """A model's classes in transformers, its configuration and what it is here for.

    Attributes:
        name: what model and configuration class have before ForCausalLM and Config.
        config: the configuration.
        forget: takes the feature away from Hugging Face's model, so that it
            generates something else; None where there is no such way.
        config_class: the configuration class, where it has another name.
        num_attention_layers: layers that CONCH runs.
        attention: Hugging Face's, where its plain one is not to be had.

    """

    name: str
    config: dict[str, Any]
    forget: Callable[[PreTrainedModel], None] | None = None
    config_class: str = ""
    num_attention_layers: int = 2
    attention: str = "eager"

    @property
    def classes(self) -> tuple[type, type]:
        config = self.config_class or f"{self.name}Config"
        return (
            getattr(transformers, f"{self.name}ForCausalLM"),
            getattr(transformers, config),
        )


def without(**changes: Any) -> Callable[[PreTrainedModel], None]:
    """Sets attributes of the configuration, and of modules that copied them."""

    def forget(model: PreTrainedModel) -> None:
        for name, value in changes.items():
            setattr(model.config, name, value)
            for module in model.modules():
                if hasattr(module, name):
                    setattr(module, name, value)

    return forget


def without_window(model: PreTrainedModel) -> None:
    without(sliding_window=10**6)(model)


CPU_LAYERS = "vllm.model_executor.layers.mamba.ops.cpu"


def without_alibi(model: PreTrainedModel) -> None:
    build = model.transformer.build_alibi_tensor

    def build_none(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(build(*args, **kwargs))

    model.transformer.build_alibi_tensor = build_none


def without_sinks(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-100.0)


NO_HEAD_DIM = {name: size for name, size in SHAPE.items() if name != "head_dim"}
LAYER_TYPES = ["sliding_attention", "full_attention"]
GEMMA = SHAPE | {
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
}

FAMILIES = {
    "llama": Family("Llama", SHAPE),
    "qwen3": Family("Qwen3", SHAPE),
    "mistral": Family("Mistral", SHAPE | {"sliding_window": WINDOW}, without_window),
    "gemma2 window": Family(
        "Gemma2", GEMMA | {"attn_logit_softcapping": 2.0}, without_window
    ),
    "gemma2 softcap": Family(
        "Gemma2",
        GEMMA | {"attn_logit_softcapping": 2.0},
        without(attn_logit_softcapping=None),
    ),
    "gemma3": Family(
        "Gemma3",
        GEMMA | {"layer_types": LAYER_TYPES},
        without_window,
        config_class="Gemma3TextConfig",
    ),
    "bloom": Family(  # ALiBi
        "Bloom",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        without_alibi,
    ),
    "falcon": Family(  # ALiBi, scaled with the scores
        "Falcon",
        NO_HEAD_DIM
        | {
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "new_decoder_architecture": False,
            "bias": True,
        },
        attention="sdpa",  # the other of some releases adds the slopes twice
    ),
    "gpt-oss": Family(  # sinks
        "GptOss",
        SHAPE
        | {
            "sliding_window": WINDOW,
            "layer_types": LAYER_TYPES,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        without_sinks,
    ),
    "llama4": Family(  # chunks: tokens see none of the chunks before
        "Llama4",
        SHAPE
        | {
            "intermediate_size_mlp": 128,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 32,
            "interleave_moe_layer_step": 10,  # no experts
            "floor_scale": 16,
        },
        without(attention_chunk_size=10**6),
        config_class="Llama4TextConfig",
    ),
    "gemma3n": Family(  # the last two layers attend to what others have cached
        "Gemma3n",
        GEMMA
        | {
            "num_hidden_layers": 4,
            "layer_types": LAYER_TYPES * 2,
            "num_kv_shared_layers": 2,
            "intermediate_size": [128] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 2,
            "laurel_rank": 8,
        },
        without_window,
        config_class="Gemma3nTextConfig",
        num_attention_layers=4,
    ),
    "granite hybrid": Family(  # a layer of Mamba 2
        "GraniteMoeHybrid",
        NO_HEAD_DIM
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "shared_intermediate_size": 128,
            "num_local_experts": 0,
            "attention_multiplier": 0.25,
            "mamba_n_heads": 8,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
        num_attention_layers=1,
    ),
    "phi3": Family(  # heads of 96
        "Phi3",
        NO_HEAD_DIM
        | {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "lfm2": Family(  # a layer without attention, whose state makes pages of 208
        "Lfm2",
        NO_HEAD_DIM
        | {
            "layer_types": ["conv", "full_attention"],
            # On a GPU vLLM's kernel of convolutions reaches back few tokens.
            "conv_L_cache": 3 if ON_GPU else 200,
            "conv_dim": 64,
            "block_dim": 64,
            "block_ff_dim": 128,
            "block_multiple_of": 1,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
        },
        num_attention_layers=1,
    ),
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # vLLM looks at an unknown model's class in a process of its own: many seconds.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())


def skip_unless_supported(model_class: type[PreTrainedModel]) -> None:
    if model_class.__name__ not in ModelRegistry.get_supported_archs():
        pytest.skip(f"this release of vLLM has no {model_class.__name__}")


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model_class, config_class = family.classes
    skip_unless_supported(model_class)
    if find_spec(CPU_LAYERS) is None:
        if name in ("lfm2", "granite hybrid") and not ON_GPU:
            pytest.skip("this release has no recurrent layers for CPUs")
        if name == "gemma3n":
            pytest.skip("this release does not load the weights' names")
    config = config_class(**family.config)
    model = save(model_class, config, tmp_path, family.attention)
    prompts = random_prompts(*PROMPT_LENGTHS)
    expected = expected_tokens(model, prompts, NUM_TOKENS)
    others = [prompt[:5] + prompt[-5:] for prompt in prompts]
    assert expected_tokens(model, others, NUM_TOKENS) != expected
    with engine(
        str(tmp_path),
        family.num_attention_layers,
        max_num_batched_tokens=48,
    ) as llm:
        assert generate(llm, prompts, NUM_TOKENS) == expected
        if name == "lfm2" and not ON_GPU:
            block_size = llm.llm_engine.vllm_config.cache_config.block_size
            assert block_size & (block_size - 1) != 0
    if family.forget is not None:
        family.forget(model)
        assert expected_tokens(model, prompts, NUM_TOKENS) != expected


# ---- Masks that Hugging Face's models of the same layers do not have


def expected_with_mask(
    model: PreTrainedModel,
    prompts: list[list[int]],
    count: int,
    visible: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    layer_type: str | None = None,
) -> list[list[int]]:
    """What Hugging Face generates if queries see what a function says.

    Args:
        model: its plain attention adds the mask to the logits.
        prompts: the prompts.
        count: tokens to generate.
        visible: from positions of queries [N, 1] and of keys [N] and the prompt's
            length, which of the keys up to its own a query sees.
        layer_type: which layers have the mask; the others are causal. None: all.

    """
    results = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        for _ in range(count):
            position = torch.arange(tokens.shape[1])
            causal = position[:, None] >= position
            seen = causal & visible(position[:, None], position, len(prompt))
            causal, seen = (
                torch.where(mask, 0.0, float("-inf"))[None, None]
                for mask in (causal, seen)
            )
            mask: Any = seen
            if layer_type is not None:
                mask = {layer_type: seen, "full_attention": causal}
            with torch.no_grad():
                logits = model(tokens, attention_mask=mask, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        results.append(tokens[0, len(prompt) :].tolist())
    return results


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_reference_sliding_window(tmp_path: Path) -> None:
    """R-SWA: generated tokens see the prompt and the last 8; pages between go."""
    if "UnlimitedOCRForCausalLM" not in ModelRegistry.get_supported_archs():
        pytest.skip("this release has no model with R-SWA")
    window, count = 8, 37
    config = transformers.LlamaConfig(**SHAPE)
    model = save(transformers.LlamaForCausalLM, config, tmp_path)
    # Unlimited-OCR's language model without experts is Llama's.
    change_config(
        tmp_path,
        architectures=["DeepseekForCausalLM"],
        rswa_window=window,
        n_routed_experts=1,  # in no layer
        first_k_dense_replace=SHAPE["num_hidden_layers"],
        moe_layer_freq=1,
    )
    prompts = random_prompts(20, 5)

    def visible(query: torch.Tensor, key: torch.Tensor, prompt: int) -> torch.Tensor:
        return (key < prompt) | (query - key < window)

    expected = expected_with_mask(model, prompts, count, visible)
    assert expected_tokens(model, prompts, count) != expected
    with engine(
        str(tmp_path), max_num_batched_tokens=24, enable_prefix_caching=False
    ) as llm:
        assert generate(llm, prompts, count) == expected


def test_chunks_with_lookback(tmp_path: Path) -> None:
    """Rnj-1: tokens see their chunk and the one before; other layers see all."""
    if "Rnj1ForCausalLM" not in ModelRegistry.get_supported_archs():
        pytest.skip("this release has no Rnj-1")
    layer_types = ["chunked_attention", "full_attention"]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.Gemma3TextConfig(
        **GEMMA
        | {
            "layer_types": layer_types,
            "rope_parameters": dict.fromkeys(layer_types, rope),
        }
    )
    model = save(transformers.Gemma3ForCausalLM, config, tmp_path)
    change_config(tmp_path, architectures=["Rnj1ForCausalLM"])
    prompts = random_prompts(*PROMPT_LENGTHS)
    chunk = WINDOW // 2

    def visible(query: torch.Tensor, key: torch.Tensor, prompt: int) -> torch.Tensor:
        return query // chunk - key // chunk <= 1

    def in_window(query: torch.Tensor, key: torch.Tensor, prompt: int) -> torch.Tensor:
        return query - key < WINDOW

    expected, windowed = (
        expected_with_mask(model, prompts, NUM_TOKENS, rule, layer_types[0])
        for rule in (visible, in_window)
    )
    assert windowed != expected
    with engine(str(tmp_path), max_num_batched_tokens=48) as llm:
        assert generate(llm, prompts, NUM_TOKENS) == expected


# ---- Whisper: the decoder attends to itself and to an encoder

WHISPER_TOKENS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>"]
SAMPLING_RATE = 16000


def save_processor(folder: Path) -> transformers.WhisperProcessor:
    """A processor for a second of audio, whose tokens are bytes and WHISPER_TOKENS."""
    tokens = [*sorted(ByteLevel.alphabet()), *WHISPER_TOKENS]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = transformers.WhisperTokenizer(
        str(vocabulary),
        str(merges),
        additional_special_tokens=WHISPER_TOKENS[1:],
    )
    extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
    processor = transformers.WhisperProcessor(extractor, tokenizer)
    processor.save_pretrained(folder)
    return processor


def test_whisper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder's 50 states are more than a model of 32 tokens has."""
    # Some releases want librosa even for audio that has the right rate.
    resample = "vllm.multimodal.audio.resample_audio_librosa"
    monkeypatch.setattr(resample, lambda audio, **_: audio, raising=False)
    model_class = transformers.WhisperForConditionalGeneration
    skip_unless_supported(model_class)
    processor = save_processor(tmp_path)
    end, start = processor.tokenizer.convert_tokens_to_ids(WHISPER_TOKENS[:2])
    config = transformers.WhisperConfig(
        vocab_size=272,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50,
        max_target_positions=32,
        init_std=0.3,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
    )
    torch.manual_seed(1)
    model = model_class._from_config(config, attn_implementation="eager").float().eval()
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(tmp_path)

    random = np.random.default_rng(0)
    prompts = [[start, *prompt] for prompt in random_prompts(3, 19, 1)]
    audios = [
        random.standard_normal(length).astype(np.float32)
        for length in (SAMPLING_RATE, 9000, 12000)
    ]

    def expected(audios: list[np.ndarray]) -> list[list[int]]:
        results = []
        for audio, prompt in zip(audios, prompts):
            features = processor.feature_extractor(
                audio, sampling_rate=SAMPLING_RATE, return_tensors="pt"
            ).input_features
            tokens = torch.tensor([prompt])
            for _ in range(NUM_TOKENS):
                with torch.no_grad():
                    logits = model(
                        input_features=features,
                        decoder_input_ids=tokens,
                        use_cache=False,
                    ).logits[0, -1]
                tokens = torch.cat([tokens, logits.argmax().view(1, 1)], dim=1)
            results.append(tokens[0, len(prompt) :].tolist())
        return results

    inputs = [
        {
            "encoder_prompt": {
                "prompt": "",
                "multi_modal_data": {"audio": (audio, SAMPLING_RATE)},
            },
            "decoder_prompt": {"prompt_token_ids": prompt},
        }
        for audio, prompt in zip(audios, prompts)
    ]
    with engine(
        str(tmp_path),
        num_attention_layers=4,
        skip_tokenizer_init=False,
        max_model_len=32,
        max_num_batched_tokens=64,
        limit_mm_per_prompt={"audio": 1},
    ) as llm:
        assert generate(llm, inputs, NUM_TOKENS) == expected(audios)
    assert expected(audios[::-1]) != expected(audios)
