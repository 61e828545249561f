# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""CUDA graphs with CONCH: metadata of a capture, replayed with other batches."""

from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    ON_GPU,
    poisoned_scratch,
)
from tests.kernels.attention.conch_reference import SENTINEL
from tests.v1.attention.conch_backend_harness import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    NUM_KV_HEADS,
    Engine,
    make_config,
)
from tests.v1.attention.conch_release import make_spec, run_layer
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends.conch_attn import ConchAttentionMetadataBuilder
from vllm.v1.attention.backends.conch_base import AttentionCGSupport


def capture(engine: Engine, num_reqs: int, num_tokens: int, uniform: bool) -> Any:
    """Metadata as for the capture of a graph of padded size num_reqs, num_tokens."""
    base, extra = divmod(num_tokens, num_reqs)
    lengths = [(base + (i < extra), 0) for i in range(num_reqs)]
    common = engine.fill(lengths)
    common.max_query_len = base if uniform else num_tokens
    common.max_seq_len = MAX_MODEL_LEN
    return engine.builder.build_for_cudagraph_capture(common)


# The first batch fills the list of work far beyond what the others need.
LARGE_REPLAYS = [
    [(41, 0), *[(17, 0)] * 7],
    [(160, 50)],
    [(1, 9)] * 8,
    [(41, 0), *[(17, 0)] * 7],
    [(1, 9), (2, 30)],
]
MIXED_REPLAYS = [
    [(40, 17)],
    [(1, 30), (1, 3), (1, 77), (1, 0)],
    [(1, 30), (20, 9), (1, 3)],
    [(8, 3), (2, 40), (16, 16), (1, 5)],
    [(5, 0), (6, 1)],
]


@pytest.mark.parametrize("window", [None, 16])
def test_mixed_graph_replays_any_batch(window: int | None) -> None:
    """A graph of 40 tokens serves every batch of up to so many, whatever its split.

    The launches keep what they were captured with; the step's build only fills the
    same buffers.
    """
    engine = Engine([{"sliding_window": window}], cudagraph_mode=CUDAGraphMode.FULL)
    captured = capture(engine, num_reqs=8, num_tokens=40, uniform=False)
    assert captured.seq_lens.tolist() == [1] * 8
    replay(engine, captured, MIXED_REPLAYS, num_reqs=8)


def test_mixed_graph_replays_unpadded_requests() -> None:
    """Some releases pad a mixed graph's tokens only: fewer rows than at capture."""
    engine = Engine(cudagraph_mode=CUDAGraphMode.FULL)
    captured = capture(engine, num_reqs=8, num_tokens=40, uniform=False)
    replay(engine, captured, MIXED_REPLAYS, num_reqs=None)


@pytest.mark.parametrize("num_reqs", [8, None])
def test_large_mixed_graph_replays_any_batch(num_reqs: int | None) -> None:
    engine = Engine(cudagraph_mode=CUDAGraphMode.FULL)
    captured = capture(engine, num_reqs=8, num_tokens=160, uniform=False)
    replay(engine, captured, LARGE_REPLAYS, num_reqs)


def test_small_mixed_graph_replays_any_batch() -> None:
    """Up to 16 tokens every batch takes the decode kernel alone."""
    engine = Engine(cudagraph_mode=CUDAGraphMode.FULL)
    captured = capture(engine, num_reqs=8, num_tokens=16, uniform=False)
    replay(engine, captured, [[(16, 9)], [(1, 3), (7, 30)], [(1, 99)]], num_reqs=8)


@pytest.mark.parametrize("num_speculative_tokens", [None, 3])
def test_decode_graph_replays_decodes(num_speculative_tokens: int | None) -> None:
    """Eight query heads a KV head: how they are packed depends on the query length."""
    engine = Engine(
        [{"num_heads": 8 * NUM_KV_HEADS}],
        num_speculative_tokens=num_speculative_tokens,
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
    )
    longest = 1 + (num_speculative_tokens or 0)
    captured = capture(engine, num_reqs=4, num_tokens=4 * longest, uniform=True)
    batches = [[(1, 30), (1, 3)], [(1, 0), (1, 99), (1, 16)]]
    if num_speculative_tokens:
        batches += [[(4, 30), (4, 3)], [(2, 20), (1, 9), (4, 50)]]
    replay(engine, captured, batches, num_reqs=4)


