# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""CONCH: attention over a paged KV cache, cache write, fp8 quantisation, in Triton."""

from .reshape_and_cache import reshape_and_cache
from .scaled_fp8_quant import scaled_fp8_quant
from .schedule import VarlenSchedule
from .varlen_attention import varlen_attention

__all__ = [
    "VarlenSchedule",
    "reshape_and_cache",
    "scaled_fp8_quant",
    "varlen_attention",
]
