"""What a plugin's file says of it: hooks, docstring, Config, and array code where operations belong."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refpeft import manager
from refpeft.config import plugin_options
from refpeft.conformance.check.findings import Failed, NotApplicable
from refpeft.errors import RefpeftError, few
from refpeft.layers import INPUTS

_FORWARD = {*(f"peft_{kind}" for kind in INPUTS), "peft_penalty", "peft_objective"}


def hooks(subject: Any) -> str:
    """Their names and arguments were looked at when the plugin was loaded."""
    return ", ".join(subject.listing.hooks)


def docstring(subject: Any) -> str:
    listing = subject.listing
    if not listing.summary:
        raise Failed("there is none: begin the file with a line that says what it is, and where it is defined")
    if not listing.summary.endswith("."):
        raise Failed(f"its first line is {listing.summary!r}: let it be a sentence of one line, with its full stop")
    if not listing.source:
        raise Failed("it names no source: add where the equation is from, such as arXiv:2106.09685 or https://...")
    return f"source {listing.source}"


def family(subject: Any) -> str:
    known = ", ".join(map(repr, manager.FAMILIES))
    if not subject.listing.family:
        raise Failed(f"the file has no FAMILY: add FAMILY = and one of {known}")
    if subject.listing.family not in manager.FAMILIES:
        raise Failed(f"FAMILY is {subject.listing.family!r}: expected one of {known}")
    return subject.listing.family


def config(subject: Any) -> str:
    """A frozen dataclass with defaults, which a file of an adapter can hold and which are accepted from there."""
    made = getattr(subject.plugin, "Config", None)
    if made is None:
        if getattr(subject, "kinds", ()):
            raise Failed("there is no Config: add a frozen dataclass with a field `targets`, the sites it acts on")
        raise NotApplicable("there is none: the plugin has no options")
    if not dataclasses.is_dataclass(made) or not made.__dataclass_params__.frozen:
        raise Failed("Config can be changed: write @dataclass(frozen=True) above it")
    fields = dataclasses.fields(made)
    without = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if without:
        raise Failed(f"Config.{without[0]} has no default: give it one, that of the paper")
    if getattr(subject, "kinds", ()) and "targets" not in {f.name for f in fields}:
        raise Failed('Config has no `targets`: add targets: tuple[str, ...] | str = ("@q", "@v"), or where it acts')
    cfg = plugin_options(subject.plugin, subject.options)
    try:
        stored = json.loads(json.dumps(dataclasses.asdict(cfg)))
    except TypeError as error:
        raise Failed(f"Config cannot be written to an adapter's file: {error}; let fields be what JSON has") from None
    try:
        again = plugin_options(subject.plugin, stored)
    except RefpeftError as error:
        raise Failed(f"it refuses its own values, as an adapter's file gives them: {error}") from None
    if again != cfg:
        raise Failed(f"from an adapter's file it is another: {again} instead of {cfg}; check __post_init__ and types")
    return few([f.name for f in fields], 12)


# ---- array code in forward hooks -------------------------------------------------------------------------------------


def operations(subject: Any) -> str:
    """In hooks of the forward pass values are Tensors: what is computed from an array inside has no gradient."""
    tree = ast.parse(Path(subject.path).read_text("utf-8"))
    problems = sorted({(node.lineno, why) for hook in _forward(tree) for node, why in _raw(hook)})
    if problems:
        raise Failed("; ".join(f"line {line}: {why}" for line, why in problems))
    return "no array code on Tensors in the hooks of the forward pass"


def _forward(tree: ast.Module) -> list[ast.FunctionDef]:
    """The hooks that are given Tensors, and the file's functions that they call."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    wanted = [name for name in functions if name in _FORWARD]
    for name in wanted:
        called = {
            n.func.id for n in ast.walk(functions[name]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        wanted += [other for other in functions if other in called and other not in wanted]
    return [functions[name] for name in wanted]


def _raw(function: ast.FunctionDef) -> Iterator[tuple[ast.expr, str]]:
    """Reads of `.data` that become part of a result: operands, arguments of numpy's functions and of Tensor()."""
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr == "data":
            user = _user(node, parents)
            if isinstance(user, ast.BinOp):
                yield node, f"`{ast.unparse(user)}` is computed with arrays, and no gradient passes: leave .data out"
            elif isinstance(user, ast.Call):
                name = ast.unparse(user.func)
                instead = (
                    "hand the Tensor on, or ops.detach() of it" if name == "Tensor" else "compute with refpeft.ops"
                )
                yield node, f"no gradient passes through `{ast.unparse(user)}`: {instead}"
    for node in ast.walk(function):
        if _is_read(node):
            inside = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr == "data"]
            if inside:
                yield node, f"`{ast.unparse(node)}` reads a value on the host: keep it an array"


def _user(node: ast.expr, parents: dict[ast.AST, ast.AST]) -> ast.AST | None:
    """The arithmetic, or the call of numpy or Tensor, that an array goes into; None where nothing comes of it."""
    inner, outer = node, parents.get(node)
    while isinstance(outer, ast.expr):
        if isinstance(outer, ast.Compare) or (isinstance(outer, ast.Subscript) and outer.slice is inner):
            return None
        if isinstance(outer, ast.BinOp):
            return outer
        if isinstance(outer, ast.Call):
            if inner is outer.func:  # x.data.astype(...): go on with what it gives
                inner, outer = outer, parents.get(outer)
                continue
            name = ast.unparse(outer.func)
            return outer if name == "Tensor" or name.startswith(("np.", "numpy.")) else None
        inner, outer = outer, parents.get(outer)
    return None


def _is_read(node: ast.AST) -> bool:
    """Whether it is a call that makes a number of Python's of an array."""
    if not isinstance(node, ast.Call):
        return False
    method = isinstance(node.func, ast.Attribute) and node.func.attr in ("item", "tolist")
    return method or ast.unparse(node.func) in ("float", "int", "bool")
