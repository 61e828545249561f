# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The keys and values of a batch itself, read as a paged KV cache without a copy."""

import torch

from vllm.v1.attention.backends.conch_base import PAGE_MULTIPLE


def pages_of_batch(rows: torch.Tensor) -> torch.Tensor:
    """K or V of a batch, seen as a paged cache that is not copied.

    Pages overlap: page i holds the PAGE_MULTIPLE tokens from token i on, so that a
    sequence that begins at any token begins with a page of its own.

    Args:
        rows: [num_tokens, num_kv_heads, head_size], any strides.

    Returns:
        [num_pages, PAGE_MULTIPLE, num_kv_heads, head_size]. Pages near the end are
        not counted, as not all of their slots exist; kernels that read no slot past
        a sequence's end find the others there.

    """
    # A tensor needs two pages for its stride from one to the next to count.
    missing = PAGE_MULTIPLE + 1 - rows.shape[0]
    if missing > 0:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, missing))
    return rows.unfold(0, PAGE_MULTIPLE, 1).movedim(-1, 1)


class BatchPages:
    """Lengths and block table with which a batch's own K and V are a paged cache.

    Written anew for each batch into buffers that CUDA graphs can keep, all of them:
    vLLM's sleep mode may have discarded what was there.
    """

    def __init__(self, max_num_seqs: int, max_len: int, device: torch.device) -> None:
        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        max_pages = -(-max_len // PAGE_MULTIPLE)
        self.first_tokens = integers(max_pages)  # of a sequence's pages
        self.seq_lens = integers(max_num_seqs)
        self.block_table = integers(max_num_seqs, max_pages)

    def update(
        self, query_start_loc: torch.Tensor, max_query_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """seq_lens and block_table for `pages_of_batch`: all of a sequence is query."""
        num_seqs = query_start_loc.shape[0] - 1
        starts, ends = query_start_loc[:-1], query_start_loc[1:]
        seq_lens = self.seq_lens[:num_seqs]
        block_table = self.block_table[:num_seqs]
        num_pages = -(-max_query_len // PAGE_MULTIPLE)
        first_tokens = self.first_tokens[:num_pages]
        torch.sub(ends, starts, out=seq_lens)
        end = len(first_tokens) * PAGE_MULTIPLE
        torch.arange(0, end, PAGE_MULTIPLE, out=first_tokens)
        torch.add(starts[:, None], first_tokens, out=block_table[:, :num_pages])
        return seq_lens, block_table
