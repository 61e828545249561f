# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""VLLM_BATCH_INVARIANT=1 with CONCH: the engine takes it and every step is of the mode.

In a process of its own, since vLLM reads the variable once and replaces torch's
operators for good.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.v1.e2e.general.conch_engine import (
    ON_GPU,
    SHAPE,
    engine,
    expected_tokens,
    generate,
    random_prompts,
    save,
)
from vllm.v1.attention.backends import conch_attn

PROMPTS = random_prompts(40, 3)


def main(folder: str) -> None:
    """Prints the tokens of all prompts in one batch, and of each alone."""
    modes = []
    attention = conch_attn.varlen_attention

    def recording(*args, schedule, **kwargs) -> None:
        modes.append(schedule.batch_invariant)
        attention(*args, schedule=schedule, **kwargs)

    conch_attn.varlen_attention = recording
    if not ON_GPU:  # vLLM chooses cuBLASLt, which a torch without CUDA does not have
        torch.backends.cuda.preferred_blas_library = lambda backend=None: None
    with engine(folder, max_num_batched_tokens=32) as llm:
        together = generate(llm, PROMPTS, 3)
        alone = [generate(llm, [prompt], 3)[0] for prompt in PROMPTS]
    print(json.dumps([together, alone, sorted(set(modes))]))


def test_the_engine_takes_it(tmp_path: Path) -> None:
    model = save(LlamaForCausalLM, LlamaConfig(**SHAPE), tmp_path)
    env = os.environ | {
        "VLLM_BATCH_INVARIANT": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    command = [sys.executable, "-m", __name__, str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    together, alone, modes = json.loads(result.stdout.splitlines()[-1])
    assert together == alone == expected_tokens(model, PROMPTS, 3)
    assert modes == [True]
    assert "not be invariant between prefill and decode" not in result.stderr


if __name__ == "__main__":
    main(sys.argv[1])
