"""The Python API: the commands as functions, which return objects with pandas tables.

Keywords are the command's options, with underscores. Errors are `expertcut.errors.ExpertcutError`.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd

from expertcut import stats
from expertcut.commands import SILENT, UI, CheckpointSettings, OnPart, ScoredSettings
from expertcut.commands import compress as compress_command
from expertcut.commands import dispatch as dispatch_command
from expertcut.commands import eval as eval_command
from expertcut.commands import heal as heal_command
from expertcut.commands import merge as merge_command
from expertcut.commands import place as place_command
from expertcut.commands import profile as profile_command
from expertcut.commands import prune as prune_command
from expertcut.commands import publish as publish_command
from expertcut.commands import report as report_command
from expertcut.commands import reweight as reweight_command
from expertcut.commands import route as route_command
from expertcut.commands import tracing as trace_command
from expertcut.edits.criteria import compare as compare_criteria
from expertcut.edits.plan import BlockEdit, EditPlan, expert_ids, load_plan
from expertcut.errors import ProfileError, SettingsError
from expertcut.profiling import storage
from expertcut.profiling import trace as traces
from expertcut.profiling.statistics import LayerStatistics, LayerSums, TextLayer

if TYPE_CHECKING:
    from expertcut.edits.cache_plan import CacheFile
    from expertcut.edits.placement_results import PlacementFile
    from expertcut.evaluation.dispatch_results import DispatchResult
    from expertcut.evaluation.results import ModelResult, Results
    from expertcut.hub.upload import Published
    from expertcut.profiling.statistics import TextScore

PathLike = str | os.PathLike[str]


class _ProgressUI(UI):
    """Shows progress bars, in a terminal or a notebook; prints nothing."""

    @contextmanager
    def parts(self, what: str, kept_in: Path) -> Iterator[OnPart]:
        from tqdm.auto import tqdm

        with tqdm(desc=what, leave=False, disable=None) as bar:

            def report(done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.refresh()

            yield report


class _Shown:
    """An object shown as its facts, in a notebook as a table of them."""

    def _facts(self) -> Mapping[str, str]:
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = self._facts()
        width = max(map(len, facts))
        lines = (f"  {name:<{width}}  {value}" for name, value in facts.items())
        return "\n".join([type(self).__name__, *lines])

    def _repr_html_(self) -> str:
        cells = (
            f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in self._facts().items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{''.join(cells)}</table>"


def profile(model: PathLike, **settings: Any) -> "Profile":
    """Profiles a model, as `expertcut profile`; resumes an interrupted run."""
    options = profile_command.ProfileSettings.read(model=os.fspath(model), **settings)
    return Profile(profile_command.run(options, _ProgressUI()))


def load_profile(path: PathLike) -> "Profile":
    """A profile on disk."""
    return Profile(storage.load_profile(Path(path)))


def trace(model: PathLike, **settings: Any) -> "Trace":
    """Records the experts of every token, as `expertcut trace`; resumes an interrupted run."""
    options = trace_command.TraceSettings.read(model=os.fspath(model), **settings)
    return Trace(trace_command.run(options, _ProgressUI()))


def load_trace(path: PathLike) -> "Trace":
    """A trace on disk."""
    return Trace(traces.load_trace(Path(path)))


def prune(profiles: Mapping[PathLike, float] | Sequence[PathLike], **settings: Any) -> "Plan":
    """Chooses experts to remove by several profiles of one model, as `expertcut prune`.

    `profiles` maps their folders to weights, or lists folders of equal weight; `blend` is "sum" or
    "maxmin". Writes nothing.
    """
    paths = [os.fspath(path) for path in profiles]
    if isinstance(profiles, Mapping):
        paths = [f"{path}={w:.17g}" for path, w in zip(paths, profiles.values(), strict=True)]
    options = prune_command.PruneSettings.read(profile=paths, **settings)
    return _pruned(Profile(options.load_profile()), options)


def _pruned(profile: "Profile", options: prune_command.PruneSettings) -> "Plan":
    options.check()
    if options.sweep is not None:
        raise SettingsError("a sweep is not a plan: run `expertcut sweep`")
    choice = prune_command.choose(options, _ProgressUI())
    return Plan(profile, choice.plan, options, lambda s: prune_command.write(choice, s, SILENT))


class Profile(_Shown):
    """Statistics of every expert in a quiz or in texts, from which edits are chosen."""

    def __init__(self, stored: storage.Profile) -> None:
        self.stored = stored

    @property
    def path(self) -> Path:
        """Folder of the profile."""
        return self.stored.path

    @property
    def accuracy(self) -> float:
        """Share of questions that the model answered correctly; of texts, of next tokens."""
        return self._score.accuracy if self._is_text else self.stored.answers.accuracy

    @property
    def perplexity(self) -> float:
        """Exp of the mean −log p of next tokens, of texts; ProfileError for a quiz."""
        return self._score.perplexity

    @property
    def _is_text(self) -> bool:
        return isinstance(self.stored, storage.TextProfile)

    @property
    def _score(self) -> "TextScore":
        stored = self.stored
        if isinstance(stored, storage.TextProfile) and stored.info.text.has_loss:
            return stored.score
        raise ProfileError(
            f"{self.path} holds no losses of texts: profile with text=[...] for them"
        )

    @cached_property
    def experts(self) -> pd.DataFrame:
        """One row per layer and expert: its statistics, and its score by each criterion.

        `expert` is the id in the unpruned model, `appearances` the share of questions routed to the
        expert; of texts there are its tokens, and what the model predicts behind them. Undefined
        shares are NaN. Criteria that need the model have no column.
        """
        ids, criteria = expert_ids(self.stored), compare_criteria(self.stored)
        parts = []
        for layer, found in enumerate(self.stored.layers):
            numbers = [ids.number(found.block, row) for row in range(found.n_experts)]
            columns = {"layer": layer, "expert": numbers, **_statistics(found)}
            scores = {name: score[layer] for name, score in criteria.scores.items()}
            new = {name: score for name, score in scores.items() if name not in columns}
            parts.append(pd.DataFrame(columns | new))
        return pd.concat(parts, ignore_index=True)

    def prune(self, **settings: Any) -> "Plan":
        """Chooses experts to remove, as `expertcut prune`; writes nothing."""
        options = prune_command.PruneSettings.read(profile=self.path, **settings)
        return _pruned(self, options)

    def merge(self, **settings: Any) -> "Plan":
        """Merges groups of experts, as `expertcut merge`; saving chooses the groups."""
        options = merge_command.MergeSettings.read(profile=self.path, **settings)
        return Plan(self, None, options, lambda s: merge_command.run(s, _ProgressUI()))

    def reweight(self, **settings: Any) -> "Plan":
        """Biases or scales the router, as `expertcut reweight`; writes nothing.

        `balance=M` works from `trace`, the folder of a trace of the same model.
        """
        own = {} if settings.get("balance") is not None else {"profile": self.path}
        options = reweight_command.ReweightSettings.read(**own, **settings)
        choice = reweight_command.choose(options, _ProgressUI())
        plan = choice.reweighting.draft
        if plan is None:
            raise SettingsError("no expert was chosen: there is nothing to reweight")
        if choice.profile.info.model.fingerprint != self.stored.info.model.fingerprint:
            raise ProfileError(f"{options.trace} is a trace of another model than {self.path}")
        options = options.updated(profile=[str(self.path)])  # asked for its quiz
        return Plan(self, plan, options, lambda s: reweight_command.write(choice, s, SILENT))

    def route(self, **settings: Any) -> "Plan":
        """Other experts at run time, by a rule, as `expertcut route`; writes nothing."""
        options = route_command.RouteSettings.read(profile=self.path, **settings)
        options.check()
        if options.is_judging or options.rules == ("contrast",):
            raise SettingsError(
                "a sweep, an oracle or contrast is not a plan: run `expertcut route`"
            )
        choice = route_command.choose(options, _ProgressUI())
        if choice.routing is None:
            raise SettingsError("no smaller number of experts is shown to hold")
        plan = route_command.draft_of(choice, options)
        return Plan(self, plan, options, lambda s: route_command.write(choice, s, SILENT))

    def compress(self, **settings: Any) -> "Plan":
        """Stores experts in fewer bytes, as `expertcut compress`; writes nothing."""
        options = compress_command.CompressSettings.read(profile=self.path, **settings)
        options.check()
        if options.sweep is not None:
            raise SettingsError("a sweep is not a plan: run `expertcut compress --sweep`")
        choice = compress_command.choose(options, _ProgressUI())
        write = compress_command.write
        return Plan(self, choice.draft, options, lambda s: write(choice, s, SILENT))

    def _facts(self) -> Mapping[str, str]:
        info = self.stored.info
        facts = {"path": str(self.path), "model": info.model.id}
        if self._is_text:
            from expertcut.reporting.text_profile_tables import profile_facts

            return facts | dict(profile_facts(self.stored))
        return facts | {
            "quiz": f"{info.quiz.id}, split {info.quiz.split}, {info.quiz.shots} shots",
            "questions": f"{len(self.stored.answers.answer_N):,}",
            "accuracy": f"{self.accuracy:.1%}",
        }


class Trace(_Shown):
    """The experts of every token of a quiz or of texts, in the order of the tokens."""

    def __init__(self, stored: traces.Trace) -> None:
        self.stored = stored

    @property
    def path(self) -> Path:
        """Folder of the trace."""
        return self.stored.path

    def sequences(self) -> "Iterator[traces.Sequence]":
        """Every question with its shots, or every row of texts: its tokens and their experts."""
        return self.stored.sequences()

    def _facts(self) -> Mapping[str, str]:
        from expertcut.reporting.trace_tables import trace_facts

        return {"path": str(self.path), **dict(trace_facts(self.stored))}


@dataclass(frozen=True, repr=False)
class Plan(_Shown):
    """An edit that is not written yet; `edit` is None for a merge, which saving chooses."""

    profile: Profile
    edit: EditPlan | None
    settings: CheckpointSettings
    _write: Callable[[Any], Any]

    @property
    def experts(self) -> pd.DataFrame:
        """One row per layer and expert: `kept`, `bias` in logits, `scale` of the gate weight."""
        if self.edit is None:
            raise SettingsError("a merge chooses its groups when it is saved: see its checkpoint")
        ids = expert_ids(self.profile.stored)
        counts = {b.name: b.experts for b in self.profile.stored.info.model.blocks}
        all_ids = {name: ids.kept(name, tuple(range(n))) for name, n in counts.items()}
        named = {name: ids.named(name, edit) for name, edit in self.edit.edits.items()}
        return _experts(named, all_ids)

    def simulate(self, **scored: Any) -> "Comparison":
        """Compares the edited model with the base, without writing a checkpoint.

        `scored` selects the questions: quiz, split (default test), shots, subjects, limit; the
        defaults are the profile's. Biases act exactly, not as layout stock fits them. A merge is
        built in a temporary folder. Texts are judged by `evaluate`.
        """
        options = ScoredSettings.read(**scored)
        quiz = options.scored_quiz(self.settings.load_profile())
        if self.edit is None:
            asked = {"quiz": quiz.id, "split": quiz.split, "limit": options.limit}
            return self.evaluate(shots=quiz.shots, **asked).first
        with TemporaryDirectory(prefix="expertcut-") as folder:
            from expertcut.evaluation.sweep_run import simulate

            where, watch = Path(folder), _ProgressUI().watch
            what = (self.profile.stored, self.edit, quiz, self.settings.load_as())
            before, after = simulate(*what, folder=where, watch=watch)
        change = stats.compare(before.is_correct_N, after.is_correct_N)
        return Comparison(len(quiz), before.accuracy, after.accuracy, **change.model_dump())

    def evaluate(self, **settings: Any) -> "Evaluation":
        """Scores the base and the edited model on a quiz, texts or tasks, as `expertcut eval`.

        The checkpoint is built in a temporary folder.
        """
        loaded = {"dtype": self.settings.dtype, "device": self.settings.device}
        with TemporaryDirectory(prefix="expertcut-") as folder:
            saved = self.save(Path(folder) / "edited", verify=False)
            return evaluate([self.profile.stored.info.model.id, saved], **loaded | settings)

    def save(
        self, out: PathLike | None = None, *, force: bool = False, verify: bool = True
    ) -> "Checkpoint":
        """Writes the checkpoint, and compares it with the base on held-out questions."""
        given = {"out": None if out is None else Path(out), "force": force}
        verify = verify and self.settings.verify
        built = self._write(self.settings.updated(**given, verify=verify))
        if isinstance(built, Path):  # as after a cross-fit that shows no gain
            raise SettingsError(f"no checkpoint is written, see {built}: give force_write=True")
        return Checkpoint(built.folder)

    def _facts(self) -> Mapping[str, str]:
        if self.edit is None:
            return {"edit": "merge", "settings": repr(self.settings.recipe_values())}
        kept = self.experts.groupby("layer").kept
        pairs = zip(kept.sum(), kept.size(), strict=True)
        return {
            "edit": self.edit.action,
            "criterion": self.edit.criterion,
            "layout": self.edit.layout,
            "kept per layer": ", ".join(f"{n} of {of}" for n, of in pairs),
        }


class Checkpoint(_Shown, os.PathLike[str]):
    """A checkpoint that an edit wrote; works as a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = load_plan(path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def size_bytes(self) -> int:
        """Bytes of its weights."""
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))

    @property
    def experts(self) -> pd.DataFrame:
        """One row per layer and kept expert: `bias` in logits, `scale` of the gate weight."""
        blocks = self.plan.blocks
        return _experts(blocks, {name: edit.keep for name, edit in blocks.items()})

    @property
    def held_out(self) -> pd.DataFrame:
        """Comparisons with other forms of the model on held-out questions, if it was verified."""
        return pd.DataFrame(list(self.plan.proof.model_dump().get("held_out") or ()))

    def _facts(self) -> Mapping[str, str]:
        return {
            "path": str(self.path),
            "edit": self.plan.action,
            "layout": self.plan.layout,
            "size": f"{self.size_bytes / 1e6:,.1f} MB",
        }


