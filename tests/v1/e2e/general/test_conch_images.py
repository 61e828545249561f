# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Gemma 3 with images, in vLLM's engine: an image's tokens see each other both ways.

Both kinds of its layers do so. Tiny random models in fp32; greedy tokens equal Hugging
Face's.
"""

import math
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from tests.v1.e2e.general.conch_engine import (
    SHAPE,
    VOCABULARY,
    engine,
    generate,
    random_prompts,
    save,
)
from vllm.model_executor.models import registry

NUM_TOKENS = 6
IMAGE_SIZE = 32
PATCH_SIZE = 4
TOKENS_PER_IMAGE = 16
# As Gemma 3's it holds an image: where one is longer, what its tokens see is not the
# same in all releases of vLLM and of transformers.
WINDOW = 20

SPECIAL_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
NEWLINES = ["\n" * count for count in (1, 2, 3, 4)]  # vLLM looks them up

IMAGE_PROCESSOR = "transformers.models.gemma3.image_processing_gemma3"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # vLLM looks at an unknown model's class in a process of its own: many seconds.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())


@pytest.fixture(autouse=True)
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it some releases of transformers have another class, and use that.

    Of vLLM's device "empty" it is no requirement. vLLM's model names the class that
    needs it, in annotations only.
    """
    try:
        import_module(IMAGE_PROCESSOR)
    except ImportError:
        module = SimpleNamespace(Gemma3ImageProcessor=transformers.Gemma3ImageProcessor)
        monkeypatch.setitem(sys.modules, IMAGE_PROCESSOR, module)


def save_processor(folder: Path) -> transformers.Gemma3Processor:
    """A processor whose tokens are words and, after them, those around images."""
    words = {f"word{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="word0"))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in NEWLINES])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, extra_special_tokens=SPECIAL_TOKENS
        ),
        image_seq_length=TOKENS_PER_IMAGE,
    )
    processor.save_pretrained(folder)
    return processor


def save_model(
    processor: transformers.Gemma3Processor, folder: Path
) -> transformers.Gemma3ForConditionalGeneration:
    tokenizer = processor.tokenizer
    start, end, image = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS.values()))
    text = SHAPE | {
        "vocab_size": len(tokenizer),
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vision_use_head": False,
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=image,
    )
    model = save(transformers.Gemma3ForConditionalGeneration, config, folder)
    # It begins as zeros: all images would be the same.
    projector = model.model.multi_modal_projector
    projector.mm_input_projection_weight.data.normal_(std=0.02)
    # Zero is never the greatest logit: no image is generated.
    model.get_input_embeddings().weight.data[image] = 0
    for layer in model.model.language_model.layers:  # attention that is choosy
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.data.fill_(1)  # added to one
    model.save_pretrained(folder)
    # As published models name the weights, whatever this release of transformers does.
    path = folder / "model.safetensors"
    weights = {
        name
        if "vision_model" in name
        else name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return model


Prompt = tuple[list[int], list[Image.Image]]


def random_images(count: int) -> list[Image.Image]:
    """Images of which each token sees a colour of its own."""
    side = math.isqrt(TOKENS_PER_IMAGE)
    shape = (count, side, side, 3)
    colours = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    scale = IMAGE_SIZE // side
    return [Image.fromarray(each.repeat(scale, 0).repeat(scale, 1)) for each in colours]


def expected_tokens(
    model: transformers.Gemma3ForConditionalGeneration,
    processor: transformers.Gemma3Processor,
    prompts: list[Prompt],
    both_ways: bool = True,
) -> list[list[int]]:
    """What Hugging Face generates; without both_ways all attention is causal."""
    tokenizer = processor.tokenizer
    image_tokens = tokenizer.encode(processor.full_image_sequence)
    assert image_tokens.count(tokenizer.image_token_id) == TOKENS_PER_IMAGE
    results = []
    for prompt, images in prompts:
        expanded = [
            token
            for given in prompt
            for token in (image_tokens if given == tokenizer.boi_token_id else [given])
        ]
        inputs = {}
        if images:
            inputs = processor.image_processor(images, return_tensors="pt")
        tokens = torch.tensor([expanded])
        for _ in range(NUM_TOKENS):
            is_image = tokens == tokenizer.image_token_id
            with torch.no_grad():
                logits = model(
                    tokens,
                    pixel_values=inputs.get("pixel_values"),
                    token_type_ids=(is_image & both_ways).long(),
                    use_cache=False,
                ).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        results.append(tokens[0, len(expanded) :].tolist())
    return results


def test_gemma3(tmp_path: Path) -> None:
    """Prompts with two images, one and none, in steps that begin at an image."""
    processor = save_processor(tmp_path)
    model = save_model(processor, tmp_path)
    image = processor.tokenizer.boi_token_id
    one, two, three = random_images(3)
    before, between, after, lone = random_prompts(7, 11, 3, 30)
    # No prompt begins with an image: some releases split one that a step begins with
    # and that does not fit in what the step has left.
    prompts = [
        ([*before, image, *between, image, *after], [one, two]),
        (lone, []),
        ([*after, image, *after], [three]),
    ]
    expected = expected_tokens(model, processor, prompts)
    inputs = [
        {"prompt_token_ids": prompt, "multi_modal_data": {"image": images}}
        if images
        else prompt
        for prompt, images in prompts
    ]
    with engine(
        str(tmp_path),
        skip_tokenizer_init=False,
        max_num_batched_tokens=48,
        disable_chunked_mm_input=True,
        limit_mm_per_prompt={"image": 2},
    ) as llm:
        assert generate(llm, inputs, NUM_TOKENS) == expected

    other_images = [(prompt, images[::-1]) for prompt, images in prompts]
    assert expected_tokens(model, processor, other_images)[0] != expected[0]
    causal = expected_tokens(model, processor, prompts, both_ways=False)
    same = [ours == others for ours, others in zip(expected, causal)]
    assert same == [not images for _, images in prompts]
