"""Naming a model: a path, a hub id, and what is said when neither can be had. The hub itself is never asked."""

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from flashsvd_jax.errors import ModelNotFoundError
from flashsvd_jax.hub import CHECKPOINT_FILES, resolve_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Stands in for the hub: records what it is asked for, and answers with a folder or an error."""

    class Hub:
        answer: Path | Exception = tmp_path
        asked: tuple[Any, ...] = ()

        def download(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            self.asked = (name, revision, allow_patterns)
            if isinstance(self.answer, Exception):
                raise self.answer
            return str(self.answer)

    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.download)
    return stand_in


def test_what_is_there_is_taken_as_it_is(hub: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.touch()
    assert resolve_model(file) == file and resolve_model(str(tmp_path)) == tmp_path
    assert hub.asked == ()


def test_a_hub_id_names_revision_and_subfolder(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    assert resolve_model("owner/name@abc::part", CHECKPOINT_FILES) == tmp_path / "part"
    assert hub.asked == ("owner/name", "abc", [f"part/{pattern}" for pattern in CHECKPOINT_FILES])


def test_code_is_never_downloaded(hub: Any) -> None:
    resolve_model("owner/name")
    assert not any(pattern in ("*", "*.py") for pattern in hub.asked[2])


@pytest.mark.parametrize("name", ["no-such-folder", "./owner/name", "/nowhere/else", "a/b/c"])
def test_what_is_neither_path_nor_hub_id_is_said_to_be(hub: Any, name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file or folder, and not a hub id"):
        resolve_model(name)
    assert hub.asked == ()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "owner/name is not here, and the hub cannot be reached"),
        (
            httpx.ReadError("connection reset"),
            "downloading owner/name was interrupted .connection reset.; run the same command",
        ),
        (
            OSError("connection reset"),
            "downloading owner/name was interrupted .connection reset.; run the same command",
        ),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "owner/name cannot be had from the hub"),
    ],
)
def test_a_failed_download_is_one_error(hub: Any, error: Exception, message: str) -> None:
    hub.answer = error
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_model("owner/name")


def test_a_missing_subfolder_is_named(hub: Any) -> None:
    with pytest.raises(ModelNotFoundError, match="owner/name has no folder 'absent'"):
        resolve_model("owner/name::absent")
