"""Ops and their implementations: a reference that specifies the op, and others that say what they can serve.

An implementation refuses a call by returning the reason as text; the next one is tried. The reference refuses nothing, so a
call always ends somewhere; `Op.choose` says where and why, and `record` collects what ran. An op may span as much as its
reference does: one product, a layer, or all of them.
"""

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import jax

from pallas_kernels.target import Target, setting, target

_OPS: dict[str, "Op"] = {}
_PREFERRED: ContextVar[str | None] = ContextVar("preferred implementation", default=None)
_KINDS: ContextVar[int] = ContextVar("kinds of layers", default=1)
_RECORDS: ContextVar[tuple["Record", ...]] = ContextVar("records of choices", default=())

MOST_KINDS = 4
"""Of layers: as many as are worth compiling kernels for that take a second or more each."""

Record = dict[str, dict[str, set[str]]]
"""Op name -> implementation name -> the reasons for which others refused the calls that it served."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      name: of the implementation; the same name in several ops means the same technique.
      run: computes the op.
      refuses: ``refuses(*args, **kwargs)`` gives the reason why it cannot serve a call, or None.
      slower: gives the reason why others are expected to serve a call sooner, or None; asked only where it is neither named nor
        preferred.
      unavailable: gives the reason why it can serve no call at all on a device, or None.
      workspace: bytes of GPU memory that a call takes beside its arguments and results; None where nobody has counted them.
      begin: makes what calls that follow each other hand on, where they hand on anything; the op says how.
      whole: computes what other ops would; passed over where an implementation of those is preferred that this op has none of.
      most_kinds: of layers, see `of_kinds`, beyond which it is passed over where it is neither named nor preferred.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *args, **kwargs: None
    unavailable: Callable[[Target], str | None] = lambda device: None
    whole: bool = False
    workspace: Callable[..., int] | None = None
    begin: Callable[..., Any] | None = None
    slower: Callable[..., str | None] = lambda *args, **kwargs: None
    most_kinds: int | None = None


class Op:
    """A named operation with an ordered list of implementations, fastest first, the reference last."""

    def __init__(self, name: str, reference: Callable[..., Any]):
        self.name = name
        self.reference = reference
        self._implementations = [Implementation("xla", reference)]
        self.__doc__ = reference.__doc__
        _OPS[name] = self

    def register(self, implementation: Implementation, *, on_request: bool = False) -> None:
        """Puts an implementation before those already there; one ``on_request`` serves only calls that name or prefer it.

        Raises:
          ValueError: there is one of this name.
        """
        if implementation.name in self.names:
            raise ValueError(f"{self.name} already has an implementation named {implementation.name!r}")
        # The reference refuses nothing: what stands behind it is reached by name alone.
        self._implementations.insert(len(self._implementations) if on_request else 0, implementation)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(implementation.name for implementation in self._implementations)

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        """In the order in which they are tried."""
        return tuple(self._implementations)

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
        # Stable: what is preferred comes first, the rest keeps its order.
        for candidate in sorted(self._implementations, key=lambda i: i.name != _PREFERRED.get()):
            if implementation not in (None, candidate.name):
                continue
            reason = self._passed_over(candidate, implementation)
            reason = reason or candidate.unavailable(target()) or candidate.refuses(*args, **kwargs)
            if reason is None and candidate.name not in (implementation, _PREFERRED.get()):
                reason = _takes_long_to_compile(candidate) or candidate.slower(*args, **kwargs)
            if reason is None:
                return candidate, refusals
            refusals[candidate.name] = reason
        raise ValueError(f"{self.name}: {implementation} refuses: {refusals[implementation or '']}")

    def _passed_over(self, candidate: Implementation, implementation: str | None) -> str | None:
        preferred = _PREFERRED.get()
        if not candidate.whole or preferred is None or preferred in self.names or implementation is not None:
            return None
        return f"{preferred} is preferred, which is an implementation of other ops"

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        chosen, refusals = self.choose(*args, implementation=implementation, **kwargs)
        reasons = {f"{name}: {reason}" for name, reason in refusals.items()}
        for record in _RECORDS.get():
            add_choices(record, {self.name: {chosen.name: reasons}})
        return chosen.run(*args, **kwargs)


def _takes_long_to_compile(candidate: Implementation) -> str | None:
    kinds, most = _KINDS.get(), candidate.most_kinds
    if most is None or kinds <= most:
        return None
    return f"{kinds} kinds of layers, for each of which it would be compiled; at most {most} are worth it"


def ops() -> dict[str, Op]:
    """Every registered op by name."""
    return dict(_OPS)


def implementation_names() -> set[str]:
    """Every name that some op has an implementation by."""
    return {name for op in _OPS.values() for name in op.names}


def prefer(name: str | None) -> AbstractContextManager[None]:
    """Tries the implementations of this name first, in every op that has one and where it does not refuse."""
    return setting(_PREFERRED, name)


def layer_kinds(layers: Iterable[Any]) -> int:
    """Of layers, how many differ in the shape of some array; shapes suffice."""
    return len({tuple(leaf.shape for leaf in jax.tree.leaves(layer)) for layer in layers})


def of_kinds(count: int) -> AbstractContextManager[None]:
    """Says that calls are of layers of so many kinds: what takes long to compile does so for each."""
    return setting(_KINDS, count)


def record(into: Record) -> AbstractContextManager[None]:
    """Adds every choice made while a function is traced to ``into``, and to what records already."""
    return setting(_RECORDS, (*_RECORDS.get(), into))


def add_choices(into: Record, more: Record) -> None:
    """Adds the choices of one record to another."""
    for op, implementations in more.items():
        for name, reasons in implementations.items():
            into.setdefault(op, {}).setdefault(name, set()).update(reasons)
