"""Whatever a document says, as long as it is one: it is shown, or refused in words."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile.world import World
from tests.support.readable import FEW, changed, shown_or_refused, written

DOCUMENTS = ("results.json", "sweep/sweep.json", "audit/audit.json", "checkpoints/cut/plan.json")


@pytest.mark.parametrize("name", DOCUMENTS)
@FEW
@given(st.data())
def test_any_document_is_shown_or_refused(
    name: str, pristine: World, tmp_path: Path, data: st.DataObject
) -> None:
    value = json.loads((pristine / name).read_text())
    file = written(tmp_path / "document.json", json.dumps(value))
    assert shown_or_refused(file)  # as it is
    for _ in range(data.draw(st.integers(1, 3))):
        value = data.draw(changed(value)) if value else value
    shown_or_refused(written(file, json.dumps(value)))


def test_a_page_passes_over_times_that_no_calendar_has(pristine: World, tmp_path: Path) -> None:
    from tests.hostile.running import run

    world = pristine.copy(tmp_path / "world")
    notes = world / world.profile / "run.json"
    for finished in (-1e300, 1 << 62):
        notes.write_text(json.dumps({"finished": finished, "elapsed_s": 1e308}))
        ended = run(world.root, ["report", world.profile, "--out", "page.html"])
        assert ended.status == 0, ended.stderr
