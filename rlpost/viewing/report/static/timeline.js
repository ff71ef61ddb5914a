// The timeline: each stay of a sample in the engine as a bar, the number running above it, phases behind both.

const MARKS = [
  ['paused', '❘❘ interrupted, kept'],
  ['stop', '▌ finished'],
  ['length', '▲ cut at the limit'],
  ['trained', '● trained'],
  ['dropped', '✕ rejected or failed'],
];
const GUTTER = 52;

async function timeline(run) {
  const known = run.timeline.filter(part => part.block != null);
  if (!known.length) {
    return section(
      'timeline',
      'History of every sample',
      '',
      el(
        'p',
        { class: 'calm' },
        'This run has no timeline.jsonl: it was made by an older version, or ended in its first step.',
      ),
    );
  }
  const steps = known.flatMap(part => Array.from({ length: part.last - part.first + 1 }, (_, n) => part.first + n));
  const lowest = steps[0],
    highest = steps.at(-1),
    middle = steps[Math.floor((steps.length - 1) / 2)];
  const state = {
    run,
    from: Math.max(lowest, Math.min(middle, highest - 1)),
    to: Math.min(highest, middle + 1),
    mode: 'slots',
    lowest,
    highest,
    group: '',
  };
  state.body = el('div');
  state.status = el('p', { class: 'note', role: 'status' });
  const input = name =>
    el('input', {
      type: 'number',
      min: lowest,
      max: highest,
      value: state[name],
      onchange: event => {
        state[name] = Math.max(lowest, Math.min(highest, Number(event.currentTarget.value) || lowest));
        if (state.from > state.to) state[name === 'from' ? 'to' : 'from'] = state[name];
        show();
      },
    });
  const from = input('from'),
    to = input('to');
  const show = async () => {
    from.value = state.from;
    to.value = state.to;
    await showTimeline(state);
  };
  const turn = by => {
    const width = state.to - state.from;
    state.from = Math.max(lowest, Math.min(highest - width, state.from + by));
    state.to = state.from + width;
    show();
  };
  const left_out = run.timeline.filter(part => part.block == null);
  const controls = el(
    'div',
    { class: 'filters' },
    el(
      'div',
      { class: 'field' },
      el('span', {}, `Steps (of ${lowest} to ${highest})`),
      el('div', { class: 'range' }, from, '–', to),
    ),
    el(
      'div',
      { class: 'field' },
      el('span', {}, 'Move'),
      el(
        'div',
        { class: 'range' },
        el('button', { type: 'button', 'aria-label': 'Earlier step', onclick: () => turn(-1) }, '←'),
        el('button', { type: 'button', 'aria-label': 'Later step', onclick: () => turn(1) }, '→'),
      ),
    ),
    el(
      'div',
      { class: 'field' },
      el('span', {}, 'One row for each'),
      choice(
        'Rows',
        [
          ['slots', 'engine slot'],
          ['samples', 'sample'],
        ],
        state.mode,
        mode => {
          state.mode = mode;
          show();
        },
      ),
    ),
    el(
      'label',
      { class: 'field' },
      el('span', {}, 'Group'),
      el('input', {
        type: 'search',
        placeholder: 'uid, e.g. 0:17',
        oninput: debounceInput(value => {
          state.group = value.trim();
          show();
        }),
      }),
    ),
  );
  await showTimeline(state);
  return section(
    'timeline',
    'History of every sample',
    'A bar is a stay in the engine, colored by the policy version that sampled it. An abort interrupts unfinished samples; they resume in the next step, under the next version. Drag to zoom in, double-click to zoom out.',
    left_out.length
      ? el(
          'p',
          { class: 'warnings' },
          `Left out, so that the file stays below 20 MB: ${left_out
            .map(p => (p.first === p.last ? `step ${p.first}` : `steps ${p.first} to ${p.last}`))
            .slice(0, 8)
            .join(', ')}${left_out.length > 8 ? ' and others' : ''}.`,
        )
      : null,
    el('div', { class: 'panel' }, controls, state.status, state.body),
  );
}

