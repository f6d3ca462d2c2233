"""The zip archives of torch.save: their variants are read, and all that is damaged or something else is refused."""

import zipfile
from pathlib import Path

import pytest
import torch
from torch_archives import repack

from converters.sources import open_source, torch_zip
from flashsvd_jax.errors import CheckpointError

SAVED = {"a": torch.arange(40.0), "b": torch.ones(3)}


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.save(SAVED, tmp_path / "saved.pt")
    return tmp_path / "saved.pt"


def assert_reads_saved(path: Path) -> None:
    with open_source(path) as source:
        assert {name: source.get(name).tolist() for name in source.infos()} == {
            name: tensor.tolist() for name, tensor in SAVED.items()
        }


def rewrite(saved: Path, replace: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    saved.write_bytes(repack(saved.read_bytes(), replace, compression))
    return saved


def test_compressed_archive(saved):
    assert_reads_saved(rewrite(saved, {}, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="compression method"):
        open_source(rewrite(saved, {}, zipfile.ZIP_BZIP2))


def test_compressed_storage_longer_than_it_says(saved):
    rewrite(saved, {"data/0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    size, claimed = (1 << 20).to_bytes(4, "little"), (160).to_bytes(4, "little")
    saved.write_bytes(saved.read_bytes().replace(size, claimed))
    with open_source(saved) as source, pytest.raises(CheckpointError, match="another size"):
        source.get("a")


def test_archive_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(SAVED, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_reads_saved(tmp_path / "model.pt")


def test_zip64_beyond_4_gib(tmp_path, saved):
    path = tmp_path / "large.pt"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            if info.filename.endswith("data/1"):
                new.start_dir = 5 << 30  # leaves a hole in the file, so all that follows is addressed by 64 bits
            new.writestr(info.filename, old.read(info))
    assert path.stat().st_size > 5 << 30
    assert_reads_saved(path)


@pytest.mark.parametrize(
    ("end", "contents", "message"), [("byteorder", b"big", "big-endian"), ("data/1", b"\0" * 11, "cut short")]
)
def test_odd_entries_are_refused(saved, end, contents, message):
    with pytest.raises(CheckpointError, match=message):
        open_source(rewrite(saved, {end: contents}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entry", "message"),
    [("saved/data/0", "same name"), ("other/data.pkl", "2 data.pkl"), ("saved/constants.pkl", "TorchScript")],
)
def test_odd_archives_are_refused(saved, entry, message):
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr(entry, b"")
    with pytest.raises(CheckpointError, match=message):
        open_source(saved)


FLAGS, PACKED_SIZE, SIZE, POSITION, NAME = 8, 20, 24, 42, 46  # where an entry of a zip directory keeps them
LARGE = (1 << 30).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({FLAGS: b"\x01"}, "encrypted"),
        ({PACKED_SIZE: LARGE, SIZE: LARGE}, "damaged at entry 'saved/data/0'"),
        ({PACKED_SIZE: b"\x04"}, "damaged at entry 'saved/data/0'"),
        ({POSITION: LARGE}, "damaged at entry 'saved/data/0'"),
        ({POSITION: b"\0\0"}, "damaged at entry 'saved/data/0'"),
    ],
)
def test_directory_that_does_not_fit_the_file(saved, changes, message):
    contents = bytearray(saved.read_bytes())
    entry = contents.index(b"saved/data/0", contents.index(b"PK\x01\x02")) - NAME
    for position, value in changes.items():
        contents[entry + position : entry + position + len(value)] = value
    saved.write_bytes(contents)
    with pytest.raises(CheckpointError, match=message):
        open_source(saved)


def test_pickle_that_is_too_large(saved, monkeypatch):
    monkeypatch.setattr(torch_zip, "_MAX_PICKLE_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"data\.pkl has \d+ bytes, more than"):
        open_source(saved)


def test_missing_storage_and_missing_pickle(tmp_path, saved):
    for dropped, message in (("saved/data/1", "no storage '1'"), ("saved/data.pkl", "0 data.pkl")):
        with zipfile.ZipFile(saved) as old, zipfile.ZipFile(tmp_path / "less.pt", "w") as new:
            for info in old.infolist():
                if info.filename != dropped:
                    new.writestr(info.filename, old.read(info))
        with pytest.raises(CheckpointError, match=message):
            open_source(tmp_path / "less.pt")


def test_damaged_pickle_is_found_by_its_checksum(saved):
    contents = saved.read_bytes()
    assert contents.count(b"K\x28\x85") == 1  # the shape (40,)
    saved.write_bytes(contents.replace(b"K\x28\x85", b"K\x27\x85"))
    with pytest.raises(CheckpointError, match="checksum"):
        open_source(saved)


def test_damaged_weights_are_found_by_their_checksum(saved):
    contents = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("/data/0"))
    contents[contents.index(b"/data/0", info.header_offset) + 200] ^= 0x40
    saved.write_bytes(contents)
    with open_source(saved) as source, pytest.raises(CheckpointError, match=r"damaged \(checksum of .*/data/0\)"):
        [source.get(name) for name in source.infos()]


def test_other_formats_are_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "tar.pt").write_bytes(b"x".ljust(257, b"\0") + b"ustar\0" + bytes(300))
    for name in ("legacy.pt", "tar.pt"):
        with pytest.raises(CheckpointError, match=r"re-save it with torch\.save"):
            open_source(tmp_path / name)
    (tmp_path / "page.bin").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="neither"):
        open_source(tmp_path / "page.bin")
    torch.save({"numbers": [1, 2]}, tmp_path / "numbers.pt")
    with pytest.raises(CheckpointError, match="no tensors"):
        open_source(tmp_path / "numbers.pt")
