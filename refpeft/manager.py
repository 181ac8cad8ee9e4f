"""Plugins: Python files found by path, listed without being run, imported when one is named.

Found are the files of the shipped `plugins/`, then what `add` was given (`-p`, `--plugins-dir`,
`refpeft.load(plugins=...)`), then REFPEFT_PLUGINS. There are no entry points, and nothing is taken from the current
directory unasked. pluggy checks a plugin against `refpeft.hookspecs` when it is loaded; after that `hook` hands out
plain functions, so that pluggy is in no inner loop.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pluggy

from refpeft import hookspecs
from refpeft.errors import RefpeftError, nearest

FAMILIES = ("additive", "soft prompt", "selective", "reparametrisation", "hybrid")
"""Of methods, in arXiv:2303.15647's words; a plugin says its own as FAMILY."""

_pm = pluggy.PluginManager("refpeft")
_pm.add_hookspecs(hookspecs)
_added: dict[Path, str | None] = {}  # files from `add`, with the module name where one was given


@dataclass(frozen=True)
class Option:
    """A field of a plugin's Config, as its source text has it; `note` is the comment at the line's end."""

    name: str
    type: str
    default: str
    note: str


@dataclass(frozen=True)
class Listing:
    """What a plugin's source says of it. `kind` is method, quantizer or application, by the hooks that it has; `family`
    is one of FAMILIES, or "" where the file does not say; `source` is the first paper or page of its docstring."""

    name: str
    kind: str
    family: str
    summary: str
    source: str
    hooks: tuple[str, ...]
    options: tuple[Option, ...]
    path: str


def shipped() -> Path:
    """The folder of the plugins that come with refpeft: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "_plugins"
    return inside if inside.is_dir() else package.parent / "plugins"


def add(*sources: str | Path) -> None:
    """Makes plugins known: each source is a `.py` file, a folder of them, or the name of an importable module.

    Those that are shipped are known already, wherever their names come from.
    """
    before = dict(_added)
    for source in sources:
        _added.update({path: dotted for path, dotted in _files(source).items() if path not in _shipped_files()})
    try:
        find()
    except RefpeftError:  # two of one name: neither stays, or no plugin could be found any more
        _added.clear()
        _added.update(before)
        raise


def sources() -> list[str]:
    """What would have to be added in another process, for the same plugins to be known there."""
    return [dotted or str(path) for path, dotted in _added.items()]


def find() -> dict[str, Path]:
    """Every known plugin file by name, which is the file's stem."""
    named: dict[str, Path] = {}
    from_environment = [source for source in os.environ.get("REFPEFT_PLUGINS", "").split(os.pathsep) if source]
    for path in [*_shipped_files(), *_added, *(path for source in from_environment for path in _files(source))]:
        first = named.setdefault(path.stem, path)
        if first != path:
            raise RefpeftError(f"two plugins are named {path.stem!r}: {first} and {path}; rename one of the files")
    return named


def catalogue() -> dict[str, Listing]:
    """Every known plugin by name, read from its source: no plugin is imported."""
    return {name: read(path) for name, path in sorted(find().items())}


def by_family(listings: Iterable[Listing]) -> dict[str, list[Listing]]:
    """Methods in the order of FAMILIES; those of no family, or of another one, come last."""
    groups: dict[str, list[Listing]] = {family: [] for family in FAMILIES}
    for listing in listings:
        groups.setdefault(listing.family, []).append(listing)
    return {family: group for family, group in groups.items() if group}


def path_of(name: str, kind: str = "") -> Path:
    """The file of the plugin `name`; with `kind`, it must be one ("method" or "quantizer")."""
    known = find()
    if name not in known:
        names = [other for other in known if not kind or read(known[other]).kind == kind]
        command = "quantizers" if kind == "quantizer" else "methods"
        raise RefpeftError(
            f"no {kind or 'plugin'} is named {name!r}{nearest(name, names)} "
            f"(`refpeft {command}` lists them; -p FILE adds one)"
        )
    if kind and (found := read(known[name]).kind) != kind:
        raise RefpeftError(f"{name!r} is not a {kind}: {known[name]} defines a {found}")
    return known[name]


def load(name: str | Path) -> ModuleType:
    """The plugin `name` (or of a file), imported as `refpeft_plugins.<name>` and checked against the hookspecs."""
    if isinstance(name, Path) or name.endswith(".py"):
        add(name)
        name = Path(name).stem
    path = path_of(name)
    key = f"refpeft_plugins.{name}"
    if key in sys.modules and sys.modules[key].__file__ == str(path):
        return sys.modules[key]
    _forget(key)  # another file of this name, from before
    module = _import(path, key)
    try:
        _check(module, path)
        _pm.register(module, key)
    except (RefpeftError, pluggy.PluginValidationError) as error:
        _forget(key)
        raise RefpeftError(str(error)) from None
    return module


def hook(plugin: ModuleType, name: str) -> tuple[Callable, tuple[str, ...]] | None:
    """(function, names of its arguments) of `plugin` for the hook `name`; None where it has none."""
    for implementation in getattr(_pm.hook, name).get_hookimpls():
        if implementation.plugin is plugin:
            return implementation.function, implementation.argnames
    return None


