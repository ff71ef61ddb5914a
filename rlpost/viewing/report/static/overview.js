// The first screen: what was run, did it learn, was the engine busy, is it healthy, where did the time go.

// What is monitored. The threshold beyond which it deserves attention depends on the run (rlpost/reporting/thresholds.py).
const HEALTH = [
  { title: 'Entropy', names: ['loss/entropy'], unit: 'nats', trend: true },
  { title: 'KL from the step’s start', names: ['loss/approx_kl'], unit: 'nats', say: 'big steps' },
  { title: 'Clipped', names: ['loss/clip_low_share', 'loss/clip_high_share'], unit: 'share', say: 'big steps' },
  { title: 'Mismatch with the engine', names: ['mismatch/lag_0/abs_log_ratio'], unit: 'nats', say: 'they disagree' },
  {
    title: 'Staleness (groups’ age)',
    names: ['rollout/buffer_age', 'rollout/buffer_age_max'],
    unit: 'steps',
    say: 'too old',
    inclusive: true,
  },
  { title: 'Gradient norm', names: ['loss/grad_norm'], unit: '' },
];
const LEARNING = [
  ['accuracy', 'Accuracy', 'eval/accuracy', 'evals', 'share'],
  ['pass', 'Pass@k', 'eval/pass_at_k', 'evals', 'share'],
  ['heldOutLoss', 'Held-out loss', 'eval/loss', 'evals', 'nats'],
  ['loss', 'Training loss', 'loss/nll', 'steps', 'nats'],
  ['reward', 'Training reward', 'reward/mean', 'steps', 'reward'],
  ['length', 'Response length', 'eval/response_tokens', 'evals', 'tokens'],
];
const SHORT = {
  'loss/clip_low_share': 'below',
  'loss/clip_high_share': 'above',
  'rollout/buffer_age': 'mean',
  'rollout/buffer_age_max': 'oldest',
};
const PHASES = ['generate', 'update', 'publish', 'ledger', 'save', 'eval'];
const PHASE_HUES = { generate: 0, update: 1, publish: 2, ledger: 3, save: 4, eval: 5, other: null };
const phaseColor = name => (PHASE_HUES[name] == null ? color('grey') : hue(PHASE_HUES[name]));

// Lines of one metric for all experiments: a single run with its interval, seeds as mean with a band, each run faint.
function metricLines(report, name, source, axis) {
  return report.experiments.flatMap((experiment, number_) => {
    const runs = report.runs.filter((_, i) => report.experiment_of[i] === number_);
    const lines = runs
      .map(run => ({ run, ...curve(run[source], name, axis) }))
      .filter(line => line.y.some(v => v != null));
    const paint = () => hue(number_);
    if (lines.length < 2) {
      return lines.flatMap(({ run, x, y, row }) => {
        const low = run[source][`${name}_low`],
          high = run[source][`${name}_high`];
        const bands = low && high ? [[row.map(i => low[i]), row.map(i => high[i])]] : [];
        const line = {
          label: visible(runs.length > 1 ? run.name : experiment),
          x,
          y,
          color: paint,
          bands,
          bandLabel: bands.length ? '95 % interval' : '',
        };
        return smoothed(line);
      });
    }
    const all = aggregate(lines);
    const band = {
      label: visible(experiment),
      x: all.x,
      y: all.mean,
      color: paint,
      bands: [[all.low, all.high]],
      width: 2.5,
      bandLabel: `mean of ${lines.length} runs; band: lowest to highest`,
    };
    return [band, ...lines.map(({ run, x, y }) => ({ label: visible(run.name), x, y, color: paint, faint: true }))];
  });
}

// Hundreds of noisy points: a moving average in front of them.
function smoothed(line) {
  if (line.y.length < 150 || line.bands?.length) return [line];
  const width = Math.max(5, Math.round(line.y.length / 40));
  const y = line.y.map((value, i) =>
    value == null ? null : mean(numbers(line.y.slice(Math.max(0, i - width + 1), i + 1))),
  );
  return [
    { ...line, faint: true, label: `${line.label}, each step` },
    { ...line, y, label: `${line.label}, mean of ${width}` },
  ];
}

