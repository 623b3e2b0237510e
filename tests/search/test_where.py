"""Expressions of ``--where``, such as ``width > 100``, that choose rows of a table of metadata."""

import pytest

from clipfast.search.where import rows_where

pyarrow = pytest.importorskip("pyarrow")

TABLE = pyarrow.table({
    "caption": ["A cat", "a dog, asleep", None, "it's a \"cat\""],
    "width": [640, 32, 256, None],
    "score": [0.5, float("nan"), -1.0, 2.0],
    "is_own": [True, False, None, True],
    "odd name": ["1", "2", "3", "or"],
    "empty": pyarrow.nulls(4),
    "tags": [["a"], [], None, ["b"]],
})  # fmt: skip
ROWS = {
    "width >= 256": [0, 2],
    "width>=256 or score<0": [0, 2],
    "width != 256": [0, 1],
    "not width = 256": [0, 1, 3],  # unlike "width != 256", this holds for row 3, which has no width
    "width < 100.5": [1],
    "score > -2": [0, 2, 3],
    "score = 5e-1": [0],
    "caption contains cat": [0, 3],
    "caption CONTAINS 'CAT' AND width > 0": [0],
    "caption = 'A cat'": [0],
    "caption == 'a cat'": [],
    r"caption contains 'it\'s'": [3],
    r'caption contains "\"cat"': [3],
    "is_own != TRUE": [1],
    "'odd name' = 2": [1],
    '"odd name" = "or"': [3],
    "empty = 1 or empty != 1": [],
    "width = 32 or caption contains cat and width = 640": [0, 1],
    "(width = 32 or caption contains cat) and width = 640": [0],
    "not (width = 32 or not not caption contains cat)": [2],
    "not width = 32 and not width = 640": [2, 3],
}
WRONG = {
    "size = 3": "there is no column 'size'; there are: caption, width",
    "width = wide": "width' is int64: it is compared with a number, not with 'wide'",
    "is_own = yes": "true or false, not with 'yes'",
    "width contains 3": "width' is int64, which 'contains' cannot be used with",
    "tags = a": "tags' is list",
} | dict.fromkeys(
    [
        "", "width", "width >=", "width >= and", "width = 3 width = 4", "(width = 3", "width = 3)", "()", "= 3",
        "caption contains 'cat", "width < 3 < 4", "width not contains 3", "width ! 3", "width (32)",
        "__import__('os').system('true')", "(" * 500 + "width = 3" + ")" * 500, "not " * 9000 + "width = 3",
    ],
    "cannot be read; an expression is made as in",
)  # fmt: skip


@pytest.mark.parametrize("expression", ROWS)
def test_rows(expression):
    twice = rows_where(pyarrow.concat_tables([TABLE, TABLE]), f"  {expression} ").to_pylist()
    assert twice == [row in ROWS[expression] for row in range(4)] * 2
    assert len(rows_where(TABLE.slice(0, 0), expression)) == 0


@pytest.mark.parametrize("expression", WRONG, ids=lambda text: text[:30])
def test_what_cannot_be_read_is_refused(expression):
    with pytest.raises(ValueError, match=WRONG[expression]):
        rows_where(TABLE, expression)
