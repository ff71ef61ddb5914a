"""The texts that ``rlpost COMMAND --help`` prints above its options. Called by ``cli``; text only."""

DESCRIPTION = """\
RL post-training of language models: vLLM generates, DeepSpeed ZeRO updates, taking turns on the same device, with
active partial rollouts (APRIL) by default.

start here:
  rlpost doctor                                     is this machine ready? what is wrong, what to type
  rlpost recipes                                    what can be run
  rlpost check recipe=math/arithmetic               is everything ready? takes seconds, touches no device
  rlpost train recipe=math/arithmetic               the demo: minutes on a laptop, no GPU, no download
"""

OVERRIDES = """\
overrides are Hydra's key=value:
  steps=50 train.lr=2e-6                            single keys (rlpost config --keys lists them all)
  algo=gspo rollout=sync train=zero3                another option of a group
  data.train.path=my.jsonl model.path=my_model      your data, your model (a folder or a hub name)
  reward.function=my_package.my_module.score        your function
  recipe=path/to/mine.yaml                          your own recipe file
"""

TRAIN = """\
Trains a policy. Writes runs/NAME/: metrics.jsonl, the resolved config, checkpoints, rollouts. An unfinished run of the
same name resumes from its last checkpoint; a finished one is left alone and NAME-2 is started.

examples:
  rlpost train recipe=math/arithmetic
  rlpost train recipe=math/arithmetic algo=gspo name=try-gspo seed=1
  rlpost train recipe=math/gsm8k data.train.path=train.jsonl data.eval.path=test.jsonl model.path=my_model
"""

SFT = """\
Supervised fine-tuning, on data.train (a prompt and a response per row, or conversations) or on the lessons of
sft.generator. Writes runs/NAME-sft/: metrics.jsonl, the resolved config, checkpoints, what was drawn, and the model in
model/ (or in sft.output), for model.path. An unfinished run resumes from its last checkpoint; a finished one is left
alone and NAME-sft-2 is started.

examples:
  rlpost sft recipe=math/arithmetic                 rebuilds the demo's model, about 15 minutes on one core
  rlpost sft recipe=mine.yaml data.train.path=train.jsonl sft.init=my_model sft.epochs=3 sft.lr=1e-5
"""

EVAL = """\
Evaluates model.path on data.eval: mean@k and pass@k with the number of samples and a confidence interval.

examples:
  rlpost eval recipe=math/arithmetic eval.samples_per_prompt=4
  rlpost eval recipe=math/arithmetic model.path=runs/arithmetic/model eval.temperature=0
"""

CHECK = """\
Checks everything that needs no device, in seconds: keys, combinations, model folder, data with line numbers, prompt
lengths, reward, run directory. Prints the batch arithmetic, a memory plan per device, and what could not be checked.
With --show-prompt also what the model gets: two prompts with the chat template around them, and their tokens.

examples:
  rlpost check recipe=math/dapo_17k_qwen3_4b
  rlpost check recipe=math/gsm8k data.train.path=train.jsonl data.eval.path=test.jsonl train=zero3
  rlpost check recipe=math/arithmetic --show-prompt
"""

DOCTOR = """\
Looks at a new machine: Python and packages, compilers, memory, disks, limits of a container, environment variables, the
sandbox, the hub, the CPU or the GPU, and one publication from a real trainer to a real engine on a tiny model. Says
what it found, what is wrong, and what to type. Takes about 20 seconds; the exit status is 1 if there are problems.

examples:
  rlpost doctor
  rlpost doctor recipe=math/gsm8k model.path=my_model     does this model fit on this machine?
  rlpost doctor --json                                    for a bug report
"""

EXPORT = """\
Writes a Hugging Face folder (safetensors, configuration, tokenizer, model card) from a run's newest intact checkpoint,
or from the one after --step steps. It needs no GPU, and the run may be active.

examples:
  rlpost export runs/arithmetic my-model
  rlpost export runs/arithmetic my-model --step 20
"""

BENCH = """\
Benchmarks. `rollout` trains nothing and takes minutes; `learning` is a study of many training runs.
"""

