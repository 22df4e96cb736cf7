"""Answers compared by rules: what is right, what is wrong, and what rules must leave to a reader."""

import pytest

from models.answers import final_answer, matches, normalise, option_index, parse_number

PETS = ["cat", "dog", "a red bird"]
NUMBERS = ["7", "12", "40"]

RIGHT = [
    (r"$\frac{1}{2}$", "0.5", None),
    (r"The answer is \boxed{\frac{1}{\sqrt{4}}}.", "1/2", None),
    (r"2\sqrt{3}", r"$\sqrt{12}$", None),
    ("$x^2-1$", "(x-1)(x+1)", None),
    ("10^3", "1000", None),
    ("x = 3", "3", None),
    ("7", "7", None),
    (" 7. ", "7", None),
    ("seven", "7", None),
    ("Twenty", "20", None),
    ("twenty-one", "21", None),
    ("1,234", "1234", None),
    ("1,234,567.50", "1234567.5", None),
    ("1,5", "1.5", None),
    ("7.0", "7", None),
    (".5", "0.5", None),
    ("1/2", "0.5", None),
    ("½", "1/2", None),
    ("−3", "-3", None),
    ("7 apples", "7", None),
    ("7", "7 apples", None),
    ("1 apple", "1 apples", None),
    ("$7", "7", None),
    ("50%", "50", None),
    ("There are 7 cells.", "7", None),
    ("3 + 4 = 7", "7", None),
    ("The answer is: **7**.", "7", None),
    (r"so \boxed{7}", "7", None),
    ("7", "7", None),
    ("Yes, there is.", "yes", None),
    ("yes it is", "Yes", None),
    ("No.", "no", None),
    ("false", "no", None),
    ("The Red Bird", "red bird", None),
    ("row two", "row 2", None),
    ("second row", "2 row", None),
    ("2", "row 2", None),
    ("B", "dog", PETS),
    ("(b)", "dog", PETS),
    ("B. dog", "dog", PETS),
    ("B) dog", "B", PETS),
    ("The answer is (B).", "dog", PETS),
    ("Option B", "dog", PETS),
    ("dog", "B", PETS),
    ("Red bird", "C", PETS),
    ("twelve", "B", NUMBERS),
    ("12.0", "12", NUMBERS),
    ("A", "A", ["x", "A"]),
]
WRONG = [
    ("$x^2+1$", "$(x-1)(x+1)$", None),
    (r"\frac{1}{3}", "1/2", None),
    ("", "7", None),
    (" . ", "7", None),
    ("8", "7", None),
    ("-7", "7", None),
    ("1.234", "1234", None),
    ("8 apples", "7", None),
    ("seventeen", "7", None),
    ("No, there is not one.", "yes", None),
    ("yes", "no", None),
    ("row 3", "row 2", None),
    ("third row", "second row", None),
    ("column 2", "row 2", None),
    ("odd", "even", None),
    ("left", "right", None),
    ("A", "dog", PETS),
    ("cat", "B", PETS),
    ("9", "12", NUMBERS),
]
OPEN = [
    (r"$\pi$", "3.14", None),
    ("9^{9^{9}}", "3", None),
    ("9^99^9", "3", None),
    ("puppy", "dog", None),
    ("100 cm", "1 m", None),
    ("5 apples", "5 oranges", None),
    ("50%", "0.5", None),
    ("more than 7", "7", None),
    ("not 7", "7", None),
    ("7 or 8", "7", None),
    ("7, not 8", "7", None),
    ("3.4.5", "3.4", None),
    ("5'10\"", "510", None),
    ("3*4", "34", None),
    ("yes and no", "yes", None),
    ("no cell is larger", "no", None),
    ("I cannot tell", "7", None),
    ("none", "0", None),
    ("A. dog", "dog", PETS),
    ("Z", "dog", PETS),
    ("the answer is not B", "dog", PETS),
    ("x" * 5000, "dog", None),
    ("9" * 1999 + "e999", "dog", None),
]


@pytest.mark.parametrize(("answer", "truth", "choices"), RIGHT)
def test_right(answer, truth, choices):
    assert matches(answer, truth, choices) is True


@pytest.mark.parametrize(("answer", "truth", "choices"), WRONG)
def test_wrong(answer, truth, choices):
    assert matches(answer, truth, choices) is False


@pytest.mark.parametrize(("answer", "truth", "choices"), OPEN)
def test_left_to_a_reader(answer, truth, choices):
    assert matches(answer, truth, choices) is None


@pytest.mark.parametrize(
    "text", ["7", "row 2", "Yes", "1,234", "½", "even", "a", "twenty-one", "東京", "3*4", "...", "-"]
)
def test_every_answer_equals_itself(text):
    assert matches(text, text) is bool(normalise(text))


def test_tolerance_is_relative_and_only_for_numbers():
    assert matches("104", "100") is False
    assert matches("104", "100", tolerance=0.05) is True
    assert matches("106", "100", tolerance=0.05) is False
    assert matches("0.01", "0", tolerance=0.05) is False


def test_the_last_statement_of_the_answer_counts():
    assert final_answer("The answer is 3. No, the answer is 4.") == "4."
    assert final_answer("Answer: 5") == "5"
    assert final_answer("nothing said") == "nothing said"
    assert final_answer("the answer is:") == "the answer is:"


def test_option_letters_stop_at_the_last_choice():
    assert option_index("D", PETS) is None
    assert option_index("C", PETS) == 2
    assert option_index("dog", ["dog", "Dog."]) is None


def test_numbers_are_exact_and_bounded():
    assert parse_number("0.1 cm").value * 10 == 1
    assert parse_number("0.1 cm").unit == "cm"
    assert parse_number("1e9999999") is None
    assert parse_number("1/0") is None
    assert parse_number("2 and 3") is None
