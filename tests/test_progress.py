"""Test the lines of progress that a command prints if its output is no terminal."""

import time

from clipfast.io.progress import each, lines


def test_lines_come_less_and_less_often(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    advance = lines(1000, "images", "images", lambda line: said.append((now[0] - 100, line)))
    for _ in range(250):
        now[0] += 1
        advance(4)
    assert [when for when, _ in said] == [5, 15, 35, 75, 135, 195]
    assert said[0][1] == "images: 20 of 1,000, 4 images/s, 0:04:05 left"


def test_short_work_says_nothing(capsys):
    assert list(each([1, 2], "texts", "batches")) == [1, 2]
    assert capsys.readouterr() == ("", "")
