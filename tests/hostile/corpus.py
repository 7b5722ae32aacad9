"""All cases of all kinds."""

from tests.hostile.case import Case
from tests.hostile.cases import (
    code,
    configs,
    documents,
    files,
    headers,
    indexes,
    plans,
    profiles,
    quizzes,
    recipes,
    results,
    settings,
    tensors,
    tokenizers,
    traces,
)

CASES: dict[str, Case] = {}
for kind in (
    *(headers, indexes, files, tensors, configs, tokenizers, settings, code),
    *(documents, profiles, traces, plans, results, recipes, quizzes),
):
    CASES.update(kind.CASES)
