"""Figures as they are shipped."""

from collections.abc import Iterator

import pytest

from expertcut.reporting import plots
from tests.conftest import SAVED_AS_SHIPPED


@pytest.fixture(scope="package", autouse=True)
def figures_as_shipped() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_saved", SAVED_AS_SHIPPED)
        yield