BENCH_ROLLOUT = """\
Measures rollouts without training: the saturated engine, synchronous rollouts, APRIL's published scheduler and ours, on
the same prompts, forced response lengths, slots (engine.max_slots) and cap (rollout.max_response_tokens). Prints a
table; writes results.json and results.svg.

examples:
  rlpost bench rollout recipe=math/arithmetic --engines simulated
  rlpost bench rollout recipe=math/arithmetic rollout.max_response_tokens=256 --lengths lognormal
"""

PLAN = """\
Predicts a step of a configuration from a recorded run, for each oversample ratio: seconds of each phase, idle slots,
carried-over tokens, tokens trained per second; and names the best ratio. The real scheduler runs on a virtual clock
with the run's response lengths and measured costs; nothing is started. What the run cannot tell is listed as
extrapolated.

from=RUN_DIR is the recorded run. lengths=lognormal|uniform|bimodal|recorded:RUN_DIR replaces its lengths. cost.NAME=X
replaces a cost, in seconds; without a run, all of them must be given: iteration_s, sample_s, prefill_s, rollout_s,
update_s, update_token_s, reduce_s, publish_s, other_s, and prompt_tokens.

examples:
  rlpost plan recipe=math/arithmetic from=runs/arithmetic
  rlpost plan recipe=math/arithmetic from=runs/arithmetic cluster=ray cluster.num_workers=8 engine.max_slots=256
  rlpost plan recipe=math/arithmetic from=runs/arithmetic rollout.max_staleness=8 --ratios 2,4,8 --json
"""

BENCH_LEARNING = """\
Compares synchronous rollouts and APRIL, with and without correction, for GRPO, GSPO and DAPO over several seeds, on the
recipe math/arithmetic_long. Starts the runs that are missing from the table, one after another, each in a fresh process
on one core, and appends a row for each finished run. An interruption costs only the current run; the same command
continues. Run it in a checkout: table, figures and page are in docs/.

examples:
  rlpost bench learning --list
  rlpost bench learning --minutes 60
  rlpost bench learning --only 'gspo-*-s0,gspo-*-s1'
  rlpost bench learning --report                    writes the section of docs/april.md
"""

BUFFER = """\
Shows the run's ledger: how many prompts were drawn and where each of them is, where every token went, and what is still
open. With a uid: what happened to this prompt's responses, by step and policy version, and how they were scored.

examples:
  rlpost buffer runs/arithmetic
  rlpost buffer runs/arithmetic 0:17
"""

REPORT = """\
Writes one HTML file that opens from disk, without a network: did it learn, was the engine busy, is it healthy, where
did the time go; lengths, rewards, failures; every response with its tokens; the history of every sample. Several runs
are compared, and those that differ only in the seed become one band.

examples:
  rlpost report runs/arithmetic                     writes runs/arithmetic/report.html
  rlpost report runs/april-* runs/sync-* -o compare.html
"""

WATCH = """\
Shows a run that was started elsewhere: phase, progress, curves, latest responses, warnings. It only reads the run's
files, so it can be started and stopped at any time; Ctrl-C exits. Without a terminal, or with --once, it prints one
frame.

examples:
  rlpost watch runs/arithmetic
  rlpost watch runs/arithmetic --once
"""

RUNS = """\
Lists the runs below a folder: state (running; waiting: stopped cleanly; failed; killed; finished), steps, best score,
recipe. With --compare: which settings of two runs differ, and their metrics over the steps that both have.

examples:
  rlpost runs
  rlpost runs --compare runs/arithmetic runs/try-gspo
"""

TIMELINE = """\
Writes timeline.jsonl as a trace that Perfetto (https://ui.perfetto.dev) and chrome://tracing open: the loop's phases,
what each slot of the engine did and when, where a sample was interrupted and resumed, how many were running.

examples:
  rlpost timeline runs/arithmetic
  rlpost timeline runs/arithmetic trace.json
"""

DASHBOARD = """\
Builds a W&B workspace (panels in sections, seeds of an experiment as one band) and a report for a run's project, and
prints where they are. Without an account it writes the layout to RUN_DIR/wandb_dashboard.json.

example:
  rlpost dashboard wandb runs/arithmetic
"""

CONFIG = """\
Prints the whole configuration as YAML, as the run would use and save it; recipe=FILE reads it back.

examples:
  rlpost config recipe=math/arithmetic algo=dapo
  rlpost config --keys train                        every key below train: default, meaning, allowed values
"""
