"""``rlpost plan`` as a user meets it: its output, and what it refuses."""

import json

import pytest

from rlpost import cli
from tests.plan.recorded import BASE, TWO_WORKERS, record, rewrite

FEW = ["--steps", "4", "--repeats", "2"]
GIVEN = [f"cost.{name}=0.001" for name in "iteration_s sample_s prefill_s update_s update_token_s publish_s".split()]
GIVEN += ["cost.other_s=0.001", "cost.prompt_tokens=20"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return record(tmp_path_factory.mktemp("runs") / "short", [], steps=8)


def run(capsys, *argv):
    code = cli.main(["plan", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_table_with_its_reason_its_costs_and_its_check(capsys, short):
    code, out, err = run(capsys, *BASE, f"from={short}", *FEW)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in lines[1:8]] == ["1", "1.25", "1.5", "2", "2.5", "3", "4"]
    assert [line for line in lines if line.endswith("<- configured")] == [lines[4]]
    assert "best: oversample" in out and "cost.iteration_s" in out and "replayed over 6 steps" in out
    assert "extrapolated" not in out


def test_json_holds_the_same_and_what_is_extrapolated(capsys, short):
    other = [*TWO_WORKERS, "engine.max_slots=64", "train.lr=3e-4", "cost.publish_s=7", "seed=3"]
    code, out, _ = run(capsys, *BASE, f"from={short}", *other, "--ratios", "1,2", *FEW, "--json")
    plan = json.loads(out)
    assert code == 0 and [row["oversample"] for row in plan["rows"]] == [1.0, 2.0]
    for row in plan["rows"]:
        assert row["publish_s"] == 7
        parts = (row[name] for name in ("generate_s", "update_s", "publish_s", "other_s"))
        assert row["step_s"] == pytest.approx(sum(parts)) and row["step_s_error"] > 0
    said = "\n".join(plan["extrapolated"])
    for words in ("cluster=local", "2 workers, but the run had 1", "cost.reduce_s", "max_slots=64", "train.lr"):
        assert words in said
    assert "seed" not in said


def test_a_run_without_an_evaluation_is_told_what_it_lacks(capsys, short, tmp_path):
    def without(row):
        return {k: v for k, v in row.items() if row.get("iterations", {}).get("phase") != "eval" or k != "iterations"}

    run_dir = rewrite(short, tmp_path / "run", "timeline.jsonl", without)
    code, out, _ = run(capsys, *BASE, f"from={run_dir}", "--ratios", "2", *FEW)
    assert code == 0 and "no evaluation after its warm-up" in out


def test_an_adaptive_configuration_has_a_row_of_its_own(capsys, short):
    _, out, _ = run(capsys, *BASE, f"from={short}", "rollout.adaptive_oversample=true", "--ratios", "1", *FEW, "--json")
    plan = json.loads(out)
    assert [row["oversample"] for row in plan["rows"]] == [1.0, 2.0, "adaptive"] and plan["configured"] == "adaptive"


def test_without_a_run_lengths_and_costs_may_be_given(capsys):
    code, out, _ = run(capsys, *BASE, "lengths=uniform", *GIVEN, "--ratios", "2", *FEW, "--json")
    plan = json.loads(out)
    assert code == 0 and plan["check"] is None
    assert plan["rows"][0]["update_s"] == pytest.approx(0.001 * (1 + 32 * (20 + 8.5)), rel=0.1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "from=RUN_DIR"),
        (["lengths=lognormal"], "cost.iteration_s"),
        (["lengths=lognormal", *GIVEN, *TWO_WORKERS], "no cost.reduce_s"),
        (["lengths=nosuch", *GIVEN], "lognormal"),
        (["from=nowhere"], "nowhere"),
        (["from=a", "from=b"], "from=a was already given"),
        (["cost.speed=1"], "cost.speed"),
        (["cost.sample_s=fast"], "a number >= 0"),
        (["from=.", "--ratios", "9"], "max_staleness + 1 = 4"),
        (["from=.", "--repeats", "1"], "--repeats"),
        (["from=.", "rollout.oversample=9"], "rollout.oversample"),
        (["from=.", "rollout.on_stale=restart"], "restarts are not simulated"),
        (["from=.", "stepz=3"], "did you mean steps?"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(capsys, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *BASE, *argv)
    assert code in (2, 3) and out == "" and err.count("\n") == 1 and said in err
