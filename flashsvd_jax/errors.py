"""Every error a user can meet, so that one `except FlashSVDError` catches what this package has to say."""


class FlashSVDError(Exception):
    """Base of all errors raised on purpose; the message names what is wrong and what to do."""


class ConfigError(FlashSVDError):
    """A model configuration lacks a field, or has one that is not supported."""


class CheckpointError(FlashSVDError):
    """A checkpoint file is damaged, unreadable, or not what its name says."""


class ConversionError(FlashSVDError):
    """A checkpoint is readable, but its tensors do not form the model its configuration describes."""


class ModelNotFoundError(FlashSVDError):
    """No model at that path, and no such model can be had from the hub."""


class RequestError(FlashSVDError):
    """A generation request cannot be served as asked: an empty prompt, a prompt longer than the cache, a bad option."""


class MissingExtraError(FlashSVDError):
    """A feature needs an optional package; the message gives the command that installs it."""

    def __init__(self, feature: str, package: str, extra: str):
        super().__init__(f"{feature} needs {package}: install it with  pip install 'flashsvd-jax[{extra}]'")


def first_line(error: BaseException) -> str:
    """What another library's error says, cut to one line; its type where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class KernelError(FlashSVDError):
    """A kernel found that it cannot go on, and ended without a result."""
