"""A W&B workspace and a report for a run's project, built from code: ``rlpost dashboard wandb RUN_DIR``.

Owns which panels there are and where; every metric named here is in ``reporting.metric_names``. Runs of one group (the
seeds of an experiment) are drawn as one line with a band. Without an account, the layout is written to a file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from rlpost.durable.run_state import CONFIG_FILE
from rlpost.errors import RunError, explain
from rlpost.reporting.tracking import has_wandb_key, name_group
from rlpost.viewing.run_list import is_run

FILE = "wandb_dashboard.json"
GROUP = "Group"  # W&B's attribute of a run, set from logging.group

# section -> panels: (title, metrics, x axis)
Panel = tuple[str, tuple[str, ...], str]
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Did it learn?": (
        ("accuracy by trained samples", ("eval/accuracy",), "total/samples"),
        ("accuracy by wall time", ("eval/accuracy",), "time_s"),
        ("accuracy by trained tokens", ("eval/accuracy",), "total/tokens"),
        ("pass@k", ("eval/pass_at_k",), "total/samples"),
        ("reward", ("reward/mean",), "total/samples"),
        ("response length in evaluations", ("eval/response_tokens",), "step"),
    ),
    "Is it healthy?": (
        ("entropy", ("loss/entropy",), "step"),
        ("KL: to the start of the update, to the reference", ("loss/approx_kl", "loss/kl"), "step"),
        ("clipped tokens", ("loss/clip_low_share", "loss/clip_high_share"), "step"),
        ("gradient norm", ("loss/grad_norm",), "step"),
        ("mismatch of engine and trainer", ("mismatch/lag_0/abs_log_ratio", "mismatch/canary"), "step"),
        ("groups without a gradient", ("reward/equal_groups_share",), "step"),
        ("failed rewards", ("reward/failed",), "step"),
        ("skipped updates", ("loss/skipped_updates",), "step"),
    ),
    "Was the engine busy?": (
        ("tokens per second", ("rollout/consumed_tokens_per_s", "rollout/generated_tokens_per_s"), "step"),
        ("idle slots", ("rollout/idle_share",), "step"),
        ("carried over (APRIL)", ("rollout/carried_share",), "step"),
        ("age of trained groups", ("rollout/buffer_age", "rollout/buffer_age_max"), "step"),
        (
            "lengths: trained, carried over, launched",
            ("rollout/length/admitted_mean", "rollout/length/deferred_mean", "rollout/length/launched_mean"),
            "step",
        ),
        ("cut at the limit", ("rollout/truncated_share", "eval/truncated_share"), "step"),
    ),
    "Where did the time go?": (
        ("phases of a step", ("time/generate", "time/update", "time/publish", "time/ledger"), "step"),
        (
            "generation",
            ("waterfall/engine", "waterfall/idle", "waterfall/collect", "waterfall/wait_for_rewards"),
            "step",
        ),
        ("update", ("waterfall/train", "waterfall/build_batch", "waterfall/old_logprobs"), "step"),
        ("evaluating and saving", ("time/eval", "time/save"), "step"),
    ),
}
TABLES = ("eval_rollouts", "rollouts")


def make_dashboard(run: Path, *, entity: str | None = None) -> str:
    """Build workspace and report for the run's project; returns a line or two for the user.

    Raises RunError if the path is not a run, or if W&B refuses.
    """
    if not is_run(run):
        raise RunError(explain("dashboard", str(run), "a run directory", "check the path; `rlpost runs` lists them"))
    config = yaml.safe_load((run / CONFIG_FILE).read_text())
    project = str(config["logging"]["project"])
    group = config["logging"].get("group") or name_group(str(config["name"]))
    if not has_wandb_key(os.environ):
        layout = run / FILE
        layout.write_text(json.dumps(build_layout(entity or "ENTITY", project, group), indent=2) + "\n")
        return (
            f"no W&B account: there is no key (`wandb login` or WANDB_API_KEY), so nothing was created there\n"
            f"the layout of workspace and report is in {layout}"
        )
    import wandb

    try:
        owner = entity or wandb.Api().default_entity
        report = build_report(owner, project, group).save()  # first: it creates the project if there is none yet
        workspace = build_workspace(owner, project, group).save()
    except Exception as error:  # from a service and its client: in any case the user sees one line
        reason = " ".join(str(error).split()) or type(error).__name__
        do = "check key, entity and network; the run itself needs none of it"
        raise RunError(explain("dashboard", reason, "W&B to accept workspace and report", do)) from None
    return f"workspace {workspace.url}\nreport    {report.url}"


def build_workspace(entity: str, project: str, group: str) -> Any:
    """A ``wandb_workspaces`` Workspace: the sections, with runs grouped so that seeds are one band."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=name, panels=[_plot(wr, panel) for panel in panels], is_open=True, pinned=number == 0)
        for number, (name, panels) in enumerate(SECTIONS.items())
    ]
    tables: list[Any] = [wr.WeavePanelSummaryTable(table_name=name) for name in TABLES]
    histograms = [wr.MediaBrowser(media_keys=[f"histogram/{name}"]) for name in ("length", "staleness", "advantage")]
    sections.append(ws.Section(name="Answers", panels=[*tables, *histograms], is_open=False))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"rlpost {group}",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="step"),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Metric(GROUP)],
            pinned_columns=["summary:eval/accuracy.max", "summary:eval/accuracy.last", "summary:reward/mean.last"],
        ),
        auto_generate_panels=True,
    )


def build_report(entity: str, project: str, group: str) -> Any:
    """A ``wandb_workspaces`` Report: the same panels with text, for this group's runs."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [
        wr.P(
            f"Runs of the group {group}. A band spans the seeds; the line is their mean. Every number is explained in "
        ),
        wr.P("docs/metrics.md of rlpost; responses are in the run's tables rollouts and eval_rollouts."),
    ]
    for name, panels in SECTIONS.items():
        # without entity and project: the report's own, so that building it needs no account
        runs = wr.Runset(name=group, filters=f"{GROUP} = '{group}'", groupby=[GROUP])
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=[_plot(wr, panel) for panel in panels])]
    return wr.Report(entity=entity, project=project, title=f"{group}", blocks=blocks, width="fluid")


def build_layout(entity: str, project: str, group: str) -> dict[str, Any]:
    """Both as the plain containers that are sent to W&B."""
    models = {"workspace": build_workspace(entity, project, group), "report": build_report(entity, project, group)}
    return {
        name: json.loads(model._to_model().model_dump_json(by_alias=True, exclude_none=True))
        for name, model in models.items()
    }


def _plot(wr: Any, panel: Panel) -> Any:
    title, metrics, over = panel
    by_group = {"groupby": wr.Metric(GROUP), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    return wr.LinePlot(title=title, x=over, y=list(metrics), **by_group)
