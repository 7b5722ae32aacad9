"""The command lines whose outcome is recorded, and what a whole recorded set must hold.

The one place to change where a command or an option gets another name: a recorded set knows
folders (`out`), not commands, so sets from before and after a renaming can be compared. Files go
by their folder's first name: `bundled/plan/reap/plan.json` is a plan.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from tests.recorded_inputs import BUNDLED, FAMILIES, STOCK_ONLY, WORLDS

EXACT = tuple(world for world in WORLDS if world not in STOCK_ONLY)
_ASK = "--quiz quiz --shots 1 --threads 1"
_CHOSEN = "--split val --limit 4"
_OF = "--profile profile/all --threads 1"
# The size of the micro-batch would follow free memory.
_BRIEFLY = "--steps 2 --check-every 1 --batch 4 --micro-batch 2 --rank 2"
_CRITERIA = (
    *("activations", "gate_mass", "weighted_accuracy", "output_norm", "output_norm_mean", "reap"),
    *("easy_ep", "easy_ep_postnorm", "ranked_choice", "aimer", "reconstruction", "random"),
)


@dataclass(frozen=True)
class Step:
    """One command, run in a world's folder; `out` is the folder or file that it writes.

    With `is_printed` that file holds what the command prints.
    """

    out: str
    command: str
    worlds: tuple[str, ...] = WORLDS
    is_printed: bool = False

    @property
    def words(self) -> list[str]:
        """The command line behind `expertcut`."""
        return shlex.split(self.command)


def steps_of(world: str) -> list[Step]:
    """All commands of a world, in the order in which they must run."""
    return [step for step in _steps() if world in step.worlds]


def _steps() -> Iterator[Step]:
    yield from _profiles()
    yield from _plans()
    yield from _cuts()
    yield from _merges()
    yield from _tilts()
    yield from _healed()
    yield from _scores()
    yield Step("recipe", "run recipe.yaml")
    yield Step("page", "report . --out page/all.html")
    yield from _shown()


def _profiles() -> Iterator[Step]:
    profile = f"profile model {_ASK} {_CHOSEN}"
    yield Step("profile/all", f"{profile} --out profile/all")
    perturb = "--perturb shuffle-choices --perturb bf16"
    yield Step("profile/answer", f"{profile} --stats answer {perturb} --out profile/answer")
    # A quiz with one set of questions, a fifth of which judges.
    single = "profile model --quiz single.jsonl --shots 0 --threads 1"
    yield Step("profile/single", f"{single} --out profile/single")


def _plans() -> Iterator[Step]:
    by = {criterion: f"--keep-fraction 0.5 --by {criterion}" for criterion in _CRITERIA}
    more = {
        "max-bytes": "--max-bytes 1GB --by reap",
        "protected": "--keep-fraction 0.5 --protect 1:3 --by random --seed 5",
        "all-positions": "--keep-active --positions all",
        "single": "--keep-fraction 0.5 --by reap --profile profile/single",
    }
    for name, options in (by | more).items():
        out = f"plan/{name}"
        yield Step(out, f"prune {_OF} {options} --plan-only --out {out}")
    budget = "--keep-fraction 0.5 --budget global --min-keep 3 --by reap --layout exact"
    yield Step("plan/global", f"prune {_OF} {budget} --plan-only --out plan/global", EXACT)


def _cuts() -> Iterator[Step]:
    prune = f"prune {_OF}"
    half = "--keep-fraction 0.5 --by reap"
    held = "--keep-fraction 0.5 --protect 1:2"
    for out, options in {
        "stock/active": "--keep-active",
        "stock/half": f"{half} --fold all",
        "stock/tilted": f"{held} --boost 1:2=0.5 --apply-at answer --scale 1:2=1.5",
        "adapter/stock": f"{half} --adapter lora",
    }.items():
        yield Step(out, f"{prune} {options} --out {out}")
    for out, options in {
        "exact/active": "--keep-active",
        "exact/mean": f"{half} --budget global --removed mean",
        "exact/tilted": f"{held} --suppress 1:2=0.5",
        "adapter/exact": f"{half} --adapter lora",
    }.items():
        yield Step(out, f"{prune} {options} --layout exact --out {out}", EXACT)


def _merges() -> Iterator[Step]:
    for name, options in {
        "m_smoe": "--by m_smoe",
        "hc_smoe": "--by hc_smoe --router mean",
        "dominant": "--by m_smoe --no-align --router dominant",
    }.items():
        out = f"merged/{name}"
        yield Step(out, f"merge {_OF} --keep 6 {options} --out {out}")


def _tilts() -> Iterator[Step]:
    reweight = f"reweight {_OF}"
    contrast = "--contrast profile/all@right profile/all@wrong --boost-best 1 --strength 0.5"
    for out, options in {
        "stock/boosted": "--boost 1:2=0.5 --scale 0:1=1.25",
        "stock/suppressed": "--suppress 1:2=0.5 --apply-at answer",
        "stock/contrasted": contrast,
    }.items():
        yield Step(out, f"{reweight} {options} --out {out}")
    out = "exact/boosted"
    exact = "--boost 1:2=0.5 --scale 0:1=1.25 --layout exact"
    yield Step(out, f"{reweight} {exact} --out {out}", EXACT)
    few = "--boost-best 1 --by weighted_accuracy --layers 1 --min-appearances 0.05 --prove"
    few += " --force-write"
    yield Step("proof/fixed", f"{reweight} {few} --strength 0.5 --out proof/fixed")
    yield Step("proof/tuned", f"{reweight} {few} --tune --out proof/tuned", (BUNDLED,))
    # A search that finds something in each of the random models, so that a checkpoint is written.
    found = "--boost-best 2 --by tokens --tune --prove --force-write"
    yield Step("proof/tuned", f"{reweight} {found} --out proof/tuned", tuple(FAMILIES))


def _healed() -> Iterator[Step]:
    asked = f"{_ASK} --split val {_BRIEFLY}"
    for name, options in {
        "distilled": "stock/half",
        "answers": "stock/half --objective answer --targets gate --balance 0.01",
        "adapter": "merged/m_smoe --adapter",
    }.items():
        out = f"healed/{name}"
        yield Step(out, f"heal {options} {asked} --out {out}")
    yield Step("healed/exact", f"heal exact/mean {asked} --out healed/exact", EXACT)
    text = f"heal stock/half --text text.jsonl --objective lm --threads 1 {_BRIEFLY}"
    yield Step("healed/text", f"{text} --eval-quiz quiz --out healed/text")


def _scores() -> Iterator[Step]:
    files = "--out results/results.json --lm-eval-json results/lm_eval.json"
    for exact, worlds in (("exact/mean ", EXACT), ("", STOCK_ONLY)):
        models = f"model stock/half {exact}merged/m_smoe healed/distilled"
        yield Step("results", f"eval {models} {_ASK} --split test {files}", worlds)
    sweep = f"prune {_OF} --sweep 0.75,0.5 --limit 2"
    yield Step("sweep/stock", f"{sweep} --by reap,random --out sweep/stock")
    exact = "--by reap --layout exact --removed mean --budget global"
    yield Step("sweep/exact", f"{sweep} {exact} --out sweep/exact", EXACT)
    audit = f"audit {_OF} --sample 4 --questions 12"
    yield Step("ablation/stock", f"{audit} --out ablation/stock")
    exact = "--by reap --layout exact --out ablation/exact"
    yield Step("ablation/exact", f"{audit} {exact}", EXACT)


def _shown() -> Iterator[Step]:
    """What `show` prints for machines, and of a profile for people too."""
    for what in (
        *("profile/all", "plan/reap", "stock/tilted", "merged/m_smoe", "proof/tuned"),
        *("results/results.json", "sweep/stock", "ablation/stock"),
    ):
        for format in ("json", "csv"):
            out = f"shown/{what.split('/')[0]}.{format}"
            yield Step(out, f"show {what} --format {format}", is_printed=True)
    for option in ("subjects", "criteria"):
        command = f"show profile/all --{option} --format md"
        yield Step(f"shown/{option}.md", command, is_printed=True)


# Of every world a set must hold files that match each of these and are not empty.
_REQUIRED = (
    *("model/model.safetensors", "quiz/*.csv"),
    *("profile/all/profile.json", "profile/all/chunks/*.safetensors"),
    *("profile/answer/profile.json", "profile/answer/chunks/*.safetensors"),
    *("profile/answer/perturbed/bf16/*.safetensors", "plan/*/plan.json"),
    *("stock/*/model.safetensors", "stock/*/plan.json", "stock/*/chosen_on.txt"),
    *("merged/*/model.safetensors", "merged/*/plan.json"),
    *("adapter/*/adapter/adapter_model.safetensors", "adapter/*/adapter/adapter_config.json"),
    *("healed/*/model.safetensors", "healed/*/healing.json"),
    *("healed/adapter/adapter_model.safetensors", "proof/*/proof.json"),
    *("results/results.json", "results/predictions.parquet", "results/lm_eval*.json"),
    *("sweep/stock/sweep.json", "sweep/stock/*.csv", "sweep/stock/*.png", "sweep/stock/*.svg"),
    *("ablation/stock/*.json", "ablation/stock/*.csv", "ablation/stock/*.png"),
    *("recipe/manifest.json", "recipe/show/*", "recipe/variants/*/plan.json"),
    *("recipe/report.html", "page/*.html", "page/*/*.png", "page/*/*.svg", "page/*/*.csv"),
    *("shown/*.json", "shown/*.csv"),
)
_REQUIRED_EXACT = (
    *("exact/*/model.safetensors", "exact/*/modeling_exact.py", "exact/*/plan.json"),
    *("adapter/exact/adapter/*.safetensors", "sweep/exact/sweep.json", "ablation/exact/*.json"),
)


def absent(world: str, paths: Sequence[str]) -> list[str]:
    """What a set with files at these paths must hold of a world and does not."""
    required = (*_REQUIRED, *(_REQUIRED_EXACT if world in EXACT else ()))
    return [
        pattern
        for pattern in required
        if not any(fnmatch(path, f"{world}/{pattern}") for path in paths)
    ]


def is_input(path: str) -> bool:
    """Whether a file of a set was read by the commands and not written."""
    world, _, rest = path.partition("/")
    written = {step.out.split("/")[0] for step in steps_of(world)}
    return rest.split("/")[0] not in written
