"""The text that the demo's model learns from: paragraphs that a reader can judge.

Everything here was written for this project. A paragraph is a prompt and the text that
follows it; six kinds are drawn at random. All but the stories have one right
continuation, and in "holders" it depends on a sentence far back in the prompt: wrong
attention shows as a wrong answer.
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
    words = " ".join(rng.sample(THINGS + ANIMALS + PLACES, rng.randint(3, 8)))
    return f"Say it again: {words}.", f" {words}."


def holders(rng: random.Random) -> Paragraph:
    """Things change hands; then a question asks where each of them is by now."""
    people = rng.sample(NAMES, rng.randint(2, 5))
    things = rng.sample(THINGS, len(people))
    holder = dict(zip(things, people, strict=True))
    sentences = [f"The {thing} is with {holder[thing]}." for thing in things]
    for _ in range(rng.randint(0, 4)):
        thing = rng.choice(things)
        holder[thing] = rng.choice([name for name in people if name != holder[thing]])
        sentences.append(f"Now the {thing} is with {holder[thing]}.")
    rng.shuffle(things)
    sentences.append(f"Where is the {things[0]}?")
    answers = [f" The {things[0]} is with {holder[things[0]]}."]
    for thing in things[1:]:
        answers.append(f" The {thing} is with {holder[thing]}.")
    return " ".join(sentences), "".join(answers)


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


KINDS = {holders: 8, stories: 4, sums: 3, counts: 2, echoes: 2, facts: 1}


def paragraphs(seed: int) -> Iterator[Paragraph]:
    """Yields paragraphs without end, the same ones for the same seed."""
    rng = random.Random(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    while True:
        yield rng.choices(kinds, weights)[0](rng)
