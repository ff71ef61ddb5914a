"""The trainer on one rank against a plain PyTorch loop, at ZeRO stages 1, 2 and 3, with real DeepSpeed on the CPU."""

import copy
import json
import math
import resource
import shutil
from dataclasses import replace

import deepspeed
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpost.errors import ConfigError, ModelError, RunError
from rlpost.train.weights import NamedWeight, own_weights
from tests.train import cases

STAGES = pytest.mark.parametrize("stage", [1, 2, 3])


def optimizer_tensors(trainer):
    """Every tensor the optimizer keeps, master weights included."""
    inner = trainer.engine.optimizer.optimizer
    states = [v for state in inner.state.values() for v in state.values() if torch.is_tensor(v)]
    return [t.detach().clone() for t in [*states, *(p for group in inner.param_groups for p in group["params"])]]


@STAGES
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_five_steps_equal_a_plain_pytorch_loop(build, folders, stage, tied):
    trainer, plain = build(stage, tied=tied, grad_clip=0.5), cases.PlainLoop(folders[tied], clip=0.5)
    for step in range(5):
        samples = cases.sequences(step, 6)
        result = trainer.update(cases.packed_batch(step), cases.objective)
        loss, norm, gradients = plain.update(samples)
        assert result.applied and result.num_tokens == sum(int(s["loss_mask"].sum()) for s in samples)
        assert result.loss == pytest.approx(loss, abs=1e-5)
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        assert norm > 0.5, "the case must exercise clipping"
        if step == 0:
            assert_gradients_equal(trainer, gradients, scale=0.5 / (norm + 1e-6))
    assert cases.largest_difference(cases.weights_of(trainer), dict(plain.model.named_parameters())) < 5e-5


def assert_gradients_equal(trainer, gradients, scale):
    """After one step AdamW's first moment is 0.1 x the (clipped) gradient."""
    squares = total = 0.0
    for name, parameter in trainer.lm.named_parameters():
        ours = deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg") / 0.1
        squares += float((ours - gradients[name] * scale).square().sum())
        total += float((gradients[name] * scale).square().sum())
    assert math.sqrt(squares) < 1e-5 * math.sqrt(total)


@STAGES
def test_how_sequences_share_rows_does_not_matter(build, stage):
    samples = cases.sequences(11, 6)
    splits = (
        [cases.pack(samples)],
        [cases.pack([s], i, padding=3) for i, s in enumerate(samples)],
        [cases.pack(samples[:5]), cases.pack(samples[5:], 5), cases.pack([], padding=4)],
    )
    weights, results = [], []
    for rows in splits:
        trainer = build(stage, lr=1e-2)
        results.append(trainer.update(cases.batch_of(rows, samples), cases.objective))
        weights.append(cases.weights_of(trainer))
    for result, w in zip(results[1:], weights[1:], strict=True):
        assert result.loss == pytest.approx(results[0].loss, abs=1e-6)
        assert result.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-5)
        assert result.metrics == pytest.approx(results[0].metrics, rel=1e-5)
        assert cases.largest_difference(w, weights[0]) < 5e-5


def nan_loss(logprobs, entropy, row, batch):
    """The loss is NaN, its gradient is finite."""
    return (logprobs * torch.from_numpy(row.loss_mask)).sum() + math.nan, {}


def infinite_gradient(logprobs, entropy, row, batch):
    """The loss is finite (0), its gradient is not."""
    return (logprobs * 0.0).sum().sqrt(), {}


@STAGES
@pytest.mark.parametrize("broken", [nan_loss, infinite_gradient])
def test_a_step_that_is_not_finite_changes_no_bit(build, stage, broken):
    trainer, undisturbed = build(stage), build(stage)
    for t in (trainer, undisturbed):
        assert t.update(cases.packed_batch(1), cases.objective).applied
    weights, states = cases.weights_of(trainer), optimizer_tensors(trainer)

    def second_row_only(logprobs, entropy, row, batch):
        return (broken if row is batch.rows[1] else cases.objective)(logprobs, entropy, row, batch)

    result = trainer.update(cases.packed_batch(2), second_row_only)

    assert not result.applied and math.isnan(result.grad_norm) and trainer.optimizer_step == 1
    assert cases.largest_difference(cases.weights_of(trainer), weights) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(optimizer_tensors(trainer), states, strict=True))
    for t in (trainer, undisturbed):  # no gradient of the broken step is left behind
        assert t.update(cases.packed_batch(3), cases.objective).applied
    assert cases.largest_difference(cases.weights_of(trainer), cases.weights_of(undisturbed)) == 0.0


