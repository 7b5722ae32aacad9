"""Runs to make pages of, and a browser to open them in."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.edits.plan import BlockEdit, ChosenOn, PlanFile, PlanModel, Point, save_plan
from expertcut.evaluation.results import (
    ChosenOnResult,
    QuizComparison,
    QuizModelResult,
    QuizResults,
    SubjectResult,
)
from expertcut.profiling.storage import Profile
from expertcut.reporting.page import PAGE, render, sections_of
from expertcut.reporting.views import gather
from tests.support.hand_made import block, profile_info, random_chunk, random_profile, write_profile

SUBJECTS = {"birds": 40, "clocks": 60}
HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title='owned'</script>",
    "{{ 7 * 7 }} {% raw %} ]]> <!-- -->",
    "[x](javascript:alert(1)) **bold** | --- |",
    "yaml: &a [*a, !!python/object/apply:os.system]",
    "a\x1b[31mred\x1b]0;owned\x07\x9b31m",
    "right\u202eto\u2066left",
    "$\\frac{1}{$ \\input{/etc/passwd}",
    "日本語 עברית 🐦",
    "=cmd|' /C calc'!A0",
    "../../etc/passwd",
)


def find_chromium() -> str | None:
    """A system's Chromium; playwright's own is never fetched."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def make_profile(
    folder: Path,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    subjects: Mapping[str, int] = SUBJECTS,
    **quiz: Any,
) -> Profile:
    """A random finished profile; the last two experts of each layer are never chosen."""
    blocks = [block(layer, experts, top_k) for layer in range(layers)]
    return random_profile(folder, profile_info(blocks, subjects, **quiz))


def make_plan(folder: Path, profile: Profile, **changes: Any) -> PlanFile:
    """Cuts expert 1 of every block of a profile's model, tilts expert 0; saved in the folder."""
    model = profile.info.model
    blocks = {
        b.name: BlockEdit(keep=tuple(e for e in range(b.experts) if e != 1), bias={0: 0.5})
        for b in model.blocks
    }
    quiz = profile.info.quiz
    n_questions = sum(subject.questions for subject in quiz.subjects.values())
    fields: dict[str, Any] = {
        "model": PlanModel(id=model.id, revision=None, fingerprint=model.fingerprint),
        "action": "prune --keep 7",
        "criterion": "activations",
        "positions": "answer",
        "removal": "reroute",
        "layout": "stock",
        "chosen_on": ChosenOn(
            quiz=quiz.id, split=quiz.split, questions=n_questions, sha256="c" * 64
        ),
        "blocks": blocks,
    }
    plan = PlanFile(**{**fields, **changes})
    folder.mkdir(parents=True, exist_ok=True)
    save_plan(folder, plan, [])
    return plan


def curve() -> tuple[Point, ...]:
    """A search: no tilt, then three strengths of one expert and one of two."""
    tried = [(0, 0.0, 0.5), (1, 0.5, 0.52), (1, 1.0, 0.58), (1, 2.0, 0.4), (2, 1.0, 0.55)]
    return tuple(
        Point(
            experts=n,
            strength=strength,
            biases=tuple((2, e, strength) for e in range(n)),
            questions=100,
            accuracy=share,
            ci95=(share - 0.1, share + 0.1),
        )
        for n, strength, share in tried
    )


def make_results(file: Path, subjects: Mapping[str, int] = SUBJECTS, **changes: Any) -> QuizResults:
    """A base that is right half of the time, and a cut that is three questions worse."""
    n = sum(subjects.values())

    def model(path: str, right: float, parameters: int) -> QuizModelResult:
        return QuizModelResult(
            path=path,
            accuracy=right / n,
            stderr=0.05,
            ci95=(right / n - 0.1, right / n + 0.1),
            questions=n,
            subjects={
                name: SubjectResult(accuracy=right / n, questions=count)
                for name, count in subjects.items()
            },
            parameters=parameters,
            active_parameters=parameters // 2,
            bytes=4 * parameters,
            chosen_on=ChosenOnResult(split="val", overlap=0) if "cut" in path else None,
        )

    compared = QuizComparison(
        base=0,
        other=1,
        delta=-3 / n,
        ci95=(-0.08, 0.02),
        gained=4,
        lost=7,
        mcnemar_p=0.55,
        smallest_effect=0.09,
        max_abs_logprob_diff=1.5,
        median_abs_logprob_diff=0.125,
        parameters_delta=-1_048_576,
        bytes_delta=-4_194_304,
    )
    fields: dict[str, Any] = {
        "quiz": "birds",
        "revision": None,
        "split": "test",
        "shots": 5,
        "limit": None,
        "content_hashes": dict.fromkeys(subjects, "0" * 64),
        "models": [
            model("models/base", n / 2, 4_194_304),
            model("models/cut", n / 2 - 3, 3_145_728),
        ],
        "comparisons": [compared],
    }
    found = QuizResults(**{**fields, **changes})
    found.save(file)
    return found


def make_run(folder: Path, experts: int = 8) -> Path:
    """A profile, a cut of its model with a curve, and results."""
    profile = make_profile(folder / "profile", experts=experts)
    make_plan(folder / "cut", profile, tuning=curve())
    make_results(folder / "results.json")
    return folder


def make_hostile_run(folder: Path) -> Path:
    """The same with harmful words wherever a quiz, a model or a hand can put some."""
    subjects = dict.fromkeys(HOSTILE, 20)
    blocks = [block(0), block(1).model_copy(update={"name": HOSTILE[1]})]
    info = profile_info(blocks, subjects, id=HOSTILE[0], split=HOSTILE[6])
    info = info.model_copy(
        update={"model": info.model.model_copy(update={"id": HOSTILE[2], "revision": None})}
    )
    chunks = [random_chunk(i, 20, blocks) for i in range(len(subjects))]
    profile = write_profile(folder / "<b>profile", info, chunks)
    make_plan(folder / "cut $x$", profile, action=HOSTILE[1], criterion=HOSTILE[3], tuning=curve())
    results = make_results(folder / "results.json", subjects, quiz=HOSTILE[0], split=HOSTILE[7])
    cut = results.models[1].model_copy(update={"path": f"models/{HOSTILE[6]}"})
    results = results.model_copy(update={"models": [results.models[0], cut]})
    results.save(folder / "results.json")
    return folder


def text_of(path: Path) -> str:
    """The page of a run, without drawing its figures."""
    found = gather(path)
    return render(found, sections_of(found), "report")


def bare_page(path: Path) -> Path:
    """The page alone, in the run's folder."""
    page = path / PAGE
    page.write_text(text_of(path), encoding="utf-8")
    return page


def is_png(content: bytes) -> bool:
    """Whether it begins like one, and is larger than an empty one."""
    return content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 2_000


def large_profile(folder: Path) -> Profile:
    """48 layers × 64 experts, 57 subjects of 10 questions."""
    rng = np.random.default_rng(0)
    names = [
        "_".join(rng.choice(["high", "school", "law", "moral", "world"], 3)) for _ in range(57)
    ]
    subjects = {f"{name}_{i}": 10 for i, name in enumerate(names)}
    return make_profile(folder, 48, 64, 8, subjects)
