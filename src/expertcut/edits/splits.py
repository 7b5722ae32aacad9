"""Which questions choose an edit, which are held out, and which were used before."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from expertcut.data import Quiz, Selection, load_quiz, round_robin, sources, without
from expertcut.data.corpus import (
    TEXT_SPLIT,
    CalibrationSet,
    Corpus,
    TextSelection,
    hash_lines,
    load_corpus,
    rows_hash,
)
from expertcut.data.questions import hashes_in, replace_questions
from expertcut.edits import plan as plans
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import ChosenOn, EditPlan, PlanFile
from expertcut.errors import PlanError, ProfileError, QuizError
from expertcut.models.checkpoint_dir import absolute_id
from expertcut.profiling.blend import Blend
from expertcut.profiling.schema import quiz_info
from expertcut.profiling.storage import (
    IN_CALIBRATION,
    Profile,
    ProfilePart,
    TextPart,
    TextProfile,
    can_hold_out,
    once_per_profile,
    profile_of,
)
from expertcut.profiling.trace import RoutesTraceInfo, TextTraceInfo, Trace, TracedQuiz

UNUSED = "were not used"


class ScoredSplit(NamedTuple):
    """Questions of a split that scored an edit."""

    split: str
    questions: int
    used: int | None  # those that chose or fitted it; None if unknown
    how: str = ""  # in words, how they were used, if recorded

    @property
    def things(self) -> str:
        """What was scored: documents of texts, or questions."""
        return "documents" if self.split == TEXT_SPLIT else "questions"

    @property
    def title(self) -> str:
        """A heading; questions are held out only if none of them was used."""
        if self.used and not self.how:
            n_used = f"{self.used:,} of {self.questions:,}"
            return f"{self.things.capitalize()} ({self.split}), {n_used} used to choose or fit"
        how = f"{self.things.capitalize()} that {self.how or 'were asked'}"
        return f"{how if self.used != 0 else f'Held-out {self.things}'} ({self.split})"

    @property
    def noun(self) -> str:
        """A name for the questions within a sentence."""
        return f"held-out {self.things}" if self.used == 0 else f"the {self.things} that were asked"

    @property
    def clause(self) -> str:
        """A clause with the use of the questions."""
        if self.used == 0:
            return f"{self.split} {self.things} that were not used to choose or fit anything"
        if self.how:
            return f"{self.split} {self.things} that {self.how}"
        if self.used is None:
            return f"{self.split} {self.things}, of which it is not recorded whether they were used"
        which = f"{self.questions:,} {self.split} {self.things}"
        return f"{which}, {self.used:,} of them used to choose or fit"


def scored_split(
    lines: Iterable[str], used: Iterable[str], split: str, how: str = ""
) -> ScoredSplit:
    """Counts the used ones among hash lines of questions."""
    scored, known = tuple(lines), hashes_in(used)
    n_used = sum(not known.isdisjoint(line.split()) for line in scored)
    return ScoredSplit(split, len(scored), n_used, how)


def read_scored_split(plan: PlanFile, folder: Path) -> ScoredSplit:
    """The held-out questions of a plan; `used` is None without a list or hashes to compare."""
    lines, split = plan.proof.held_out_hashes, plan.proof.held_out_split
    how = "" if plan.proof.held_out_used == UNUSED else plan.proof.held_out_used
    if lines:
        with suppress(PlanError):
            return scored_split(lines, plans.load_hashes(folder, plan), split, how)
    return ScoredSplit(split, len(lines), None, how)


@dataclass(frozen=True)
class Questions:
    """`profiled` chose the experts, `tuning` fits, `held_out` scores, and may be empty."""

    profiled: CalibrationSet
    tuning: CalibrationSet
    held_out: CalibrationSet
    # Hash lines of the questions that the profiled checkpoint was chosen on, and of others read.
    inherited: frozenset[str] = frozenset()

    @property
    def why_unscored(self) -> str:
        """Why `held_out` is empty, in words; else empty."""
        quiz, n = self.tuning, len(self.tuning)
        which = f"{quiz.split} questions" if isinstance(quiz, Quiz) else "documents"
        why = f"nothing judges it: all {n:,} {which} of {quiz.id} had a part in it"
        return "" if len(self.held_out) else why


def choosing_profile(profile: Profile, held_out: float | None = None) -> tuple[Profile, str]:
    """Four fifths of a quiz with one set of questions, else the whole profile; and any message.

    The last fifth is held out, of a blend in each of its profiles. With `held_out` 0 all questions
    choose and fit, and only another split can be held out. Raises QuizError: too few questions to
    hold any out.
    """
    if isinstance(profile, Blend):
        parts, notes = zip(*(choosing_profile(p, held_out) for p in profile.parts), strict=True)
        return profile.of(parts), "; ".join(dict.fromkeys(filter(None, notes)))
    if held_out == 0:
        whole = profile_of(profile.path, profile.info, profile.truncate)
        whole.trust_remote_code = profile.trust_remote_code
        whole.holds_out = False
        return whole, ""
    if isinstance(profile, TextProfile):
        return _choosing_texts(profile)
    quiz = profiled_quiz(profile)
    if not sources.is_one_set(quiz):
        return profile, ""
    held = {(q.subject, q.row) for q in quiz if sources.is_held_out(q)}
    if not 0 < len(held) < len(quiz):
        raise QuizError(
            f"{quiz.id} has too few questions to hold any out: it has {len(quiz)}: add some, or "
            "choose on all of them with --held-out 0"
        )
    if can_hold_out(profile, quiz):
        return ProfilePart(profile, held), (
            f"{quiz.id} has one set of questions: {len(quiz) - len(held):,} of them choose, the "
            f"other {len(held):,} are held out"
        )
    return profile, (
        f"{profile.path} does not keep the sums of a fifth of its questions apart, so all of them "
        "choose and nothing judges: profile again to hold a fifth out"
    )


def _choosing_texts(profile: TextProfile) -> tuple[Profile, str]:
    chooses_N, tokens_N = (profile.array(n) for n in (IN_CALIBRATION, "tokens_N"))
    n_all, n_chosen = int(tokens_N.sum()), int(tokens_N[chooses_N > 0].sum())
    if not 0 < n_chosen < n_all:
        return profile, (
            f"{profile.info.text.id} has too few documents to hold any out: all of them choose, "
            "and nothing judges"
        )
    part = TextPart(profile)
    part.trust_remote_code = profile.trust_remote_code
    return part, (
        f"by documents: {n_chosen:,} tokens of {profile.info.text.id} choose, the other "
        f"{n_all - n_chosen:,} are held out"
    )


@once_per_profile
def questions_for(
    profile: Profile, *, is_fitting: bool, used: frozenset[str] = frozenset(), n_held_out: int = 256
) -> Questions:
    """The questions of a command that works from a profile.

    Tuning questions are the profile's, or `val` for a profile of `test`, without repeats of its
    questions. Held-out questions are 256 (`n_held_out`), round-robin over subjects: the held-out
    part of the profile, else an unused split, else a fifth of the tuning questions if these are of
    another split than the profile. None is left for a whole profile of the only split. Questions
    of earlier cuts and `used` ones are avoided if possible. A blend takes those of its heaviest
    profile, and counts the questions of the others as used. Raises QuizError: too few to hold out.
    """
    if isinstance(profile, Blend):
        main, *others = profile.parts
        read = frozenset[str]().union(*(hash_lines(profiled_on(p)) for p in others))
        used |= read
        return questions_for(main, is_fitting=is_fitting, used=used, n_held_out=n_held_out)
    earlier = plans.profiled_plan(profile)
    inherited = used | (plans.load_hashes(*earlier) if earlier else frozenset())
    if isinstance(profile, TextProfile):
        return _texts_for(profile, inherited, n_held_out)
    profiled = profiled_quiz(profile)

    def judged_on(quiz: Quiz) -> Quiz:
        unused = without(quiz, inherited)
        return round_robin(unused if len(unused) else quiz, n_held_out)

    if isinstance(profile, ProfilePart):
        held_out = judged_on(profiled_quiz(profile, is_held_out=True))
        return Questions(profiled, profiled, held_out, inherited)
    tuning = profiled
    if is_fitting and profiled.split == "test":
        tuning = sources.other_split(profiled, "val", profiled) or profiled
    for split in (s for s in sources.JUDGING if s not in (profiled.split, tuning.split)):
        if (other := sources.other_split(profiled, split, profiled, tuning)) is not None:
            return Questions(profiled, tuning, judged_on(other), inherited)
    if tuning is profiled or not profile.holds_out:
        return Questions(profiled, tuning, replace_questions(profiled, ()), inherited)
    held_out = judged_on(sources.fifth_of(tuning))
    kept = without(tuning, sources.hash_lines(held_out))
    if not len(held_out) or not len(kept):
        raise QuizError(
            f"{profiled.id} has too few questions to hold any out: it has {len(tuning)} in split "
            f"{tuning.split}: add some, or fit on all of them with --held-out 0"
        )
    return Questions(profiled, kept, held_out, inherited)


def _texts_for(profile: TextProfile, inherited: frozenset[str], n_held_out: int) -> Questions:
    """Documents that choose, and of those held out as many as make 256 rows or 65,536 tokens."""
    chosen = profiled_on(profile)
    if not isinstance(profile, TextPart):
        return Questions(chosen, chosen, profiled_corpus(profile).only(()), inherited)
    held_out = _text_part(profile, is_held_out=True)
    unused = held_out.without(hashes_in(inherited))
    judged_on = (unused if len(unused) else held_out).first(n_held_out)
    return Questions(chosen, chosen, judged_on, inherited)


def draft_plan(profile: Profile, draft: EditPlan, questions: Questions) -> PlanFile:
    """The plan with its provenance, without held-out results."""
    chosen = questions.tuning if draft.is_tuned else questions.profiled
    fitted = questions.tuning if draft.is_fitting else None
    rules = LAYOUTS[draft.layout]
    is_merging = any(edit.merged for edit in draft.edits.values())
    # A rule keeps the constants of layout exact.
    rows_layout = "exact" if draft.numbers.constant else draft.layout
    model = plans.plan_model(profile.info.model)
    if (folder := plans.model_folder(profile)) is not None:
        model = model.model_copy(update={"id": absolute_id(str(folder), None)})
    return PlanFile(
        model=model,
        action=draft.action,
        criterion=draft.criterion,
        positions=draft.positions,
        removal="merge" if is_merging else LAYOUTS[rows_layout].removal,
        layout=draft.layout,
        removed=draft.removed if "removed" in rules.options else None,
        fold=draft.fold if "fold" in rules.options and not is_merging else None,
        apply_at=draft.apply_at if draft.is_biased else None,
        routing=plans.PlanRouting.of(draft.routing) if draft.routing else None,
        compression=draft.compression,
        chosen_on=ChosenOn(
            quiz=chosen.id,
            split=chosen.split,
            questions=len(chosen),
            text_tokens=chosen.n_tokens if isinstance(chosen, Corpus) else None,
            fitted_split=fitted.split if fitted else None,
            fitted_questions=len(fitted) if fitted else 0,
            sha256=plans.hashes_sha256(used_hashes(draft, questions)),
        ),
        blend=draft.blend,
        balance=draft.balance,
        tuning=draft.tuning,
        blocks={
            name: draft.numbers.named(name, edit, rows_layout) for name, edit in draft.edits.items()
        },
    )


def used_hashes(draft: EditPlan, questions: Questions) -> frozenset[str]:
    """Hash lines of every question that this choice, its fit or an earlier edit read."""
    tuning = hash_lines(questions.tuning) if draft.asks_tuning else frozenset()
    chosen = tuning if draft.is_tuned else hash_lines(questions.profiled) | tuning
    return chosen | questions.inherited


def profiled_on(profile: Profile) -> CalibrationSet:
    """The questions or documents of a profile that choose."""
    if not isinstance(profile, TextProfile):
        return profiled_quiz(profile)
    if isinstance(profile, TextPart):
        return _text_part(profile, is_held_out=False)
    return profiled_corpus(profile)


def _text_part(profile: TextPart, *, is_held_out: bool) -> Corpus:
    corpus = profiled_corpus(profile)
    if not profile.is_halved:
        return corpus.part(is_held_out=is_held_out)
    places = (place for source in corpus.sources for place in range(len(source.documents)))
    return corpus.only([i for i, place in enumerate(places) if place % 2 == is_held_out])


def traced_profile(trace: Trace) -> Profile:
    """What a trace read, as a profile of its first half that holds out the second.

    It knows model, settings and questions or documents, and no statistics.
    """
    if isinstance(trace.info, RoutesTraceInfo):
        raise ProfileError(
            f"{trace.path} was made of routes, whose questions or texts are not known: trace a "
            "quiz or texts"
        )
    whole = profile_of(trace.path, trace.info)
    if isinstance(whole, TextProfile):
        part = TextPart(whole)
        part.is_halved = True
        return part
    quiz = profiled_quiz(whole)
    return ProfilePart(whole, [(q.subject, q.row) for q in [*quiz][1::2]])


@once_per_profile
def profiled_corpus(profile: Profile) -> Corpus:
    """The texts of a profile, read again; ProfileError if they changed."""
    assert isinstance(profile, TextProfile), "a quiz has questions"
    from expertcut.models.load import find_source, load_tokenizer  # torch
    from expertcut.profiling.given_routes import routes_corpus

    text, recorded, folder = profile.info.text, profile.info.model, plans.model_folder(profile)
    place = recorded.id if folder is None else str(folder)
    source = find_source(place, recorded.revision, recorded.read_contract())
    sources = text.sources.values()
    selection = TextSelection(
        specs=tuple(f"{source.spec}={source.weight}" for source in sources),
        revisions={source.spec: source.revision for source in sources},
        is_bound=isinstance(profile.info, TextTraceInfo),
        **text.model_dump(include={"max_tokens", "tokens", "seed", "assistant_only"}),
    )
    tokenizer = load_tokenizer(source, trust_remote_code=profile.trust_remote_code)
    if profile.info.settings.stats == "routes":
        return routes_corpus(profile, tokenizer)
    corpus = load_corpus(selection, tokenizer)
    for own, known in zip(corpus.sources, sources, strict=True):
        if rows_hash(corpus.rows[own.name]) != known.content_hash:
            raise ProfileError(
                f"{own.spec} no longer holds the texts that {profile.path} was made on: put them "
                "back, or profile again"
            )
    return corpus


def profiled_quiz(profile: Profile, *, is_held_out: bool = False) -> Quiz:
    """The quiz of a profile without its held-out questions, or these alone.

    Raises ProfileError: the profile is of texts.
    """
    if isinstance(profile, TextProfile):
        raise ProfileError(
            f"{profile.path} is a profile of texts, which have no answers: profile a quiz for this"
        )
    if not isinstance(profile, ProfilePart):
        return _whole_quiz(profile)
    quiz, held = _whole_quiz(profile.whole), profile.held_out
    own = [q for q in quiz if ((q.subject, q.row) in held) == is_held_out]
    return replace_questions(quiz, own)


@once_per_profile
def _whole_quiz(profile: Profile) -> Quiz:
    info = profile.info.quiz
    which = (info.id, info.split, info.shots, tuple(info.subjects), info.limit, info.revision)
    try:
        quiz = load_quiz(Selection(*which, profile.truncate))
    except QuizError as error:
        places = (p for p in profile.path.resolve().parents if os.path.exists(p / info.id))  # noqa: PTH110
        how = f": run this in {place}, where it is" if (place := next(places, None)) else ""
        raise QuizError(f"the quiz that {profile.path} was made on: {error}{how}") from None
    if isinstance(info, TracedQuiz):  # the first questions of each subject, up to its tokens
        n_by_subject = {name: own.questions for name, own in info.subjects.items()}
        taken = [q for s, own in quiz.questions.items() for q in own[: n_by_subject[s]]]
        quiz = replace_questions(quiz, taken)
    if quiz_info(quiz, info.limit).subjects != info.subjects:
        raise ProfileError(
            f"{info.id} is no longer the quiz that {profile.path} asked: its questions changed"
        )
    return quiz
