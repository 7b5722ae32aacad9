"""Every file of the corpus is refused: status 2, one line that names it, nothing written."""

from pathlib import Path

import pytest

from tests.hostile.case import check_refusal
from tests.hostile.corpus import CASES
from tests.hostile.running import run, run_alone
from tests.hostile.world import Mended, World

N_ALONE = 2


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_in_one_line(name: str, mended: Mended) -> None:
    check_refusal(CASES[name], mended.mend(), run)


@pytest.mark.parametrize("name", list(CASES)[:: max(1, len(CASES) // N_ALONE)])
def test_a_hostile_file_is_refused_in_a_process_of_its_own(
    name: str, pristine: World, tmp_path: Path
) -> None:
    check_refusal(CASES[name], pristine.copy(tmp_path / "world"), run_alone)
