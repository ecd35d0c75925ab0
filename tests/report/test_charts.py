"""Charts: well-formed drawings of what they are given."""

import xml.etree.ElementTree as ElementTree

import pytest

from qrosa.report.bars import bar_pairs, heat_map
from qrosa.report.charts import Event, Series, line_chart, log_ticks, nice_ticks, thin_out, two_scales
from qrosa.report.sheet import COLOURS


def svg(markup):
    """The drawing in a chart's markup, parsed; fails when it is not well-formed."""
    return ElementTree.fromstring(markup[markup.index("<svg") :])


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 2.0), (2, 2.0)], [(i, 1 / i) for i in range(1, 2000)]])
def test_a_line_stays_inside_its_chart(points):
    drawing = svg(line_chart([Series("a & b", points), Series("none", [])], form=lambda v: f"{v:.2f}"))
    line = drawing.find("polyline")
    places = [tuple(map(float, place.split(","))) for place in line.get("points").split()]
    assert len(places) <= 500
    assert all(0 <= x <= 640 and 0 <= y <= 240 for x, y in places)
    assert "a & b" in drawing.find("circle").find("title").text


def test_nothing_to_draw_says_so():
    assert "<svg" not in line_chart([Series("a", [])], form=str)
    assert "<svg" not in bar_pairs([("x", None, None)], ("a", "b"), str)
    assert "<svg" not in heat_map({}, form=str)
    assert "<svg" not in heat_map({("q_proj", 0): 0.0}, form=str)


def test_bars_and_heat_maps():
    drawing = svg(bar_pairs([("load", 10.0, 12.0), ("train", None, 20.0)], ("planned", "measured"), str))
    assert len(drawing.findall("rect")) == 3
    values = {(kind, layer): float(layer) for kind in ("q_proj", "up_proj") for layer in range(40)}
    drawing = svg(heat_map(values, form=lambda v: f"{v:g}"))
    assert len(drawing.findall("rect")) == 80
    depths = [float(cell.get("style").split(":")[1]) for cell in drawing.findall("rect")]
    assert min(depths) == 0.0
    assert max(depths) == 1.0


def test_a_small_model_fills_the_width():
    cells = svg(heat_map({("q_proj", 0): 1.0, ("q_proj", 1): 2.0}, form=str)).findall("rect")
    assert max(float(cell.get("x")) + float(cell.get("width")) for cell in cells) > 630


def test_events_stand_across_the_lines_and_not_beside_them():
    events = [Event(3, "masks <picked>"), Event(99, "later")]
    drawing = svg(line_chart([Series("a", [(1, 1.0), (5, 2.0)])], form=str, events=events))
    (line,) = [line for line in drawing.findall("line") if line.get("class") == "event"]
    assert line.get("x1") == line.get("x2") and 300 < float(line.get("x1")) < 400
    texts = [text.text for text in drawing.findall("text")]
    assert "masks <picked>" in texts and "later" not in texts


def test_equal_ratios_are_equal_heights_on_a_logarithmic_scale():
    points = [(1, 4.0), (2, 2.0), (3, 1.0), (4, 0.0), (5, -1.0)]
    drawing = svg(line_chart([Series("a", points)], form=str, logarithmic=True))
    ys = [float(place.split(",")[1]) for place in drawing.find("polyline").get("points").split()]
    assert len(ys) == 3 and ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.11)
    assert "<svg" not in line_chart([Series("a", [(1, 0.0)])], form=str, logarithmic=True)


def test_two_scales_are_one_choice_without_a_script():
    markup = two_scales("loss", [Series("a", [(1, 4.0), (2, 2.0)])], form=str)
    assert markup.count('type="radio" name="loss"') == 2 and markup.count(" checked") == 1
    assert markup.count("<svg") == 2


def test_many_series_stay_apart():
    drawn = line_chart([Series(f"run {i}", [(1, 1.0), (2, float(i))], i) for i in range(1, COLOURS + 2)], form=str)
    styles = [line.get("class") for line in svg(drawn).findall("polyline")]
    assert len(set(styles)) == COLOURS + 1 and styles[-1] == "line s1 dashed"


@pytest.mark.parametrize(
    ("low", "high"), [(0.9, 1.1), (0.01, 3), (1, 10), (2, 2), (1e-9, 1e3), (3e-7, 5e-7), (0.5, 4.99)]
)
def test_logarithmic_ticks_enclose_the_values_and_are_above_zero(low, high):
    ticks = log_ticks(low, high)
    assert 0 < ticks[0] <= low * (1 + 1e-9) and ticks[-1] >= high * (1 - 1e-9)
    assert 2 <= len(ticks) <= 13 and ticks == sorted(ticks)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.7), (-3, 1e6), (5, 5), (0, 0), (1e-9, 2e-9)])
def test_ticks_enclose_the_values_and_are_few(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 8


def test_thinning_keeps_the_mean():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    assert all(y == 0.5 for _, y in thin_out(points, 100))
