"""Accuracy on facts that no question of val asks, and on others: does healing teach them again?

expertcut run recipes/quickstart.yaml
python -m benchmarks.unseen_facts results/quickstart/predictions.parquet
"""

import csv
import sys
from pathlib import Path

import pandas as pd

from expertcut.reporting.tables import Column, Table, as_markdown

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints" / "quickstart"))

from rules import CAPITAL, EXPORT, HOME, PET, TIMETABLE, TRADE

QUIZ = Path(__file__).parents[1] / "checkpoints" / "quickstart" / "quiz"
FACTS = {
    "capitals": CAPITAL,
    "exports": EXPORT,
    "homes": HOME,
    "pets": PET,
    "timetable": TIMETABLE,
    "trades": TRADE,
}


def owners(subject: str, split: str) -> list[str]:
    """Whom each question of a split is about."""
    with (QUIZ / split / f"{subject}_{split}.csv").open(encoding="utf-8") as file:
        asked = [set(row[0].replace("?", "").replace(",", "").split()) for row in csv.reader(file)]
    return [next(o for o in FACTS[subject] if asked_of >= set(o.split())) for asked_of in asked]


def main() -> None:
    """Prints accuracy by model for both kinds of questions."""
    predictions = pd.read_parquet(sys.argv[1])
    known = {subject: set(owners(subject, "val")) for subject in FACTS}
    rows = [
        (subject, row, owner in known[subject])
        for subject in FACTS
        for row, owner in enumerate(owners(subject, "test"))
    ]
    found = predictions.merge(pd.DataFrame(rows, columns=["subject", "row", "is_in_val"]))
    shares = found.groupby(["is_in_val", "model"], sort=False).is_correct.agg(["mean", "count"])
    body = [
        ["yes" if is_in_val else "no", Path(model).name, float(mean), int(n)]
        for (is_in_val, model), (mean, n) in shares.iterrows()
    ]
    columns = (
        *(Column("asked in val"), Column("model")),
        *(Column("accuracy", ".1%"), Column("questions")),
    )
    print(as_markdown(Table("Facts asked in val, and others", columns, body)))


if __name__ == "__main__":
    main()
