"""Parameter counts against published models, and the plan against ZeRO's own table."""

import pytest

from rlpost.config.compose import load_config
from rlpost.models.shape import count_params, kv_bytes, largest_parameter
from rlpost.preflight.memory_plan import activation_bytes, logits_bytes, pinned, plan_memory

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
    "zero_stage": 2,
    "grad_accum_dtype": "float32",
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
    assert logits_bytes(TINY, chunk_tokens=3, dtype="float32") == 4 * (10 * 3 * 2 + 10 * 8)
    assert logits_bytes(TINY, chunk_tokens=3, dtype="bfloat16") == 4 * (10 * 3 * 2) + (4 + 2) * 10 * 8


def test_a_kept_kv_cache_stays_on_a_gpu_while_the_trainer_works():
    sleeping, keeping = plan(device="cuda"), plan(device="cuda", keep_kv=True)
    engine = sizes(sleeping)["KV cache"] + sizes(sleeping)["engine weights"]
    assert keeping.training_bytes == sleeping.training_bytes + engine
    assert keeping.generating_bytes == sleeping.generating_bytes


def test_activations_by_hand_and_with_checkpointing():
    layer = 4 * 8 + 2 * (8 + 2 * 4) + 8 + 4 * 16
    assert activation_bytes(TINY, row_tokens=4, dtype="float32", checkpointing=False) == 2 * layer * 4 * 4
    assert activation_bytes(TINY, row_tokens=4, dtype="float32", checkpointing=True) == (2 * 8 + layer) * 4 * 4


STATES = ("parameters", "gradients", "float32 master copy", "Adam's two moments")


@pytest.mark.parametrize(
    ("stage", "per_parameter"),
    [(1, 2 + 2 + 12 / 8), (2, 2 + 2 / 8 + 12 / 8), (3, 2 / 8 + 2 / 8 + 12 / 8)],  # ZeRO, figure 1, with 8 ranks
)
def test_zero_divides_what_the_paper_says(stage, per_parameter):
    memory = sizes(plan(zero_stage=stage, world_size=8, grad_accum_dtype="bfloat16"))
    assert sum(memory[name] for name in STATES) == pytest.approx(TINY_PARAMS * per_parameter, abs=30)


def test_float32_keeps_a_master_copy_too():
    memory = sizes(plan(dtype="float32"))
    assert sum(memory[name] for name in STATES) == TINY_PARAMS * (4 + 4 + 12)


@pytest.mark.parametrize(
    ("stage", "dtype", "sums", "backward", "step"),
    [
        (1, "float32", "float32", 4 + 12 + 4 + 4, 4 + 12 + 4 + 4),
        (1, "bfloat16", "bfloat16", 2 + 12 + 2 + 2, 2 + 12 + 2 + 2 + 4),
        (2, "float32", "float32", 4 + 12 + 4 + 8, 4 + 12 + 4 + 4),
        (2, "bfloat16", "bfloat16", 2 + 12 + 2 + 4, 2 + 12 + 2 + 2 + 4),
        (2, "bfloat16", "float32", 2 + 12 + 4 + 4, 2 + 12 + 4),
        (3, "float32", "float32", 4 + 12 + 4 + 4 + 4, 4 + 12 + 4 + 4 + 4),
        (3, "bfloat16", "bfloat16", 2 + 12 + 2 + 2 + 2, 2 + 12 + 2 + 2 + 2 + 4),
        (3, "bfloat16", "float32", 2 + 12 + 4 + 2 + 6, 2 + 12 + 4 + 2 + 4),
    ],
)
def test_the_peaks_of_an_optimizer_step_on_a_gpu_by_hand(stage, dtype, sums, backward, step):
    """Bytes a parameter; beside them a row's activations, and the norm of the largest weight in float64."""
    memory = plan(zero_stage=stage, dtype=dtype, grad_accum_dtype=sums)
    row = activation_bytes(TINY, row_tokens=4, dtype=dtype, checkpointing=False)
    row += logits_bytes(TINY, chunk_tokens=3, dtype=dtype)
    row += (stage, dtype, sums) == (2, "bfloat16", "float32") and 4 * largest_parameter(TINY)
    assert memory.backward_bytes == TINY_PARAMS * backward + row
    norm = 8 * largest_parameter(TINY) if (stage, dtype, sums) == (2, "bfloat16", "float32") else 0
    assert memory.step_bytes == TINY_PARAMS * step + norm
    assert memory.training_bytes == max(memory.backward_bytes, memory.step_bytes)


def test_on_a_gpu_engine_and_trainer_take_turns():
    memory = plan()
    engine = TINY_PARAMS * 2 + 1000
    assert memory.generating_bytes == engine
    assert memory.publishing_bytes == TINY_PARAMS * (14 + 2), "the trainer is awake while the engine's weights arrive"
    assert memory.peak_bytes == memory.training_bytes
    # Where the trainer sleeps: no gradients, and each page-locked buffer takes a power of two.
    assert memory.host_bytes == pinned(TINY_PARAMS * 2) + 3 * pinned(TINY_PARAMS * 4)
    states_stay = plan(sleep_offload=False)
    assert states_stay.generating_bytes == engine + TINY_PARAMS * 14 and states_stay.host_bytes == 0
    assert states_stay.training_bytes == memory.training_bytes
    awake = plan(awake=True)
    assert awake.training_bytes == memory.training_bytes + engine and awake.host_bytes == 0
    assert awake.publishing_bytes == awake.generating_bytes == engine + TINY_PARAMS * 14


def test_pinned_memory_is_given_in_powers_of_two():
    assert [pinned(n) for n in (0, 1, 2, 3, 4, 1000, 1024, 1025)] == [0, 1, 2, 4, 4, 1024, 1024, 2048]


def test_on_a_cpu_everything_stays():
    memory = plan(device="cpu")
    assert memory.generating_bytes == TINY_PARAMS * (14 + 2) + 1000
    assert memory.training_bytes > memory.generating_bytes and memory.host_bytes == 0
    assert plan(device="cpu", awake=True) == memory == plan(device="cpu", sleep_offload=False)


def test_offload_moves_to_host_memory():
    memory = plan(zero_stage=3, offload_optimizer=True, offload_params=True, sleep_offload=False, reference=True)
    on_device = {item.name for item in memory.items if item.on_device}
    kept = {"parameters", "gradients", "float32 gradients", "float32 master copy", "Adam's two moments"}
    assert (kept | {"frozen reference"}).isdisjoint(on_device)
    # parameters, float32 sums, float32 gradients, master copy, moments (not page-locked), reference
    locked = [2, 4, 4, 4, 2]
    assert memory.host_bytes == sum(pinned(TINY_PARAMS * width) for width in locked) + TINY_PARAMS * 8
    partly = plan(zero_stage=2, offload_optimizer=True)
    assert sizes(partly)["staging of gradients"] == 2 * largest_parameter(TINY)
    assert {i.name for i in partly.items if not i.on_device and i.in_step} == {
        "float32 gradients",
        "updated parameters",
        "float32 master copy",
        "Adam's two moments",
    }
    assert sizes(partly)["trainer asleep"] == pinned(TINY_PARAMS * 2), "the parameters are all that has to move"


def test_unknown_models_have_no_plan():
    assert plan_memory({**TINY, "model_type": "mixture"}, **SETTINGS) is None