function debounceInput(action) {
  let timer;
  return event => {
    const value = event.currentTarget.value;
    clearTimeout(timer);
    timer = setTimeout(() => action(value), 250);
  };
}

async function loadSteps(state) {
  const parts = state.run.timeline.filter(
    part => part.block != null && part.last >= state.from && part.first <= state.to,
  );
  const blocks = await Promise.all(parts.map(part => block(part.block)));
  return blocks.flat().filter(step => step.step >= state.from && step.step <= state.to);
}

async function showTimeline(state) {
  const steps = await loadSteps(state);
  const records = readRecords(steps, state);
  if (!records.spans.length) {
    state.status.textContent = state.group
      ? 'No sample of such a group ran in these steps.'
      : 'No sample ran in these steps.';
    replace(state.body);
    return;
  }
  assignRows(records, state.mode);
  state.status.textContent = summarize(records, state);
  const phases = steps.flatMap(step =>
    step.phases.map(([name, start, end]) => ({ name, start, end, step: step.step })),
  );
  const shared = { records, phases, link: [] };
  replace(state.body, timelineLegend(records, phases), concurrencyChart(state, shared), ganttChart(state, shared));
}

function readRecords(steps, state) {
  const spans = [],
    samples = new Map(),
    trained = new Map(),
    dropped = new Map();
  for (const step of steps) {
    const update = step.phases.filter(([name]) => name === 'update').at(-1);
    const when = update ? update[2] : Math.max(0, largest(step.spans.end_s));
    for (const uid of step.admitted) trained.set(uid, { step: step.step, when });
    for (const [uid, why] of step.dropped) dropped.set(uid, { why, when });
    step.spans.group.forEach((group, i) => {
      const s = step.spans,
        uid = step.groups[group];
      if (state.group && uid !== state.group) return;
      const span = {
        uid,
        index: s.index[i],
        replica: s.replica[i],
        version: s.policy_version[i],
        start: s.start_s[i],
        end: s.end_s[i],
        tokens: s.tokens[i],
        kind: s.kind[i],
        how: s.end[i],
        step: step.step,
      };
      spans.push(span);
      const key = `${uid}/${span.index}`;
      if (!samples.has(key)) samples.set(key, { key, uid, spans: [] });
      samples.get(key).spans.push(span);
    });
  }
  spans.sort((a, b) => a.start - b.start || a.replica - b.replica);
  for (const sample of samples.values()) {
    sample.trained = trained.get(sample.uid);
    sample.dropped = dropped.get(sample.uid);
    sample.spans.sort((a, b) => a.start - b.start);
    sample.spans.forEach(span => {
      span.sample = sample;
    });
  }
  return { spans, samples: [...samples.values()] };
}

function assignRows(records, mode) {
  if (mode === 'samples') {
    const born = new Map();
    for (const sample of records.samples)
      born.set(sample.uid, Math.min(born.get(sample.uid) ?? Infinity, sample.spans[0].start));
    records.samples.sort(
      (a, b) =>
        born.get(a.uid) - born.get(b.uid) ||
        (a.uid < b.uid ? -1 : a.uid > b.uid ? 1 : a.spans[0].index - b.spans[0].index),
    );
    records.samples.forEach((sample, row) => {
      sample.row = row;
      sample.spans.forEach(span => {
        span.row = row;
      });
    });
    records.rows = records.samples.length;
    return;
  }
  const lanes = new Map(); // replica -> when each of its slots is free
  for (const span of records.spans) {
    if (!lanes.has(span.replica)) lanes.set(span.replica, []);
    const free = lanes.get(span.replica);
    let lane = free.findIndex(until => until <= span.start + 1e-6);
    if (lane < 0) lane = free.length;
    free[lane] = span.end;
    span.lane = lane;
  }
  let first = 0;
  const offsets = new Map();
  for (const replica of [...lanes.keys()].sort((a, b) => a - b)) {
    offsets.set(replica, first);
    first += lanes.get(replica).length + 1;
  }
  for (const span of records.spans) span.row = offsets.get(span.replica) + span.lane;
  records.rows = Math.max(1, first - 1);
}

