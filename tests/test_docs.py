"""The documentation is held to the program: links, commands, keys, metrics, files and the example of
your-own-task.md.

Reads text only, except for the worked example, which is composed, checked and called. No torch.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from dataclasses import is_dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest

from rlpost.cli import command_reference
from rlpost.cli.commands import build_parser
from rlpost.config import Config, walk_fields
from rlpost.config.compose import GROUPS, list_recipes, load_config
from rlpost.config.resolve import ROW_TOKENS
from rlpost.plan.request import PLAN_KEYS
from rlpost.reporting.advice import RULES
from rlpost.reporting.metric_names import AREAS, find

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

DEFAULTS = {key.name: key.default for key in walk_fields()}
SECTIONS = {name for name, default in DEFAULTS.items() if is_dataclass(default)}
# Keys with room below them: a mapping, or a part that may be given as {_target_: ..., key: value}.
OPEN_KEYS = {
    "model.shape",
    "data.chat_template_kwargs",
    "reward.function",
    "reward.functions",
    "reward.args",
    "user",
    "sft.generator",
}
OPEN_KEYS |= {name for name in DEFAULTS if name.endswith(".generator")}
OPEN_KEYS |= {f"algo.{part}" for part in ("advantage", "loss", "reduction", "filter")}
KEY = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fences(text: str, *languages: str) -> list[str]:
    found = re.findall(r"^```([a-z]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [body for language, body in found if not languages or language in languages]


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def inline_code(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_fences(text))


def is_key(name: str) -> bool:
    above = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
    return name in DEFAULTS or any(key in OPEN_KEYS for key in above)


def nearly_a_key(name: str) -> bool:
    """A dotted name that begins with a section of the schema, and names no module (``rollout.collect``, ``sft.py``)."""
    first = name.partition(".")[0]
    modules = (ROOT / "rlpost" / f"{name.replace('.', '/')}.py", ROOT / "rlpost" / name)
    return "." in name and first in SECTIONS and not any(module.exists() for module in modules)


# ---- links ---------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """GitHub's: lower case, punctuation dropped, blanks as hyphens."""
    headings = re.findall(r"^#+ (.+)$", without_fences(read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(read(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert ROOT in [file, *file.parents], f"{page.name}: {target} leads out of the project"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}; there are {sorted(anchors(file))}"


def test_the_map_names_every_page() -> None:
    index = read(ROOT / "docs" / "index.md")
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "index.md" or f"]({name})" in index, name


# ---- commands ------------------------------------------------------------------------------------------------------


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(page: Path) -> list[list[str]]:
    """Command lines of ``rlpost`` and ``make`` in code, split into words, comments dropped."""
    lines = [line for body in fences(read(page), "sh", "bash", "") for line in body.splitlines()]
    lines += inline_code(read(page))
    starts = re.compile(r"(\.venv/bin/)?(rlpost|make) [a-z-]")
    return [shlex.split(line.strip(), comments=True) for line in lines if starts.match(line.strip())]


@each_page
def test_commands_exist(page: Path) -> None:
    for program, *words in commands(page):
        line = f"{page.name}: {program} {' '.join(words)}"
        if program == "make":
            targets = [word for word in words if "=" not in word]
            assert set(targets) <= make_targets(), line
            continue
        if words[0] == "--help" or words[0] == "--version":
            continue
        assert words[0] in subcommands(), line
        arguments = build_parser().parse_args(words)  # raises for an option that does not exist
        for override in getattr(arguments, "overrides", []):
            if not (words[0] == "plan" and override.partition("=")[0] in PLAN_KEYS):
                check_override(override, line)


def check_override(override: str, where: str) -> None:
    key, equals, value = override.partition("=")
    if override in ("...", "[key=value"):
        return
    assert equals, f"{where}: {override} is no key=value"
    if key == "recipe":
        known = value in list_recipes() or value in ("...", "GROUP/NAME") or value.endswith(".yaml")
        assert known, f"{where}: there is no recipe {value}"
    elif key in GROUPS and not value.startswith("{"):
        options = {file.stem for file in (ROOT / "conf" / key).glob("*.yaml")}
        assert set(value.split("|")) <= options | {"...", "…"}, f"{where}: {key} has no option {value}"
    else:
        assert is_key(key), f"{where}: there is no key {key}"


# ---- keys ----------------------------------------------------------------------------------------------------------


@each_page
def test_keys_in_backticks_exist(page: Path) -> None:
    for code in inline_code(read(page)):
        for word in code.split():
            key, equals, value = word.strip("'").partition("=")
            if not KEY.fullmatch(key):
                continue
            if equals and key in (*GROUPS, "recipe"):
                check_override(f"{key}={value}", page.name)
            elif nearly_a_key(key):
                assert is_key(key), f"{page.name}: there is no key {key}"


# ---- metrics and files ---------------------------------------------------------------------------------------------


@each_page
def test_metric_names_in_backticks_exist(page: Path) -> None:
    logged = re.compile(rf"({'|'.join(AREAS)})/[A-Za-z0-9_*/]*[A-Za-z0-9_*]")
    for code in inline_code(read(page)):
        for word in code.split():
            if logged.fullmatch(word) and not (ROOT / "rlpost" / word).exists():
                assert find(word), f"{page.name}: no metric {word} is logged"


@each_page
def test_files_in_backticks_exist(page: Path) -> None:
    ours = re.compile(r"(rlpost|tests|conf|recipes|docs|requirements|benchmarks|\.ci)/[\w./-]+\.[a-z]+")
    for code in inline_code(read(page)):
        for word in code.split():
            if ours.fullmatch(word):
                assert (ROOT / word).is_file(), f"{page.name}: there is no file {word}"


def test_the_command_lines_page_is_up_to_date() -> None:
    assert read(ROOT / "docs" / "command-line.md") == command_reference.render(), (
        "the parser changed: python -m rlpost.cli.command_reference > docs/command-line.md"
    )


# ---- troubleshooting -----------------------------------------------------------------------------------------------


def first_cells(page: Path) -> list[str]:
    """The first cell of every row below a table's head."""
    rows = re.findall(r"^\|(?!-)(.*?)(?<!\\)\|", read(page), re.MULTILINE)
    return [row.strip() for row in rows if "`" in row]


def test_the_program_says_what_troubleshooting_quotes() -> None:
    sources = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "rlpost").rglob("*.py")))
    sections = read(ROOT / "docs" / "troubleshooting.md")
    quoted = [cell for cell in first_cells(ROOT / "docs" / "troubleshooting.md") if "(the shell)" not in cell]
    assert len(quoted) > 30 and "## It stops by itself" in sections
    for cell in quoted:
        for text in re.findall(r"`([^`]+)`", cell):
            assert text in sources, f"troubleshooting.md quotes {text!r}, which rlpost says nowhere"


