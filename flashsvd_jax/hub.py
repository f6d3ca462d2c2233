"""A model's folder, from a path or from the Hugging Face hub."""

from pathlib import Path

from flashsvd_jax.errors import ModelNotFoundError, first_line

# Weights and what describes them; never code.
CHECKPOINT_FILES = [
    "*.json",
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.model",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
]
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]


def resolve_model(path_or_hub_id: str | Path, wanted: list[str] | None = None) -> Path:
    """A local folder or file as it is; anything else is taken for a hub id and downloaded, or found in the hub's own cache.

    Args:
      path_or_hub_id: a path, or `owner/name`, `owner/name@revision`, `owner/name::subfolder`.
      wanted: patterns of the files to download; by default weights as safetensors, configuration and tokenizer.

    Raises:
      ModelNotFoundError: neither exists, or the download did not finish.
    """
    local = Path(path_or_hub_id).expanduser()
    if local.exists():
        return local
    text = str(path_or_hub_id)
    name, _, subfolder = text.partition("::")
    name, _, revision = name.partition("@")
    if name.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ModelNotFoundError(f"{text}: no such file or folder, and not a hub id of the form owner/name")
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = wanted or _MODEL_FILES
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[f"{subfolder}/{p}" for p in patterns] if subfolder else patterns,
        )
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(f"{name} is not here, and the hub cannot be reached to download it") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelNotFoundError(f"{name} cannot be had from the hub: {first_line(error)}") from error
    except (OSError, httpx.HTTPError) as error:
        raise ModelNotFoundError(
            f"downloading {name} was interrupted ({first_line(error)}); run the same command to go on with it"
        ) from error
    path = Path(folder) / subfolder
    if not path.is_dir():
        raise ModelNotFoundError(f"{name} has no folder {subfolder!r}")
    return path
