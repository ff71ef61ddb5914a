"""Bad input gets one clear line before a device is touched; good input gets its arithmetic and its plan."""

import importlib
import json
import math
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from rlpost.algos import table
from rlpost.config import Config, walk_fields
from rlpost.config.compose import list_recipes, load_config
from rlpost.config.resolve import resolve
from rlpost.errors import ConfigError, DataError, ModelError, RunError, UserError
from rlpost.preflight import checks
from rlpost.preflight.check_values import check_divisible, check_values
from rlpost.preflight.checks import check
from rlpost.preflight.device_plan import ASSUMED_GPU_BYTES, choose_sleep, format_bytes, margin_bytes, plan_device

SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 16,
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


DEFAULTS = {key.name: key.default for key in walk_fields()}
RULES = {key.name: key.rule for key in walk_fields() if key.rule is not None}
RANGES = [name for name, rule in RULES.items() if not rule.choices and not rule.table and rule.length is None]
CHOICES = [name for name, rule in RULES.items() if rule.choices]


@pytest.fixture
def cfg(tmp_path):
    """A run that passes: a model folder of a few bytes, three lines of data, room for 32 + 32 tokens."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    save_file({"w": np.zeros(3, np.float32)}, model / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # a token a word
    tokenizer.save(str(model / "tokenizer.json"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a " * n, "answer": "1"}) + "\n" for n in (3, 5, 4)))
    cfg = Config(name="run", runs_dir=str(tmp_path / "runs"), device="cpu")
    cfg.model.path = str(model)
    cfg.data.train.path = cfg.data.eval.path = str(data)
    cfg.rollout.max_response_tokens = 32
    return cfg


def set_key(cfg, key, value):
    *path, last = key.split(".")
    for part in path:
        cfg = getattr(cfg, part)
    assert hasattr(cfg, last)
    setattr(cfg, last, value)


def fails(cfg, kind, *expected, command="train", **changes):
    for key, value in changes.items():
        set_key(cfg, key.replace("__", "."), value)
    with pytest.raises(UserError) as caught:
        check(cfg, command)
    message = str(caught.value)
    assert isinstance(caught.value, kind) and "\n" not in message
    for text in expected:
        assert text in message
    return message


def test_a_good_run_passes_and_prints_its_arithmetic(cfg, tmp_path):
    cfg.rollout.groups_per_step, cfg.rollout.samples_per_group, cfg.steps = 6, 4, 10
    cfg.train.optimizer_steps_per_rollout, cfg.train.epochs = 3, 2
    text = str(check(cfg))
    assert "6 prompts x 4 samples = 24 samples per step, at most 768 response tokens (32 each)" in text
    assert "12 groups open at most (APRIL, tokens up to 4 versions old)" in text
    assert "6 optimizer steps per rollout (3 per epoch x 2), about 8 samples each" in text
    assert "10 steps: 60 prompts, 240 samples, 60 optimizer steps" in text
    assert "longest prompt 5 tokens of 32 allowed" in text
    assert "on the device" in text and "KV cache" in text
    assert not (tmp_path / "runs").exists()  # nothing is left behind
    assert check(cfg).not_checked == []


@pytest.mark.parametrize("recipe", sorted(list_recipes()))
def test_every_shipped_recipe_checks(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    report = check(load_config([f"recipe={recipe}", f"runs_dir={tmp_path}"]))
    assert [title for title, _ in report.sections][0] == "Batch"
    assert any("Memory" in title for title, _ in report.sections)


def test_the_demo_leaves_nothing_unchecked(tmp_path):
    cfg = load_config(["recipe=math/arithmetic", f"runs_dir={tmp_path}"])
    assert check(cfg).not_checked == []
    assert "Supervised training" in str(check(cfg, "sft"))
    assert "Data for evaluation" in str(check(cfg, "eval"))


def test_the_4b_recipe_says_what_it_could_not_check(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    text = str(check(load_config(["recipe=math/dapo_17k_qwen3_4b", f"runs_dir={tmp_path}"])))
    assert "4,022,468,096 parameters" in text and "256 samples per step" in text
    for what in ("model Qwen/Qwen3-4B", "data.train: BytedTsinghua-SIA/DAPO-Math-17k", "data.eval"):
        assert f"not checked: {what}" in text


# -- values --------------------------------------------------------------------------------------------------------


def test_oversample_messages_in_the_house_form(cfg):
    message = fails(cfg, ConfigError, rollout__oversample=0.5)
    assert message == "rollout.oversample: got 0.5; expected >= 1.0; use 1.0 for synchronous rollouts"
    fails(cfg, ConfigError, ">= 1.0", rollout__oversample=math.nan)
    fails(cfg, ConfigError, "a finite number >= 1.0", rollout__oversample=math.inf)
    fails(cfg, ConfigError, "max_staleness + 1 = 5", rollout__oversample=5.5)
    cfg.rollout.oversample = 5.0
    check(cfg)
    fails(cfg, ConfigError, "max_staleness + 1 = 1", rollout__oversample=1.5, rollout__max_staleness=0)
    cfg.rollout.oversample = 1.0
    fails(cfg, ConfigError, "first_begun", rollout__admission="first_begun", rollout__on_stale="restart")
    fails(cfg, ConfigError, ">= 1 with", rollout__adaptive_oversample=True, rollout__max_staleness=0)


def with_lessons():
    cfg = Config()
    cfg.sft.steps, cfg.sft.generator = 1, {"_target_": "any.lessons"}
    return cfg


def test_the_rules_are_found():
    assert len(RANGES) > 70 and len(CHOICES) > 14


@pytest.mark.parametrize("key", RANGES)
def test_every_range_is_held_on_both_sides(key):
    rule, command = RULES[key], "sft" if key.startswith("sft.") else "train"
    bad = [] if isinstance(DEFAULTS[key], int) else [math.nan, math.inf, -math.inf]
    bad += [bound - 1 for bound in (rule.low, rule.above) if bound is not None]
    bad += [bound + 1 for bound in (rule.high, rule.below) if bound is not None]
    bad += [bound for bound in (rule.above, rule.below) if bound is not None]
    assert bad
    for value in bad:
        cfg = with_lessons()
        if key == "sft.epochs":
            cfg.sft.steps = cfg.sft.generator = None
            cfg.data.train.path = "train.jsonl"
        set_key(cfg, key, value)
        with pytest.raises(ConfigError, match=f"^{key}: got ".replace(".", r"\.")):
            check_values(cfg, command)
    for value in (rule.low, rule.high):
        cfg = with_lessons()
        if key == "sft.epochs":
            cfg.sft.steps = cfg.sft.generator = None
            cfg.data.train.path = "train.jsonl"
        set_key(cfg, key, value)
        # Other rules want more of these.
        if value is not None and key not in ("rollout.samples_per_group", "rollout.max_staleness"):
            check_values(cfg, command)


@pytest.mark.parametrize("key", CHOICES)
@pytest.mark.parametrize("command", ["train", "sft"])
def test_every_choice_is_held(key, command):
    cfg = with_lessons()
    check_values(cfg, command)
    set_key(cfg, key, "nosuch")
    with pytest.raises(ConfigError, match=f"^{key}: got 'nosuch'; expected one of"):
        check_values(cfg, command)


def test_a_warm_start_is_held_to_its_own_numbers_only():
    check_values(Config(), "train")  # neither sft.steps nor sft.epochs is set
    cfg = with_lessons()
    cfg.train.lr = -1.0
    check_values(cfg, "sft")
    for key, value in (("seed", -1), ("threads", 0), ("sft.lr", 0.0), ("sft.betas", [0.9]), ("checkpoint.every", -2)):
        cfg = with_lessons()
        set_key(cfg, key, value)
        with pytest.raises(ConfigError, match=f"^{key}: got "):
            check_values(cfg, "sft")


def test_impossible_batches(cfg):
    fails(cfg, ConfigError, "<= rollout.groups_per_step = 32", train__optimizer_steps_per_rollout=33)
    cfg.train.optimizer_steps_per_rollout = 32
    check(cfg)
    cfg.engine.max_slots = 64
    fails(cfg, ConfigError, "engine.max_slots = 64", rollout__max_in_flight=65)


def test_what_the_engine_would_refuse_after_a_minute(cfg):
    fails(cfg, ConfigError, "token ids from 0 to 9", "-5, 10", rollout__stop_token_ids=[-5, 9, 10])
    cfg.rollout.stop_token_ids = [9]
    token_bytes = 2 * 1 * 1 * 32 * 4  # key and value, layers, heads, head size, bytes of a float32
    fails(cfg, ConfigError, f">= {33 * token_bytes}", engine__kv_cache_bytes=33 * token_bytes - 1)
    cfg.engine.kv_cache_bytes = 33 * token_bytes
    check(cfg)
    config = f"{cfg.model.path}/config.json"
    with open(config, "w") as file:
        json.dump(SHAPE | {"head_dim": 16}, file)
    fails(cfg, ModelError, config, "head size: got 16", "32, 64, 80")


def test_a_group_of_one(cfg):
    fails(cfg, ConfigError, ">= 2", "advantage grpo", rollout__samples_per_group=1)
    fails(cfg, ConfigError, "dynamic_sampling", algo__advantage="reinforce_pp", algo__filter="dynamic_sampling")
    cfg.algo.filter = "none"
    check(cfg)
    for name, part in table.ADVANTAGES.items():
        for value in (name, part.path, {"_target_": name}):
            cfg.algo.advantage = value
            if part.compares_group:
                fails(cfg, ConfigError, ">= 2", "compares the samples of a group")
            else:
                check(cfg)


@pytest.mark.parametrize(("key", "value"), [("top_p", 0.9), ("top_k", 5)])
def test_top_p_and_top_k_need_the_correction_off(cfg, key, value):
    set_key(cfg, f"rollout.{key}", value)
    fails(cfg, ConfigError, f"rollout.{key}", "token_truncate")
    cfg.algo.correction = "none"
    check(cfg)
    cfg.algo.correction = "token_mask"
    cfg.rollout.top_p, cfg.rollout.top_k, cfg.eval.top_p = 1.0, 0, 0.7  # evaluation is free
    check(cfg)


def test_the_trainers_logprobs_need_a_file_to_be_in(cfg):
    keys = {"logging__trainer_logprobs": True, "logging__keep_rollouts": False}
    fails(cfg, ConfigError, "logging.trainer_logprobs", "logging.keep_rollouts=true", **keys)


def test_optimizers_and_gradient_reductions(cfg):
    own = {"_target_": "rlpost.train.optimization.all_ranks"}
    fails(cfg, ConfigError, "train.offload_optimizer", train__offload_optimizer=True, train__gradient_reduction=own)
    cfg.train.offload_optimizer = False
    check(cfg)
    fails(cfg, ConfigError, "train.optimizer", "'adams'", train__optimizer="adams")


def test_zero_stages_and_offload(cfg):
    fails(cfg, ConfigError, "got 0", "expected one of 1, 2, 3", "bfloat16", "gradient norm", train__zero_stage=0)
    fails(cfg, ConfigError, "got 4", train__zero_stage=4)
    fails(cfg, ConfigError, "zero_stage 2", train__zero_stage=2, train__offload_params=True)
    fails(cfg, ConfigError, "sleep_offload=false", train__zero_stage=3)
    cfg.train.sleep_offload = False
    assert any("offload" in warning for warning in check(cfg).warnings)  # it does nothing on a CPU
    fails(cfg, ConfigError, "train.betas: got [0.9]; expected 2 numbers, each >= 0 and < 1", train__betas=[0.9])
    fails(cfg, ConfigError, "train.betas", train__betas=[0.9, 1.0])


@pytest.mark.parametrize("key", ["advantage", "loss", "reduction", "filter", "correction", "kl_estimator"])
def test_unknown_parts(cfg, key):
    fails(cfg, ConfigError, f"algo.{key}", **{f"algo__{key}": "nosuch"})


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("rollout.oversample", 1.0, "nothing is carried over"),
        ("rollout.on_stale", "restart", "no use for its KV cache"),
        ("deterministic", True, "was killed has lost its KV cache"),
        ("cluster.kind", "ray", "another engine"),
    ],
)
def test_a_kv_cache_is_kept_only_where_something_can_go_on_with_it(cfg, key, value, why):
    cfg.rollout.keep_kv = True
    check(cfg)
    message = fails(cfg, ConfigError, "rollout.keep_kv: got True", why, **{key.replace(".", "__"): value})
    assert key.removesuffix(".kind") in message
    cfg.rollout.keep_kv = False
    check(cfg)


def test_there_is_one_engine(cfg):
    fails(cfg, ConfigError, "engine.kind", "one of vllm", engine__kind="simulated")


def test_what_a_cluster_cannot_be(cfg):
    fails(cfg, ConfigError, "cluster.kind", "one of local, ray", cluster__kind="slurm")
    cfg.cluster.kind = "local"
    fails(cfg, ConfigError, "cluster.num_workers", "use cluster=ray", cluster__num_workers=2)
    cfg.cluster.kind = "ray"
    fails(cfg, ConfigError, "deterministic", "cluster=local", deterministic=True)
    cfg.deterministic = False
    fails(cfg, ConfigError, "cluster.hang_s", "heartbeat_s", cluster__hang_s=4.0)
    cfg.cluster.hang_s = 60.0
    cfg.engine.max_slots = 64
    fails(cfg, ConfigError, "rollout.max_in_flight", "over all engines", rollout__max_in_flight=1000)


def test_what_an_engine_of_several_devices_cannot_be(cfg):
    fails(cfg, ConfigError, "engine.tensor_parallel", "use cluster=ray", engine__tensor_parallel=2)
    cfg.cluster.kind, cfg.cluster.num_workers = "ray", 6
    fails(cfg, ConfigError, "engine.tensor_parallel", "a power of two", engine__tensor_parallel=3)
    fails(cfg, ConfigError, "cluster.num_workers", "a multiple of 4", engine__tensor_parallel=4)
    fails(cfg, ConfigError, "num_attention_heads = 2", cluster__num_workers=8)
    cfg.engine.tensor_parallel = 2  # one KV head at both devices
    check(cfg, "train")
    cfg.engine.max_slots = 64
    assert cfg.num_engines == 4 and cfg.max_in_flight == 4 * 64
    fails(cfg, ConfigError, "rollout.max_in_flight", "= 256", rollout__max_in_flight=1000)


@pytest.mark.parametrize(
    ("key_value_heads", "members", "fits"), [(8, 2, True), (2, 8, True), (1, 4, True), (6, 4, False), (3, 8, False)]
)
def test_key_value_heads_are_divided_or_repeated_evenly(cfg, key_value_heads, members, fits):
    cfg.engine.tensor_parallel = members
    shape = {**SHAPE, "num_attention_heads": 24, "num_key_value_heads": key_value_heads}
    if fits:
        check_divisible(cfg, shape, origin="m")
    else:
        with pytest.raises(ConfigError, match=f"num_key_value_heads = {key_value_heads}"):
            check_divisible(cfg, shape, origin="m")
    with pytest.raises(ConfigError, match="intermediate_size = 15"):
        check_divisible(cfg, {**shape, "num_key_value_heads": 8, "intermediate_size": 15}, origin="m")


def test_context_and_responses(cfg):
    fails(cfg, ConfigError, "rollout.max_response_tokens", "< 64", rollout__max_response_tokens=64)
    cfg.rollout.max_response_tokens = 63
    fails(cfg, DataError, "3 tokens; expected at most 1")
    cfg.rollout.max_response_tokens = 32
    fails(cfg, ConfigError, "data.max_prompt_tokens", "<= 32", data__max_prompt_tokens=33)
    cfg.data.max_prompt_tokens = None
    fails(cfg, ConfigError, "eval.max_response_tokens", eval__max_response_tokens=64)
    cfg.eval.max_response_tokens = None
    fails(cfg, ConfigError, "the model's own limit", model__max_context_tokens=65)


# -- machine -------------------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there(cfg, monkeypatch):
    monkeypatch.setattr("rlpost.workers.runtime.has_gpu", lambda: False)
    fails(cfg, ConfigError, "device", "NVIDIA", device="cuda")
    cfg.device = "auto"
    cfg.model.dtype = "bfloat16"
    assert any("bfloat16" in warning for warning in check(cfg).warnings)


def test_run_directories(cfg, tmp_path):
    (tmp_path / "file").write_text("")
    fails(cfg, ConfigError, "nothing there", "auto, never, a run directory or a checkpoint", resume="nver")
    cfg.resume = "auto"
    fails(cfg, RunError, "a file is in the way", runs_dir=str(tmp_path / "file" / "runs"))
    fails(cfg, RunError, "may write", runs_dir="/proc/rlpost")  # not even root may
    cfg.runs_dir = str(tmp_path)
    for name in ("", "..", "a/b"):
        fails(cfg, ConfigError, "name", name=name)


# -- model, reward, data -------------------------------------------------------------------------------------------


def test_models(cfg, tmp_path):
    model = tmp_path / "model"
    (model / "tokenizer.json").write_text("{}")
    fails(cfg, ModelError, "tokenizer.json")
    (model / "tokenizer.json").unlink()
    fails(cfg, ModelError, "no tokenizer")
    (model / "model.safetensors").unlink()
    fails(cfg, ModelError, "no weights")
    (model / "config.json").write_text(json.dumps({"hidden_size": 8}))
    save_file({"w": np.zeros(3, np.float32)}, model / "model.safetensors")
    fails(cfg, ModelError, "num_hidden_layers")
    fails(cfg, ModelError, "nothing there", model__path="./nowhere")


def test_rewards(cfg, tmp_path, monkeypatch):
    fails(cfg, ConfigError, "reward.function", reward__function="nosuch")
    fails(cfg, ConfigError, "reward.function", "nosuch_package", reward__function="nosuch_package.score")
    fails(cfg, ConfigError, "no_such_function", reward__function="rlpost.rewards.library.answers.no_such_function")
    (tmp_path / "my_rewards.py").write_text(
        "def score(response, *, bonus=0.0, **_):\n    return bonus\ndef strict(response, *, bonus):\n    return bonus\n"
        "def trl(completions, answer, **_):\n    return [1.0]\n"
        "def needy(completions, level):\n    return [1.0]\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import nosuch_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    fails(cfg, ConfigError, "nosuch_module", reward__function="broken_rewards.score")
    fails(cfg, ConfigError, "bonsu", reward__function="my_rewards.strict", reward__args={"bonsu": 1})
    cfg.reward.function, cfg.reward.args = "my_rewards.score", {"bonus": 1.0}
    check(cfg)
    cfg.reward.function = {"_target_": "my_rewards.score"}
    check(cfg)
    assert "my_rewards.score, a response at a time, in" in str(check(cfg))
    cfg.reward.function = "my_rewards.trl"
    cfg.reward.args = {}
    assert "a group at a time" in str(check(cfg))
    fails(cfg, ConfigError, "got 'level'", "data.train has as columns (answer)", reward__function="my_rewards.needy")
    assert "my_rewards" not in sys.modules, "the worker imports it, not the run"


def test_data(cfg, tmp_path):
    data = tmp_path / "data.jsonl"
    good = data.read_text()
    data.write_text(good + "{oops\n")
    fails(cfg, DataError, "data.jsonl line 4", "not JSON")
    data.write_text(good + '{"question": "a", "answer": "1"}\n')
    fails(cfg, DataError, "line 4", "no column 'prompt'", "question, answer")
    data.write_text(good + '{"prompt": "a"}\n')
    fails(cfg, DataError, "line 4", "no column 'answer'")
    data.write_text("")
    fails(cfg, DataError, "is empty")
    data.unlink()
    fails(cfg, DataError, "nothing there", "data.jsonl")


def test_a_missing_evaluation_set(cfg):
    cfg.data.eval.path = None
    fails(cfg, ConfigError, "eval.every=-1")
    cfg.eval.every = -1
    check(cfg)
    fails(cfg, ConfigError, "data.eval", command="eval")


def test_prompts_longer_than_the_context(cfg, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text() + json.dumps({"prompt": "a " * 33, "answer": ""}) + "\n")
    fails(cfg, DataError, "data.jsonl line 4: the prompt has 33 tokens; expected at most 32", "long_prompts=drop")
    cfg.data.long_prompts = "drop"
    assert "1 longer ones are dropped" in str(check(cfg))
    cfg.data.long_prompts, cfg.data.template = "error", "{prompt}"
    data.write_text(json.dumps({"prompt": "a " * 31, "answer": ""}) + "\n")
    check(cfg)
    fails(cfg, DataError, "line 1: the prompt has 33 tokens", data__template="a a {prompt}")  # the template counts


def test_an_empty_prompt_among_many_is_found(cfg, tmp_path):
    rows = "".join(json.dumps({"prompt": "a " * n, "answer": "1"}) + "\n" for n in [1] * 300 + [0])
    (tmp_path / "data.jsonl").write_text(rows)
    fails(cfg, DataError, "data.jsonl line 301: the prompt has no tokens")


def test_a_long_prompt_among_many_is_found(cfg, tmp_path, monkeypatch):
    """Only the longest texts are tokenised, and those that have more bytes than the limit has tokens."""
    monkeypatch.setattr(checks, "NUM_MEASURED", 2)
    rows = ["word" * 40, "word" * 41, "x" * 5] + ["a " * 33]  # the two longest texts are one token each
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": ""}) + "\n" for p in rows))
    fails(cfg, DataError, "line 4: the prompt has 33 tokens")


def test_chat_templates_are_rendered(cfg, tmp_path):
    fails(cfg, ConfigError, "data.chat", data__chat="always")
    template = "a a {{ messages[0]['content'] }} a"
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert "longest prompt 8 tokens of 32 allowed" in str(check(cfg)) and check(cfg).not_checked == []
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a " * 30, "answer": "1"}) + "\n")
    fails(cfg, DataError, "line 1: the prompt has 33 tokens; expected at most 32")
    cfg.data.chat = "never"
    assert "longest prompt 30 tokens" in str(check(cfg))


def test_a_chat_template_of_ones_own(cfg, tmp_path, monkeypatch):
    (tmp_path / "mine.jinja").write_text("a a {{ messages[0]['content'] }}{% if more %} a a{% endif %}")
    cfg.data.chat_template = str(tmp_path / "mine.jinja")
    assert "longest prompt 7 tokens of 32 allowed" in str(check(cfg))
    cfg.data.chat_template_kwargs = {"more": True}
    assert "longest prompt 9 tokens of 32 allowed" in str(check(cfg))
    cfg.data.prefill = " a a a"
    assert "longest prompt 12 tokens of 32 allowed" in str(check(cfg)) and check(cfg).warnings == []
    fails(cfg, ConfigError, "names that the chat template reads (more)", data__chat_template_kwargs={"mor": True})
    fails(cfg, ConfigError, "got 'tools'; expected arguments of the template", data__chat_template_kwargs={"tools": []})
    cfg.data.chat_template_kwargs = {}
    fails(cfg, ConfigError, "data.chat_template: ", "nothing with data.chat=never", data__chat="never")
    cfg.data.chat = "auto"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    cfg.model.path = "some-org/some-model"  # found wherever the model is
    fails(cfg, ConfigError, "data.chat_template: the chat template cannot be read", data__chat_template="{% if %}")
    fails(cfg, ConfigError, "nosuch.jinja (nothing there)", data__chat_template="nosuch.jinja")
    cfg.data.chat_template, cfg.data.chat_template_kwargs = None, {"more": True}
    fails(cfg, ConfigError, "data.chat_template_kwargs: ", "nothing with data.chat=never", data__chat="never")


@pytest.mark.parametrize(
    ("prefill", "warning"),
    [
        ("<think>\n", ""),
        ("<think>\\n", "data.prefill has a backslash and an n in it, not a line break"),
        ("\\neq", ""),
        ("<think>\nLet me", "data.prefill goes on after <think>"),
        ("<think>\n\n</think>\n\nSo", ""),
    ],
)
def test_a_prefill_that_is_not_what_it_looks_like(cfg, prefill, warning):
    cfg.data.prefill = prefill
    warnings = check(cfg).warnings
    assert warnings[0].startswith(warning) if warning else not warnings


def test_a_long_prompt_is_found_by_what_the_template_adds(cfg, tmp_path, monkeypatch):
    """Only the longest rendered texts are tokenised, and those with more bytes than the limit has tokens."""
    monkeypatch.setattr(checks, "NUM_MEASURED", 1)
    template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}" + "b " * 40 + "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tool = [{"role": "tool", "content": "x"}]
    rows = [
        *({"prompt": p, "answer": "1"} for p in ("w" * 99, "w" * 98, "x")),
        {"prompt": tool, "answer": "1"},
        {"prompt": "a", "answer": "1"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fails(cfg, DataError, "line 4: the prompt has 41 tokens")


def test_a_conversation_that_the_template_refuses_is_named(cfg, tmp_path):
    """One of each sequence of roles is rendered, wherever it stands."""
    refuse = "{% if messages|length == 3 %}{{ raise_exception('three are a crowd') }}{% endif %}a"
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": refuse}))
    rows = [{"prompt": [{"role": "user", "content": "a"}] * n, "answer": "1"} for n in (*[1] * 700, 3, 2)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = fails(cfg, DataError, "line 701: the chat template fails: three are a crowd")
    assert "expected another conversation than user, user, user; change the row, data.system_prompt" in message
    cfg.data.chat = "never"
    check(cfg)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if %}"}))
    fails(cfg, ModelError, "the chat template cannot be read", data__chat="auto")


def test_models_that_the_trainer_or_publication_refuses(cfg, tmp_path):
    config = tmp_path / "model" / "config.json"
    for key, value, expected in (
        ("final_logit_softcapping", 30.0, "a plain linear head"),
        ("logits_scaling", 4.0, "a plain linear head"),
        ("num_experts", 4, "a dense model"),
        ("num_local_experts", 4, "a dense model"),
        ("model_type", "phi3", "separate query, key and value"),
    ):
        config.write_text(json.dumps(SHAPE | {key: value}))
        fails(cfg, ModelError, f"{config}: {key}: got {value!r}; expected", expected)
        assert "not counted" in str(check(cfg, "eval")) or key != "model_type"  # the engine alone may run it
    config.write_text(json.dumps(SHAPE | {"model_type": "gemma", "logits_scaling": 1.0, "num_experts": 0}))
    report = check(cfg)
    assert "model_type gemma, not counted" in str(report)
    assert any(line.startswith("model_type gemma: tried are qwen2, qwen3") for line in report.not_checked)


def test_a_tokenizer_larger_than_the_embedding(cfg, tmp_path):
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(SHAPE | {"vocab_size": 1}))
    for command in ("train", "eval"):
        fails(
            cfg,
            ModelError,
            f"tokenizer: got ids up to 1; expected ids below 1, vocab_size of {config}",
            command=command,
        )
    config.write_text(json.dumps(SHAPE | {"vocab_size": 2}))
    check(cfg)
    cfg.sft.steps, cfg.sft.generator = 3, {"_target_": "rlpost.tasks.arithmetic.lessons"}
    cfg.sft.tokenizer, cfg.model.shape = cfg.model.path, SHAPE | {"vocab_size": 1}
    fails(cfg, ModelError, "ids up to 1; expected ids below 1, vocab_size of model.shape", command="sft")
    config.write_text(json.dumps(SHAPE | {"vocab_size": 1}))
    fails(cfg, ModelError, "ids up to 1; expected ids below 1", command="sft", sft__init=cfg.model.path)


def test_something_must_end_a_response(cfg, tmp_path):
    """Where the tokenizer's files say that it has no end token; where they say nothing, its class may have one."""
    settings = tmp_path / "model" / "tokenizer_config.json"
    for none in ({"eos_token": None}, {"tokenizer_class": "PreTrainedTokenizerFast"}):
        settings.write_text(json.dumps(none))
        fails(cfg, ConfigError, "stop tokens: got 'none'; expected an end token", "set rollout.stop_token_ids")
        cfg.rollout.stop_token_ids = [3]
        check(cfg)
        cfg.rollout.stop_token_ids = []
        for file in ("config.json", "generation_config.json"):
            before = json.loads((tmp_path / "model" / "config.json").read_text())
            content = before if file == "config.json" else {}
            (tmp_path / "model" / file).write_text(json.dumps(content | {"eos_token_id": [3, 4]}))
            check(cfg)
            (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
            (tmp_path / "model" / "config.json").write_text(json.dumps(before))
        cfg.sft.steps, cfg.sft.generator = 3, {"_target_": "rlpost.tasks.arithmetic.lessons"}
        fails(cfg, ModelError, "a tokenizer without an end token", command="sft", sft__init=cfg.model.path)
        cfg.sft.init = None
    for some in ({"eos_token": "a"}, {"eos_token": {"content": "a"}}, {"tokenizer_class": "Qwen2Tokenizer"}, {}):
        settings.write_text(json.dumps(some))
        check(cfg)
    for wrong in ("2", -1, True, [1, "2"], 10, [[1]]):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        fails(cfg, ModelError, "generation_config.json: eos_token_id: got", "each from 0 to 9")


def test_a_reference_that_nothing_can_be_compared_with(cfg, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    for value, got in ((None, "null"), ([], "an empty list"), ([None], "a list that holds null")):
        data.write_text('{"prompt": "a", "answer": "1"}\n' + json.dumps({"prompt": "a", "answer": value}) + "\n")
        for reward in ("exact_answer", "gsm8k", "last_number", "math"):
            expected = f"data.jsonl line 2: answer: got {got}; expected a reference for the reward"
            fails(cfg, DataError, expected, reward__function=reward)
    check_free = [("digit_share", {}), ("format_match", {"pattern": "x"})]  # look at the response only
    for name, args in check_free:
        cfg.reward.function, cfg.reward.args = name, args
        check(cfg)
    (tmp_path / "references.py").write_text(
        "def needs(response, *, reference):\n    return 1.0\ndef may(response, *, reference=None):\n    return 1.0\n"
        "def trl(completions, answer, **_):\n    return [1.0]\ndef any_of(response, **given):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg.reward.args = {}
    for name, refused in (("needs", True), ("may", False), ("trl", True), ("any_of", False)):
        cfg.reward.function = f"references.{name}"
        if refused:
            fails(cfg, DataError, "line 2: answer: got a list that holds null")
        else:
            check(cfg)
    cfg.reward.function, cfg.data.reference_key = "references.may", None
    check(cfg)


def test_warm_start(cfg):
    fails(cfg, ConfigError, "sft.steps", command="sft")
    cfg.sft.steps, cfg.data.train.path = 3, None
    fails(cfg, ConfigError, "sft.generator", "a source in data.train", command="sft")
    cfg.sft.generator = {"_target_": "rlpost.tasks.arithmetic.lessons"}
    fails(cfg, ConfigError, "sft.tokenizer", command="sft")
    cfg.sft.tokenizer = cfg.model.path
    fails(cfg, ConfigError, "model.shape", command="sft")
    cfg.model.shape = SHAPE
    assert "a new model" in str(check(cfg, "sft"))
    fails(cfg, ModelError, "nothing there", command="sft", sft__init="./nowhere")


def test_too_large_for_this_machine_is_a_warning_and_a_plan_for_a_gpu(cfg, monkeypatch):
    cfg.device = "auto"
    monkeypatch.setattr("rlpost.workers.runtime.has_gpu", lambda: False)
    monkeypatch.setattr(checks, "device_bytes", lambda device: 1 << 40)
    assert check(cfg).warnings == []
    monkeypatch.setattr(checks, "device_bytes", lambda device: 4000)
    report = check(cfg)
    assert any("on a device that has 3.91 KiB" in warning for warning in report.warnings)
    assert any("a GPU of 80 GiB (assumed), bfloat16" in title for title, _ in report.sections)


def test_the_kv_cache_is_planned_as_the_engine_sizes_it(cfg):
    """64 slots x 64 tokens x (key and value x 1 layer x 1 head x 32 numbers x 4 bytes), at most half of the memory."""
    wanted = 64 * 64 * 2 * 32 * 4
    for total, expected in ((None, wanted), (10 * wanted, wanted), (wanted, wanted // 2)):
        plan = plan_device(cfg, SHAPE, 64, "cpu", total)
        assert {item.name: item.num_bytes for item in plan.memory.items}["KV cache"] == expected
    cfg.engine.kv_cache_bytes = 5
    plan = plan_device(cfg, SHAPE, 64, "cpu", wanted)
    assert {item.name: item.num_bytes for item in plan.memory.items}["KV cache"] == 5


def test_the_plan_says_how_many_samples_the_kv_cache_holds(cfg, monkeypatch):
    """One token is 256 bytes; a prompt may have 32 tokens and a response 32."""
    monkeypatch.setattr(checks, "device_bytes", lambda device: 1 << 40)
    assert "holds 64 samples of 64 tokens: all 64 in flight" in str(check(cfg))
    cfg.engine.kv_cache_bytes = 10 * 64 * 256 + 100
    assert "10 samples of 64 tokens: this many are in flight at first, then as many" in str(check(cfg))
    cfg.rollout.max_in_flight = 10
    assert "10 samples of 64 tokens: all 10 in flight" in str(check(cfg))
    cfg.rollout.max_in_flight = 11
    assert "10 samples of 64 tokens; with 11 in flight, vLLM preempts some" in str(check(cfg))


def test_an_engine_stays_awake_where_all_fits_with_a_margin(cfg):
    """Decided for a GPU only, at a byte's precision, and not against what the user set."""
    cfg.train.max_row_tokens = 64
    total = 64 << 30
    cfg.engine.sleep = "never"
    needed = plan_device(cfg, SHAPE, 64, "cuda", total).memory.peak_bytes + margin_bytes(total)
    cfg.engine.sleep = "auto"
    for free, expected in ((needed, "never"), (needed - 1, "always"), (None, "never")):
        plan = plan_device(cfg, SHAPE, 64, "cuda", total, free)
        assert plan.cfg.engine.sleep == expected
        assert any(line.startswith(f"engine.sleep={expected}: ") for line in plan.describe())
    assert plan_device(cfg, SHAPE, 64, "cuda", None).cfg.engine.sleep == "always", "nobody knows how much there is"
    cfg.cluster.kind = "ray"
    assert plan_device(cfg, SHAPE, 64, "cuda", total).cfg.engine.sleep == "always", "the workers' GPUs are not these"
    cfg.cluster.kind = "local"
    assert plan_device(cfg, SHAPE, 64, "cpu", total).cfg.engine.sleep == "always"
    assert not any(line.startswith("engine.sleep") for line in plan_device(cfg, SHAPE, 64, "cpu", total).describe())
    cfg.engine.sleep = "always"
    assert plan_device(cfg, SHAPE, 64, "cuda", total).cfg.engine.sleep == "always"
    assert (margin_bytes(80 << 30), margin_bytes(24 << 30)) == (8 << 30, 4 << 30)


def test_a_model_that_is_not_counted_takes_turns(cfg):
    counted = resolve(cfg, device="cuda", threads=1)
    shape = {**SHAPE, "model_type": "mixture"}
    assert choose_sleep(counted, shape, 64, free=1 << 50, total=1 << 50).engine.sleep == "always"


def test_a_4b_model_on_an_80_gb_card(cfg):
    """Stage 1 with gradients summed in bfloat16 needs 22 bytes a parameter in the step, stage 2 in float32 18."""
    big = load_config(["recipe=math/gsm8k", "model=qwen3_4b", "train.gradient_checkpointing=true"])
    shape, count = big.model.shape, 4_022_468_096
    default = plan_device(big, shape, 2048, "cuda", ASSUMED_GPU_BYTES)
    assert "ZeRO stage 2, gradients summed in float32" in default.settings
    assert default.memory.step_bytes == count * 18 + 8 * 151_936 * 2560
    big.train.zero_stage = 1
    first = plan_device(big, shape, 2048, "cuda", ASSUMED_GPU_BYTES)
    assert "ZeRO stage 1, gradients summed in bfloat16" in first.settings
    assert first.memory.step_bytes == count * 22


def test_gradients_are_summed_in_what_deepspeed_can(cfg):
    fails(cfg, ConfigError, "grad_accum_dtype: got 'bfloat16'", "float32", train__grad_accum_dtype="bfloat16")
    cfg.model.dtype = "bfloat16"
    refused = {"train__grad_accum_dtype": "float32", "train__zero_stage": 1}
    fails(cfg, ConfigError, "grad_accum_dtype: got 'float32'", "at stage 1", "train=zero2", **refused)
    for stage, sums, is_warned in ((None, "auto", False), (1, "auto", True), (2, "auto", False), (2, "bfloat16", True)):
        cfg.train.zero_stage, cfg.train.grad_accum_dtype = stage, sums
        assert any("summed in bfloat16" in warning for warning in check(cfg).warnings) is is_warned


def test_units():
    assert [format_bytes(n) for n in (0, 1023, 1024, 1536, 200 << 20, 1.5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "200 MiB",
        "1.5 TiB",
    ]