def test_a_batch_without_trainable_tokens_runs_nothing(build):
    trainer = build()
    trainer.update(cases.packed_batch(1), cases.objective)
    before = cases.weights_of(trainer)
    result = trainer.update(cases.batch_of([], []), cases.objective)
    assert (result.applied, result.num_tokens, trainer.optimizer_step) == (False, 0, 1)
    assert cases.largest_difference(cases.weights_of(trainer), before) == 0.0


@STAGES
def test_resuming_is_bit_identical(build, tmp_path, stage):
    settings = {"schedule": "cosine", "warmup_steps": 2, "total": 6}
    trainer = build(stage, **settings)
    for step in range(3):
        trainer.update(cases.packed_batch(step), cases.objective)
    trainer.save(tmp_path / "checkpoint")
    drawn = torch.rand(3)
    uninterrupted = [trainer.update(cases.packed_batch(step), cases.objective) for step in range(3, 6)]

    resumed = build(stage, **settings)
    resumed.load(tmp_path / "checkpoint")
    assert resumed.optimizer_step == 3 and torch.equal(torch.rand(3), drawn)
    assert [resumed.update(cases.packed_batch(step), cases.objective) for step in range(3, 6)] == uninterrupted
    assert cases.largest_difference(cases.weights_of(resumed), cases.weights_of(trainer)) == 0.0


def test_a_checkpoint_of_another_layout_or_none_is_one_clear_line(build, tmp_path):
    trainer, other = build(1), build(2)
    trainer.save(tmp_path / "checkpoint")
    with pytest.raises(RunError, match="got .*'zero_stage': 2.*expected .*'zero_stage': 1"):
        other.load(tmp_path / "checkpoint")
    with pytest.raises(RunError, match="trainer.json"):
        trainer.load(tmp_path / "nothing")
    for file in (tmp_path / "checkpoint").rglob("*.pt"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match="expected whole files of this model; use an older checkpoint"):
        trainer.load(tmp_path / "checkpoint")


@STAGES
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_are_whole_named_and_in_buckets(build, folders, stage, tied):
    trainer = build(stage, tied=tied)
    expected = dict(AutoModelForCausalLM.from_pretrained(folders[tied]).named_parameters())
    assert ("lm_head.weight" in expected) is not tied
    assert cases.largest_difference(cases.weights_of(trainer, 4096), expected) == 0.0
    sizes = [[t.numel() * 4 for _, t in bucket] for bucket in trainer.iter_weights(4096)]
    assert len(sizes) > 3 and all(sum(bucket) <= 4096 or len(bucket) == 1 for bucket in sizes)


