"""Where a model's files are. Imports no torch, so that a wrong name is refused at once."""

from __future__ import annotations

from pathlib import Path

from hubpeer.errors import SettingsError, Unavailable

GATED = (
    "meta-llama models are gated: accept the licence at https://huggingface.co/{name}, then either run `hf auth login` (or set "
    "HF_TOKEN) and start again, or download it with `hf download {name} --local-dir DIR` and set model.name = DIR"
)


def find(name: str) -> Path:
    """The folder of the model `name`: a path, or a hub name that is downloaded (or was, before)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise SettingsError(f"model.name = {name!r}: there is no such folder, and it is no hub name (owner/model)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except GatedRepoError as exc:
        raise SettingsError(f"model.name = {name!r}: {GATED.format(name=name)}") from exc
    except RepositoryNotFoundError as exc:
        raise SettingsError(f"model.name = {name!r}: the hub knows no such model, or your token may not see it") from exc
    except (LocalEntryNotFoundError, OSError) as exc:
        raise Unavailable(
            "model_unavailable",
            f"{name} is not on this machine and cannot be downloaded now ({type(exc).__name__}); download it elsewhere with "
            f"`hf download {name} --local-dir DIR` and set model.name = DIR. {GATED.format(name=name)}",
        ) from exc
