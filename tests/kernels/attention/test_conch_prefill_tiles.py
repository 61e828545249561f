# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tiles of keys of every size against pages of every size, by pointer and in boxes."""

import importlib

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    INTERPRETED,
    check,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
    with_tiles,
)
from tests.kernels.attention.conch_reference import LAYOUTS

attention = importlib.import_module("vllm.attention.ops.conch.varlen_attention")
OPTIONS = [{}, {"sliding_window": 37}, {"causal": False}]
# Prefills with contexts, with keys that no tile holds whole, and a decode.
PREFILLS = [(1, 129), (40, 150), (20, 20), (70, 71)]
needs_tma = pytest.mark.skipif(
    not INTERPRETED
    and (torch.version.cuda is None or torch.cuda.get_device_capability() < (9, 0)),
    reason="needs a GPU with TMA, or TRITON_INTERPRET=1",
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("block_size", [16, 48, 64, 80])
@pytest.mark.parametrize("tile, masked_tile", [(32, None), (64, None), (64, 16)])
def test_tiles_against_pages(tile, masked_tile, block_size, options):
    """A tile is part of a page, some whole pages, or begins and ends in two."""
    for lengths in [(1, 150), (1, 65), (4, 63)], PREFILLS:
        batch = make_batch(lengths, num_kv_heads=1, block_size=block_size, **options)
        schedule = make_schedule(batch, num_workers=3, portable=True)
        check(batch, update(with_tiles(schedule, tile, masked_tile), batch))


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The caches that prefill has read in boxes."""
    caches: list[torch.Tensor] = []
    describe = attention.describe_pages

    def recording(cache, *box):
        caches.append(cache)
        return describe(cache, *box)

    monkeypatch.setattr(attention, "describe_pages", recording)
    return caches


def check_boxes(batch, described, tile=16, masked_tile=None, halves=False) -> bool:
    """Whether prefill reads both caches in boxes; fails if the result is wrong."""
    described.clear()
    schedule = make_schedule(batch, portable=True)
    with_tiles(schedule, tile, masked_tile, boxes=True, halves=halves)
    check(batch, update(schedule, batch))
    assert len(described) in (0, 2)
    return bool(described)


@needs_tma
@pytest.mark.parametrize("options", [*OPTIONS, {"softcap": 3.0}])
@pytest.mark.parametrize(
    "block_size, tile, masked_tile",
    [(16, 16, None), (48, 16, None), (64, 32, 16), (64, 64, 32)],
)
def test_boxes_within_pages(block_size, tile, masked_tile, options, described):
    """Unused slots hold NaN, and entries of the block table for no page are huge."""
    options = options | {"block_size": block_size, "dtype": torch.float16}
    batch = make_batch(PREFILLS, **options)
    assert check_boxes(batch, described, tile, masked_tile)


@needs_tma
@pytest.mark.parametrize("head_size", [16, 24, 64, 80])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_of_layouts(layout, head_size, described):
    """Also with heads behind which a box goes on: that reads as 0."""
    options = {"layout": layout, "head_size": head_size, "dtype": torch.float16}
    assert check_boxes(make_batch(PREFILLS, **options), described)


@needs_tma
def test_boxes_of_one_head_and_one_page(described):
    batch = make_batch([(20, 20)], num_kv_heads=1, block_size=32, dtype=torch.float16)
    assert check_boxes(batch, described)


@pytest.mark.parametrize("halves", [False, True])
def test_what_boxes_cannot_read(halves, described):
    """Strides or addresses of odd multiples of 2 bytes: pointers do, from the start
    and after a call that used boxes, in tiles with as many rows or half as many."""
    batch = make_batch(PREFILLS, dtype=torch.float16)
    if INTERPRETED:
        assert check_boxes(batch, described, halves=halves)

    def copy(cache: torch.Tensor, width: int, offset: int) -> torch.Tensor:
        wide = torch.full((*cache.shape[:3], width), torch.nan).to(cache)
        return wide[..., offset : offset + cache.shape[3]].copy_(cache)

    width = batch.key_cache.shape[3] + 8
    for name in ("key_cache", "value_cache"):
        cache = getattr(batch, name)
        for changed in (copy(cache, width, 1), copy(cache, width + 1, 0)):
            setattr(batch, name, changed)
            assert not check_boxes(batch, described, halves=halves)
        setattr(batch, name, copy(cache, width, 0))
        if INTERPRETED:
            assert check_boxes(batch, described, halves=halves)
        setattr(batch, name, cache)