@STAGES
def test_weights_composed_of_several_parameters_are_what_is_published_and_exported(build, folders, stage, tmp_path):
    """As an adapter will be: nobody who reads weights sees what they are made from."""

    def keys_and_values_mixed(lm):
        parameters = dict(lm.named_parameters())
        for weight in own_weights(lm):
            if weight.name.endswith("k_proj.weight"):
                beside = parameters[weight.name.replace("k_proj", "v_proj")]
                yield NamedWeight(weight.name, (*weight.parameters, beside), lambda k, v: k + 0.5 * v)
            else:
                yield weight

    own = dict(AutoModelForCausalLM.from_pretrained(folders[True]).named_parameters())
    expected = {
        name: tensor + 0.5 * own[name.replace("k_proj", "v_proj")] if name.endswith("k_proj.weight") else tensor
        for name, tensor in own.items()
    }
    trainer = build(stage, weights=keys_and_values_mixed)
    assert cases.largest_difference(cases.weights_of(trainer, 4096), expected) == 0.0
    trainer.export(tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert cases.largest_difference(dict(exported.named_parameters()), expected) == 0.0
    assert trainer.update(cases.packed_batch(1), cases.objective).applied, "what it trains is still its own"


@STAGES
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_export_loads_as_the_same_model(build, tmp_path, stage, tied):
    trainer = build(stage, tied=tied)
    trainer.update(cases.packed_batch(1), cases.objective)
    trainer.export(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert cases.largest_difference(dict(exported.named_parameters()), cases.weights_of(trainer)) == 0.0
    assert trainer.update(cases.packed_batch(2), cases.objective).applied, "the trainer goes on after an export"


def test_an_export_that_the_disk_does_not_take_is_one_clear_line(build, tmp_path):
    trainer, (soft, hard) = build(1), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # as a full disk, for this process only
    try:
        with pytest.raises(RunError, match="expected a disk with room; .*File too large.*free space"):
            trainer.export(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@STAGES
def test_logprobs_and_scores_follow_the_policy_and_the_reference_stays(build, folders, stage):
    trainer, plain = build(stage, needs_reference=True), cases.PlainLoop(folders[True])
    start = copy.deepcopy(plain.model)
    samples = cases.sequences(7, 6)
    batch = cases.packed_batch(7)
    trainer.update(batch, cases.objective)
    plain.update(samples)
    for model, reference in ((plain.model, False), (start, True)):
        rows = trainer.logprobs(batch.rows, reference=reference)
        with torch.no_grad():
            expected = [cases.reference_logprobs(model, s["token_ids"], 0.8)[0].numpy() for s in samples]
        masked = [np.concatenate([[0.0], e]) * s["loss_mask"] for e, s in zip(expected, samples, strict=True)]
        np.testing.assert_allclose(np.concatenate(rows), np.concatenate(masked), atol=2e-5)
        assert rows[0].dtype == np.float32
    scores = trainer.score([s["token_ids"] for s in samples])
    for s, score in zip(samples, scores, strict=True):
        with torch.no_grad():
            expected = cases.reference_logprobs(plain.model, s["token_ids"], 1.0)[0]
        np.testing.assert_allclose(score, expected.numpy(), atol=2e-5)


def test_scores_of_many_rows_keep_their_order(build):
    trainer = build(max_row_tokens=20)
    tokens = [s["token_ids"] for s in cases.sequences(8, 9)]
    together, alone = trainer.score(tokens), [trainer.score([t])[0] for t in tokens]
    assert trainer.score([]) == [] and len(trainer.score([tokens[0][:1]])[0]) == 0
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_reference_is_not_loaded_unless_needed(build):
    assert build().reference is None


def test_learning_rate_follows_the_schedule_of_applied_steps(build):
    trainer = build(lr=1e-3, schedule="linear", warmup_steps=2, final_lr_share=0.5, total=6)
    rates = [trainer.update(cases.packed_batch(step), cases.objective).lr for step in range(3)]
    skipped = trainer.update(cases.packed_batch(3), nan_loss)
    after = trainer.update(cases.packed_batch(4), cases.objective)
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])
    assert not skipped.applied and skipped.lr == after.lr == pytest.approx(8.75e-4)


@STAGES
def test_gradient_checkpointing_changes_nothing(build, stage):
    batch = cases.packed_batch(5)
    plain, checkpointed = build(stage), build(stage, gradient_checkpointing=True)
    for _ in range(2):
        results = [t.update(batch, cases.objective) for t in (plain, checkpointed)]
        assert results[1].loss == pytest.approx(results[0].loss, abs=1e-6)
        assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-5)
    assert checkpointed.lm.is_gradient_checkpointing


