"""examples/math_answers.py: what is found in a completion, and what is the same answer."""

from __future__ import annotations

import pytest
from test_examples import script


@pytest.fixture
def answers():
    return script("math_answers")


GSM8K = [
    ("The answer is: 18", 18),
    ("So 9 * 2 = 18.\nThe answer is: 18", 18),
    ("The answer is: 18.", 18),
    ("The answer is: $18 a day", 18),
    ("The answer is: 1,234", 1234),
    ("The answer is: 1,234,567", 1234567),  # 1234 in the reference
    ("The answer is: $1,234,567.89.", 1234568),
    ("The answer is: -5", -5),
    ("The answer is: +5", 5),
    ("The answer is: -1,000", -1000),
    ("The answer is: 3.0", 3),
    ("The answer is: 2.7", 3),
    ("The answer is: 2.5", 2),  # as Python rounds a half
    ("The answer is: .75", 1),
    ("The answer is: 7/2", 4),
    ("The answer is: -7/4 cups", -2),
    ("The answer is: 7/0", None),
    ("The answer is: 50%", 50),
    ("The answer is: about 12 of 30", 12),
    ("The answer is: x = 4", 4),
    ("The answer is: 1e999999", 1),
    ("The answer is: 3.4. The answer is: 6", 6),
    ("The answer is: 4\nThe answer is: none", None),
    ("The answer is 4", None),
    ("The answer is:4", None),
    ("the answer is: 4", None),
    ("#### 4", None),
    ("The answer is: ", None),
    ("", None),
]


@pytest.mark.parametrize("completion, number", GSM8K)
def test_gsm8k_extracts_the_first_number_after_the_mark(answers, completion, number):
    assert answers.gsm8k_extracted(completion) == number


def test_gsm8k_compares_whole_numbers(answers):
    right = [(answer, want) for answer in ("70,000", "70000.2", "$70,000") for want in ("70000", "70,000")]
    wrong = [("70001", "70000"), ("700", "70000"), ("7,000,000", "70000"), ("-70000", "70000"), ("many", "70000")]
    for found, expected in (*right, *wrong):
        want, _ = answers.gsm8k_expected(f"so it is\n#### {expected}")
        assert answers.scored("gsm8k", f"The answer is: {found}", want)[1] == ((found, expected) in right)
    for nothing in ("7", "#### ", "#### x", "#### 2.5", "#### 7 apples", "#### 1e5", "#### " + "9" * 10_000):
        assert answers.gsm8k_expected(nothing)[0] is None
    assert answers.gsm8k_expected("#### 1 #### -2")[0] == -2


BOXED = [
    (r"so $x = \boxed{5}$.", "5"),
    (r"\boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{\left\{ x : x^{2} \right\}}", r"\left\{ x : x^{2} \right\}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\{1, 2)}", r"\{1, 2)"),
    (r"\boxed {7}", "7"),
    (r"is $\boxed 5$ now", "5"),
    (r"is \boxed 5.", "5"),
    (r"\fbox{9}", "9"),
    (r"\fbox{9} \boxed{8} \fbox{7}", "8"),
    (r"\boxed{\frac{1}{2}", None),
    (r"\boxed{", None),
    (r"\boxed{}", None),
    (r"\boxed", None),
    ("5", None),
]


@pytest.mark.parametrize("solution, answer", BOXED)
def test_math_expects_what_is_in_the_last_box(answers, solution, answer):
    assert answers.math_expected(solution)[0] == answer


def test_math_extracts_the_sentence_after_the_mark(answers):
    expected = {
        "The answer is: 5": "5",
        "The answer is: 5.": "5",
        "The answer is: 5.\nSo it is. The end": "5",
        "The answer is: 5. The answer is: 6.": "6",
        "The answer is: 1.5.\nx": "1.5",
        "The answer is: $\\frac{1}{2}$ .": "$\\frac{1}{2}$",
        "The answer is: ": "",
        "The answer is 5": None,
    }
    assert {text: answers.math_extracted(text) for text in expected} == expected
    assert answers.scored("math", "The answer is: ", "5") == ("", False)


