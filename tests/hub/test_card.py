"""The card: what it says of a checkpoint, and that nobody's text becomes markup in it."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from transformers import AutoConfig

from expertcut.edits.plan import PlanModel, load_plan
from expertcut.evaluation.holding import load_holding
from expertcut.evaluation.results import load_results
from expertcut.hub.card import Place, card_text, is_edited, loaders
from expertcut.hub.provenance import evaluations, origin, verified
from expertcut.models.load import find_source
from expertcut.reporting.tables import Markdown, escaped, one_line
from tests.support.exact_models import as_written_before
from tests.support.fake_hub import LocalHub
from tests.support.fake_hub.uploads import card_faults
from tests.support.published import HOSTILE, REPO, Publish, copied, refused, said

PLACE = Place(REPO, None, "https://huggingface.co")
BASE = "clocks/base"


def card_of(folder: Path, *results: Path) -> str:
    found = verified(folder)
    evaluated = evaluations(found, results)
    return card_text(found, origin(found.folder), evaluated, PLACE)


def metadata_of(card: str) -> dict[str, Any]:
    assert card_faults(card) == []
    data: dict[str, Any] = ModelCard(card).data.to_dict()
    return data


def based_on_the_hub(made: Path, hub: LocalHub, place: Path, head: str) -> Path:
    """A checkpoint whose base is on the Hub, with a card of its own."""
    base = place.with_name(f"{place.name}-base")
    base.mkdir()
    (base / "README.md").write_text(head)
    (base / "config.json").write_text(json.dumps({"num_experts": 8}))
    commit = hub.add("models", BASE, base).at("main").commit
    return copied(made / "stock", place, (BASE, commit))


def test_a_card_says_what_was_done_from_which_base_and_how_it_did(
    made: Path, hub: LocalHub, tmp_path: Path
) -> None:
    folder = based_on_the_hub(made, hub, tmp_path / "cut", "---\nlicense: Apache-2.0\n---\n# B\n")
    card = card_of(folder, made / "results.json")
    data = metadata_of(card)
    assert data["base_model"] == BASE and data["base_model_relation"] == "finetune"
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"moe", "pruning"} <= set(data["tags"]) and "expert-reweighting" not in data["tags"]
    (index,) = data["model-index"]
    unedited, own = load_results(made / "results.json").models[:2]
    base = Path(unedited.path).name
    assert index["name"] == "cut"
    (result,) = index["results"]
    assert result["metrics"][0]["value"] == pytest.approx(own.accuracy, abs=1e-6)
    assert result["dataset"]["args"] == {"num_few_shot": 1}
    assert result["source"]["url"] == f"https://huggingface.co/{REPO}/blob/main/results.json"
    plain = card.replace("\\", "")
    for sentence in (
        "Each of 2 MoE layers keeps 5 of 8 experts; the others are cut out",
        "with expertcut: `prune --keep 5`.",
        "prune --keep 5 (layout stock), by activations, counted at the answer position",
        f"[{BASE}](<https://huggingface.co/{BASE}/tree/{hub.commit(BASE)}>)",
        "the same removal as a mask",
        f"| {own.subjects['green_birds'].questions} | ",
        f"| {own.subjects['green_birds'].accuracy:.1%} | ",
        "with expertcut: `prune --keep 5`.\n\n**19 % smaller, undecided at a margin of 1 point",
        'AutoModelForCausalLM.from_pretrained(name, dtype="auto")',
        f"vllm serve {REPO}",
        "convert_hf_to_gguf.py",
        "2502.17187",
        f", on 33 questions; {base} is no better than guessing (25 %)**: test questions of ",
    ):
        assert sentence in plain or sentence in card, sentence
    assert str(tmp_path) not in card and str(made) not in card
    places = [card.index(f"## {title}") for title in ("Results", "Size", "What was changed")]
    assert places == sorted(places) and f"[{BASE}](<" in card[: places[0]]
    assert not re.search(r"[0-9a-f]{7,}", card[card.index("# cut") : places[0]])
    assert "| 42.42% | +3.0 (−7.7 … +15.3) | undecided |\n" in plain  # five columns
    assert "cite it too" not in card  # `activations` is of the paper above
    # Of questions that chose the experts the metadata has no figure, and the text says it first.
    results = load_results(made / "results.json")
    leak = own.model_copy(update={"chosen_on": own.chosen_on.model_copy(update={"overlap": 9})})
    compared = [c for c in results.comparisons if c.other == 1]
    changes = {"models": [results.models[0], leak], "comparisons": compared, "chance": 0.9}
    results.model_copy(update=changes).save(tmp_path / "leak.json")
    plan = load_plan(folder).model_copy(update={"criterion": "reap"})
    (folder / "plan.json").write_text(plan.model_dump_json())
    card = card_of(folder, tmp_path / "leak.json")
    assert not {"model-index", "metrics"} & set(metadata_of(card))
    assert "33 questions, 9 of which chose the experts; both are no better than guessing" in card
    assert "`reap` is that of [arXiv:2510.13999](https://arxiv.org/abs/2510.13999)" in card


def test_the_card_of_a_rule_has_its_proof_and_how_to_load_it(made: Path) -> None:
    card = card_of(made / "routed").replace("\\", "")
    proof = load_holding(made / "routed")
    assert proof.experts is not None and proof.random is not None
    metadata_of(card_of(made / "routed"))
    for sentence in (
        f"with expertcut: `{load_plan(made / 'routed').action}`.",
        "Routers choose by rule skip at ",
        f"## Does the procedure hold?\n\n{proof.sentence}\n",
        "| random (1 draw) | ",
        f"Chosen in the folds: {proof.folds[0].experts:g}, ",
        f"([holding.json](https://huggingface.co/{REPO}/blob/main/holding.json))",
        "5.22 or later, with trust_remote_code=True: modeling_routed.py comes along",
        "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        'from_pretrained(name, dtype="auto", trust_remote_code=True)',
        "No other loader is known to read this form.",
    ):
        assert sentence in card, sentence
    assert "vllm" not in card and "llama.cpp" not in card
    assert "Does the procedure help?" not in card


def test_a_card_without_results_and_of_a_local_base_says_so(made: Path, tmp_path: Path) -> None:
    card = card_of(copied(made / "exact", tmp_path / "exact"))
    data = metadata_of(card)
    assert data["license"] == "unknown"
    assert not {"base_model", "base_model_relation", "model-index", "metrics"} & set(data)
    assert "None: no evaluation of these weights was at hand" in card
    assert "Unknown: no licence is stated" in card
    assert "trust_remote_code=True" in card and "llama.cpp" not in card
    assert "its mean output" in card


def test_a_card_says_which_engines_read_a_form_wrongly(made: Path, tmp_path: Path) -> None:
    exact = copied(made / "exact", tmp_path / "exact")
    card = card_of(exact).replace("\\", "")
    assert "0.33 or later, in an environment of its own" in card
    assert "not together with quantised experts, LoRA on experts, EPLB" in card
    assert "transformers 4 loads it wrongly" in card
    assert "vLLM 0.32 knows no constant experts and refuses it" in card
    old = card_of(as_written_before(exact, tmp_path / "old")).replace("\\", "")
    assert "vLLM 0.32 loads it wrongly: it answers NaN" in old
    stock = card_of(copied(made / "stock", tmp_path / "stock"))
    assert "wrongly" not in stock and "refuses" not in stock


def test_layout_exact_without_constants_and_biases_is_its_familys_form(
    made: Path, tmp_path: Path
) -> None:
    exact = verified(copied(made / "exact", tmp_path / "exact"))
    scaled = {k: v for k, v in exact.config.items() if k != "compression_config"}
    names = {
        form: [loader.name for loader in loaders(replace(exact, config=config), REPO, None)]
        for form, config in {
            "cut": exact.config,
            "scaled": scaled,
            "biased": {**scaled, "biased_gates": [1], "model_type": "exact_olmoe"},
        }.items()
    }
    assert names == {
        "cut": ["transformers", "vLLM"],
        "scaled": ["transformers", "vLLM", "llama.cpp"],
        "biased": ["transformers"],
    }
    lines = loaders(replace(exact, config=scaled), REPO, None)[0].lines
    assert "trust_remote_code" not in lines


@pytest.mark.parametrize(
    ("parts", "auto"),
    [
        ({"vision_config": {"depth": 1}}, "AutoModelForImageTextToText"),
        ({"thinker_config": {"audio_config": {"depth": 1}}}, "AutoModelForMultimodalLM"),
    ],
)
def test_a_card_loads_models_of_images_and_sounds_whole_with_what_reads_those(
    made: Path, tmp_path: Path, parts: dict[str, Any], auto: str
) -> None:
    model_type = "qwen3_omni_moe" if "thinker_config" in parts else "qwen3_vl_moe"
    folder = copied(made / "stock", tmp_path / "stock")
    text = verified(folder)
    assert "import AutoModelForCausalLM, AutoTokenizer\n" in loaders(text, REPO, None)[0].lines
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    whole = replace(verified(folder), config={**text.config, "model_type": model_type, **parts})
    lines = loaders(whole, REPO, None)[0].lines
    assert f"import {auto}, AutoProcessor\n" in lines and f"model = {auto}.from_" in lines
    assert type(AutoConfig.for_model(model_type)) in getattr(transformers, auto)._model_mapping


def test_results_of_other_weights_are_refused_and_what_goes_up_names_no_path(
    made: Path, publish: Publish, hub: LocalHub, tmp_path: Path
) -> None:
    tilted = copied(made / "tilted", tmp_path / "tilted")
    line = refused(publish(tilted, REPO, "--results", made / "results.json"))
    assert "holds no results of" in line
    stock = copied(made / "stock", tmp_path / "stock")
    (tmp_path / "results.json").write_bytes((made / "results.json").read_bytes())
    done = publish(stock, REPO)
    assert done.status == 0 and f"the evaluation in {tmp_path / 'results.json'}" in done.out
    base = Path(load_results(made / "results.json").models[0].path).name
    sent = json.loads(hub.files(REPO)["results.json"])
    assert [model["path"] for model in sent["models"]] == [base, "stock"]
    assert (sent["comparisons"][0]["base"], sent["comparisons"][0]["other"]) == (0, 1)
    assert "/" not in sent["quiz"]
    assert load_results(tmp_path / "results.json").models[1].fingerprint is not None


def test_results_are_looked_for_beside_the_checkpoint_in_the_run_and_here(
    made: Path,
    publish: Publish,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stock = copied(made / "stock", tmp_path / "run" / "variants" / "stock")
    dry = (stock, REPO, "--dry-run")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "without an evaluation: no results.json of these weights" in said(publish(*dry))
    card = (stock / "README.md").read_text().replace("\\", "")
    base = Path(load_results(made / "results.json").models[0].path).name
    guesses = f", on 33 questions; {base} is no better than guessing (25 %)**: test questions that"
    assert guesses in card
    assert "| +3.0 (−7.7 … +15.3) | undecided |" in card  # of the held-out check
    Path("results.json").write_text("{}")  # another program's
    done = publish(*dry)
    assert "results.json holds no results" in caplog.text
    assert "without an evaluation" in said(done)
    (tmp_path / "run" / "manifest.json").write_text("{}")
    results, one = (made / "results.json").read_bytes(), load_results(made / "results.json")
    (tmp_path / "run" / "results.json").write_bytes(results)
    assert f"evaluation in {tmp_path}/run/results.json " in said(publish(*dry))
    one.model_copy(update={"shots": 0}).save(Path("results.json"))
    assert f"in {tmp_path}/run/results.json and in results.json " in said(publish(*dry))


def test_a_card_that_was_edited_stays_and_goes_up_as_it_is(
    made: Path, publish: Publish, hub: LocalHub, tmp_path: Path
) -> None:
    folder = copied(made / "stock", tmp_path / "stock")
    card = folder / "README.md"
    assert publish(folder, REPO, "--dry-run").status == 0
    written = card.read_text()
    assert not is_edited(written)
    for edited in (written.replace("# cut", "# My cut"), written + "More.\n", "# Mine\n"):
        assert is_edited(edited)
        card.write_text(edited)
        done = publish(folder, REPO)
        assert done.status == 0 and "was edited by hand and stays" in said(done)
        assert hub.files(REPO)["README.md"].decode() == edited == card.read_text()
    card.write_text("---\nlicense: [a]\n---\n")
    refused(publish(folder, REPO), "Invalid metadata in README.md", '"license" must be a string')
    card.unlink()
    assert publish(folder, REPO).status == 0
    assert card.read_text() == written


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("license: mit", {"license": "mit"}),
        ("license: [mit]", {"license": "mit"}),
        ("license: my-own", {"license": "other", "license_name": "my-own"}),
        (
            "license: other\nlicense_name: theirs\nlicense_link: https://x.example/L",
            {
                "license": "other",
                "license_name": "theirs",
                "license_link": "https://x.example/L",
            },
        ),
        (
            "license: other\nlicense_name: theirs\nlicense_link: LICENSE.md",
            {"license": "other", "license_name": "theirs", "license_link": "…/blob/…/LICENSE.md"},
        ),
        ("license: 7", {"license": "unknown"}),
        ("license: [a, b]", {"license": "unknown"}),
        ("license: !!python/object/apply:os.system ['true']", {"license": "unknown"}),
        ("- no mapping", {"license": "unknown"}),
        ("tags: [x]", {"license": "unknown"}),
    ],
)
def test_the_licence_is_that_of_the_base_and_never_a_guess(
    made: Path, hub: LocalHub, tmp_path: Path, head: str, expected: Mapping[str, str]
) -> None:
    folder = based_on_the_hub(made, hub, tmp_path / "cut", f"---\n{head}\n---\n")
    data = metadata_of(card_of(folder))
    found = {key: value for key, value in data.items() if key.startswith("license")}
    link = f"{hub.url}/{BASE}/blob/{hub.commit(BASE)}/"
    assert found == {k: v.replace("…/blob/…/", link) for k, v in expected.items()}


APACHE = (Path(__file__).parents[2] / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: mit\n---\n", "LICENSE": APACHE}, "mit"),
        ({"README.md": "# No front matter", "LICENSE.txt": APACHE}, "apache-2.0"),
        ({"LICENCE.md": "# The MIT License (MIT)\n\nCopyright"}, "mit"),
        ({"LICENSE": "Modified MIT License\n"}, "unknown"),
        ({"LICENSE": APACHE, "LICENSE-MIT": "MIT License"}, "unknown"),
    ],
)
def test_a_local_base_states_its_licence_in_its_card_or_a_file(
    made: Path, tmp_path: Path, files: Mapping[str, str], licence: str
) -> None:
    base, plan = tmp_path / "base", load_plan(made / "stock")
    shutil.copytree(plan.model.id, base)
    for name, content in files.items():
        (base / name).write_text(content)
    folder = copied(made / "stock", tmp_path / "cut", (str(base), None))
    assert metadata_of(card_of(folder))["license"] == licence


def test_the_bundled_model_has_the_licence_of_the_project() -> None:
    card = ModelCard.load(Path(__file__).parents[2] / "checkpoints/quickstart/README.md")
    assert card.data.license == "apache-2.0" and APACHE.lstrip().startswith("Apache License")


def test_without_the_hub_the_licence_is_unknown(
    made: Path, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = based_on_the_hub(made, hub, tmp_path / "cut", "---\nlicense: mit\n---\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert metadata_of(card_of(folder))["license"] == "unknown"


def test_a_step_before_is_told(made: Path, tmp_path: Path) -> None:
    first = copied(made / "stock", tmp_path / "first")
    second = copied(made / "stock", tmp_path / "second")
    plan = load_plan(second)
    fingerprint = find_source(str(first)).fingerprint
    model = PlanModel(id=str(first), revision=None, fingerprint=fingerprint)
    edits = {n: e.model_copy(update={"bias": {e.keep[0]: 1.0}}) for n, e in plan.blocks.items()}
    changes = {"model": model, "action": "reweight --boost 0:1", "blocks": edits}
    (second / "plan.json").write_text(plan.model_copy(update=changes).model_dump_json())
    steps = origin(second).steps
    assert [step.action for step in steps] == ["prune --keep 5", "reweight --boost 0:1"]
    card = card_of(second)
    assert {"pruning", "expert-reweighting"} <= set(metadata_of(card)["tags"])
    assert "2 experts get a bias on the gate's logit" in card


def html(card: str) -> str:
    body = card.split("\n---\n", 1)[1]
    rendered: str = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    return rendered


def test_hostile_text_changes_neither_card_nor_terminal(
    made: Path, publish: Publish, hub: LocalHub, tmp_path: Path
) -> None:
    plain = copied(made / "stock", tmp_path / "plain")
    harmless = card_of(plain, made / "results.json")
    folder = copied(made / "stock", tmp_path / "hostile")
    results = json.loads((made / "results.json").read_text())
    for model in results["models"]:
        model["path"] = HOSTILE[0] if model is results["models"][0] else model["path"]
        subject = next(iter(model["subjects"].values()))
        model["subjects"] = dict.fromkeys(HOSTILE, subject)
        model["questions"] = subject["questions"] * len(HOSTILE)
        model["accuracy"] = subject["accuracy"]
    results |= {"quiz": HOSTILE[3], "split": HOSTILE[5]}
    (file := tmp_path / "x.json").write_text(json.dumps(results))
    plan = json.loads((folder / "plan.json").read_text())
    plan["action"], plan["criterion"] = f"prune {HOSTILE[5]}", HOSTILE[4]
    plan["model"]["id"] = f"/x/{HOSTILE[0]}"
    plan["chosen_on"] |= {"quiz": HOSTILE[2], "split": HOSTILE[6]}
    plan["proof"]["held_out"][0]["against"] = HOSTILE[1]
    plan["proof"]["held_out_split"] = HOSTILE[3]
    (folder / "plan.json").write_text(json.dumps(plan))

    done = publish(folder, REPO, "--results", file)
    assert done.status == 0, done.err
    assert all(char.isprintable() or char == "\n" for char in done.out + done.err)
    card = hub.files(REPO)["README.md"].decode()
    assert all(char.isprintable() or char == "\n" for char in card)
    assert set(metadata_of(card)) == set(metadata_of(harmless))
    assert metadata_of(card)["license"] == "unknown"
    seen, expected = html(card), html(harmless)
    for tag in ("script", "img", "strong", "h1", "h2", "h3", "a href", "details", "pre", "table"):
        assert seen.count(f"<{tag}") == expected.count(f"<{tag}"), tag
    rows = [row for row in seen.split("<tr>") if "alert(1)" in row and "<td" in row]
    assert rows and len({row.count("<td") for row in rows}) <= 2
    assert "javascript:" not in "".join(re.findall(r"<a [^>]*>", seen))


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_reads_as_it_is_and_is_escaped_once(text: str) -> None:
    once = escaped(text)
    assert escaped(once) is once and isinstance(once, Markdown)
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(f"x {once}")
    inside = shown.removeprefix("<p>x ").removesuffix("</p>\n")
    assert "<" not in inside and shown.startswith("<p>x ")
    for entity, char in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        inside = inside.replace(entity, char)
    assert inside == one_line(text)


def test_a_card_says_how_many_prompts_were_cut(made: Path, hub: LocalHub, tmp_path: Path) -> None:
    folder = based_on_the_hub(made, hub, tmp_path / "cut", "")
    found = load_results(made / "results.json")
    assert "cut from the left" not in card_of(folder, made / "results.json")
    models = [model.model_copy(update={"cut": 17}) for model in found.models]
    found.model_copy(update={"models": models}).save(tmp_path / "r.json")
    heading = "test, 1 shots, 17 prompts cut from the left to fit the context\n"
    assert heading in card_of(folder, tmp_path / "r.json").replace("\\", "")
