"""Are these two mathematical expressions equal? math-verify, kept to what it can tell safely and soon.

    python -c "from models.expressions import same_expression; print(same_expression('2^{10}', '1024'))"

math-verify takes the first number that it finds in a text ("12 and 13" is 12 to it, "100 cm" is 100) and
works out towers of powers for as long as they take. So both texts must be expressions from end to end, and
small.
"""

from __future__ import annotations

import logging
import math
import re
from functools import lru_cache

MAX_CHARS = 120
MAX_POWER = 1000
"""Of all exponents in a text, multiplied."""
MAX_SECONDS = 2
_COMMANDS = re.compile(r"\\(?:[dt]?frac|sqrt|pi|cdot|times|left|right|[,;! ])|sqrt|π|√")
_CHARACTERS = re.compile(r"[\da-z\s+\-/^().={}\[\]]*")
_WORD = re.compile(r"[a-z]{2,}")
_OPERATION = re.compile(r"[\^/π√\\]|sqrt|\d\s*[+\-]\s*\w|[a-z]\s*[+\-=]|\d[a-z(]")
_POWER = re.compile(r"\^\s*(?:(\d{1,2})(?!\d)|\{\s*-?(\d{1,2})\s*\})?(?!\s*\^)")
"""A power, and its exponent where that is a small number and no power itself."""


def same_expression(given: str, wanted: str) -> bool | None:
    """Whether both have the same value, or the same form in the same variables; None where they are not both
    expressions, or too large to work out."""
    if given == wanted:
        return True
    if not (_is_expression(given) and _is_expression(wanted)):
        return None
    if not (_OPERATION.search(given) or _OPERATION.search(wanted)):
        return None
    return _verified(given, wanted)


def _is_expression(text: str) -> bool:
    """From end to end, and small."""
    bare = _COMMANDS.sub(" ", text)
    whole = _CHARACTERS.fullmatch(bare) and not _WORD.search(bare) and re.search(r"\w", text)
    return bool(whole and len(text) <= MAX_CHARS and _power(text) <= MAX_POWER)


def _power(text: str) -> float:
    """The product of all exponents; infinite where one is no small number."""
    found = [match[1] or match[2] for match in _POWER.finditer(text)]
    if len(found) < text.count("^") or not all(found):
        return math.inf
    return math.prod(max(1, int(exponent)) for exponent in found)


@lru_cache(maxsize=4096)
def _verified(given: str, wanted: str) -> bool | None:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    try:
        truth, answer = (
            parse(f"${text}$", configs, fallback_mode="no_fallback", parsing_timeout=MAX_SECONDS)
            for text in (wanted, given)
        )
        if not truth or not answer:
            return None
        if verify(truth, answer, timeout_seconds=MAX_SECONDS):
            return True
        return None if "." in given + wanted else False  # 3.14 may be enough of π
    except Exception:  # its parsers raise nearly every type; its clock works in the main thread only
        return None