function metricChart(report, name, { source = 'steps', axis = 'step', ...more } = {}) {
  const about = report.metrics[name] || { unit: '', meaning: '' };
  const lines = metricLines(report, name, source, axis);
  const format = about.unit === 'share' ? percent : about.unit === 's' ? duration : number;
  return chart({
    label: name,
    x: axisFor(axis, lines),
    y: {
      format,
      tick: about.unit === 'share' ? v => percent(v, 0) : axisNumber,
      label: about.unit === 'share' ? '' : about.unit,
      ...(about.unit === 'share' ? { min: 0, max: 1 } : {}),
    },
    lines,
    sync: axis === 'step' ? 'step' : null,
    ...more,
  });
}

function header(report, onTheme) {
  const one = report.runs.length === 1,
    run = report.runs[0];
  const recipe = visible(run.config['description'] || '');
  return el(
    'header',
    {},
    el(
      'div',
      { class: 'title' },
      el(
        'h1',
        {},
        one ? visible(run.name) : `${report.runs.length} runs, ${count(report.experiments.length, 'experiment')}`,
      ),
      one && recipe ? el('span', { class: 'description' }, recipe) : null,
    ),
    el(
      'nav',
      { 'aria-label': 'Sections' },
      [
        ['overview', 'Overview'],
        ['lengths', 'Lengths'],
        ['rewards', 'Rewards'],
        ['rollouts', 'Rollouts'],
        ['timeline', 'Timeline'],
        ['metrics', 'All metrics'],
        ['settings', 'Settings'],
      ].map(([id, text]) => el('a', { href: `#${id}` }, text)),
      el('button', { type: 'button', class: 'theme', onclick: onTheme, 'aria-label': 'Light or dark' }, '◐'),
    ),
  );
}

function facts(run) {
  const { steps, evals } = run;
  const accuracy = evals['eval/accuracy'] || [];
  const heldOut = numbers(evals['eval/loss']),
    loss = heldOut.length ? heldOut : numbers(steps['loss/nll']); // of supervised training
  const times = [...numbers(steps.time_s), ...numbers(evals.time_s)];
  return {
    state: run.summary ? 'finished' : 'not finished',
    done: last(steps.step) ?? 0,
    before: first(accuracy),
    after: last(accuracy),
    best: accuracy.length ? largest(numbers(accuracy)) : null,
    low: last(evals['eval/accuracy_low']),
    high: last(evals['eval/accuracy_high']),
    samples: last(evals['eval/num_samples']),
    reward: last(steps['reward/mean']),
    firstReward: first(steps['reward/mean']),
    loss: last(loss),
    firstLoss: first(loss),
    lossName: heldOut.length ? 'Held-out loss' : 'Training loss',
    wall: times.length ? largest(times) : null,
    trained: last(steps['total/samples']),
    tokens: last(steps['total/tokens']),
    speed: weighted(steps, 'rollout/consumed_tokens_per_s', 'time/generate'),
    idle: weighted(steps, 'rollout/idle_share', 'time/generate') ?? mean(numbers(steps['rollout/idle_share'])),
    carried: mean(numbers(steps['rollout/carried_share'])),
    failed: sum(numbers(steps['reward/failed'])),
    skipped: sum(numbers(steps['loss/skipped_updates'])),
  };
}

function weighted(columns, name, weight) {
  const values = columns[name] || [],
    weights = columns[weight] || [];
  const both = values.map((v, i) => [v, weights[i]]).filter(([v, w]) => v != null && w != null);
  const total = sum(both.map(([, w]) => w));
  return total ? sum(both.map(([v, w]) => v * w)) / total : null;
}

function tiles(run) {
  const f = facts(run);
  const tile = (label, value, note, mood = '') =>
    el(
      'div',
      { class: `tile ${mood}` },
      el('dt', {}, label),
      el('dd', {}, value),
      note ? el('dd', { class: 'note' }, note) : null,
    );
  const learnt =
    f.after != null
      ? tile(
          'Accuracy',
          f.before === f.after
            ? percent(f.after)
            : [el('span', { class: 'from' }, `${percent(f.before)} → `), percent(f.after)],
          `95 %: ${(100 * f.low).toFixed(1)} to ${percent(f.high)}; ${count(f.samples, 'response')}`,
        )
      : f.loss != null
        ? tile(f.lossName, `${number(f.firstLoss)} → ${number(f.loss)}`, 'nats per token')
        : tile('Training reward', `${number(f.firstReward)} → ${number(f.reward)}`, 'no evaluation in this run');
  const bad = f.failed + f.skipped;
  return el(
    'dl',
    { class: 'tiles' },
    learnt,
    tile('Steps', `${number(f.done)}${run.planned_steps ? ` of ${number(run.planned_steps)}` : ''}`, f.state),
    tile(
      'Wall time',
      duration(f.wall),
      f.done ? `${duration(f.wall == null ? null : f.wall / f.done)} per step, including evaluation` : '',
    ),
    tile('Trained on', count(f.trained, 'response'), count(f.tokens, 'token')),
    tile('Useful rate', f.speed == null ? DASH : `${number(f.speed)} tokens/s`, 'trained tokens, generation time'),
    tile(
      'Engine slots in use',
      f.idle == null ? DASH : percent(1 - f.idle),
      f.carried == null ? '' : `${percent(f.carried)} of tokens carried over`,
    ),
    tile(
      'Failures',
      bad ? number(bad) : f.done ? 'none' : DASH,
      bad
        ? `${count(f.failed, 'reward')} failed, ${count(f.skipped, 'update')} skipped`
        : f.done
          ? 'all rewards scored, all updates applied'
          : 'no step was trained',
      bad ? 'bad' : '',
    ),
  );
}

