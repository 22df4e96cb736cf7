"""Is this answer the ground truth? What rules can tell without a model: letters, numbers, yes/no, equal text.

    python -c "from models.answers import matches; print(matches('The answer is (B).', '12', ['7', '12']))"

`matches` is True or False only where the rules are sure, and None where a reader is needed ("a puppy" for
"dog", "100 cm" for "1 m"). Who uses it decides what None means: a rule judge takes it as not right, an answer
filter asks a model. Numbers compare exactly unless the caller allows a tolerance (ChartQA's relaxed accuracy
is 0.05).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from models.expressions import same_expression

MAX_CHARS = 2000
"""Longer answers are for a reader: None unless equal."""

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
_ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_CARDINALS = {word: n for n, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_CARDINALS |= {
    f"{ten}-{one}": 10 * t + n for t, ten in enumerate(_TENS, 2) for n, one in enumerate(_ONES[1:10], 1)
}
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
_ORDINAL_VALUES = {word: str(n) for n, word in enumerate(_ORDINALS, 1)}

_YES, _NO = {"yes", "yeah", "yep", "true", "correct"}, {"no", "nope", "false", "incorrect"}
_TURNS = {"but", "however", "maybe", "perhaps", "both", "neither", "unless", "or"}
"""Words that may turn the sense of a sentence that starts with yes or no."""
_EXCLUSIVE = (
    {"even", "odd"},
    {"left", "right", "centre"},
    {"top", "bottom", "middle"},
    {"above", "below"},
    {"row", "column"},
    {"larger", "smaller", "equal"},
    {"greater", "less", "equal"},
    {"increase", "decrease"},
    {"north", "south", "east", "west"},
)
"""Words of one set exclude each other: different words are different answers."""

_HEDGE = re.compile(
    r"\b(?:not|no|never|none|more|less|fewer|than|least|most|about|around|approximately|between|or|except)\b"
)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
"""With braces two deep inside, as a fraction of roots has them."""
_LEAD = re.compile(r"\b(?:answer|option|choice)(?: is| would be|:|=)+[\s:]*", re.I)
_NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3})?(?![\d,.]*\d)", re.I)
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:e[-+]?\d+)?", re.I)
_LETTER = re.compile(r"(?:option |choice |answer )?[(\[]?([a-z])[)\].:]*", re.I)
_LETTER_AND_TEXT = re.compile(r"[(\[]?([a-z])(?:[)\]][.:]?|[.:])\s*(.+)", re.I | re.S)
_CHARACTERS = str.maketrans({"−": "-", "–": "-", "⁄": "/", "’": "'", "“": '"', "”": '"'})


def matches(
    answer: str, truth: str, choices: Sequence[str] | None = None, tolerance: float = 0.0
) -> bool | None:
    """Whether `answer` means `truth`; None when rules cannot tell. tolerance: relative, for numbers only."""
    if not normalise(answer):
        return False
    if normalise(answer) == normalise(truth):
        return True
    if len(answer) > MAX_CHARS:
        return None
    if choices:
        return _same_option(final_answer(answer), final_answer(truth), choices)
    given, wanted = normalise(final_answer(answer)), normalise(final_answer(truth))
    if given == wanted:
        return True
    verdicts = (
        _same_number(given, wanted, tolerance),
        same_expression(given, wanted),
        _same_yes_no(given, wanted),
        _same_words(given, wanted),
    )
    return next((verdict for verdict in verdicts if verdict is not None), None)


def final_answer(text: str) -> str:
    """The part of a text that answers: what its \\boxed{} holds or what follows its last "answer is"."""
    boxed = _BOXED.findall(text)
    if boxed:
        return boxed[-1].strip()
    last = _LEAD.split(text)[-1].strip()
    return last or text.strip()


def normalise(text: str) -> str:
    """Lower case, NFKC, single spaces, number words as digits; no articles, emphasis or outer quotes."""
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS).casefold()
    text = re.sub(r"(?<!\w)[*_]+|[*_]+(?!\w)", "", text)
    text = " ".join(text.split()).strip("\"'`$ ").rstrip(" .;:!?,").lstrip(" ;:!?,").strip("\"'`$ ")
    words = [_digits(word) for word in text.split(" ") if word not in ("a", "an", "the")]
    return " ".join(words) if words else text


def _digits(word: str) -> str:
    bare = word.strip(",;:.")
    return word.replace(bare, str(_CARDINALS[bare])) if bare in _CARDINALS else word


def option_index(text: str, choices: Sequence[str]) -> int | None:
    """Which choice a text names: by itself, by its letter ("B", "(b)", "B."), or both; None if unclear."""
    wanted, names = normalise(text), [normalise(choice) for choice in choices]
    if names.count(wanted) == 1:
        return names.index(wanted)
    if letter := _LETTER.fullmatch(text.strip()):
        return _position(letter[1], choices)
    if both := _LETTER_AND_TEXT.fullmatch(text.strip()):
        position = _position(both[1], choices)
        return position if position is not None and names[position] == normalise(both[2]) else None
    value, values = _bare_number(wanted), [_bare_number(name) for name in names]
    return values.index(value) if value is not None and values.count(value) == 1 else None


def _position(letter: str, choices: Sequence[str]) -> int | None:
    position = ord(letter.lower()) - ord("a")
    return position if position < len(choices) else None


def _same_option(answer: str, truth: str, choices: Sequence[str]) -> bool | None:
    given, wanted = option_index(answer, choices), option_index(truth, choices)
    if given is not None and wanted is not None:
        return given == wanted
    numbers = [_bare_number(text) for text in (answer, *choices)]
    if wanted is not None and None not in numbers and numbers[0] not in numbers[1:]:
        return False  # a number, and none of the offered ones
    return None


@dataclass(frozen=True)
class Quantity:
    """An exact number and the words around it ("cm", "%", "apples"; "" when it stands alone)."""

    value: Fraction
    unit: str


def parse_number(text: str) -> Quantity | None:
    """The one number of a short text, "1,234.50 cm" or "3/4"; None if there is none, or more than one."""
    text = normalise(text)
    if len(text) > MAX_CHARS:
        return None
    fraction = re.fullmatch(r"([-+]?\d{1,12})\s?/\s?(\d{1,12})", text)
    if fraction and int(fraction[2]):
        return Quantity(Fraction(int(fraction[1]), int(fraction[2])), "")
    found = _NUMBER.search(text)
    if not found:
        return None
    before, after, value = text[: found.start()], text[found.end() :], _value(found[0])
    if value is None or re.search(r"\d", before + after):
        return None
    return Quantity(value, " ".join(f"{before} {after}".split()).strip(" .,;:="))


def _value(text: str) -> Fraction | None:
    """An exact value; commas part thousands if three digits follow each, else one is a decimal comma."""
    if "," in text and not _THOUSANDS.fullmatch(text):
        if text.count(",") > 1 or "." in text:
            return None
        text = text.replace(",", ".")
    try:
        return Fraction(text.replace(",", "").rstrip("."))
    except ValueError:
        return None


def _bare_number(text: str) -> Fraction | None:
    quantity = parse_number(text)
    return quantity.value if quantity and not quantity.unit else None


def _same_number(given: str, wanted: str, tolerance: float) -> bool | None:
    """Units count only when both have one; a sentence is its number if no word in it turns the sense."""
    truth, answer = parse_number(wanted), parse_number(given.rpartition("=")[2])
    if truth is None or answer is None or len(truth.unit.split()) > 2:
        return None
    if _HEDGE.search(answer.unit) or _HEDGE.search(truth.unit):
        return None
    if truth.unit and answer.unit and truth.unit.removesuffix("s") != answer.unit.removesuffix("s"):
        return None
    if abs(answer.value - truth.value) <= abs(truth.value) * Fraction(tolerance):
        return True
    percent = {answer.unit, truth.unit} == {"%", ""}  # "50%" for "0.5" is for a reader
    return None if percent and truth.value in (answer.value * 100, answer.value / 100) else False


def _same_yes_no(given: str, wanted: str) -> bool | None:
    truth = _yes_no(wanted) if wanted in _YES | _NO else None
    answer = _yes_no(given)
    return None if truth is None or answer is None else truth == answer


def _yes_no(text: str) -> bool | None:
    first, *rest = re.findall(r"[a-z]+", text) or [""]
    if first not in _YES | _NO:
        return None
    clear = not rest or first in _YES or re.match(r"\w+[,.;:]", text)  # "no cell is odd" is not yet a no
    contrary = (_NO | {"not"} if first in _YES else _YES) | _TURNS
    return None if not clear or contrary & set(rest) else first in _YES


def _same_words(given: str, wanted: str) -> bool | None:
    """Same words but another number ("row 2", "row 3"), or somewhere a word that excludes the other
    ("even", "odd")."""
    first, second = _words(given), _words(wanted)
    if first == second:
        return True
    if len(first) != len(second) or sorted(first) == sorted(second):
        return None
    different = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    if any(_exclude(a, b) for a, b in different):
        return False
    numbers = all(a.isdecimal() and b.isdecimal() for a, b in different)  # "100 cm" may be "1 m"
    return False if numbers else None


def _words(text: str) -> list[str]:
    return [_ORDINAL_VALUES.get(word, word) for word in re.findall(r"[^\W_]+", text)]


def _exclude(first: str, second: str) -> bool:
    return any({first, second} <= words for words in _EXCLUSIVE)
