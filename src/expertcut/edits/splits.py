"""Which questions choose an edit, which judge it, and whether these had been used before."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertcut.data import Quiz, Selection, load_quiz, round_robin, without
from expertcut.data.held_out import (
    HELD_OUT_SHARE,
    JUDGING,
    fifth_of,
    hash_lines,
    is_held_out,
    is_one_set,
    other_split,
)
from expertcut.data.questions import group_by_subject, hashes_in, replace_questions
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import (
    PLAN_FILE,
    ChosenOn,
    EditPlan,
    ExpertIds,
    PlanFile,
    PlanModel,
    hashes_sha256,
    inherited_hashes,
    load_hashes,
    model_folder,
    plan_model,
)
from expertcut.errors import PlanError, ProfileError, QuizError, SettingsError
from expertcut.models.checkpoint_dir import absolute_id
from expertcut.profiling.schema import quiz_info
from expertcut.profiling.storage import Profile, ProfilePart, can_hold_out

HASHES, USED, SPLIT = "held_out_hashes", "held_out_used", "held_out_split"
UNUSED = "were not used"
HELD_OUT = 256
hashes = hash_lines


@dataclass(frozen=True)
class Judged:
    """Questions of a split that judged; `used` of them had a part in the edit, None is not known.

    `how` says in words how used ones were used, where that was recorded.
    """

    split: str
    questions: int
    used: int | None
    how: str = ""

    @property
    def title(self) -> str:
        """A heading: they are held out only where none of them was used."""
        if self.used == 0:
            return f"Held-out questions ({self.split})"
        if self.how:
            return f"Questions that {self.how} ({self.split})"
        if self.used is None:
            return f"Questions that were asked ({self.split})"
        return (
            f"Questions ({self.split}), {self.used:,} of {self.questions:,} used to choose or fit"
        )

    @property
    def noun(self) -> str:
        """The questions within a sentence."""
        return "held-out questions" if self.used == 0 else "the questions that were asked"

    @property
    def clause(self) -> str:
        """The questions, and how they were used."""
        if self.used == 0:
            return f"{self.split} questions that were not used to choose or fit anything"
        if self.how:
            return f"{self.split} questions that {self.how}"
        if self.used is None:
            return f"{self.split} questions, of which it is not recorded whether they were used"
        which = f"{self.questions:,} {self.split} questions"
        return f"{which}, {self.used:,} of them used to choose or fit"


def judged_by(lines: Iterable[str], used: Iterable[str], split: str, how: str = "") -> Judged:
    """Of hash lines of questions that judge, those that are among the used ones."""
    judges, known = tuple(lines), hashes_in(used)
    n_used = sum(not known.isdisjoint(line.split()) for line in judges)
    return Judged(split, len(judges), n_used, how)


def read_judged(plan: PlanFile, folder: Path) -> Judged:
    """What a plan says of the questions that judged it, held against its list of used questions.

    Nothing is known of plans from before the hashes were recorded, or without their list.

    Raises:
        PlanError: what is recorded is of another form.
    """
    proof: dict[str, Any] = plan.proof
    lines, how, split = proof.get(HASHES), proof.get(USED, ""), str(proof.get(SPLIT, ""))
    is_of_hashes = isinstance(lines, list) and all(isinstance(line, str) for line in lines)
    if not isinstance(how, str) or not (lines is None or is_of_hashes):
        raise PlanError(f"{PLAN_FILE}: proof.{HASHES} must be a list of hashes, {USED} a text")
    how = "" if how == UNUSED else how
    if not lines:
        return Judged(split, 0, None, how)
    try:
        used = load_hashes(folder, plan)
    except PlanError:
        return Judged(split, len(lines), None, how)
    return judged_by(lines, used, split, how)


@dataclass(frozen=True)
class Questions:
    """`profiled` chose the experts, `tuning` fits what needs fitting, `held_out` judges.

    `held_out` is empty where nothing can judge. `inherited` are hash lines of what the profiled
    checkpoint was itself chosen on, and of what else was looked at.
    """

    profiled: Quiz
    tuning: Quiz
    held_out: Quiz
    inherited: frozenset[str] = frozenset()

    @property
    def why_unjudged(self) -> str:
        """Why `held_out` is empty, in words; empty where it is not."""
        if len(self.held_out):
            return ""
        quiz, n = self.tuning, len(self.tuning)
        return f"nothing judges it: all {n:,} {quiz.split} questions of {quiz.id} had a part in it"


@dataclass(frozen=True)
class Choosing:
    """The profile that chooses: all of it, or the part that is not held out; and what to say."""

    profile: Profile
    notes: tuple[str, ...] = ()


def choosing_profile(profile: Profile, held_out: float | None = None) -> Choosing:
    """What may choose: four fifths of a quiz that has one set of questions, else all.

    The last fifth judges. With `held_out` 0 all choose, and what fits is not split either: then
    only another split judges.

    Raises:
        ProfileError: the profile is unfinished or damaged, or the quiz changed since.
        QuizError: too few questions to hold any out.
        SettingsError: another share than 0 and a fifth.
    """
    if held_out not in (None, 0, HELD_OUT_SHARE):
        raise SettingsError(
            f"--held-out {held_out:g}: a profile keeps its sums apart for a fifth of the questions "
            f"alone: give {HELD_OUT_SHARE:g}, which is the default, or 0 to choose on all of them"
        )
    if held_out == 0:
        whole = Profile(profile.path, profile.info, profile.truncate)
        whole.holds_out = False
        return Choosing(whole)
    quiz = profiled_quiz(profile)
    if not is_one_set(quiz):
        return Choosing(profile)
    held = [question for question in quiz if is_held_out(question)]
    if not 0 < len(held) < len(quiz):
        raise QuizError(
            f"{quiz.id} has too few questions to hold any out: it has {len(quiz)}: add some, or "
            "choose on all of them with --held-out 0"
        )
    if not can_hold_out(profile, quiz):
        note = (
            f"{profile.path} does not keep the sums of a fifth of its questions apart, so all of "
            "them choose and nothing judges: profile again to hold a fifth out"
        )
        return Choosing(profile, (note,))
    note = (
        f"{quiz.id} has one set of questions: {len(quiz) - len(held):,} of them choose, the other "
        f"{len(held):,} are held out"
    )
    return Choosing(ProfilePart(profile, {(q.subject, q.row) for q in held}), (note,))


def questions_for(
    profile: Profile,
    *,
    is_fitting: bool,
    used: frozenset[str] = frozenset(),
    n_held_out: int = HELD_OUT,
) -> Questions:
    """The questions of a command that works from a profile.

    Tuning questions are the profile's, or `val` where the profile is of `test`; what repeats a
    question of the other set is dropped. Held-out questions are 256 (`n_held_out`), round-robin
    over subjects: what a part of a profile leaves out, else of a split that was not used, else a
    fifth of tuning questions of another split than the profile's, which then leave those. There
    are none where a whole profile is of the only split. Where there is a choice, none of them had
    a part in an earlier cut.
    `used` are hash lines of what was looked at besides.

    Raises:
        ProfileError: the quiz is not the one that was profiled.
        QuizError: more than 5 % of the tuning questions stand in the profiled split.
    """
    profiled, inherited = profiled_quiz(profile), inherited_hashes(profile) | used
    if isinstance(profile, ProfilePart):
        judges = _unused(held_out_quiz(profile), inherited)
        return Questions(profiled, profiled, round_robin(judges, n_held_out), inherited)
    tuning = profiled
    if is_fitting and profiled.split == "test":
        tuning = other_split(profiled, "val", profiled) or profiled
    asked = {profiled.split, tuning.split}
    for split in (s for s in JUDGING if s not in asked):
        other = other_split(profiled, split, profiled, tuning)
        if other is not None:
            judges = _unused(other, inherited)
            return Questions(profiled, tuning, round_robin(judges, n_held_out), inherited)
    if tuning is profiled or not profile.holds_out:
        return Questions(profiled, tuning, replace_questions(profiled, {}), inherited)
    held_out = round_robin(_unused(fifth_of(tuning), inherited), n_held_out)
    kept = without(tuning, hashes(held_out))
    if not len(held_out) or not len(kept):
        raise QuizError(
            f"{profiled.id} has too few questions to hold any out: it has {len(tuning)} in split "
            f"{tuning.split}: add some, or fit on all of them with --held-out 0"
        )
    return Questions(profiled, kept, held_out, inherited)


def _unused(quiz: Quiz, used: frozenset[str]) -> Quiz:
    """Its questions that are not among the used ones; all of them where each is."""
    unused = without(quiz, used)
    return unused if len(unused) else quiz


def judges_or_fifth(questions: Questions, n: int) -> Quiz:
    """The held-out questions, else a fifth of the tuning questions, to measure what they judge."""
    if len(questions.held_out):
        return questions.held_out
    return round_robin(fifth_of(questions.tuning), n)


def n_used(quiz: Quiz, lines: frozenset[str]) -> int:
    """How many of its questions are among the used ones, by either hash."""
    known = hashes_in(lines)
    return sum(question.is_among(known) for question in quiz)


def draft_plan(profile: Profile, draft: EditPlan, questions: Questions) -> PlanFile:
    """The plan with its provenance, still without proof."""
    chosen = questions.tuning if draft.is_tuned else questions.profiled
    fitted = questions.tuning if draft.is_fitting or draft.is_calibrated else None
    numbers, rules = draft.numbers or ExpertIds(), LAYOUTS[draft.layout]
    return PlanFile(
        model=_plan_model(profile),
        action=draft.action,
        criterion=draft.criterion,
        positions=draft.positions,
        removal="merge" if draft.is_merging else rules.removal,
        layout=draft.layout,
        removed=draft.removed if "removed" in rules.options else None,
        fold=draft.fold if "fold" in rules.options and not draft.is_merging else None,
        apply_at=draft.apply_at if draft.is_biased else None,
        chosen_on=ChosenOn(
            quiz=chosen.id,
            split=chosen.split,
            questions=len(chosen),
            fitted_split=fitted.split if fitted else None,
            fitted_questions=len(fitted) if fitted else 0,
            sha256=hashes_sha256(used_hashes(draft, questions)),
        ),
        tuning=draft.tuning,
        blocks={name: numbers.named(name, edit) for name, edit in draft.edits.items()},
    )


def _plan_model(profile: Profile) -> PlanModel:
    """The profiled model, a folder by its whole path."""
    named, folder = plan_model(profile.info.model), model_folder(profile)
    if folder is None:
        return named
    return named.model_copy(update={"id": absolute_id(str(folder), None)})


def used_hashes(draft: EditPlan, questions: Questions) -> frozenset[str]:
    """Hash lines of every question that this choice, its fit or an earlier one looked at."""
    tuning = hashes(questions.tuning) if draft.asks_tuning else frozenset()
    chosen = tuning if draft.is_tuned else hashes(questions.profiled) | tuning
    return chosen | questions.inherited


def profiled_quiz(profile: Profile) -> Quiz:
    """The quiz that a profile asked, without what is held out of it.

    Raises:
        ProfileError: its questions changed since.
    """
    quiz = _asked_quiz(profile)
    if not isinstance(profile, ProfilePart):
        return quiz
    left = [q for q in quiz if (q.subject, q.row) not in profile.held_out]
    return replace_questions(quiz, group_by_subject(left))


def held_out_quiz(part: ProfilePart) -> Quiz:
    """The questions that are held out of a profile."""
    quiz = _asked_quiz(part)
    held = [q for q in quiz if (q.subject, q.row) in part.held_out]
    return replace_questions(quiz, group_by_subject(held))


def _asked_quiz(profile: Profile) -> Quiz:
    info = profile.info.quiz
    which = (info.id, info.split, info.shots, tuple(info.subjects), info.limit, info.revision)
    selection = Selection(*which, profile.truncate)
    quiz = load_quiz(selection)
    if quiz_info(quiz, info.limit).subjects != info.subjects:
        raise ProfileError(
            f"{info.id} is no longer the quiz that {profile.path} asked: its questions changed"
        )
    return quiz