@dataclass(frozen=True, repr=False)
class Comparison(_Shown):
    """A model and its base on the same questions; accuracies are 0 to 1.

    `gained` questions only the model answers correctly, `lost` only the base. `smallest_effect` is
    the smallest change that this many questions can detect.
    """

    questions: int
    base_accuracy: float
    accuracy: float
    delta: float
    ci95: tuple[float, float]
    gained: int
    lost: int
    mcnemar_p: float
    smallest_effect: float

    def _facts(self) -> Mapping[str, str]:
        low, high = (100 * end for end in self.ci95)
        return {
            "questions": f"{self.questions:,}",
            "accuracy": f"{self.accuracy:.2%}, base {self.base_accuracy:.2%}",
            "change": f"{100 * self.delta:+.2f} points ({low:+.2f} … {high:+.2f})",
            "gained, lost": f"{self.gained:,}, {self.lost:,} (McNemar p = {self.mcnemar_p:.2g})",
        }


class Evaluation(_Shown):
    """Models scored on the same questions; the first is the base of every comparison."""

    def __init__(self, results: "Results") -> None:
        self.results = results

    @property
    def models(self) -> pd.DataFrame:
        """One row per model: accuracy (0 to 1) with its 95 % interval, parameters, bytes.

        The columns of a quiz are empty where none was asked.
        """
        names = ["path", "accuracy", "ci95", "questions"]
        names += ["parameters", "active_parameters", "bytes"]
        rows = [model.model_dump(include=set(names)) for model in self.results.models]
        return pd.DataFrame(rows)[names]

    @property
    def comparisons(self) -> pd.DataFrame:
        """One row per model but the first, compared with it question by question."""
        models, rows = self.results.models, [c.model_dump() for c in self.results.comparisons]
        found = pd.DataFrame([{"path": models[row["other"]].path, **row} for row in rows])
        return found.drop(columns=["base", "other", "text", "tasks", "generation"], errors="ignore")

    @property
    def tasks(self) -> pd.DataFrame:
        """One row per task and model: its metric, compared with the first document by document."""
        from expertcut.reporting import task_tables

        columns = task_tables.FLAT.split("; ")
        found = pd.DataFrame(task_tables.tasks_rows(self.results), columns=columns)
        return found.drop(columns="part").rename(columns={"name": "task", "n": "documents"})

    @property
    def texts(self) -> pd.DataFrame:
        """One row per source of texts, model and figure, with its change and 95 % interval."""
        from expertcut.reporting import task_tables, text_tables

        columns = task_tables.FLAT.split("; ")
        found = pd.DataFrame(text_tables.judged_rows(self.results), columns=columns)
        kept = ["path", "name", "metric", "value", "n", "delta", "delta_low", "delta_high"]
        return found[kept].rename(columns={"name": "text", "n": "documents"})

    @property
    def generation(self) -> pd.DataFrame:
        """One row per figure and model of what the models wrote, compared with the first."""
        from expertcut.reporting import generation_tables, task_tables
        from expertcut.stats import MARGIN

        rows = generation_tables.generation_rows(self.results, MARGIN)
        found = pd.DataFrame(rows, columns=task_tables.FLAT.split("; "))
        found = found.drop(columns=["part", "stderr", "unpaired_z", "unpaired_p"])
        return found.rename(columns={"name": "figure", "n": "prompts"})

    @property
    def first(self) -> Comparison:
        """The second model against the first, in the quiz."""
        from expertcut.evaluation.results import QuizResults

        if not isinstance(results := self.results, QuizResults):
            raise SettingsError("no quiz was asked: see `results`, or give quiz=")
        base, other = results.models[:2]
        row = self.results.comparisons[0].model_dump()
        change = {name: row[name] for name in Comparison.__dataclass_fields__ if name in row}
        return Comparison(base.questions, base.accuracy, other.accuracy, **change)

    def _facts(self) -> Mapping[str, str]:
        return {model.path: _figures(model) for model in self.results.models}


