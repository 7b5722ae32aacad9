"""Errors that a user can cause and can fix.

    ExpertcutError            exit status 2, one line: what was found, why it is wrong, what to do
    ├── QuizError             questions that cannot be read or used
    │   └── SplitError        a split without questions
    ├── ModelError            a folder or id that is not a loadable MoE checkpoint
    │   └── ContractError     a model that breaks the MoE contract
    ├── ProfileError          a profile that is missing, unfinished or of another model or quiz
    ├── PlanError             an edit that the model or its layout cannot take
    ├── SettingsError         an option with an unusable value
    ├── OutputError           a folder or file that cannot be written
    ├── HubError              the Hugging Face Hub refused or could not be reached
    └── RecipeError           an invalid recipe

Any other exception is a bug: exit status 1, with a traceback.
"""


class ExpertcutError(Exception):
    """Base of all errors below; its message is one line."""


class QuizError(ExpertcutError):
    """A quiz, a split or a row cannot be used."""


class SplitError(QuizError):
    """A quiz has no questions in the requested split."""


class ModelError(ExpertcutError):
    """A checkpoint cannot be found, loaded or trusted."""


class ContractError(ModelError):
    """A model breaks the MoE contract of `expertcut.models`."""


class ProfileError(ExpertcutError):
    """A profile is missing, unfinished, damaged, or of another model, quiz or setting."""


class PlanError(ExpertcutError):
    """A plan does not fit the model or its layout."""


class SettingsError(ExpertcutError):
    """An option or argument has an invalid value."""


class OutputError(ExpertcutError):
    """An output folder or file exists already or cannot be written."""


class HubError(ExpertcutError):
    """The Hub refused, or could not be reached."""


class RecipeError(ExpertcutError):
    """A recipe is invalid."""
