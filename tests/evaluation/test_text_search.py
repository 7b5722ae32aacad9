"""`sweep` and `audit` on texts: figures of pruned checkpoints and of plain forward passes."""

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from expertcut.cli import app
from expertcut.data.corpus import Corpus
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.splits import choosing_profile, questions_for
from expertcut.evaluation.results import load_results
from expertcut.evaluation.search_results import Grid, TextCell, load_audit, load_sweep
from expertcut.evaluation.sweep_judges import TextScoring, held_out_texts
from expertcut.evaluation.sweep_run import SweepRun
from expertcut.models.load import LoadOptions
from expertcut.profiling.measure import MeasureOptions
from expertcut.profiling.storage import load_profile
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import WORDS, Commands, open_model
from tests.support.planted_domains import CHAT, CODE, MARKS, plant_domains

Checkpoints = Callable[..., Path]
MOST = 32  # tokens of a row
LENGTHS = ("--max-tokens", MOST)


def write(name: str, n: int, seed: int, mark: str = "") -> Path:
    """Documents of one to five rows; with a mark, each holds it often."""
    chance = np.random.default_rng(seed)
    words = [[*chance.choice(WORDS, 2 + i % 9), *[mark * 4] * bool(mark)] for i in range(n)]
    text = "".join(json.dumps({"text": " ".join(chance.permutation(own))}) + "\n" for own in words)
    file = Path(f"{name}.jsonl")
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def world(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`p`: a profile of two sources, `a` and `b`; `held.jsonl` and `more.jsonl` are others."""
    with chdir(root := tmp_path_factory.mktemp("world")):
        files = [write(name, 40, seed) for seed, name in enumerate(("a", "b"))]
        write("held", 14, 7)
        write("more", 12, 8)
        named = [word for file in files for word in ("--text", file)]
        words = ["profile", checkpoint("olmoe"), *named, *LENGTHS, "--threads", 1, "--out", "p"]
        app([str(word) for word in words], standalone_mode=False)
    return root


@pytest.fixture
def profiled(world: Path, expertcut: Commands) -> Commands:
    shutil.copytree(world, Path.cwd(), dirs_exist_ok=True)
    return expertcut


# The law


@pytest.mark.parametrize("layout", ["stock", "exact", "exact --replace-with mean"])
def test_a_cell_equals_eval_of_the_written_checkpoint(
    profiled: Commands, checkpoint: Checkpoints, layout: str
) -> None:
    texts = f"--text held.jsonl --text more.jsonl --max-tokens {MOST} --threads 1"
    cut = f"--profile p --by reap --layout {layout}"
    profiled(f"sweep 0.5 {cut} {texts} --out grid")
    profiled(f"prune {cut} --sparsity 0.5 --no-verify --out half")
    profiled(f"eval {checkpoint('olmoe')} half {texts}")
    results = load_results(Path("results.json"))
    (cell,) = load_sweep(Path("grid")).of_texts
    base, written = results.models
    assert base.text is not None and written.text is not None
    change = results.comparisons[0].text
    assert change is not None and [*cell.changes] == ["held", "more"] == [*change]
    swept = load_sweep(Path("grid")).base
    assert swept is not None and getattr(swept, "text", None) == base.text
    for source, found in cell.changes.items():
        theirs = change[source].model_dump()
        for name, value in found.model_dump().items():
            assert value == pytest.approx(theirs[name], abs=1e-5), name
        ours = cell.text[source]
        assert ours.perplexity == pytest.approx(written.text[source].perplexity, rel=1e-5)
        assert found.kl is not None and found.kl > 1e-3
    n = [result.tokens for result in cell.text.values()]
    losses = [c.delta_loss for c in cell.changes.values()]
    assert cell.delta_loss == pytest.approx(np.average(losses, weights=n), abs=1e-12)
    assert cell.bytes == written.bytes or base.bytes is None


def test_by_default_the_documents_that_the_profile_holds_out_judge(profiled: Commands) -> None:
    said = profiled("sweep 0.75,0.5 --by reap,random,frequency --profile p --out grid")
    sweep = load_sweep(Path("grid"))
    profile, _ = choosing_profile(load_profile(Path("p")))
    held_out = questions_for(profile, is_fitting=False).held_out
    assert isinstance(held_out, Corpus) and sweep.asked.text is not None
    assert {name: source.documents for name, source in sweep.asked.text.sources.items()} == {
        source.name: len(source.documents) for source in held_out.sources
    }
    assert sweep.chosen_on.overlap == 0 and len(sweep.of_texts) == 6 and sweep.text is not None
    for best in sweep.text:
        own = [cell for cell in sweep.of_texts if cell.fraction == best.fraction]
        assert best.by == min(own, key=lambda cell: cell.delta_loss).by
        assert {best.by, *best.behind} == {cell.by for cell in own}
        assert all(ends is not None and ends[1] >= 0 for ends in best.behind.values())
    plain = " ".join(said.split())
    assert "had a part in the choice" in plain and "loses least" in plain
    assert "accuracy" not in Path("grid/sweep.json").read_text()
    rows = Path("grid/sweep.csv").read_text().splitlines()
    assert len(rows) == 1 + 7 * 3 and rows[0].startswith("by,fraction,kept,text")
    assert profiled("show grid --format csv").splitlines() == rows
    for form in ("table", "md"):
        assert "Δ loss" in profiled(f"show grid --format {form}")
    profiled("report grid")
    assert "Loss against the share" in next(Path.cwd().glob("**/*.html")).read_text()


def test_a_killed_sweep_and_two_processes_come_to_the_same_bytes(profiled: Commands) -> None:
    profile, _ = choosing_profile(load_profile(Path("p")))
    corpus = held_out_texts(profile)
    assert corpus is not None

    def swept(folder: str, *, waits: bool = True, steps: int = 99) -> int:
        scoring = TextScoring(corpus, 64, LoadOptions(), MeasureOptions(waits=waits))
        sweeping = SweepRun(profile, Grid(("reap", "random"), (0.5,)), CutSettings(), scoring)
        passes: list[object] = []
        for at, step in enumerate(sweeping.steps(Path(folder))):
            if at == steps:
                break  # as if killed
            list(step.run(passes.append))
        return len(passes)

    n_passes = swept("whole")
    assert swept("killed", steps=2) < n_passes
    assert 0 < swept("killed") < n_passes and swept("killed") == 0
    assert swept("shared", waits=False) == n_passes and swept("shared") == 0
    whole, *others = (
        {
            str(file.relative_to(name)): file.read_bytes()
            for file in Path(name).rglob("*")
            if file.suffix in (".json", ".safetensors") and file.name != "run.json"
        }
        for name in ("whole", "killed", "shared")
    )
    assert len(whole) > 4 and all(other == whole for other in others)


# Audits


def next_losses(model: Path, texts: list[str], biases: dict[int, torch.Tensor]) -> torch.Tensor:
    """−log p (D, 2) summed over each document, and its tokens: row by row, no replay, no packs."""
    moe, found = open_model(model), []
    with torch.inference_mode(), tilted(moe.blocks, Tilts(biases)):
        for text in texts:
            ids = [moe.tokenizer.bos_token_id, *moe.tokenizer(text)["input_ids"]]
            total = torch.zeros(2, dtype=torch.float64)
            done = 1
            while done < len(ids):
                last = min(done + MOST, len(ids)) - 1
                begin = max(0, last - MOST)
                logits_SV = moe.model(input_ids=torch.tensor([ids[begin:last]])).logits[0]
                own_SV = logits_SV[done - 1 - begin :].double()
                next_S = torch.tensor(ids[done : last + 1])
                total += torch.tensor(
                    [float(F.cross_entropy(own_SV, next_S, reduction="sum")), len(next_S)]
                )
                done = last + 1
            found.append(total)
    return torch.stack(found)


def test_the_harm_is_that_of_a_masked_expert_in_plain_passes(
    profiled: Commands, checkpoint: Checkpoints
) -> None:
    said = profiled("audit --profile p --by reap,random --sample 5 --out found")
    audit, profile = load_audit(Path("found")), choosing_profile(load_profile(Path("p")))[0]
    held_out = questions_for(profile, is_fitting=False).held_out
    assert isinstance(held_out, Corpus) and audit.overlap == 0
    texts = [document.said for document in held_out]
    assert len(texts) == audit.asked.questions > 5
    model = checkpoint("olmoe")
    base = next_losses(model, texts, {})
    assert -audit.right_logprob == pytest.approx(float(base[:, 0].sum() / base[:, 1].sum()))
    assert len(audit.of_texts) == 5 and len(audit.verdicts) == 2
    for effect in audit.of_texts:
        bias_E = torch.zeros(8)
        bias_E[effect.expert] = -torch.inf
        lost_D = next_losses(model, texts, {effect.layer: bias_E})[:, 0] - base[:, 0]
        n_D = base[:, 1]
        mean = float(lost_D.sum() / n_D.sum())
        assert effect.logprob == pytest.approx(mean, abs=1e-6) and abs(mean) > 1e-5
        rest_D = lost_D - mean * n_D  # of the ratio of two sums
        spread = float((rest_D**2).sum() * len(n_D) / (len(n_D) - 1)) ** 0.5
        assert effect.stderr == pytest.approx(spread / float(n_D.sum()), rel=1e-4)
        ends = [change.ci95 for change in effect.text.values()]
        assert len(ends) == 2 and all(c.kl for c in effect.text.values())
    plain = " ".join(said.split())
    assert "held-out documents" in plain and "nats per token" in plain
    assert "McNemar" not in plain and '"gained"' not in Path("found/audit.json").read_text()
    assert len(profiled("show found --format csv").splitlines()) == 1 + 5 * 2
    assert "largest KL" in profiled("show found --format md")


def test_an_expert_of_one_domain_harms_its_domain_alone(
    checkpoint: Checkpoints, expertcut: Commands, tmp_path: Path
) -> None:
    model = plant_domains(checkpoint("olmoe"), tmp_path / "model")
    named = [w for name, m in MARKS.items() for w in ("--text", write(name, 60, ord(m), m))]
    expertcut("profile", model, *named, *LENGTHS, "--threads", 1, "--out", "p")
    expertcut("audit --profile p --by reap --sample 16 --layout exact --out found")
    effects = {(e.layer, e.expert): e.text for e in load_audit(Path("found")).of_texts}
    assert len(effects) == 16
    for layer in (0, 1):
        for expert, own, other in ((CODE, "code", "chat"), (CHAT, "chat", "code")):
            found = effects[layer, expert]
            assert (found[other].kl, found[other].delta_loss) == (0, 0)
            assert found[own].kl is not None and found[own].kl > 1e-3
            assert found[own].delta_loss is not None and abs(found[own].delta_loss) > 1e-4
    others = [e for place, e in effects.items() if place[1] not in (CODE, CHAT)]
    assert any(e["code"].kl and e["chat"].kl for e in others)


# What goes together


def test_the_heaviest_profile_of_a_blend_judges_and_a_layer_may_see_the_cuts_before_it(
    profiled: Commands, checkpoint: Checkpoints, quiz_folder: Path
) -> None:
    model = checkpoint("olmoe")
    write("c", 40, 3)
    profiled("profile", model, "--text", "c.jsonl", *LENGTHS, "--threads", 1, "--out", "q")
    asking = f"--quiz {quiz_folder} --split val --shots 0 --threads 1"
    profiled(f"profile {model} {asking} --out quiz")
    profiled("sweep 0.5 --by reap --profile q=3 --profile p --out texts")
    asked = load_sweep(Path("texts")).asked
    assert asked.text is not None and [*asked.text.sources] == ["c"]
    profiled("sweep 0.5 --by reap --profile p=3 --profile quiz --out both")
    assert load_sweep(Path("both")).of_texts and load_sweep(Path("both")).chosen_on.overlap == 0
    profiled("sweep 0.5 --by reap --profile p --profile quiz=3 --out answers")
    assert load_sweep(Path("answers")).of_quiz and not load_sweep(Path("answers")).of_texts
    profiled(
        f"sweep 0.5 --by reap --profile p --quiz {quiz_folder} --shots 0 --limit 2 --out asked"
    )
    assert load_sweep(Path("asked")).of_quiz
    found = {}
    for name, words in {"plain": "", "in-turn": "--sequential"}.items():
        profiled(f"sweep 0.5 --by reap {words} --profile p --out {name}")
        (found[name],) = load_sweep(Path(name)).cells
    assert isinstance(found["plain"], TextCell)
    first = next(iter(found["plain"].keep))
    assert found["plain"].keep[first] == found["in-turn"].keep[first]  # nothing is cut before it


REFUSED = {
    "sweep 0.5 --profile p --text held.jsonl --shots 3": "--shots is for a quiz",
    "sweep 0.5 --profile p --text held.jsonl --quiz q.jsonl": "--quiz is for a quiz",
    "sweep 0.5 --profile p --max-tokens 9": "--max-tokens is for texts",
    "sweep 0.5 --profile p --top-k-logprobs 9": "--top-k-logprobs is for texts",
    "sweep 0.5 --profile p --held-out 0": "--text FILE",
    "sweep 0.5 --profile p --text a.jsonl": "at most 5 % may",
    "sweep 0.5 --profile p --by activations --tokens answer": "answer",
    "sweep 0.5 --profile p --split val": "is a profile of texts",
    "audit --profile p --held-out 0": "profile more documents",
    "audit --profile p --by activations --tokens answer": "answer",
}


def test_what_does_not_go_together_is_refused_in_one_line(profiled: Commands) -> None:
    for line, says in REFUSED.items():
        refused = profiled(line, status=2)
        assert says in refused and refused.count("\n") == 1, (line, refused)
    profiled("sweep 0.5 --by reap --profile p --text held.jsonl --out grid")
    refused = profiled("sweep 0.5 --by reap --profile p --out grid", status=2)
    assert "another sweep" in refused and refused.count("\n") == 1
