"""`refpeft doctor`, and what `--device cuda` says where it cannot be used: machines are imitated, no GPU is needed."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner

from refpeft import backend, doctor
from refpeft.cli import main
from refpeft.doctor import BROKEN, MISSING, OK, Finding
from refpeft.errors import RefpeftError


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


class Machine:
    """What a test says of CuPy, the driver and the GPU, in the place of this machine's own."""

    def __init__(self, monkeypatch, tmp_path):
        self._patch, self._wheels = monkeypatch, {}
        monkeypatch.setattr(doctor, "_wheels", lambda: self._wheels)
        monkeypatch.setattr(doctor, "_cuda_of_driver", lambda: None)
        monkeypatch.setattr(doctor, "_driver_version", lambda: "")
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        backend.module.cache_clear()

    def has(self, wheels: dict[str, str], driver: int = 0, cuda: int = 13020, gpus: int | str = 0, headers=True):
        """CuPy wheels, the driver's and CuPy's CUDA, how many GPUs (or the error), whether there are CUDA's headers."""

        def count() -> int:
            if isinstance(gpus, str):
                raise CUDARuntimeError(gpus)
            return gpus

        self._wheels = wheels
        self._patch.setattr(doctor, "_cuda_of_driver", lambda: driver or None)
        runtime = SimpleNamespace(
            driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: cuda,
            getDeviceCount=count,
            CUDARuntimeError=CUDARuntimeError,
        )
        cupy, pathfinder, namespace = ModuleType("cupy"), ModuleType("cuda.pathfinder"), ModuleType("cuda")
        cupy.cuda = SimpleNamespace(runtime=runtime)
        pathfinder.find_nvidia_header_directory = lambda name: "/somewhere/include" if headers else None
        namespace.pathfinder = pathfinder
        for name, module in {"cupy": cupy, "cuda": namespace, "cuda.pathfinder": pathfinder}.items():
            self._patch.setitem(sys.modules, name, module)

    def refused(self) -> str:
        """What a run with --device cuda says."""
        with pytest.raises(RefpeftError) as refused:
            backend.module("cuda")
        return str(refused.value)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    there = set(sys.modules)
    yield Machine(monkeypatch, tmp_path)
    backend.module.cache_clear()
    for name in sys.modules.keys() - there:
        if name.startswith("refpeft.cuda"):  # imported over what imitates CuPy
            del sys.modules[name]


WHEEL = {"cupy-cuda13x": "14.2.0"}
TOO_OLD = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"


# ---- one line with the remedy ----------------------------------------------------------------------------------------


def test_without_cupy_it_is_to_be_installed(machine):
    assert "CuPy is not installed: pip install 'refpeft[cuda13]' (or [cuda12]" in machine.refused()


@pytest.mark.parametrize(("driver", "extra"), [(12080, "cuda12"), (13000, "cuda13"), (14010, "cuda13")])
def test_the_extra_is_the_one_that_the_driver_can_run(machine, monkeypatch, driver, extra):
    monkeypatch.setattr(doctor, "_cuda_of_driver", lambda: driver)
    assert f"CuPy is not installed: pip install 'refpeft[{extra}]'. `refpeft doctor`" in machine.refused()


def test_two_wheels_of_cupy_are_told(machine):
    machine.has({"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"}, driver=13000, gpus=1)
    said = machine.refused()
    assert "cupy-cuda12x and cupy-cuda13x are both installed and overwrite each other's files" in said
    assert "pip uninstall -y cupy-cuda12x cupy-cuda13x; pip install 'refpeft[cuda13]'" in said