def _figures(model: "ModelResult") -> str:
    """The accuracy in a quiz, or the perplexities of texts and the values of tasks."""
    if model.accuracy is not None and model.ci95 is not None:
        return f"{model.accuracy:.2%} ({model.ci95[0]:.2%} … {model.ci95[1]:.2%})"
    texts = [f"{name} {found.perplexity:.3f}" for name, found in (model.text or {}).items()]
    texts += [f"{task} {found.value:.4f}" for task, found in (model.tasks or {}).items()]
    if model.generation and model.generation.loops:
        texts.append(f"{model.generation.loops.share:.2%} of outputs loop")
    return ", ".join(texts)


def evaluate(models: Sequence[PathLike], **settings: Any) -> Evaluation:
    """Scores models on the same questions, as `expertcut eval`; `out` keeps the results."""
    with TemporaryDirectory(prefix="expertcut-") as folder:
        settings = {"out": Path(folder) / "results.json", **settings}
        options = eval_command.EvalSettings.read(models=[os.fspath(m) for m in models], **settings)
        results = eval_command.run(options, _ProgressUI())
    assert results is not None, "this process is the first"
    return Evaluation(results)


def dispatch(results: Sequence[PathLike], **settings: Any) -> "DispatchResult":
    """Chooses a model for each subject or skill, as `expertcut dispatch`; `out` keeps it."""
    with TemporaryDirectory(prefix="expertcut-") as folder:
        settings = {"out": Path(folder) / "dispatch.json", **settings}
        files = [os.fspath(path) for path in results]
        options = dispatch_command.DispatchSettings.read(results=files, **settings)
        return dispatch_command.run(options, _ProgressUI())


