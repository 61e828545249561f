# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The platform itself, for every vLLM release that this repository supports."""

from typing import Any

import torch

from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability
from vllm_interpreter import mamba

# The GPU that backends are to believe in when they say what they support.
CAPABILITY = DeviceCapability(9, 0)

# Ops of vLLM's compiled CPU build that activation layers look up when they are made.
# They are not called: the layers run in plain PyTorch.
ACTIVATIONS = (
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "gelu_new",
    "gelu_fast",
    "gelu_quick",
)


def convolve_next(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    conv_state_indices: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    pad_slot_id: int,
) -> torch.Tensor:
    """A causal convolution's next output of sequences that decode one token.

    Args:
        x: [num_seqs, dim] inputs, one of each sequence.
        conv_state: [num_slots, dim, width - 1] inputs before, moved on in place.
        weight: [dim, width].
        bias: [dim] or None.
        activation: "silu", "swish" or None.
        conv_state_indices: [num_seqs] or [num_seqs, 1] slots.
        query_start_loc: not for single tokens.
        pad_slot_id: the slot that belongs to no sequence; others may write it.

    """
    if query_start_loc is not None:
        raise NotImplementedError("the interpreter convolves single tokens only")
    slots = conv_state_indices.flatten()
    inputs = torch.cat([conv_state[slots], x[..., None]], dim=-1)
    conv_state[slots] = inputs[..., 1:]
    output = (inputs * weight).sum(-1)
    if bias is not None:
        output += bias
    return torch.nn.functional.silu(output) if activation else output


def run_experts(
    output: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    skip_weighted: bool,
    act: str,
    isa: str,
) -> None:
    """A layer of experts, one token and expert after the other.

    Args:
        output: [num_tokens, hidden], written in place.
        x: [num_tokens, hidden].
        w13: [num_experts, 2 * intermediate, hidden]; gpt-oss interleaves its halves.
        w2: [num_experts, hidden, intermediate].
        w13_bias: [num_experts, 2 * intermediate] or None.
        w2_bias: [num_experts, hidden] or None.
        topk_weights: [num_tokens, k].
        topk_ids: [num_tokens, k] experts of each token.
        skip_weighted: leave topk_weights out.
        act: "silu" or "swigluoai".
        isa: says how weights are packed; here they never are.

    """
    if act not in ("silu", "swigluoai"):
        raise NotImplementedError(f"the interpreter has no experts with {act}")
    output.zero_()
    for token, (weights, experts) in enumerate(zip(topk_weights, topk_ids.tolist())):
        for weight, expert in zip(weights, experts):
            hidden = w13[expert] @ x[token]
            if w13_bias is not None:
                hidden += w13_bias[expert]
            if act == "silu":
                gate, up = hidden.chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
            else:  # as gpt-oss defines it
                gate, up = hidden[::2].clamp(max=7.0), hidden[1::2].clamp(-7.0, 7.0)
                hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            hidden = w2[expert] @ hidden
            if w2_bias is not None:
                hidden += w2_bias[expert]
            output[token] += hidden if skip_weighted else weight * hidden


def keep_packed(weight: torch.Tensor, packed: torch.Tensor, isa: str) -> None:
    """Experts' weights as they are."""
    packed.copy_(weight)


# Those that workers, the sampler, hybrid models and experts call.
CALLED = {
    "init_cpu_memory_env(int[] nodes) -> ()": lambda nodes: None,
    "greedy_argmax(Tensor logits) -> Tensor": lambda logits: logits.argmax(dim=-1),
    "causal_conv1d_update_cpu_vec(Tensor x, Tensor(a!) conv_state, Tensor weight, "
    "Tensor? bias, str? activation, Tensor? conv_state_indices, "
    "Tensor? query_start_loc, int pad_slot_id) -> Tensor": convolve_next,
    "prepack_moe_weight(Tensor weight, Tensor(a!) packed_weight, str isa) "
    "-> ()": keep_packed,
    "cpu_fused_moe(Tensor(a!) output, Tensor input, Tensor w13, Tensor w2, "
    "Tensor? w13_bias, Tensor? w2_bias, Tensor topk_weights, Tensor topk_id, "
    "bool skip_weighted, str act, str isa) -> ()": run_experts,
    "mamba_chunk_scan_fwd_cpu(Tensor(a!) out, Tensor(b!) final_states, Tensor x, "
    "Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor cu_seqlens) -> ()": mamba.scan,
    "selective_state_update_cpu(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, "
    "Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "Tensor? state_batch_indices, Tensor? dst_state_batch_indices, int null_block_id, "
    "Tensor(b!) out, Tensor? num_accepted_tokens, Tensor? cu_seqlens) "
    "-> ()": mamba.update,
}

_library = torch.library.Library("_C", "FRAGMENT")  # unregisters when collected


def define_missing_ops() -> None:
    """Stands in for ops of vLLM's compiled CPU build."""
    for name in ACTIVATIONS:
        if not hasattr(torch.ops._C, name):
            _library.define(f"{name}(Tensor(a!) out, Tensor input) -> ()")
    for schema, function in CALLED.items():
        name = schema.partition("(")[0]
        if not hasattr(torch.ops._C, name):
            _library.define(schema)
            _library.impl(name, function, "CompositeExplicitAutograd")


class InterpreterPlatform(CpuPlatform):
    """A CPU whose attention backend is the one the user names."""

    @classmethod
    def import_kernels(cls) -> None:
        super().import_kernels()
        define_missing_ops()  # workers of their own see no check_and_update_config

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, *_: Any, **__: Any
    ) -> str:
        if selected_backend is None:
            raise ValueError(
                "The interpreter platform has no default attention backend: name one "
                "with --attention-backend."
            )
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=CAPABILITY, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(
                f"Selected backend {selected_backend} is not valid for this "
                f"configuration. Reason: {reasons}"
            )
        return selected_backend.get_path()

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        # CPU backends have no fp8 cache and some releases refuse it, Triton's have.
        cache_config = vllm_config.cache_config
        cache_dtype, cache_config.cache_dtype = cache_config.cache_dtype, "auto"
        super().check_and_update_config(vllm_config)
        cache_config.cache_dtype = cache_dtype
        # Plain PyTorch for all but attention: no compiler, no ops of a CPU build.
        from vllm.config import CompilationMode  # imports the current platform

        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.custom_ops = ["none"]
        define_missing_ops()