def test_troubleshooting_has_every_warning_of_a_run() -> None:
    text = read(ROOT / "docs" / "troubleshooting.md")
    assert [name for name in RULES if f"`{name}`" not in text] == []


# ---- the README's recipe -------------------------------------------------------------------------------------------


def test_the_readme_explains_the_whole_recipe_as_it_stands() -> None:
    (section,) = re.findall(
        r"^## One recipe, line by line\n(.*?)^## ", read(ROOT / "README.md"), re.DOTALL | re.MULTILINE
    )
    shown = "".join(fences(section, "yaml"))
    recipe = (ROOT / "recipes/math/arithmetic.yaml").read_text()
    body = recipe[re.search(r"^(?!#)", recipe, re.MULTILINE).start() :]  # type: ignore[union-attr]
    assert shown.splitlines() == [line for line in body.splitlines() if line.strip()]


# ---- the worked example of your-own-task.md ------------------------------------------------------------------------


def write_example(folder: Path) -> None:
    """The files of docs/your-own-task.md: Python by the name in its first line (without one it goes on), the recipe."""
    text, file = read(ROOT / "docs" / "your-own-task.md"), folder
    for body in fences(text, "python"):
        named = re.match(r"# (\w+\.py)\n", body)
        file = folder / named[1] if named else file
        with file.open("a") as out:
            out.write(body if named else f"\n\n{body}")
    (recipe,) = fences(text, "yaml")
    (folder / "my_recipe.yaml").write_text(recipe)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_example(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    runpy.run_path(str(tmp_path / "make_data.py"))
    yield tmp_path
    sys.modules.pop("my_task", None)


def test_the_example_passes_check_with_its_own_data(example: Path) -> None:
    from rlpost.preflight.checks import check

    report = str(check(load_config(["recipe=my_recipe.yaml"])))
    assert "data.train: 629 rows from train.jsonl" in report
    assert "data.eval: 100 rows from held_out.jsonl" in report
    assert "not checked" not in report


def test_the_examples_parts_do_what_the_page_says(example: Path) -> None:
    import numpy as np

    from rlpost.config.plugins import resolve_target
    from rlpost.prompts.encoding import make_messages
    from rlpost.prompts.sources import load_rows
    from rlpost.rewards.scoring import read_outcome

    cfg: Config = load_config(["recipe=my_recipe.yaml"])
    assert cfg.name == "my_recipe"
    rows = load_rows(cfg.data.train, prompt_key=cfg.data.prompt_key)
    assert make_messages(rows[0], cfg.data)[0]["content"] == rows[0]["question"] + "?"

    reward = resolve_target(cfg.reward.function, {}, "reward.function")
    outcome = reward("3+5=8 8+2=10#10", prompt="3+5+2?", reference="10", finish_reason="stop", columns={"task": "sums"})
    total, parts = read_outcome(outcome)
    assert parts == {"accuracy": 1.0, "length": pytest.approx(-0.002 * 15)}
    assert total == pytest.approx(1 - 0.03)

    advantage = resolve_target(cfg.algo.advantage, {}, "algo.advantage")
    (values,) = advantage([[1.0, 0.0, 0.0]], eps=1e-6)
    np.testing.assert_array_equal(values, [1.0, 0.0, 0.0])

    cheaper = load_config(["recipe=my_recipe.yaml", "name=cheaper", "reward.function.price=0.0005"])
    assert cheaper.reward.function == {"_target_": "my_task.right_and_short", "price": 0.0005}


def test_a_recipe_may_build_on_another(example: Path) -> None:
    (example / "mine.yaml").write_text("defaults: [/recipe/math/arithmetic, _self_]\nsteps: 3\n")
    cfg = load_config(["recipe=mine.yaml"])
    assert (cfg.steps, cfg.rollout.groups_per_step, cfg.train.lr) == (3, 32, 1e-4)


def test_numbers_copied_from_the_schema_are_still_its_own() -> None:
    text = " ".join(read(ROOT / "docs" / "training.md").split())
    assert f"({ROW_TOKENS['cpu']:,} on a CPU, {ROW_TOKENS['cuda']:,} on a GPU)" in text
