"""Reward functions, loaded and ready to be called.

A function has our signature or TRL's, is sync or async, and scores one response or a whole group at a time;
:class:`LoadedFunction` makes them all alike. Called in reward workers (``rewards.worker_main``) and, for rewards that
run in the main process, by ``rewards.worker_pool``. No heavy imports; only :func:`load_functions` imports a user's
module.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlpost import __version__
from rlpost.config import RewardConfig, plugins
from rlpost.errors import ConfigError, explain
from rlpost.rewards import REWARDS, values
from rlpost.rewards.failures import RewardFailure
from rlpost.rewards.outcomes import Outcome, to_outcome, to_outcomes
from rlpost.rewards.selection import FunctionSpec, choose_text, list_functions
from rlpost.rewards.values import answer_text, is_count, is_seconds

LIBRARY = Path(__file__).parent / "library"  # its modules import each other: an edited one may change any result
TRL_KEYWORDS = frozenset({"prompts", "completions", "completion_ids"})


class Response(NamedTuple):
    """One response to be scored."""

    text: str
    finish_reason: str
    token_ids: Sequence[int] = ()


class Question(NamedTuple):
    """What all responses of a call respond to."""

    prompt: str
    reference: Any
    columns: Mapping[str, Any]
    opens_thought: bool = False  # the prompt ends in <think>


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionFacts:
    """What other processes must know about a loaded function; plain values."""

    name: str
    weight: float
    per_group: bool
    takes_tokens: bool  # completion_ids
    text: str  # what it gets of a response: answer or all
    timeout_s: float
    concurrency: int  # calls that may run at once in one worker: above 1 only for async functions
    is_async: bool
    version: str  # of everything that affects a result; part of a cached result's key
    cacheable: bool
    columns: tuple[str, ...]  # data columns that it requires
    needs_reference: bool = False  # has a parameter for it without a default, or says so itself


def load_functions(
    cfg: RewardConfig, reference_key: str | None = None, folder: Path | None = None
) -> list[LoadedFunction]:
    """Import and bind every function. Raises ConfigError if one cannot be imported or called.

    ``folder``: where functions keep what must outlive this process and is shared by all of a run (``use_folder``).
    """
    return [LoadedFunction(spec, cfg, reference_key, folder) for spec in list_functions(cfg)]


def check_columns(facts: Sequence[FunctionFacts], columns: Collection[str], key: str) -> None:
    """Raises ConfigError if a function needs a column that the data of ``key`` lacks."""
    for one in facts:
        missing = [name for name in one.columns if name not in columns]
        if missing:
            where = f"reward.functions.{one.name}" if one.name else "reward.function"
            expected = f"names that {key} has as columns ({', '.join(columns)})"
            raise ConfigError(explain(where, ", ".join(missing), expected, "rename one, or give it a default"))


def need_reference(facts: Sequence[FunctionFacts]) -> bool:
    """Whether a row without a usable reference is a mistake in the data."""
    return any(one.needs_reference for one in facts)


def resolve_function(spec: FunctionSpec) -> Any:
    """The callable with its arguments bound (``args`` override the target's own); raises ConfigError."""
    function = spec.function
    if spec.args:
        plain = dict(function) if isinstance(function, Mapping) else {"_target_": function}
        function = {**plain, **spec.args}
    return plugins.resolve_target(function, REWARDS, f"{spec.key}.function")


class LoadedFunction:
    """One function of the reward; lives as long as its process.

    Args:
        reference_key: the reference's column, the name under which TRL functions expect it.
    """

    def __init__(
        self, spec: FunctionSpec, cfg: RewardConfig, reference_key: str | None = None, folder: Path | None = None
    ) -> None:
        self.target = resolve_function(spec)
        use_folder = _attribute(self.target, "use_folder", None)
        if callable(use_folder):
            use_folder(folder)
        self._reference_key, self._messages = reference_key, cfg.messages
        self._loop: asyncio.AbstractEventLoop | None = None
        code = _code_of(self.target)
        parameters, self._takes_any = _parameters_of(self.target)
        self._takes = frozenset(parameter.name for parameter in parameters)
        required = _required(parameters)
        self.trl = spec.style == "trl" or (spec.style == "auto" and "completions" in self._takes)
        of_groups = self.trl or "responses" in self._takes
        if not self.trl and spec.calls == "group" and not of_groups:
            do = "name a parameter responses, which gets the texts of the whole group"
            raise ConfigError(explain(f"{spec.key}.calls", "group", "sample for this function", do))
        if not self.trl and spec.calls == "sample" and of_groups:
            raise ConfigError(explain(f"{spec.key}.calls", "sample", "group: it takes responses", "leave calls unset"))
        is_async = inspect.iscoroutinefunction(code)
        per_group = spec.calls == "group" or (spec.calls == "auto" and of_groups)
        columns = required - TRL_KEYWORDS if self.trl else self._columns_named(spec, reference_key)
        if not self.trl:
            self._check_signature(spec, per_group)
        concurrency = 1
        if is_async:
            concurrency = _checked(self.target, "concurrency", cfg.concurrency, is_count, "a whole number >= 1")
        self.facts = FunctionFacts(
            name=spec.name,
            weight=float(spec.weight),
            per_group=per_group,
            takes_tokens=self.trl and (self._takes_any or "completion_ids" in self._takes),
            text=choose_text(spec),
            timeout_s=float(_checked(self.target, "timeout_s", cfg.timeout_s, is_seconds, "seconds > 0")),
            concurrency=concurrency,
            is_async=is_async,
            version=_version(self.target, spec, cfg, reference_key),
            cacheable=_checked(self.target, "cacheable", True, lambda value: isinstance(value, bool), "true or false"),
            columns=tuple(sorted(columns)),
            needs_reference=_checked(
                self.target,
                "needs_reference",
                (reference_key if self.trl else "reference") in required,
                lambda value: isinstance(value, bool),
                "true or false",
            ),
        )

    def score(self, question: Question, responses: Sequence[Response]) -> list[Outcome]:
        """One outcome per response; anything the function raises becomes a failure. No deadline for sync code."""
        try:
            if self.facts.is_async:
                return self.loop.run_until_complete(self.score_async(question, responses))
            value = self._call(question, responses)
            # A decorated async function does not look like one.
            if not isinstance(value, float | dict) and inspect.isawaitable(value):
                value = self.loop.run_until_complete(_finish(value))
            return self._read(value, len(responses))
        # User code may raise anything or call exit(): that is data, counted by the metrics.
        except (Exception, SystemExit) as error:
            return [to_outcome(error)] * len(responses)

    async def score_async(self, question: Question, responses: Sequence[Response]) -> list[Outcome]:
        """The same for an async function, with its deadline."""
        try:
            async with asyncio.timeout(self.facts.timeout_s) as deadline:
                return self._read(await self._call(question, responses), len(responses))
        except (Exception, SystemExit) as error:
            late = isinstance(error, TimeoutError) and deadline.expired()
            failure = RewardFailure("timeout", f"no result within {self.facts.timeout_s:g} s") if late else error
            return [to_outcome(failure)] * len(responses)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """One loop for all calls: a client's connections live in it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop

    def close(self) -> None:
        """Close what the function holds: its own ``close()``, sync or async, then its loop."""
        closing = getattr(self.target, "close", None)
        if callable(closing):
            ended = closing()
            if inspect.isawaitable(ended):
                self.loop.run_until_complete(ended)
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _columns_named(self, spec: FunctionSpec, reference_key: str | None) -> frozenset[str]:
        """The attribute ``required_columns``. The reference's column is passed as ``reference``, so it is not one."""
        expected = "names of columns"
        columns = frozenset(_checked(self.target, "required_columns", (), _are_names, expected))
        if reference_key is not None and reference_key in columns:
            do = "name it reference: it is passed under that name"
            raise ConfigError(explain(f"{spec.key}.function: column", reference_key, "another column", do))
        return columns

    def _check_signature(self, spec: FunctionSpec, per_group: bool) -> None:
        """Raises ConfigError for a function that cannot be called like ours."""
        names = ("prompt", "reference", "columns", "finish_reasons" if per_group else "finish_reason")
        try:
            inspect.signature(self.target).bind(None, **self._keep(dict.fromkeys(names)))
        except TypeError as error:
            first = "responses" if per_group else "response"
            expected = f"a function of ({first}, *, {', '.join(names)}), or of some of these"
            do = f"{error}; pass other parameters in args, or set style: trl"
            raise ConfigError(explain(f"{spec.key}.function", _name_of(self.target), expected, do)) from None
        except ValueError:  # a C function without a signature; calling it will show
            return

    def _call(self, question: Question, responses: Sequence[Response]) -> Any:
        if self.facts.text == "answer":
            opened = question.opens_thought
            responses = [r._replace(text=answer_text(r.text, opens_thought=opened)) for r in responses]
        if self.trl:
            return self.target(**self._keep(self._trl_keywords(question, responses)))
        keywords: dict[str, Any] = {
            "prompt": question.prompt,
            "reference": question.reference,
            "columns": question.columns,
        }
        if self.facts.per_group:
            reasons = [r.finish_reason for r in responses]
            return self.target([r.text for r in responses], **self._keep({**keywords, "finish_reasons": reasons}))
        (response,) = responses
        keywords["finish_reason"] = response.finish_reason
        return self.target(response.text, **self._keep(keywords))

    def _trl_keywords(self, question: Question, responses: Sequence[Response]) -> dict[str, Any]:
        count = len(responses)
        columns = dict(question.columns)
        if self._reference_key is not None:
            columns.setdefault(self._reference_key, question.reference)
        bound = self.target.keywords if isinstance(self.target, functools.partial) else {}
        keywords: dict[str, Any] = {name: [value] * count for name, value in columns.items() if name not in bound}
        if self._messages:
            keywords["prompts"] = [[{"role": "user", "content": question.prompt}] for _ in responses]
            keywords["completions"] = [[{"role": "assistant", "content": r.text}] for r in responses]
        else:
            keywords["prompts"] = [question.prompt] * count
            keywords["completions"] = [r.text for r in responses]
        keywords["completion_ids"] = [list(r.token_ids) for r in responses]
        return keywords

    def _keep(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Those keywords that the function accepts."""
        return keywords if self._takes_any else {name: v for name, v in keywords.items() if name in self._takes}

    def _read(self, value: Any, count: int) -> list[Outcome]:
        if self.trl or self.facts.per_group:
            return to_outcomes(value, count, nan_is_none=self.trl)
        return [to_outcome(value)]


async def _finish(value: Awaitable[Any]) -> Any:
    return await value


def _code_of(target: Any) -> Any:
    """The function that runs: the one a partial wraps, or an instance's ``__call__``."""
    while isinstance(target, functools.partial):
        target = target.func
    return target if inspect.isroutine(target) else type(target).__call__


def _parameters_of(target: Any) -> tuple[list[inspect.Parameter], bool]:
    """The parameters, and whether any other keyword is accepted too."""
    try:
        parameters = [*inspect.signature(target).parameters.values()]
    except (TypeError, ValueError):  # a C function without a signature
        return [], True
    return parameters, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _required(parameters: Sequence[inspect.Parameter]) -> frozenset[str]:
    """Parameters without a default."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return frozenset(p.name for p in parameters if p.default is p.empty and p.kind not in kinds)


def _name_of(target: Any) -> str:
    code = _code_of(target)
    return f"{getattr(code, '__module__', '')}.{getattr(code, '__qualname__', code)}"


def _attribute(target: Any, name: str, default: Any) -> Any:
    while isinstance(target, functools.partial):
        target = target.func
    return getattr(target, name, default)


def _checked(target: Any, name: str, default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
    """The function's own attribute, else ``default``. Raises ConfigError for a value that cannot be meant."""
    value = _attribute(target, name, default)
    if not is_valid(value):
        raise ConfigError(explain(f"{_name_of(target)}: {name}", value, expected, "change the attribute"))
    return value


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(name, str) for name in value)


def _version(target: Any, spec: FunctionSpec, cfg: RewardConfig, reference_key: str | None) -> str:
    """A digest of what affects a result besides its inputs: the module's source, the arguments, ``version``,
    and how its values are read."""
    code = _code_of(target)
    beside = _attribute(target, "args_beside_scores", ())
    module = inspect.getmodule(code)
    file = Path(getattr(module, "__file__", None) or "")
    facts = {
        "rlpost": __version__,
        "function": _name_of(target),
        "source": _source_digest(file),
        "library": [_source_digest(one) for one in sorted(LIBRARY.glob("*.py"))] if _ships(spec) else [],
        "version": str(_attribute(target, "version", "")),
        "values": _source_digest(Path(values.__file__)),
        "text": choose_text(spec),
        "given": [
            _plain(spec.function),
            {name: value for name, value in spec.args.items() if name not in beside},
            *(spec.style, spec.calls),
        ],
        "messages": cfg.messages,
        "reference_key": reference_key,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()[:24]


def _source_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes() if file.is_file() else b"").hexdigest()


def _ships(spec: FunctionSpec) -> bool:
    return not callable(spec.function) and plugins.find_part(spec.function, REWARDS) is not None


def _plain(function: Any) -> Any:
    """As in the configuration; a Python object is represented by its name alone."""
    if isinstance(function, Mapping):
        return dict(function)
    return function if isinstance(function, str) else ""
