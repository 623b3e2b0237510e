"""Effective robustness: a line through baseline models in log-odds, and the accuracy of a model beyond that line."""

import json
import math

import numpy as np
import pytest

from clipfast.evaluate.effective_robustness import Line, Point, figures, fit, mean_interval, read_points


def test_the_line_is_that_of_least_squares_on_log_odds():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 2, 20)
    y = 0.8 * x - 1 + rng.normal(0, 0.2, 20)
    shares = (1 / (1 + np.exp(-np.stack([x, y], 1)))).tolist()
    line = fit([Point("", *both) for both in shares], "r")
    expected = np.polyfit(x, y, 1)
    assert (line.slope, line.intercept) == pytest.approx(tuple(expected), rel=1e-9)
    assert line(0.6) == pytest.approx(1 / (1 + math.exp(-(expected[0] * math.log(0.6 / 0.4) + expected[1]))))
    low, high = line.band([0.3, 0.6, 0.9])[1]
    assert low < line(0.6) < high < low + 0.1
    assert (line(0.0), line(1.0)) == (0.0, 1.0)
    assert Line(-1.0, 0.0, ())(0.0) == 1.0
    assert figures(0.0, 0.0, None) == {"drop": 0.0, "relative_drop": None, "expected": None, "effective": None}
    for points in ([], [Point("a", 0.5, 0.2), Point("b", 0.5, 0.3)], [Point("a", 1.0, 0.2)] * 3):
        with pytest.raises(ValueError, match=r"the baseline of r has .* a line needs at least two"):
            fit(points, "r")


def test_what_lies_on_the_line_has_no_effective_robustness():
    points = [Point("a", 0.2, 0.1), Point("b", 0.9, 0.7)]
    line = fit([*points, Point("none", 0.0, 0.0), Point("all", 0.95, 1.0)], "r")
    # Points with an accuracy of 0 or 1 have no finite log-odds, and are left out of the line.
    assert line.points == tuple(points)
    for point in points:
        assert figures(point.base, point.shift, line)["effective"] == pytest.approx(0, abs=1e-12)
    expected = {"drop": 0.1, "relative_drop": 1 / 9, "expected": 0.7, "effective": 0.1}
    assert figures(0.9, 0.8, line) == pytest.approx(expected)


def test_the_interval_of_a_mean_adds_the_squares_of_the_distances():
    low, high = mean_interval([0.2, 0.6], [(0.1, 0.4), (0.4, 0.9)])
    assert (low, high) == pytest.approx((0.4 - math.hypot(0.1, 0.2) / 2, 0.4 + math.hypot(0.2, 0.3) / 2))
    assert mean_interval([0.5], [(0.3, 0.6)]) == pytest.approx((0.3, 0.6))


CSV = "model,set,base,shift\nRN50,r,0.6,0.3\nRN101,r,0.7,0.4\nRN50,other,0.5,0.1\nRN50,average,0.6,0.2\n"


def test_points_are_read_from_csv_json_and_results(tmp_path):
    (tmp_path / "p.csv").write_text(CSV)
    expected = {"r": [Point("RN50", 0.6, 0.3), Point("RN101", 0.7, 0.4)], "average": [Point("RN50", 0.6, 0.2)]}
    assert read_points(tmp_path / "p.csv", ["r", "average"], "r") == expected
    rows = [dict(zip(CSV.split("\n")[0].split(","), row.split(","), strict=True)) for row in CSV.split()[1:]]
    for name, content in (("list.json", rows), ("results.json", {"points": rows, "metrics": {}})):
        (tmp_path / name).write_text(json.dumps(content))
        assert read_points(tmp_path / name, ["r", "average"], "r") == expected
    (tmp_path / "p.csv").write_text("model,base,shift\na,0.5,0.25\n")
    assert read_points(tmp_path / "p.csv", ["r", "s"], "s") == {"s": [Point("a", 0.5, 0.25)]}


WRONG = (
    ("p.csv", "model,base\na,0.5\n", "row 1 has no 'shift': a baseline needs model, base, shift"),
    ("p.csv", "model,base,shift\na,55.2,0.1\n", "row 1: base must be an accuracy from 0 to 1, got '55.2'"),
    ("p.csv", "model,base,shift\na,0.5,nan\n", "row 1: shift must be an accuracy"),
    ("p.csv", "model,base,shift,set\na,0.5,0.1,other\n", "has no points of r"),
    ("p.json", '{"a": 1}', "must hold a list of objects with model, base, shift, or results of this task"),
    ("p.json", "[", "is no JSON"),
    ("none.csv", "", "there is no file"),
)


def test_wrong_baselines(tmp_path):
    for name, content, message in WRONG:
        if content:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_points(tmp_path / name, ["r"], "r")
