"""What a schema is made of: the shape of a parameter, and projections that may be factorized."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape of a parameter and the glossary names of its axes (see `flashsvd_jax.axes`)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Site:
    """A projection that may be factorized: its path in the tree and the shape [d_out, d_in] of the weight it stands for."""

    name: str
    d_out: int
    d_in: int
    out_axis: str
    in_axis: str
    has_bias: bool

    def params(self, rank: int | None, groups: int = 1) -> dict[str, ParamSpec]:
        """The site's arrays at a rank, or dense for None; in several groups each has a first factor of that rank."""
        if rank is None:
            params = {"weight": ParamSpec((self.d_out, self.d_in), (self.out_axis, self.in_axis))}
        else:
            params = {
                "down": ParamSpec((groups * rank, self.d_in), ("rank", self.in_axis)),
                "up": ParamSpec((self.d_out, rank), (self.out_axis, "rank")),
            }
            if groups > 1:
                params["up"] = ParamSpec((groups, self.d_out // groups, rank), ("groups", self.out_axis, "rank"))
        if self.has_bias:
            params["bias"] = ParamSpec((self.d_out,), (self.out_axis,))
        return {f"{self.name}.{part}": spec for part, spec in params.items()}