function concurrency(spans) {
  const events = spans
    .flatMap(span => [
      [span.start, 1],
      [span.end, -1],
    ])
    .sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const x = [],
    y = [];
  let running = 0;
  for (const [when, change] of events) {
    running += change;
    if (x.at(-1) === when) y[y.length - 1] = running;
    else {
      x.push(when);
      y.push(running);
    }
  }
  return { x, y };
}

function summarize(records, state) {
  const paused = records.spans.filter(span => span.how === 'paused').length,
    resumed = records.spans.filter(span => span.kind !== 'launched').length;
  const replicas = new Set(records.spans.map(span => span.replica)).size;
  const curve_ = concurrency(records.spans);
  const busyTime = sum(records.spans.map(span => span.end - span.start));
  let running = 0;
  curve_.x.forEach((x, i) => {
    if (curve_.y[i] > 0 && i + 1 < curve_.x.length) running += curve_.x[i + 1] - x;
  });
  return (
    `${state.from === state.to ? `Step ${state.from}` : `Steps ${state.from} to ${state.to}`}: ${count(records.samples.length, 'sample')} on ${count(replicas, 'replica')}, ` +
    `${number(busyTime / (running || 1))} running on average${state.run.slots ? ` of ${number(state.run.slots * replicas)} slots` : ''}; ${number(paused)} interrupted, ${number(resumed)} resumed.`
  );
}

function timelineLegend(records, phases) {
  const versions = [...new Set(records.spans.map(span => span.version))].sort((a, b) => a - b);
  const shown = versions.length > 12 ? [...versions.slice(0, 6), null, ...versions.slice(-5)] : versions;
  return el(
    'div',
    { class: 'legend' },
    shown.map(v =>
      v == null
        ? '…'
        : el(
            'span',
            { class: 'key' },
            el('span', { class: 'swatch', style: { background: `var(--hue-${versionHue(v)})` } }),
            `version ${v}`,
          ),
    ),
    MARKS.map(([, text]) => el('span', { class: 'key' }, text)),
    el('span', { class: 'key' }, 'strip: '),
    [...new Set(phases.map(p => p.name))].map(name =>
      el(
        'span',
        { class: 'key' },
        el('span', {
          class: 'swatch strip',
          style: { background: PHASE_HUES[name] == null ? 'var(--grey)' : `var(--hue-${PHASE_HUES[name]})` },
        }),
        visible(name),
      ),
    ),
  );
}

// A shade behind the charts while nothing is generated.
function shade(u, phases) {
  eachPhase(
    u,
    phases.filter(phase => phase.name !== 'generate'),
    (c, phase, a, b) => {
      c.fillStyle = color('shade');
      c.fillRect(a, u.bbox.top, b - a, u.bbox.height);
    },
  );
}

// A strip of the phases at the top.
function drawStrip(u, phases) {
  const ratio = devicePixelRatio,
    height = 14 * ratio,
    { top } = u.bbox;
  eachPhase(u, phases, (c, phase, a, b) => {
    c.fillStyle = phaseColor(phase.name);
    c.fillRect(a, top, Math.max(ratio, b - a - ratio), height);
    const name = visible(phase.name);
    const words = [`step ${phase.step}: ${name}`, name]
      .slice(phase.name === 'generate' ? 0 : 1)
      .find(text => c.measureText(text).width + 8 * ratio <= b - a);
    c.fillStyle = color('on-hue');
    if (words) c.fillText(words, a + 4 * ratio, top + height / 2 + ratio / 2);
  });
}

function eachPhase(u, phases, paint) {
  const c = u.ctx,
    { left, top, width, height } = u.bbox;
  c.save();
  c.beginPath();
  c.rect(left, top, width, height);
  c.clip();
  c.font = `600 ${10 * devicePixelRatio}px system-ui, sans-serif`;
  c.textBaseline = 'middle';
  c.textAlign = 'left';
  for (const phase of phases) {
    const a = Math.max(left, u.valToPos(phase.start, 'x', true)),
      b = Math.min(left + width, u.valToPos(phase.end, 'x', true));
    if (b > a) paint(c, phase, a, b);
  }
  c.restore();
}

