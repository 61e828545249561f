# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What CONCH says it supports, and how it refuses the rest."""

import inspect
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    poisoned_scratch,
)
from tests.v1.attention.conch_backend_harness import (
    HEAD_SIZE,
    Engine,
    needs_rswa,
    selector_config,
)
from tests.v1.attention.conch_release import AttentionSelectorConfig
from vllm.config.cache import CacheDType
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.conch_attn import (
    ConchAttentionBackend,
    ConchAttentionImpl,
    ConchAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.conch_base import TOKEN_HEAD_FORMATS, AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec

SUPPORTED = [
    {"head_size": head_size} for head_size in (16, 64, 80, 96, 112, 128, 256, 512)
] + [
    {"block_size": block_size} for block_size in (None, 16, 48, 128, 528, 784, 1056)
] + [
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float32},
    {"kv_cache_dtype": None},
    {"kv_cache_dtype": "fp8"},
    {"kv_cache_dtype": "fp8_e4m3"},
    {"kv_cache_dtype": "fp8_e5m2"},
    {"kv_cache_dtype": "bfloat16", "dtype": torch.bfloat16},
    *({"kv_cache_dtype": name} for name in TOKEN_HEAD_FORMATS),
    {"has_sliding_window": True},
    {"use_non_causal": True},
    {"use_kv_connector": True},
    {"use_adaptive_verification": True},
    {"use_dcp": True},
    {"use_batch_invariant": True},
    {"has_sink": True},
    {"use_rswa": True},
    {"use_mm_prefix": True},
    {"attn_type": AttentionType.DECODER},
    {"attn_type": AttentionType.ENCODER},
    {"attn_type": AttentionType.ENCODER_ONLY},
    {"attn_type": AttentionType.ENCODER_DECODER},
]  # fmt: skip

UNSUPPORTED = [
    ({"head_size": 8}, "head_size 8 not supported: it must be from 16 to 512"),
    ({"head_size": 576}, "head_size 576 not supported: it must be from 16 to 512"),
    ({"block_size": 24}, "block_size 24 not supported: it must be a multiple of 16"),
    ({"dtype": torch.float64}, "dtype torch.float64 not supported"),
    ({"kv_cache_dtype": "fp8_inc"}, "kv_cache_dtype fp8_inc not supported"),
    *(
        ({"kv_cache_dtype": name}, f"kv_cache_dtype {name} not supported")
        for name in ("int8_per_token_head", "int4_per_token_head")
        if name not in TOKEN_HEAD_FORMATS
    ),
    (
        {"kv_cache_dtype": "bfloat16"},
        "kv_cache_dtype bfloat16 not supported with dtype torch.float16",
    ),
    ({"use_mla": True}, "MLA not supported"),
    ({"use_sparse": True}, "sparse not supported"),
    ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
    ({"use_pcp": True}, "PCP not supported"),
    ({"attn_type": "prefix"}, "attention type prefix not supported"),
]


@pytest.mark.parametrize("changes", SUPPORTED, ids=str)
def test_supported_configurations(changes: dict[str, Any]) -> None:
    assert (
        ConchAttentionBackend.validate_configuration(**selector_config(**changes)) == []
    )


@pytest.mark.parametrize(("changes", "reason"), UNSUPPORTED, ids=str)
def test_unsupported_configurations(changes: dict[str, Any], reason: str) -> None:
    config = selector_config(**changes)
    if not changes.keys() <= config.keys():
        pytest.skip("this release does not ask for it")
    (only,) = ConchAttentionBackend.validate_configuration(**config)
    assert reason in only


def test_every_question_of_the_selector_is_asked_above() -> None:
    """A release that asks for something new has to be answered for."""
    asked = {name for changes in SUPPORTED for name in changes}
    asked |= {name for changes, _ in UNSUPPORTED for name in changes}
    assert asked >= set(AttentionSelectorConfig._fields)


def test_every_cache_format_is_taken_or_refused() -> None:
    for kv_cache_dtype in get_args(CacheDType):
        dtype = getattr(torch, kv_cache_dtype, torch.float16)
        dtype = dtype if dtype.itemsize == 2 else torch.float16
        config = selector_config(kv_cache_dtype=kv_cache_dtype, dtype=dtype)
        reasons = ConchAttentionBackend.validate_configuration(**config)
        taken = kv_cache_dtype in ConchAttentionBackend.supported_kv_cache_dtypes
        named = [f"kv_cache_dtype {kv_cache_dtype} not" in reason for reason in reasons]
        assert named == ([] if taken else [True])


