"""Charts: what is drawn stands where the numbers say, spikes survive thinning, gaps stay gaps."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_automodel.components.loggers.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    has_values,
    line_chart,
    nice_ticks,
    running_mean,
    thin,
)


def coordinates(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def test_the_line_stands_where_the_numbers_say() -> None:
    points = [(10, 0.0), (20, 4.0), (40, 1.0)]
    root = ElementTree.fromstring(line_chart([Series("loss", points)], label="Loss"))
    (path,) = root.findall("path")
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    expected = [(LEFT + (x - 10) / 30 * width, HEIGHT - BOTTOM - y / 4 * height) for x, y in points]
    assert coordinates(path.attrib["d"]) == [
        (pytest.approx(x, abs=0.06), pytest.approx(y, abs=0.06)) for x, y in expected
    ]
    assert [title.text for title in root.iter("title")] == ["step 10 · loss 0", "step 20 · loss 4", "step 40 · loss 1"]


def test_a_gap_lifts_the_pen_and_a_lonely_value_is_a_dot() -> None:
    chart = line_chart(
        [Series("x", [(0, 1.0), (1, 2.0), (2, None), (3, 3.0), (4, math.nan), (5, 1.0), (6, 2.0)])], label="x"
    )
    root = ElementTree.fromstring(chart)
    (path,) = root.findall("path")
    assert path.attrib["d"].count("M") == 3
    assert len(root.findall("circle")) == 1
    assert [title.text for title in root.iter("title")][2] == "step 2 · x not finite"


def test_names_are_escaped() -> None:
    root = ElementTree.fromstring(line_chart([Series('<b>&"', [(0, 1.0)])], label='"><script>'))
    assert root.attrib["aria-label"] == '"><script>'
    assert next(root.iter("title")).text == 'step 0 · <b>&" 1'


numbers = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(-1e-9, 1e-9))


@settings(max_examples=150, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=60), st.booleans())
def test_any_numbers_give_a_well_formed_chart_inside_its_frame(values: list[float | None], from_zero: bool) -> None:
    series = [Series("x", list(enumerate(values)), smooth=True)]
    if not has_values(series):
        return
    root = ElementTree.fromstring(line_chart(series, label="x", from_zero=from_zero))
    for path in root.findall("path"):
        for x, y in coordinates(path.attrib["d"]):
            assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
            assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1
    grid = [float(line.attrib["y1"]) for line in root.findall("line")]
    assert (max(grid), min(grid)) == (HEIGHT - BOTTOM, TOP)
    assert 3 <= len(grid) <= 7
    assert "nan" not in "".join(path.attrib["d"] for path in root.findall("path"))


def test_thinning_keeps_spikes_ends_and_true_values() -> None:
    points: list[tuple[int, float | None]] = [(i, math.sin(i / 50)) for i in range(10_000)]
    points[6_543], points[1_234] = (6_543, 99.0), (1_234, -99.0)
    thinned = thin(points)
    assert len(thinned) <= MAX_POINTS
    assert set(thinned) <= set(points)
    assert {points[0], points[-1], (6_543, 99.0), (1_234, -99.0)} <= set(thinned)
    assert [step for step, _ in thinned] == sorted(step for step, _ in thinned)
    assert thin(points[:200]) == points[:200]


def test_running_mean_is_the_mean_of_its_window() -> None:
    points = [(i, float(i * i)) for i in range(100)]
    means = dict(running_mean(points))
    assert means[50] == pytest.approx(sum(i * i for i in range(48, 53)) / 5)
    assert means[0] == pytest.approx((0 + 1 + 4) / 3)
    assert running_mean([(0, None), (1, None), (2, None)]) == [(0, None), (1, None), (2, None)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3.2), (-1.5, 2), (1e-6, 1e-5), (11.0, 11.3), (0, 987_654)])
def test_ticks_cover_the_range_with_round_numbers(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 4)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low < high <= ticks[-1] + 1e-9 * high
    assert ticks[0] > low - step
    assert ticks[-1] < high + step
    assert 3 <= len(ticks) <= 7
    assert step / 10 ** math.floor(math.log10(step)) == pytest.approx(
        min((1, 2, 2.5, 5, 10), key=lambda factor: abs(factor - step / 10 ** math.floor(math.log10(step))))
    )