// Both charts show the same time range.
function linked(shared, u) {
  shared.link.push(u);
  return (me, key) => {
    if (key !== 'x' || shared.busy) return;
    shared.busy = true;
    const { min, max } = me.scales.x;
    for (const other of shared.link) if (other !== me) other.setScale('x', { min, max });
    shared.busy = false;
  };
}

function timeScale(shared) {
  const { spans } = shared.records,
    ends = shared.phases;
  return [smallest([...spans, ...ends].map(part => part.start)), largest([...spans, ...ends].map(part => part.end))];
}

function canvasChart(host, shared, height, options) {
  host.draw = () => {
    if (host.uplot) {
      shared.link = shared.link.filter(u => u !== host.uplot);
      host.uplot.destroy();
    }
    const [low, high] = timeScale(shared),
      axis = timeAxis(high);
    const made = options(axis, [low, high]);
    host.uplot = new uPlot(
      {
        width: host.clientWidth || 600,
        height,
        legend: { show: false },
        ...made,
        hooks: { ...made.hooks, setScale: [(u, key) => shared.sync?.get(u)?.(u, key)] },
      },
      made.data,
      host,
    );
    (shared.sync ||= new Map()).set(host.uplot, linked(shared, host.uplot));
  };
  new ResizeObserver(() => {
    if (host.clientWidth && host.uplot && Math.abs(host.uplot.width - host.clientWidth) > 1)
      host.uplot.setSize({ width: host.clientWidth, height });
    else if (!host.uplot && host.clientWidth) host.draw();
  }).observe(host);
  drawn.add(host);
  return host;
}

function timeAxes(axis, range, y) {
  const style = { stroke: color('muted'), font: FONT, labelFont: FONT, labelSize: 16, ticks: { show: false } };
  const fine = range[1] - range[0] < 10;
  return [
    {
      ...style,
      label: axis.label,
      size: 26,
      gap: 4,
      grid: { stroke: color('grid'), width: 1 },
      values: (u, splits) => splits.map(v => (fine ? `${Number(v.toFixed(2))}` : axis.format(v))),
    },
    { ...style, size: GUTTER, grid: { stroke: color('grid'), width: 1 }, ...y },
  ];
}

function concurrencyChart(state, shared) {
  const curve_ = concurrency(shared.records.spans);
  const host = el('div', {
    class: 'plot',
    tabindex: '0',
    role: 'img',
    'aria-label': 'Samples running in the engine over time',
  });
  host.addEventListener('keydown', event => moveCursor(event, host.uplot));
  const spec = {
    x: { label: 'at', precise: duration },
    y: { format: value => count(value, 'sample') },
    lines: [{ label: 'running', ...curve_, color: () => color('text') }],
  };
  return canvasChart(host, shared, 170, (axis, range) => ({
    data: [curve_.x, curve_.y],
    padding: [8, 12, 0, 0],
    scales: {
      x: { time: false, range: (u, a, b) => (a == null ? range : u.zoomed ? [a, b] : ((u.zoomed = true), range)) },
      y: { range: (u, a, b) => [0, Math.max(b || 1, 1) * 1.22] },
    },
    series: [
      {},
      {
        stroke: color('text'),
        width: 1.5,
        fill: alpha(color('hue-0'), 0.12),
        paths: uPlot.paths.stepped({ align: 1 }),
        points: { show: false },
      },
    ],
    axes: timeAxes(axis, range, { label: 'Samples running', incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] }),
    cursor: { sync: { key: 'timeline' }, drag: { x: true, y: false } },
    hooks: { drawClear: [u => shade(u, shared.phases)], draw: [u => drawStrip(u, shared.phases)] },
    plugins: [tooltip(spec), resetZoom(range)],
  }));
}

