"""Every error that a user can meet, and can mend.

    ExpertcutError            exit status 2, one line: what, found, do
    ├── QuizError             questions that cannot be read or asked
    │   └── SplitError        a split in which a quiz has none
    ├── ModelError            a folder or id that is not a loadable MoE checkpoint
    │   └── ContractError     a model whose experts cannot be told apart as this tool needs
    ├── ProfileError          a profile that is missing, unfinished, or of something else
    ├── PlanError             an edit that cannot be made
    ├── SettingsError         an option with an unusable value
    ├── OutputError           a place that must not be written to
    ├── HubError              the Hugging Face Hub, or the way to it, refused
    └── RecipeError           a recipe that cannot be read or does not hang together

Anything else that escapes is a fault of ours: exit status 1, with a traceback.
"""


class ExpertcutError(Exception):
    """Base of all errors below; its text is one line that says what, found and do."""


class QuizError(ExpertcutError):
    """A quiz, a split or a row of one cannot be used."""


class SplitError(QuizError):
    """A quiz has no questions in the split that is asked for."""


class ModelError(ExpertcutError):
    """A checkpoint cannot be found, loaded or trusted."""


class ContractError(ModelError):
    """A model breaks the MoE contract of `expertcut.models`."""


class ProfileError(ExpertcutError):
    """A profile is missing, unfinished, damaged, or of another model, quiz or setting."""


class PlanError(ExpertcutError):
    """A plan asks for what the model or its layout cannot do."""


class SettingsError(ExpertcutError):
    """An option or argument has a value that cannot be used."""


class OutputError(ExpertcutError):
    """An output folder or file is in the way."""


class HubError(ExpertcutError):
    """The Hub refused, or could not be reached."""


class RecipeError(ExpertcutError):
    """A recipe cannot be read, or says what no stage can do."""
