"""Export: a folder of the canonical layout in, a checkpoint of a published form out, one tensor at a time."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from safetensors import SafetensorError

from converters.destination import check_space, refuse_existing
from converters.encoder_naming import naming_of
from converters.export_formats import EXPORT_FORMATS, ExportFormat
from flashsvd_jax.checkpoint import ModelFolder, open_folder
from flashsvd_jax.checkpoint.layout import CONFIG_FILE, companion_files
from flashsvd_jax.checkpoint.shard_writer import ShardWriter
from flashsvd_jax.checkpoint.staging import StagedFolder, unwritable_as_checkpoint_error
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.schema import schema, sites

# Without it, transformers does not take a safetensors file for one of PyTorch's.
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class ExportReport:
    """Facts of one export; ``str`` lays them out for a terminal.

    Attributes:
      path: the folder that was made.
      format: the form's name.
      family: the family that reads it back.
      low_rank: number of projections written as two factors.
      dense: number of projections written as they are.
      dtype: of every tensor.
      nbytes: size of the weights.
      copied: tokenizer and sampling files that were copied.
      reader: what is needed to run it in PyTorch.
    """

    path: Path
    format: str
    family: str
    low_rank: int
    dense: int
    dtype: str
    nbytes: int
    copied: tuple[str, ...]
    reader: str

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.path}",
                f"  format    {self.format}; convert reads it back as {self.family}",
                f"  sites     {self.low_rank} low rank, {self.dense} dense",
                f"  weights   {self.nbytes / 1e6:,.1f} MB, {self.dtype}",
                f"  copied    {', '.join(self.copied) or 'no tokenizer: there is none in the folder'}",
                f"  to run    {self.reader}",
            )
        )


def export(
    folder: str | Path,
    dst: str | Path,
    *,
    format: str,
    copy_shared: bool = False,
    shard_bytes: int = 2 * 2**30,
    progress: bool = True,
) -> ExportReport:
    """Writes a converted model in a published form; the folder appears whole at ``dst``, or after an error not at all.

    Every array is written as it is stored, so converting the result to that dtype gives the same arrays again, bit for bit.

    Args:
      folder: a converted model.
      dst: the folder to make: config.json, safetensors and the tokenizer.
      format: ``lowrankarena`` for `<module>.ALinear/BLinear`, ``svdllm`` for `q_u_proj/q_v_proj`.
      copy_shared: write an array that several projections share once for each; otherwise such a model is refused.
      shard_bytes: size at which a new file is begun.
      progress: show a bar for what takes longer than two seconds.

    Raises:
      ConversionError: the form is unknown, or cannot hold this model.
      CheckpointError: the folder is damaged, or ``dst`` cannot be written.
    """
    dst, found = Path(dst), {known.name: known for known in EXPORT_FORMATS}
    if format not in found:
        raise ConversionError(f"format {format!r} is not known; known: {', '.join(found)}")
    refuse_existing(dst)
    with open_folder(folder) as model:
        problems = list(found[format].problems(model.config, copy_shared))
        if problems:
            raise ConversionError(f"{folder} cannot be exported as {format}: {'; '.join(problems)}")
        return _write(model, dst, found[format], shard_bytes, progress)


def _write(model: ModelFolder, dst: Path, form: ExportFormat, shard_bytes: int, progress: bool) -> ExportReport:
    itemsize, shapes = jnp.dtype(model.manifest.dtype).itemsize, schema(model.config)
    nbytes = sum(spec.size for spec in shapes.values()) * itemsize
    check_space(dst, nbytes)
    naming, ranks = naming_of(model.config), model.config.factorization.rank_by_site
    by_module = {naming.module(site.name): ranks[site.name] for site in sites(model.config) if site.name in ranks}
    hf = form.config(model.hf_config, model.config.model_type, model.manifest.family, by_module)
    hf |= {key: model.manifest.dtype for key in ("torch_dtype", "dtype") if key in hf}
    companions = companion_files(model.path)
    bar = progress_bar(f"exporting {dst.name}", len(shapes), " tensors", progress)
    with bar, StagedFolder(dst) as staged, unwritable_as_checkpoint_error(dst, SafetensorError):
        writer = ShardWriter(staged.path, shard_bytes, _METADATA)
        for name, published in form.names(model.config):
            writer.make_room(shapes[name].size * itemsize)
            writer.add(published, model.get(name))
            bar.update()
        config = staged.path / CONFIG_FILE
        config.write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        writer.finish(like=config)
        for file in companions:
            shutil.copyfile(file, staged.path / file.name)
        staged.commit()
    return ExportReport(
        path=dst,
        format=form.name,
        family=form.family.name if ranks else "dense",
        low_rank=len(ranks),
        dense=len(sites(model.config)) - len(ranks),
        dtype=model.manifest.dtype,
        nbytes=nbytes,
        copied=tuple(file.name for file in companions),
        reader=form.reader,
    )
