"""Conversion: a PyTorch checkpoint in, a folder of the canonical layout out, one tensor at a time."""

import shutil
import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from converters.adapted_source import AdaptedSource
from converters.adapters import Adapter, adapter_folder, base_weights, open_adapter
from converters.base_config import FoundConfig, base_config, base_name, model_config, own_config
from converters.conv1d import TransposedWeights
from converters.converted_source import ConvertedSource
from converters.destination import check_space, refuse_existing
from converters.detect import Detection, detect
from converters.encoder_naming import naming_of
from converters.families import family_named
from converters.family import Family
from converters.gpt2_blocks import open_checkpoint
from converters.plan import Plan, make_plan
from converters.report import ConversionReport
from converters.sources import TensorSource, WrappedSource, folder_of
from converters.verify import verify_folder
from converters.verify_logits import LogitsFunction
from flashsvd_jax.checkpoint import FolderWriter, Manifest, SourceFile, WeightWarning
from flashsvd_jax.checkpoint.hashing import sha256_of
from flashsvd_jax.checkpoint.layout import MANIFEST_FILE, companion_files
from flashsvd_jax.checkpoint.manifest import DTYPES
from flashsvd_jax.config import ModelConfig, RopeConfig
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.schema import count_params

_SAMPLING_FILE = "generation_config.json"
_MAX_NAMED = 5


@dataclass(frozen=True)
class _Job:
    """All that is decided before anything is written."""

    source: TensorSource
    family: Family  # that names the factors; of an adapter, its base's
    detection: Detection
    base: FoundConfig
    base_name: str | None
    plan: Plan
    dtype: str
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return count_params(self.plan.config) * jnp.dtype(self.dtype).itemsize


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    verify: bool = False,
    progress: bool = True,
    logits_fn: LogitsFunction | None = None,
) -> ConversionReport:
    """Converts a checkpoint; the folder appears whole at ``dst``, or after an error not at all.

    Args:
      src: a weight file, or a folder as Hugging Face lays it out, or a LoRA adapter's folder.
      dst: the folder to make.
      base: folder or config.json of the base model; by default the configuration that came with the weights counts. For an
        adapter, the weights of its base, unless they are beside it.
      dtype: ``bfloat16``, ``float16`` or ``float32``; by default 16-bit weights stay as they are, wider ones become
        bfloat16.
      verify: compare the written model with the source.
      progress: show a bar for what takes longer than two seconds.
      logits_fn: computes logits from the folder, for ``verify``; without it only the parameters are compared.

    Raises:
      ConversionError: the checkpoint is of no family that is read, does not form the base model, or does not verify.
      CheckpointError: a file is damaged, or ``dst`` cannot be written.
      ConfigError: the base model is not one that this package runs.
    """
    src, dst, base = Path(src), Path(dst), None if base is None else Path(base)
    refuse_existing(dst)
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    companions = _companions(folder_of(src), base)
    folder, weights = adapter_folder(src), src
    if folder is not None:
        weights, base = base_weights(folder, base), None
    with ExitStack() as files:
        source, adapter = files.enter_context(_open(weights, base, for_adapter=folder is not None)), None
        if folder is not None:
            adapter = open_adapter(folder)
            files.enter_context(adapter.source)
        job = _prepare(source, base, dtype, adapter)
        check_space(dst, job.nbytes)
        _write(job, dst, companions, progress)
        verification = None
        if verify:
            try:
                verification = verify_folder(job.source, job.family, job.plan, job.base.hf, dst, logits_fn)
            except BaseException:
                shutil.rmtree(dst)  # made above, so it is ours to delete
                raise
    return ConversionReport(
        path=dst,
        family=job.detection.family.name,
        description=job.detection.family.description,
        evidence=job.detection.evidence,
        config_origin=job.base.origin,
        config=job.plan.config,
        dtype=job.dtype,
        nbytes=job.nbytes,
        copied=tuple(file.name for file in companions),
        notes=job.notes,
        verification=verification,
    )


def _open(path: Path, base: Path | None, for_adapter: bool) -> TensorSource:
    if not (path / MANIFEST_FILE).is_file():
        return open_checkpoint(path, base)
    if for_adapter:
        return ConvertedSource(path)
    raise ConversionError(f"{path} is a converted model already; load it, or export it to a form that others read")


