# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Ranges of images that a model drops from metadata after it is built."""

import pytest

from tests.v1.attention.conch_backend_harness import BATCHES, Engine
from tests.v1.attention.conch_release import build_with_images


@pytest.mark.parametrize("layer", [{}, {"sliding_window": 16}], ids=str)
def test_ranges_are_dropped(layer: dict[str, int]) -> None:
    """As Gemma 4 does for layers with full attention, which see in one direction."""
    engine = Engine([layer])
    images = {1: [(2, 20), (22, 30)], 3: [(5, 36)]}
    common = engine.fill(BATCHES["mixed"])
    metadata = build_with_images(engine.builder, common, images, 1)
    for _ in range(2):
        engine.check(engine.layers[0], metadata)
        metadata.mm_prefix_range = None
    engine.step(BATCHES["mixed"])
