"""Which questions a command may look at: those to choose and fit on, and those held out."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from expertcut.errors import ProfileError, QuizError
from expertcut.interventions.lineage import Numbers, inherited_hashes
from expertcut.interventions.plan import ChosenOn, Draft, Plan, hashes_sha256, plan_model
from expertcut.profiling.info import quiz_info
from expertcut.profiling.store import Profile
from expertcut.quiz import Question, Quiz, Selection, load_quiz, round_robin, without
from expertcut.quiz.questions import group_by_subject, replace_questions

logger = logging.getLogger(__name__)

HELD_OUT = 256
_ONE_IN = 5  # of the tuning questions, where no unused split is left
_MOST_OVERLAP = 0.05


@dataclass(frozen=True)
class Questions:
    """`profiled` chose the experts, `tuning` fits what needs fitting, `held_out` judges.

    `inherited` are content hashes of what the profiled checkpoint was itself chosen on, and of what
    else was looked at.
    """

    profiled: Quiz
    tuning: Quiz
    held_out: Quiz
    inherited: frozenset[str] = frozenset()


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
    over subjects, of a split that was not used, else a fifth of the tuning questions, which then
    leave those.
    `used` are content hashes of what was looked at besides.

    Raises:
        ProfileError: the quiz is not the one that was profiled.
        QuizError: more than 5 % of the tuning questions stand in the profiled split.
    """
    profiled, inherited = profiled_quiz(profile), inherited_hashes(profile) | used
    tuning = profiled
    if is_fitting and profiled.split == "test":
        tuning = _other_split(profiled, "val", profiled) or profiled
    asked = {profiled.split, tuning.split}
    for split in (s for s in ("val", "test") if s not in asked):
        other = _other_split(profiled, split, profiled, tuning)
        if other is not None:
            other = without(other, inherited) if len(without(other, inherited)) else other
            return Questions(profiled, tuning, round_robin(other, n_held_out), inherited)
    fifth = [q for q in tuning if int(q.content_hash, 16) % _ONE_IN == 0]
    held_out = round_robin(replace_questions(tuning, group_by_subject(fifth)), n_held_out)
    kept = without(tuning, hashes(held_out))
    if not len(held_out) or not len(kept):
        raise QuizError(
            f"{profiled.id} has too few questions to hold any out: it has {len(tuning)}"
        )
    return Questions(profiled, kept, held_out, inherited)


def draft_plan(profile: Profile, draft: Draft, questions: Questions) -> Plan:
    """The plan with its provenance, still without proof."""
    chosen = questions.tuning if draft.is_tuned else questions.profiled
    fitted = questions.tuning if draft.is_fitting or draft.is_calibrated else None
    numbers = draft.numbers or Numbers()
    return Plan(
        model=plan_model(profile.info.model),
        action=draft.action,
        criterion=draft.criterion,
        positions=draft.positions,
        removal=_removal(draft),
        layout=draft.layout,
        removed=draft.removed if draft.layout == "exact" else None,
        fold=draft.fold if draft.layout == "stock" and not draft.is_merging else None,
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


def _removal(draft: Draft) -> Literal["reroute", "constant", "merge"]:
    if draft.is_merging:
        return "merge"
    return "reroute" if draft.layout == "stock" else "constant"


def used_hashes(draft: Draft, questions: Questions) -> frozenset[str]:
    """Content hashes of every question that this choice, its fit or an earlier one looked at."""
    tuning = hashes(questions.tuning) if draft.asks_tuning else frozenset()
    chosen = tuning if draft.is_tuned else hashes(questions.profiled) | tuning
    return chosen | questions.inherited


def hashes(quiz: Quiz) -> frozenset[str]:
    """Content hashes of all questions of a quiz."""
    return frozenset(q.content_hash for q in quiz)


def profiled_quiz(profile: Profile) -> Quiz:
    """The quiz that a profile asked.

    Raises:
        ProfileError: its questions changed since.
    """
    info = profile.info.quiz
    which = (info.id, info.split, info.shots, tuple(info.subjects), info.limit, info.revision)
    selection = Selection(*which, profile.truncate)
    quiz = load_quiz(selection)
    if quiz_info(quiz, info.limit).subjects != info.subjects:
        raise ProfileError(
            f"{info.id} is no longer the quiz that {profile.path} asked: its questions changed"
        )
    return quiz


def _other_split(profiled: Quiz, split: str, *used: Quiz) -> Quiz | None:
    """The same subjects' questions of another split, less those that stand in a used one."""
    if Path(profiled.id).is_file():
        return None  # one file is whichever split is asked for
    selection = Selection(
        *(profiled.id, split, profiled.shots),
        revision=profiled.revision,
        truncate=profiled.truncate,
    )
    try:
        other = load_quiz(selection)
    except QuizError as error:
        logger.warning("split %s is not used to judge: %s", split, error)
        return None
    same: dict[str, tuple[Question, ...]] = {
        s: qs for s, qs in other.questions.items() if s in profiled.questions
    }
    other = replace_questions(other, same)
    seen = frozenset[str]().union(*map(hashes, used))
    repeated = [q for q in other if q.content_hash in seen]
    if len(repeated) == len(other):
        return None
    if repeated:
        logger.warning(
            "%d of %d %s questions stand in %s too and are left out, first %s:%d",
            *(len(repeated), len(other), split, " and ".join(sorted({q.split for q in used}))),
            *(repeated[0].subject, repeated[0].row),
        )
    if len(repeated) > _MOST_OVERLAP * len(other):
        raise QuizError(
            f"{len(repeated)} of {len(other)} {split} questions of {other.id} stand in "
            f"{used[0].split} too, at most 5 % may: they cannot judge anything"
        )
    return without(other, seen)
