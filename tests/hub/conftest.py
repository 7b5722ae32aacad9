"""Checkpoints to publish, a Hub, and the command."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fake_hub import TOKEN, LocalHub
from tests.support.published import Done, Publish, hub_of_this_process, make_checkpoints, run


@pytest.fixture(scope="package")
def made(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_checkpoints(checkpoint("olmoe"), quiz_folder, tmp_path_factory.mktemp("made"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with hub_of_this_process(monkeypatch, tmp_path / "hf") as running:
        yield running


@pytest.fixture
def publish(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Publish:
    """`publish CHECKPOINT REPO …`, whose words never hold the token."""

    def publish(*words: object) -> Done:
        done = run(monkeypatch, capsys, "publish", *words)
        assert TOKEN not in done.out + done.err
        return done

    return publish
