"""The zip archive that `torch.save` writes: finding its pickle and its storages without PyTorch and without copying."""

import mmap
import struct
import zipfile
import zlib
from pathlib import Path

from converters.sources.mapped_file import map_file
from flashsvd_jax.errors import CheckpointError

_MAX_PICKLE_BYTES = 256 << 20
_LOCAL_HEADER_BYTES = 30
_LOCAL_HEADER_MAGIC = b"PK\x03\x04"
_TAR_MAGIC, _TAR_MAGIC_OFFSET = b"ustar", 257
_PICKLE_MAGIC = b"\x80"
_ENCRYPTED_FLAG, _UTF8_FLAG = 0x1, 0x800


class TorchArchive:
    """A mapped `torch.save` file. All errors are CheckpointErrors that name the file."""

    def __init__(self, path: Path):
        """Map the file and read its directory.

        Raises CheckpointError for a file that is no zip archive of `torch.save`, is damaged or cut short, or was
        written on a big-endian machine.
        """
        self.path = path
        self._checked: set[str] = set()  # entries whose checksum is right
        self._map: mmap.mmap | None = map_file(path)
        _require_zip(path, self._map)
        self._entries = _read_directory(path)
        self._root = self._find_root()
        if f"{self._root}constants.pkl" in self._entries:
            raise CheckpointError(f"{path} is a TorchScript program: save the state_dict() of the model instead")
        byteorder = self._entries.get(f"{self._root}byteorder")
        if byteorder is not None and bytes(self._read(byteorder)) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine: re-save it on a little-endian one")

    def pickle_bytes(self) -> bytes:
        """The program of the archive, `data.pkl`. Raises CheckpointError if it is damaged or larger than 256 MiB."""
        entry = self._entries[f"{self._root}data.pkl"]
        if entry.file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError(f"{self.path}: data.pkl has {entry.file_size} bytes, more than a model ever needs")
        return bytes(self._undamaged(entry))

    def storage_size(self, key: str) -> int:
        """Size in bytes of the storage `key`. Raises CheckpointError if it is missing or not wholly in the file."""
        entry = self._storage_entry(key)
        self._locate(entry)
        return entry.file_size

    def storage(self, key: str) -> memoryview:
        """The bytes of the storage `key`: a view of the map, or a copy if the archive was compressed afterwards.

        Raises CheckpointError if they are not those that the archive has a checksum of.
        """
        return self._undamaged(self._storage_entry(key))

    def close(self) -> None:
        """Let go of the map; it is unmapped when the last array that views it is gone."""
        self._map = None

    def _find_root(self) -> str:
        pickles = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{self.path} is a zip file with {len(pickles)} data.pkl, not a PyTorch checkpoint")
        return pickles[0].removesuffix("data.pkl")

    def _storage_entry(self, key: str) -> zipfile.ZipInfo:
        entry = self._entries.get(f"{self._root}data/{key}")
        if entry is None:
            raise CheckpointError(f"{self.path} is damaged: it has no storage {key!r}")
        return entry

    def _locate(self, entry: zipfile.ZipInfo) -> memoryview:
        """The entry as it lies in the file. Sizes come from the directory, the position from the local header, whose
        padding differs from the directory's."""
        if self._map is None:
            raise CheckpointError(f"{self.path} is closed")
        damaged = CheckpointError(f"{self.path} is damaged at entry {entry.filename!r}: download it again")
        start = entry.header_offset
        if not 0 <= start <= len(self._map) - _LOCAL_HEADER_BYTES:
            raise damaged
        header = self._map[start : start + _LOCAL_HEADER_BYTES]
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        name_start = start + _LOCAL_HEADER_BYTES
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8_FLAG else "cp437")
        if header[:4] != _LOCAL_HEADER_MAGIC or self._map[name_start : name_start + name_length] != name:
            raise damaged
        data_start = name_start + name_length + extra_length
        if data_start + entry.compress_size > len(self._map):
            raise damaged
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise damaged
        return memoryview(self._map)[data_start : data_start + entry.compress_size]

    def _undamaged(self, entry: zipfile.ZipInfo) -> memoryview:
        data = self._read(entry)
        # torch.save can be told not to compute checksums, and then writes zeros.
        if entry.CRC and entry.filename not in self._checked:
            if zlib.crc32(data) != entry.CRC:
                raise CheckpointError(f"{self.path} is damaged (checksum of {entry.filename}): download it again")
            self._checked.add(entry.filename)
        return data

    def _read(self, entry: zipfile.ZipInfo) -> memoryview:
        raw = self._locate(entry)
        if entry.compress_type == zipfile.ZIP_STORED:
            return raw
        if entry.compress_type != zipfile.ZIP_DEFLATED:
            raise CheckpointError(f"{self.path} uses zip compression method {entry.compress_type}: re-save it")
        decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # One byte above the promised size, so that a longer stream shows without being unpacked.
            data = decompressor.decompress(raw, entry.file_size + 1)
        except (zlib.error, MemoryError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: entry {entry.filename!r} cannot be decompressed: {error}") from error
        if len(data) != entry.file_size:
            raise CheckpointError(f"{self.path} is damaged: entry {entry.filename!r} has another size than it says")
        return memoryview(data)


def _require_zip(path: Path, mapped: mmap.mmap) -> None:
    if mapped[:4] == _LOCAL_HEADER_MAGIC:
        return
    tar_magic = mapped[_TAR_MAGIC_OFFSET : _TAR_MAGIC_OFFSET + len(_TAR_MAGIC)]
    if mapped[:1] == _PICKLE_MAGIC or tar_magic == _TAR_MAGIC:
        raise CheckpointError(
            f"{path} has the file format that PyTorch used before version 1.6: load it with PyTorch and "
            "re-save it with torch.save of a current PyTorch"
        )
    raise CheckpointError(f"{path} is not a PyTorch checkpoint: it is neither a zip archive nor a pickle")


def _read_directory(path: Path) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:  # zipfile lets ValueError, struct.error, UnicodeDecodeError and others through
        raise CheckpointError(f"{path} is damaged or not completely downloaded: {error}") from error
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise CheckpointError(f"{path} is damaged: several entries of the archive have the same name")
    if any(info.flag_bits & _ENCRYPTED_FLAG for info in infos):
        raise CheckpointError(f"{path} is an encrypted zip archive")
    return entries
