"""The commands `heal`, `report`, `publish` and `run`."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from expertcut.cli.options import (
    Device,
    Dtype,
    Force,
    Format,
    Limit,
    NoVerify,
    OutDir,
    Subjects,
    Threads,
    TruncateOption,
    TrustRemoteCode,
    option,
    value,
)
from expertcut.cli.progress import bar, is_first, print_tables, quiet, resumable, watched
from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from expertcut.commands.run_recipe import Outcome
    from expertcut.healing.heal_settings import HealSettings
    from expertcut.hub.upload import Published
    from expertcut.recipes.stages import Stage
    from expertcut.reporting.tables import Table
    from expertcut.scoring.passes import OnPass

T = TypeVar("T")


class Objective(StrEnum):
    """The names in `healing.heal_settings.ObjectiveName`; a test holds them together."""

    distill = "distill"
    answer = "answer"
    lm = "lm"


@dataclass(frozen=True)
class Heal:
    """Train a cut checkpoint for a short while, and say what that won back."""

    checkpoint: Annotated[str, typer.Argument(help="What was pruned, merged or reweighted.")]
    quiz: Annotated[
        list[str] | None,
        option(
            "What to train on: a quiz as everywhere, or NAME=WEIGHT of several; may be repeated.  "
            "[default: mmlu, without --text]",
            "--quiz",
        ),
    ] = None
    split: Annotated[str, option("Split of it that is trained on.")] = "val"
    shots: Annotated[
        int | None, option("Questions of that split before the last of a row.  [default: 5]", min=0)
    ] = None
    subjects: Subjects = None
    limit: Limit = None
    text: Annotated[
        list[str] | None,
        option(
            "JSON lines with text or messages, or FILE=WEIGHT; for distill and lm; may be repeated."
        ),
    ] = None
    eval_quiz: Annotated[
        str | None, option("What is scored later, if another: kept out of the training.")
    ] = None
    eval_split: Annotated[str | None, option("Its split.  [default: test]")] = None
    truncate: TruncateOption = None
    objective: Annotated[
        Objective | None,
        option(
            "distill: say what the base says. answer: the right letter. lm: all tokens.  "
            "[default: distill where the base is at hand, else answer]"
        ),
    ] = None
    teacher: Annotated[
        str | None, option("The model of distill.  [default: what the checkpoint was made from]")
    ] = None
    likeliest: Annotated[
        int,
        option(
            "Of the teacher's tokens that count one by one.", "--top-k-logits", "--likeliest", min=1
        ),
    ] = 64
    teacher_cache: Annotated[
        Path | None, option("Folder for what it says, asked for only once, for any number of runs.")
    ] = None
    answer_weight: Annotated[
        float | None,
        option(
            "How much answers' letters weigh beside all of a row.  [default: 1 in distill, else 0]"
        ),
    ] = None
    targets: Annotated[str, option("What is adapted: attention, experts, gate.")] = (
        "attention,experts"
    )
    rank: Annotated[int, option("Of the adapters.", min=1)] = 16
    alpha: Annotated[int | None, option("Their scale times the rank.  [default: the rank]")] = None
    steps: Annotated[int, option("Steps at most.", min=1)] = 300
    learning_rate: Annotated[
        float | None, option("The highest.  [default: 0.64 / width of the model]")
    ] = None
    batch: Annotated[
        int, option("Rows of a step, over all processes.", "--batch-size", "--batch", min=1)
    ] = 16
    micro_batch: Annotated[
        int | None,
        option(
            "Rows in memory at once.  [default: what fits into free memory]",
            "--micro-batch-size",
            "--micro-batch",
            min=1,
        ),
    ] = None
    balance: Annotated[float, option("Weight of the load-balancing loss.", min=0)] = 0.0
    check_every: Annotated[
        int,
        option("Steps between two looks at held-out rows.", "--eval-every", "--check-every", min=1),
    ] = 50
    patience: Annotated[int, option("Looks without a better loss that end it.", min=1)] = 3
    max_tokens: Annotated[int, option("Of a row.", min=2)] = 2048
    adapter: Annotated[
        bool, option("Write the adapter alone, not a whole checkpoint.", "--adapter")
    ] = False
    save_memory: Annotated[
        bool,
        option(
            "Compute activations again instead of keeping them.",
            "--gradient-checkpointing",
            "--save-memory",
        ),
    ] = False
    shuffle: Annotated[
        bool, option("Ask each time with the choices in another order.", "--shuffle/--no-shuffle")
    ] = True
    seed: Annotated[int, option("Of the rows' order and the adapters.", min=0, max=2**32 - 1)] = 0
    dtype: Dtype = "auto"
    device: Device = "auto"
    threads: Threads = None
    trust_remote_code: TrustRemoteCode = False
    out: OutDir = None
    force: Force = False
    no_verify: NoVerify = False

    def run(self) -> None:
        """Trains, writes, prints what came of it."""
        from expertcut.healing.recovery import Options, default_out, heal, working_folder
        from expertcut.models.load import LoadOptions

        quiet()
        settings = self._settings()
        load_as = LoadOptions(self.dtype, self.device, self.trust_remote_code)
        out = self.out or default_out(self.checkpoint)
        with resumable(working_folder(out), "the last state is"), bar("healing") as report:
            options = Options(load_as, self.threads, self.force, report, _print_progress)
            healed = heal(self.checkpoint, settings, out, options)
        if healed is not None:
            _print_healed(healed)

    def _settings(self) -> "HealSettings":
        from pydantic import ValidationError

        from expertcut.healing.heal_settings import HealSettings

        names = HealSettings.model_fields
        given = {name: getattr(self, name) for name in names if hasattr(self, name)}
        given |= {
            "quiz": tuple(self.quiz or ()),
            "text": tuple(self.text or ()),
            "subjects": _split(self.subjects),
            "targets": _split(self.targets),
            "truncate": value(self.truncate),
            "objective": value(self.objective),
            "verify": not self.no_verify,
        }
        try:
            return HealSettings(**given)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            flag = f"--{fault['loc'][0]}: ".replace("_", "-") if fault["loc"] else ""
            raise SettingsError(f"{flag}{fault['msg']}") from None


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _print_progress(sentence: str) -> None:
    if is_first():
        print(sentence, flush=True)


def _print_healed(healed: Any) -> None:
    from expertcut.reporting.edit_tables import healing_sentences, healing_tables

    print_tables(healing_tables(healed), Format.table)
    for sentence in healing_sentences(healed):
        print(sentence)
    print(f"written to {healed.folder}")


def report(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, a profile, a checkpoint or results.")
    ],
    out: Annotated[
        Path | None, option("The page; figures go into a folder beside it.", metavar="FILE.html")
    ] = None,
) -> None:
    """Write report.html, a page with every table and figure."""
    from expertcut.reporting.page import write

    page = write(run, out)
    print(f"written to {page}, its figures to {page.with_suffix('')}/")


def publish(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that prune or reweight made.")],
    repo: Annotated[str, typer.Argument(help="Where to on the Hub.", metavar="OWNER/NAME")],
    results: Annotated[
        list[Path] | None,
        option("What eval wrote; results.json in or beside the folder without.", "--results"),
    ] = None,
    private: Annotated[bool, option("Make a new repository private.", "--private")] = False,
    revision: Annotated[str | None, option("Branch; made if it is not there.")] = None,
    dry_run: Annotated[
        bool, option("Only write the card, and say what goes.", "--dry-run")
    ] = False,
    force: Annotated[
        bool, option("Replace all that the repository holds, another model too.", "--force")
    ] = False,
) -> None:
    """Write a checkpoint's model card and upload both to the Hub."""
    from huggingface_hub.utils import logging as hub_logging

    from expertcut.hub.upload import PublishOptions, publish

    quiet()
    hub_logging.set_verbosity_error()
    options = PublishOptions(private, dry_run, force, revision, tuple(results or ()))
    _print_published(publish(checkpoint, repo, options))


