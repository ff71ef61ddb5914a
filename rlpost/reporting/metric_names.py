# ruff: noqa: E501 (a table keeps one row per line)
"""What every metric means: one plain table of names, units, meanings and healthy ranges. Imports nothing of rlpost.

Names are ``area/name``. A ``*`` stands for one part between slashes (a lag, a reason, a reward's part). New metrics
need a line here; ``tests/reporting/test_metric_names.py`` checks the program's names and ``docs/metrics.md`` against it
(``python -m rlpost.reporting.metric_names > docs/metrics.md`` rewrites that page).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Metric:
    name: str  # may contain *
    unit: str
    meaning: str
    healthy: str = ""  # what a healthy run shows, and what the opposite means

    @property
    def varies(self) -> bool:
        """Whether it may differ between two identical runs: because of a clock, a worker or a cache."""
        return self.unit in ("s", "tokens/s", "GB/s") or self.name in _VARYING


_VARYING = (
    *("rollout/idle_share", "rollout/running_mean", "rollout/own_share", "replay/error"),  # computed from times
    *("reward/retried", "reward/replaced_workers", "reward/cache_hit_share", "eval/cache_hit_share"),
)

AREAS = {
    "reward": "Rewards of the groups trained in the step, before shaping.",
    "rollout": "How the step's rollout was generated, and what was carried between steps (APRIL).",
    "loss": "The update: means over the step's trainable tokens unless said otherwise.",
    "mismatch": "The behavior ratio r = exp(old_logprobs - rollout_logprobs), by version lag: the number of policy versions "
    "between a token's sampling and its training. Lag 0 is pure engine mismatch, later lags mismatch and staleness "
    "together.",
    "publish": "Copying the trained weights into the engine.",
    "eval": "Evaluation on held-out problems.",
    "sft": "Supervised training (`rlpost sft`); its loss is `loss/nll`.",
    "source": "The step's groups by source, where `data.train.sources` names several.",
    "time": "Wall time of the phases of one step.",
    "waterfall": "Where `time/step` went: parts that add up to it, in order. Parts that took no time are absent.",
    "total": "Sums over the run so far.",
    "replay": "Once, at the end: the run's rollouts replayed in the simulator, as they were and without APRIL.",
    "histogram": "Distributions over one step, in W&B and TensorBoard only.",
    "log": "The log's own health.",
}

REGISTRY = (
    Metric("step", "steps", "Rollouts trained so far; also the published policy version."),
    Metric("time_s", "s", "Since the run began, without pauses between resumed parts."),
    # reward
    Metric(
        "reward/mean", "reward", "Mean over scored samples.", "rises; a jump without eval/accuracy is reward hacking"
    ),
    Metric("reward/std", "reward", "Standard deviation over scored samples.", "above 0; at 0 nothing can be learned"),
    Metric("reward/min", "reward", "Smallest."),
    Metric("reward/max", "reward", "Largest."),
    Metric("reward/failed", "samples", "Samples whose reward raised an error, was late or was not a number.", "0"),
    Metric(
        "reward/failed/*",
        "samples",
        "The same, by kind: timeout, crash, reward_error, none, or a kind named by the reward.",
        "0",
    ),
    Metric(
        "reward/pending",
        "samples",
        "Samples that were still waiting for their reward result when the step had its groups.",
        "small; otherwise rewards are slower than generation",
    ),
    Metric("reward/retried", "calls", "Calls that failed and were retried (`reward.on_failure=retry`).", "0"),
    Metric(
        "reward/replaced_workers",
        "workers",
        "Reward processes killed at a deadline, or lost, since the previous step.",
        "0",
    ),
    Metric("reward/call_s", "s", "Mean time of one call of a reward function, without results from the cache."),
    Metric("reward/call_s/max", "s", "Longest such time.", "well below `reward.timeout_s`"),
    Metric(
        "reward/cache_hit_share",
        "share",
        "Calls answered by the reward cache; absent without one.",
        "near 0, except after a resume",
    ),
    Metric("reward/part/*", "reward", "Mean of one part of the reward."),
    Metric(
        "reward/equal_groups_share", "share", "Groups whose rewards are all equal: no gradient from them.", "below 0.7"
    ),
    # rollout
    Metric("rollout/consumed_tokens_per_s", "tokens/s", "Tokens trained on, over generation time: the useful rate."),
    Metric(
        "rollout/generated_tokens_per_s", "tokens/s", "Tokens newly sampled, over generation time.", "near consumed"
    ),
    Metric(
        "rollout/discarded_tokens_per_s",
        "tokens/s",
        "Tokens discarded (filters, failed rewards).",
        "0 without a filter",
    ),
    Metric(
        "rollout/replayed_tokens_per_s",
        "tokens/s",
        "Tokens of carried-over samples that the engine read again.",
        "small: a prefill",
    ),
    Metric("rollout/consumed_tokens", "tokens", "Response tokens of the groups trained."),
    Metric("rollout/generated_tokens", "tokens", "Response tokens newly sampled in the step."),
    Metric(
        "rollout/discarded_tokens", "tokens", "Response tokens of rejected groups, and of samples without a reward."
    ),
    Metric(
        "rollout/replayed_tokens", "tokens", "Prompt and response tokens of carried-over samples that were read again."
    ),
    Metric("rollout/prefill_tokens", "tokens", "Prompt and replayed tokens computed (without prefix-cache hits)."),
    Metric(
        "rollout/idle_share",
        "share",
        "1 - (sum of step time x running samples) / (sum of step time x slots).",
        "below 0.1 with APRIL; the tail makes it 0.3 to 0.7 without",
    ),
    Metric(
        "rollout/carried_share",
        "share",
        "Share of trained tokens that were sampled by an older policy version.",
        "0.2 to 0.5 (the paper: 0.4); 0 is synchronous",
    ),
    Metric(
        "rollout/version_span/*",
        "share",
        "Trained samples whose tokens come from this many policy versions.",
        "falls fast; nothing above max_staleness + 1",
    ),
    Metric(
        "rollout/buffer_age",
        "steps",
        "Mean age of the trained groups: steps since they were drawn.",
        "below max_staleness",
    ),
    Metric("rollout/buffer_age_max", "steps", "The largest such age."),
    Metric("rollout/buffer_groups", "groups", "Groups waiting after the step (partial, scoring or ready)."),
    Metric("rollout/ready_groups", "groups", "Complete groups waiting for a later step."),
    Metric("rollout/buffer_tokens", "tokens", "Tokens generated but not yet trained."),
    Metric(
        "rollout/length/admitted_mean",
        "tokens",
        "Mean response length of samples trained in this step.",
        "near launched_mean over a few steps; lower means that short responses train first",
    ),
    Metric("rollout/length/deferred_mean", "tokens", "Mean length so far of samples carried over."),
    Metric("rollout/length/launched_mean", "tokens", "Mean length so far of samples first started in this step."),
    Metric("rollout/length/admitted_max", "tokens", "Longest response trained."),
    Metric("rollout/truncated_share", "share", "Trained samples that were cut at max_response_tokens.", "below 0.1"),
    Metric("rollout/empty_share", "share", "Trained samples with an empty response.", "0"),
    Metric(
        "rollout/accepted_share", "share", "Share of complete groups that were admitted (the filter rejected the rest)."
    ),
    Metric(
        "rollout/open_limit",
        "groups",
        "Maximum number of groups open or admitted in the step: `rollout.oversample` x N, or the choice of `rollout.adaptive_oversample`.",
    ),
    Metric("rollout/rejected_groups", "groups", "Groups the filter rejected."),
    Metric("rollout/rejected_groups/*", "groups", "The same, by reason."),
    Metric("rollout/launched_samples", "samples", "Samples started for the first time."),
    Metric("rollout/resumed_samples", "samples", "Carried-over samples that were resumed."),
    Metric(
        "rollout/kept_samples", "samples", "Carried-over samples that resumed with their KV cache (`rollout.keep_kv`)."
    ),
    Metric("rollout/engine_steps", "steps", "Engine steps of the rollout."),
    Metric("rollout/running_mean", "samples", "Samples in the engine, mean over time.", "near slots"),
    Metric(
        "rollout/slots",
        "samples",
        "Samples that may be in the engine at once: `rollout.max_in_flight`, or as many as its KV cache holds, at most `engine.max_slots`.",
    ),
    Metric("rollout/kv_usage_max", "share", "Largest share of the KV cache in use.", "below 1"),
    Metric(
        "rollout/preemptions",
        "samples",
        "Samples that vLLM preempted because the KV cache was full; their tokens are recomputed.",
        "near 0",
    ),
    Metric(
        "rollout/own_share",
        "share",
        "Share of the rollout spent in rlpost's own code, outside the engine.",
        "below 0.1",
    ),
    # loss
    Metric("loss/policy", "", "The policy loss as reduced; its magnitude means little, its sign less.", "finite"),
    Metric("loss/total", "", "Policy loss plus KL and entropy terms.", "finite"),
    Metric("loss/nll", "nats", "Negative log-likelihood per token (supervised fine-tuning).", "falls"),
    Metric("loss/kl", "nats", "KL to the frozen reference (estimator kl_estimator).", "grows slowly"),
    Metric("loss/entropy", "nats", "Entropy of the next-token distribution.", "falls slowly; a fall to 0 is collapse"),
    Metric("loss/approx_kl", "nats", "KL from old_logprobs to logprobs, k3.", "below 0.05 per rollout"),
    Metric("loss/ratio", "", "Mean of exp(logprobs - old_logprobs) (GSPO: of the sequence ratio).", "near 1"),
    Metric("loss/ratio/max", "", "The largest such ratio."),
    Metric("loss/clip_low_share", "share", "Tokens (GSPO: sequences) clipped below.", "below 0.1"),
    Metric("loss/clip_high_share", "share", "Tokens (GSPO: sequences) clipped above.", "below 0.1"),
    Metric("loss/dual_clip_share", "share", "Tokens limited by the dual clip.", "near 0"),
    Metric(
        "loss/grad_norm",
        "",
        "Global gradient norm before clipping, mean over optimizer steps.",
        "steady; spikes are clipped",
    ),
    Metric("loss/lr", "", "Learning rate of the last optimizer step."),
    Metric("loss/skipped_updates", "updates", "Updates skipped because of NaN or infinite values; never applied.", "0"),
    Metric("loss/tokens", "tokens", "Trainable tokens of the step."),
    Metric("loss/sequences", "sequences", "Sequences with at least one trainable token."),
    # mismatch
    Metric(
        "mismatch/*/ratio",
        "",
        "Mean r at this lag (lag_0, lag_1, ..., the last with _plus); mixed_kv: of tokens that attended to keys and values of older weights, which are counted in no lag.",
        "near 1",
    ),
    Metric(
        "mismatch/*/abs_log_ratio", "nats", "Mean abs(log r) at this lag.", "lag_0: below 1e-4 in fp32, 0.05 in bf16"
    ),
    Metric("mismatch/*/changed_share", "share", "Tokens that the correction truncated or masked.", "below 0.05"),
    Metric("mismatch/*/token_share", "share", "Trainable tokens of this lag."),
    Metric("mismatch/abs_log_ratio/max", "nats", "Largest abs(log r) over all lags."),
    Metric(
        "mismatch/canary",
        "nats",
        "Mean logprob difference between trainer and engine on tokens that the engine sampled at the start.",
        "below 1e-4 in fp32, 0.1 in bf16; beyond it the run stops",
    ),
    Metric("mismatch/canary_max", "nats", "The largest of these differences; it is not judged."),
    # publish
    Metric(
        "publish/gb_per_s", "GB/s", "Bytes of the weights over the time of copying them.", "near the memory's bandwidth"
    ),
    Metric("publish/load_s", "s", "Copying."),
    Metric("publish/fingerprint_s", "s", "Reading back and comparing every tensor."),
    # eval
    Metric("eval/accuracy", "share", "mean@k: mean over problems of the share of correct samples.", "rises"),
    Metric("eval/accuracy_low", "share", "Lower end of its 95 % interval, bootstrap over problems."),
    Metric("eval/accuracy_high", "share", "Upper end of the same interval."),
    Metric(
        "eval/pass_at_k",
        "share",
        "Problems with at least one correct sample among k (unbiased estimate).",
        "falls while accuracy rises: the policy narrows",
    ),
    Metric("eval/pass_at_k_low", "share", "Lower end of its 95 % interval."),
    Metric("eval/pass_at_k_high", "share", "Upper end of the same interval."),
    Metric("eval/response_tokens", "tokens", "Mean response length."),
    Metric("eval/truncated_share", "share", "Responses cut at the limit.", "below 0.05"),
    Metric("eval/num_samples", "samples", "Responses scored."),
    Metric("eval/failed/*", "samples", "Responses without a reward result, by kind of failure.", "0"),
    Metric("eval/cache_hit_share", "share", "Calls answered by the reward cache; absent without one."),
    Metric("eval/num_failed", "samples", "Responses without a reward result, excluded from the means.", "0"),
    Metric("eval/part/*", "reward", "Mean of one part of the reward."),
    Metric(
        "eval/loss", "nats", "`rlpost sft`: loss/nll on data.eval.", "falls; a rise while loss/nll falls is overfitting"
    ),
    Metric("eval/tokens", "tokens", "Tokens that this loss is the mean over."),
    *(
        Metric(f"eval/*/{name}", unit, f"`eval/{name}` of one source, where `data.eval.sources` names several.")
        for name, unit in (
            *(("accuracy", "share"), ("accuracy_low", "share"), ("accuracy_high", "share"), ("pass_at_k", "share")),
            *(("pass_at_k_low", "share"), ("pass_at_k_high", "share"), ("response_tokens", "tokens")),
            *(("truncated_share", "share"), ("num_samples", "samples"), ("num_failed", "samples")),
        )
    ),
    # sft
    Metric("sft/epoch", "passes", "Passes over the data so far; absent for lessons of a generator, which do not end."),
    Metric("sft/tokens", "tokens", "Tokens of the step's examples, prompts included."),
    Metric(
        "sft/dropped", "examples", "Lessons left out so far because they are too long (`sft.long_examples=drop`).", "0"
    ),
    # source
    Metric("source/*/groups", "groups", "Groups of this source that were trained."),
    Metric("source/*/reward", "reward", "Mean over their scored samples.", "rises"),
    Metric("source/*/response_tokens", "tokens", "Mean response length of the same."),
    # time
    Metric("time/step", "s", "The whole step: publication, generation, update; without evaluation and saving."),
    Metric(
        "time/cpu",
        "s",
        "CPU time of the run's own process in the step, over all its threads; without the publication.",
        "near time/step with one thread; far below it, other programs are using the cores",
    ),
    Metric("time/generate", "s", "Generation, including concurrent scoring."),
    Metric("time/update", "s", "Forward, backward and optimizer."),
    Metric(
        "time/ledger",
        "s",
        "Writing the rollout and its end to the ledger, and reading tokens back.",
        "below 0.02 of time/step",
    ),
    Metric(
        "time/publish",
        "s",
        "Copying this step's weights into the engine, including fingerprint and canary.",
    ),
    Metric("time/eval", "s", "Evaluation; not part of time/step."),
    Metric("time/save", "s", "Saving a checkpoint; not part of time/step."),
    # waterfall
    Metric("waterfall/canary", "s", "Scoring the canary with trainer and engine."),
    Metric("waterfall/copy", "s", "Copying the weights into the engine."),
    Metric("waterfall/fingerprint", "s", "Reading every tensor back and comparing it."),
    Metric(
        "waterfall/hand_over",
        "s",
        "Handing over the device: sleeping and waking engine and trainer.",
        "small on a GPU, zero on a CPU",
    ),
    Metric("waterfall/engine", "s", "The engine at work, without its empty slots.", "most of the step"),
    Metric("waterfall/idle", "s", "The engine's time x the share of its slots that were empty (rollout/idle_share)."),
    Metric(
        "waterfall/collect",
        "s",
        "rlpost's own code beside the engine: scheduling, buffer, submitting samples for scoring.",
        "below a tenth of waterfall/engine",
    ),
    Metric("waterfall/wait_for_rewards", "s", "Nothing left to generate, rewards pending.", "0"),
    Metric("waterfall/abort", "s", "Ending what was in flight (one engine; with replicas it is part of engine)."),
    Metric(
        "waterfall/build_batch",
        "s",
        "Advantages, packing and batches, once the step has its groups (records of responses are made while others are generated).",
        "below 0.02 of time/step",
    ),
    Metric(
        "waterfall/old_logprobs",
        "s",
        "The pass for old_logprobs, if the algorithm or logging.trainer_logprobs needs it.",
    ),
    Metric("waterfall/ref_logprobs", "s", "The pass of the frozen reference, if there is a KL term."),
    Metric("waterfall/train", "s", "Forward, backward, optimizer."),
    Metric("waterfall/keep_state", "s", "Keeping the trainer's state outside the workers (cluster.keep_shards)."),
    Metric("waterfall/recover", "s", "Restarting workers after one was lost."),
    Metric("waterfall/ledger", "s", "As time/ledger."),
    Metric("waterfall/record", "s", "Metrics, rollout files, tables."),
    Metric("waterfall/other", "s", "The rest."),
    # total
    Metric("total/samples", "samples", "Samples trained."),
    Metric("total/tokens", "tokens", "Response tokens trained."),
    # replay
    Metric("replay/measured_s", "s", "Generation time of the whole run."),
    Metric(
        "replay/synchronous_s", "s", "The simulator's time for the same rollouts, every step waiting for its slowest."
    ),
    Metric("replay/error", "share", "The simulator's error on the run as it was.", "below 0.1"),
    # histogram
    Metric("histogram/length", "tokens", "Response lengths of the trained samples.", "no pile at max_response_tokens"),
    Metric(
        "histogram/staleness",
        "versions",
        "Trained tokens, by how many policy versions before the trained one they were sampled.",
        "nothing above max_staleness",
    ),
    Metric("histogram/advantage", "", "Advantages of the trained samples.", "both signs; a spike at 0 teaches nothing"),
    Metric("histogram/reward", "reward", "Rewards of the trained samples.", "more than one bar"),
    # log
    Metric("log/not_finite", "numbers", "Numbers of this line that were NaN or infinite (written as null).", "absent"),
)


def find(name: str) -> Metric | None:
    """The registry's entry for a logged name; an exact name takes precedence over a family."""
    exact, families = _compiled()
    return exact.get(name) or next((metric for pattern, metric in families if pattern.fullmatch(name)), None)


