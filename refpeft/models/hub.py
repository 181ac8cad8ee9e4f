"""From what a user calls a model (a path, the embedded one, an id on the Hugging Face hub) to files on this machine."""

import difflib
import importlib.resources
import os
import re
from pathlib import Path

from refpeft.errors import RefpeftError
from refpeft.files import expanded, read_json

EMBEDDED = "embedded"  # as a model or as a data file: what ships in the package

_HUB_ID = re.compile(r"(?!.*(\.\.|--))[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
# Nothing pickled, no files of other frameworks, and not Mistral's second copy of its weights.
_WANTED = ["*.safetensors", "*.json", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]


def resolve(model: str, revision: str | None = None) -> Path:
    """The directory or .gguf file of a model.

    model: a directory, a .gguf file, `embedded` (the model inside the package), or a hub id (`org/name`), which is
    looked for in the local cache and then downloaded; `revision` is a branch, tag or commit of a hub id. Raises
    RefpeftError, with the nearest names that exist here, if there is no such model.
    """
    path = expanded(model)
    if model == EMBEDDED:
        path = Path(str(importlib.resources.files("refpeft") / "embedded"))
    if model and os.path.exists(path):  # not path.exists(), which raises for names that are too long
        if revision is not None:
            raise RefpeftError(
                f"{model} is on this machine, but a revision ({revision}) was given: that is for hub ids"
            )
        if not path.is_dir() and path.suffix != ".gguf":
            raise RefpeftError(f"{model} is a file; expected a directory with config.json and weights, or a .gguf file")
        return path
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(model):
        raise RefpeftError(f"{model}: there is no such directory or .gguf file{_nearest(model)}")
    return _cached(model, revision) or _downloaded(model, revision)


def _cache() -> Path:
    """Where huggingface_hub keeps its downloads, by its own environment variables."""
    if "HF_HUB_CACHE" in os.environ:
        return expanded(os.environ["HF_HUB_CACHE"])
    if "HF_HOME" in os.environ:
        return expanded(os.environ["HF_HOME"]) / "hub"
    return expanded(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface" / "hub"


def _cached(model: str, revision: str | None) -> Path | None:
    """The snapshot in the local cache, if it is there with all its weights. Needs no network."""
    home = _cache() / ("models--" + model.replace("/", "--"))
    revision = revision or "main"
    if ".." in revision or revision.startswith("/"):
        raise RefpeftError(f"revision {revision!r} is not the name of a branch, tag or commit")
    reference = home / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = home / "snapshots" / commit
    return snapshot if _whole(snapshot) else None


def _whole(snapshot: Path) -> bool:
    if not (snapshot / "config.json").is_file():
        return False
    if (snapshot / "model.safetensors").is_file():
        return True
    index = snapshot / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map") if index.is_file() else None
    return isinstance(shards, dict) and all((snapshot / str(shard)).is_file() for shard in shards.values())


def _downloaded(model: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise RefpeftError(
            f"{model} is not in {_cache()}; downloading needs huggingface_hub: pip install huggingface_hub"
        ) from None
    try:
        found = snapshot_download(
            model, revision=revision, cache_dir=_cache(), allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except Exception as error:  # the network's, the hub's and the disk's exceptions have no common base
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RefpeftError(
            f"{model} is neither a path nor in {_cache()}, and could not be downloaded: {reason}{_nearest(model)}"
        ) from None
    return Path(found)


def _nearest(model: str) -> str:
    """A question with names like this one: neighbours of the path, models in the cache, the embedded one."""
    path = expanded(model)
    names = {EMBEDDED: EMBEDDED, **{_id(home): _id(home) for home in _cache().glob("models--*")}}
    if os.path.isdir(path.parent) and os.access(path.parent, os.R_OK):
        for entry in path.parent.iterdir():
            if entry.suffix == ".gguf" or os.path.isfile(entry / "config.json"):
                names[entry.name] = str(entry)
    close = {names[name] for key in (model, path.name) for name in difflib.get_close_matches(key, names, 3, 0.6)}
    return f"; did you mean {' or '.join(sorted(close))}?" if close else ""


def _id(home: Path) -> str:
    return home.name.removeprefix("models--").replace("--", "/")