def place(trace: PathLike, **settings: Any) -> "PlacementFile | CacheFile":
    """Places a trace's experts on devices or in a cache, as `expertcut place`; `out` keeps it."""
    with TemporaryDirectory(prefix="expertcut-") as folder:
        settings = {"out": Path(folder) / "placement", **settings}
        options = place_command.PlaceSettings.read(trace=Path(trace), **settings)
        return place_command.run(options, _ProgressUI())


def heal(checkpoint: PathLike, **settings: Any) -> Checkpoint:
    """Trains an edited checkpoint to recover accuracy, as `expertcut heal`."""
    options = heal_command.HealSettings.read(checkpoint=os.fspath(checkpoint), **settings)
    healed = heal_command.run(options, _ProgressUI())
    assert healed is not None, "this process is the first"
    return Checkpoint(healed.folder)


def report(run: PathLike, **settings: Any) -> Path:
    """Writes an HTML page of a run, as `expertcut report`; returns its path."""
    return report_command.run(report_command.ReportSettings.read(run=Path(run), **settings))


def publish(checkpoint: PathLike, repo: str, **settings: Any) -> "Published":
    """Writes a model card and uploads both, as `expertcut publish`."""
    paths = {"checkpoint": Path(checkpoint), "repo": repo}
    return publish_command.run(publish_command.PublishSettings.read(**paths, **settings))


def _statistics(layer: LayerSums) -> dict[str, Any]:
    """The columns of a layer's experts (E,)."""
    columns: dict[str, Any] = {}
    if isinstance(layer, LayerStatistics):
        columns = {
            "appearances": layer.appearances_E,
            "accuracy": layer.accuracy_E,
            "weighted_accuracy": layer.weighted_accuracy_E,
            "contribution_pct": layer.contribution_pct_E,
        }
    if layer.tokens_E is not None:
        columns["tokens"] = layer.tokens_E
    if isinstance(layer, TextLayer) and layer.next is not None:
        columns["next_token_accuracy"] = layer.next.accuracy_E
        columns["weighted_accuracy"] = layer.next.weighted_accuracy_E
        columns["mean_loss"] = layer.next.mean_loss_E
    return columns


def _experts(edits: Mapping[str, BlockEdit], ids: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    rows = [
        {
            "layer": layer,
            "expert": expert,
            "kept": expert in edits[name].keep,
            "bias": edits[name].all_biases.get(expert, 0.0),
            "scale": edits[name].scale.get(expert, 1.0),
        }
        for layer, (name, experts) in enumerate(ids.items())
        for expert in experts
    ]
    return pd.DataFrame(rows)