def varies(name: str) -> bool:
    """:attr:`Metric.varies` of a logged name; True for an unknown one."""
    metric = find(name)
    return metric is None or metric.varies


def render() -> str:
    """The page ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Every run writes `runs/NAME/metrics.jsonl`, one flat JSON object per line, always with `step` and `time_s`; W&B and",
        "TensorBoard show the same names. A number that was NaN or infinite is `null` there and counted in",
        "`log/not_finite`. `*` stands for one part of a name. Written by `python -m rlpost.reporting.metric_names`.",
        "",
        "In a healthy run, `eval/accuracy` and `reward/mean` rise, `rollout/idle_share` is small, `mismatch/lag_0/ratio`",
        "is 1, and `loss/skipped_updates` and `reward/failed` are 0.",
        "",
        *_table([metric for metric in REGISTRY if "/" not in metric.name]),
    ]
    for area, text in AREAS.items():
        lines += ["", f"## {area}/", "", text, "", *_table([m for m in REGISTRY if m.name.startswith(area + "/")])]
    return "\n".join(lines) + "\n"


@cache
def _compiled() -> tuple[dict[str, Metric], list[tuple[re.Pattern[str], Metric]]]:
    exact = {metric.name: metric for metric in REGISTRY if "*" not in metric.name}
    families = [m for m in REGISTRY if "*" in m.name]
    return exact, [(re.compile(re.escape(m.name).replace(r"\*", "[^/]+")), m) for m in families]


def _table(metrics: list[Metric]) -> list[str]:
    rows = [f"| `{m.name}` | {m.unit} | {m.meaning} | {m.healthy} |" for m in metrics]
    return ["| Name | Unit | Meaning | Healthy |", "|---|---|---|---|", *rows]


if __name__ == "__main__":
    print(render(), end="")
