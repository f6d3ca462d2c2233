"""A base model with a LoRA adapter merged into it.

A dense weight, or a factor that was trained by itself, becomes ``W + scale * B @ A``, computed in float64 and rounded once. Two
factors of a module that was trained as a whole become wider by the adapter's rank: ``[up, scale * B] @ [down; A]``, nothing else
changed.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from converters.adapters import Adapter, LowRankUpdate
from converters.encoder_naming import naming_of
from converters.family import Family
from converters.plan import Plan
from converters.products import made_dtype, plus_product
from converters.sources import TensorInfo, TensorSource, WrappedSource
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.schema import Site, sites


class AdaptedSource(WrappedSource):
    """The base's tensors, those that the adapter changes under their own names with its updates in them.

    Attributes:
      plan: the base's plan with the changed tensors, and ranks, in it.
    """

    def __init__(self, source: TensorSource, plan: Plan, family: Family, adapter: Adapter):
        """Puts both together by names and shapes.

        Args:
          source: the base, as the plan reads it.
          plan: of the base alone.
          family: of the base.
          adapter: open; closing this closes it.

        Raises:
          ConversionError: names all that the adapter changes and the base does not have, or has in a form that cannot be changed.
        """
        super().__init__(source)
        self.files = (*source.files, *adapter.source.files)
        self._adapter, self._plan, self._family = adapter, plan, family
        self._naming = naming_of(plan.config)
        self._problems: list[str] = []
        self._changed: dict[str, TensorInfo] = {}  # by parameter
        self._ranks = plan.config.factorization.rank_by_site
        self._by_name: dict[str, list[str]] = {}
        for parameter, info in plan.tensors.items():
            self._by_name.setdefault(self._bare(info.name), []).append(parameter)
        self._sites = {self._naming.module(site.name): site for site in sites(plan.config)}
        for module, update in adapter.updates.items():
            self._merge(self._naming.bare(module), update)
        for name, info in adapter.replaced.items():
            self._replace(self._naming.bare(name), info)
        if self._problems:
            listed = "".join(f"\n  {problem}" for problem in self._problems)
            count = f"{len(self._problems)} problem{'s' * (len(self._problems) > 1)}"
            raise ConversionError(f"{adapter.source.path} does not fit {source.path}; {count}:{listed}")
        wider = sum(rank != plan.config.factorization.rank(site) for site, rank in self._ranks.items())
        replaced = f"; {len(adapter.replaced)} parameters are the adapter's" if adapter.replaced else ""
        merged = len(adapter.updates) - wider
        self.notes = (
            *(source.notes if isinstance(source, WrappedSource) else ()),
            f"LoRA: {merged} updates are merged into weights, {wider} make factors wider{replaced}",
        )
        self.plan = plan.changed(self._changed, self._ranks)

    def close(self) -> None:
        super().close()
        self._adapter.source.close()

    def _bare(self, name: str) -> str:
        return self._naming.bare(self._family.bare(name))

    def _merge(self, module: str, update: LowRankUpdate) -> None:
        parameters, site = self._by_name.get(f"{module}.weight", []), self._sites.get(module)
        if parameters:
            self._add(parameters, update)
        elif site is not None and site.name in self._ranks:
            self._widen(site, update)
        else:
            self._problems.append(f"unexpected: {update.a.name}, the base has no {module}")

    def _add(self, parameters: list[str], update: LowRankUpdate) -> None:
        """``W + scale * B @ A`` in place of one weight."""
        info = self._plan.tensors[parameters[0]]
        if update.shape != info.shape:
            shapes = f"{update.b.name} {list(update.b.shape)} and {update.a.name} {list(update.a.shape)}"
            self._problems.append(f"mis-shaped: {shapes} do not form {info.name} {list(info.shape)}")
            return
        first, second = partial(self._part, update, "a"), partial(self._part, update, "b")
        if update.is_embedding:
            first, second = (lambda of=second: of().T), (lambda of=first: of().T)
        dtype = made_dtype((info, update.a, update.b))
        stored = partial(self._source.get, info.name)
        self._change(parameters, info, info.shape, partial(plus_product, stored, second, first, dtype), dtype)
        if any(parameters[0] == f"{site.name}.weight" for site in self._sites.values()):
            self._outputs[info.name] = lambda x: x @ stored().astype(np.float64).T + self._update_of(update, x)

    def _widen(self, site: Site, update: LowRankUpdate) -> None:
        """``[up, scale * B] @ [down; A]`` in place of two factors."""
        down, up = (self._plan.tensors[f"{site.name}.{part}"] for part in ("down", "up"))
        if len(up.shape) != 2:
            self._problems.append(f"unexpected: {update.a.name}, as {up.name} is block-diagonal")
            return
        if update.shape != (site.d_out, site.d_in):
            shapes = f"{update.b.name} {list(update.b.shape)} and {update.a.name} {list(update.a.shape)}"
            self._problems.append(f"mis-shaped: {shapes} do not form a weight [{site.d_out}, {site.d_in}]")
            return
        dtype, rank = made_dtype((down, up, update.a, update.b)), down.shape[0] + update.a.shape[0]

        def wide(info: TensorInfo, part: str, axis: int) -> np.ndarray:
            own, added = self._source.get(info.name), self._part(update, part)
            return np.concatenate((own.astype(dtype), added.astype(dtype)), axis)

        self._change([f"{site.name}.down"], down, (rank, site.d_in), partial(wide, down, "a", 0), dtype)
        self._change([f"{site.name}.up"], up, (site.d_out, rank), partial(wide, up, "b", 1), dtype)
        self._ranks[site.name] = rank
        first, second = partial(self._float64, down.name), partial(self._float64, up.name)
        for name in (down.name, up.name):  # whichever comes first by name
            self._outputs[name] = lambda x: x @ first().T @ second().T + self._update_of(update, x)

    def _replace(self, name: str, info: TensorInfo) -> None:
        parameters = self._by_name.get(name, [])
        if not parameters:
            self._problems.append(f"unexpected: {info.name}, the base has no {name}")
        elif self._plan.tensors[parameters[0]].shape != info.shape:
            own = self._plan.tensors[parameters[0]]
            self._problems.append(
                f"mis-shaped: {info.name} is {list(info.shape)}, the base's {own.name} {list(own.shape)}"
            )
        else:
            old = self._plan.tensors[parameters[0]]
            self._change(parameters, old, info.shape, partial(self._adapter.source.get, info.name), info.dtype)

    def _change(
        self,
        parameters: list[str],
        info: TensorInfo,
        shape: tuple[int, ...],
        make: Callable[[], np.ndarray],
        dtype: np.dtype,
    ) -> None:
        tied = self._naming.twins and parameters == ["embed_tokens.weight"]
        if len(parameters) > 1 or tied or info.name in self._makers:
            others = f"shared with {'the output head' if tied else ', '.join(parameters[1:])}"
            why = "changed twice" if info.name in self._makers else others
            self._problems.append(f"unexpected: a change of {info.name}, which is {why}")
            return
        self._make(info.name, shape, make, info, dtype)
        self._changed[parameters[0]] = replace(self._infos[info.name], identity=(info.name, "changed"))

    def _part(self, update: LowRankUpdate, part: str) -> np.ndarray:
        """A [rank, d_in], or scale * B [d_out, rank] in float64."""
        if part == "a":
            return self._adapter.source.get(update.a.name)
        return update.scale * self._adapter.source.get(update.b.name).astype(np.float64)

    def _update_of(self, update: LowRankUpdate, x: np.ndarray) -> np.ndarray:
        """What PEFT adds to a module's output."""
        a, b = (self._adapter.source.get(part.name).astype(np.float64) for part in (update.a, update.b))
        return x @ a.T @ b.T * update.scale