SAME = [
    ("5", "5"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\tfrac1{72}", r"\frac{1}{72}"),
    (r"\frac{72}1", r"\frac{72}{1}"),
    (r"\frac ab", r"\frac{a}{b}"),
    ("1/2", r"\frac{1}{2}"),
    ("0.5", r"\frac{1}{2}"),
    (".5", "0.5"),
    ("-.5", r"-\frac{1}{2}"),
    ("-1/2", r"-\frac{1}{2}"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    ("0.25", r"\frac14"),
    ("0.33333", r"\frac{1}{3}"),
    ("3.14159", "3.1416"),
    ("3.0", "3"),
    ("+3", "3"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"2 \sqrt 3", r"2\sqrt{3}"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    ("(1.0, .5)", r"(1,\frac{1}{2})"),
    (r"\left[ 0, \infty \right)", r"[0,\infty)"),
    ("-2, 1.0", "-2,1"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"5\text{ cm}", "5"),
    (r"5 \text{ cm}^2", "5"),
    (r"\text{ odd}", r"\text{odd}"),
    (r"50\%", "50"),
    (r"\$1,\!000", "1000"),
    ("1,234,567", "1234567"),
    ("k = 5", "5"),
    ("x=-3", "-3"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("x^2 + 1", "x^2+1"),
    (r"\\frac{1}{2}", r"\frac{1}{2}"),
    (".5x", "0.5x"),
    ("x + .5", "x+0.5"),
    (r"x^{.5}", "x^{0.5}"),
    ("0.3333", r"\frac{1}{3}"),
    ("f(x, 1.0, y)", "f(x,1,y)"),
]
DIFFERENT = [
    ("5", "6"),
    ("-5", "5"),
    ("", "5"),
    ("0.5", r"50\%"),  # right in the reference, which also tries a hundredth and a hundredfold
    ("50", "0.5"),
    ("5000", "50"),
    ("100001", "100000"),  # a whole number is exact, though 1e-4 would take it
    ("0.3333", r"\frac{1}{3} + 1"),
    ("0.333", r"\frac{1}{3}"),
    ("area = 5", "5"),
    ("k = xyz = 1", "xyz=1"),
    ("((1,2),3)", "(1,(2,3))"),
    ("(", "(("),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "(1,2,3)"),
    ("(0,1)", "[0,1]"),
    ("[0,1)", "(0,1]"),
    ("1,234", "1,235"),
    ("(1,234)", "1234"),
    ("2,3", "23"),
    (r"2 \text{ and } 3", r"2 \text{ and } 4"),
    (r"\text{ odd}", r"\text{ even}"),
    (r"\leftarrow", r"\rightarrow"),
    (r"\$", r"\%"),
    ("k =", "x ="),
    ("k = 5 = 5", "5"),
    (r"\frac{1}{0}", r"\frac{2}{0}"),
    (r"\frac{1}{0}", "1"),
    ("1e5", "100000"),
    ("x+1", "1+x"),  # neither MetaMath's evaluation nor this one has algebra
    # The reference counts an answer as right where its normalisation fails:
    (r"\sqrt", "5"),
    (r"\frac", "5"),
    (r"5 \text{ cm} \text{ m}", "6"),
]


@pytest.mark.parametrize("found, expected", SAME)
def test_math_answers_that_are_the_same(answers, found, expected):
    assert answers.equivalent(found, expected) and answers.equivalent(expected, found)


@pytest.mark.parametrize("found, expected", DIFFERENT)
def test_math_answers_that_differ(answers, found, expected):
    assert not answers.equivalent(found, expected)


def test_hostile_answers_end_nothing(answers):
    """Whatever a model writes is scored, as wrong, and in time that does not explode: each is 100,000 characters."""
    pieces = ["9", "1,", "1,1,1", "-", "((", "[(", "{", "=", ".", "/", "1/", ". ", ".\n", " .", "{.", "\\", "٣", "²"]
    pieces += [r"\frac", r"\frac{", r"\frac{1}", r"\sqrt", r"\text{ ", r"\boxed{", r"\left", "\x00", "\ud800"]
    pieces += ["The answer is: "]
    texts = [piece * (100_000 // len(piece)) for piece in pieces]
    texts += [
        "1e999999",
        "9" * 5000 + "/" + "9" * 5000,
        r"\frac{1}{" + "9" * 5000 + "}",
        r"\frac{" + "9" * 5000 + "}{1}",
        "1/0",
        "0/0",
        "__import__('os')",
    ]
    for text in texts:
        for completion in (text, f"The answer is: {text}", f"The answer is: ({text})"):
            assert answers.scored("gsm8k", completion, 10**9) in [(answers.gsm8k_extracted(completion), False)]
            assert not answers.scored("math", completion, r"\frac{1}{3}")[1]
            assert answers.equivalent(text, text)
        answers.math_expected(text), answers.gsm8k_expected(text)
    assert answers.gsm8k_extracted(f"The answer is: {'9' * 4300}.9") is None  # rounded it could not be written
