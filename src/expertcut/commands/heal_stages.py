"""The stage that heals another variant."""

from pathlib import Path

from expertcut.commands.ui import Job
from expertcut.data.sources import Weighted
from expertcut.healing.adapters import Lora
from expertcut.healing.recovery import Options
from expertcut.healing.recovery import heal as train
from expertcut.healing.heal_settings import Data, Healing, Place, Training
from expertcut.recipes.recipe_schema import HealSection, Recipe
from expertcut.recipes.stages import variant_folder
from expertcut.reporting.edit_tables import healing_sentences, healing_tables


def heal(job: Job) -> None:
    """Trains the variant's checkpoint, or goes on where an earlier try was stopped."""
    asked = next(v.heal for v in job.recipe.variants if v.name == job.stage.name)
    assert asked is not None
    place = Place(job.run / variant_folder(job.stage.name), is_forced=True)
    with job.audience.parts("healing") as report:
        options = Options(
            job.load_as(), job.recipe.threads, asked.verify, report,
            tell=lambda sentence: job.audience.say([], [sentence]), beside=job.beside,
        )  # fmt: skip
        checkpoint = str(job.run / variant_folder(asked.of))
        healed = train(checkpoint, _healing(job.recipe, asked), place, options)
    assert healed is not None  # a recipe runs in one process
    sentences = [*healing_sentences(healed), f"written to {place.folder}"]
    job.audience.say(healing_tables(healed), sentences)


def _healing(recipe: Recipe, asked: HealSection) -> Healing:
    quizzes = tuple(map(Weighted.read, asked.quiz))
    if not asked.quiz and not asked.text:
        quizzes = (Weighted(recipe.quiz, revision=recipe.quiz_revision),)
    scored = asked.scored(recipe.quiz, recipe.eval.split if recipe.eval else None)
    subjects = tuple(asked.subjects or ([] if asked.quiz else recipe.subjects))
    shots = recipe.shots if asked.shots is None else asked.shots
    data = Data(
        quizzes,
        *(asked.split, shots, subjects, asked.limit),
        tuple(map(Weighted.read, asked.text)),
        *(*scored, asked.max_tokens, asked.shuffle),
        None if asked.eval_quiz else recipe.quiz_revision,
        recipe.truncate,
    )
    training = Training(
        steps=asked.steps,
        learning_rate=asked.learning_rate,
        answer_weight=asked.answer_weight,
        batch=asked.batch,
        micro_batch=asked.micro_batch,
        balance=asked.balance,
        check_every=asked.check_every,
        patience=asked.patience,
        seed=asked.seed,
        saves_memory=asked.save_memory,
    )
    cache = None if asked.teacher_cache is None else Path(asked.teacher_cache)
    lora = Lora(asked.rank, asked.alpha or asked.rank, tuple(asked.targets), asked.seed)
    kind = (asked.objective, asked.teacher, asked.likeliest, cache)
    return Healing(data, *kind, lora=lora, training=training)
