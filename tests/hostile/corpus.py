"""All cases of all kinds."""

from tests.hostile.case import Case
from tests.hostile.cases import indexes

CASES: dict[str, Case] = {}
for kind in (indexes,):
    CASES.update(kind.CASES)
