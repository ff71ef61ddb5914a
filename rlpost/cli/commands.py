"""The ``rlpost`` command: arguments in, exit code out.

Owns parsing, the order check-then-run, and how errors look: one line on stderr for a UserError, 130 for Ctrl-C.
Everything it calls is imported inside functions, so that ``rlpost --help`` responds immediately.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from rlpost import __version__
from rlpost.cli import help_texts
from rlpost.durable.stopping import Stopped
from rlpost.errors import ConfigError, RunError, UserError, explain

if TYPE_CHECKING:
    from rlpost.config import Config

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 or 3 for a UserError, 130 when interrupted."""
    run: Callable[[argparse.Namespace], int] | None = None
    try:
        try:
            arguments = build_parser().parse_args(argv)
        except SystemExit as end:  # argparse, after --help or --version
            return int(end.code or 0)
        # Users' own functions are in the current folder, where the installed script would not look. Last, because a
        # file such as datasets.py or select.py there must not hide a library's module.
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        run = arguments.run
        assert run is not None
        code = run(arguments)
        sys.stdout.flush()  # a closed output shows here, not in the interpreter's shutdown
        return code
    except UserError as error:
        print(f"rlpost: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        with contextlib.suppress(OSError):  # the signal may have ended the reader, too
            print(f"rlpost: ended by {stopped}; the same command resumes from the last checkpoint", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return stopped.exit_code
    except KeyboardInterrupt:
        print("rlpost: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if run not in (run_train, run_sft, run_eval):
            return 0  # the reader of the list has seen enough
        print("rlpost: standard output was closed before the run was done", file=sys.stderr)
        return RunError.exit_code
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" {error.filename}" if error.filename else ""
        do = "earlier checkpoints are intact: free space, then run the same command to resume"
        print(f"rlpost: writing{where}: {error.strerror or error}; {do}", file=sys.stderr)
        return RunError.exit_code
    except SystemExit as end:  # user code called exit(): whatever the code, the command did not finish
        print(f"rlpost: something in the run called exit({end.code!r}); it ended before it was done", file=sys.stderr)
        return RunError.exit_code


# -- commands ------------------------------------------------------------------------------------------------------


def run_train(arguments: argparse.Namespace) -> int:
    cfg = _load_checked(arguments, "train")
    from rlpost.loop import train

    train(cfg)
    return 0


def run_sft(arguments: argparse.Namespace) -> int:
    cfg = _load_checked(arguments, "sft")
    from rlpost.sft.loop import run_sft as run

    run(cfg)
    return 0


def run_eval(arguments: argparse.Namespace) -> int:
    cfg = _load_checked(arguments, "eval")
    from rlpost.evaluate import run_eval as run

    run(cfg)
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    from rlpost.config.compose import load_config
    from rlpost.preflight.checks import check

    cfg = load_config(arguments.overrides)
    print(check(cfg, arguments.command))
    if arguments.show_prompt:
        from rlpost.preflight.show_prompt import show_prompts

        encoding = sys.stdout.encoding or "utf-8"  # which may lack the signs of the prompt, and ours
        print("\n" + show_prompts(cfg, arguments.command).encode(encoding, "backslashreplace").decode(encoding))
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    try:
        from rlpost.doctor.examine import LIMIT_S, examine
        from rlpost.doctor.show import as_json, print_report
    except ImportError as error:
        raise ConfigError(explain("rlpost doctor", str(error), "an installed rlpost", "run `make install`")) from None
    report = examine(arguments.overrides, limit_s=LIMIT_S if arguments.limit is None else arguments.limit)
    if arguments.json:
        print(as_json(report))
    else:
        print_report(report)
    return 1 if report.count("problem") else 0


def run_config(arguments: argparse.Namespace) -> int:
    if arguments.keys is not None:
        print(describe_keys(arguments.keys))
        return 0
    from rlpost.config.compose import load_config, to_yaml

    print(to_yaml(load_config(arguments.overrides)), end="")
    return 0


def run_recipes(arguments: argparse.Namespace) -> int:
    from rlpost.config.compose import list_recipes

    recipes = list_recipes()
    width = max(map(len, recipes))
    for name, description in recipes.items():
        print(f"{name:{width}}  {description}")
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from rlpost.workers.runtime import write_environment

    write_environment(device="cpu", dtype="float32", threads=1, vocab_size=0)
    from rlpost.export import export

    source = export(Path(arguments.run_dir), Path(arguments.out), step=arguments.step)
    print(f"{arguments.out}: the model of {source}")
    return 0


def run_buffer(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from rlpost.viewing.ledger_report import describe_draw, describe_ledger

    run = Path(arguments.run_dir)
    print(describe_draw(run, arguments.uid) if arguments.uid else describe_ledger(run))
    return 0


def run_report(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from rlpost.viewing.report.build import write_report

    out = Path(arguments.out) if arguments.out else None
    print(write_report([Path(run) for run in arguments.run_dirs], out))
    return 0


def run_timeline(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from rlpost.reporting.timeline import write_trace

    run = Path(arguments.run_dir)
    out = Path(arguments.out) if arguments.out else run / "trace.json.gz"
    num_events = write_trace(run, out)
    print(f"{out}: {num_events:,} events; open it at https://ui.perfetto.dev (it stays in the browser)")
    return 0


def run_bench_rollout(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from rlpost.bench.rollout import VLLM, Plan, run

    engines = arguments.engines.split(",")
    cfg = _load_checked(arguments, "train") if VLLM in engines else _load_without_local_checks(arguments.overrides)
    plan = Plan(
        engines=engines,
        lengths=arguments.lengths.split(","),
        steps=arguments.steps,
        warm_up=arguments.warm_up,
        repeats=arguments.repeats,
        prefill_ratio=arguments.prefill_ratio,
    )
    run(cfg, plan, Path(arguments.out))
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    from rlpost.plan.request import make_request, split_keys

    own, overrides = split_keys(arguments.overrides)
    request = make_request(
        own,
        steps=arguments.steps,
        warm_up=arguments.warm_up,
        repeats=arguments.repeats,
        ratios=arguments.ratios,
    )
    from rlpost.plan.predict import make_plan
    from rlpost.plan.show import as_json, as_text

    plan = make_plan(_load_without_local_checks(overrides), request)
    print(as_json(plan) if arguments.json else as_text(plan))
    return 0


def run_bench_learning(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    table = Path(arguments.table)
    if arguments.report or arguments.list:
        from rlpost.bench.learning.page import list_cells, write_report

        print(list_cells(table) if arguments.list else write_report(table, Path(arguments.page)).text)
        return 0
    from rlpost.bench.learning.study import Plan, run_study

    plan = Plan(
        table=table,
        only=[pattern for pattern in arguments.only.split(",") if pattern],
        limit=arguments.limit,
        minutes=arguments.minutes,
        core=arguments.core,
        runs=Path(arguments.runs) if arguments.runs else None,
        again=arguments.again,
    )
    try:
        run_study(plan)
    except Stopped as stopped:
        print(f"rlpost: ended by {stopped}; run the same command to continue with the interrupted run", file=sys.stderr)
        return stopped.exit_code
    return 0


def run_watch(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from rlpost.viewing.watch import watch

    watch(Path(arguments.run_dir), once=arguments.once)
    return 0


def run_runs(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from rlpost.viewing.run_list import compare_runs, describe_runs

    if arguments.compare:
        print(compare_runs(*map(Path, arguments.compare)))
    else:
        print(describe_runs(Path(arguments.folder)))
    return 0


def run_dashboard(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from rlpost.viewing.dashboard import make_dashboard

    print(make_dashboard(Path(arguments.run_dir), entity=arguments.entity))
    return 0


def describe_keys(prefix: str) -> str:
    """Every key below ``prefix`` with its default, its meaning and what is allowed."""
    import dataclasses

    from rlpost.cli.key_texts import allowed, meaning
    from rlpost.config import walk_fields

    rows = []
    for key in walk_fields():
        if not dataclasses.is_dataclass(key.default) and f"{key.name}.".startswith(f"{prefix}." if prefix else ""):
            rows += [f"{key.name} = {'null' if key.default is None else key.default}", f"    {meaning(key)}"]
            rows += [f"    Allowed: {allowed(key)}"] if key.rule else []
    if not rows:
        raise ConfigError(f"no key starts with {prefix}; see `rlpost config --keys`")
    return "\n".join(rows)


def _load_checked(arguments: argparse.Namespace, command: str) -> Config:
    from rlpost.config.compose import load_config
    from rlpost.preflight.checks import check

    cfg = load_config(arguments.overrides)
    for warning in check(cfg, command).warnings:
        print(f"rlpost: warning: {warning}", file=sys.stderr)
    return cfg


def _load_without_local_checks(overrides: list[str]) -> Config:
    """Checks the values only; the model, the data and the devices may be elsewhere."""
    from rlpost.config.compose import load_config
    from rlpost.preflight.check_values import check_values

    cfg = load_config(overrides)
    check_values(cfg, "train")
    return cfg


# -- arguments -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rlpost", description=help_texts.DESCRIPTION, epilog=help_texts.OVERRIDES, formatter_class=_raw
    )
    parser.add_argument("--version", action="version", version=f"rlpost {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def add(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, text: str, *, recipe: bool = True
    ) -> argparse.ArgumentParser:
        epilog = help_texts.OVERRIDES if recipe else None
        usage = f"rlpost {name} recipe=GROUP/NAME [key=value ...]" if recipe else None
        command = commands.add_parser(
            name, help=summary, description=text, epilog=epilog, usage=usage, formatter_class=_raw
        )
        if recipe:
            what = "the recipe, then what differs from it"
            command.add_argument("overrides", nargs="*", metavar="key=value", help=what)
        command.set_defaults(run=run)
        return command

    add("train", run_train, "train a policy by RL", help_texts.TRAIN)
    add("sft", run_sft, "supervised fine-tuning, on data files or on a generator's lessons", help_texts.SFT)
    add("eval", run_eval, "evaluate a model: mean@k, pass@k, intervals", help_texts.EVAL)
    check = add("check", run_check, "check a run without touching a device", help_texts.CHECK)
    check.add_argument(
        "--for", dest="command", choices=["train", "eval", "sft"], default="train", help="which command to check for"
    )
    check.add_argument(
        "--show-prompt",
        action="store_true",
        help="show the first and the longest prompt, token by token; loads the tokenizer and all rows as a run does",
    )
    doctor = add(
        "doctor", run_doctor, "what this machine has, what is wrong, what to type", help_texts.DOCTOR, recipe=False
    )
    what = "a recipe, model.path=..., device=..., to judge the machine by them; default: the machine alone"
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help=what)
    what = "seconds for each of the slow checks, such as the publication in small; default: 120"
    doctor.add_argument("--limit", type=float, metavar="SECONDS", help=what)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    config = add("config", run_config, "show the resolved configuration, or every key", help_texts.CONFIG)
    config.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="PREFIX",
        help="list keys with default, meaning and allowed values, e.g. --keys rollout",
    )
    exporting = add("export", run_export, "a run's model as a Hugging Face folder", help_texts.EXPORT, recipe=False)
    exporting.add_argument("run_dir", metavar="RUN_DIR", help="a run directory, or one of its checkpoints")
    exporting.add_argument("out", metavar="OUT", help="a new folder")
    exporting.add_argument("--step", type=int, help="the checkpoint after this many steps; default: the newest")
    buffer = add(
        "buffer", run_buffer, "what a run drew, holds and trained; a prompt's history", help_texts.BUFFER, recipe=False
    )
    buffer.add_argument("run_dir", metavar="RUN_DIR", help="a run directory; the run may be active")
    buffer.add_argument("uid", nargs="?", metavar="UID", help="a draw, EPOCH:POSITION, as in rollouts/")
    report = add(
        "report", run_report, "one HTML file that shows a run, or compares several", help_texts.REPORT, recipe=False
    )
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="a run directory; the run may be active")
    report.add_argument("-o", dest="out", metavar="FILE", help="default: report.html in the run's folder, or here")
    watching = add("watch", run_watch, "a run live in the terminal, from outside", help_texts.WATCH, recipe=False)
    watching.add_argument("run_dir", metavar="RUN_DIR", help="a run directory, here or on a shared disk")
    watching.add_argument("--once", action="store_true", help="print one frame and exit")
    runs = add("runs", run_runs, "the runs below a folder; how two of them differ", help_texts.RUNS, recipe=False)
    runs.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="where to look; default: runs")
    runs.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two run directories")
    tracing = add(
        "timeline", run_timeline, "a run's timeline as a trace for Perfetto", help_texts.TIMELINE, recipe=False
    )
    tracing.add_argument("run_dir", metavar="RUN_DIR", help="a run directory; the run may be active")
    what = "file to write, compressed if it ends in .gz; default: RUN_DIR/trace.json.gz"
    tracing.add_argument("out", nargs="?", metavar="OUT", help=what)
    dashboard = add(
        "dashboard", run_dashboard, "a ready-made workspace and report in W&B", help_texts.DASHBOARD, recipe=False
    )
    dashboard.add_argument("service", choices=["wandb"], help="where")
    dashboard.add_argument("run_dir", metavar="RUN_DIR", help="a run directory: its project and its group are shown")
    dashboard.add_argument("--entity", help="the W&B user or team; default: the account's own")
    bench = commands.add_parser(
        "bench",
        help="how fast rollouts are, and how well they teach",
        description=help_texts.BENCH,
        formatter_class=_raw,
    )
    benchmarks = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True, parser_class=_Parser)
    rollout = benchmarks.add_parser(
        "rollout",
        help="how close rollouts come to the engine's saturated rate",
        description=help_texts.BENCH_ROLLOUT,
        epilog=help_texts.OVERRIDES,
        usage="rlpost bench rollout recipe=GROUP/NAME [key=value ...] [options]",
        formatter_class=_raw,
    )
    rollout.add_argument("overrides", nargs="*", metavar="key=value", help="the recipe, then what differs from it")
    rollout.add_argument("--engines", default="simulated,vllm", metavar="A,B", help="default: simulated,vllm")
    what = "lognormal, uniform, bimodal or recorded:RUN_DIR; default: the first three"
    rollout.add_argument("--lengths", default="lognormal,uniform,bimodal", metavar="A,B", help=what)
    rollout.add_argument("--steps", type=int, default=20, help="steps measured; default: 20")
    rollout.add_argument("--warm-up", type=int, default=3, help="steps before them; default: 3")
    rollout.add_argument("--repeats", type=int, default=3, help="default: 3, each with its own lengths")
    what = "simulated engine: tokens prefilled in the time of one decoded token, with all slots busy; default: 50"
    rollout.add_argument("--prefill-ratio", type=float, default=50.0, metavar="R", help=what)
    rollout.add_argument("-o", dest="out", default="bench", metavar="FOLDER", help="where results go; default: bench")
    rollout.set_defaults(run=run_bench_rollout)
    learning = benchmarks.add_parser(
        "learning",
        help="do partial rollouts learn as well as synchronous ones: a study of many runs",
        description=help_texts.BENCH_LEARNING,
        formatter_class=_raw,
    )
    instead = learning.add_mutually_exclusive_group()
    instead.add_argument("--report", action="store_true", help="start no run: compare those in the table, write --page")
    instead.add_argument("--list", action="store_true", help="start no run: list all, and which are done")
    what = "start only runs whose names match one of these patterns, such as 'grpo-*,*-s0'"
    learning.add_argument("--only", default="", metavar="A,B", help=what)
    learning.add_argument("--limit", type=int, metavar="N", help="start at most N runs")
    learning.add_argument("--minutes", type=float, metavar="M", help="start no run after M minutes")
    what = "also repeat runs whose times were taken while other programs used the core; the new row counts"
    learning.add_argument("--again", action="store_true", help=what)
    learning.add_argument("--core", type=int, metavar="N", help="the core that runs use; default: the last allowed one")
    learning.add_argument("--runs", metavar="FOLDER", help="keep the runs' directories there; default: remove them")
    what = "the table to which finished runs are appended; default: docs/studies/learning.jsonl"
    learning.add_argument("--table", default="docs/studies/learning.jsonl", metavar="FILE", help=what)
    what = "with --report: the page that contains the section; default: docs/april.md"
    learning.add_argument("--page", default="docs/april.md", metavar="FILE", help=what)
    learning.set_defaults(run=run_bench_learning)
    planning = commands.add_parser(
        "plan",
        help="what a step will take on a cluster, and which oversample ratio is best",
        description=help_texts.PLAN,
        epilog=help_texts.OVERRIDES,
        usage="rlpost plan recipe=GROUP/NAME from=RUN_DIR [key=value ...] [options]",
        formatter_class=_raw,
    )
    what = "the recipe, what differs from it, and from=RUN_DIR, lengths=NAME, cost.NAME=X"
    planning.add_argument("overrides", nargs="*", metavar="key=value", help=what)
    what = "oversample ratios to compare; default: 1 to max_staleness + 1"
    planning.add_argument("--ratios", metavar="A,B", help=what)
    planning.add_argument("--steps", type=int, default=30, help="steps simulated for each ratio; default: 30")
    what = "steps skipped at the recorded run's beginning; default: 2"
    planning.add_argument("--warm-up", type=int, default=2, help=what)
    what = "how often everything is predicted again from resampled steps and lengths, for the spread; default: 4"
    planning.add_argument("--repeats", type=int, default=4, help=what)
    planning.add_argument("--json", action="store_true", help="print JSON")
    planning.set_defaults(run=run_plan)
    add("recipes", run_recipes, "list the recipes", "The recipes that ship, one line each.", recipe=False)
    return parser


def _raw(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28)


if __name__ == "__main__":
    sys.exit(main())
