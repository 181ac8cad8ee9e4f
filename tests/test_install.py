"""The same commands work from a wheel, from an editable install and from a bare checkout; what the wheel holds.

Nothing is downloaded: the virtual environments find the dependencies where the interpreter of the tests has them.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="building needs hatchling, of the extra 'test'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# Without the caller's PYTHONPATH; nothing is left in the checkout.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
    "PYTHONDONTWRITEBYTECODE": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


@dataclass(frozen=True)
class Way:
    """One way to have refpeft: how its command and its Python are called, far from the checkout, and where it lies."""

    refpeft: tuple[str | Path, ...]
    python: Path
    folder: Path
    package: Path
    environment: dict[str, str]

    def run(self, *command: str | Path) -> str:
        """What a command prints."""
        return run(*command, cwd=self.folder, environment=self.environment)


def run(*command: str | Path, cwd: Path, environment: dict[str, str] = ENVIRONMENT) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, folder: Path, *targets: str) -> Path:
    """The file that hatchling builds of the sources in `source`; the last one for several targets."""
    chosen = [word for target in targets for word in ("-t", target)]
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, *chosen, cwd=source)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


def fresh_python(folder: Path) -> Path:
    """The Python of a new virtual environment that has the dependencies of this one behind its own packages."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    here = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    Path(packages, "zz-dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(here)))
    return python


@pytest.fixture(scope="module", params=["wheel", "editable", "checkout"])
def way(request, tmp_path_factory):
    """Each of the three ways to have refpeft."""
    folder = tmp_path_factory.mktemp(request.param)
    environment, python = dict(ENVIRONMENT), fresh_python(folder / "venv")
    empty = folder / "empty"
    empty.mkdir()
    if request.param == "checkout":
        environment["PYTHONPATH"] = str(ROOT)
        return Way((python, "-m", "refpeft"), python, empty, ROOT / "refpeft", environment)
    what = [request.getfixturevalue("wheel")] if request.param == "wheel" else ["-e", ROOT]
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", "--no-build-isolation", "--force-reinstall", *what, cwd=empty)
    package = next(folder.rglob("site-packages")) / "refpeft" if request.param == "wheel" else ROOT / "refpeft"
    return Way((python.with_name("refpeft"),), python, empty, package, environment)


def test_the_listings_name_every_shipped_plugin(way):
    methods = json.loads(way.run(*way.refpeft, "methods", "--json"))
    quantizers = json.loads(way.run(*way.refpeft, "quantizers", "--json"))
    listed = {Path(plugin["path"]) for plugin in methods + quantizers}
    assert {path.name for path in listed} == {path.name for path in (ROOT / "plugins").glob("*.py")}
    inside = way.package / "_plugins"
    assert {path.parent for path in listed} == {inside if inside.is_dir() else ROOT / "plugins"}


def test_the_embedded_model_and_the_golden_cases_are_there(way):
    code = (
        "import refpeft\n"
        "from refpeft.conformance import vectors\n"
        "model = refpeft.load('embedded')\n"
        "assert vectors.altered() == []\n"
        "print(refpeft.__file__, model.parameters(), len(vectors.cases()), vectors.root(), sep='\\n')\n"
    )
    file, parameters, cases, root = way.run(way.python, "-c", code).splitlines()
    assert Path(file) == way.package / "__init__.py"
    assert int(parameters) > 1_000_000
    assert int(cases) == len(list((ROOT / "golden" / "v1").rglob("*.json")))
    assert Path(root) == (way.package / "_golden" if way.package.parent != ROOT else ROOT / "golden")


def test_training_the_embedded_model_leaves_an_adapter(way):
    found = json.loads(way.run(*way.refpeft, "train", "--steps", "2", "--json"))
    assert found["steps"] == 2
    written = {path.name for path in (way.folder / found["directory"]).iterdir()}
    assert written >= {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "run.toml"}


def test_the_kernels_are_where_their_python_looks_for_them(way):
    code = "import refpeft, pathlib; print(*(pathlib.Path(refpeft.__file__).parent / 'cuda').glob('*.cu*'))"
    found = {Path(name) for name in way.run(way.python, "-c", code).split()}
    assert {file.parent for file in found} == {way.package / "cuda"}
    assert {file.name for file in found} == {file.name for file in (ROOT / "refpeft" / "cuda").glob("*.cu*")}


def test_the_doctor_finds_nothing_broken(way):
    found = json.loads(way.run(*way.refpeft, "doctor", "--json"))
    assert {finding["what"] for finding in found} >= {"Python", "NumPy", "CuPy"}


def test_a_checkout_needs_no_path_for_whoever_stands_in_it(tmp_path):
    assert "lora" in run(fresh_python(tmp_path), "-m", "refpeft", "methods", cwd=ROOT)


def test_the_wheel_is_the_package_with_plugins_and_vectors_inside(wheel):
    homes = {"refpeft": "refpeft", "refpeft/_plugins": "plugins", "refpeft/_golden/v1": "golden/v1"}
    expected = {
        f"{inside}/{path.relative_to(ROOT / outside).as_posix()}"
        for inside, outside in homes.items()
        for path in (ROOT / outside).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    documents = ("MANIFEST.json", "README.md", "case.schema.json", "notes.json")
    with zipfile.ZipFile(wheel) as archive:
        files = {entry.filename: entry for entry in archive.infolist() if ".dist-info/" not in entry.filename}
        modes = {name: oct(entry.external_attr >> 16 & 0o777) for name, entry in files.items()}
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    assert files.keys() == expected | {f"refpeft/_golden/{name}" for name in documents}
    assert set(modes.values()) == {"0o644"}
    assert "\nRequires-Dist: torch" not in metadata.partition("\nProvides-Extra:")[0]


def test_the_sdist_gives_the_same_wheel(wheel, tmp_path):
    sdist = build(ROOT, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sources", filter="data")
    (sources,) = (tmp_path / "sources").iterdir()
    assert {path.name for path in sources.iterdir()} >= {"pyproject.toml", "README.md", "LICENSE", "tests", "golden"}
    again = build(sources, tmp_path / "wheel", "wheel")
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {e.filename: e.CRC for e in first.infolist()} == {e.filename: e.CRC for e in second.infolist()}
