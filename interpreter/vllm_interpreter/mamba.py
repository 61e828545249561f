# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Mamba 2's state-space recurrence, one token after the other.

For head h with state S [head_dim, state_size], in fp32 (Dao and Gu 2024):

    S = exp(dt * A) * S + dt * x B^T        y = S C + D * x        y = y * silu(z)
"""

import torch


def step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of one sequence.

    Args:
        state: [num_heads, head_dim, state_size].
        x: [num_heads, head_dim].
        dt: broadcasts to x, as A and D do; A also to state.
        A: see dt.
        B: [num_groups, state_size], a group for each num_heads / num_groups heads.
        C: like B.
        D: see dt; or None.
        z: like x, or None.

    Returns:
        The output, like x, and the new state.

    """
    heads_per_group = x.shape[0] // B.shape[0]
    B, C = (rows.float().repeat_interleave(heads_per_group, 0) for rows in (B, C))
    x, dt = x.float(), dt.float()[..., None]
    state = torch.exp(dt * A.float()) * state.float() + dt * (x[..., None] * B[:, None])
    y = (state * C[:, None]).sum(-1)
    if D is not None:
        y = y + D.float() * x
    if z is not None:
        y = y * torch.nn.functional.silu(z.float())
    return y, state


def scan(
    out: torch.Tensor,
    states: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> None:
    """Sequences of several tokens.

    Args:
        out: [num_tokens, num_heads, head_dim], written.
        states: [num_seqs, num_heads, head_dim, state_size], before and then after.
        x: like out.
        dt: [num_tokens, num_heads], ready for use.
        A: [num_heads].
        B: [num_tokens, num_groups, state_size].
        C: like B.
        D: [num_heads] or None.
        z: like out, or None.
        cu_seqlens: [num_seqs + 1] first token of each sequence.

    """
    A, D = A[:, None, None], None if D is None else D[:, None]
    starts = cu_seqlens.tolist()
    for sequence, (start, end) in enumerate(zip(starts, starts[1:])):
        for i in range(start, end):
            out[i], states[sequence] = step(
                states[sequence],
                x[i],
                dt[i][:, None],
                A,
                B[i],
                C[i],
                D,
                None if z is None else z[i],
            )


def update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    state_batch_indices: torch.Tensor | None,
    dst_state_batch_indices: torch.Tensor | None,
    null_block_id: int,
    out: torch.Tensor,
    num_accepted_tokens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """One token of each sequence.

    Args:
        state: [num_slots, num_heads, head_dim, state_size], updated.
        x: [num_seqs, num_heads, head_dim].
        dt: like x.
        A: [num_heads, head_dim, state_size].
        B: [num_seqs, num_groups, state_size].
        C: like B.
        D: [num_heads, head_dim] or None.
        z: like x, or None.
        dt_bias: like D.
        dt_softplus: dt is the softplus of what is given.
        state_batch_indices: [num_seqs] or [num_seqs, 1] slots to read; None: in order.
        dst_state_batch_indices: slots to write; None: the same.
        null_block_id: the slot of sequences that are padding.
        out: like x, written.
        num_accepted_tokens: of speculation, which this does not know.
        cu_seqlens: the same.

    """
    if num_accepted_tokens is not None or cu_seqlens is not None:
        raise NotImplementedError("the interpreter's Mamba takes single tokens only")
    sources = range(len(x))
    if state_batch_indices is not None:
        sources = state_batch_indices.flatten().tolist()
    targets = sources
    if dst_state_batch_indices is not None:
        targets = dst_state_batch_indices.flatten().tolist()
    for i, (source, target) in enumerate(zip(sources, targets)):
        if source == null_block_id:
            continue
        step_size = dt[i].float()
        if dt_bias is not None:
            step_size = step_size + dt_bias
        if dt_softplus:
            step_size = torch.nn.functional.softplus(step_size)
        out[i], state[target] = step(
            state[source],
            x[i],
            step_size,
            A,
            B[i],
            C[i],
            D,
            None if z is None else z[i],
        )
