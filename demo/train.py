"""Trains the demo's model: a Llama of half a million weights on the text of corpus.py.

    python demo/train.py [--out demo/model] [--steps 4000] [--seed 0]

Needs torch, transformers and tokenizers only; about six minutes on one core. The
committed demo/model was made by this command with its defaults, torch 2.13.0.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import paragraphs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"  # starts every paragraph and ends it
BATCH = 8  # paragraphs of one batch, padded to the longest of them
BATCHES = 4  # batches of one step
VOCABULARY = 512


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer that splits numbers into digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = map("".join, itertools.islice(paragraphs(seed), 20_000))
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def make_model(end: int) -> LlamaForCausalLM:
    """Returns an untrained Llama: 3 layers, 4 query and 2 KV heads of size 32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields tokens and labels [BATCH, longest]; a label of -100 does not count.

    Only the second half of a paragraph is learnt: the first is random. Paragraphs of
    similar length share a batch, so that little of it is padding.
    """
    rng, source, end = random.Random(seed), paragraphs(seed), tokenizer.eos_token_id
    while True:
        rows = []
        for prompt, rest in itertools.islice(source, 128 * BATCH):
            first = tokenizer(prompt).input_ids
            second = tokenizer(rest, add_special_tokens=False).input_ids + [end]
            rows.append((first + second, [-100] * len(first) + second))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            longest = len(group[-1][0])
            tokens = [ids + [end] * (longest - len(ids)) for ids, _ in group]
            labels = [ids + [-100] * (longest - len(ids)) for _, ids in group]
            yield torch.tensor(tokens), torch.tensor(labels)


def learning_rate(
    step: int, steps: int, peak: float = 3e-3, warm_up: int = 50
) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / (steps - warm_up)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def main() -> None:
    """Trains, prints the loss on the way, and writes the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer.eos_token_id)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0},
        ],
        betas=(0.9, 0.98),
    )
    begun = time.monotonic()
    source = batches(tokenizer, args.seed)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        total = 0.0
        for tokens, labels in itertools.islice(source, BATCHES):
            loss = model(input_ids=tokens, labels=labels).loss / BATCHES
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps - 1:
            seconds = time.monotonic() - begun
            print(f"step {step:5d}  loss {total:.4f}  {seconds:6.0f} s", flush=True)

    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    settings = json.loads((args.out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # in transformers 4 and 5
    (args.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    main()
