"""The study as decided beforehand, and what makes a row count."""

import pytest

from rlpost.bench.learning.cells import CORRECTED, PLAIN, SYNC, all_cells, explored_cells, main_cell, main_cells
from rlpost.bench.learning.settings import FIXED, digest_settings, settings_of
from rlpost.config import walk_fields
from rlpost.config.compose import load_config


def test_the_comparison_has_five_pairs_and_dapo_three():
    cells = main_cells()
    assert len(cells) == len(set(cells)) == 2 * 3 * 5 + 3 * 3
    for algo, num_seeds in (("grpo", 5), ("gspo", 5), ("dapo", 3)):
        for strategy in (SYNC, PLAIN, CORRECTED):
            seeds = [c.seed for c in cells if (c.algo, c.strategy) == (algo, strategy)]
            assert seeds == list(range(num_seeds))
    assert [c.seed for c in cells] == sorted(c.seed for c in cells), "whole pairs come first"


def test_the_exploration_is_where_the_staleness_bound_allows_it_and_shares_runs():
    cells = explored_cells()
    places = {(c.oversample, c.max_staleness) for c in cells}
    assert places == {(o, s) for o in (1.5, 2.0, 3.0) for s in (1, 4, 8)} - {(3.0, 1)}
    assert len(cells) == 8 * 2 * 2 and {c.algo for c in cells} == {"grpo"}
    assert len(all_cells()) == 39 + 32 - 4 and len({c.name for c in all_cells()}) == len(all_cells())
    assert main_cell("grpo", PLAIN, 1) in cells


def settings(*overrides):
    cell = main_cell("grpo", CORRECTED, 0)
    return settings_of(load_config([*cell.overrides, *overrides]) if overrides else cell.compose())


def test_a_cell_is_what_its_name_says():
    made = {name: settings_of(main_cell("gspo", name, 3).compose()) for name in (SYNC, PLAIN, CORRECTED)}
    assert made[PLAIN] == settings_of(load_config(main_cell("gspo", PLAIN, 3).overrides)), "what train is given"
    assert {s["seed"] for s in made.values()} == {3} and {s["algo.loss"] for s in made.values()} == {"gspo"}
    assert [made[n]["rollout.oversample"] for n in made] == [1.0, 2.0, 2.0]
    assert [made[n]["rollout.max_staleness"] for n in made] == [0, 4, 4]
    assert [made[n]["algo.correction"] for n in made] == ["sequence_truncate", "none", "sequence_truncate"]
    assert {s["train.optimizer_steps_per_rollout"] for s in made.values()} == {4}
    differ = {key for key in made[SYNC] if len({str(s[key]) for s in made.values()}) > 1}
    assert differ == {"rollout.oversample", "rollout.max_staleness", "algo.correction"}


@pytest.mark.parametrize(
    "override", ["train.lr=1e-5", "steps=3", "algo.clip_low=0.1", "data.eval.generator.min_terms=9", "train.eps=1e-6"]
)
def test_another_setting_is_another_study(override):
    assert digest_settings(settings(override), "m") != digest_settings(settings(), "m")


@pytest.mark.parametrize("override", ["name=x", "logging=quiet", "threads=2", "checkpoint.every=3", "runs_dir=/tmp"])
def test_how_a_run_is_watched_and_kept_is_of_no_account(override):
    assert digest_settings(settings(override), "m") == digest_settings(settings(), "m")


def test_other_problems_or_weights_are_another_study():
    assert digest_settings(settings(), "m") != digest_settings(settings(), "n")


def test_defaults_of_the_study_count_and_all_keys_exist():
    assert {key.name for key in walk_fields()} >= FIXED
    assert settings()["rollout.admission"] == "first_complete"
