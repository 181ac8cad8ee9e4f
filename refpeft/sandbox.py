"""The Jinja environment of chat templates: that of transformers, with a budget, for a template is a stranger's code.

Jinja's sandbox keeps a template away from Python's internals. It does not keep it from running forever or from making a
string that fills the memory, so here every loop step, call, filter and operator is paid for, in units of about one
character made or one value looked at. A template that overspends is an error; a real one needs a thousandth of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import ext, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

BUDGET = 200_000_000
LONGEST = 16_000_000  # characters or items of one value
STEP = 100  # price of a loop step, of a call, and of a look at a value inside lists and dicts

# They make long results out of short arguments (or take long over them), and no chat template has a use for them.
_NO_FILTERS = ("center", "filesizeformat", "pprint", "random", "urlize", "wordwrap", "xmlattr")
_NO_STR_METHODS = ("center", "expandtabs", "format_map", "ljust", "rjust", "translate", "zfill")

# Unicode reserves these two for use inside a program: they mark what stands in {% generation %}.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


class Environment(ImmutableSandboxedEnvironment):
    """One template's environment. `begin()` fills the purse before each rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: Callable[[], datetime]):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, ext.loopcontrols],
            finalize=self.searched,
            optimized=False,
        )
        self.begin()
        self.globals = {
            "range": self.globals["range"],  # the sandbox's: at most 100,000 numbers
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": SafeNamespace,
            "raise_exception": raise_exception,
            "strftime_now": lambda form: now().strftime(form),
        }
        filters = {name: f for name, f in self.filters.items() if name not in _NO_FILTERS} | {"tojson": tojson}
        self.filters = {name: self._paid(name, f) for name, f in filters.items()}
        self.tests = {name: self._paid(name, f) for name, f in self.tests.items()}

    def begin(self) -> None:
        self.purse = BUDGET

    def spend(self, units: int) -> bool:
        """Pays, or raises TemplateError. Returns True, so that it can stand in a condition."""
        self.purse -= units
        if self.purse < 0:
            raise TemplateError("it does too much work or makes too much text")
        return True

    def weighed(self, value: Any) -> Any:
        """The value, once it is paid for: a unit for each of its characters or items."""
        size = len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 1
        if size > LONGEST:
            raise TemplateError(f"it makes a value of {size:,} items")
        self.spend(size)
        return value

    def searched(self, value: Any) -> Any:
        """The value, once a look at each character and item inside it, at any depth, is paid for.

        {{ ... }} (this is Jinja's `finalize`), `~` and comparisons go through all of a nested list, perhaps 2^n items.
        """
        self.spend(STEP)
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, dict):
            for key, item in value.items():
                self.searched(key)
                self.searched(item)
        elif isinstance(value, list | tuple | range):
            for item in value:
                self.searched(item)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.spend(STEP)
        if operator == "*":
            self._check_product(left, right)
        elif operator == "**" and (abs(left) > 1e6 or abs(right) > 50):
            raise TemplateError(f"{left} ** {right} is out of bounds")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            self.searched(right)
        return self.weighed(super().call_binop(context, operator, left, right))

    def _check_product(self, left: Any, right: Any) -> None:
        for times, value in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(value, str | list | tuple):
                self.spend(max(times, 0) * len(value))
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 1000:
            raise TemplateError("it multiplies numbers of hundreds of digits")

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if owner is self:  # a payment that _priced put in
            return function(*args)
        self.spend(STEP)
        for value in (*args, *kwargs.values()):
            self.weighed(value)
        if isinstance(owner, str):
            self.weighed(owner)
            self._check_growth(function.__name__, owner, args)
        return self.weighed(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _NO_STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            self.searched([args, kwargs])
            return wrapped(*args, **kwargs)

        return checked

    def _paid(self, name: str, function: Callable) -> Callable:
        """A filter or a test that pays for what it gets and for what it makes."""
        # Jinja passes its context, evaluation context or environment first to filters that are marked for it.
        marked = hasattr(function, "jinja_pass_arg")

        def paid(*args: Any, **kwargs: Any) -> Any:
            self.spend(STEP)
            subject, *rest = args[1:] if marked else args
            for value in (subject, *rest, *kwargs.values()):
                self.weighed(value)
                if isinstance(value, int) and abs(value) > 1_000_000:
                    raise TemplateError(f"{name} gets the number {value}, which is out of bounds")
            self._check_growth(name, subject, (*rest, *kwargs.values()))
            made = function(*args, **kwargs)
            return self.weighed(list(made) if isinstance(made, Iterator) else made)  # `map` and others are lazy

        if marked:
            paid.jinja_pass_arg = function.jinja_pass_arg
        return paid

    def _check_growth(self, name: str, subject: Any, args: tuple) -> None:
        """Pays beforehand for what makes a long text in one go."""
        texts = [a for a in args if isinstance(a, str)]
        if name == "replace" and isinstance(subject, str) and len(texts) >= 2:
            self.spend(subject.count(texts[0]) * len(texts[1]))
        elif name == "join":
            items, glue = (args[0], subject) if isinstance(subject, str) and args else (subject, "".join(texts))
            self.searched(items)
            self.spend(len(glue) * (len(items) if isinstance(items, list | tuple | dict | range) else 1))
        elif name == "indent" and isinstance(subject, str):
            width = max([a if isinstance(a, int) else len(a) for a in args if isinstance(a, int | str)], default=4)
            self.spend(subject.count("\n") * width)
        elif name == "format":
            _check_format(str(subject))
            self.searched(args)
        elif name in ("string", "tojson", "escape", "e", "safe", "trim", "upper", "lower"):
            self.searched([subject, args])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return self._priced(super()._parse(source, name, filename))

    def _priced(self, node: Any) -> Any:
        """The syntax tree with a payment for each loop step, call of a macro, comparison, slice and `~`."""
        for field, value in node.iter_fields():
            if isinstance(value, list):
                setattr(node, field, [self._priced(v) if isinstance(v, nodes.Node) else v for v in value])
            elif isinstance(value, nodes.Node):
                setattr(node, field, self._priced(value))
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            constant = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            node.body.insert(0, nodes.ExprStmt(_call("spend", nodes.Const(STEP + constant))))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(_call("spend", nodes.Const(STEP)), node.test)
        elif isinstance(node, nodes.Concat):
            node.nodes = [_call("searched", part) for part in node.nodes]
            return _call("weighed", node)
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return _call("weighed", node)
        elif isinstance(node, nodes.Compare):
            node.expr = _call("searched", node.expr)
            for operand in node.ops:
                operand.expr = _call("searched", operand.expr)
        return node


class GenerationTag(ext.Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant says. Its text comes out between OPEN and CLOSE."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class SafeNamespace(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):  # no named `self`: a template may call namespace(self=...)
        for key in dict(*args[1:], **kwargs):
            _check_name(key)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace")


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as transformers writes it: no HTML escapes, which Jinja's own filter puts in."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _call(method: str, argument: nodes.Expr) -> nodes.Call:
    attribute = nodes.EnvironmentAttribute(method)
    return nodes.Call(attribute, [argument], [], None, None).set_lineno(argument.lineno or 1)


def _check_format(text: str) -> None:
    """Refuses widths that would make a long text: "%99999999d", "{:>99999999}", or a width that is an argument."""
    if re.search(r"%[^a-zA-Z%]*(\d{4}|\*)|\{[^{}]*(:[^{}]*\d{4}|\{)", text):
        raise TemplateError("it formats with a width out of bounds")
