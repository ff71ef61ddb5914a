"""The direction of imports: the folders of the package form a graph without a cycle."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlpost"


def imports_of(file: Path) -> set[str]:
    """Absolute names of all modules of rlpost that ``file`` imports, at any depth of nesting."""
    names: set[str] = set()
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "rlpost"}


def room_of(name: str) -> str | None:
    """The folder that holds a module, or the module itself where it stands at the top; None for other names."""
    path = ROOT.joinpath(*name.split("."))
    if path.with_suffix(".py").is_file():
        path = path.with_suffix(".py")
        return path.stem if path.parent == PACKAGE else path.parent.relative_to(PACKAGE).as_posix()
    if (path / "__init__.py").is_file() and path != PACKAGE:
        return path.relative_to(PACKAGE).as_posix()
    return None


def graph() -> dict[str, dict[str, str]]:
    """Room -> the rooms that it imports, each with one import that shows it."""
    rooms: dict[str, dict[str, str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        here = room_of(module)
        if here is None:
            continue
        imported = rooms.setdefault(here, {})
        for name in sorted(imports_of(file)):
            there = room_of(name)
            if there is not None and there != here:
                imported.setdefault(there, f"{module} imports {name}")
    return rooms


def test_the_graph_of_folders_has_no_cycle() -> None:
    rooms = graph()
    assert {"rollout", "train", "workers/cluster", "rewards/library", "loop"} <= rooms.keys(), (
        "the test sees no folders"
    )
    try:
        TopologicalSorter({room: set(imported) for room, imported in rooms.items()}).prepare()
    except CycleError as error:
        cycle = error.args[1][::-1]  # each imports the next
        lines = [rooms[a][b] for a, b in zip(cycle, cycle[1:], strict=False)]
        pytest.fail("the folders import each other in a circle: " + "; ".join(lines))


def test_the_order_of_the_folders_in_the_design_is_that_of_the_imports() -> None:
    """docs/design.md, "Where is what": every folder and module once, each below all that it imports."""
    (section,) = re.findall(r"^## Where is what\n(.*?)^\| To add", (ROOT / "docs/design.md").read_text(), re.M | re.S)
    order = [name.removesuffix("/").removesuffix(".py") for name in re.findall(r"^\| `([\w./]+)` \|", section, re.M)]
    below: dict[str, set[str]] = {}
    for room, imported in graph().items():
        top = room.partition("/")[0]
        below.setdefault(top, set()).update({name.partition("/")[0] for name in imported} - {top})
    below.pop("__main__")
    assert sorted(order) == sorted(below), set(order) ^ set(below)
    upward = [
        f"{room} imports {there}" for room in order for there in below[room] if order.index(there) > order.index(room)
    ]
    assert not upward, upward


# Beyond having no cycle: what must not know of what, whichever way a new import would point.
FORBIDDEN = {
    "rollout": ("train", "workers", "loop"),
    "train": ("rollout", "engine", "workers", "loop"),
    "algos": ("train", "rollout", "engine", "loop"),
    "rewards": ("train", "rollout", "engine", "loop"),
    "sandbox": ("train", "rollout", "rewards", "loop"),
    "types": ("config",),
    "config": ("types",),
}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_direction_of_imports(room: str) -> None:
    rooms = graph()
    inside = [r for r in rooms if r == room or r.startswith(room + "/")]
    assert inside, f"there is no {room}"
    broken = [
        shown
        for r in inside
        for there, shown in rooms[r].items()
        if any(there == banned or there.startswith(banned + "/") for banned in FORBIDDEN[room])
    ]
    assert not broken