@pytest.mark.skipif(
    "head_size_v" not in inspect.signature(FullAttentionSpec).parameters,
    reason="with this release all layers have K and V of one size",
)
def test_keys_and_values_of_two_sizes_are_refused() -> None:
    engine = Engine()
    spec = replace(engine.builder.kv_cache_spec, head_size_v=HEAD_SIZE // 2)
    with pytest.raises(ValueError, match="head_size_v .* differs from head_size"):
        ConchAttentionMetadataBuilder(
            spec, ["layer.0"], engine.config, torch.device(DEVICE)
        )


def test_all_reasons_at_once() -> None:
    expected = {}
    for changes, reason in UNSUPPORTED:
        (name, *_) = changes
        if name in selector_config() and reason not in expected.values():
            expected[name] = (changes[name], reason)
    config = selector_config(**{name: value for name, (value, _) in expected.items()})
    reasons = ConchAttentionBackend.validate_configuration(**config)
    expected.pop("kv_cache_dtype")  # refused for itself, not with its dtype
    for _, reason in expected.values():
        assert any(reason in one for one in reasons), (reason, reasons)
    assert len(reasons) == len(set(reasons))


@pytest.mark.parametrize(
    ("capability", "changes", "reason"),
    [
        ((7, 5), {"dtype": torch.bfloat16}, "compute capability 8.0"),
        ((8, 0), {"kv_cache_dtype": "fp8"}, None),
        ((7, 5), {"kv_cache_dtype": "fp8_e4m3"}, None),
        ((8, 9), {"kv_cache_dtype": "fp8_e4m3"}, None),
        ((8, 0), {"kv_cache_dtype": "fp8_e5m2"}, None),
        ((7, 5), {"dtype": torch.float16}, None),
    ],
)
def test_what_a_cuda_device_lacks(
    capability: tuple[int, int],
    changes: dict[str, Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    config = selector_config(**changes)
    config["device_capability"] = DeviceCapability(*capability)
    reasons = ConchAttentionBackend.validate_configuration(**config)
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]


def test_layer_refuses_with_every_reason() -> None:
    """What the selector does not see is refused when the layer is made."""
    engine = Engine()
    with pytest.raises(ValueError) as error:
        engine.make_impl(
            "fp8_inc",
            attn_type="prefix",
            attention_bias=torch.zeros(1),
        )
    for reason in (
        "kv_cache_dtype fp8_inc not supported",
        "attention type prefix not supported",
        "attention_bias not supported",
        "--attention-backend",
    ):
        assert reason in str(error.value)


def test_layer_refuses_unknown_arguments() -> None:
    with pytest.raises(ValueError, match="attention_bias not supported"):
        Engine().make_impl("auto", attention_bias=True)


def test_layer_accepts_arguments_that_ask_for_nothing() -> None:
    Engine().make_impl("auto", sinks=None)


@pytest.mark.parametrize("sees_images", [False, True])
def test_layer_refuses_microbatches_of_images(sees_images: bool) -> None:
    """The engine gives the parts of a batch the ranges of none, or of all."""
    engine = Engine()
    engine.config.parallel_config.enable_dbo = True
    engine.config.model_config.is_mm_prefix_lm = sees_images
    if not sees_images:
        engine.make_impl("auto")
        return
    with pytest.raises(ValueError, match="enable-dbo.* not supported with images"):
        engine.make_impl("auto")


def test_layer_refuses_prefill_context_parallelism(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create = ConchAttentionImpl.__new__

    def create_on_two_ranks(cls: type, *args: Any, **kwargs: Any) -> Any:
        impl = create(cls, *args, **kwargs)
        impl.pcp_world_size = 2
        return impl

    monkeypatch.setattr(ConchAttentionImpl, "__new__", create_on_two_ranks)
    with pytest.raises(ValueError, match="PCP.* not supported"):
        Engine()


@needs_rswa
def test_rswa_refuses_what_would_not_be_it() -> None:
    engine = Engine(rswa_window=24)
    with pytest.raises(ValueError, match="only one of sliding_window 16"):
        engine.make_impl("auto", sliding_window=16)
    engine.config.attention_config.use_non_causal = True
    with pytest.raises(ValueError, match="non-causal attention with R-SWA"):
        engine.make_impl("auto")

    config = selector_config(use_rswa=True, use_non_causal=True)
    (reason,) = ConchAttentionBackend.validate_configuration(**config)
    assert reason == "non-causal attention with R-SWA not supported"