function runTable(report) {
  const rows = report.runs.map((run, i) => {
    const f = facts(run);
    return [
      el(
        'span',
        {},
        el('span', { class: 'swatch', style: { background: `var(--hue-${report.experiment_of[i] % HUES})` } }),
        visible(run.name),
      ),
      visible(report.experiments[report.experiment_of[i]]),
      f.state,
      `${number(f.done)}${run.planned_steps ? ` / ${number(run.planned_steps)}` : ''}`,
      percent(f.before),
      percent(f.after),
      percent(f.best),
      number(f.reward),
      duration(f.wall),
      number(f.tokens),
      number(f.speed),
      f.idle == null ? DASH : percent(1 - f.idle),
      number(f.failed),
    ];
  });
  return table(
    [
      'Run',
      'Experiment',
      'State',
      'Steps',
      'Accuracy before',
      'after',
      'best',
      'Reward',
      'Wall time',
      'Trained tokens',
      'Tokens/s',
      'Slots in use',
      'Failed rewards',
    ],
    rows,
    { numeric: [3, 4, 5, 6, 7, 8, 9, 10, 11, 12] },
  );
}

function warningList(report) {
  const all = report.runs.flatMap(run => run.warnings.map(warning => ({ run, ...warning })));
  if (!all.length) return null;
  return el(
    'div',
    { class: 'warnings', role: 'note' },
    el('h3', {}, `${count(all.length, 'warning')} of the run${report.runs.length > 1 ? 's' : ''}`),
    el(
      'ul',
      {},
      all.map(w =>
        el(
          'li',
          {},
          el('b', {}, visible(w.name ?? '')),
          ` at step ${number(w.step)}${report.runs.length > 1 ? `, ${visible(w.run.name)}` : ''}: `,
          el('span', {}, visible(w.text ?? '')),
        ),
      ),
    ),
  );
}

function learning(report) {
  const known = LEARNING.filter(([, , name, source]) => report.runs.some(run => numbers(run[source][name]).length));
  const state = { what: known[0]?.[0] || 'accuracy', axis: 'time' };
  const axes = ['time', 'samples', 'tokens', 'step'].filter(a =>
    report.runs.some(run => numbers(run.steps[AXES[a].column]).length > 0),
  );
  if (!axes.includes(state.axis)) state.axis = axes[0] || 'step';
  const body = el('div');
  const show = () => {
    const [, , name, source] = LEARNING.find(([key]) => key === state.what);
    replace(
      body,
      metricChart(report, name, {
        source,
        axis: state.axis,
        height: 190,
        alwaysLegend: true,
        absent: 'Neither an evaluation nor a trained step was recorded.',
      }),
    );
  };
  show();
  const none =
    known.length && known[0][0] === 'reward'
      ? el('p', { class: 'note' }, 'No evaluation was recorded; the training reward is shown.')
      : null;
  return panel(
    'Did it learn?',
    el(
      'div',
      { class: 'controls' },
      known.length > 1
        ? choice(
            'What',
            known.map(([key, text]) => [key, text]),
            state.what,
            key => {
              state.what = key;
              show();
            },
          )
        : null,
      axes.length > 1
        ? choice(
            'Against',
            axes.map(a => [a, AXES[a].label.replace('Trained ', '').replace('Wall ', '')]),
            state.axis,
            a => {
              state.axis = a;
              show();
            },
          )
        : null,
    ),
    none,
    body,
  );
}

