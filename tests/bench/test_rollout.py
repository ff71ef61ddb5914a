"""``rlpost bench rollout`` on the simulated engine: its bars, as ratios within one run."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from rlpost.bench.rollout import (
    ADAPTIVE,
    KEEPING,
    OURS,
    PUBLISHED,
    PUBLISHED_BY_GROUP,
    STRATEGIES,
    SYNCHRONOUS,
    Plan,
    run,
)
from rlpost.cli import main
from rlpost.config.compose import load_config
from rlpost.errors import ConfigError

SMALL = ["rollout.groups_per_step=16", "rollout.samples_per_group=4", "engine.max_slots=16"]


def bench(tmp_path, *overrides, **plan):
    cfg = load_config(["recipe=math/arithmetic", "rollout.max_response_tokens=512", *overrides])
    results = run(cfg, Plan(engines=["simulated"], **plan), tmp_path, say=lambda line: None)
    return {(r.lengths, r.strategy): r for r in results}


def test_april_comes_within_five_percent_of_the_saturated_engine(tmp_path):
    lengths = ["lognormal", "uniform", "bimodal"]
    results = bench(tmp_path, *SMALL, lengths=lengths, repeats=1)
    for name in lengths:
        ours, synchronous = results[name, OURS], results[name, SYNCHRONOUS]
        assert ours.of_saturated[0] >= 0.95
        if synchronous.of_saturated[0] <= 0.65:
            assert ours.of_saturated[0] >= 1.44 * synchronous.of_saturated[0]
        keeping = results[name, KEEPING]
        assert keeping.figures[0].replayed_tokens == 0 and keeping.of_saturated[0] >= ours.of_saturated[0]
        assert ours.figures[0].discarded_share == 0 and ours.figures[0].staleness_max <= 4
        assert ours.of_saturated[0] >= 1.10 * results[name, PUBLISHED_BY_GROUP].of_saturated[0]
        assert ours.of_saturated[0] >= 0.98 * results[name, PUBLISHED].of_saturated[0], "both fill all slots here"
    assert results["lognormal", SYNCHRONOUS].of_saturated[0] <= 0.65, "lengths without a tail prove nothing"

    saved = json.loads((tmp_path / "results.json").read_text())
    assert len(saved["results"]) == len(lengths) * len(STRATEGIES) and saved["slots"] == 16
    bars = ElementTree.parse(tmp_path / "results.svg").getroot().findall("{http://www.w3.org/2000/svg}rect[@x]")
    assert len(bars) == len(saved["results"])


@pytest.mark.parametrize("lengths", ["lognormal", "bimodal"])
def test_with_a_slot_for_every_sample_of_a_step_the_adaptive_ratio_keeps_up(tmp_path, lengths):
    """A fixed ratio of 2, ours or the published one, leaves slots empty there, whatever the staleness bound."""
    every = ["engine.max_slots=64", "rollout.max_staleness=10"]
    results = bench(tmp_path, *SMALL[:2], *every, lengths=[lengths], repeats=1)
    adaptive, ours, published = (results[lengths, s] for s in (ADAPTIVE, OURS, PUBLISHED))
    assert adaptive.of_saturated[0] >= 0.90 and adaptive.figures[0].staleness_max <= 10
    assert adaptive.of_saturated[0] >= 1.10 * max(ours.of_saturated[0], published.of_saturated[0])


def test_dear_prefill_shows_as_the_time_of_replay(tmp_path):
    cheap, dear = (
        bench(tmp_path, *SMALL, lengths=["lognormal"], repeats=1, steps=8, prefill_ratio=ratio)["lognormal", PUBLISHED]
        for ratio in (50.0, 2.0)
    )
    assert dear.figures[0].replayed_tokens == cheap.figures[0].replayed_tokens > 0
    assert replay_s(dear) == pytest.approx(25 * replay_s(cheap), rel=1e-6)
    assert dear.of_saturated[0] < cheap.of_saturated[0]


def replay_s(result):
    share, duration_s = result.replay_time_share[0], result.figures[0].duration_s
    return duration_s * share / (1 + share)


@pytest.mark.parametrize(
    "plan, said", [({"engines": ["tpu"]}, "--engines"), ({"steps": 0}, "--steps"), ({"repeats": 0}, "--repeats")]
)
def test_an_impossible_plan_is_refused_before_anything_runs(tmp_path, plan, said):
    cfg = load_config(["recipe=math/arithmetic"])
    with pytest.raises(ConfigError, match=said):
        run(cfg, Plan(**plan), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_schedule_that_it_does_not_measure_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="rollout.on_stale"):
        run(load_config(["recipe=math/arithmetic", "rollout.on_stale=restart"]), Plan(), tmp_path / "out")


def test_the_simulated_engine_asks_for_no_model(tmp_path):
    """Its lengths may be longer than any context of the recipe's model."""
    words = ["bench", "rollout", "recipe=math/arithmetic", "rollout.max_response_tokens=1024", *SMALL]
    words += ["--engines", "simulated", "--lengths", "uniform", "--steps", "2", "--repeats", "1", "-o", str(tmp_path)]
    assert main(words) == 0
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["max_response_tokens"] == 1024 and saved["seed"] == 0
    assert saved["revision"] and "cores" in saved["machine"] and "unknown" not in saved["versions"].values()
