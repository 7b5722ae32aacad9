"""Figures of values whose intervals end at the value itself."""

from expertcut.reporting.plots import Series, draw_forest, draw_lines


def test_an_interval_whose_end_is_rounded_past_its_value_can_be_drawn() -> None:
    """Wilson's of 0 of 3 begins at 5.6e-17, of 10 of 10 it ends at 1 − 1.1e-16."""
    low, high = (5.551115123125783e-17, 0.72), (0.56, 0.9999999999999999)
    series = Series("reap", (0.0, 1.0), low, high, x=(0.5, 0.75))
    drawn = draw_lines("sweep", [series], None, ("share", "accuracy"))
    assert {name.rpartition(".")[2] for name in drawn} == {"png", "svg"}
    regrets = [Series("0.5", (0.0, 1.0))]
    labels = ("ρ", "regret")
    assert draw_forest("audit", ["a", "b"], series, regrets, labels=labels, marks=[0.0])
