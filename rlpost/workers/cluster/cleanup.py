"""Removes what a run leaves outside its processes when its controller ends, in whatever way.

On the controller's machine, a shell waits for the end of a pipe that the controller holds. On every other machine with
workers, an actor of the controller holds such a pipe: Ray ends the actor with its owner. Workers cannot be trusted with
this, since what they leave outside exists for the case that they die. Called by ``workers.cluster.actors``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlpost.errors import RunError, explain

# The inner shell is not a child of this process: Ray kills a process's children with it. A worker that briefly outlives
# a killed controller may write again, so this removes three times. Some processes of a private Ray whose controller was
# killed linger for a minute or more (its agents try to reach it); they are identified by their open files in its
# folder.
_WAIT_AND_REMOVE = """
exec 3<&0
{
    read -r word
    if [ "$word" = now ]; then rm -rf -- "$@"; exit; fi
    for seconds in 1 4 15; do
        sleep $seconds
        if [ -n "$PRIVATE" ]; then
            for open in $(find /proc/[0-9]*/fd -lname "$PRIVATE/*" 2>/dev/null); do
                open=${open#/proc/}
                kill -9 "${open%%/*}" 2>/dev/null
            done
        fi
        rm -rf -- "$@"
    done
} <&3 &
"""
_READY_S = 60.0


class Cleaner:
    """Removes folders when :meth:`clean_up` is called or this process ends, even if it is killed."""

    def __init__(self, folders: Sequence[Path], *, private: Path | None = None) -> None:
        """``private``: one more folder; if this process is killed, processes with files open in it are killed, too."""
        command = ["sh", "-c", _WAIT_AND_REMOVE, "sh", *map(str, [*folders, *filter(None, [private])])]
        self._shell = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PRIVATE": str(private or "")},
        )

    def clean_up(self) -> None:
        """Returns when the folders are gone."""
        assert self._shell.stdin is not None and self._shell.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.write(b"now\n")
            self._shell.stdin.close()
        self._shell.stdout.read()  # ends with the inner shell
        self._shell.wait()


class Guardians:
    """A :class:`Cleaner` on each machine that has workers, except the controller's."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(folders)
        self._of_node: dict[str, Any] = {}

    def cover(self, nodes: Iterable[str]) -> None:
        """Start one on each of these nodes (Ray's ids). Raises RunError if that fails on a node."""
        here = ray.get_runtime_context().get_node_id()
        remote: Any = ray.remote(num_cpus=0, max_restarts=0)(Cleaner)
        new = {
            node: remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                self._folders
            )
            for node in sorted({*nodes} - {here, *self._of_node})
        }
        self._of_node |= new
        try:
            ray.get([guardian.__ray_ready__.remote() for guardian in new.values()], timeout=_READY_S)
        except RayError as error:
            do = "check the machine (`ray status`), then run the same command to resume"
            got = f"none within {_READY_S:g} s on one of {sorted(new)} ({type(error).__name__})"
            raise RunError(explain("cluster: cleanup process", got, "one on each machine", do)) from error

    def clean_up(self) -> None:
        for guardian in self._of_node.values():
            with contextlib.suppress(RayError):  # its machine is gone
                ray.get(guardian.clean_up.remote(), timeout=_READY_S)
                ray.kill(guardian)
        self._of_node.clear()
