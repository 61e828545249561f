"""The text that the demo's model learns from: paragraphs that a reader can judge.

Everything here was written for this project. A paragraph is a prompt and the text that
follows it; five kinds are drawn at random. All but the stories have one right
continuation, and in "echoes" and in the names of a story it stands further back in the
prompt: wrong attention shows as a wrong answer.
"""

import random
from collections.abc import Iterator

Paragraph = tuple[str, str]  # the prompt, and what follows it

NAMES = [
    "Anna",
    "Ben",
    "Cara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jack",
]
COLOURS = ["red", "blue", "green", "white", "black", "old", "small", "new"]
THINGS = ["ball", "book", "hat", "key", "kite", "lamp", "map", "ring", "shell", "cup"]
ANIMALS = ["fox", "cat", "owl", "bear", "dog", "hare"]
PLACES = ["river", "forest", "harbour", "garden", "hill", "lake"]

FACTS = {
    "What is CONCH?": "CONCH is an attention backend for vLLM, written in Triton.",
    "What is vLLM?": "vLLM is an engine that serves large language models.",
    "What is Triton?": "Triton is a language for GPU kernels that looks like Python.",
    "What is a page?": "A page is a block of the cache that holds a few tokens.",
    "What is a block table?": "A block table lists the pages of a sequence in order.",
    "What is prefill?": "Prefill reads the whole prompt and fills the cache.",
    "What is decode?": "Decode makes one new token at a time from the cache.",
    "What is the cache?": "The cache holds the keys and values of all earlier tokens.",
    "What is a query?": "A query asks the keys which values matter to it.",
    "What is a conch?": "A conch is a sea animal with a large shell.",
}


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def sums(rng: random.Random) -> Paragraph:
    """Addition and subtraction up to 30."""
    x, y = rng.randint(0, 20), rng.randint(0, 10)
    if rng.random() < 0.5:
        return f"What is {x} plus {y}?", f" {x} plus {y} is {x + y}."
    x, y = max(x, y), min(x, y)
    return f"What is {x} minus {y}?", f" {x} minus {y} is {x - y}."


def counts(rng: random.Random) -> Paragraph:
    """Counting up and down."""
    start, length = rng.randint(1, 30), rng.randint(5, 9)
    if rng.random() < 0.5:
        way, numbers = "up", range(start, start + length)
    else:
        way, numbers = "down", range(start + length, start, -1)
    return f"Count {way} from {numbers[0]}:", f" {', '.join(map(str, numbers))}."


def echoes(rng: random.Random) -> Paragraph:
    """A list of words, repeated."""
    words = " ".join(rng.sample(THINGS + ANIMALS + PLACES, rng.randint(3, 10)))
    return f"Say it again: {words}.", f" {words}."


def facts(rng: random.Random) -> Paragraph:
    """One of a few sentences about the subject itself."""
    question, answer = rng.choice(list(FACTS.items()))
    return question, f" {answer}"


def stories(rng: random.Random) -> Paragraph:
    """A short story about an animal, a friend of its, and a thing that was lost."""
    animal, friend = rng.sample(ANIMALS, 2)
    name, other = rng.sample(NAMES, 2)
    place, colour, thing = rng.choice(PLACES), rng.choice(COLOURS), rng.choice(THINGS)
    lost = rng.choice(
        [
            f'"I have lost my {colour} {thing}," said the {friend} {other}.',
            f'"Have you seen my {colour} {thing}?" asked the {friend} {other}.',
        ]
    )
    found = rng.choice(
        [
            f"They looked for the {thing} all day, and the {animal} {name} found it.",
            f"The {animal} {name} found the {thing} by the {place} and gave it back.",
        ]
    )
    return (
        f"Once there was {a(animal)}, the {animal} {name}, who lived near the {place}.",
        f" One day the {animal} {name} met {a(friend)}, the {friend} {other}. {lost} "
        f"{found} The {friend} {other} was happy, and they became good friends.",
    )


KINDS = {echoes: 5, sums: 4, stories: 3, counts: 1, facts: 1}


def paragraphs(seed: int) -> Iterator[Paragraph]:
    """Yields paragraphs without end, the same ones for the same seed."""
    rng = random.Random(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    while True:
        yield rng.choices(kinds, weights)[0](rng)
