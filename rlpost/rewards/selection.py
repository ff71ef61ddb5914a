"""Which functions make up a reward, as named in the configuration, and where they run. Imports none of them.

Pure functions of ``RewardConfig``; called by ``preflight``, ``session`` and, in each worker, ``rewards.functions``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rlpost.config import RewardConfig, plugins, rule_of
from rlpost.errors import ConfigError, explain
from rlpost.rewards import REWARDS


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionSpec:
    """One function as configured. ``name`` is empty if it is the only one."""

    function: Any
    name: str = ""
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    style: str = "auto"  # auto: trl if a parameter is named completions
    calls: str = "auto"  # auto: group if a parameter is named responses or completions
    text: str = "auto"  # of a response; auto: the answer alone for shipped rewards that read one, else all

    @property
    def key(self) -> str:
        return f"reward.functions.{self.name}" if self.name else "reward"


def list_functions(cfg: RewardConfig) -> list[FunctionSpec]:
    """``reward.function``, or everything in ``reward.functions``. Raises ConfigError; imports nothing."""
    if bool(cfg.functions) == (cfg.function is not None):
        got = "both" if cfg.functions else "neither"
        raise ConfigError(
            explain("reward", got, "reward.function, or reward.functions with weights", "set the other one to null")
        )
    if not cfg.functions:
        return [FunctionSpec(function=cfg.function, args=cfg.args, style=cfg.style, calls=cfg.calls, text=cfg.text)]
    for key in ("args", "style", "calls"):
        value, default = getattr(cfg, key), getattr(RewardConfig(), key)
        if value != default:
            do = f"give {key} to each function"
            raise ConfigError(explain(f"reward.{key}", value, f"{default} beside reward.functions", do))
    return [_read_spec(str(name), value, cfg.text) for name, value in cfg.functions.items()]


def list_weights(cfg: RewardConfig) -> dict[str, float]:
    """Name -> weight of each function; the name is empty if there is only ``reward.function``."""
    return {spec.name: float(spec.weight) for spec in list_functions(cfg)}


def _read_spec(name: str, value: Any, text: str) -> FunctionSpec:
    """``text`` is for a function that does not say itself."""
    key = f"reward.functions.{name}"
    known = [f.name for f in fields(FunctionSpec) if f.name != "name"]
    if not isinstance(value, Mapping) or "function" not in value:
        raise ConfigError(
            explain(key, value, "a mapping with function and weight", "write {function: NAME, weight: 1}")
        )
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ConfigError(explain(key, ", ".join(unknown), f"only {', '.join(known)}", "check the spelling"))
    if not name.isidentifier():
        raise ConfigError(explain(key, name, "a name of letters, digits and _", "it becomes reward/part/NAME"))
    spec = FunctionSpec(**{"text": text, **value, "name": name})
    weight: Any = spec.weight
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or weight != weight
        or abs(weight) == float("inf")
    ):
        raise ConfigError(explain(f"{key}.weight", weight, "a finite number", "use 1.0"))
    for field_name, got in (("style", spec.style), ("calls", spec.calls), ("text", spec.text)):
        rule = rule_of(RewardConfig, field_name)
        if got is None or not rule.holds(got):
            raise ConfigError(rule.explain(f"{key}.{field_name}", got))
    if not isinstance(spec.args, Mapping):
        raise ConfigError(explain(f"{key}.args", spec.args, "a mapping of keyword arguments", "use {}"))
    return spec


def choose_text(spec: FunctionSpec) -> str:
    """What the function gets of a response: ``answer`` (what follows the thoughts) or ``all``."""
    if spec.text != "auto":
        return spec.text
    part = None if callable(spec.function) else plugins.find_part(spec.function, REWARDS)
    return "answer" if part is not None and part.reads_answer else "all"


def runs_in_process(cfg: RewardConfig) -> bool:
    """Whether the reward is called in the run's own process: ``reward.workers`` is 0; or it is unset and every function
    is marked so in ``REWARDS``, or is a Python object, which cannot be sent."""
    if cfg.workers is not None:
        return cfg.workers == 0
    return all(_is_trivial(spec.function) for spec in list_functions(cfg))


def list_models(cfg: RewardConfig) -> list[dict[str, Any]]:
    """The arguments (``path`` and more) of each function that loads a model into each worker."""
    found = []
    for spec in list_functions(cfg):
        part = None if callable(spec.function) else plugins.find_part(spec.function, REWARDS)
        if part is not None and part.loads_model:
            given = spec.function if isinstance(spec.function, Mapping) else {}
            found.append({**given, **spec.args})
    return found


def _is_trivial(function: Any) -> bool:
    if callable(function):
        return True
    part = plugins.find_part(function, REWARDS)
    return part is not None and part.in_process


def to_plain_config(cfg: RewardConfig) -> dict[str, Any]:
    """The configuration as JSON values, for a worker. Raises ConfigError if a function is a Python object."""
    try:
        return json.loads(json.dumps(asdict(cfg)))
    except TypeError:
        do = "name it by its dotted path, or set reward.workers=0"
        raise ConfigError(explain("reward.function", cfg.function, "a name that a worker can import", do)) from None