def replay(
    engine: Engine,
    captured: Any,
    batches: list[list[tuple[int, int]]],
    num_reqs: int | None,
) -> None:
    """Replays launches with the captured metadata for each batch.

    On a GPU a real CUDA graph; elsewhere the same calls, made with what was on the
    host at capture.
    """
    (layer,) = engine.layers
    num_tokens = captured.num_actual_tokens
    frozen = {key: copy(schedule) for key, schedule in captured.schedules.items()}
    captured = replace(captured, schedules=frozen)
    rows = engine.new_tokens(layer, num_tokens)
    output = torch.full_like(rows[0], SENTINEL)

    def launch() -> None:
        run_layer(layer, *rows, captured, output)

    if ON_GPU:
        launch()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        launch = graph.replay
    for lengths in batches:
        padded_reqs = 0 if num_reqs is None else num_reqs - len(lengths)
        padded_tokens = num_tokens - sum(query_len for query_len, _ in lengths)
        common = engine.fill(
            lengths, padded_reqs=padded_reqs, padded_tokens=padded_tokens
        )
        metadata = engine.builder.build(0, common)
        assert metadata.num_actual_tokens == num_tokens
        engine.fill_context(layer)
        for part, new in zip(rows, engine.new_tokens(layer, num_tokens)):
            part.copy_(new)
        output.fill_(SENTINEL)
        launch()
        engine.check_output(layer, rows[0], output, metadata)


@pytest.mark.skipif(
    not hasattr(ConchAttentionMetadataBuilder, "update_draft_decode_metadata"),
    reason="speculators of this release rebuild the metadata of every draft step",
)
def test_draft_steps_update_their_metadata() -> None:
    """A speculator advances seq_lens on the device and updates what it built once."""
    engine = Engine(num_speculative_tokens=3)
    assert engine.builder.supports_draft_decode_metadata_update
    metadata = engine.builder.build(0, engine.fill([(1, 13), (1, 40), (1, 0)]))
    # Pages for all that the sequences will grow to.
    pages = torch.arange(1, 25, dtype=torch.int32, device=DEVICE).view(3, 8)
    engine.block_table[:3, :8] = pages
    for _ in range(3):
        engine.seq_lens[:3] += 17
        last = (engine.seq_lens[:3] - 1).long()
        page = pages.gather(1, (last // BLOCK_SIZE)[:, None])[:, 0]
        engine.slot_mapping[:3] = page * BLOCK_SIZE + last % BLOCK_SIZE
        engine.builder.update_draft_decode_metadata(metadata)
        engine.check(engine.layers[0], metadata)


def test_every_cuda_graph_mode_is_supported() -> None:
    support = ConchAttentionMetadataBuilder.get_cudagraph_support(
        make_config(), make_spec(16, 1, 32, torch.float16)
    )
    assert support == AttentionCGSupport.ALWAYS


def test_images_keep_out_of_graphs_of_mixed_batches() -> None:
    """Such graphs are captured without images: theirs would be seen causally."""
    config = make_config()
    config.model_config.is_mm_prefix_lm = True
    support = ConchAttentionMetadataBuilder.get_cudagraph_support(
        config, make_spec(16, 1, 32, torch.float16)
    )
    assert support == AttentionCGSupport.UNIFORM_BATCH


def test_dummy_batches_stay_within_block_tables() -> None:
    """A dummy run may claim sequences longer than the model's length."""
    engine = Engine()
    common = engine.fill([(1, 3), (1, 9)])
    common.seq_lens.fill_(4 * MAX_MODEL_LEN)
    common.max_seq_len = 4 * MAX_MODEL_LEN
    metadata = engine.builder.build(0, common)
    longest = engine.block_table.shape[1] * BLOCK_SIZE
    assert metadata.seq_lens.tolist() == [longest] * 2