function busy(report) {
  const filled = {
    ...report,
    runs: report.runs.map(run => ({
      ...run,
      steps: { ...run.steps, filled: (run.steps['rollout/idle_share'] || []).map(v => (v == null ? null : 1 - v)) },
    })),
  };
  const lines = metricLines(filled, 'filled', 'steps', 'step');
  const speeds =
    report.runs.length === 1
      ? [
          ['rollout/generated_tokens_per_s', 'generated', 1],
          ['rollout/consumed_tokens_per_s', 'trained on', 0],
        ]
          .map(([name, label, n]) => ({ label, ...curve(report.runs[0].steps, name, 'step'), color: () => hue(n) }))
          .flatMap(smoothed)
      : metricLines(report, 'rollout/consumed_tokens_per_s', 'steps', 'step');
  return panel(
    'Was the engine busy?',
    el(
      'div',
      { class: 'pair' },
      el(
        'div',
        {},
        el('h4', {}, 'Slots in use while generating'),
        chart({
          label: 'Share of the engine’s slots in use',
          x: axisFor('step', lines),
          y: { min: 0, max: 1, format: percent, tick: v => percent(v, 0), range: [0, 1] },
          lines,
          height: 190,
          sync: 'step',
          legend: report.runs.length === 1 ? undefined : false,
        }),
      ),
      el(
        'div',
        {},
        el('h4', {}, `Tokens per second of generation${report.runs.length > 1 ? ', trained on' : ''}`),
        chart({
          label: 'Tokens per second',
          x: axisFor('step', speeds),
          y: { format: number, tick: axisNumber, min: 0 },
          lines: speeds,
          height: 190,
          sync: 'step',
          legend: report.runs.length === 1 ? undefined : false,
        }),
      ),
    ),
  );
}

function health(report) {
  return panel(
    'Is it healthy?',
    el(
      'div',
      { class: 'small-charts' },
      HEALTH.map(watch => {
        const run = report.runs[0];
        const border = run.borders[watch.names[0]];
        const worst = report.runs.flatMap(r => watch.names.map(name => last(r.steps[name]))).filter(v => v != null);
        const beyond = v => border != null && (watch.inclusive ? v > border : v >= border);
        const bad = worst.some(beyond);
        const names = report.runs.length === 1 ? watch.names : watch.names.slice(-1);
        const lines =
          report.runs.length === 1
            ? names
                .map((name, n) => ({
                  label: SHORT[name] || name,
                  ...curve(run.steps, name, 'step'),
                  color: () => hue(n),
                  noPoints: true,
                }))
                .flatMap(line => (names.length > 1 ? [line] : smoothed(line)))
            : metricLines(report, names[0], 'steps', 'step').map(line => ({ ...line, noPoints: true }));
        const format = watch.unit === 'share' ? percent : number;
        const unit = watch.unit && watch.unit !== 'share' ? ` ${watch.unit}` : '';
        const shown = worst.length ? format(report.runs.length === 1 ? worst[0] : Math.max(...worst)) + unit : DASH;
        const start = watch.trend && report.runs.length === 1 ? first(run.steps[watch.names[0]]) : null;
        const safe =
          start != null
            ? `from ${format(start)}`
            : border == null
              ? null
              : `● ${watch.inclusive ? 'at most' : 'below'} ${format(border)}`;
        const badge = !worst.length
          ? null
          : bad
            ? el('span', { class: 'badge bad' }, `▲ ${watch.say}`)
            : safe
              ? el('span', { class: 'badge' }, safe)
              : null;
        return el(
          'div',
          { class: 'small' },
          el('h4', {}, watch.title),
          el('p', { class: 'value' }, el('b', {}, shown), badge),
          chart({
            label: watch.title,
            x: axisFor('step', lines),
            y: { format, tick: watch.unit === 'share' ? v => percent(v, v && v < 0.02 ? 1 : 0) : axisNumber, min: 0 },
            lines,
            height: 88,
            sync: 'step',
            limit: border != null ? { value: border } : null,
            absent: 'Not recorded.',
            bare: true,
            legend: report.runs.length === 1 ? undefined : false,
          }),
        );
      }),
    ),
  );
}

