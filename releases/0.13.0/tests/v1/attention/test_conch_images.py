# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Ranges of images that the engine adds to metadata after it is built."""

import pytest

from tests.v1.attention.conch_backend_harness import BATCHES, Engine
from tests.v1.attention.conch_release import build_with_images
from vllm.v1.attention.backends.conch_attn import ConchAttentionMetadata


def test_schedules_are_updated_once_for_all_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranges = []
    update = ConchAttentionMetadata.update_schedules

    def count(metadata: ConchAttentionMetadata) -> None:
        ranges.append(metadata.mm_prefix_range)
        update(metadata)

    monkeypatch.setattr(ConchAttentionMetadata, "update_schedules", count)
    engine = Engine([{}, {}, {}])
    common = engine.fill(BATCHES["mixed"])
    images = {0: [], 2: [(0, 1)], 3: [(4, 9), (20, 30)], 7: [(3, 5)]}
    metadata = build_with_images(engine.builder, common, images, len(engine.layers))
    assert metadata.mm_prefix_range.tolist() == [
        [[0, 0], [0, 0]],
        [[0, 0], [0, 0]],
        [[0, 1], [0, 0]],
        [[4, 9], [20, 30]],
    ]
    assert ranges == [None, metadata.mm_prefix_range]

    del ranges[:]
    build_with_images(engine.builder, common, {1: []}, len(engine.layers))
    assert ranges == [None]
