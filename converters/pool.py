"""The tensors of a checkpoint that nothing has accounted for yet, and everything found wrong with them so far."""

from collections.abc import Callable, Mapping

from converters.naming import is_buffer
from converters.sources import TensorInfo


class Pool:
    """Gives every tensor out once.

    Attributes:
      bare: a tensor's stored name -> the name it goes by here, without prefixes.
      left: tensors that nobody took, by that name.
      dropped: names of tensors that are not needed.
      problems: one sentence each.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], bare: Callable[[str], str] = lambda name: name):
        self.bare = bare
        self.left: dict[str, TensorInfo] = {}
        self.dropped: list[str] = []
        self.problems: list[str] = []
        for name, info in tensors.items():
            short = bare(name)
            if is_buffer(short):
                self.dropped.append(name)
            elif self.left.setdefault(short, info) is not info:
                self.problems.append(f"unexpected: {name}, the checkpoint holds {self.left[short].name} as well")

    def take(self, *names: str) -> TensorInfo | None:
        """The first of these tensors that is there."""
        return next((self.left.pop(name) for name in names if name in self.left), None)

    def drop(self, name: str) -> None:
        """Leaves a tensor out on purpose."""
        self.dropped.append(self.left.pop(name).name)

    def require(self, shape: tuple[int, ...], *names: str, hint: str = "") -> TensorInfo | None:
        """Like `take`; a tensor that is missing or of another shape is a problem."""
        info = self.take(*names)
        if info is None:
            self.problems.append(f"missing: {names[0]} {list(shape)}{hint}")
        elif info.shape != shape:
            self.problems.append(
                f"mis-shaped: {info.name} is {list(info.shape)}, the base model makes it {list(shape)}"
            )
        return info
