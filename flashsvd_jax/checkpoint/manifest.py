"""The manifest of a factorized model: what it was made from, its ranks, and which arrays are shared."""

import dataclasses
import json
import re
import reprlib
from typing import Self

from flashsvd_jax.checkpoint.json_files import Fields, parse_object
from flashsvd_jax.factorization import Factorization

FORMAT_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file that the model was converted from: its name, its size in bytes and the SHA-256 of its content in hex."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a factorized model that its tensors and the base model's configuration do not say.

    Attributes:
      family: the compression method or checkpoint family, such as ``svdllm``.
      dtype: of every stored array: ``bfloat16``, ``float16`` or ``float32``.
      factorization: ranks and groups by site, and shared arrays.
      params: number of stored parameters, shared arrays counted once.
      params_dense: number of parameters of the same model with no site factorized.
      base_model: name of the base model, where it is known.
      sources: the files it was converted from.
      notes: what a reader should know, one sentence each.
      format_version: of the folder's layout.
    """

    family: str
    dtype: str
    factorization: Factorization
    params: int
    params_dense: int
    base_model: str | None = None
    sources: tuple[SourceFile, ...] = ()
    notes: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of the manifest file."""
        fields = {
            "format_version": self.format_version,
            "family": self.family,
            "base_model": self.base_model,
            "dtype": self.dtype,
            "params": self.params,
            "params_dense": self.params_dense,
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "notes": list(self.notes),
            "ranks": self.factorization.rank_by_site,
            "shared": self.factorization.owner_by_name,
        }
        if self.factorization.groups:  # absent from most, so that older versions read those
            fields["groups"] = dict(self.factorization.groups)
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Reads a manifest; ``where`` names its file in messages.

        Raises:
          CheckpointError: not JSON, another format version, or a field that is missing, unknown or malformed.
        """
        fields = Fields(parse_object(text, where), where)
        version = fields.take("format_version", int)
        if version != FORMAT_VERSION:
            fields.fail("format_version", f"is {version}, but this version of flashsvd_jax reads only {FORMAT_VERSION}")
        manifest = cls(
            family=fields.take("family", str),
            dtype=fields.take("dtype", str),
            factorization=Factorization.of(_counts(fields, "ranks"), _shared(fields), _counts(fields, "groups", {})),
            params=fields.take_count("params"),
            params_dense=fields.take_count("params_dense"),
            base_model=fields.take_optional("base_model", str, None),
            sources=_sources(fields, where),
            notes=_notes(fields),
        )
        if manifest.dtype not in DTYPES:
            fields.fail("dtype", f"must be one of {', '.join(DTYPES)}, not {manifest.dtype!r}")
        fields.end()
        return manifest


def _counts(fields: Fields, name: str, default: dict[str, int] | None = None) -> dict[str, int]:
    """A whole number by site; the field must be there if it has no default."""
    counts = fields.take(name, dict) if default is None else fields.take_optional(name, dict, default)
    for site, count in counts.items():
        if type(count) is not int or count < 1:
            fields.fail(f"{name}[{site!r}]", f"must be a positive whole number, not {reprlib.repr(count)}")
    return counts


def _shared(fields: Fields) -> dict[str, str]:
    shared = fields.take("shared", dict)
    for name, owner in shared.items():
        if not isinstance(owner, str):
            fields.fail(f"shared[{name!r}]", f"must be the name of an array, not {reprlib.repr(owner)}")
    return shared


def _sources(fields: Fields, where: str) -> tuple[SourceFile, ...]:
    sources = []
    for index, values in enumerate(fields.take_optional("sources", list, [])):
        source = Fields(values, f"{where}: sources[{index}]")
        sources.append(SourceFile(source.take("name", str), source.take_count("bytes"), source.take("sha256", str)))
        if not re.fullmatch("[0-9a-f]{64}", sources[-1].sha256):
            source.fail("sha256", f"must be 64 hexadecimal digits, not {reprlib.repr(sources[-1].sha256)}")
        source.end()
    return tuple(sources)


def _notes(fields: Fields) -> tuple[str, ...]:
    notes = fields.take_optional("notes", list, [])
    for index, note in enumerate(notes):
        if not isinstance(note, str):
            fields.fail(f"notes[{index}]", f"must be text, not {reprlib.repr(note)}")
    return tuple(notes)
