"""Results, sweeps, audits and manifests that contradict themselves, or are another run's."""

from collections.abc import Callable
from typing import Any

from tests.hostile.case import Corpus
from tests.hostile.cases.documents import DOCUMENTS, OF, PUBLISH
from tests.hostile.spoiling import as_folder, as_pipe, edited, put, spoiled, taken, written
from tests.hostile.world import AUDITED, SWEPT, World

CASES = Corpus("results")
SWEEP, AUDIT = f"{World.sweep}/sweep.json", f"{World.audit}/audit.json"
MANIFEST = f"{World.run}/manifest.json"
FIRST = ("models", 0)


def wrong(
    file: str, fault: str, change: Callable[[Any], object], says: str, command: str = "show"
) -> None:
    words = DOCUMENTS[file][command]
    name = file.rsplit("/", 1)[-1]
    CASES.add(f"{fault}, met by {command}", edited(file, change, *words), name, says)


wrong(World.results, "120 % right", put(*FIRST, "accuracy", value=1.2), "accuracy: .*less")
wrong(World.results, "-1 % right", put(*FIRST, "accuracy", value=-0.01), "accuracy: .*gr", "report")
wrong(
    World.results,
    "a share that its subjects deny",
    put(*FIRST, "accuracy", value=0.987),
    "not that of its subjects",
    "publish",
)
wrong(World.results, "a share as text", put(*FIRST, "accuracy", value="0.5"), "accuracy: .*number")
wrong(
    World.results,
    "more questions than its subjects",
    put(*FIRST, "questions", value=10),
    "the questions of its subjects do not add up",
)
wrong(World.results, "-9 questions", put(*FIRST, "questions", value=-9), "questions: .*greater")
wrong(World.results, "half a question", put(*FIRST, "questions", value=0.5), "questions: ")
wrong(World.results, "an interval of one end", put(*FIRST, "ci95", value=[0.1]), "ci95", "report")
wrong(World.results, "no models", put("models", value=[]), "models: ", "publish")
wrong(World.results, "models by name", put("models", value={"olmoe": 1}), "models: ")
wrong(World.results, "a model without weights", taken(*FIRST, "parameters"), "parameters: Field")
wrong(World.results, "parameters of -1", put(*FIRST, "parameters", value=-1), "parameters: ")
wrong(
    World.results,
    "a comparison with a model that is not there",
    put("comparisons", 0, "other", value=2),
    "a comparison names a model that is missing",
    "report",
)
wrong(
    World.results,
    "a comparison with model -1",
    put("comparisons", 0, "base", value=-1),
    "a comparison names a model that is missing",
)
wrong(
    World.results,
    "a p of 3",
    put("comparisons", 0, "mcnemar_p", value=3),
    "mcnemar_p: .*less",
    "publish",
)
wrong(World.results, "no hashes", taken("content_hashes"), "content_hashes: Field required")
wrong(World.results, "a path that is a number", put(*FIRST, "path", value=7), "path: .*string")
CASES.add(
    "of other weights, met by publish",
    edited(
        World.results,
        lambda r: [model.update(fingerprint="f" * 64) for model in r["models"]],
        *[*PUBLISH, "--results", World.results],
    ),
    r"results\.json",
    "holds no results of checkpoints/cut",
)

ANOTHER_SWEEP, ANOTHER_AUDIT = f"{World.sweep} is another sweep", f"{World.audit} is another audit"
for command, fault, change, says in (
    ("sweep", "another profile's", put("asked", "profile", value="f" * 64), ANOTHER_SWEEP),
    ("sweep", "another layout's", put("asked", "layout", value="exact"), ANOTHER_SWEEP),
    ("sweep", "another seed's", put("asked", "seed", value=1), ANOTHER_SWEEP),
    ("sweep", "no criteria", put("asked", "by", value=[]), "asked.by: "),
    ("show", "a cell in words", put("cells", value=["half"]), "cells.0: "),
    ("show", "a cell without experts", taken("cells", 0, "keep"), "cells.0.keep: Field"),
    ("show", "a share as text", put("cells", 0, "fraction", value="0.5"), "fraction: .*number"),
    ("sweep", "-1 questions", put("base", "questions", value=-1), "base.questions: "),
):
    CASES.add(
        f"a sweep with {fault}, met by {command}",
        edited(SWEEP, change, *DOCUMENTS[SWEEP][command]),
        World.sweep,
        says,
    )
for command, fault, change, says in (
    ("audit", "another profile's", put("asked", "profile", value="f" * 64), ANOTHER_AUDIT),
    ("audit", "another seed's", put("asked", "seed", value=9), ANOTHER_AUDIT),
    ("audit", "other questions", put("asked", "asked", value="f" * 64), ANOTHER_AUDIT),
    ("show", "a harm in words", put("harms", value=["bad"]), "harms.0: "),
    ("show", "a harm without its expert", taken("harms", 0, "expert"), "harms.0.expert: Field"),
    ("show", "an expert of 1.5", put("harms", 0, "expert", value=1.5), "expert: .*integer"),
    ("show", "a regret too few", taken("verdicts", 0, "regrets", 0), "regrets of other fractions"),
    ("show", "a rank too few", taken("standings", "activations", "place", 0), "does not rank"),
    ("audit", "an expert too few", taken("sampled", 0), "2 effects of 1 sampled"),
    ("audit", "standings in a list", put("standings", value=[]), "standings: "),
):
    CASES.add(
        f"an audit with {fault}, met by {command}",
        edited(AUDIT, change, *DOCUMENTS[AUDIT][command]),
        World.audit,
        says,
    )
RUN = ["run", World.recipe, "--out", World.run]
STAMP = {"size": 1, "mtime_ns": 1, "ctime_ns": 1, "sha256": "f" * 64}
for fault, change, says in (
    ("a file above its folder", {"../../etc/passwd": STAMP}, "outside the run folder"),
    ("a file from the root", {"/etc/passwd": STAMP}, "outside the run folder"),
    ("a file with a NUL in its name", {"a\0b": STAMP}, "outside the run folder"),
    ("a stamp in words", {"profile/profile.json": "new"}, "files"),
    ("a size as text", {"profile/profile.json": {**STAMP, "size": "1"}}, "size: .*integer"),
):
    CASES.add(
        f"a manifest with {fault}",
        edited(MANIFEST, put("stages", "profile", "files", value=change), *RUN),
        r"made/manifest\.json is not a manifest",
        says,
    )
CASES.add(
    "a manifest with stages in a list",
    edited(MANIFEST, put("stages", value=[]), *RUN),
    r"made/manifest\.json is not a manifest",
    "stages: ",
)
CASES.add(
    "a sweep in a folder of something else",
    written("taken/mine.txt", "mine", "prune", *OF, *SWEPT, "--out", "taken"),
    "taken is not empty",
    "holds no sweep",
)
CASES.add(
    "an audit in a folder of something else",
    written("taken/mine.txt", "mine", "audit", *OF, *AUDITED, "--out", "taken"),
    "taken is not empty",
    "holds no audit",
)
CASES.add(
    "results where a folder of results is meant",
    spoiled(World.results, as_folder, "report", World.results),
    "nothing to report on in results",
    "results.json",
)
CASES.add(
    "a page of a pipe",
    spoiled(World.results, as_pipe, "report", World.results),
    World.results,
    "not there",
)
