# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers that see several positions for each token that vLLM schedules.

As the causal encoder of Voxtral has them: lengths and slots of a step count tokens, and
the layer's builder makes positions of them.
"""

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    poisoned_scratch,
)
from tests.v1.attention import conch_backend_harness
from tests.v1.attention.conch_backend_harness import (
    BLOCK_SIZE,
    HEAD_SIZE,
    NUM_KV_HEADS,
    Engine,
)
from tests.v1.attention.conch_release import make_spec
from vllm.model_executor.models.whisper_causal import (
    create_whisper_attention_backend_with_block_pooling,
)
from vllm.v1.attention.backends.conch_attn import ConchAttentionBackend

POOL = 4  # positions of a token


@pytest.mark.parametrize(
    "lengths, is_decode",
    [
        ([(4, 40), (4, 0), (4, 120)], True),
        ([(4, 40), (20, 12), (40, 0)], False),
        ([(160, 0)], False),  # more positions than a step has tokens
    ],
)
@pytest.mark.parametrize("window", [None, 30])
def test_positions_of_tokens(
    window: int | None,
    lengths: list[tuple[int, int]],
    is_decode: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pooled = create_whisper_attention_backend_with_block_pooling
    backend = pooled(ConchAttentionBackend, POOL)
    impl_cls = backend.get_impl_cls()
    monkeypatch.setattr(conch_backend_harness, "ConchAttentionImpl", impl_cls)
    engine = Engine([{"sliding_window": window} if window else {}])
    (layer,) = engine.layers
    layer.block_pool_size = POOL
    layer.kv_sharing_target_layer_name = None
    engine.config.scheduler_config.max_num_batched_tokens = 100
    spec = make_spec(BLOCK_SIZE // POOL, NUM_KV_HEADS, HEAD_SIZE, engine.dtype)
    device = torch.device(DEVICE)
    builder = backend.get_builder_cls()(spec, ["layer.0"], engine.config, device)
    positions = engine.fill(lengths)
    tokens = positions.replace(
        query_start_loc=positions.query_start_loc // POOL,
        query_start_loc_cpu=positions.query_start_loc_cpu // POOL,
        seq_lens=positions.seq_lens // POOL,
        slot_mapping=positions.slot_mapping[::POOL] // POOL,
        num_actual_tokens=positions.num_actual_tokens // POOL,
        max_query_len=positions.max_query_len // POOL,
        max_seq_len=positions.max_seq_len // POOL,
    )
    metadata = builder.build(0, tokens)
    # What the host knows of decodes, a CUDA graph could keep for others.
    assert (metadata.host_lengths is None) == is_decode
    engine.check(layer, metadata)
