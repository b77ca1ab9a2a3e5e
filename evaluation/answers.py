"""
What a model's text answers, read as a person would: a number, one of several choices, or a phrase.

Full-width digits, letters and punctuation are read like others (Unicode's NFKC). What the text says last counts, as people
correct themselves; what it says after words like "the answer is" counts more than what stands elsewhere.
"""

import re
import unicodedata
from fractions import Fraction


# After these comes the answer. The last of them counts.
MARK = re.compile(
    r"\\boxed\s*\{"
    r"|####"
    r"|\b(?:final\s+|correct\s+)?(?:answer|result|choice|option)s?\b(?:\s+(?!not\b)\w+){0,2}?\s*(?:\bis\b|\bare\b|:|=)\s*:?"
    r"|(?:答案|结果|选项|得数)(?:应该|应当|应)?(?:就)?(?:[是为选]|:|=)*"
    r"|(?:应该|应当|应|我|故|因此|所以|正确的是|^|[,。;:!?\s])选(?:择)?(?:项)?(?:[是为]|:)*"
    r"|(?:正确的(?:选项|答案)?(?:是|为|:))",
    re.IGNORECASE,
)
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-+]\s*)?(?:[$€£¥]\s*(?P<inner>-\s*)?)?"
    r"(?:\\[dt]?frac\s*\{\s*(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}"
    r"|(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimal>(?<=\d)\.\d+|(?<!\d)\.\d+)?"
    r"(?:(?P<mixed>\s+\d+)?\s*/\s*(?P<under>\d+)(?![\d/]))?)"
    r"(?P<unit>\s*[万亿])?"
)
UNITS = {"万": 10**4, "亿": 10**8}
LETTER = r"(?<![A-Za-z\d])[(\[{{]?\s*(?P<letter>[A-{last}])\s*[)\]}}]?(?![A-Za-z\d])"
NEGATED = re.compile(r"(?:\bnot|n't|不是|不|非)\s*$", re.IGNORECASE)
ANOTHER = re.compile(r"\s*(?:and|or|和|或|与|、|,|/)\s*[(]?[A-Z](?![A-Za-z])")
ARTICLE = re.compile(r"A\s+(?!is\b|and\b|or\b)[a-z]")


def normalized(text: str) -> str:
    """NFKC, with one sort of minus, and without Markdown's and LaTeX's decoration."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("–", "-")
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[,;!$%]|\\left|\\right", lambda m: m[0][1:] if m[0][1:] in ("$", "%") else "", text)
    return re.sub(r"[*`]{1,3}|__", "", text)


def after_mark(text: str) -> str | None:
    """What stands after the last mark that something follows, up to the end of that line; None without a mark."""
    for mark in reversed(list(MARK.finditer(text))):
        rest = text[mark.end() :].lstrip(" \t\n:\"'“”")
        if rest:
            line = rest.splitlines()[0]
            return (
                line.split("}")[0] + "}" * line.split("}")[0].count("{")
                if "boxed" in mark[0] and "frac" not in line
                else line
            )
    return None


def numbers(text: str) -> list[Fraction]:
    """All numbers in a normalized text, in their order."""
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
        value *= UNITS.get((match["unit"] or "").strip(), 1)
        found.append(-value if (match["sign"] or "").strip() == "-" or match["inner"] else value)
    return found


def number(text: str) -> Fraction | None:
    """
    The number that a text answers with, or None.

    After a mark it is the first (`The answer is 18 dollars, not 20`), or the result of an equation there; without one, the
    last.
    """
    text = normalized(text)
    answer = after_mark(text)
    if answer is not None:
        statement = re.split(r"[。;!?]|\.(?:\s|$)|,\s", answer)[0]
        if "=" in statement:
            statement = statement.rsplit("=", 1)[1]
        found = numbers(statement) or numbers(answer)
        if found:
            return found[0]
    found = numbers(text)
    return found[-1] if found else None


def choice(text: str, last: str = "D") -> str | None:
    """
    The letter from A to `last` that a text chooses, or None if it names none, or several without choosing.

    A letter counts after a mark, at the beginning (`C. because ...`), or if it is the only one.
    """
    text = normalized(text)
    letter = re.compile(LETTER.format(last=last))
    for mark in reversed(list(MARK.finditer(text))):
        if NEGATED.search(text[: mark.start()]):
            continue
        rest = text[mark.end() :].lstrip(" \t\n:\"'“”")
        match = letter.match(rest)
        if match:
            return None if ANOTHER.match(rest[match.end() :]) else match["letter"]
    text = text.strip()
    match = letter.match(text)
    if match and (match.end() == len(text) or re.match(r"\s*[.。:,\n]", text[match.end() :])):
        return match["letter"]
    named = [match for match in letter.finditer(text) if not ARTICLE.match(text[match.start() :])]
    named = {match["letter"] for match in named if not NEGATED.search(text[: match.start()])}
    return named.pop() if len(named) == 1 else None


def phrase(text: str) -> str:
    """The words that a text answers with, in small letters, single spaces and without final punctuation."""
    text = normalized(text)
    answer = after_mark(text)
    if answer is None:
        lines = text.strip().splitlines()
        answer = lines[-1] if lines else ""
    return re.sub(r"\s+", " ", answer).strip(" .。!\"'“”").casefold()


def read(text: str, target: str) -> Fraction | str | None:
    """
    What a text answers, in the kind of the right answer, `target`: a number, a choice such as `(B)`, or words such as `Yes`,
    `burley bela` and `] )`. None if it answers nothing of that kind.
    """
    target = target.strip()
    if re.fullmatch(r"\([A-Z]\)", target):
        return choice(text, last="R")
    if re.fullmatch(r"-?[\d,]*\d(\.\d+)?", target):
        return number(text)
    answer, expected = phrase(text), phrase("answer: " + target)
    if re.fullmatch(r"\w+", expected):  # one word, which an explanation may follow
        answer = re.match(r"[\w-]*", answer)[0]
    return re.sub(r"[, ]", "", answer) or None


def same(text: str, target: str) -> bool:
    """Whether a text gives the right answer, `target`."""
    return read(text, target) is not None and read(text, target) == read("answer: " + target, target)
