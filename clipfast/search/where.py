"""Filter expressions (``--where``) on the metadata of embeddings, such as ``width >= 256 and caption contains cat``.

A comparison is a column, one of ``= == != < <= > >= contains``, and a value; ``and``, ``or``, ``not`` and parentheses
join comparisons. A column or a value with spaces or other signs needs quotes, '...' or "...", in which a backslash
escapes the next character. Python's parser parses the expression, and only these forms are evaluated, never Python
code.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "equal", ast.NotEq: "not_equal", ast.Lt: "less", ast.LtE: "less_equal", ast.Gt: "greater",
    ast.GtE: "greater_equal", ast.In: "contains",
}  # fmt: skip
WORDS = {"and": "and", "or": "or", "not": "not", "contains": "in"}  # Python's operator for each word of an expression
BOOLEANS = {"true": True, "false": False}
TOKEN = re.compile(r"""
    (?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<sign>[()]|[=!<>]=?)
    |(?P<word>[^\s()=!<>'"]+)
    |(?P<wrong>\S)
""", re.VERBOSE | re.DOTALL)  # fmt: skip
HELP = "an expression is made as in: width >= 256 and (caption contains cat or not label = 'a dog')"


def rows_where(table: pyarrow.Table, expression: str) -> pyarrow.Array:
    """Evaluate a filter expression for each row of metadata; return an Arrow array of bools without nulls.

    Comparisons of text are case-sensitive, except ``contains``. Numbers are compared by value. A row whose value in a
    column is null fulfils no comparison with that column.

    Raises:
        ValueError: the expression cannot be parsed, names an unknown column, or compares values of different types.
    """
    texts, source = list[str](), list[str]()
    for match in TOKEN.finditer(expression):
        text = match[0]
        if match.lastgroup == "sign":
            source.append("==" if text == "=" else text)
        elif match.lastgroup == "word" and text.lower() in WORDS:
            source.append(WORDS[text.lower()])
        else:
            source.append("?" if match.lastgroup == "wrong" else f"_{len(texts)}")
            texts.append(re.sub(r"\\(.)", r"\1", text[1:-1]) if match.lastgroup == "quoted" else text)
    try:
        tree = ast.parse(" ".join(source), mode="eval").body
        return _evaluate_node(table, tree, texts).combine_chunks()
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"the expression {expression!r:.200} cannot be read; {HELP}") from None


def _evaluate_node(table: pyarrow.Table, node: ast.expr, texts: list[str]) -> Any:
    """Evaluate one node of a parsed filter expression for each row.

    Raises:
        SyntaxError: the node is none of the forms of a filter expression.
    """
    from pyarrow import compute

    match node:
        case ast.BoolOp():
            join = compute.or_ if isinstance(node.op, ast.Or) else compute.and_
            found = _evaluate_node(table, node.values[0], texts)
            for value in node.values[1:]:
                found = join(found, _evaluate_node(table, value, texts))
            return found
        case ast.UnaryOp():
            return compute.invert(_evaluate_node(table, node.operand, texts))
        case ast.Compare(ast.Name(column), [operator], [ast.Name(value)]) if type(operator) in COMPARISONS:
            name, text = (texts[int(one[1:])] for one in (column, value))
            return compute.fill_null(_compared(table, name, COMPARISONS[type(operator)], text), False)
    raise SyntaxError


def _compared(table: pyarrow.Table, column: str, operator: str, text: str) -> Any:
    """Compare the values of a column with the value in a filter expression, converted to the type of the column.

    Raises:
        ValueError: the column does not exist, or the operator cannot compare values of its type.
    """
    from pyarrow import compute, types

    if table.column_names.count(column) != 1:
        raise ValueError(f"there is no column {column!r}; there are: {', '.join(table.column_names) or 'none'}")
    values = table.column(column)
    kind = values.type
    if types.is_null(kind):
        return compute.is_valid(values)  # False for each row, as all values are null
    if types.is_string(kind) or types.is_large_string(kind):
        if operator == "contains":
            return compute.match_substring(values, text, ignore_case=True)
        return getattr(compute, operator)(values, text)
    is_boolean = types.is_boolean(kind)
    if operator == "contains" or not (types.is_integer(kind) or types.is_floating(kind) or is_boolean):
        raise ValueError(f"column {column!r} is {kind}, which {operator!r} cannot be used with")
    try:
        number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text
        value = BOOLEANS[text.lower()] if is_boolean else float(number) if isinstance(number, str) else number
    except (KeyError, ValueError):
        wanted = "true or false" if is_boolean else "a number"
        raise ValueError(f"column {column!r} is {kind}: it is compared with {wanted}, not with {text!r}") from None
    return getattr(compute, operator)(values, value)
