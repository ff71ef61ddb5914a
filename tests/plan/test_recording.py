"""What is read of a run: whole lengths of unfinished responses, prompts, the steps that count; what is refused."""

import json

import pytest

from rlpost.errors import RunError
from rlpost.plan.recording import WINDOW, read_recording
from rlpost.reporting.timeline import read_timeline
from tests.plan.recorded import PROMPT_TOKENS, length_of, record, rewrite


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return record(tmp_path_factory.mktemp("runs") / "short", [], steps=8)


def test_finished_responses_have_their_lengths_and_others_longer_ones(short):
    recording = read_recording(short, warm_up=2)
    timeline = [json.loads(line) for line in (short / "timeline.jsonl").read_text().splitlines()]
    so_far, finished = {}, set()
    for row in timeline:
        spans = row.get("spans", {"uid": []})
        for n, uid in enumerate(spans["uid"]):
            name = f"{uid}/{spans['index'][n]}"
            so_far[name] = so_far.get(name, 0) + spans["tokens"][n]
            finished |= {name} if spans["end"][n] in ("stop", "length") else set()
    assert len(recording.groups) == len({name.partition("/")[0] for name in so_far})
    num_unfinished = 0
    for draw, group in enumerate(recording.groups):
        for index, length in enumerate(group.lengths):
            name = f"0:{draw}/{index}"
            if name in finished:
                assert length == min(128, length_of(name))
            else:
                num_unfinished += 1
                assert length > so_far.get(name, 0)
    assert num_unfinished >= 4


def test_unfinished_responses_take_the_tail_that_they_stand_for(short, tmp_path):
    """All of one group's samples: two finished after 10 and 30 tokens, one cut off after 20: it can only be a 30."""

    def one_group(row):
        if "spans" in row:
            columns = {"uid": ["0:0"] * 3, "index": [0, 1, 2], "tokens": [10, 30, 20]} | {"kind": ["launched"] * 3}
            columns |= {"end": ["stop", "stop", "paused"]} | {
                name: [0] * 3 for name in ("replica", "policy_version", "start_s", "end_s")
            }
            empty = {name: [] for name in columns}
            row["spans"] = columns if row["step"] == 8 else empty
        return row

    run = rewrite(short, tmp_path / "run", "timeline.jsonl", one_group)
    (group,) = read_recording(run, warm_up=2).groups
    assert group.lengths[:3] == (10, 30, 30) and group.first_step == 8
    assert group.lengths[3] in (10, 30)  # it was never started: any length may be its


def test_prompts_come_from_what_was_replayed_and_cached_tokens_cost_nothing(short, tmp_path):
    recording = read_recording(short, warm_up=2)
    assert recording.prompt_tokens == pytest.approx(PROMPT_TOKENS) and recording.prefill_share == pytest.approx(1.0)

    def half_cached(row):
        return row | {"rollout/prefill_tokens": row["rollout/prefill_tokens"] / 2}

    cached = read_recording(rewrite(short, tmp_path / "cached", "metrics.jsonl", half_cached), warm_up=2)
    assert cached.prompt_tokens == pytest.approx(PROMPT_TOKENS) and cached.prefill_share == pytest.approx(0.5)


def test_samples_that_kept_their_kv_cache_replayed_nothing(tmp_path):
    run = record(tmp_path / "run", ["rollout.keep_kv=true"], steps=6)
    kinds = {kind for t in read_timeline(run) for kind in t.spans["kind"]}
    assert kinds == {"launched", "kept"}
    recording = read_recording(run, warm_up=2)
    assert recording.prompt_tokens == pytest.approx(PROMPT_TOKENS) and recording.prefill_share == 1.0
    for draw, group in enumerate(recording.groups[:20]):
        assert group.lengths == tuple(min(128, length_of(f"0:{draw}/{index}")) for index in range(4))


def test_a_synchronous_run_tells_what_was_computed_of_a_prompt(tmp_path):
    run = record(tmp_path / "run", ["rollout.oversample=1.0"], steps=6)
    recording = read_recording(run, warm_up=2)
    assert recording.prompt_tokens == pytest.approx(PROMPT_TOKENS) and recording.prefill_share == 1.0


def test_the_warm_up_is_left_out(short):
    recording = read_recording(short, warm_up=3)
    assert [step.step for step in recording.steps] == [4, 5, 6, 7, 8]
    assert len(recording.evaluations) == 1, "the last one; the first belongs to step 1"
    assert recording.first_step == 1 and recording.num_replayed == 8
    assert min(group.first_step for group in recording.groups) == 1, "the replay begins where the run did"
    assert min(group.first_step for group in recording.typical_groups) == 4
    row = [json.loads(line) for line in (short / "metrics.jsonl").read_text().splitlines()][3]
    assert recording.steps[0].step_s == pytest.approx(row["time/step"])
    assert recording.steps[0].tokens == row["loss/tokens"] + PROMPT_TOKENS * row["loss/sequences"]


def test_a_long_run_is_read_from_its_end(tmp_path):
    run = record(tmp_path / "run", ["rollout.groups_per_step=2"], steps=WINDOW + 10)
    recording = read_recording(run, warm_up=2)
    assert recording.first_step == 11
    assert recording.steps[0].step == 11 + 3 + 2, "until what was begun before is over: max_staleness + 2"
    assert recording.prompt_tokens == pytest.approx(PROMPT_TOKENS)
    assert min(group.first_step for group in recording.groups) == 11


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("metrics.jsonl", lambda row: row if row["step"] <= 4 else None, "with 2 steps"),
        ("timeline.jsonl", lambda row: {k: v for k, v in row.items() if k != "iterations"}, "engines' iterations"),
    ],
)
def test_a_run_that_says_too_little_is_refused(short, tmp_path, file, change, said):
    run = rewrite(short, tmp_path / "run", file, change)
    with pytest.raises(RunError, match=said):
        read_recording(run, warm_up=2)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="expected a run directory"):
        read_recording(tmp_path, warm_up=2)
