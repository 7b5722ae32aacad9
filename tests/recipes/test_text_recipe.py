"""A recipe without a quiz: chosen on texts, judged on texts, tasks and what the models write."""

import json
import random
import re
from pathlib import Path

import pytest

from expertcut.errors import RecipeError
from expertcut.evaluation.results import load_results
from expertcut.recipes.recipe_schema import EvalSection, read_recipe
from expertcut.recipes.stages import stages_of
from tests.conftest import WORDS, make_checkpoint
from tests.evaluation.test_tasks import write_task
from tests.recipes.test_recipes import Place

TEXT = """
model: {model}
threads: 1
profile: {{text: [chosen.jsonl=2, more.txt], max_tokens: 32}}
variants:
- name: half
  prune: {{keep_fraction: 0.5, by: reap}}
- name: layer-by-layer
  prune: {{keep_fraction: 0.5, by: reap, sequential: true, verify: false}}
- name: healed
  heal: {{of: half, steps: 2, batch: 4, check_every: 2, rank: 2, verify: false}}
eval:
  text: [judged.jsonl]
  tasks: say
  include_path: tasks
  generate: prompts.jsonl
  max_new_tokens: 3
report:
publish: [{{variant: half, repo: owner/half, dry_run: true}}]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    found, chance = Place(tmp_path), random.Random(0)
    make_checkpoint(found.model, "olmoe")

    def lines(file: str, n: int, key: str = "text") -> None:
        texts = (" ".join(chance.choices(WORDS, k=20)) for _ in range(n))
        Path(file).write_text("".join(json.dumps({key: text}) + "\n" for text in texts))

    lines("chosen.jsonl", 30)
    lines("judged.jsonl", 12)
    lines("prompts.jsonl", 4, "prompt")
    Path("more.txt").write_text(" ".join(chance.choices(WORDS, k=60)))
    (tasks := tmp_path / "tasks").mkdir()
    documents = [{"text": " ".join(WORDS[i : i + 3]), "answer": WORDS[i]} for i in range(4)]
    (tasks / "d.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    write_task(
        tasks, "say", output_type="generate_until", doc_to_target="{{answer}}",
        generation_kwargs={"until": ["<eos>"], "max_gen_toks": 2, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    found.write(TEXT)
    return found


def test_a_recipe_of_texts_needs_no_quiz_from_the_profile_to_the_card(place: Place) -> None:
    ran = place.run().ran
    assert ran == ("profile", "half", "layer-by-layer", "healed", "eval", "report", "publish half")
    results = load_results(place.folder / "results.json")
    assert results.quiz is None and len(results.models) == 4
    for model in results.models:
        assert {*(model.text or {})} == {"judged"} and {*(model.tasks or {})} == {"say"}
        assert model.generation is not None
    assert any(line.startswith("text ") for line in place.said)
    card = (place.folder / "variants" / "half" / "README.md").read_text()
    for text in ("perplexity on judged", "KL", "### Tasks", "### Generation", "12 documents"):
        assert text in card
    assert re.search(r"on [\d,]+ tokens in \d+ documents of chosen\\.jsonl, more\\.txt", card)
    assert "quiz" not in card.partition("## Citation")[0]
    assert "documents that were not used to choose or fit anything" in card
    assert "perplexity on judged" in (place.folder / "report.html").read_text()
    assert (place.folder / "variants" / "half" / "chosen_on.ngrams").is_file()
    manifest = (place.folder / "manifest.json").read_text()
    assert '"quiz test"' not in manifest and "mmlu" not in manifest
    assert place.run().ran == ()
    with Path("tasks/d.jsonl").open("a") as file:
        file.write(json.dumps({"text": "x", "answer": "y"}) + "\n")
    assert place.run(dry_run=True).ran == ("eval", "report", "publish half")
    assert "tasks changed" in place.why["eval"]


def test_options_of_eval_are_recorded_only_where_they_are_given() -> None:
    assert EvalSection().recipe_values() == {"split": "test", "limit": None}
    given = EvalSection.of_recipe({"tasks": "gsm8k", "top_k_logprobs": 8, "temperature": 0.5})
    assert {*given.recipe_values()} == {"split", "limit", "tasks", "top_k_logprobs", "temperature"}


def test_a_recipe_runs_no_code_of_tasks_unless_that_is_confirmed(place: Place) -> None:
    (Path("tasks") / "utils.py").write_text("raise RuntimeError\n")
    with pytest.raises(RecipeError, match=r"run tasks/utils.py.*--confirm-run-unsafe-code"):
        place.run(dry_run=True)
    assert place.run(dry_run=True, confirm_run_unsafe_code=True).ran
    (Path("tasks") / "utils.py").unlink()
    place.change("tasks: say", "tasks: say\n  confirm_run_unsafe_code: true")
    with pytest.raises(RecipeError, match="what the models write"):
        place.run(dry_run=True)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("generate: prompts.jsonl", "generate: nope", "'nope' does not exist"),
        ("backend", "backend: local-completions\n  backend", "must be 'hf' or 'vllm'"),
        ("include_path: tasks", "base_url: http://x", "unknown key 'base_url'"),
    ],
)
def test_what_eval_of_a_recipe_cannot_do_is_refused_when_it_is_read(
    place: Place, old: str, new: str, fault: str
) -> None:
    if old == "backend":
        old, new = "max_new_tokens: 3", "backend: local-completions"
    place.change(old, new)
    with pytest.raises(RecipeError, match=fault):
        read_recipe(place.file)


def test_an_evaluation_without_texts_and_quiz_is_refused(place: Place) -> None:
    text, _, _ = TEXT.partition("eval:")
    place.write(f"{text}eval:\n")
    with pytest.raises(RecipeError, match="eval has nothing to judge by"):
        read_recipe(place.file)
    place.write(f"{text}quiz: mmlu\neval:\n")
    stages = {stage.name: stage for stage in stages_of(read_recipe(place.file))}
    assert stages["eval"].questions and not stages["profile"].questions
    assert stages["healed"].questions and not stages["healed"].texts
