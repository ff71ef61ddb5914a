"""Rows of a made-up table, for the tests of this folder."""

from dataclasses import asdict

from rlpost.bench.learning.cells import STRATEGIES, main_cell
from rlpost.bench.learning.table import Point, Row


def point(step, accuracy, *, cpu_s, num_judged=500, samples=None):
    return Point(
        step=step,
        samples=128 * step if samples is None else samples,
        wall_s=1.05 * cpu_s,
        cpu_s=cpu_s,
        num_correct=round(accuracy * num_judged),
        num_judged=num_judged,
        response_tokens=10.0 + step,
    )


def row(cell, accuracy, *, cpu_s=100.0, digest="d", **values):
    """Accuracy rises in a straight line over 40 steps from 0.1, evaluated at the beginning, half-way and at the end."""
    curve = [point(0, 0.1, cpu_s=0.0), point(20, (0.1 + accuracy) / 2, cpu_s=cpu_s / 2), point(40, 0.0, cpu_s=cpu_s)]
    fields = dict(
        cell=cell.name,
        digest=digest,
        revision="abc",
        versions={"torch": "2.13.0"},
        date="2026-11-25T20:00:00+00:00",
        machine="2 cores, a processor",
        load_before=1.0,
        load_after=1.5,
        samples=5120,
        tokens=200_000,
        wall_s=1.05 * cpu_s,
        cpu_s=cpu_s,
        total_wall_s=3 * cpu_s,
        total_cpu_s=1.5 * cpu_s,
        eval_cpu_s=40.0,
        curve=curve,
        final=point(40, accuracy, cpu_s=cpu_s, num_judged=2000),
        final_problems=500,
        right_tokens=80.0,
        wrong_tokens=20.0,
        reward=[n / 100 for n in range(40)],
        length=[float(n) for n in range(40)],
        carried_share=0.5,
        lag_shares={"lag_0": 0.5, "lag_1": 0.3, "lag_2": 0.2},
        lag_abs_log_ratio={"lag_0": 0.0, "lag_1": 0.02, "lag_2": 0.05},
        changed_share=0.01,
        clip_low_share=0.005,
        clip_high_share=0.001,
        approx_kl=0.002,
        idle_share=0.1,
        discarded_share=0.0,
    )
    return Row(**(asdict(cell) | fields | values))


def table(algo, accuracies, **values):
    """``accuracies``: strategy -> one for each seed."""
    assert set(accuracies) <= set(STRATEGIES)
    return [
        row(main_cell(algo, strategy, seed), accuracy, **values)
        for strategy, by_seed in accuracies.items()
        for seed, accuracy in enumerate(by_seed)
    ]
