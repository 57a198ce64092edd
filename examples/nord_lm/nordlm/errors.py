"""What can be wrong with what a user gives: one sentence each, which the scripts print."""

__all__ = ["CheckpointError", "DataError", "ModelError", "PlasticityError", "RecipeError", "SettingsError"]


class RecipeError(Exception):
    """Base of all errors that the scripts turn into one sentence."""


class CheckpointError(RecipeError, RuntimeError):
    """A checkpoint could not be written or is not one; the message says why and what is still whole."""


class DataError(RecipeError, ValueError):
    """The text cannot be used as it is; the message says what was expected."""


class ModelError(RecipeError, ValueError):
    """There is no usable model; the message says what was expected."""


class PlasticityError(RecipeError, ValueError):
    """What was asked for cannot learn; the message says what can."""


class SettingsError(RecipeError, ValueError):
    """The settings cannot be used; the message says what was expected."""
