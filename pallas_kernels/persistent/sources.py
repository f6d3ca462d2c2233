"""What the steps of a persistent launch read, as data: outputs of projections, and what inputs of phases are made of."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Output:
    """A member's output of a projection: in which columns of which phase's output it lies, in every layer that has it.

    A dense member of a projection that has two phases, because others or other layers are low rank, is done after the first.

    Attributes:
      steps: the phases: one, or the first and the second of a projection.
      groups: of the phase's rows.
      starts: first columns of the phase's output.
      bias: number of the operand that is still to be added, None if there is none.
    """

    steps: tuple[int, ...]
    groups: tuple[int, ...]
    starts: tuple[int, ...]
    bias: int | None = None

    @property
    def phases(self) -> tuple[int, ...]:
        """The phases that occur, the first of a projection first."""
        return tuple(sorted(set(self.steps)))


@dataclasses.dataclass(frozen=True)
class Source:
    """What the input of a phase is made of.

    Attributes:
      kind: "stream" the residual stream with an output added to it, normed; "kept" the stream as it was before, times a norm's
        scale; "sum" outputs, added up; "gated" the second of two outputs times the activation of the first; "attended" the output
        of an attention.
      of: those outputs.
      attention: its number, of "attended".
      stream: of a stream, the step that had it last.
      behind: 1 if that phase and the output are of the layer before.
      scale: number of the operand with the norm's scale, of a stream.
      activation: of "gated".
      divided_by: the step that has the stream by whose root mean square the phase's output is still to be divided, where it is a
        later one than who divides else; None if there is none.
    """

    kind: str
    of: tuple[Output, ...] = ()
    attention: int = 0
    stream: int = 0
    behind: int = 0
    scale: int = 0
    activation: str = "silu"
    divided_by: int | None = None
