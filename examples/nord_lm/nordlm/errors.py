"""Errors that a user can correct. The scripts print the message, one sentence, and exit."""

__all__ = [
    "CheckpointError",
    "DataError",
    "DivergedError",
    "ModelError",
    "PlasticityError",
    "RecipeError",
    "SettingsError",
]


class RecipeError(Exception):
    """Base class of these errors. "Recipe" is this example, the language model.

    Attributes:
        shared: whether all processes of a run raise this error; then only the first one prints it.
    """

    shared = False


class CheckpointError(RecipeError, RuntimeError):
    """A checkpoint could not be written or is not valid; the message has the reason and says which files are intact."""


class DataError(RecipeError, ValueError):
    """The text cannot be used; the message says what was expected."""


class DivergedError(RecipeError, FloatingPointError):
    """A loss or a weight is NaN or infinite; the message says at which training step."""


class ModelError(RecipeError, ValueError):
    """There is no usable model; the message says what was expected."""


class PlasticityError(RecipeError, ValueError):
    """The requested synapses cannot learn; the message lists those that can."""


class SettingsError(RecipeError, ValueError):
    """The settings cannot be used; the message says what was expected."""
