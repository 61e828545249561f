# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The cases of CONCH's attention benchmark: batches, written in a few letters.

A case is segments [COUNT]qQUERY[sSEQUENCE] joined by _, and options, each behind @:

- 32q1s4k: 32 sequences of 4096 tokens, the last of which is new; q8k: 8192 new tokens
  without context; k is 1024.
- @32/8x128: query heads, KV heads, head size.
- @fp8, @fp8_e5m2: dtype of the KV cache, otherwise the query's; @int8_per_token_head,
  @fp8_per_token_head, @int4_per_token_head: with a scale for every token and head.
- @window4k, @softcap30: sliding window, soft cap of the logits.
- @prefix32k: so many first tokens lie in pages that all sequences share.
"""

from dataclasses import dataclass, replace

import regex as re

from tests.kernels.attention.conch_reference import first_visible_key

TOKEN_HEAD_OPTIONS = tuple(f"{x}_per_token_head" for x in ("int8", "fp8", "int4"))
KV_OPTIONS = ("fp8", "fp8_e5m2", *TOKEN_HEAD_OPTIONS)

RAGGED = (
    "q64_q96s2k_q128_q192_q256s8k_q384_q512_q768s4k"
    "_q1k_q1536_q2ks16k_q3k_q4k_q6k_q8ks12k_q16k"
)
PREFILL = [
    *(f"q{n}@32/8x128" for n in ("1k", "2k", "8k", "32k", "128k")),
    *("4q1k", "16q1k", "8q2k"),
    *(f"q{n}@{h}x128" for h in ("64/8", "32/32", "8/1") for n in ("2k", "8k", "32k")),
    *("q1k@32/8x64", "q8k@32/8x64", "q32k@32/8x64"),
    *("q1k@16/8x256", "q8k@16/8x256", "q32k@16/8x256"),
    *("q512s4k", "4q512s16k", "q512s128k", "q2ks4k", "q2ks32k", "q2ks128k"),
    RAGGED,
]
# Few tiles of prefill rows: a new turn of a chat whose beginning is cached, and short
# prompts.
TURNS = [
    *(f"q{n}s{c}" for c in ("8k", "32k", "128k") for n in ("32", "64", "128", "256")),
    *("4q64s8k", "q20", "q100", "q300", "q512", "q64s1k", "q256s1k"),
    *(f"{case}@8/1x128" for case in ("q64s32k", "q256s32k", "q512s16k")),
    *(f"{case}@8/1x128" for case in ("q512", "q1k", "q1ks2k", "q2k")),
    *("q100@32/8x64", "q512@32/8x64", "q20@16/8x256", "q300@16/8x256"),
    *("q64s32k@32/8x64", "q64s32k@16/8x256", "q64s32k@16/8x512"),
    *("q64s32k@fp8", "q256s32k@fp8", "q64s32k@softcap30"),
    *("q64s32k_16q1s4k", "q256s32k_64q1s4k"),
]
VARIANTS = [
    *("q8k@window1k", "q32k@window1k", "q32k@window4k", "q8k@softcap30"),
    *("q8k@32/8x80", "q8k@32/8x96", "q8k@32/8x112", "q8k@16/8x512"),
    *("q32k@fp8", "q32k@fp8_e5m2", "16q1s8k@window1k", "16q1s8k@softcap30"),
]
DECODE = [
    *("1q1s1k", "1q1s8k", "1q1s32k", "1q1s128k", "8q1s1k", "8q1s8k", "8q1s32k"),
    *("64q1s1k", "64q1s8k", "64q1s32k", "256q1s1k", "256q1s8k"),
    *(f"16q1s8k@{h}" for h in ("64/8x128", "32/32x128", "8/1x128")),
    *(f"16q1s8k@{h}" for h in ("32/8x64", "16/8x256")),
    "16q5s8k",
]
# As users have them: no powers of two, all alike or not.
EIGHT_LENGTHS = (700, 1300, 1900, 2700, 3500, 5100, 6900, 9300)
LENGTHS = [
    *("1q1s700", "1q1s5000", "1q1s9000", "1q1s20000", "4q1s3000", "8q1s3000"),
    *("1q1s5000_1q1s9000", "1q1s700_1q1s1500_1q1s2900"),
    *("_".join(f"{n}q1s{x}" for x in EIGHT_LENGTHS) for n in (1, 2, 8)),
    *("16q1s3000", "16q1s3000@64/8x128", "16q1s3000@8/1x128", "16q5s3000", "64q1s3000"),
]
FP8 = ["1q1s32k@fp8", "16q1s8k@fp8", "64q1s8k@fp8", "64q1s8k@fp8_e5m2"]
MIXED = [
    # Skewed, and a uniform batch of as many bytes.
    *("1q1s128k_31q1s4k", "32q1s8064"),
    # Prefill chunks among decodes, and their parts alone.
    *("q2k_64q1s4k", "q2k", "64q1s4k"),
    *("2q2k_32q1s1k", "2q2k", "32q1s1k"),
    *("q512s16k_64q1s4k", "q512s16k", "16q4s8k_q1k"),
    *("64q1s33k@prefix32k", "64q1s33k"),
]
SHORT = ["q1k", "q8k", "q2ks32k", "1q1s1k", "1q1s32k", "64q1s8k", "q2k_64q1s4k"]
SUITES = {
    "prefill": PREFILL,
    "decode": DECODE,
    "lengths": LENGTHS,
    "mixed": MIXED,
    "fp8": FP8,
    "variants": VARIANTS,
    "turns": TURNS,
    "short": SHORT,
    "all": [*PREFILL, *DECODE, *MIXED, *FP8, *VARIANTS, *TURNS],
}


SEGMENT = re.compile(r"(\d*)q(\d+k?)(?:s(\d+k?))?")
HEADS = re.compile(r"(\d+)/(\d+)x(\d+)")
OPTION = re.compile(r"(window|softcap|prefix)(\d+k?)")


@dataclass(frozen=True)
class Case:
    """A batch of (query length, sequence length) and the layer it meets."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    num_query_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    kv_dtype: str = "auto"
    window: int | None = None
    softcap: float = 0.0
    prefix: int = 0
    page: int = 16
    layout: str = "packed"

    @property
    def num_tokens(self) -> int:
        return sum(query_len for query_len, _ in self.lengths)

    @property
    def max_query_len(self) -> int:
        return max(query_len for query_len, _ in self.lengths)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        return sum(attended_pairs(q, s, self.window) for q, s in self.lengths)

    @property
    def flop(self) -> int:
        """Two products of two operations for every pair, head and element."""
        return 4 * self.num_query_heads * self.head_size * self.pairs

    @property
    def num_keys(self) -> int:
        """Keys that some query sees, those of a shared prefix once."""
        rule = {"causal": True, "sliding_window": self.window}
        seen = (s - first_visible_key(q, s, **rule) for q, s in self.lengths)
        return sum(seen) - self.prefix * (len(self.lengths) - 1)

    def kv_bytes(self, element_size: int) -> int:
        row = self.head_size * element_size
        if self.kv_dtype in TOKEN_HEAD_OPTIONS:
            is_int4 = self.kv_dtype.startswith("int4")
            row = self.head_size // (2 if is_int4 else 1) + 4  # and its scale
        return 2 * self.num_keys * self.num_kv_heads * row


