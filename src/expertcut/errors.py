"""Errors that a user can cause and can fix.

Exit status 2 and one line: what was found, why it is wrong, what to do. Any other
exception is a bug: exit status 1, with a traceback.
"""


class ExpertcutError(Exception):
    """Base of all errors below; its message is one line."""


class QuizError(ExpertcutError):
    """A quiz, a split or a row cannot be used."""


class SplitError(QuizError):
    """A quiz has no questions in the requested split."""


class TextError(ExpertcutError):
    """A text, a chat or a file of them cannot be used."""


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
