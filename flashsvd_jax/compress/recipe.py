"""How a model is compressed: the choices of the caller, checked, and as a sentence for the record."""

import dataclasses
import math
from collections.abc import Mapping

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.compress.allocation import ALLOCATIONS
from flashsvd_jax.compress.budget import Target
from flashsvd_jax.compress.heads import HEADS
from flashsvd_jax.compress.methods import method_named
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method and its options.

    Attributes:
      method: a name in `METHODS`.
      target: how large the result is to be; a number is the share of the layers' parameters that is kept. None with ``ranks``.
      alloc: "uniform", the same ratio at every projection; "greedy", by gain for cost over all of them, a gain
        being a share of a projection's own loss; "fisher", the same with gains scaled to the model's loss; "v2", by theoretical
        loss within each kind, as SVD-LLM v2; "effective", by effective rank within each kind, as D-Rank; "importance", by how
        near each layer leaves its inputs, as AdaSVD; "sensitivity", by what each does to the model's loss, as ASVD; "learned",
        by gradients of that loss, as Dobi-SVD and Adaptive Rank Selection; "file" with ``ranks``.
      multiple: of which ranks are, where a projection is not too small for it. Targets in bytes and milliseconds also pass over
        ranks that kernels would pad.
      alpha: ASVD's exponent of the inputs' mean magnitude.
      update: whether second factors are fitted again, to inputs as the compressed layers before have them.
      ranks: by site, where they are given; others stay dense.
      heads: "own" for queries, keys and values with factors of single heads, whose rank is that of each, "whole" for factors of
        whole projections; None for what the kernels like best: "own" for encoders, "whole" for decoders, which take no other, and
        for bases that layers share.
      alike: whether each kind of projection gets one rank, or none, for all layers, where "greedy" and "fisher" would choose one
        for every layer: less freedom, for layers that decode faster and are compiled once.
      layers_per_basis: how many neighbouring layers share a basis, for the method that has them; None for two, as its paper does.

    Raises:
      RequestError: one of them is unknown or out of range, or two contradict each other.
    """

    method: str
    target: Target | float | None = None
    alloc: str = "uniform"
    multiple: int = 1
    alpha: float = 0.5
    update: bool = False
    ranks: Mapping[str, int] | None = None
    heads: str | None = None
    alike: bool = False
    layers_per_basis: int | None = None

    def __post_init__(self) -> None:
        method = method_named(self.method)
        if isinstance(self.target, int | float):
            object.__setattr__(self, "target", Target("ratio", self.target))
        if (self.target is None) == (self.ranks is None):
            raise RequestError("give either a target, such as a ratio, or ranks")
        if self.multiple < 1:
            raise RequestError(f"ranks can be multiples of 1 or more, not of {self.multiple}")
        if self.alloc not in ALLOCATIONS:
            raise RequestError(f"alloc {self.alloc!r} is not one of {', '.join(ALLOCATIONS)}")
        if (self.alloc == "file") != (self.ranks is not None):
            raise RequestError("alloc is 'file' where ranks are given, and nowhere else")
        if self.alike and self.alloc not in ("greedy", "fisher"):
            raise RequestError(f"ranks are made alike by alloc greedy or fisher, not by {self.alloc}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise RequestError(f"alpha must be above 0, not {self.alpha}")
        if self.heads is not None and self.heads not in HEADS:
            raise RequestError(f"heads {self.heads!r} is not one of {', '.join(HEADS)}")
        if self.update and method.sequential:
            raise RequestError(
                f"method {self.method} fits both factors to the inputs that an update would fit the second ones to; for first"
                " factors by the dense model's inputs and an update after, as SVD-LLM published it, choose method drone"
            )
        if method.shares:
            self._check_sharing()
        elif self.layers_per_basis is not None:
            raise RequestError(f"method {self.method} has no bases that layers share; choose method basis_sharing")

    def _check_sharing(self) -> None:
        """Settles how many layers share a basis, and refuses what is not for such bases."""
        if self.layers_per_basis is None:
            object.__setattr__(self, "layers_per_basis", 2)
        elif self.layers_per_basis < 2:
            raise RequestError(
                f"a basis is shared by 2 layers or more, not by {self.layers_per_basis}; alone, method drone has the same factors"
            )
        if self.heads == "own":
            raise RequestError("bases that layers share are of whole projections: leave heads out, or give 'whole'")
        if self.alloc == "sensitivity":
            raise RequestError(
                "alloc sensitivity compresses one projection alone, and a basis is of several; choose another one"
            )
        if isinstance(self.target, Target) and self.target.unit in ("bytes", "ms"):
            raise RequestError(
                f"a target of {self.target} is for decoding, which reads a shared basis for every layer that has it: sharing saves"
                " memory alone; give a ratio or parameters, or choose method drone"
            )

    def settled(self, config: AnyConfig) -> "Recipe":
        """The same with `heads` as that model has them, its layers counted.

        Raises:
          RequestError: the recipe is not for models of its kind.
        """
        if (self.layers_per_basis or 1) > config.num_layers:
            raise RequestError(
                f"the model has {config.num_layers} layers, so {self.layers_per_basis} cannot share a basis"
            )
        if not isinstance(config, EncoderConfig):
            if self.heads == "own":
                raise RequestError("factors of single heads are for encoders; leave heads out, or give 'whole'")
            return dataclasses.replace(self, heads="whole")
        if method_named(self.method).needs == "fisher":
            raise RequestError(
                f"method {self.method} needs gradients of a loss, and an encoder has none by itself; choose another method"
            )
        if self.alloc in ("fisher", "sensitivity", "learned"):
            raise RequestError(
                f"alloc {self.alloc} measures a model's loss, and an encoder has none by itself; choose another one"
            )
        if isinstance(self.target, Target) and self.target.unit in ("bytes", "ms"):
            raise RequestError(
                f"a target of {self.target} is for decoding, which encoders do not do; give a ratio, parameters, or ranks"
            )
        return dataclasses.replace(self, heads=self.heads or ("own" if self.layers_per_basis is None else "whole"))

    @property
    def by_layer(self) -> bool:
        """Whether one kind of projection may get different ranks in different layers."""
        return self.alloc != "uniform" and not self.alike

    @property
    def reads_text(self) -> bool:
        """Whether statistics of a text are needed."""
        return bool(self.why_text)

    @property
    def why_text(self) -> str:
        """What needs a text; empty where nothing does."""
        if method_named(self.method).needs is not None:
            return f"method {self.method}"
        if self.alloc in ("fisher", "importance", "sensitivity", "learned"):
            return f"alloc {self.alloc}"
        return "an update" if self.update else ""

    def __str__(self) -> str:
        option = f", alpha {self.alpha:g}" * (self.method == "asvd")
        if self.layers_per_basis is not None:
            option = f", {self.layers_per_basis} layers to a basis,"
        heads = ", queries, keys and values with factors of single heads" * (self.heads == "own")
        update = "; second factors fitted again to inputs of compressed layers" * self.update
        if self.ranks is not None:
            return f"compressed by {self.method}{option} with given ranks{heads}{update}"
        rounded = f" in multiples of {self.multiple}" * (self.multiple > 1)
        alike = ", alike in all layers" * self.alike
        return (
            f"compressed by {self.method}{option} to {self.target}, {self.alloc} ranks{alike}{rounded}{heads}{update}"
        )
