"""A report as text and as JSON. The keys of the JSON are documented in docs/doctor.md and stay as they are."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from rlpost import __version__
from rlpost.doctor.examine import Report
from rlpost.doctor.findings import Finding

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}
STATUS_WIDTH = max(map(len, STYLES))
Line = list[tuple[str, str]]  # (text, style)


def print_report(report: Report) -> None:
    """With colors on a terminal; plain text otherwise, and where rich is missing."""
    lines = make_lines(report)
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.text import Text
        except ImportError:
            pass
        else:
            console = Console(highlight=False)
            for line in lines:
                console.print(Text.assemble(*line), soft_wrap=True)
            return
    encoding = sys.stdout.encoding or "utf-8"  # which may lack what paths and errors are written in
    print(as_text(report).encode(encoding, "backslashreplace").decode(encoding))


def as_text(report: Report) -> str:
    return "\n".join("".join(text for text, _ in line) for line in make_lines(report))


def as_json(report: Report) -> str:
    findings = [{"section": title, **asdict(finding)} for title, found in report.sections for finding in found]
    whole = {
        "rlpost": __version__,
        "date": report.date,
        "device": report.device,
        "dtype": report.dtype,
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": report.versions,
        "seconds": round(report.seconds, 1),
        "ready": not report.count("problem"),
        "problems": report.count("problem"),
        "warnings": report.count("warning"),
        "findings": findings,
    }
    return json.dumps(whole, indent=1)


def make_lines(report: Report) -> list[Line]:
    """Sections with a line for each finding, then warnings and problems with what to do, then one line of result."""
    width = max(len(finding.name) for _, found in report.sections for finding in found)
    lines: list[Line] = []
    for title, found in report.sections:
        lines.append([(title, "bold")])
        for finding in found:
            mark = (f"{finding.status:{STATUS_WIDTH}}", STYLES[finding.status])
            lines.append([(f"  {finding.name:{width}}  ", ""), mark, (f"  {finding.found}", "")])
        lines.append([])
    for status in ("warning", "problem"):
        for _, found in report.sections:
            for finding in found:
                if finding.status == status:
                    lines += _advice(finding)
    return [*lines, [(describe_result(report), "bold")]]


def _advice(finding: Finding) -> list[Line]:
    head: Line = [(finding.status, STYLES[finding.status]), (f"  {finding.name}: {finding.found}", "")]
    return [head, [(f"  -> {finding.do}", "bold")], []]


def describe_result(report: Report) -> str:
    problems, warnings = report.count("problem"), report.count("warning")
    counted = [_number(problems, "problem"), _number(warnings, "warning")]
    where = f"{report.device}, {report.dtype}, {report.seconds:.0f} s"
    said = ", ".join(filter(None, counted)) if problems else ", ".join(filter(None, ["ready", *counted]))
    return f"{said} ({where})"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}" if count else ""
