"""Findings from the publication in small (``doctor.publication_probe``). Pure."""

from __future__ import annotations

from rlpost.doctor.findings import Finding, of_failure, ok, problem, skipped
from rlpost.doctor.packages import install
from rlpost.doctor.programs import Probed

IMPORTS = ("torch", "transformers", "deepspeed", "vllm")
NOT_REACHED = "not reached"


def check_small_run(probed: Probed, device: str) -> list[Finding]:
    """Imports, attention, publication and response; after the first that failed the others are skipped."""
    return [_imports(probed, device), *_run(probed, device)]


def _imports(probed: Probed, device: str) -> Finding:
    for name in ("start", *IMPORTS):
        if name in probed.failures:
            do = _do(probed.failures[name], f"make clean, {install(device)}")
            return problem("imports", f"{name}: {probed.failures[name]}", do)
    seconds = [f"{name} {probed.results[name]['seconds']:.1f} s" for name in IMPORTS if name in probed.results]
    return ok("imports", ", ".join(seconds))


def _run(probed: Probed, device: str) -> list[Finding]:
    results, failures = probed.results, probed.failures
    findings = []
    for stage, name in (("workers", "trainer and engine"), ("publication", "publication"), ("response", "response")):
        if stage in failures:
            do = f"look for what the error names in docs/troubleshooting.md; {install(device)} restores the packages"
            findings.append(of_failure(name, failures[stage], _do(failures[stage], do)))
        elif stage not in results:
            findings.append(skipped(name, NOT_REACHED))
        elif stage == "workers":
            chosen = ", ".join(results[stage]["attention"]) or "unknown"
            findings.append(ok(name, f"started; vLLM's attention is {chosen}"))
        elif stage == "publication":
            at_most = results[stage]["threshold"]
            found = f"{results[stage]['bytes']:,} bytes, equal bit for bit; canary {results[stage]['canary']:.2g} nats"
            findings.append(ok(name, f"{found} (at most {at_most:g})"))
        else:
            findings.append(ok(name, f"{results[stage]['tokens']} tokens sampled"))
    return findings


def _do(failure: str, otherwise: str) -> str:
    return "run it again with --limit 600 if the machine is busy" if "not done within" in failure else otherwise
