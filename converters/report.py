"""What a conversion found and made, as text."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from converters.verify import Verification
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.schema import count_params, sites


@dataclass(frozen=True)
class ConversionReport:
    """Facts of one conversion; ``str`` lays them out for a terminal.

    Attributes:
      path: the folder that was made.
      family: short name of the checkpoint's family.
      description: the same in words.
      evidence: what told the family, one phrase each.
      config_origin: where the base model's configuration came from.
      config: the model, factorization included.
      dtype: of every stored array.
      nbytes: size of the weights.
      copied: tokenizer and sampling files that were copied.
      notes: what else a reader should know, one sentence each.
      verification: the comparison with the source, if it was asked for.
    """

    path: Path
    family: str
    description: str
    evidence: tuple[str, ...]
    config_origin: str
    config: AnyConfig
    dtype: str
    nbytes: int
    copied: tuple[str, ...]
    notes: tuple[str, ...]
    verification: Verification | None

    @property
    def params(self) -> int:
        """Number of stored parameters, shared arrays counted once."""
        return count_params(self.config)

    @property
    def params_dense(self) -> int:
        """Number of parameters of the same model with no site factorized."""
        return count_params(self.config.dense())

    def __str__(self) -> str:
        total, low_rank = len(sites(self.config)), len(self.config.factorization.ranks)
        lines = [
            f"{self.path}",
            f"  family    {self.family}: {self.description}",
            f"  because   {'; '.join(self.evidence)}",
            f"  config    {self.config.model_type}, from {self.config_origin}",
            f"  sites     {low_rank} low rank, {total - low_rank} dense",
            f"  params    {self.params:,} of {self.params_dense:,} ({self.params / self.params_dense:.1%})",
            f"  weights   {self.nbytes / 1e6:,.1f} MB, {self.dtype}",
            f"  copied    {', '.join(self.copied) or 'no tokenizer: none is beside the weights or at --base'}",
            *(f"  note      {note}" for note in self.notes),
        ]
        if self.verification is not None:
            lines += [f"  verified  {line}" for line in self.verification.lines()]
        return "\n".join(lines + [""] * bool(low_rank) + self.rank_table())

    def rank_table(self) -> list[str]:
        """Ranks by layer and projection, equal neighbouring layers in one row; empty for a dense model."""
        ranks = self.config.factorization.rank_by_site
        if not ranks:
            return []
        groups = dict(self.config.factorization.groups)
        cells = {site.name: str(ranks.get(site.name, "dense")) for site in sites(self.config)}
        cells |= {name: f"{number}x{ranks[name]}" for name, number in groups.items()}
        rows = []
        for layer in range(self.config.num_layers):
            prefix = f"layers_{layer}."
            rows.append([cell for name, cell in cells.items() if name.startswith(prefix)])
        leaves = [name.rpartition(".")[2] for name in cells if name.startswith("layers_0.")]
        table = [("layer", *(leaf.removesuffix("_proj") for leaf in leaves))]
        for row, group in groupby(range(len(rows)), key=lambda layer: rows[layer]):
            first, *rest = group
            table.append((f"{first}-{rest[-1]}" if rest else f"{first}", *row))
        widths = [9, *(max(7, len(name) + 2) for name in table[0][1:])]
        lines = ["".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return lines + [f"{name:>9}{cell:>7}" for name, cell in cells.items() if not name.startswith("layers_")]
