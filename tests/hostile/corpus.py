"""All cases of all kinds."""

from tests.hostile.case import Case
from tests.hostile.cases import (
    code,
    configs,
    files,
    headers,
    indexes,
    settings,
    tensors,
    tokenizers,
)

CASES: dict[str, Case] = {}
for kind in (headers, indexes, files, tensors, configs, tokenizers, settings, code):
    CASES.update(kind.CASES)
