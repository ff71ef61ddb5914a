"""Parameter counts against published models, and the plan against ZeRO's own table."""

import pytest

from rlpost.config.compose import load_config
from rlpost.models.shape import count_params, kv_bytes
from rlpost.preflight.memory_plan import activation_bytes, logits_bytes, plan_memory

TINY = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 10,
    "tie_word_embeddings": False,
}
# By hand: query 8x8, key and value 8x4 each, output 8x8: 192; MLP 3x8x16 = 384; two norms 16: 592 a layer; two
# embeddings 10x8 = 160; last norm 8.
TINY_PARAMS = 2 * 592 + 160 + 8


SETTINGS = {
    "dtype": "bfloat16",
    "device": "cuda",
    "zero_stage": 1,
    "world_size": 1,
    "offload_optimizer": False,
    "offload_params": False,
    "sleep_offload": True,
    "gradient_checkpointing": False,
    "reference": False,
    "keep_kv": False,
    "kv_cache_bytes": 1000,
    "row_tokens": 4,
    "chunk_tokens": 3,
}


def plan(**changes):
    return plan_memory(TINY, **{**SETTINGS, **changes})


def sizes(memory):
    return {item.name: item.num_bytes for item in memory.items}


def test_counts_of_a_tiny_model_by_hand():
    assert count_params(TINY) == TINY_PARAMS
    assert count_params({**TINY, "model_type": "qwen2"}) == TINY_PARAMS + 2 * (8 + 4 + 4)  # biases of q, k, v
    assert count_params({**TINY, "model_type": "qwen3"}) == TINY_PARAMS + 2 * (4 + 4)  # norms of q and k
    assert count_params({**TINY, "tie_word_embeddings": True}) == TINY_PARAMS - 80
    assert count_params({**TINY, "head_dim": 8}) == TINY_PARAMS + 2 * 192


@pytest.mark.parametrize(("option", "published"), [("qwen3_4b", 4_022_468_096), ("qwen3_0_6b", 596_049_920)])
def test_counts_of_published_models(option, published):
    """The numbers of tensors' elements in the models' safetensors files."""
    assert count_params(load_config(["recipe=math/gsm8k", f"model={option}"]).model.shape) == published


def test_kv_and_logits_by_hand():
    assert kv_bytes(TINY, num_tokens=5, dtype="bfloat16") == 2 * 2 * 1 * 4 * 2 * 5  # k+v, layers, heads, size, bytes
    four = {**TINY, "num_key_value_heads": 4}
    for devices, heads in ((1, 4), (2, 2), (4, 1), (8, 1)):  # each device has at least one head
        assert kv_bytes(four, num_tokens=5, dtype="bfloat16", tensor_parallel=devices) == 2 * 2 * heads * 4 * 2 * 5
    assert logits_bytes(TINY, chunk_tokens=3) == 4 * (10 * 3 * 2 + 10 * 8)


def test_a_kept_kv_cache_stays_on_a_gpu_while_the_trainer_works():
    sleeping, keeping = plan(device="cuda"), plan(device="cuda", keep_kv=True)
    engine = sizes(sleeping)["KV cache"] + sizes(sleeping)["engine weights"]
    assert keeping.training_bytes == sleeping.training_bytes + engine
    assert keeping.generating_bytes == sleeping.generating_bytes


def test_activations_by_hand_and_with_checkpointing():
    layer = 4 * 8 + 2 * (8 + 2 * 4) + 8 + 4 * 16
    assert activation_bytes(TINY, row_tokens=4, dtype="float32", checkpointing=False) == 2 * layer * 4 * 4
    assert activation_bytes(TINY, row_tokens=4, dtype="float32", checkpointing=True) == (2 * 8 + layer) * 4 * 4


@pytest.mark.parametrize(
    ("stage", "per_parameter"),
    [(1, 2 + 2 + 12 / 8), (2, 2 + 2 / 8 + 12 / 8), (3, 2 / 8 + 2 / 8 + 12 / 8)],  # ZeRO, figure 1, with 8 ranks
)
def test_zero_divides_what_the_paper_says(stage, per_parameter):
    memory = plan(zero_stage=stage, world_size=8)
    states = sum(list(sizes(memory).values())[:4])
    assert states == pytest.approx(TINY_PARAMS * per_parameter, abs=4)


def test_float32_keeps_a_master_copy_too():
    assert sum(list(sizes(plan(dtype="float32")).values())[:4]) == TINY_PARAMS * (4 + 4 + 12)


def test_on_a_gpu_engine_and_trainer_take_turns():
    memory = plan()
    engine = TINY_PARAMS * 2 + 1000
    trainer = TINY_PARAMS * 16
    step = activation_bytes(TINY, row_tokens=4, dtype="bfloat16", checkpointing=False)
    step += logits_bytes(TINY, chunk_tokens=3)
    assert memory.generating_bytes == engine
    assert memory.training_bytes == trainer + step
    assert memory.publishing_bytes == TINY_PARAMS * 4
    assert memory.peak_bytes == max(engine, trainer + step)
    assert memory.host_bytes == trainer  # where the trainer sleeps
    awake = plan(sleep_offload=False)
    assert awake.generating_bytes == engine + trainer and awake.host_bytes == 0


def test_on_a_cpu_everything_stays():
    memory = plan(device="cpu")
    assert memory.generating_bytes == TINY_PARAMS * (16 + 2) + 1000
    assert memory.training_bytes > memory.generating_bytes and memory.host_bytes == 0


def test_offload_moves_to_host_memory():
    memory = plan(zero_stage=3, offload_optimizer=True, offload_params=True, sleep_offload=False, reference=True)
    on_device = {item.name for item in memory.items if item.on_device}
    assert {"parameters", "float32 master copy", "Adam's two moments", "frozen reference"}.isdisjoint(on_device)
    assert memory.host_bytes == TINY_PARAMS * (2 + 12 + 2)


def test_unknown_models_have_no_plan():
    assert plan_memory({**TINY, "model_type": "mixture"}, **SETTINGS) is None
