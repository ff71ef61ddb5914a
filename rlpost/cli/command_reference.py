"""The page ``docs/command-line.md``, generated from the parser: every command, its arguments, its examples.

``python -m rlpost.cli.command_reference > docs/command-line.md`` writes it, ``tests/test_docs.py`` checks the page
against the parser (``rlpost.cli.commands.build_parser``), which owns the texts. Imports nothing heavy.
"""

from __future__ import annotations

import argparse

from rlpost.cli.commands import build_parser
from rlpost.cli.help_texts import OVERRIDES

INTRODUCTION = """\
# Command line

Every command of `rlpost`, generated from the program by `python -m rlpost.cli.command_reference`. `--help` after a
command prints the same. Exit codes: 0; 2 for an error in the configuration, the data or the model; 3 for a run that
could not continue; 70 if the [watchdog](troubleshooting.md#it-hangs) ended it; 130 after Ctrl-C, 143 after SIGTERM.

If a command takes a recipe, overrides follow it. They are Hydra's `key=value`:

```text
{overrides}
```
"""


def render() -> str:
    commands = _commands(build_parser())
    lines = [INTRODUCTION.format(overrides=_body(OVERRIDES))]
    lines += ["| Command | What it does |", "|---|---|"]
    lines += [f"| [`{name}`](#rlpost-{name.replace(' ', '-')}) | {summary} |" for name, summary, _ in commands]
    for name, _, parser in commands:
        lines += ["", *_section(name, parser)]
    return "\n".join(lines) + "\n"


def _commands(parser: argparse.ArgumentParser) -> list[tuple[str, str, argparse.ArgumentParser]]:
    """(name, summary, parser) of each command; a command with subcommands is listed as those."""
    (actions,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    found = []
    for choice in actions._choices_actions:
        name, command = choice.dest, actions.choices[choice.dest]
        if any(isinstance(a, argparse._SubParsersAction) for a in command._actions):
            found += [(f"{name} {below}", summary, one) for below, summary, one in _commands(command)]
        else:
            found.append((name, choice.help or "", command))
    return found


def _section(name: str, parser: argparse.ArgumentParser) -> list[str]:
    text, _, examples = (parser.description or "").replace("\nexample:\n", "\nexamples:\n").partition("\nexamples:\n")
    lines = [f"## rlpost {name}", "", text.strip()]
    arguments = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if arguments:
        lines += ["", "| Argument | Meaning |", "|---|---|"]
        lines += [f"| `{_name(action)}` | {_cell(action.help or '')} |" for action in arguments]
    if examples:
        lines += ["", "```sh", *(_comment(line) for line in _body(examples).splitlines()), "```"]
    return lines


def _name(action: argparse.Action) -> str:
    values = action.metavar or ("|".join(map(str, action.choices)) if action.choices else None)
    if values is None and action.nargs != 0:
        values = action.dest.upper()
    value = " ".join(values) if isinstance(values, tuple) else values
    return _cell(" ".join(filter(None, [", ".join(action.option_strings), value])))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _body(text: str) -> str:
    """The indented lines of a help text, without their indentation."""
    return "\n".join(line.removeprefix("  ") for line in text.splitlines() if line.startswith("  "))


def _comment(line: str) -> str:
    """Text after several spaces explains the command."""
    command, blanks, words = line.partition("   ")
    return f"{command}{blanks}# {words.strip()}" if words.strip() else line


if __name__ == "__main__":
    print(render(), end="")
