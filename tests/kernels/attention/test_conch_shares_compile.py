# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What joining shares of the keys compiles to on every supported GPU. Needs no GPU."""

import torch

from tests.kernels.attention.conch_compile import (
    TARGETS,
    compile_for,
    compile_on_all,
    resources,
)


def compile_one(name: str) -> dict[str, list]:
    """Two shares of 32 heads of 128 in bf16, weighted and joined."""
    from vllm.attention.ops.conch import shares
    from vllm.attention.ops.conch.checks import TensorSpec, signature

    def rows(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, 32, 128, dtype=torch.bfloat16)

    output, results, lses = rows(9), rows(2, 9), torch.zeros(2, 9, 32)
    target = TARGETS[name]
    specs = (TensorSpec(*signature(output)), TensorSpec(*signature(lses)))
    constants = shares.tile_constants(*specs)
    row_strides, lse_strides = (4096, 128), (9 * 32, (32, 1))
    found = {
        "count": compile_for(
            target, shares.count_keys_kernel,
            *(torch.zeros(9, dtype=torch.int32) for _ in range(3)), 8, 1,
            NUM_SHARES=2, RUN=1, CONTEXT=True, SEQUENCES=shares.SEQUENCES,
        ),
        "weigh": compile_for(
            target, shares.weigh_share_kernel,
            output, lses, row_strides, *lse_strides, 9, 1, **constants,
        ),
        "merge": compile_for(
            target, shares.merge_shares_kernel,
            output, lses[0], results, lses,
            row_strides, 32, 9 * 4096, row_strides, *lse_strides, 9,
            **constants, NUM_RESULTS=1,
        ),
    }  # fmt: skip
    return {kernel: list(resources(code)) for kernel, code in found.items()}


def test_kernels_compile_without_spills_and_read_wide() -> None:
    for name, kernels in compile_on_all(compile_one).items():
        for kernel, (_, spilled, _, loads, stores, *_) in kernels.items():
            assert spilled == 0, (name, kernel)
            if kernel != "count":
                wide = ("128", "dwordx4", "b128")
                for found in (loads, stores):
                    assert any(i.endswith(wide) for i in found), (name, kernel, found)