function resetZoom(range) {
  return {
    hooks: {
      init: u =>
        u.over.addEventListener(
          'dblclick',
          event => {
            event.stopImmediatePropagation();
            u.setScale('x', { min: range[0], max: range[1] });
          },
          true,
        ),
    },
  };
}

function ganttChart(state, shared) {
  const { records } = shared,
    rowHeight = Math.max(3, Math.min(14, Math.floor(520 / records.rows))),
    height = records.rows * rowHeight + 12;
  const host = el('div', {
    class: 'plot',
    role: 'img',
    'aria-label': `${records.spans.length} stays of ${records.samples.length} samples in the engine; the list of responses has them as text`,
  });
  const byRow = [];
  for (const span of records.spans) (byRow[span.row] ||= []).push(span);
  canvasChart(host, shared, height, (axis, range) => ({
    data: [range, [0, 0]],
    padding: [4, 12, 4, 0],
    scales: {
      x: { time: false, range: (u, a, b) => (a == null ? range : u.zoomed ? [a, b] : ((u.zoomed = true), range)) },
      y: { range: [0, 1] },
    },
    series: [{}, { stroke: 'transparent', points: { show: false } }],
    axes: [
      { show: false },
      {
        show: true,
        size: GUTTER,
        stroke: 'transparent',
        values: () => [],
        splits: () => [],
        grid: { show: false },
        ticks: { show: false },
        label: state.mode === 'slots' ? 'Engine slots' : 'Samples, group by group',
        labelFont: FONT,
        labelSize: 16,
        labelGap: 0,
      },
    ],
    cursor: {
      sync: { key: 'timeline', scales: ['x', null] },
      drag: { x: true, y: false },
      points: { show: false },
      y: false,
    },
    hooks: {
      drawClear: [u => shade(u, shared.phases)],
      draw: [u => drawBars(u, records, rowHeight, state.mode), u => axisLabel(u, state)],
    },
    plugins: [spanTip(byRow, rowHeight), resetZoom(range)],
  }));
  return el('div', { class: 'gantt', tabindex: '0', role: 'region', 'aria-label': 'Timeline of samples' }, host);
}

function axisLabel(u, state) {
  const c = u.ctx;
  c.save();
  c.fillStyle = color('muted');
  c.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  c.textAlign = 'center';
  c.translate(14 * devicePixelRatio, u.bbox.top + Math.min(u.bbox.height / 2, 240 * devicePixelRatio));
  c.rotate(-Math.PI / 2);
  if (u.bbox.height > 140 * devicePixelRatio)
    c.fillText(state.mode === 'slots' ? 'Engine slots' : 'Samples, group by group', 0, 0);
  c.restore();
}

function drawBars(u, records, rowHeight, mode) {
  const c = u.ctx,
    ratio = devicePixelRatio,
    { left, top, width } = u.bbox,
    h = rowHeight * ratio,
    thick = Math.max(1, Math.round(h * (rowHeight > 4 ? 0.74 : 0.9)));
  const hues = Array.from({ length: HUES }, (_, n) => hue(n)),
    ink = color('text'),
    ground = color('panel'),
    bad = color('warn');
  const x = seconds => u.valToPos(seconds, 'x', true),
    y = row => top + row * h + (h - thick) / 2;
  c.save();
  c.beginPath();
  c.rect(left, top - 2, width + 10, u.bbox.height + 4);
  c.clip();
  if (mode === 'samples') drawPauses(c, records, x, y, thick, ratio);
  for (const span of records.spans) {
    const a = x(span.start),
      b = x(span.end);
    if (b < left || a > left + width) continue;
    c.fillStyle = hues[versionHue(span.version)];
    c.fillRect(a, y(span.row), Math.max(1, b - a - (span.how === 'paused' ? 0 : 0.5 * ratio)), thick);
    if (rowHeight < 4 || b - a < 3 * ratio) continue;
    if (span.how === 'paused') {
      c.fillStyle = ground;
      c.fillRect(b - 5 * ratio, y(span.row), 1.5 * ratio, thick);
      c.fillRect(b - 2 * ratio, y(span.row), 1.5 * ratio, thick);
    }
    if (span.how === 'stop') {
      c.fillStyle = ink;
      c.fillRect(b - 1.5 * ratio, y(span.row), 1.5 * ratio, thick);
    }
    if (span.how === 'length') {
      c.fillStyle = bad;
      c.beginPath();
      c.moveTo(b - thick, y(span.row) + thick);
      c.lineTo(b, y(span.row) + thick);
      c.lineTo(b - thick / 2, y(span.row));
      c.fill();
    }
  }
  if (mode === 'samples') drawFates(c, records, x, y, thick, ratio);
  c.restore();
}