def _prepare(source: TensorSource, base: Path | None, dtype: str | None, adapter: Adapter | None) -> _Job:
    where, own = str(source.path), own_config(source)
    claims = own.hf if own else {}
    converted = source.detection if isinstance(source, ConvertedSource) else None
    detection, default = converted or detect(claims, source.infos(), where), _default_dtype(source)
    found = base_config(own, base, where)
    if naming_of(model_config(found)).transposed:
        source = TransposedWeights(source, model_config(found))
    if detection.family.view is not None:
        source = view = detection.family.view(source, claims, model_config(found))
        found = FoundConfig({**found.hf, **view.hf}, found.origin)
    rank_map = own.hf.get(detection.family.rank_map) if own else None
    plan = make_plan(model_config(found), source.infos(), detection.family, rank_map, where)
    for dropped, kept in plan.equal:
        if not np.array_equal(source.get(dropped), source.get(kept)):
            raise ConversionError(
                f"{where}: {dropped} differs from {kept}, but the base configuration ties them; if they are meant to "
                f"differ, set tie_word_embeddings to false in the configuration given with --base"
            )
    family = detection.family
    if adapter is not None:
        source = adapted = AdaptedSource(source, plan, family, adapter)
        plan, detection = adapted.plan, _of_adapter(detection)
    notes = _notes(source, family, plan)
    return _Job(source, family, detection, found, base_name(own), plan, dtype or default, notes)


def _of_adapter(base: Detection) -> Detection:
    family = family_named("lora")
    return Detection(family, (f"file {family.files[0]}", f"its base is {base.family.name}", *base.evidence))


def _write(job: _Job, dst: Path, companions: list[Path], progress: bool) -> None:
    files = [SourceFile(file.name, file.stat().st_size, sha256_of(file, progress)) for file in job.source.files]
    manifest = Manifest(
        family=job.detection.family.name,
        dtype=job.dtype,
        factorization=job.plan.config.factorization,
        params=count_params(job.plan.config),
        params_dense=count_params(job.plan.config.dense()),
        base_model=job.base_name,
        sources=tuple(files),
        notes=job.notes,
    )
    stored = job.plan.stored
    bar = progress_bar(f"converting {dst.name}", len(stored), " tensors", progress)
    try:
        writing = FolderWriter(dst, job.base.hf, manifest, copy_files=companions, progress=progress)
        with warnings.catch_warnings(), writing as writer, bar:
            warnings.simplefilter("error", WeightWarning)  # of no use to anybody, so nothing is written
            for name, info in stored.items():
                writer.add(name, job.source.get(info.name))
                bar.update()
    except WeightWarning as warning:
        named = _listing(tuple(dict.fromkeys(stored[name].name for name in warning.arrays)))
        raise ConversionError(f"{warning}; in {job.source.path}: {named}; nothing was written") from warning


def _default_dtype(source: TensorSource) -> str:
    """The dtype of most of the checkpoint's weights if it has 16 bits, else bfloat16."""
    nbytes: Counter[str] = Counter()
    for info in source.infos().values():
        nbytes[info.dtype.name] += info.nbytes
    if not nbytes:
        raise ConversionError(f"{source.path} holds no tensors")
    (name, _), *_ = nbytes.most_common()
    return name if name in ("bfloat16", "float16") else "bfloat16"


def _companions(own: Path, base: Path | None) -> list[Path]:
    """Tokenizer and sampling files: those beside the weights, or else the base model's; tokenizers are not mixed."""
    files = {file.name: file for file in companion_files(own)}
    others = {} if base is None else {file.name: file for file in companion_files(folder_of(base))}
    if files.keys() - {_SAMPLING_FILE}:
        others = {name: file for name, file in others.items() if name == _SAMPLING_FILE}
    return [file for _, file in sorted((others | files).items())]


def _notes(source: TensorSource, family: Family, plan: Plan) -> tuple[str, ...]:
    notes = [*(source.notes if isinstance(source, WrappedSource) else ()), *plan.notes]
    rope = plan.config.rope if isinstance(plan.config, ModelConfig) else RopeConfig()
    if family.fixed_rope and rope is not None and rope != RopeConfig():
        notes.append(
            f"the family's own Llama class rotates positions with base 10000 and no scaling; the base configuration "
            f"counts: base {rope.theta:g}, scaling {rope.kind}"
        )
    if isinstance(plan.config, EncoderConfig) and not plan.config.is_transformers:
        notes.append(
            "as in the class that FlashSVD saves, the embedding is multiplied with the square root of the width, and the last "
            "layer's output normed once more; config.json says so as embedding_scale and final_norm"
        )
    if plan.dropped:
        notes.append(f"{len(plan.dropped)} tensors were not needed: {_listing(plan.dropped)}")
    if source.unknown_globals:
        names = _listing(source.unknown_globals)
        notes.append(f"{len(source.unknown_globals)} names in the pickle were not looked up, none was run: {names}")
    return tuple(notes)


def _listing(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
