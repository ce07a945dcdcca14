"""Brace ranges: one line of text that stands for many workloads.

    {1,8,64}q1s4k                    three texts, in this order
    8q1s{1k..16k*2}                  1k, 2k, 4k, 8k, 16k: times 2 up to and including 16k
    q{128..512+128}                  128, 256, 384, 512: plus 128 up to and including 512
    q1s4k tp={1..4}                  1, 2, 3, 4: plus 1 when no step is given
    8q1s4k window={0,512..2k*2}      items of a list may be ranges
    8q1s4k dtype={bf16,fp16}         items may be any words

Braces do not nest and hold no spaces. Several braces make the cartesian product; the last varies
fastest. Bounds are whole numbers with an optional `k` (1024); a value is written with `k` if one of
the bounds is and 1024 divides it. A last step beyond the upper bound is left out.
"""

from __future__ import annotations

import itertools
import re

from attnbench.errors import WorkloadError

#: More points than any sweep runs: a range above it is a typo.
MAX_TEXTS = 100_000
EXAMPLE = "{1,8,64}q1s{1k..16k*2}"

_RANGE = re.compile(r"([0-9]{1,18}k?)\.\.([0-9]{1,18}k?)(?:([*+])([0-9]{1,18}k?))?")


def expand_ranges(text: str) -> list[str]:
    """Every text that `text` stands for, in order; `[text]` when it has no braces.

    Raises:
        WorkloadError: a brace or a range is not valid; the message says at which character.
    """
    parts: list[list[str]] = []
    total = 1
    end = 0
    while (start := _next_brace(text, end)) is not None:
        close = text.find("}", start)
        if close < 0:
            raise _error(text, start, "'{' is never closed", "add '}'")
        inner = text[start + 1 : close]
        nested = inner.find("{")
        if nested >= 0:
            raise _error(text, start + 1 + nested, "braces do not nest", "close the first '{'")
        choices = _choices(text, start, inner)
        total *= len(choices)
        if total > MAX_TEXTS:
            raise _error(
                text, start, f"this makes more than {MAX_TEXTS} workloads", "use larger steps"
            )
        parts += [[text[end:start]], choices]
        end = close + 1
    parts.append([text[end:]])
    return ["".join(pieces) for pieces in itertools.product(*parts)]


def _next_brace(text: str, begin: int) -> int | None:
    """Where the next `{` is; a `}` before it has no partner."""
    match = re.compile(r"[{}]").search(text, begin)
    if match is None:
        return None
    if match[0] == "}":
        raise _error(text, match.start(), "'}' without a '{' before it", "remove it")
    return match.start()


def _choices(text: str, start: int, inner: str) -> list[str]:
    position = start + 1
    choices: list[str] = []
    for item in inner.split(","):
        if not item:
            raise _error(text, position, "an empty item", "remove the comma or fill it in")
        if any(character.isspace() for character in item):
            raise _error(text, position, f"a space in {item!r}", "remove it")
        choices += _range(text, position, item) if ".." in item else [item]
        position += len(item) + 1
    return choices


def _range(text: str, position: int, item: str) -> list[str]:
    match = _RANGE.fullmatch(item)
    if match is None:
        raise _error(
            text,
            position,
            f"{item!r} is no range",
            "write low..high, low..high+n or low..high*n",
        )
    low, high = _number(match[1]), _number(match[2])
    operator, step = match[3] or "+", _number(match[4] or "1")
    if low > high:
        raise _error(text, position, f"the range {item!r} goes down", "write the lower bound first")
    if operator == "+" and step < 1:
        raise _error(text, position, f"the step of {item!r} is 0", "write +1 or more")
    if operator == "*" and (step < 2 or low < 1):
        raise _error(
            text, position, f"{item!r} never ends", "start at 1 or more and multiply by 2 or more"
        )
    in_k = "k" in match[1] + match[2]
    values: list[str] = []
    while low <= high:
        if len(values) > MAX_TEXTS:
            raise _error(
                text, position, f"this makes more than {MAX_TEXTS} workloads", "use a larger step"
            )
        values.append(f"{low // 1024}k" if in_k and low and low % 1024 == 0 else str(low))
        low = low + step if operator == "+" else low * step
    return values


def _number(text: str) -> int:
    return int(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)


def _error(text: str, index: int, problem: str, mend: str) -> WorkloadError:
    return WorkloadError(f"{text!r}, character {index + 1}: {problem}; {mend}, e.g. {EXAMPLE}")
