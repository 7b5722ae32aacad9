"""`expertcut heal`: train an edited checkpoint for a short while to recover accuracy."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from expertcut import commands
from expertcut.commands import SILENT, UI, argument, output_option
from expertcut.errors import SettingsError
from expertcut.healing import heal_settings
from expertcut.settings import FilePath, option

if TYPE_CHECKING:
    from expertcut.healing.recovery import Healed

_data_option = partial(option, panel=heal_settings.DATA, in_recipe=False)


class HealSettings(commands.JudgedSettings, commands.ModelSettings, heal_settings.HealSettings):
    """Train an edited checkpoint briefly to recover accuracy."""

    examples: ClassVar = (
        "expertcut heal models/half",
        "expertcut heal models/half --quiz my.jsonl=2 --quiz mmlu --steps 500",
        "expertcut heal models/half --text chats.jsonl --objective lm --adapter",
    )

    unedited: bool = _data_option(False, "Train a model that was not edited, too.")
    checkpoint: str = argument(..., "Checkpoint that prune, merge or reweight wrote.")
    quiz_revision: str | None = _data_option(None, "Revision of a quiz of the Hub.")
    eval_revision: str | None = _data_option(None, "Revision of --eval-quiz on the Hub.")
    out: FilePath | None = output_option(
        None, "Output folder; must be absent or empty.  [default: beside the checkpoint]"
    )
    force: bool = output_option(False, "Replace the output folder once the new one is complete.")


def run(
    settings: HealSettings, ui: UI = SILENT, extra_files: Mapping[str, bytes] | None = None
) -> "Healed | None":
    """Trains and writes the checkpoint; None in all but the first process."""
    ui.quiet()
    from expertcut.checkpoints.build import default_out
    from expertcut.edits.plan import plan_in
    from expertcut.healing.recovery import Options, heal, working_folder
    from expertcut.models.load import find_source
    from expertcut.reporting.edit_tables import healing_facts, healing_tables

    before = plan_in(find_source(settings.checkpoint).path)
    if before is None and not settings.unedited:
        raise SettingsError(
            f"{settings.checkpoint} was not edited: it has no plan.json: heal a checkpoint that "
            "prune, merge or reweight wrote, or add --unedited to train this one"
        )

    def tell(sentence: str) -> None:
        if ui.is_first:
            ui.say([], [sentence])

    out = settings.out or default_out(settings.checkpoint, "healed")
    with ui.parts("healing", working_folder(out)) as report:
        options = Options(
            settings.load_as(), settings.threads, settings.force, report, tell, extra_files or {}
        )
        healed = heal(settings.checkpoint, settings, out, options)
    if healed is not None:
        settings.say(ui, healing_tables(healed) if settings.wide else [])
        facts = healing_facts(healed, before, settings.checkpoint, settings.margin / 100)
        names = [settings.eval_quiz, *(quiz.name for quiz in settings.quizzes)]
        asked = (settings.checkpoint, out, next(filter(None, names), ""), settings.n_shots, None)
        words = commands.eval_words(*asked)
        if settings.texts and not settings.quizzes:  # without a quiz to ask
            words = ["eval", settings.checkpoint, str(out), "--text", "NEW.jsonl"]
        following = [] if settings.adapter else [words]
        ui.end(facts, out, *following, ["show", str(out)])
    return healed
