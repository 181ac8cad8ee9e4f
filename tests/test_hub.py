import os
from pathlib import Path

import huggingface_hub
import pytest

from refpeft.errors import RefpeftError
from refpeft.files import write_json
from refpeft.models import hub


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current directory, an empty cache, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))

    def offline(*args, **options):
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    return tmp_path


def cached(cache: Path, model: str, commit: str = "abc123", names=("config.json", "model.safetensors")) -> Path:
    home = cache / ("models--" + model.replace("/", "--"))
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in names:
        (snapshot / name).write_text("{}")
    return snapshot


def fails(*words: str, model: str, revision: str | None = None) -> None:
    with pytest.raises(RefpeftError) as error:
        hub.resolve(model, revision)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_and_a_gguf_file_are_themselves(here):
    (here / "model").mkdir()
    (here / "x.gguf").write_text("")
    assert hub.resolve("model") == Path("model")
    assert hub.resolve(str(here / "x.gguf")) == here / "x.gguf"


def test_another_file_and_a_revision_of_a_path_are_refused(here):
    (here / "model.safetensors").write_text("")
    (here / "model").mkdir()
    fails("is a file; expected a directory", model="model.safetensors")
    fails("that is for hub ids", model="model", revision="main")


def test_the_embedded_model_is_in_the_package():
    assert hub.resolve("embedded") == Path(hub.__file__).parents[1] / "embedded"


def test_a_hub_id_is_found_in_the_cache_by_branch_and_commit(here):
    snapshot = cached(here / "cache", "org/model-1.5")
    assert hub.resolve("org/model-1.5") == snapshot
    assert hub.resolve("org/model-1.5", "abc123") == snapshot
    assert hub.resolve("org/model-1.5", "main") == snapshot
    fails("could not be downloaded: no network", model="org/model-1.5", revision="v2")
    fails("is not the name of a branch", model="org/model-1.5", revision="../../x")


def test_the_cache_is_where_huggingface_hub_has_it(here, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(here / "hf"))
    snapshot = cached(here / "hf" / "hub", "gpt2")
    assert hub.resolve("gpt2") == snapshot
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "xdg"))
    snapshot = cached(here / "xdg" / "huggingface" / "hub", "gpt2")
    assert hub.resolve("gpt2") == snapshot


def test_a_snapshot_that_lacks_a_shard_is_downloaded_again(here, monkeypatch):
    names = ("config.json", "model-1-of-2.safetensors")
    snapshot = cached(here / "cache", "org/model", names=names)
    places = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    write_json(snapshot / "model.safetensors.index.json", {"weight_map": places})
    fails("no network", model="org/model")
    (snapshot / "model-2-of-2.safetensors").write_text("")
    assert hub.resolve("org/model") == snapshot


def test_only_safetensors_json_and_templates_are_downloaded(here, monkeypatch):
    asked = {}

    def download(model, **options):
        asked.update(options, model=model)
        return str(here / "downloaded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("org/model", "v1") == here / "downloaded"
    assert asked["model"] == "org/model" and asked["revision"] == "v1" and asked["cache_dir"] == here / "cache"
    files = ["model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json", "pytorch_model.bin"]
    files += ["onnx/config.json", "consolidated.safetensors", "modeling_x.py", "model.gguf"]
    kept = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == files[:4]


def test_errors_name_what_is_near(here):
    for name in ("models/SmolLM2-135M", "models/other"):
        os.makedirs(here / name)
        write_json(here / name / "config.json", {})
    (here / "SmolLM2.gguf").write_text("")
    cached(here / "cache", "HuggingFaceTB/SmolLM2-135M")
    fails("no such directory", "did you mean models/SmolLM2-135M?", model="./models/SmolLM2-135")
    fails("no such directory", "did you mean SmolLM2.gguf?", model="SmolLM.gguf")
    fails("could not be downloaded", "HuggingFaceTB/SmolLM2-135M", model="HuggingFaceTB/SmolLM2-135")
    fails("did you mean embedded?", model="embeded")


@pytest.mark.parametrize(
    "model", ["a/b/c", "", "a b", "../x", "a//b", "org/..", "x\0y", "a--b/c", "~nobody-here/x", "x/" * 3000]
)
def test_what_is_neither_path_nor_id_is_one_line(model):
    fails("there is no such directory or .gguf file", model=model)