def attended_pairs(query_len: int, seq_len: int, window: int | None) -> int:
    """Visible (query, key) pairs of one sequence, causal."""
    context = seq_len - query_len
    # So many first queries see all keys before them, the others `window` keys.
    rising = query_len
    if window is not None:
        rising = min(max(window - context, 0), query_len)
    pairs = rising * context + rising * (rising + 1) // 2
    return pairs + (query_len - rising) * (window or 0)


def parse_size(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def parse_case(text: str, defaults: Case) -> Case:
    """Reads a case as the module's docstring describes it.

    Raises:
        ValueError: naming the part that cannot be read.

    """
    batch, *options = text.strip().split("@")
    lengths: list[tuple[int, int]] = []
    for segment in batch.split("_"):
        found = SEGMENT.fullmatch(segment)
        if found is None:
            raise ValueError(
                f"cases: segment {segment!r} of {text!r} is not [count]qLEN[sLEN], "
                "such as 32q1s4k or q8k; a length may end in k"
            )
        count, query_len = int(found[1] or 1), parse_size(found[2])
        seq_len = parse_size(found[3]) if found[3] else query_len
        if not (count and 0 < query_len <= seq_len):
            raise ValueError(
                f"cases: segment {segment!r} of {text!r} needs a count and a query of "
                "1 or more, and a sequence that holds the query"
            )
        lengths += [(query_len, seq_len)] * count
    case = replace(defaults, name=text.strip(), lengths=tuple(lengths))
    for option in options:
        case = apply_option(case, option)
    if case.prefix and (case.window or case.prefix > min(s for _, s in lengths)):
        raise ValueError(
            f"cases: the prefix of {text!r} must fit the shortest sequence, and there "
            "must be no window"
        )
    return case


def apply_option(case: Case, option: str) -> Case:
    if found := HEADS.fullmatch(option):
        heads, kv_heads, head_size = map(int, found.groups())
        if not heads or not kv_heads or heads % kv_heads:
            raise ValueError(
                f"cases: {option!r} of {case.name!r}: query heads must be a multiple "
                "of KV heads"
            )
        return replace(
            case, num_query_heads=heads, num_kv_heads=kv_heads, head_size=head_size
        )
    if option in KV_OPTIONS:
        return replace(case, kv_dtype=option)
    if found := OPTION.fullmatch(option):
        return replace(case, **{found[1]: parse_size(found[2])})
    raise ValueError(
        f"cases: option {option!r} of {case.name!r} is none of 32/8x128, "
        f"{', '.join(KV_OPTIONS)}, window4k, softcap30, prefix32k"
    )
