"""Answers to problems of GSM8K and MATH: found in a completion, and compared with the expected one.

As MetaMath's evaluation does it; docs/paper.md says where it differs.  A completion is a model's output, which may be
anything: nothing is evaluated as code, no number has an exponent, no expression backtracks, and nothing here raises.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

MARK = "The answer is: "
NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d+)*(?:[./]\d+)?|\.\d+)")
DECIMAL = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}")
DIGITS = 100  # a longer number is none: no problem has one


def scored(task: str, completion: str, expected: Any) -> tuple[Any, bool]:
    """The answer in a completion, or None, and whether it is the expected one."""
    extracted = EXTRACT[task](completion)
    return extracted, extracted is not None and SAME[task](extracted, expected)


def after_mark(completion: str) -> str | None:
    """The text after the last "The answer is: "."""
    return completion.rpartition(MARK)[2].strip() if MARK in completion else None


def exact(text: str) -> Fraction | None:
    """The value of digits with commas, and a decimal point or a slash."""
    try:
        return Fraction(text.replace(",", "")) if len(text) <= DIGITS else None
    except (ValueError, ZeroDivisionError):
        return None


def gsm8k_extracted(completion: str) -> int | None:
    """The first number after the mark, rounded."""
    found = NUMBER.search(after_mark(completion) or "")
    value = found and exact(found[0])
    return None if value is None else round(value)


def gsm8k_expected(answer: str) -> tuple[int | None, str]:
    found = NUMBER.fullmatch(answer.rpartition("####")[2].strip()) if "####" in answer else None
    value = found and exact(found[0])
    return int(value) if value is not None and value.denominator == 1 else None, "#### and a whole number"


def math_extracted(completion: str) -> str | None:
    """The text after the mark, to the end of its sentence."""
    text = after_mark(completion)
    return None if text is None else text.split(".\n")[0].strip().removesuffix(".").strip()


def math_expected(solution: str) -> tuple[str | None, str]:
    return last_boxed(solution) or None, r"a \boxed{...} that is not empty"


def last_boxed(solution: str) -> str | None:
    r"""What is in the last \boxed{...}, or after the last \boxed; where there is none, that of \fbox."""
    for name in (r"\boxed", r"\fbox"):
        if name in solution:
            rest = solution.rpartition(name)[2].lstrip()
            break
    else:
        return None
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip().removesuffix(".")
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return rest[1 : brace.start()].strip()
    return None


def equivalent(found: str, expected: str) -> bool:
    """Whether two answers are the same text after Hendrycks' normalisation, or the same numbers."""
    if found == expected:
        return True
    one, other = normalised(found), normalised(expected)
    if one == other:
        return one != ""
    ours, theirs = elements(one), elements(other)
    return len(ours) == len(theirs) and all(map(close, ours, theirs))


def normalised(text: str) -> str:
    r"""LaTeX in one way of writing it, after Hendrycks' MATH: \frac{1}{2} for \dfrac12 or 1/2, no units, no spaces."""
    text = text.strip().replace("\n", "").replace(r"\!", "").replace("\\\\", "\\")
    text = text.replace(r"\tfrac", r"\frac").replace(r"\dfrac", r"\frac")
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])", "", text)
    text = text.replace(r"^{\circ}", "").replace(r"^\circ", "")
    text = text.replace(r"\$", "").replace(r"\%", "")
    units = re.search(r"\\text\{ [^{}]*\}(?:\^\{?\d\}?)?$", text)
    if units and text[: units.start()].strip():
        text = text[: units.start()]
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    name, equals, value = text.partition("=")
    if equals and len(name) <= 2 and "=" not in value:
        text = value
    text = text.replace(" ", "")
    text = re.sub(r"\\sqrt([0-9a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac([0-9a-zA-Z])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})([0-9a-zA-Z])", r"\1{\2}", text)
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def elements(text: str) -> list[str]:
    """What is between the commas, and the brackets of a tuple or an interval."""
    if DECIMAL.fullmatch(text):  # whose commas are others
        return [text]
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        return [text[0], *text[1:-1].split(","), text[-1]]
    return text.split(",")


def close(found: str, expected: str) -> bool:
    """The same text or number: a whole one exactly, else to a relative 1e-4."""
    if found == expected:
        return True
    one, other = value(found), value(expected)
    if one is None or other is None:
        return False
    return one == other or (other.denominator != 1 and abs(one - other) * 10_000 <= max(abs(one), abs(other)))


def value(text: str) -> Fraction | None:
    if found := FRACTION.fullmatch(text):
        sign, above, below = found.groups()
        over = exact(below)
        return Fraction(int(sign + "1")) * exact(above) / over if over and exact(above) is not None else None
    return exact(text) if DECIMAL.fullmatch(text) else None


EXTRACT = {"gsm8k": gsm8k_extracted, "math": math_extracted}
EXPECTED = {"gsm8k": gsm8k_expected, "math": math_expected}
SAME = {"gsm8k": int.__eq__, "math": equivalent}