function drawPauses(c, records, x, y, thick, ratio) {
  const dense = thick < 5 * ratio;
  c.strokeStyle = alpha(color('muted'), dense ? 0.3 : 0.6);
  c.lineWidth = ratio;
  c.setLineDash(dense ? [] : [2 * ratio, 2 * ratio]);
  c.beginPath();
  for (const sample of records.samples) {
    const middle = y(sample.row) + thick / 2,
      fate = sample.trained || sample.dropped;
    sample.spans.forEach((span, i) => {
      const until = sample.spans[i + 1]?.start ?? (fate && fate.when > span.end ? fate.when : null);
      if (until != null) {
        c.moveTo(x(span.end), middle);
        c.lineTo(x(until), middle);
      }
    });
  }
  c.stroke();
  c.setLineDash([]);
}

function drawFates(c, records, x, y, thick, ratio) {
  const size = Math.max(1.5 * ratio, Math.min(3.5 * ratio, thick / 2));
  for (const sample of records.samples) {
    const middle = y(sample.row) + thick / 2;
    if (sample.trained) {
      c.fillStyle = color('text');
      c.beginPath();
      c.arc(x(sample.trained.when), middle, size, 0, 7);
      c.fill();
    }
    if (sample.dropped) {
      const at_ = x(sample.dropped.when);
      c.strokeStyle = color('warn');
      c.lineWidth = 1.5 * ratio;
      c.beginPath();
      c.moveTo(at_ - size, middle - size);
      c.lineTo(at_ + size, middle + size);
      c.moveTo(at_ + size, middle - size);
      c.lineTo(at_ - size, middle + size);
      c.stroke();
    }
  }
}

function spanTip(byRow, rowHeight) {
  const box = el('div', { class: 'tip' });
  const line = (label, value) => el('div', { class: 'row' }, el('span', {}, label), el('b', {}, value));
  return {
    hooks: {
      init: u => attachTip(u, box),
      setCursor: u => {
        const { left, top } = u.cursor,
          seconds = left >= 0 ? u.posToVal(left, 'x') : null;
        const span =
          seconds == null
            ? null
            : (byRow[Math.floor(top / rowHeight)] || []).find(s => s.start <= seconds && seconds <= s.end);
        if (!span) {
          box.style.display = 'none';
          return;
        }
        const took = span.end - span.start,
          { trained, dropped } = span.sample;
        replace(
          box,
          el('div', { class: 'head' }, `${visible(span.uid)} #${span.index}`),
          line('policy version', String(span.version)),
          line('replica', String(span.replica)),
          line(span.kind, `${number(span.start, 5)} s`),
          line(
            span.how === 'paused' ? 'interrupted' : span.how === 'length' ? 'cut' : 'finished',
            `${number(span.end, 5)} s`,
          ),
          line('tokens', `${number(span.tokens)}${took > 0 ? `, ${number(span.tokens / took)}/s` : ''}`),
          trained
            ? line('trained in', `step ${trained.step}`)
            : dropped
              ? line('dropped', visible(dropped.why))
              : line('trained', 'not in these steps'),
        );
        box.style.display = 'block';
        position(box, u.over, left);
        box.style.top = `${Math.max(0, Math.min(top + 14, u.over.clientHeight - box.offsetHeight))}px`;
      },
    },
  };
}
