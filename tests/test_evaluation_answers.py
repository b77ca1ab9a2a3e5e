"""Answers in every odd format that models use are read as a person would read them."""

import json
from fractions import Fraction

import pytest

from evaluation import answers


@pytest.mark.parametrize(
    "text, expected",
    [
        ("#### 18", 18),
        ("####  18", 18),
        ("16 - 3 - 4 = 9.\n9 * 2 = 18.\n#### 18", 18),
        ("The answer is 18.", 18),
        ("So the final answer is: 7", 7),
        ("The answer is 18 dollars, not 20.", 18),
        ("The answer is 5 + 3 = 8.", 8),
        ("The answer is 5. Wait, that is wrong. The answer is 6.", 6),
        ("**Answer:** 1,000", 1000),
        ("$1,234.00", 1234),
        ("The answer is $1,234.00.", 1234),
        ("It costs 3.50 dollars", Fraction(7, 2)),
        (".5", Fraction(1, 2)),
        ("12 dollars", 12),
        ("16 - 3 - 4 = 9, and 9 * 2 = 18", 18),
        ("x = 12.", 12),
        ("so 18.", 18),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{0}", 3),
        ("1 1/2 cups", Fraction(3, 2)),
        (r"\boxed{12}", 12),
        (r"Thus $\boxed{-12}$.", -12),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{\text{12 dollars}}", 12),
        ("-5", -5),
        ("−5", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("the pages 2-3", 3),
        ("So the answer is 15%", 15),
        ("答案是 6。", 6),
        ("答案：１８", 18),
        ("答案:\n18", 18),
        ("答案为-5", -5),
        ("所以答案是３，４００元。", 3400),
        ("结果是 3.5 元。", Fraction(7, 2)),
        ("答案是3万", 30000),
        ("答案：5百元", 500),
        ("答案是3千。", 3000),
        ("答案是3千米。", 3),
        ("$70k", 70_000),
        ("1.5 million", 1_500_000),
        ("答案是负5。", -5),
        ("答案是十八。", 18),
        ("答案是一百二十。", 120),
        ("The answer is eighteen.", 18),
        ("The answer is two hundred and five.", 205),
        ("The result is 20 eggs. She then gives away 5.\nTherefore she has 20 - 5 = 15 eggs left.", 15),
        ("计算结果为20，再减去5，最后剩下15个。", 15),
        ("Answer: Janet sells 9 eggs for $2 each, so she makes $18 per day.", 18),
        ("答案：小明有3个苹果和4个梨，所以一共是7个水果。", 7),
        ("The answer is 18 (= 9 * 2).", 18),
        ("The answer is 9 = 3^2", 9),
        ("The answer is 10 - 4 = 6 eggs.", 6),
        ("Answer - 18", 18),
        ("Total earned:\n- 18 dollars", 18),
        ("The answer is: 18\nExplanation: the result is 9 times 2", 18),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_numbers(text, expected):
    assert answers.number(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("C", "C"),
        ("(A)", "A"),
        ("C. because A is wrong", "C"),
        ("The answer is (B).", "B"),
        ("The answer is B, since A is not.", "B"),
        ("The correct option is **C**.", "C"),
        ("Answer: d) is for dogs. Answer: D", "D"),
        ("B is right", "B"),
        (r"\boxed{D}", "D"),
        (r"\boxed{\text{D}}", "D"),
        ("答案：C。", "C"),
        ("答案是 C", "C"),
        ("所以答案是A。", "A"),
        ("答案：（Ａ）", "A"),
        ("正确答案是Ｂ", "B"),
        ("选 B", "B"),
        ("故选：D", "D"),
        ("应选C", "C"),
        ("不选A，选B", "B"),
        ("因此,选项C正确", "C"),
        ("The answer is A. No, the answer is C.", "C"),
        ("The answer is not A but B", "B"),
        ("The answer is A and B", None),
        ("选A、B", None),
        ("I like A dog", None),
        ("E", None),
        ("", None),
    ],
)
def test_choices(text, expected):
    assert answers.choice(text) == expected


@pytest.mark.parametrize("target", ["Yes", "] )", "burley bela"])
@pytest.mark.parametrize("text", ["bowling was", ")) and so on", "I's a lot"])
def test_what_is_no_answer(text, target):
    assert answers.read(text, target) is None


def test_all_answers_of_bbh(shared):
    """Of the real questions: each is read in several formats, and none is taken for another."""
    for path in sorted((shared / "eval/bbh").glob("*.json")):
        targets = [example["target"] for example in json.loads(path.read_text(encoding="utf-8"))["examples"]]
        for target, other in zip(targets, targets[1:]):
            for say in ("{}", "So the answer is {}.", "Answer: {}", "**{}**", "The answer is {}. I hope this helps!"):
                assert answers.same(say.format(target), target), (path.name, say, target)
            assert target.strip() == other.strip() or not answers.same(f"So the answer is {other}.", target), path.name


@pytest.mark.parametrize(
    "text, target, right",
    [
        ("We see ... So the answer is (B).", "(B)", True),
        ("So the answer is (C).", "(B)", False),
        ("So the answer is B", "(B)", True),
        ("So the answer is (R).", "(R)", True),
        ("So the answer is No.", "No", True),
        ("So the answer is no, because we moved.", "No", True),
        ("So the answer is Yes.", "No", False),
        ("So the answer is valid.", "invalid", False),
        ("So the answer is **True**.", "True", True),
        ("So the answer is -12.", "-12", True),
        ("So the answer is -12.", "12", False),
        ("So the answer is burley bela.", "burley bela", True),
        ("So the answer is burley, bela", "burley bela", True),
        ("So the answer is bela burley.", "burley bela", False),
        ("So the answer is ] ).", "] )", True),
        ("So the answer is ])", "] )", True),
        ("So the answer is ] ] )", "] )", False),
        ("", "No", False),
        ("I would choose B.", "(B)", True),
        ("I believe (B) is right.", "(B)", True),
        ("So the answer is (I).", "(I)", True),
        ("Answer: (b)", "(B)", True),
        ("Therefore, yes.", "Yes", True),
        ("So the answer is (Yes).", "Yes", True),
        ("The expression is True.", "True", True),
        ("True and False = False", "False", True),
        ("The argument is invalid.", "invalid", True),
        ("The argument is not valid.", "invalid", True),
        ("So the answer would be No.", "No", True),
        ("The answer to the question is no.", "No", True),
        ("No. Because ...\nWe end 3 steps away.", "No", True),
        ("So the answer is burley bela. I hope this helps!", "burley bela", True),
        ("The answer is bela, burley, and cat.", "bela burley cat", True),
        ("So the sorted words are: bela burley", "bela burley", True),
        ("So the answer is ] ). The final sequence is closed.", "] )", True),
    ],
)
def test_answers_of_bbh(text, target, right):
    assert answers.same(text, target) is right
