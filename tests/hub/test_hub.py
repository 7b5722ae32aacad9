"""`publish` against a Hub on loopback: what goes up, what is refused, and what loads back."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expertcut import files
from expertcut.edits.plan import load_plan, plan_text
from expertcut.models.load import find_source
from tests.support.fake_hub import Fault, LocalHub
from tests.support.published import REPO, Publish, copied, in_two_files, refused, said

# In a process of its own, to which expertcut cannot be imported.
LOAD_BACK = """
import sys
sys.modules["expertcut"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for repo, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    # As the card says: `model_type` of a routed checkpoint is of its own code.
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code="routed" in repo)
    tokens = torch.tensor([tokenizer("Which of these?")["input_ids"]])
    found = []
    for place in (repo, folder):
        model, faults = AutoModelForCausalLM.from_pretrained(
            place, trust_remote_code=True, output_loading_info=True
        )
        assert not any(faults.values()), faults
        with torch.inference_mode():
            found.append(model(tokens).logits)
    assert torch.equal(*found) and found[0].std() > 0.1
    print(repo, type(model).__name__)
"""


def test_what_is_published_loads_back_by_its_id_without_expertcut(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path
) -> None:
    pairs = []
    for name in ("stock", "exact", "routed"):
        folder = copied(made / name, tmp_path / name)
        results = () if name == "routed" else ("--results", made / "results.json")
        done = publish(folder, f"birds/{name}", *results)
        assert done.status == 0, done.err
        assert f"uploaded to {hub.url}/birds/{name} (commit " in said(done)
        held = hub.files(f"birds/{name}")
        for file in folder.iterdir():
            if file.name != "plan.json":
                assert held[file.name] == file.read_bytes()
        plan = load_plan(folder)  # where the base lies here is not told
        assert Path(plan.model.id).is_absolute() and plan.model.id.encode() not in b"".join(
            held[file.name] for file in folder.iterdir() if file.suffix in (".json", ".md", ".txt")
        )
        named = plan.model.model_copy(update={"id": Path(plan.model.id).name})
        sent = plan.model_copy(update={"model": named})
        assert held["plan.json"] == plan_text(sent).encode()
        assert {"README.md", "plan.json", "chosen_on.txt"} < set(held)
        assert ("results.json" in held) == bool(results)
        assert ("modeling_routed.py" in held) == ("holding.json" in held) == (name == "routed")
        pairs += [f"birds/{name}", str(folder)]
    assert hub.uploads.bytes_put > 10_000
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD_BACK, *pairs],
        env={**hub.environment(tmp_path / "back"), "PYTHONWARNINGS": "ignore"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines() == [
        "birds/stock OlmoeForCausalLM",
        "birds/exact ExactOlmoeForCausalLM",
        "birds/routed RoutedOlmoeForCausalLM",
    ]


def test_publishing_again_changes_nothing_and_a_new_result_only_what_tells_of_it(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path
) -> None:
    folder = copied(made / "stock", tmp_path / "stock")
    assert publish(folder, REPO).status == 0
    commit, put = hub.commit(REPO), hub.uploads.bytes_put
    again = publish(folder, REPO)
    assert again.status == 0 and f"holds all of this already ({commit[:8]})" in said(again)
    assert hub.commit(REPO) == commit
    before = dict(hub.files(REPO))
    assert "results.json" not in before
    assert publish(folder, REPO, "--results", made / "results.json").status == 0
    changed = {n for n, content in hub.files(REPO).items() if before.get(n) != content}
    assert changed == {"README.md", "results.json"}
    assert hub.uploads.bytes_put == put > 0


def test_the_bytes_of_a_model_that_is_fetched_are_reported(
    made: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr(files, "on_progress", [lambda *step: seen.append(step)])
    hub.add("models", "birds/stock", made / "stock")
    folder = find_source("birds/stock").path
    n_bytes = sum(len((folder / file.name).read_bytes()) for file in folder.iterdir())
    first, *steps = seen
    assert first == ("fetching birds/stock", 0, 0, "")
    assert {(what, unit) for what, _, _, unit in steps} == {("fetching birds/stock", "B")}
    assert max(steps, key=lambda step: step[1])[1:3] == (n_bytes, n_bytes)  # type: ignore[arg-type, return-value]
    assert len({done for _, done, _, _ in steps}) > 3


def test_a_dry_run_asks_the_hub_nothing_and_says_what_would_go(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(made / "stock", tmp_path / "stock")
    (folder / "notes.pdf").write_bytes(b"x")
    (folder / ".env").write_text("secret")
    (folder / "logs").mkdir()
    monkeypatch.delenv("HF_TOKEN")
    done = publish(folder, REPO, "--dry-run")
    assert done.status == 0, done.err
    assert hub.asked == []
    assert (folder / "README.md").read_text().startswith("---\n")
    assert "model.safetensors" in done.out and "plan.json" in done.out
    assert "left out logs/, notes.pdf " in said(done)
    assert ".env" not in done.out
    would = re.search(r"nothing; without --dry-run (\d) files of [\d.]+ MB would go to", said(done))
    assert would and f"would go to {hub.url}/{REPO}" in said(done)
    assert said(done).endswith(f"expertcut publish {folder} {REPO}")
    unnamed = publish(folder, "--dry-run")  # of no repository yet
    assert f"{would[0]} {hub.url}/OWNER/stock" in said(unnamed)
    assert said(unnamed).endswith(f"expertcut publish {folder} OWNER/stock")
    assert "\n# stock\n" in (folder / "README.md").read_text()
    assert "name the repository, as OWNER/NAME" in publish(folder).err
    assert hub.asked == []


def test_another_models_repository_is_refused_and_replaced_only_by_force(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path
) -> None:
    stock = copied(made / "stock", tmp_path / "stock")
    exact = copied(made / "exact", tmp_path / "exact")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("pytorch_model.bin", "config.json", "README.md"):
        (other / name).write_text("{}")
    hub.add("models", REPO, other)
    refused(publish(stock, REPO), "holds something else (config.json, pytorch_model.bin)")
    assert set(hub.files(REPO)) == {"pytorch_model.bin", "config.json", "README.md"}
    done = publish(stock, REPO, "--force")
    assert done.status == 0 and "removed from the repository: pytorch_model.bin " in said(done)
    held = dict(hub.files(REPO))
    refused(publish(exact, REPO), "holds another checkpoint of this base", "--revision")
    plan = json.loads((stock / "plan.json").read_text())
    plan["model"]["fingerprint"] = "0" * 64
    other_base = copied(stock, tmp_path / "other_base")
    (other_base / "plan.json").write_text(json.dumps(plan))
    refused(publish(other_base, REPO), "of another base")
    assert hub.files(REPO) == held


def test_old_weights_go_and_what_people_put_beside_them_stays(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path
) -> None:
    folder = copied(made / "stock", tmp_path / "stock")
    assert publish(folder, REPO).status == 0
    grown = tmp_path / "grown"
    grown.mkdir()
    for name, content in hub.files(REPO).items():
        (grown / name).write_bytes(content)
    (grown / "model.gguf").write_bytes(b"by hand")
    hub.add("models", REPO, grown)
    done = publish(in_two_files(folder), REPO)
    assert done.status == 0, done.err
    assert "removed from the repository: model.safetensors " in said(done)
    held = set(hub.files(REPO))
    assert "model.gguf" in held and "model.safetensors" not in held
    assert "model-00002-of-00002.safetensors" in held


def test_a_revision_is_made_from_main_and_holds_its_checkpoint_alone(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path
) -> None:
    stock = copied(made / "stock", tmp_path / "stock")
    exact = copied(made / "exact", tmp_path / "exact")
    assert publish(stock, REPO).status == 0
    before = hub.commit(REPO)
    hub.faults.append(Fault("commit", 500))
    refused(publish(exact, REPO, "--revision", "v/2"), "500")  # the branch is made by then
    done = publish(exact, REPO, "--revision", "v/2")
    assert done.status == 0, done.err
    assert hub.commit(REPO) == before != hub.commit(REPO, "v/2")
    assert "modeling_exact.py" in hub.files(REPO, "v/2")
    assert "modeling_exact.py" not in hub.files(REPO)
    card = hub.files(REPO, "v/2")["README.md"].decode()
    assert 'revision="v/2"' in card and f"{hub.url}/{REPO}/blob/v/2/plan.json" in card
    for name in ("a b", "../main", "-x", "a;b"):
        refused(publish(stock, REPO, f"--revision={name}"), "must be the name of a branch")


def test_private_makes_a_private_repository_and_never_pretends_to(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path
) -> None:
    folder = copied(made / "stock", tmp_path / "stock")
    hub.faults.append(Fault("commit", 409))
    refused(publish(folder, REPO, "--private"), "409")
    assert publish(folder, REPO, "--private").status == 0
    assert hub.repositories["models", REPO].is_private
    assert publish(folder, "birds/open").status == 0
    assert not hub.repositories["models", "birds/open"].is_private
    refused(publish(folder, "birds/open", "--private"), "is public, which --private")


def test_what_the_repository_ignores_is_not_silently_left_out(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path
) -> None:
    folder = copied(made / "stock", tmp_path / "stock")
    start = tmp_path / "start"
    start.mkdir()
    (start / ".gitignore").write_text("model.safetensors\n")
    hub.add("models", REPO, start)
    refused(publish(folder, REPO), "does not hold model.safetensors", ".gitignore")


@pytest.mark.parametrize("name", ["cut", "a/b/c", "bir ds/cut", "birds/cut\x1b[31m", "birds/--x"])
def test_a_name_that_the_hub_does_not_take_is_one_line(
    made: Path, publish: Publish, hub: LocalHub, name: str
) -> None:
    line = refused(publish(made / "stock", name))
    assert "\x1b" not in line
    assert hub.asked == []


def test_a_checkpoint_that_does_not_hold_together_is_not_published(
    made: Path, hub: LocalHub, publish: Publish, tmp_path: Path
) -> None:
    def changed(name: str, kind: str = "stock") -> Path:
        return copied(made / kind, tmp_path / name)

    planless = changed("planless")
    (planless / "plan.json").unlink()
    refused(publish(planless, REPO), "has no plan.json", "prune")
    cut_short = changed("cut_short")
    weights = cut_short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(publish(cut_short, REPO), "is damaged")
    for kind in ("stock", "exact"):
        others = changed(f"others_{kind}", kind)
        plan = json.loads((others / "plan.json").read_text())
        plan["blocks"]["model.layers.0.mlp"]["keep"].pop()
        (others / "plan.json").write_text(json.dumps(plan))
        refused(publish(others, REPO), "plan.json is not of these weights")
    asked = changed("asked")
    (asked / "chosen_on.txt").write_text("")
    refused(publish(asked, REPO), "is not the list that plan.json was made with")
    codeless = changed("codeless", "exact")
    (codeless / "modeling_exact.py").unlink()
    refused(publish(codeless, REPO), "lacks modeling_exact.py")
    refused(publish(tmp_path / "nowhere", REPO), "no such checkpoint")
    assert hub.asked == []
