"""Seeds of one experiment, and what differs between experiments."""

from rlpost.viewing.report.experiments import differences, group_seeds, name_experiments


def config(**changes: object) -> dict:
    settings = {"name": "a", "seed": 0, "steps": 10, "train": {"lr": 1e-4}, "logging": {"wandb": "auto"}}
    return settings | changes


def test_runs_that_differ_in_seed_name_and_logging_are_one_experiment() -> None:
    same = config(name="b", seed=1, logging={"wandb": "disabled"})
    other = config(train={"lr": 2e-4})
    assert group_seeds([config(), same, other, config(seed=2)]) == [0, 0, 1, 0]


def test_runs_without_a_configuration_stand_alone() -> None:
    assert group_seeds([{}, {}, config()]) == [0, 1, 2]


def test_differences_are_per_key_and_keep_the_seed() -> None:
    rows = differences([config(), config(name="b", seed=1, train={"lr": 2e-4, "clip": True})])
    assert rows == {"seed": ["0", "1"], "train.lr": ["0.0001", "0.0002"], "train.clip": ["(absent)", "true"]}


def test_names_are_the_common_beginning_and_differ() -> None:
    assert name_experiments(["april-seed0", "april-seed1", "sync-0"], [0, 0, 1]) == ["april", "sync-0"]
    assert name_experiments(["demo", "demo-2", "demo-3"], [0, 1, 1]) == ["demo", "demo (2)"]
    assert name_experiments(["3", "4"], [0, 0]) == ["3"]
