"""Generates text in vLLM with CONCH and compares every token with Hugging Face's.

    nox -s demo                                 the model in demo/model, its own prompts
    nox -s demo -- --prompt "What is 9 plus 8?" your prompt; --help lists the rest

Without a GPU the kernels run in Triton's interpreter: slow, but the same code. The
exit status is 1 if a token differs or a layer has another backend than asked for.
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

HERE = Path(__file__).resolve().parent
ON_GPU = torch.cuda.is_available()

ENGINE_OPTIONS: dict[str, Any] = {"use_tqdm_on_load": False}
if ON_GPU:
    ENGINE_OPTIONS["gpu_memory_utilization"] = 0.5  # the rest is Hugging Face's
else:
    ENGINE_OPTIONS["enforce_eager"] = True

PROMPTS = [
    "Once there was a fox, the fox Anna, who lived near the river.",
    "Once there was an owl, the owl Hugo, who lived near the harbour. One day the owl "
    "Hugo met a cat, the cat Iris.",
    "Say it again: river lamp owl harbour kite forest ring.",
    "Count down from 21:",
    "What is 17 plus 8?",
    "What is CONCH?",
]


console = Console(highlight=False, soft_wrap=True)


@dataclass
class Result:
    """One prompt's continuation: token ids from the engine and from the reference."""

    prompt: str
    text: str
    got: list[int]
    expected: list[int]

    @property
    def agreeing(self) -> int:
        """How many tokens agree before the first that does not."""
        pairs = zip(self.got, self.expected, strict=False)
        same = [x == y for x, y in pairs]
        return same.index(False) if False in same else len(same)

    @property
    def equal(self) -> bool:
        """Whether both are the same token for token, and equally long."""
        return self.got == self.expected


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default=str(HERE / "model"), help="folder or hub name"
    )
    parser.add_argument("--prompt", action="append", help="may be given more than once")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--dtype", default="float32", help="of both engines' arithmetic"
    )
    parser.add_argument("--attention-backend", default="CONCH")
    return parser.parse_args()


def set_environment(backend: str) -> None:
    """Sets what vLLM and Triton read when they are imported."""
    os.environ["VLLM_ATTENTION_BACKEND"] = backend
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not ON_GPU:
        os.environ["TRITON_INTERPRET"] = "1"  # interpreter/ sees to the rest


def reference_tokens(
    model: str, prompts: list[list[int]], max_tokens: int, dtype: str
) -> list[list[int]]:
    """Greedy continuations by Hugging Face transformers, one prompt at a time."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = "cuda" if ON_GPU else "cpu"
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    reference.to(device)
    continuations = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        output = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        continuations.append(output[0, len(prompt) :].tolist())
    del reference
    if ON_GPU:
        torch.cuda.empty_cache()
    return continuations


def backends_of(llm: Any) -> dict[str, int]:
    """Asks the loaded model's attention layers for their backend: name -> layers."""

    def names(model: torch.nn.Module) -> list[str]:
        layers = [m for m in model.modules() if hasattr(m, "attn_backend")]
        return [layer.attn_backend.get_name() for layer in layers]

    found = llm.apply_model(names)[0]
    return {name: found.count(name) for name in sorted(set(found))}


def show(results: list[Result], rows: dict[str, str]) -> None:
    """Prints each prompt with its continuation, then a table of what ran."""
    for result in results:
        console.print()
        console.print(Text(result.prompt, style="dim"), end="")
        console.print(Text(result.text, style="bold"))
        if result.equal:
            verdict = f"  {len(result.got)} tokens, equal to Hugging Face's"
        else:
            verdict = f"  DIFFERS from Hugging Face after {result.agreeing} tokens"
        console.print(Text(verdict, style="green" if result.equal else "red"))
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), value)
    console.print()
    console.print(table)


def main() -> int:
    """Runs the demo; returns the exit status."""
    args = arguments()
    set_environment(args.attention_backend)
    prompts = args.prompt or PROMPTS
    device = torch.cuda.get_device_name() if ON_GPU else "CPU, Triton's interpreter"

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompt_ids = [tokenizer(prompt).input_ids for prompt in prompts]
    console.print("Hugging Face transformers generates the reference ...")
    expected = reference_tokens(args.model, prompt_ids, args.max_tokens, args.dtype)

    import triton

    import vllm

    console.print(f"vLLM generates with {args.attention_backend} ({device}) ...")
    begun = time.perf_counter()
    llm = vllm.LLM(args.model, dtype=args.dtype, **ENGINE_OPTIONS)
    started = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompt_ids],
        vllm.SamplingParams(temperature=0, max_tokens=args.max_tokens),
        use_tqdm=False,
    )
    seconds = time.perf_counter() - started

    results = []
    for prompt, output, tokens in zip(prompts, outputs, expected, strict=True):
        (got,) = output.outputs
        results.append(Result(prompt, got.text, list(got.token_ids), tokens))
    generated = sum(len(result.got) for result in results)
    equal = sum(result.equal for result in results)
    backends = backends_of(llm)
    show(
        results,
        {
            "attention backend": ", ".join(
                f"{name} in {count} layers" for name, count in backends.items()
            ),
            "device": device,
            "vLLM": vllm.__version__,
            "torch, Triton": f"{torch.__version__}, {triton.__version__}",
            "start-up": f"{started - begun:.1f} s",
            "generation": f"{generated} tokens for {len(results)} prompts in "
            f"{seconds:.1f} s, {generated / seconds:.1f} tokens/s",
            "Hugging Face, greedy": f"{equal} of {len(results)} continuations equal "
            "token for token",
        },
    )
    as_asked = set(backends) == {args.attention_backend}
    return 0 if as_asked and equal == len(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