def test_a_cupy_that_cannot_be_imported_is_told_with_its_reason(machine, monkeypatch, tmp_path):
    machine.has(WHEEL)
    monkeypatch.delitem(sys.modules, "cupy")
    (tmp_path / "cupy.py").write_text(
        "raise ImportError('====\\n\\nOriginal error:\\n  ImportError: libcudart.so.13: not found\\n====')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    said = machine.refused()
    assert "cupy-cuda13x 14.2.0 cannot be imported (ImportError: ImportError: libcudart.so.13: not found)" in said
    assert "pip uninstall -y cupy-cuda13x; pip install 'refpeft[cuda13]'" in said


def test_an_old_cupy_is_refused(machine):
    machine.has({"cupy-cuda12x": "13.6.0"}, driver=12080, cuda=12080, gpus=1)
    assert "cupy-cuda12x 13.6.0 is older than 14.2: pip install 'refpeft[cuda12]' --upgrade" in machine.refused()


def test_no_driver_is_not_called_an_old_one(machine):
    """CUDA's own error is the same for both."""
    machine.has(WHEEL, driver=0, gpus=TOO_OLD)
    assert "cannot be used: there is no NVIDIA driver" in machine.refused()


def test_an_old_driver_is_told_with_both_ways_out(machine):
    machine.has(WHEEL, driver=12040, gpus=TOO_OLD)
    said = machine.refused()
    assert "the driver (for CUDA up to 12.4) is too old for a CuPy of CUDA 13.2" in said
    assert "update the driver, or pip uninstall -y cupy-cuda13x; pip install 'refpeft[cuda12]'" in said


def test_no_gpu_is_told_with_what_hides_it(machine, monkeypatch):
    error = "cudaErrorNoDevice: no CUDA-capable device is detected"
    machine.has(WHEEL, driver=13000, gpus=error)
    assert f"there is no GPU (CUDARuntimeError: {error}): nvidia-smi has to list one" in machine.refused()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES is '-1': unset it" in machine.refused()
    machine.has(WHEEL, driver=13000, gpus=0)
    assert "there is no GPU: CUDA_VISIBLE_DEVICES" in machine.refused()


def test_missing_headers_are_told(machine):
    machine.has(WHEEL, driver=13000, gpus=1, headers=False)
    said = machine.refused()
    assert "CUDA's headers, with which kernels are compiled, are missing: pip install 'refpeft[cuda13]'" in said


def test_every_refusal_is_one_line_and_names_the_doctor(machine):
    machine.has(WHEEL, driver=12040, gpus=TOO_OLD)
    said = machine.refused()
    assert "\n" not in said and said.endswith("`refpeft doctor` says more")


def test_nothing_is_in_the_way_of_a_gpu(machine):
    machine.has(WHEEL, driver=13000, gpus=1)
    assert doctor.obstacle() is None


# ---- the doctor ------------------------------------------------------------------------------------------------------


def found() -> dict[str, Finding]:
    return {finding.what: finding for finding in doctor.examine()}


def test_a_machine_without_a_gpu_is_well(machine):
    seen = found()
    assert seen["Python"].state == seen["NumPy"].state == seen["libraries"].state == OK
    assert seen["CuPy"].state == MISSING and "driver" not in seen
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert "missing  CuPy       CuPy is not installed\n                    pip install" in result.output


def test_cupy_without_a_driver_is_no_fault(machine):
    machine.has(WHEEL, driver=0, gpus=TOO_OLD)
    seen = found()
    assert (seen["CuPy"].state, seen["driver"].state) == (OK, MISSING)
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 0


@pytest.mark.parametrize(
    "has",
    [
        {"wheels": {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"}},
        {"wheels": WHEEL, "driver": 12040, "gpus": TOO_OLD},
        {"wheels": WHEEL, "driver": 13000, "gpus": 0},
    ],
)
def test_what_is_installed_and_does_not_work_is_exit_code_1(machine, has):
    machine.has(**has)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "broken" in result.output


def test_what_breaks_while_it_is_looked_at_is_said_and_the_rest_goes_on(machine):
    """This machine has a GPU by all that is said, and no CuPy that could use it."""
    machine.has(WHEEL, driver=13000, gpus=1)
    seen = found()
    assert [seen[what].state for what in ("CuPy", "driver", "CUDA headers")] == [OK] * 3
    assert [seen[what].state for what in ("GPU", "kernels", "cuBLAS")] == [BROKEN] * 3
    assert seen["kernels"].remedy == "pip install 'refpeft[cuda13]' --force-reinstall"
    assert "gguf" in seen


def test_a_missing_library_is_broken_and_a_missing_extra_is_not(machine, monkeypatch):
    version = importlib.metadata.version

    def without(package: str) -> str:
        if package in ("jinja2", "rouge-score"):
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without)
    seen = found()
    assert seen["libraries"] == Finding("libraries", BROKEN, "jinja2 missing", "pip install jinja2")
    assert seen["metrics"].state == MISSING and "rouge-score" in seen["metrics"].said
    assert seen["metrics"].remedy == "pip install 'refpeft[metrics]'"


def test_as_json_it_is_a_list_of_findings(machine):
    read = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
    assert [finding["what"] for finding in read][:3] == ["Python", "refpeft", "NumPy"]
    assert {finding["state"] for finding in read} <= {OK, MISSING, BROKEN}


def test_the_installed_wheels_of_cupy_are_found_by_their_names(monkeypatch):
    names = ["Cupy-cuda13x", "cupy-cuda12x", "cupy-xarray", "cupyx", None]
    packages = [SimpleNamespace(metadata={"Name": name}) for name in names]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: packages)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "14.2.0")
    assert list(doctor._wheels()) == ["cupy-cuda12x", "cupy-cuda13x"]


def test_it_works_on_this_machine_as_it_is():
    """And leaves nothing behind."""
    environment = os.environ | {"PYTHONPATH": str(Path(doctor.__file__).parents[1])}
    command = [sys.executable, "-m", "refpeft", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    states = {finding["what"]: finding["state"] for finding in json.loads(done.stdout)}
    assert states["NumPy"] == OK
