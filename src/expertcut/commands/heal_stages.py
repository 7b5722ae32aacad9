"""The stage that heals another variant."""

from expertcut.commands.ui import Job
from expertcut.healing.heal_settings import HealSettings
from expertcut.healing.recovery import Options
from expertcut.healing.recovery import heal as recover
from expertcut.recipes.recipe_schema import HealSection, Recipe
from expertcut.recipes.stages import variant_folder
from expertcut.reporting.edit_tables import healing_sentences, healing_tables


def heal(job: Job) -> None:
    """Trains the variant's checkpoint, or goes on where an earlier try was stopped."""
    section = next(v.heal for v in job.recipe.variants if v.name == job.stage.name)
    assert section is not None
    out = job.run / variant_folder(job.stage.name)
    with job.audience.parts("healing") as report:
        options = Options(
            job.load_as(), job.recipe.threads, is_forced=True, report=report,
            tell=lambda sentence: job.audience.say([], [sentence]), beside=job.beside,
        )  # fmt: skip
        checkpoint = str(job.run / variant_folder(section.of))
        healed = recover(checkpoint, heal_settings(job.recipe, section), out, options)
    assert healed is not None  # a recipe runs in one process
    sentences = [*healing_sentences(healed), f"written to {out}"]
    job.audience.say(healing_tables(healed), sentences)


def heal_settings(recipe: Recipe, section: HealSection) -> HealSettings:
    """The section's settings; what it leaves out is the recipe's."""
    given = section.model_dump(exclude={"of"})
    is_own = bool(section.quiz)
    if not section.quiz and not section.text:
        given |= {"quiz": f"{recipe.quiz}=1", "quiz_revision": recipe.quiz_revision}
    eval_quiz, split = section.scored(recipe.quiz, recipe.eval.split if recipe.eval else None)
    given |= {
        "shots": recipe.shots if section.shots is None else section.shots,
        "subjects": section.subjects or ([] if is_own else recipe.subjects),
        "eval_quiz": eval_quiz,
        "eval_split": split,
        "eval_revision": None if section.eval_quiz else recipe.quiz_revision,
        "truncate": recipe.truncate,
    }
    return HealSettings(**given)
