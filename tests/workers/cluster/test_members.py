"""A real engine of two members, each a process: parts of weights, what is sampled, and what happens out of step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.random_models import random_model
from tests.two_ranks import run_two_ranks
from tests.workers.cluster.member_program import PROMPTS

pytestmark = pytest.mark.own_process  # its engines start in processes of their own, which takes a while

ROOT = Path(__file__).resolve().parents[3]
# 75 rows of vocabulary, padded to 128: the second member has 11 and padding. One key-value head is held by both.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_untied, one key-value head": {"model_type": "qwen2", "tie_word_embeddings": False, "num_key_value_heads": 1},
    "qwen3_tied, two": {"model_type": "qwen3", "tie_word_embeddings": True, "num_key_value_heads": 2},
    "llama_untied, four": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 4},
}


def make_model(choice: dict[str, Any], seed: int) -> Any:
    return random_model(seed, hidden_size=128, num_attention_heads=4, max_position_embeddings=256, **choice)


@pytest.fixture(
    scope="module", params=[next(iter(MODELS)), *(pytest.param(m, marks=pytest.mark.slow) for m in [*MODELS][1:])]
)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, list[dict[str, Any]]]:
    """The model that was published, and each member's results."""
    folder = tmp_path_factory.mktemp("members")
    make_model(MODELS[request.param], seed=0).save_pretrained(folder / "model")
    model = make_model(MODELS[request.param], seed=1)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / "published.safetensors")
    return model, run_two_ranks("workers/cluster/member_program.py", folder, environment={"TORCHDYNAMO_DISABLE": "1"})


def test_each_member_holds_its_part_bit_for_bit_and_together_they_hold_everything(published: Any) -> None:
    model, members = published
    parameters = dict(model.named_parameters())
    for member in members:
        assert sorted(member["equal"]) == sorted(parameters)
    divided = set()
    for name, whole in parameters.items():
        first, second = (member["parts"][name] for member in members)
        if first.shape == whole.shape:  # both have all of it
            assert second.equal(whole) and first.equal(whole), name
            continue
        dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        assert torch.cat([first, second], dim).equal(whole), name
        divided.add(name.split(".")[-2])
    one_head = model.config.num_key_value_heads == 1
    assert divided >= {"embed_tokens", "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert ({"k_proj", "v_proj"} <= divided) is not one_head


def test_logprobs_are_the_models_own(published: Any) -> None:
    model, members = published
    with torch.no_grad():
        for number, prompt in enumerate(PROMPTS):
            tokens = torch.from_numpy(prompt[:30].astype(np.int64))[None]
            expected = model(tokens).logits[0].log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])[:, 0].numpy()
            for member in members:
                np.testing.assert_allclose(member["scores"][number], expected, atol=1e-4)
            generated, logprobs = members[0]["generated"][str(number)]
            whole = torch.tensor([*prompt.tolist(), *generated])[None]
            expected = (model(whole).logits[0] / 0.8).log_softmax(-1)[len(prompt) - 1 : -1].numpy()
            np.testing.assert_allclose(logprobs, expected[np.arange(len(generated)), generated], atol=1e-4)


def test_seeds_and_aborts_reach_both(published: Any) -> None:
    """Each member samples for itself: had they drawn differently, the leader's next step would have stopped them."""
    _, (leader, other) = published
    assert sum(len(tokens) for tokens, _ in leader["generated"].values()) > 60
    for number, (tokens, _) in leader["aborted"].items():
        assert tokens == leader["generated"][number][0][:5]
    assert leader["in_flight"] == other["in_flight"] == 0
    assert {n: tokens for n, (tokens, _) in leader["again"].items()} == {
        n: tokens for n, (tokens, _) in leader["generated"].items()
    }


def test_no_shared_memory_is_made_that_a_killed_member_would_leave(published: Any) -> None:
    assert [member["shared_memory"] for member in published[1]] == [[], []]


def test_a_member_out_of_step_stops_both_with_one_clear_message(published: Any) -> None:
    _, (leader, other) = published
    assert leader["message"] == other["message"]
    assert "members of one engine: samples in the batch of worker 1, at engine step " in leader["message"]
    assert "as at worker 0" in leader["message"]
