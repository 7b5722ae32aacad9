"""What scores a form of the model in a sweep: a quiz, or held-out texts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from expertcut.checkpoints.build import profiled_source
from expertcut.checkpoints.size import Size
from expertcut.checkpoints.text_check import DocumentSums
from expertcut.data import ngrams, without
from expertcut.data.corpus import Corpus, TextSelection, hash_lines, load_corpus, rows_to_judge
from expertcut.data.questions import hashes_in
from expertcut.edits.splits import profiled_on, questions_for
from expertcut.errors import ProfileError
from expertcut.evaluation import search_results as schema
from expertcut.evaluation.results import Scoring, TextComparison, TextResult
from expertcut.evaluation.text_eval import (
    BaseRun,
    KnownTexts,
    TextJudgement,
    document_sums,
    judged_info,
    judged_texts,
    known_texts,
    text_comparison,
    text_result,
    without_known,
)
from expertcut.models.load import LoadOptions, MoeModel, load_tokenizer
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, TextProfile, load_profile
from expertcut.profiling.workers import Progress
from expertcut.scoring.engine import Engine, context_length
from expertcut.scoring.passes import OnPass
from expertcut.stats import Array, accuracy, compare, document_ci95, logprob_shift, right_logprobs

Cell = schema.SweepCell | schema.TextCell


@dataclass(frozen=True)
class Cut:
    """A cell of the grid: its criterion, its share, and the experts that stay."""

    by: str
    fraction: float
    keep: Mapping[str, Sequence[int]]

    def named(self) -> dict[str, Any]:
        """The same as fields of a cell."""
        keep = {name: tuple(kept) for name, kept in self.keep.items()}
        return {"by": self.by, "fraction": self.fraction, "keep": keep}


class Judge(Protocol):
    """Scores the unedited model, then cuts of it, and compares these with it.

    Chunks are in the folder `cells`, of the unedited model in `base`.
    """

    unit: str

    @property
    def n(self) -> int:
        """Units that every form reads."""

    @property
    def engine(self) -> Engine:
        """What runs the edited forms."""

    def request(self) -> dict[str, Any]:
        """What the request of the sweep says of what is read."""

    def n_used(self, used: frozenset[str]) -> int:
        """How many units had a part in the choice, by hash."""

    def run(self, cells: Path, name: str, on_pass: OnPass) -> Iterator[Progress]:
        """Scores the model as it is now, into a folder of this name."""

    def base(self, cells: Path, size: Size) -> dict[str, Any]:
        """The fields of the sweep that the unedited model gives, once all of it is scored."""

    def figures(self, cells: Path, name: str, size: Size) -> dict[str, Any]:
        """The fields of a finished cell, paired with the unedited model, but for its settings."""

    def cell(self, cells: Path, name: str, size: Size, cut: Cut) -> Cell:
        """A finished cell of a cut."""

    def best(self, cells: Path, finished: schema.Sweep) -> dict[str, Any]:
        """The fields of the sweep that compare cells with each other."""


class QuizJudge:
    """Answers to the questions of a quiz."""

    unit = "questions"

    def __init__(self, moe: MoeModel, scoring: Scoring, options: MeasureOptions) -> None:
        self.quiz = scoring.quiz
        self.measurement = Measurement(moe, scoring.quiz, scoring.limit, options)
        self.subjects = [question.subject for question in scoring.quiz]

    @property
    def n(self) -> int:
        """Questions."""
        return len(self.quiz)

    @property
    def engine(self) -> Engine:
        """What runs the edited forms."""
        return self.measurement.engine

    def request(self) -> dict[str, Any]:
        """The questions and the scoring settings."""
        return {"scored": self.measurement.info}

    def n_used(self, used: frozenset[str]) -> int:
        """How many questions had a part in the choice."""
        return len(self.quiz) - len(without(self.quiz, used))

    def run(self, cells: Path, name: str, on_pass: OnPass) -> Iterator[Progress]:
        """Answers of the model as it is now."""
        yield from self.measurement.run(cells / name, on_pass)

    def base(self, cells: Path, size: Size) -> dict[str, Any]:
        """The unedited model, and the accuracy of guessing."""
        self.unedited = load_profile(cells / "base").answers
        return {"base": self._model(cells, "base", size), "chance": self.unedited.chance}

    def _model(self, cells: Path, name: str, size: Size) -> schema.SweptModel:
        answered = load_profile(cells / name).answers
        scored = accuracy(answered.is_correct_N, self.subjects)
        return schema.SweptModel(
            accuracy=scored.accuracy,
            ci95=scored.ci95,
            questions=scored.n_questions,
            cut=answered.n_cut,
            right_logprob=float(right_logprobs(answered.logprob_NC, answered.answer_N).mean()),
            **_size(size),
        )

    def figures(self, cells: Path, name: str, size: Size) -> dict[str, Any]:
        """Accuracy, and the paired change."""
        answered = load_profile(cells / name).answers
        largest, median = logprob_shift(self.unedited.logprob_NC, answered.logprob_NC)
        return {
            **self._model(cells, name, size).model_dump(),
            "change": compare(self.unedited.is_correct_N, answered.is_correct_N),
            "max_abs_logprob_diff": largest,
            "median_abs_logprob_diff": median,
        }

    def cell(self, cells: Path, name: str, size: Size, cut: Cut) -> schema.SweepCell:
        """A cut, paired with the unedited model."""
        return schema.SweepCell(**self.figures(cells, name, size), **cut.named())

    def best(self, _cells: Path, _finished: schema.Sweep) -> dict[str, Any]:
        """Nothing: sentences say it."""
        return {}


@dataclass(frozen=True)
class TextScoring:
    """Documents, and how every form of the model is run on them.

    `dropped` documents by source had a part in the choice; `top_k` of the base's predictions are
    kept. `is_held_out` says that the documents are those that the profile holds out.
    """

    corpus: Corpus
    top_k: int
    load_as: LoadOptions
    options: MeasureOptions
    dropped: Mapping[str, int] = field(default_factory=dict)
    is_held_out: bool = False


class TextJudge:
    """Losses on texts, and divergence from the unedited model."""

    unit = "rows"

    def __init__(self, moe: MoeModel, scoring: TextScoring, options: MeasureOptions) -> None:
        self.moe, self.scoring, self.options = moe, scoring, options
        self.corpus = within_context(scoring.corpus, moe)
        self.rows, self.prefix = rows_to_judge(self.corpus, moe.tokenizer)
        self.vocabulary = int(moe.model.config.get_text_config().vocab_size)
        self.top = min(scoring.top_k, self.vocabulary)
        # Every process compares, so each needs all of the base's chunks.
        self.unedited = self._judgement(replace(options, waits=True), None)
        self.edited: TextJudgement | None = None

    def _judgement(self, options: MeasureOptions, base: BaseRun | None) -> TextJudgement:
        top = self.top if base is None else 0
        judged = judged_info(self.prefix, top, self.scoring.top_k, base)
        return TextJudgement(self.moe, self.corpus, options, self.rows, judged, base)

    @property
    def n(self) -> int:
        """Rows."""
        return self.unedited.n_rows

    @property
    def engine(self) -> Engine:
        """What runs the edited forms."""
        assert self.edited is not None, "the unedited model comes first"
        return self.edited.engine

    def request(self) -> dict[str, Any]:
        """The texts and the scoring settings."""
        scored = (self.top, self.vocabulary, self.scoring.dropped)
        return {"scored": self.unedited.info, "text": judged_texts(self.corpus, *scored)}

    def n_used(self, used: frozenset[str]) -> int:
        """How many documents had a part in the choice."""
        return len(self.corpus) - len(self.corpus.without(hashes_in(used)))

    def run(self, cells: Path, name: str, on_pass: OnPass) -> Iterator[Progress]:
        """Losses of the model as it is now; of a cut also beside the unedited model's chunks."""
        if name != "base":
            assert self.edited is not None, "the unedited model comes first"
            yield from self.edited.run(cells / name, on_pass)
            return
        yield from self.unedited.run(cells / name, on_pass)
        self.edited = self._judgement(self.options, BaseRun(cells / name, self.unedited.info))

    def base(self, cells: Path, size: Size) -> dict[str, Any]:
        """The unedited model."""
        self.base_sums = self._sums(cells, "base")
        return {"base": schema.SweptTexts(**_texts(self.base_sums, size))}

    def _sums(self, cells: Path, name: str) -> DocumentSums:
        info = load_profile(cells / name).info
        assert info.text is not None, "texts were read"
        return document_sums(BaseRun(cells / name, info), self.corpus, self.rows)

    def figures(self, cells: Path, name: str, size: Size) -> dict[str, Any]:
        """Losses of all documents and of each source, and their paired changes."""
        sums, base = self._sums(cells, name), self.base_sums
        return {
            **_texts(sums, size),
            "change": compared(pooled(base), pooled(sums)),
            "changes": {source: compared(base[source], own) for source, own in sums.items()},
            "chunks": name,
        }

    def cell(self, cells: Path, name: str, size: Size, cut: Cut) -> schema.TextCell:
        """A cut, paired with the unedited model."""
        return schema.TextCell(**self.figures(cells, name, size), **cut.named())

    def best(self, cells: Path, finished: schema.Sweep) -> dict[str, Any]:
        """Of each share the cut that loses least, and what the others lose beyond it."""
        found = []
        for fraction in finished.asked.fractions:
            own = [cell for cell in finished.of_texts if cell.fraction == fraction]
            if not own:
                continue
            best = min(own, key=lambda cell: cell.delta_loss)
            least = pooled(self._sums(cells, best.chunks))
            behind = {}
            for cell in own:
                if cell.by != best.by:
                    other = pooled(self._sums(cells, cell.chunks))
                    lost_D = other["loss"] - least["loss"]
                    behind[cell.by] = document_ci95(lost_D, least["scored"])
            found.append(schema.BestOnTexts(fraction=fraction, by=best.by, behind=behind))
        return {"text": tuple(found)}


