"""Ops and their implementations: a reference that specifies the op, and others that say what they can serve.

An implementation refuses a call by returning the reason as text; the next one is tried. The reference refuses nothing, so a
call always ends somewhere, and `explain` says where and why.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

_OPS: dict[str, "Op"] = {}


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op. ``refuses(*args, **kwargs)`` gives the reason why it cannot serve a call, or None."""

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]


class Op:
    """A named operation with an ordered list of implementations, fastest first, the reference last."""

    def __init__(self, name: str, reference: Callable[..., Any]):
        self.name = name
        self.reference = reference
        self._implementations = [Implementation("xla", reference, lambda *args, **kwargs: None)]
        self.__doc__ = reference.__doc__
        _OPS[name] = self

    def register(self, implementation: Implementation) -> None:
        """Puts an implementation before those already there."""
        if implementation.name in self.names:
            raise ValueError(f"{self.name} already has an implementation named {implementation.name!r}")
        self._implementations.insert(0, implementation)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(implementation.name for implementation in self._implementations)

    def choose(
        self, *args: Any, implementation: str | None = None, **kwargs: Any
    ) -> tuple[Implementation, dict[str, str]]:
        """The implementation that serves a call, and the reasons of those that refused before it.

        Raises:
          ValueError: an implementation asked for by name is unknown, or refuses.
        """
        if implementation is not None and implementation not in self.names:
            raise ValueError(f"{self.name} has no implementation {implementation!r}; it has {', '.join(self.names)}")
        refusals: dict[str, str] = {}
        for candidate in self._implementations:
            if implementation not in (None, candidate.name):
                continue
            reason = candidate.refuses(*args, **kwargs)
            if reason is None:
                return candidate, refusals
            refusals[candidate.name] = reason
        raise ValueError(f"{self.name}: {implementation} refuses: {refusals[implementation or '']}")

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        chosen, _ = self.choose(*args, implementation=implementation, **kwargs)
        return chosen.run(*args, **kwargs)


def ops() -> dict[str, Op]:
    """Every registered op by name."""
    return dict(_OPS)
