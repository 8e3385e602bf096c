"""The calculator that a model may call while it writes: arithmetic, and counting letters in a word.

The expression comes from a model, hence from anybody. It is parsed here and never evaluated by Python; its
length bounds the size of every number in it, so the work is bounded too.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 256  # characters; GSM8K's longest expression has 30
MAX_DEPTH = 32  # nested parentheses and signs
DECIMALS = 8  # of a result; 1/3 prints as 0.33333333

_TOKEN = re.compile(r"\s*(?:(\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d*)?|\.\d+)|(//|[-+*/%()]))", re.ASCII)
_STRING = r"""(?:'([^'\\\n]*)'|"([^"\\\n]*)")"""  # no escapes
_COUNT = re.compile(rf"\s*{_STRING}\s*\.\s*count\s*\(\s*{_STRING}\s*\)\s*")


class _Refused(Exception):
    """The expression is none of ours."""


def calculate(expression: str) -> str | None:
    """The value of an expression as text, None when there is none.

    Understood: + - * / // % and parentheses over decimal numbers (1,000.50 too), and 'word'.count('letter').
    Arithmetic is exact: 0.1+0.2 is 0.3 and 10/2 is 5, as in GSM8K's own annotations; a result is rounded, half
    to even, only beyond DECIMALS.
    """
    if len(expression) > MAX_LENGTH:
        return None
    match = _COUNT.fullmatch(expression)
    if match:
        word, letter = match[1] or match[2] or "", match[3] or match[4] or ""
        return str(word.count(letter))
    try:
        return _format(_Parser(expression).parse())
    except (_Refused, ZeroDivisionError):
        return None


def _format(value: Fraction) -> str:
    """Decimal digits without an exponent and without trailing zeros."""
    scaled = round(value * 10**DECIMALS)  # half to even
    whole, decimals = divmod(abs(scaled), 10**DECIMALS)
    text = f"{whole}.{decimals:0{DECIMALS}d}".rstrip("0").rstrip(".")
    return f"-{text}" if scaled < 0 else text


class _Parser:
    """Recursive descent with Python's precedence: signs, then * / // %, then + -."""

    def __init__(self, expression: str) -> None:
        self.tokens: list[Fraction | str] = []
        self.next = 0
        at, text = 0, expression.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise _Refused
            number, operator = match.groups()
            self.tokens.append(Fraction(number.replace(",", "").rstrip(".")) if number else operator)
            at = match.end()

    def parse(self) -> Fraction:
        value = self.sum(0)
        if self.next < len(self.tokens):
            raise _Refused
        return value

    def take(self, *operators: str) -> str | None:
        """The next token if it is one of the operators."""
        token = self.tokens[self.next] if self.next < len(self.tokens) else None
        if isinstance(token, str) and token in operators:
            self.next += 1
            return token
        return None

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while operator := self.take("+", "-"):
            term = self.product(depth)
            value = value + term if operator == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while operator := self.take("*", "/", "//", "%"):
            factor = self.factor(depth)
            if operator == "*":
                value *= factor
            elif operator == "/":
                value /= factor
            else:
                value = Fraction(value // factor) if operator == "//" else value % factor
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise _Refused
        if sign := self.take("+", "-"):
            value = self.factor(depth + 1)
            return -value if sign == "-" else value
        if self.take("("):
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise _Refused
            return value
        token = self.tokens[self.next] if self.next < len(self.tokens) else None
        if not isinstance(token, Fraction):
            raise _Refused
        self.next += 1
        return token
