"""A few whole steps on real GSM8K problems: a tiny model of random weights, a reward any model varies in."""

import json
from pathlib import Path

import pytest

from .program import SMALL, read_metrics, rlpost, rollouts_of, steps_of

REAL = Path(__file__).parents[3] / "shared/data/gsm8k/train.jsonl"
FIXTURE = Path(__file__).parents[1] / "fixtures/gsm8k_tiny.jsonl"
CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Qwen3 folder of 2 layers with random weights and a tokenizer of single characters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlpost.tasks.char_tokenizer import write_char_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    write_char_tokenizer(folder, CHARACTERS)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=len(CHARACTERS),
        pad_token_id=len(CHARACTERS) + 1,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    source = REAL if REAL.exists() else FIXTURE
    output = rlpost(
        "train",
        "recipe=math/gsm8k",
        f"model.path={model}",
        "model.dtype=float32",
        "device=cpu",
        f"data.train.path={source}",
        f"data.eval.path={FIXTURE}",
        "model.max_context_tokens=null",
        "data.max_prompt_tokens=null",
        "data.long_prompts=drop",
        "reward.function=digit_share",
        "reward.args={}",
        "algo.filter=none",
        "rollout.max_response_tokens=32",
        "eval.max_response_tokens=null",
        "train.lr=1e-3",
        "steps=3",
        "eval.every=2",
        "checkpoint.every=2",
        *SMALL,
        cwd=folder,
    )
    return folder / "runs/gsm8k", output


def test_gradients_flow_and_rewards_vary(run):
    steps = steps_of(run[0])
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row["loss/grad_norm"] > 0 and row["reward/std"] > 0 and row["loss/skipped_updates"] == 0
        assert row["mismatch/canary"] < 1e-5 and row["mismatch/lag_0/abs_log_ratio"] < 1e-4


def test_evaluation_and_checkpoint_happened_when_due(run):
    evaluated = [row["step"] for row in read_metrics(run[0]) if "eval/accuracy" in row]
    assert evaluated == [0, 2, 3]
    assert [p.name for p in sorted((run[0] / "checkpoints").iterdir())] == ["step-000002", "step-000003"]


def test_the_ledger_balances(run):
    summary = json.loads((run[0] / "finished.json").read_text())
    assert summary["groups"] == {"trained": 12}
    trained = [row for rows in rollouts_of(run[0]).values() for row in rows]
    assert sum(len(row["token_ids"]) for row in trained) == summary["tokens"]["trained"]
    assert all(len(r["token_ids"]) == len(r["rollout_logprobs"]) == len(r["policy_versions"]) for r in trained)
    assert len({(row["uid"], row["index"]) for row in trained}) == len(trained) == 3 * 4 * 4


def test_carried_samples_keep_the_versions_that_wrote_them(run):
    for step, rows in rollouts_of(run[0]).items():
        for row in rows:
            versions = row["policy_versions"]
            assert versions == sorted(versions) and (not versions or versions[-1] <= step - 1)


def test_the_trained_model_loads_and_differs_from_the_start(run, model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run[0] / "model").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)
    assert AutoTokenizer.from_pretrained(run[0] / "model").eos_token_id == len(CHARACTERS)


def test_the_closing_table_says_what_a_newcomer_asks(run):
    for words in ("Accuracy before", "Accuracy after", "Response length", "Idle share", "Everything is in"):
        assert words in run[1]
