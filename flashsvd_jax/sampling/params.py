"""What a user asks of one completion, with the names that vLLM and OpenAI use."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

from flashsvd_jax.errors import RequestError

MAX_STOP_IDS = 16
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100.0
# Below this, sampling is greedy: logits divided by it would leave float32's range.
MIN_TEMPERATURE = 1e-5


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Options of one completion.

    Attributes:
      temperature: 0 (or less than 1e-5) takes the most likely token; above, probabilities are flattened by it.
      top_k: only the k most likely tokens (ties with the last one included); 0 or -1 for all.
      top_p: only the most likely tokens whose probabilities together reach this.
      min_p: only tokens at least this likely relative to the most likely one.
      repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output; 1 for none.
      presence_penalty: subtracted from logits of tokens in the output.
      frequency_penalty: subtracted once for every time a token is in the output.
      seed: the same seed gives the same text whatever is computed beside it, but for rounding at other batch sizes; None draws one.
      max_tokens: at most so many tokens; None for as many as the cache holds.
      stop: texts that end the completion; they are not part of it.
      stop_token_ids: further tokens that end it, besides the model's own end tokens.
      ignore_eos: go on past the model's own end tokens.
      logprobs: also give log-probabilities, before any of the options above: of the chosen token and of this many best ones.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 256
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            found = tuple(map(_plain, value)) if isinstance(value, list | tuple) else _plain(value)
            object.__setattr__(self, field.name, found)
        checks = {
            "temperature": (_in_range(self.temperature, 0, MAX_TEMPERATURE), f"a number from 0 to {MAX_TEMPERATURE:g}"),
            "top_k": (_is_int(self.top_k) and self.top_k >= -1, "a whole number of at least -1"),
            "top_p": (_in_range(self.top_p, 0, 1) and self.top_p > 0, "above 0 and at most 1"),
            "min_p": (_in_range(self.min_p, 0, 1), "from 0 to 1"),
            "repetition_penalty": (_in_range(self.repetition_penalty, 0.01, 100), "from 0.01 to 100"),
            "presence_penalty": (_in_range(self.presence_penalty, -2, 2), "from -2 to 2"),
            "frequency_penalty": (_in_range(self.frequency_penalty, -2, 2), "from -2 to 2"),
            "seed": (
                self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**64),
                "from 0 to 2**64 - 1, or None",
            ),
            "max_tokens": (
                self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
                "at least 1, or None",
            ),
            "stop": (_all(self.stop, lambda s: isinstance(s, str) and s != ""), "a non-empty text or a list of them"),
            "stop_token_ids": (
                _all(self.stop_token_ids, lambda t: _is_int(t) and t >= 0),
                "a list of token ids of at least 0",
            ),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "True or False"),
            "logprobs": (
                self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
                f"from 0 to {MAX_LOGPROBS}, or None",
            ),
        }
        for name, (valid, allowed) in checks.items():
            if not valid:
                raise RequestError(f"{name} must be {allowed}, not {getattr(self, name)!r}")


def _plain(value: Any) -> Any:
    """Python's number for one of NumPy's, which is compiled for by its type; anything else as it is."""
    if isinstance(value, bool | int | float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in_range(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _all(values: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(values, tuple) and all(map(valid, values))