def read(path: Path) -> Listing:
    """A plugin's listing, from the syntax tree of its file."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RefpeftError(f"plugin {path} cannot be read: {error}") from None
    except SyntaxError as error:
        raise RefpeftError(f"plugin {path}:{error.lineno}: {error.msg}") from None
    hooks = tuple(node.name for node in tree.body if isinstance(node, ast.FunctionDef) and _is_hook(node))
    config = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"), None)
    doc = ast.get_docstring(tree) or ""
    source = re.search(r"arXiv:\d{4}\.\d{5}|https://[^\s),;]+", doc)
    options = _options(config, text.splitlines()) if config else ()
    return Listing(
        name=path.stem,
        kind=_kind(hooks),
        family=_constant(tree, "FAMILY"),
        summary=doc.partition("\n")[0],
        source=source[0].rstrip(".:") if source else "",
        hooks=hooks,
        options=options,
        path=str(path),
    )


@functools.cache
def _shipped_files() -> tuple[Path, ...]:
    return tuple(_files(shipped()))


def _files(source: str | Path) -> dict[Path, str | None]:
    """The plugin files that one source names."""
    path = Path(source)
    if path.is_dir():
        return {file.resolve(): None for file in sorted(path.glob("*.py")) if not file.name.startswith("_")}
    if path.is_file():
        if path.suffix != ".py":
            raise RefpeftError(f"plugin {path} is not a Python file: its name must end in .py")
        return {path.resolve(): None}
    text = str(source)
    if path.suffix != ".py" and all(part.isidentifier() for part in text.split(".")):
        try:
            spec = importlib.util.find_spec(text)
        except ImportError:
            spec = None
        if spec and spec.origin:
            return {Path(spec.origin).resolve(): text}
        raise RefpeftError(f"plugin {text!r} is neither a file, nor a folder, nor a module that Python can import")
    raise RefpeftError(f"plugin {text} does not exist")


def _import(path: Path, key: str) -> ModuleType:
    """Runs a plugin file once; a file that raises is one line with the place."""
    dotted = _added.get(path)
    try:
        if dotted:
            module = importlib.import_module(dotted)
        else:
            spec = importlib.util.spec_from_file_location(key, path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[key] = module  # before the file runs: dataclasses look their module up
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(key, None)
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        raise RefpeftError(f"plugin {place} cannot be imported: {type(error).__name__}: {error}") from error
    sys.modules[key] = module
    return module


def _forget(key: str) -> None:
    sys.modules.pop(key, None)
    if _pm.has_plugin(key):
        _pm.unregister(name=key)


def _check(module: ModuleType, path: Path) -> None:
    """Raises RefpeftError where a hook is misspelled, has an argument that no hookspec has, or lacks its decorator."""
    specs = {name: inspect.signature(spec).parameters for name, spec in _specs()}
    marked = []
    for name, function in inspect.getmembers(module, inspect.isfunction):
        place = f"plugin {path}:{function.__code__.co_firstlineno}"
        if _pm.parse_hookimpl_opts(module, name) is None:
            if name in specs and function.__module__ == module.__name__:
                raise RefpeftError(f"{place}: {name} lacks its decorator @hookimpl, so it would never be called")
            continue
        marked.append(name)
        if name not in specs:
            raise RefpeftError(f"{place}: there is no hook {name!r}{nearest(name, specs)}")
        for argument in inspect.signature(function).parameters.values():
            if argument.name not in specs[name]:
                hint = nearest(argument.name, specs[name]) or f"; it may take {', '.join(specs[name])}"
                raise RefpeftError(f"{place}: {name} has no argument {argument.name!r}{hint}")
            if argument.default is not argument.empty:
                raise RefpeftError(
                    f"{place}: {name} gives {argument.name} a default, so it would never be passed: remove it"
                )
    if not marked:
        raise RefpeftError(f"plugin {path} defines no hook: a function decorated with @hookimpl is missing")


def _specs() -> Iterable[tuple[str, Callable]]:
    return (
        (name, f)
        for name, f in inspect.getmembers(hookspecs, inspect.isfunction)
        if _pm.parse_hookspec_opts(hookspecs, name)
    )


def _is_hook(node: ast.FunctionDef) -> bool:
    """Whether a decorator of the function is `hookimpl`, bare, called or as an attribute of something."""
    return any(ast.unparse(d).partition("(")[0].rpartition(".")[2] == "hookimpl" for d in node.decorator_list)


def _constant(tree: ast.Module, name: str) -> str:
    """The text that a file gives to `name`; "" where it gives none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value.value if isinstance(node.value, ast.Constant) else ""
    return ""


def _kind(hooks: Iterable[str]) -> str:
    prefixes = {name.partition("_")[0] for name in hooks}
    return "method" if "peft" in prefixes else "quantizer" if "quant" in prefixes else "application"


def _options(config: ast.ClassDef, lines: list[str]) -> tuple[Option, ...]:
    fields = [node for node in config.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return tuple(
        Option(
            node.target.id,
            ast.unparse(node.annotation),
            ast.unparse(node.value) if node.value else "",
            lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().partition("#")[2].strip(),
        )
        for node in fields
    )