def _print_published(done: "Published") -> None:
    """What was done, or would be, in words."""
    from expertcut.reporting.tables import one_line

    if done.commit is None:
        _print_files(done)
    if done.is_card_kept:
        print(f"{done.card} was edited by hand and stays; remove it for a new one")
    else:
        counts = {0: "without an evaluation", 1: "with an evaluation"}
        what = counts.get(done.n_results, f"with {done.n_results} evaluations")
        print(f"the card is written to {done.card}, {what}")
    if done.left_out:
        print(f"left out: {one_line(', '.join(done.left_out))}")
    if done.gone:
        print(f"removed there: {one_line(', '.join(done.gone))}")
    if done.commit is None:
        print(f"nothing is uploaded; without --dry-run it would go to {done.url}")
    elif done.is_changed:
        print(f"published to {done.url} (commit {done.commit[:8]})")
    else:
        print(f"{done.url} holds all of this already (commit {done.commit[:8]})")


def _print_files(done: "Published") -> None:
    from expertcut.reporting.tables import Cell, Column, Table

    rows: list[list[Cell]] = [[name, size / 1e6] for name, size in sorted(done.files.items())]
    rows.append(["all", sum(done.files.values()) / 1e6])
    columns = (Column("file"), Column("MB", ",.3f"))
    print_tables([Table(f"What goes to {done.repo}", columns, rows)], Format.table)


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, as in recipes/.")],
    out: Annotated[
        Path | None, option("The run's folder; as the recipe says, else results/<its name>.")
    ] = None,
    dry_run: Annotated[bool, option("Only say what would run, and why.", "--dry-run")] = False,
    start: Annotated[
        str | None, option("Run this stage and all after it, whatever is there.", "--from")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run a recipe: all stages, each only where it is due."""
    from expertcut.commands.run_recipe import RunOptions
    from expertcut.commands.run_recipe import run as run_recipe

    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise SettingsError(
            "a recipe runs in one process: let several fill its profile with `expertcut profile "
            "--out RUN/profile` first, then run the recipe, which goes on from there"
        )
    outcome = run_recipe(recipe, RunOptions(out, start, dry_run, trust_remote_code), _Reader())
    print(_summary(outcome, is_dry=dry_run))
    if outcome.ran and not dry_run and "eval" in outcome.stages:
        _print_results(outcome.folder)
    for name in outcome.left_over:
        print(f"{name} is no longer in the recipe; what it made stays")


def _summary(outcome: "Outcome", *, is_dry: bool) -> str:
    n_ran, n_stages = len(outcome.ran), len(outcome.stages)
    if not n_ran:
        again = f"--from {outcome.stages[0]} runs them again"
        return f"{outcome.folder}: nothing to do, all {n_stages} stages are current ({again})"
    verb = "would run" if is_dry else "ran"
    return f"{outcome.folder}: {n_ran} of {n_stages} stages {verb}"


def _print_results(folder: Path) -> None:
    """Prints a sentence for each evaluated model."""
    from expertcut.evaluation.results import load_results
    from expertcut.recipes.stages import RESULTS
    from expertcut.reporting.eval_tables import result_sentences

    print()
    for sentence in result_sentences(load_results(folder / RESULTS)):
        print(sentence)


class _Reader:
    """Someone at a terminal, or at what it is piped to."""

    def say(self, tables: "Sequence[Table]", sentences: Sequence[str]) -> None:
        """Tables and sentences, as the commands print them."""
        if tables:
            print_tables(tables, Format.table)
        for sentence in sentences:
            print(sentence, flush=True)

    def watch(
        self, run: "Callable[[OnPass], Iterator[T]]", what: str, total: int, where: Path
    ) -> list[T]:
        """A line of progress on stderr."""
        return watched(run, what, total, where)

    def parts(self, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A bar on stderr."""
        return bar(what)

    def plan(self, stage: "Stage", why: str, *, is_dry: bool) -> None:
        """One line per stage."""
        if not why:
            print(f"[{stage.name}] is current", flush=True)
        elif is_dry:
            print(f"[{stage.name}] would run: {why}", flush=True)
        else:
            print(f"\n[{stage.name}] runs: {why}", flush=True)
            quiet()

    def done(self, stage: "Stage", elapsed_s: float) -> None:
        """How long it took."""
        print(f"[{stage.name}] took {elapsed_s:,.1f} s", flush=True)
