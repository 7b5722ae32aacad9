"""Every way in which the Hub can refuse: one line, no token, and running again finishes."""

from pathlib import Path

import pytest

from tests.support.fake_hub import TOKEN, Fault, LocalHub
from tests.support.published import REPO, Publish, copied, in_two_files, refused

REFUSALS = {401: "hf auth login", 403: "to birds/cut", 409: "run the same command again"}


@pytest.mark.parametrize("step", ["look", "create", "validate", "preupload", "batch", "commit"])
@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_at_any_step_is_one_line_and_running_again_finishes(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path, step: str, status: int
) -> None:
    folder = copied(made / "tilted", tmp_path / "tilted")
    hub.faults.append(Fault(step, status, message=f"No! {TOKEN}\n\x1b[31mred"))
    line = refused(publish(folder, REPO), f"{status} (No! *** [31mred): ", REFUSALS[status])
    assert "\x1b" not in line
    assert_again_finishes(folder, hub, publish)


@pytest.mark.parametrize("step", ["preupload", "put", "commit"])
def test_what_is_too_large_is_one_line(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path, step: str
) -> None:
    folder = copied(made / "tilted", tmp_path / "tilted")
    hub.faults.append(Fault(step, 413))
    refused(publish(folder, REPO), "413: a file is larger than the Hub takes")
    assert_again_finishes(folder, hub, publish)


@pytest.mark.parametrize("step", ["look", "create", "validate", "preupload", "put", "commit"])
def test_a_hub_that_is_at_fault_twice_is_asked_until_it_answers(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path, step: str
) -> None:
    folder = copied(made / "tilted", tmp_path / "tilted")
    fault = Fault(step, 500, times=2)
    hub.faults.append(fault)
    done = publish(folder, REPO)
    for _ in range(2):  # some steps huggingface_hub asks again by itself
        if done.status:
            refused(done, "500: the Hub has an internal error: run the same command again")
            done = publish(folder, REPO)
    assert done.status == 0, done.err
    assert fault.times == 0
    assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", ["look", "create", "batch", "put", "commit"])
def test_a_connection_that_breaks_is_one_line_and_what_is_there_is_not_sent_again(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path, step: str
) -> None:
    folder = in_two_files(copied(made / "tilted", tmp_path / "tilted"))
    # More often than huggingface_hub tries; of two files the second does not get through.
    hub.faults.append(Fault(step, times=99, after=int(step == "put")))
    refused(publish(folder, REPO), "the connection broke", "run the same command again")
    hub.faults.clear()
    put = hub.uploads.bytes_put
    assert_again_finishes(folder, hub, publish)
    sizes = sorted(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert len(sizes) == 2
    assert hub.uploads.bytes_put == sum(sizes)  # each went up once, over both runs
    assert (put > 0) == (step in ("put", "commit"))


def assert_again_finishes(folder: Path, hub: LocalHub, publish: Publish) -> None:
    done = publish(folder, REPO)
    assert done.status == 0, done.err
    assert {file.name for file in folder.iterdir()} <= set(hub.files(REPO))


def test_without_a_token_or_with_another_ones_owner_nothing_goes_up(
    made: Path,
    hub: LocalHub,
    publish: Publish,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copied(made / "tilted", tmp_path / "tilted")
    refused(publish(folder, "strangers/cut"), "403", "take one that may write to strangers/cut")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = refused(publish(folder, REPO), "401", "`hf auth login`")
    assert "hf_wrong" not in line
    monkeypatch.delenv("HF_TOKEN")
    refused(publish(folder, REPO), "no Hugging Face token: log in with `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(publish(folder, REPO), "HF_HUB_OFFLINE is set")
    assert not hub.repositories and not hub.uploads.storage
