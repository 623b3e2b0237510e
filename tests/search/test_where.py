"""Expressions that choose rows of a table."""

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


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ("width >= 256", [0, 2]),
        ("width>=256and score<0", None),
        ("width != 256", [0, 1]),
        ("not width = 256", [0, 1, 3]),  # not the same: the last row has no width
        ("width < 100.5", [1]),
        ("score > -2", [0, 2, 3]),
        ("score = 5e-1", [0]),
        ("caption contains cat", [0, 3]),
        ("caption CONTAINS 'CAT' AND width > 0", [0]),
        ("caption = 'A cat'", [0]),
        ("caption == 'a cat'", []),
        ("caption contains ','", [1]),
        (r"caption contains 'it\'s'", [3]),
        (r'caption contains "\"cat"', [3]),
        ("is_own = true", [0, 3]),
        ("is_own != TRUE", [1]),
        ("'odd name' = 2", [1]),
        ('"odd name" = "or"', [3]),
        ("empty = 1 or empty != 1", []),
        ("width = 32 or caption contains cat and width = 640", [0, 1]),
        ("(width = 32 or caption contains cat) and width = 640", [0]),
        ("not (width = 32 or not not caption contains cat)", [2]),
        ("not width = 32 and not width = 640", [2, 3]),
        ("  width = 32  ", [1]),
    ],
)
def test_rows(expression, rows):
    if rows is None:
        with pytest.raises(ValueError, match="with a number, not with '256and'"):
            rows_where(TABLE, expression)
        return
    found = rows_where(TABLE, expression).to_pylist()
    assert [row for row, is_chosen in enumerate(found) if is_chosen] == rows
    assert None not in found


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "a column is expected, at 'the end'"),
        ("width", "a comparison .* is expected, at 'the end'"),
        ("width >=", "a value is expected"),
        ("width >= and", "a number, not with 'and'"),
        ("width = 3 width = 4", "'and' or 'or' is expected, at 'width = 4'"),
        ("(width = 3", "a parenthesis is not closed"),
        ("width = 3)", r"'and' or 'or' is expected, at '\)'"),
        ("caption contains 'cat", 'this cannot be read, at "\'cat"'),
        ("= 3", "a column is expected"),
        ("and = 3", "a column is expected"),
        ("size = 3", "there is no column 'size'; there are: caption, width"),
        ("width = wide", "column 'width' is int64: it is compared with a number, not with 'wide'"),
        ("is_own = yes", "true or false, not with 'yes'"),
        ("width contains 3", "column 'width' is int64, which 'contains' cannot be used with"),
        ("tags = a", "column 'tags' is list"),
        ("__import__('os').system('true')", "there is no column|a comparison"),
        ("(" * 200 + "width = 3" + ")" * 200, "nested more than 50"),
        ("not " * 2000 + "width = 3", "nested more than 50"),
    ],
)
def test_what_cannot_be_read_is_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        rows_where(TABLE, expression)


def test_no_rows():
    assert len(rows_where(TABLE.slice(0, 0), "width > 3")) == 0
    assert (
        rows_where(pyarrow.concat_tables([TABLE, TABLE]), "width = 32").to_pylist() == [False, True, False, False] * 2
    )
