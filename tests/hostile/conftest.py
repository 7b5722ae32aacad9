"""The world, made once."""

import pytest

from tests.hostile.world import Mended, World, make_world


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> World:
    """To be copied before it is changed."""
    return make_world(tmp_path_factory.mktemp("hostile") / "world")


@pytest.fixture(scope="session")
def mended(pristine: World, tmp_path_factory: pytest.TempPathFactory) -> Mended:
    """To be changed by one case after another."""
    return Mended(pristine, tmp_path_factory.mktemp("mended") / "world")
