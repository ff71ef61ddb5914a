// Below the first screen: lengths, rewards, failures, every metric, settings.

const LENGTHS = [
  ['admitted', 'Trained in the step', 'rollout/length/admitted_mean'],
  ['deferred', 'Interrupted and carried over, length so far', 'rollout/length/deferred_mean'],
  ['launched', 'First started in the step, length by its end', 'rollout/length/launched_mean'],
];

function lengths(run) {
  const top = Math.max(
    1,
    largest(LENGTHS.flatMap(([key, , name]) => [...numbers(run.lengths[key].max), ...numbers(run.steps[name])])),
  );
  const charts = LENGTHS.map(([key, title, name], n) => {
    const q = run.lengths[key],
      paint = () => hue([0, 1, 2][n]);
    const lines = q.step.length
      ? [
          {
            label: 'median',
            x: q.step,
            y: q.p50,
            color: paint,
            bands: [
              [q.p25, q.p75],
              [q.p10, q.p90],
            ],
            bandLabel: 'bands: 25 to 75 %, 10 to 90 %',
            noPoints: q.step.length > 1,
          },
          {
            label: 'longest',
            x: q.step,
            y: q.max,
            color: () => color('muted'),
            dash: [4, 4],
            width: 1,
            noPoints: true,
          },
        ]
      : [{ label: 'mean', ...curve(run.steps, name, 'step'), color: paint }];
    return el(
      'div',
      {},
      el('h4', {}, title),
      chart({
        label: title,
        x: axisFor('step', lines),
        y: { label: 'Tokens', format: number, tick: axisNumber, range: [0, top * 1.05] },
        lines,
        height: 230,
        sync: 'step',
        alwaysLegend: true,
        limit: run.max_response_tokens ? { value: run.max_response_tokens } : null,
      }),
    );
  });
  const without = run.lengths.launched.step.length
    ? ''
    : ' This run has no timeline, so only means are known for the last two.';
  return section(
    'lengths',
    'How long are the responses?',
    `Short responses finish first and train first. If the three differ for long, the policy learns from shorter responses than it generates.${without}`,
    el('div', { class: 'thirds panel' }, charts),
  );
}

function rewards(report, run) {
  const names = [...new Set(report.runs.flatMap(r => Object.keys(r.steps)))]
    .filter(name => name.startsWith('reward/part/'))
    .sort();
  const shown = ['reward/mean', ...names, 'reward/std', 'reward/equal_groups_share'];
  const small = shown.map(name =>
    el(
      'div',
      { class: 'small' },
      el('h4', {}, visible(name.replace('reward/part/', 'part: ').replace('reward/', '').replaceAll('_', ' '))),
      metricChart(report, name, { height: 150, legend: report.runs.length === 1 ? undefined : false }),
    ),
  );
  return section(
    'rewards',
    'What was rewarded, and what failed?',
    'Means over the responses trained in each step. A part that rises alone shows what the policy has discovered.',
    el('div', { class: 'panel' }, el('div', { class: 'small-charts' }, small)),
    el('div', { class: 'grid' }, failures(run, report.runs.length > 1), unusual(run)),
  );
}

function failures(run, several) {
  const columns = run.steps,
    xs = columns.step || [];
  const kinds = Object.keys(columns)
    .filter(name => /^(reward\/failed|rollout\/rejected_groups)\/./.test(name))
    .sort();
  const title = several ? `Failures by kind, ${visible(run.name)}` : 'Failures by kind';
  const lines = kinds
    .filter(name => sum(numbers(columns[name])) > 0)
    .map((name, n) => ({
      label: visible(
        name.replace('reward/failed/', 'reward: ').replace('rollout/rejected_groups/', 'group rejected: '),
      ),
      x: xs,
      y: columns[name],
      color: () => hue(n + 1),
    }));
  const unnamed = sum(numbers(columns['reward/failed']));
  if (!lines.length && unnamed)
    lines.push({ label: 'reward failed', x: xs, y: columns['reward/failed'], color: () => hue(1) });
  if (!lines.length)
    return panel(
      title,
      el(
        'p',
        { class: 'calm' },
        xs.length
          ? `✓ No reward failed and no group was rejected in ${count(xs.length, 'step')}.`
          : 'No step was trained.',
      ),
    );
  return panel(
    title,
    chart({
      label: 'Failures by step',
      bars: true,
      alwaysLegend: true,
      x: axisFor('step', lines),
      y: { label: 'Samples or groups', whole: true, min: 0, format: number },
      lines,
      height: 220,
    }),
  );
}

