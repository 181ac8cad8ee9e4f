"""Nothing in this folder is collected without CuPy and a GPU that it can use."""

import pytest


def _usable() -> bool:
    try:
        import cupy
    except ImportError:
        return False
    return cupy.cuda.is_available()


collect_ignore_glob = [] if _usable() else ["test_*.py"]


if _usable():
    import refpeft.cuda  # noqa: F401  its pairs register themselves


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.filterwarnings("default:::cupy"))  # CuPy's own warnings are no errors of ours