@STAGES
def test_bfloat16_stays_near_float32(build, stage):
    half, full = build(stage, dtype="bfloat16"), build(stage)
    for step in range(3):
        batch = cases.packed_batch(step)
        results = [t.update(batch, cases.objective) for t in (half, full)]
        assert results[0].applied
        assert results[0].loss == pytest.approx(results[1].loss, abs=0.03)
        assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=0.1)
    published = cases.weights_of(half)
    assert {t.dtype for t in published.values()} == {torch.bfloat16}
    assert not half.update(cases.packed_batch(4), infinite_gradient).applied


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_give_the_same_steps(build, folders, stage):
    trainer = build(stage, offload_optimizer=True, offload_params=stage == 3)
    plain = cases.PlainLoop(folders[True])
    for step in range(3):
        result = trainer.update(cases.packed_batch(step), cases.objective)
        assert result.loss == pytest.approx(plain.update(cases.sequences(step, 6))[0], abs=1e-5)
    assert cases.largest_difference(cases.weights_of(trainer), dict(plain.model.named_parameters())) < 5e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_of_a_bfloat16_model_give_the_same_steps(build, stage):
    """Sums in float32 take another way through DeepSpeed: the flat buffer stays on the device."""
    away, here = build(stage, dtype="bfloat16", offload_optimizer=True), build(stage, dtype="bfloat16")
    for step in range(3):
        results = [trainer.update(cases.packed_batch(step), cases.objective) for trainer in (away, here)]
        assert results[0].loss == results[1].loss
        assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-6)
    assert cases.largest_difference(cases.weights_of(away), cases.weights_of(here)) == 0.0
    for trainer in (away, here):
        before = cases.weights_of(trainer)
        assert not trainer.update(cases.packed_batch(4), infinite_gradient).applied
        assert cases.largest_difference(cases.weights_of(trainer), before) == 0.0


@pytest.mark.parametrize(("stage", "sums", "adds_up"), [(2, "auto", True), (3, "auto", True), (2, "bfloat16", False)])
def test_the_gradients_of_many_rows_add_up_in_a_bfloat16_model(build, stage, sums, adds_up):
    """400 times the same row: bfloat16, with its 8 bits, stops adding a number to its 256-fold."""
    trainer = build(stage, dtype="bfloat16", grad_accum_dtype=sums, lr=1e-8)
    samples = cases.sequences(3, 1)
    one = cases.batch_of([cases.pack(samples)], samples)
    many = replace(one, rows=one.rows * 400)
    ratio = trainer.update(many, cases.objective).grad_norm / trainer.update(one, cases.objective).grad_norm
    assert (ratio == pytest.approx(400, rel=1e-3)) is adds_up, ratio


def test_sleep_and_wake_change_nothing_on_a_cpu(build):
    trainer = build()
    before = cases.weights_of(trainer)
    trainer.sleep()
    trainer.wake()
    assert cases.largest_difference(cases.weights_of(trainer), before) == 0.0


def test_refusals_are_one_clear_line(build, folders, tmp_path):
    with pytest.raises(ConfigError, match="train.zero_stage: got 0; expected one of 1, 2, 3"):
        build(0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="model.path"):
        build(folder=tmp_path / "empty")
    model = AutoModelForCausalLM.from_pretrained(folders[True])
    model.config.final_logit_softcapping = 30.0
    model.save_pretrained(tmp_path / "softcapped")
    with pytest.raises(ModelError, match="final_logit_softcapping: got 30.0"):
        build(folder=tmp_path / "softcapped")


@pytest.mark.parametrize("changed", [{"num_hidden_layers": 3}, {"hidden_size": 64}])
def test_weights_that_do_not_fit_the_config_are_refused(build, folders, tmp_path, changed):
    """transformers would give a layer without weights fresh random ones, and the run would train them."""
    folder = shutil.copytree(folders[False], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ModelError, match="belong together") as caught:
        build(folder=folder)
    assert "\n" not in str(caught.value)


def test_rows_with_old_fields_replaced_are_rows(build):
    """Rows are frozen; the proximal pass gives back what a caller puts into a replaced row."""
    trainer, batch = build(), cases.packed_batch(1)
    rows = tuple(
        replace(row, old_logprobs=lp) for row, lp in zip(batch.rows, trainer.logprobs(batch.rows), strict=True)
    )

    def ratio_objective(logprobs, entropy, row, batch):
        ratio = (logprobs - torch.from_numpy(row.old_logprobs)).exp()
        count = int(row.loss_mask.sum())
        mask, advantages = torch.from_numpy(row.loss_mask), torch.from_numpy(row.advantages)
        metrics = {"loss/ratio": (ratio.detach()[mask].sum(), count)}
        return -(ratio * advantages * mask).sum() / batch.num_tokens, metrics

    result = trainer.update(replace(batch, rows=rows), ratio_objective)
    assert result.metrics["loss/ratio"] == pytest.approx(1.0, abs=1e-5)