def judge_of(moe: MoeModel, scoring: Scoring | TextScoring, options: MeasureOptions) -> Judge:
    """The judge of a model that is loaded."""
    if isinstance(scoring, TextScoring):
        return TextJudge(moe, scoring, options)
    return QuizJudge(moe, scoring, options)


def held_out_texts(profile: Profile) -> Corpus | None:
    """The held-out documents of a profile, of a blend of its heaviest; None if a quiz judges.

    As many as make 256 rows or 65,536 tokens. Raises ProfileError: no document is held out.
    """
    if not isinstance(profile.parts[0], TextProfile):
        return None
    questions = questions_for(profile, is_fitting=False)
    assert isinstance(questions.held_out, Corpus), "a profile of texts"
    if not len(questions.held_out):
        raise ProfileError(f"{questions.why_unscored}: name others with --text FILE")
    return questions.held_out


def unused_texts(profile: Profile, selection: TextSelection) -> tuple[Corpus, dict[str, int]]:
    """Other texts, without documents that chose experts; also how many of each source these are.

    Raises TextError: more than 5 % of the documents were used.
    """
    source = profiled_source(profile)
    tokenizer = load_tokenizer(source, trust_remote_code=profile.trust_remote_code)
    corpus = load_corpus(selection, tokenizer)
    chosen = [profiled_on(part) for part in profile.parts]
    said = (d.said for texts in chosen if isinstance(texts, Corpus) for d in texts)
    lines = frozenset[str]().union(*map(hash_lines, chosen))
    name = " and ".join(str(part.path) for part in profile.parts)
    own = KnownTexts(name, hashes_in(lines), ngrams.ngrams_of(said))
    return without_known(corpus, [own, KnownTexts(source.name, *known_texts(source))])


def within_context(corpus: Corpus, moe: MoeModel) -> Corpus:
    """The corpus, whose rows are no longer than the model's context."""
    most = corpus.selection.max_tokens
    context = context_length(moe.model.config, moe.tokenizer) or most
    return replace(corpus, selection=replace(corpus.selection, max_tokens=min(most, context)))


def pooled(sums: DocumentSums) -> dict[str, Array]:
    """Sums by document (D,) of all sources in one."""
    first = next(iter(sums.values()))
    return {name: np.concatenate([own[name] for own in sums.values()]) for name in first}


def compared(base: Mapping[str, Array], other: Mapping[str, Array]) -> TextComparison:
    """Two forms of one model on the same rows."""
    return text_comparison(base, other, is_same_rows=True, has_pairs=True)


def _texts(sums: DocumentSums, size: Size) -> dict[str, Any]:
    total: TextResult = text_result(pooled(sums))
    by_source = {source: text_result(own) for source, own in sums.items()}
    return {"total": total, "text": by_source, **_size(size)}


def _size(of: Size) -> dict[str, int]:
    return {
        "parameters": of.parameters,
        "active_parameters": of.active_parameters,
        "bytes": of.size_bytes,
    }
