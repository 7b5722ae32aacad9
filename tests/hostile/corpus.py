"""All cases of all kinds."""

from tests.hostile.case import Case
from tests.hostile.cases import documents, plans, profiles, quizzes, recipes, results

CASES: dict[str, Case] = {}
for kind in (documents, profiles, plans, results, recipes, quizzes):
    CASES.update(kind.CASES)
