"""How many numbers a method trains, by its docstring: "r (in + out) numbers a target", "tokens dim numbers in all"."""

from __future__ import annotations

import ast
import dataclasses
import operator
import re
from fractions import Fraction
from typing import Any

from refpeft.conformance.check.findings import Failed, NotApplicable
from refpeft.conformance.check.subjects import Method, own
from refpeft.layers import Layer
from refpeft.sites import Adapter

_SIZES = {
    "linear": ("out", "in"),
    "embedding": ("vocab", "dim"),
    "norm": ("dim",),
    "attention": ("kv_heads", "head_dim"),
    "block": ("dim", "in", "out"),
}
_STATED = re.compile(r"([^,:;.]*?(?:\([^()]*\)[^,:;.()]*?)*?) numbers (?:a (target|place|layer)\b(?! of)|in all)")
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?)|([A-Za-z_]\w*)|(.))")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def number_of_parameters(method: Method) -> str:
    """What each site has, against the docstring's formula of options and of the site's sizes."""
    said = stated(method.plugin.__doc__ or "")
    if said is None:
        raise NotApplicable(
            'the docstring has no formula: add one such as "Trained: A (r, in), B (out, r): r (in + out) numbers a '
            'target." of options and of out, in, vocab, dim, kv_heads, head_dim'
        )
    text, each = said
    counted = 0
    for family in method.families or [method.first]:
        _, adapter = method.attached(family, moved=False)
        for layer in list(own(adapter))[: None if each else 1]:
            formula = evaluated(text, method.cfg, layer)
            where, found = (layer.site.name, _trained(adapter, layer)) if each else (family, adapter.size)
            if formula != found and method.options:
                raise NotApplicable(f"`{text}` of the docstring is not that of these options")
            if formula != found:
                what = f"`{text}` of the docstring is {float(formula):,g}"
                raise Failed(f"{where} has {found:,} numbers, and {what}: mend one of them")
            counted += 1
    return f"`{text}` at {counted} sites" if each else f"`{text}` in all"


def stated(doc: str) -> tuple[str, bool] | None:
    """(the formula that a docstring states, whether it is for each site and not for all together), or None."""
    match = _STATED.search(" ".join(doc.replace("`", "").split()))
    return (match[1].strip(), bool(match[2])) if match and match[1].strip() else None


def evaluated(text: str, cfg: Any, layer: Layer) -> Fraction:
    """The formula's value at a site. Raises NotApplicable where it has names or signs that are not known."""
    kind, shape = layer.site.kind, layer.site.shape
    names = dict(zip(_SIZES[kind], shape * 3 if kind == "block" else shape, strict=True))
    options = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)} if cfg is not None else {}
    names |= {name: number for name, number in options.items() if type(number) in (int, float)}
    parts: list[str] = []
    for number, name, sign in _TOKEN.findall(text):
        if name and name not in names:
            raise NotApplicable(f"`{text}` of the docstring has {name!r}, which is no option and no size of a site")
        part = f"Fraction({str(names[name])!r})" if name else f"Fraction({number!r})" if number else sign
        if parts and (number or name or sign == "(") and parts[-1] not in "+-*/(^":  # side by side: a product
            parts.append("*")
        parts.append(part)
    try:
        return _value(ast.parse("".join(parts).replace("^", "**"), mode="eval").body)
    except (SyntaxError, KeyError, AttributeError):
        raise NotApplicable(f"`{text}` of the docstring is not understood: write it with + - * / ^ and ( )") from None
    except ZeroDivisionError:
        raise NotApplicable(
            f"`{text}` of the docstring divides by an option that is 0, which each site chooses"
        ) from None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    return Fraction(node.args[0].value)  # what `evaluated` wrote


def _trained(adapter: Adapter, layer: Layer) -> int:
    """How many numbers the site trains itself, without those that it shares."""
    names = {f"{layer.site.name}.{key}": value for key, value in layer.values.items()}
    return sum(value.data.size for name, value in names.items() if adapter.params.get(name) is value)
