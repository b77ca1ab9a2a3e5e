"""
Finds the answer in a model's text, as a human reader would: a number, one of several choices, or a phrase.

Full-width digits, letters and punctuation are read like ordinary ones (Unicode's NFKC). The last answer in the text counts, as
models correct themselves. An answer after words like "the answer is" counts more than others.
"""

import re
import unicodedata
from fractions import Fraction


# The answer comes after these. The last one counts.
ANSWER = (
    r"\\boxed\s*\{"
    r"|####"
    r"|\b(?:final\s+|correct\s+)?(?:answer|choice|option)s?\b(?:\s+(?!not\b)\w+){0,3}?\s*(?:\bis\b|\bare\b|\bbe\b|:|=)\s*:?"
    r"|(?:答案|得数)(?:应该|应当|应)?(?:就)?(?:[是为选]|:|=)*"
)
MARK = re.compile(ANSWER, re.IGNORECASE)
CHOICE_MARK = re.compile(
    ANSWER + r"|\bresult\s+(?:is|:)|(?:结果|选项)(?:[是为选]|:)*"
    r"|(?:应该|应当|应|我|故|因此|所以|正确的是|^|[,。;:!?\s])选(?:择)?(?:项)?(?:[是为]|:)*"
    r"|(?:正确的(?:选项|答案)?(?:是|为|:))",
    re.IGNORECASE,
)
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-+](?=[\d.$€£¥\\])|(?<==\s)-\s+|负)?(?:[$€£¥]\s*(?P<inner>-\s*)?)?"
    r"(?:\\[dt]?frac\s*\{\s*(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}"
    r"|(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimal>(?<=\d)\.\d+|(?<!\d)\.\d+)?"
    r"(?:(?P<mixed>\s+\d+)?\s*/\s*(?P<under>\d+)(?![\d/]))?)"
    r"(?P<unit>\s*(?:万|亿|百(?!分)|千(?![米克卡瓦])|(?:thousand|million|billion)\b)|[kK]\b)?"
)
UNITS = {
    "百": 10**2, "千": 10**3, "万": 10**4, "亿": 10**8, "k": 10**3, "thousand": 10**3, "million": 10**6, "billion": 10**9,
}  # fmt: skip
SMALL = dict(zip("零一二三四五六七八九十百千万", [*range(11), 100, 1000, 10000])) | {
    "两": 2,
    "hundred": 100,
    "thousand": 1000,
}
SMALL |= {
    word: i
    for i, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen".split()
    )
}
SMALL |= {
    word: 10 * i for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
NUMBER_WORD = "|".join(sorted(SMALL, key=len, reverse=True))
NUMBER_WORDS = re.compile(rf"(?:(?:{NUMBER_WORD})(?:[\s-]|and\b)*)+", re.IGNORECASE)
LETTER = r"(?<![A-Za-z\d])[(\[{{]?\s*(?P<letter>[A-{last}])\s*[)\]}}]?(?![A-Za-z\d])"
SMALL_LETTER = r"[(\[]\s*([a-{last}])\s*[)\]]|([a-{last}])\s*[.)]?\s*$"
NEGATED = re.compile(r"(?:\bnot|n't|不是|不|非)\s*$", re.IGNORECASE)
ANOTHER = re.compile(r"\s*(?:and|or|和|或|与|、|,|/)\s*[(]?[A-Z](?![A-Za-z])")
WORD = re.compile(r"[AI](?:'[a-z]+)?\s+(?!is\b|and\b|or\b)[a-z]|I'[a-z]")  # an article or a pronoun
# Answers of which there are two
PAIRS = ({"yes", "no"}, {"true", "false"}, {"valid", "invalid"})


def normalized(text: str) -> str:
    """Returns the text in NFKC, with one kind of minus sign, and without the markup of Markdown and LaTeX."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("–", "-")
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[,;!$%]|\\left|\\right", lambda m: m[0][1:] if m[0][1:] in ("$", "%") else "", text)
    return re.sub(r"[*`]{1,3}|__", "", text)


def after_mark(text: str) -> str | None:
    """Returns the rest of the line after the last mark that is followed by text, or None without a mark."""
    for mark in reversed(list(MARK.finditer(text))):
        rest = text[mark.end() :].lstrip(" \t\n:\"'“”")
        if rest:
            line = rest.splitlines()[0]
            if "boxed" in mark[0] and "frac" not in line:
                inside = line.split("}")[0]
                line = inside + "}" * inside.count("{")
            return line
    return None


def first_sentence(text: str) -> str:
    return re.split(r"[。;!?]|\.(?:\s|$)", text)[0]


def numbers(text: str) -> list[Fraction]:
    """Returns all numbers in a normalized text, in their order."""
    found = []
    for match in NUMBER.finditer(text):
        if match["top"]:
            value = Fraction(int(match["top"]), int(match["bottom"]) or 1)
        elif match["whole"] or match["decimal"]:
            value = Fraction((match["whole"] or "0").replace(",", "") + (match["decimal"] or ""))
            if match["under"] and int(match["under"]):
                if match["mixed"]:
                    value += Fraction(int(match["mixed"]), int(match["under"]))
                else:
                    value /= int(match["under"])
        else:
            continue
        value *= UNITS.get((match["unit"] or "").strip().lower(), 1)
        found.append(-value if (match["sign"] or "").strip() in ("-", "负") or match["inner"] else value)
    return found


def number_in_words(text: str) -> Fraction | None:
    """Returns the number in words that a text begins with, up to some ten thousands: `eighteen`, `一百二十`."""
    match = NUMBER_WORDS.match(text)
    total, current = 0, 0
    for word in re.findall(NUMBER_WORD, match[0] if match else "", re.IGNORECASE):
        value = SMALL[word.lower()]
        if word in "十百千万" or value in (100, 1000):
            total, current = total + (current or 1) * value, 0
        else:
            current += value
    return Fraction(total + current) if match else None


def number(text: str) -> Fraction | None:
    """
    Returns the number that a text gives as its answer, or None.

    After a mark it is the first (`The answer is 18 dollars, not 20`), the result of an equation (`5 + 3 = 8`), or, if that is
    a sentence that does not begin with a number, its last; without a mark, the last of all.
    """
    text = normalized(text)
    answer = after_mark(text)
    if answer is not None:
        sentence = first_sentence(re.sub(r"\([^()]*=[^()]*\)", "", answer))
        left, equals, right = sentence.split(", ")[0].rpartition("=")
        is_first = NUMBER.match(sentence) and numbers(NUMBER.match(sentence)[0])
        if equals and numbers(right) and not (is_first and re.fullmatch(r"[^\s+*/×÷-]+(?:\s+[A-Za-z]+)?\s*", left)):
            return numbers(right)[0]
        found = numbers(sentence) or numbers(answer)
        if found:
            return found[0 if is_first else -1]
        if (value := number_in_words(sentence)) is not None:
            return value
    found = numbers(text)
    return found[-1] if found else None


def choice(text: str, last: str = "D") -> str | None:
    """
    Returns the letter from A to `last` that a text chooses, or None if it names none or several.

    A letter counts after a mark, at the beginning (`C. because ...`), or if it is the only one.
    """
    text = normalized(text)
    letter = re.compile(LETTER.format(last=last))
    for mark in reversed(list(CHOICE_MARK.finditer(text))):
        if NEGATED.search(text[: mark.start()]):
            continue
        rest = text[mark.end() :].lstrip(" \t\n:\"'“”")
        match = letter.match(rest)
        if match and not WORD.match(rest):
            return None if ANOTHER.match(rest[match.end() :]) else match["letter"]
        if match := re.match(SMALL_LETTER.format(last=last.lower()), rest):
            return (match[1] or match[2]).upper()
    text = text.strip()
    match = letter.match(text)
    if match and (match.end() == len(text) or re.match(r"\s*[.。:,\n]", text[match.end() :])):
        return match["letter"]
    named = [match for match in letter.finditer(text) if not WORD.match(text[match.start() :])]
    named = {match["letter"] for match in named if not NEGATED.search(text[: match.start()])}
    return named.pop() if len(named) == 1 else None


def one_of(text: str, pair: set[str]) -> str | None:
    """Returns which of two words, such as yes and no, is the answer: after a mark, at the beginning, or else the last one."""
    text = normalized(text).strip().casefold()

    def members(part: str) -> list[str]:
        found = []
        for match in re.finditer(rf"\b(?:{'|'.join(sorted(pair))})\b", part):
            (other,) = pair - {match[0]}
            found.append(other if NEGATED.search(part[: match.start()]) else match[0])
        return found

    answer = after_mark(text)
    if answer is not None and (found := members(first_sentence(answer).rpartition("=")[2])):
        return found[0]
    found = members(text)
    if not found:
        return None
    return found[0] if re.match(rf"{found[0]}\s*(?:[.,:;!\n]|$)", text) else found[-1]


def phrase(text: str) -> str:
    """Returns the answer in words: lower case, single spaces, no final punctuation."""
    text = normalized(text)
    answer = after_mark(text)
    if answer is None:
        lines = text.strip().splitlines()
        answer = lines[-1].rpartition(": ")[2] if lines else ""
    answer = re.split(r"[.。!]\s", answer)[0]
    return re.sub(r"\s+", " ", answer).strip(" .。!\"'“”").casefold()


def read(text: str, target: str) -> Fraction | str | None:
    """
    What a text answers, in the kind of the right answer, `target`: a number, a choice such as `(B)`, one of a pair such as
    `Yes`, or the words or brackets of the question in an order, such as `burley bela` and `] )`. None if it answers nothing of
    that kind.
    """
    target = target.strip()
    if re.fullmatch(r"\([A-Z]\)", target):
        return choice(text, last="R")
    if re.fullmatch(r"-?[\d,]*\d(\.\d+)?", target):
        return number(text)
    for pair in PAIRS:
        if target.casefold() in pair:
            return one_of(text, pair)
    if re.fullmatch(r"[()\[\]{}<>\s]+", target):
        answer = re.sub(r"\s", "", phrase(text))
        return answer if re.fullmatch(r"[()\[\]{}<>]+", answer) else None
    expected = sorted(words_of(target.casefold()))
    for words in (words_of(phrase(text)), words_of(re.sub(r"\s+and\s+(?=[^\s,]+$)", " ", phrase(text)))):
        if sorted(words) == expected:
            return " ".join(words)
    return None


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\s,]+", text)


def same(text: str, target: str) -> bool:
    """Whether the answer in a text is the right one, `target`."""
    return read(text, target) is not None and read(text, target) == read("answer: " + target, target)
