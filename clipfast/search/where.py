"""Choosing rows of a table by an expression, such as ``width >= 256 and caption contains cat``.

    expression = term {"or" term}
    term       = factor {"and" factor}
    factor     = "not" factor | "(" expression ")" | column operator value
    operator   = "=" | "==" | "!=" | "<" | "<=" | ">" | ">=" | "contains"

A column or a value with spaces or other signs in it stands in quotes, '...' or "...", in which a backslash takes the
next character as it is. Nothing is evaluated but this.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow

COMPARISONS = {
    "=": "equal", "==": "equal", "!=": "not_equal", "<": "less", "<=": "less_equal", ">": "greater",
    ">=": "greater_equal",
}  # fmt: skip
CONTAINS = "contains"
WORDS = ("and", "or", "not", CONTAINS)
BOOLEANS = {"true": True, "false": False}
MAX_DEPTH = 50  # of parentheses and of "not"
TOKEN = re.compile(r"""\s*(?:
    (?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<sign>[()]|[=!<>]=?)
    |(?P<word>[^\s()=!<>'"]+)
)""", re.VERBOSE | re.DOTALL)  # fmt: skip
HELP = "an expression is made as in: width >= 256 and (caption contains cat or not label = 'a dog')"


class _Token(NamedTuple):
    text: str
    kind: str
    place: int

    def is_word(self, *words: str) -> bool:
        return self.kind == "word" and self.text.lower() in words


def rows_where(table: pyarrow.Table, expression: str) -> pyarrow.Array:
    """Return, for each row of a table, whether the expression holds: a bool array without nulls.

    Text is compared as it is, but ``contains`` does not tell upper from lower case. Numbers are compared as numbers. A
    row without a value in a column fulfils no comparison with it.

    Raises:
        ValueError: the expression cannot be read, names no column, or compares what cannot be compared.
    """
    return _Parser(table, expression).parse()


class _Parser:
    def __init__(self, table: pyarrow.Table, expression: str) -> None:
        self.table, self.expression = table, expression
        self.tokens = self._tokens()
        self.next = 0

    def _tokens(self) -> list[_Token]:
        found, place = list[_Token](), 0
        end = len(self.expression.rstrip())
        while place < end:
            match = TOKEN.match(self.expression, place)
            if match is None:
                raise self._error("this cannot be read", len(self.expression) - len(self.expression[place:].lstrip()))
            kind = str(match.lastgroup)
            text = match[kind]
            found.append(
                _Token(re.sub(r"\\(.)", r"\1", text[1:-1]) if kind == "quoted" else text, kind, match.start(kind))
            )
            place = match.end()
        return found

    def _error(self, what: str, place: int) -> ValueError:
        return ValueError(f"{self.expression!r}: {what}, at {self.expression[place:] or 'the end'!r}; {HELP}")

    def _peek(self) -> _Token:
        end = _Token("", "end", len(self.expression))
        return self.tokens[self.next] if self.next < len(self.tokens) else end

    def _take(self) -> _Token:
        token = self._peek()
        self.next += 1
        return token

    def parse(self) -> pyarrow.Array:
        found = self._any(0)
        left = self._peek()
        if left.kind != "end":
            raise self._error("'and' or 'or' is expected", left.place)
        return found.combine_chunks()

    def _any(self, depth: int) -> Any:
        return self._joined(self._all, "or", depth)

    def _all(self, depth: int) -> Any:
        return self._joined(self._one, "and", depth)

    def _joined(self, inner: Callable[[int], Any], word: str, depth: int) -> Any:
        from pyarrow import compute

        found = inner(depth)
        while self._peek().is_word(word):
            self._take()
            found = {"or": compute.or_, "and": compute.and_}[word](found, inner(depth))
        return found

    def _one(self, depth: int) -> Any:
        from pyarrow import compute

        token = self._take()
        if depth > MAX_DEPTH:
            raise self._error(f"it is nested more than {MAX_DEPTH} times", token.place)
        if token.is_word("not"):
            return compute.invert(self._one(depth + 1))
        if token.kind != "sign":
            return self._comparison(token)
        if token.text != "(":
            raise self._error("a column is expected", token.place)
        found = self._any(depth + 1)
        if self._take().text != ")":
            raise self._error("a parenthesis is not closed", token.place)
        return found

    def _comparison(self, column: _Token) -> Any:
        if column.kind == "end" or column.is_word(*WORDS):
            raise self._error("a column is expected", column.place)
        if self.table.column_names.count(column.text) != 1:
            there = ", ".join(self.table.column_names) or "none"
            raise ValueError(f"there is no column {column.text!r}; there are: {there}")
        operator, value = self._take(), self._take()
        name = operator.text.lower()
        is_operator = (operator.kind == "sign" and name in COMPARISONS) or operator.is_word(CONTAINS)
        if not is_operator:
            known = " ".join([*COMPARISONS, CONTAINS])
            raise self._error(f"a comparison ({known}) is expected", operator.place)
        if value.kind in ("end", "sign"):
            raise self._error("a value is expected", value.place)
        return self._compared(column.text, name, value)

    def _compared(self, column: str, operator: str, value: _Token) -> Any:
        from pyarrow import compute, types

        values = self.table.column(column)
        kind = values.type
        if types.is_null(kind):
            found = compute.is_valid(values)  # nothing holds
        elif types.is_string(kind) or types.is_large_string(kind):
            if operator == CONTAINS:
                found = compute.match_substring(values, value.text, ignore_case=True)
            else:
                found = getattr(compute, COMPARISONS[operator])(values, value.text)
        elif operator == CONTAINS or not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
            raise ValueError(f"column {column!r} is {kind}, which {operator!r} cannot be used with")
        else:
            found = getattr(compute, COMPARISONS[operator])(values, _number(column, kind, value.text))
        return compute.fill_null(found, False)


def _number(column: str, kind: Any, text: str) -> bool | int | float:
    """Return the value that a text stands for, to be compared with values of a type of numbers or truth.

    Raises:
        ValueError: it stands for none.
    """
    from pyarrow import types

    try:
        if types.is_boolean(kind):
            return BOOLEANS[text.lower()]
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else float(text)
    except (KeyError, ValueError):
        wanted = "true or false" if types.is_boolean(kind) else "a number"
        raise ValueError(f"column {column!r} is {kind}: it is compared with {wanted}, not with {text!r}") from None
