"""Whether the model hub answers. One short request, no account, nothing is downloaded."""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping

from rlpost.doctor.findings import Finding, ok, problem, skipped, warning

HUB = "https://huggingface.co"
LIMIT_S = 5.0


def check_hub(
    environment: Mapping[str, str], *, offline: bool, needed: str | None, limit_s: float = LIMIT_S
) -> Finding:
    """``needed``: the name of a model that is on the hub only. Whatever the server answers, it was reached."""
    if offline:
        if needed is None:
            return skipped("hub", "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
        do = "unset it, or copy the model to a folder and set model.path=FOLDER"
        return problem("hub", f"offline by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE, and {needed} is not here", do)
    address = (environment.get("HF_ENDPOINT") or HUB).rstrip("/")
    reason = why_unreachable(f"{address}/", limit_s)
    if not reason:
        return ok("hub", f"{address} answers")
    found = f"{address}: {reason}"
    if needed is not None:
        do = "set HF_ENDPOINT=MIRROR, or copy the model to a folder and set model.path=FOLDER"
        return problem("hub", f"{found}; {needed} cannot be downloaded", do)
    do = "set HF_ENDPOINT=MIRROR, or HF_HUB_OFFLINE=1 and folders for models and data"
    return warning("hub", f"{found}; models and data on the hub cannot be downloaded", do)


def why_unreachable(address: str, limit_s: float) -> str:
    """In a thread, because looking up a name has no time limit of its own. Empty: it answers."""
    outcome = [f"no answer within {limit_s:g} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "rlpost-doctor"})
            with urllib.request.urlopen(request, timeout=limit_s):
                outcome[0] = ""
        except urllib.error.HTTPError:
            outcome[0] = ""
        except TimeoutError:
            pass
        except (OSError, ValueError, http.client.HTTPException) as error:
            outcome[0] = str(getattr(error, "reason", error)) or type(error).__name__

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(limit_s)
    return outcome[0]
