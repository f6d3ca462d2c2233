"""JSON objects from files that somebody else may have written: every problem names the file and the field."""

import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from flashsvd_jax.errors import CheckpointError, FlashSVDError

_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def read_object(path: Path, error: type[FlashSVDError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in a file; raises ``error`` for a file that cannot be read or holds anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{path} cannot be read: {cause}") from cause
    return parse_object(text, str(path), error)


def parse_object(text: str, where: str, error: type[FlashSVDError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in a text; raises ``error``, naming ``where`` it came from, if it holds anything else."""
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where} is not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{where} must hold a JSON object, not {reprlib.repr(value)}")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`, as ``object_pairs_hook``: raises ValueError for a name that stands in an object twice, of which one would
    count and not be seen."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{reprlib.repr(twice)} stands in an object twice")
    return found


class Fields:
    """Takes the fields out of a JSON object one by one, each of its expected kind."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} must be an object, not {reprlib.repr(values)}")
        self._values = dict(values)
        self._where = where

    def take(self, name: str, kind: type) -> Any:
        """The value of a field that must be there; ``kind`` is str, int, list or dict."""
        if name not in self._values:
            raise CheckpointError(f"{self._where}: {name} is missing")
        value = self._values.pop(name)
        # JSON's true and false are integers to Python.
        if not isinstance(value, kind) or isinstance(value, bool):
            self.fail(name, f"must be {_KINDS[kind]}, not {reprlib.repr(value)}")
        return value

    def take_optional(self, name: str, kind: type, default: Any) -> Any:
        """The value of a field, or ``default`` where it is absent or null."""
        if self._values.get(name) is None:
            self._values.pop(name, None)
            return default
        return self.take(name, kind)

    def take_count(self, name: str) -> int:
        """The value of a field that must be a whole number, not negative."""
        value = self.take(name, int)
        if value < 0:
            self.fail(name, f"must not be negative, it is {value}")
        return value

    def end(self) -> None:
        """Raises CheckpointError if there are fields that nobody took."""
        if self._values:
            raise CheckpointError(f"{self._where}: unknown fields: {', '.join(sorted(self._values))}")

    def fail(self, name: str, problem: str) -> NoReturn:
        """Raises CheckpointError about a field."""
        raise CheckpointError(f"{self._where}: {name} {problem}")