function waterfall(run, several) {
  const columns = run.steps,
    xs = columns.step || [];
  const rows = Object.fromEntries(PHASES.map(name => [name, xs.map((_, i) => columns[`time/${name}`]?.[i] ?? null)]));
  const inStep = ['generate', 'update', 'publish', 'ledger'];
  const other = xs.map((_, i) => {
    const whole = columns['time/step']?.[i];
    return whole == null ? null : Math.max(0, whole - sum(inStep.map(name => rows[name][i] || 0)));
  });
  const lines = [...PHASES.map(name => ({ label: name, y: rows[name] })), { label: 'other', y: other }].map(line => ({
    ...line,
    x: xs,
    color: () => phaseColor(line.label),
  }));
  const total = sum(lines.flatMap(line => numbers(line.y)));
  const shown = binned(lines);
  const shares = lines.map(line => [line, sum(numbers(line.y))]).filter(([, seconds]) => seconds > 0);
  return panel(
    several ? `Where did the time go? ${visible(run.name)}` : 'Where did the time go?',
    shares.length
      ? el(
          'div',
          {
            class: 'share-bar',
            role: 'img',
            'aria-label': shares.map(([l, s]) => `${l.label} ${percent(s / total)}`).join(', '),
          },
          shares.map(([line, seconds]) =>
            el(
              'span',
              {
                title: `${line.label}: ${duration(seconds)}, ${percent(seconds / total)}`,
                style: {
                  flexGrow: seconds,
                  background: `var(--${PHASE_HUES[line.label] == null ? 'grey' : `hue-${PHASE_HUES[line.label]}`})`,
                },
              },
              seconds / total > 0.09 ? el('span', {}, `${line.label} ${percent(seconds / total, 0)}`) : '',
            ),
          ),
        )
      : null,
    chart({
      label: 'Seconds of each step by phase',
      bars: true,
      x: axisFor('step', shown),
      y: {
        label: shown.size > 1 ? `Seconds per step, mean of ${shown.size}` : 'Seconds',
        format: duration,
        tick: axisNumber,
        min: 0,
      },
      lines: shown,
      height: 190,
      absent: 'No times were recorded.',
      alwaysLegend: true,
      total: i =>
        el(
          'div',
          { class: 'row total' },
          el('span', {}, 'all'),
          el('b', {}, duration(sum(shown.map(line => line.y[i] || 0)))),
        ),
    }),
    partsOfSteps(columns),
  );
}

// The same seconds in more detail, mean over the steps: the parts of time/step in order.
function partsOfSteps(columns) {
  const means = Object.keys(columns)
    .filter(name => name.startsWith('waterfall/'))
    .map(name => [name.slice('waterfall/'.length).replaceAll('_', ' '), sum(numbers(columns[name]))])
    .filter(([, seconds]) => seconds > 0);
  const all = sum(means.map(([, seconds]) => seconds)),
    num = numbers(columns['time/step'] || []).length,
    longest = Math.max(...means.map(([, seconds]) => seconds));
  if (!means.length || !num) return null;
  return el(
    'details',
    { class: 'parts' },
    el('summary', {}, 'Parts of a step, mean over all steps'),
    table(
      ['part', 'seconds', 'share', ''],
      means.map(([name, seconds]) => [
        name,
        duration(seconds / num),
        percent(seconds / all),
        el('span', { class: 'part-bar', style: { width: `${(100 * seconds) / longest}%` } }),
      ]),
      { numeric: [1, 2] },
    ),
  );
}

// At most 120 bars: each is a mean over several steps if necessary, placed at the last of them.
function binned(lines) {
  const n = lines[0].x.length,
    size = Math.max(1, Math.ceil(n / 120));
  const result = lines.map(line => {
    const starts = Array.from({ length: Math.ceil(n / size) }, (_, i) => i * size);
    return {
      ...line,
      x: starts.map(i => line.x[Math.min(n, i + size) - 1]),
      y: starts.map(i => {
        const part = line.y.slice(i, i + size);
        return numbers(part).length ? sum(numbers(part)) / part.length : null;
      }),
    };
  });
  result.size = size;
  return result;
}

function overview(report, chosen) {
  const several = report.runs.length > 1;
  return el(
    'section',
    { id: 'overview', 'aria-label': 'Overview' },
    several ? runTable(report) : tiles(report.runs[0]),
    warningList(report),
    report.runs
      .filter(run => run.every > 1)
      .map(run =>
        el('p', { class: 'note' }, `${visible(run.name)} is a long run: every ${run.every}th step is drawn.`),
      ),
    el('div', { class: 'grid' }, learning(report), busy(report), health(report), waterfall(chosen, several)),
  );
}
