"""Figures of values whose intervals end at the value itself."""

from expertcut.reporting.plots import Point, PointSeries, curves, forests


def test_an_interval_whose_end_is_rounded_past_its_value_can_be_drawn() -> None:
    """Wilson's of 0 of 3 begins at 5.6e-17, of 10 of 10 it ends at 1 − 1.1e-16."""
    none, everything = (5.551115123125783e-17, 0.56), (0.72, 0.9999999999999999)
    points = [Point(0.5, 0.0, *none), Point(0.75, 1.0, *everything)]
    drawn = curves("sweep", [PointSeries("reap", points)], None, ("share", "accuracy"))
    assert {name.rpartition(".")[2] for name in drawn} == {"png", "svg"}
    turned = [Point(0.0, 0.0, *none), Point(1.0, 0.0, *everything)]
    series = [PointSeries(name, [point]) for name, point in zip("ab", turned, strict=True)]
    assert forests("audit", ("ρ", series), ("regret", [PointSeries("0.5", turned)]), [0.0])