function unusual(run) {
  const columns = run.steps;
  const lines = [
    ['rollout/truncated_share', 'cut at the limit'],
    ['rollout/empty_share', 'empty'],
  ].map(([name, label], n) => ({ label, ...curve(columns, name, 'step'), color: () => hue(n + 3) }));
  return panel(
    'Responses cut or empty',
    chart({
      label: 'Share of responses cut or empty',
      x: axisFor('step', lines),
      y: { format: percent, tick: v => percent(v, v && v < 0.01 ? 1 : 0), min: 0, max: 1, whenZero: 0.1 },
      lines,
      height: 220,
      alwaysLegend: true,
      sync: 'step',
    }),
  );
}

function allMetrics(report) {
  const names = [...new Set(report.runs.flatMap(run => Object.keys(run.steps)))]
    .filter(name => name.includes('/'))
    .sort();
  const evals = [...new Set(report.runs.flatMap(run => Object.keys(run.evals)))]
    .filter(name => name.startsWith('eval/'))
    .sort();
  const areas = Map.groupBy
    ? Map.groupBy([...names, ...evals], name => name.split('/')[0])
    : group([...names, ...evals]);
  const filter = el('input', { type: 'search', placeholder: 'name or meaning', oninput: () => narrow() });
  const folds = [...areas].map(([area, members]) => {
    const body = el('div', { class: 'small-charts' });
    const fold = el(
      'details',
      { class: 'area' },
      el('summary', {}, `${visible(area)}/ `, el('span', { class: 'note' }, String(members.length))),
      body,
    );
    fold.addEventListener('toggle', () => {
      if (fold.open && !body.childElementCount) body.append(...members.map(name => metricCard(report, name)));
    });
    fold.members = members;
    return fold;
  });
  const narrow = () => {
    const words = filter.value.toLowerCase();
    for (const fold of folds) {
      const matches = name => (name + ' ' + (report.metrics[name]?.meaning || '')).toLowerCase().includes(words);
      fold.hidden = !fold.members.some(matches);
      if (words && !fold.hidden) fold.open = true;
      requestAnimationFrame(() => {
        for (const card of fold.querySelectorAll('.small')) card.hidden = !matches(card.metric);
      });
    }
  };
  return section(
    'metrics',
    'Every number',
    'By area, with the meaning of each below it.',
    el('label', { class: 'field' }, el('span', {}, 'Find'), filter),
    folds,
  );
}

function group(names) {
  const areas = new Map();
  for (const name of names) areas.set(name.split('/')[0], [...(areas.get(name.split('/')[0]) || []), name]);
  return areas;
}

function metricCard(report, name) {
  const about = report.metrics[name];
  const card = el(
    'div',
    { class: 'small' },
    el('h4', { class: 'mono' }, visible(name)),
    metricChart(report, name, {
      source: name.startsWith('eval/') ? 'evals' : 'steps',
      height: 120,
      legend: report.runs.length === 1 ? undefined : false,
    }),
    el(
      'p',
      { class: 'note' },
      about
        ? `${about.meaning}${about.healthy ? ` Healthy: ${about.healthy}.` : ''}`
        : 'Not in the registry of metrics.',
    ),
  );
  card.metric = name;
  return card;
}

function settings(report) {
  const differing = Object.entries(report.differences);
  const names = report.runs.map(run => visible(run.name));
  const compared =
    report.runs.length < 2
      ? null
      : panel(
          'What differs',
          differing.length
            ? table(
                ['Key', ...names],
                differing.map(([key, values]) => [visible(key), ...values.map(visible)]),
              )
            : el('p', { class: 'calm' }, 'The settings are the same.'),
        );
  const whole = report.runs.map(run => {
    const rows = Object.entries(run.config);
    return el(
      'details',
      { class: 'area' },
      el('summary', {}, `Settings of ${visible(run.name)}`),
      rows.length
        ? table(
            ['Key', 'Value'],
            rows.map(([key, value]) => [el('code', {}, visible(key)), visible(value)]),
          )
        : el('p', {}, 'There is no config.yaml.'),
    );
  });
  const where = el(
    'p',
    { class: 'note' },
    `Made by rlpost ${report.version} from `,
    report.runs.map((run, i) => [i ? ', ' : '', el('code', {}, visible(run.path))]).flat(),
    '. Charts: uPlot (MIT).',
  );
  return section('settings', 'Settings', '', compared, whole, where);
}
