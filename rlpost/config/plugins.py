"""Turns what a config names - one of our parts or a user's own function - into a callable.

Three forms are accepted wherever a part can be chosen: a name in a table, a dotted path
``package.module.function``, and Hydra's ``{_target_: name or dotted path, key: value}``. Nothing is imported until
:func:`resolve_target` is called; :func:`check_target` checks whether a name can work by only reading source text, so
that ``rlpost check`` never imports torch. Called by ``algos.table``, ``rewards`` and ``prompts.rows``.

A table is ``{name: Part(dotted path)}``; ``algos.table`` and ``rewards`` extend :class:`Part` with what else the
program must know about a part that ships, so that a new part is a function and one line.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlpost.errors import ConfigError, explain

# Modules of rlpost that users name parts of, where they were before version 0.2 -> where they are.
MOVED = {
    f"rlpost.rewards.{name}": f"rlpost.rewards.library.{name}"
    for name in ("answers", "code", "compare_output", "extract_code", "http_service", "math_answers")
}
EXPECTED = "package.module.function, or {_target_: ..., key: value}"


@dataclass(frozen=True, slots=True)
class Part:
    """A part that ships: an entry of a table, whose key is its name. Imported only when resolved."""

    path: str  # dotted


AnyPart = TypeVar("AnyPart", bound=Part)


def resolve_target(value: Any, table: Mapping[str, Part], what: str) -> Callable[..., Any]:
    """The callable that ``value`` names; ``what`` is the config key, for the message.

    A class is instantiated with the keys beside ``_target_`` (its instance must be callable); for a function they are
    bound with ``functools.partial``. Raises :class:`ConfigError` for an unknown name, a target that cannot be
    imported, a key the target does not accept, and a target that is not callable.
    """
    if callable(value):
        return value
    path, arguments = _split(value, table, what)
    target = _import(path, what)
    if not callable(target):
        raise ConfigError(explain(what, path, "a function or a callable class", f"it is a {type(target).__name__}"))
    _check_arguments(target, arguments, what, path)
    if inspect.isclass(target):
        target = target(**arguments)
        if not callable(target):
            raise ConfigError(explain(what, path, "a class with callable instances", "give it a __call__"))
        return target
    return functools.partial(target, **arguments) if arguments else target


def check_target(value: Any, table: Mapping[str, Part], what: str) -> None:
    """Raises :class:`ConfigError` if :func:`resolve_target` would fail for a reason visible in source text.

    Imports the parent packages of a dotted path (to find the file), never the module itself.
    """
    if callable(value):
        return
    path, _ = _split(value, table, what)
    if any(path == part.path for part in table.values()):
        return
    module, name = path.rsplit(".", 1)
    defined = _names_defined(module, what, path)
    if defined is not None and name not in defined:
        do = _hidden(module) or _nearest(name, defined)
        raise ConfigError(explain(what, path, f"a function in {module}", do))


def find_part(value: Any, table: Mapping[str, AnyPart]) -> AnyPart | None:
    """The entry that ``value`` names in any of the three forms; None for a user's own part."""
    target = value.get("_target_") if isinstance(value, Mapping) else value
    for name, part in table.items():
        if target in (name, part.path):
            return part
    return None


def _split(value: Any, table: Mapping[str, Part], what: str) -> tuple[str, dict[str, Any]]:
    """(dotted path, keyword arguments) of any of the three forms."""
    arguments: dict[str, Any] = {}
    if isinstance(value, Mapping):
        plain = _to_plain(value)
        value = plain.get("_target_")
        if value is None:
            raise ConfigError(explain(what, plain, "a mapping with _target_", "add _target_: package.module.function"))
        # Hydra users write _partial_ out of habit; arguments are bound here anyway.
        arguments = {key: item for key, item in plain.items() if key not in ("_target_", "_partial_")}
        reserved = sorted(key for key in arguments if key.startswith("_"))
        if reserved:
            raise ConfigError(explain(what, ", ".join(reserved), "keyword arguments only", "name each argument"))
    if not isinstance(value, str) or not value:
        raise ConfigError(explain(what, value, _expected(table), "name a function"))
    if value in table:
        return table[value].path, arguments
    if "." not in value.strip("."):
        raise ConfigError(explain(what, value, _expected(table), _nearest(value, table)))
    module, _, name = value.rpartition(".")
    if module in MOVED:
        raise ConfigError(explain(what, value, f"{MOVED[module]}.{name}", "the module has moved; write its new name"))
    return value, arguments


def _expected(table: Mapping[str, Part]) -> str:
    return f"{', '.join(table)}, {EXPECTED}" if table else EXPECTED


def _to_plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """OmegaConf's containers as plain dicts and lists, interpolations resolved."""
    if type(value).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf

        return dict(OmegaConf.to_container(value, resolve=True))  # type: ignore[arg-type]
    return dict(value)


def _import(path: str, what: str) -> Any:
    module, name = path.rsplit(".", 1)
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way while it is imported
        do = _hidden(module) or f"importing {module} failed: {_one_line(error)}"
        raise ConfigError(explain(what, path, "an importable module", do)) from error
    try:
        return getattr(loaded, name)
    except AttributeError:
        do = _hidden(module) or _nearest(name, vars(loaded))
        raise ConfigError(explain(what, path, f"a function in {module}", do)) from None


def _check_arguments(target: Any, arguments: Mapping[str, Any], what: str, path: str) -> None:
    try:
        signature = inspect.signature(target)
        signature.bind_partial(**arguments)
        if inspect.isclass(target):
            signature.bind(**arguments)  # called with exactly these, while a function gets others later
    except TypeError as error:
        expected = "the keys that it accepts, including all required ones"
        raise ConfigError(explain(what, path, expected, _one_line(error))) from None
    except ValueError:
        pass  # a C function without a signature; calling it will show


def _names_defined(module: str, what: str, path: str) -> set[str] | None:
    """Names a module defines at top level, read from its source; None if the source cannot show it."""
    if module in sys.modules:
        return set(dir(sys.modules[module]))
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # a parent package that is missing or fails while it is imported
        do = _hidden(module) or f"finding {module} failed: {_one_line(error)}"
        raise ConfigError(explain(what, path, "an importable module", do)) from error
    if spec is None:
        raise ConfigError(explain(what, path, "an importable module", f"there is no module {module} on the path"))
    if not spec.origin or not spec.origin.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ConfigError(explain(what, path, "a module that parses", f"{spec.origin}: {_one_line(error)}")) from error
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {t.id for target in node.targets for t in ast.walk(target) if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            return None  # defined conditionally: only running it shows
    return None if "*" in names or "__getattr__" in names else names


def _hidden(module: str) -> str:
    """What to do where a file of the caller's own is hidden by a library's module of the same name; "" elsewhere."""
    top = module.partition(".")[0]
    own = next((path for path in (Path(f"{top}.py"), Path(top)) if path.exists()), None)
    origin = getattr(sys.modules.get(top), "__file__", None)
    if own is None or top not in sys.modules or (origin is not None and Path(origin).is_relative_to(Path.cwd())):
        return ""
    return f"rename {own}: Python finds its own {top} ({origin or 'built in'}) first"


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, [n for n in names if not n.startswith("_")], n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "check the spelling"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
