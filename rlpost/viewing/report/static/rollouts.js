// The rollout browser: filters, a list, one group's responses side by side with colored tokens.

const PAGE_ROWS = 25;
const LOGPROBS = { first: 0, values: [], differences: [] }; // the value of each character; filled at startup

async function rolloutBrowser(run) {
  const data = run.rollouts;
  const lead = 'The responses of the trained groups, token by token as they were sampled.';
  if (!data.shown) {
    return section(
      'rollouts',
      'Answers',
      '',
      el(
        'p',
        { class: 'calm' },
        data.total
          ? 'No response fits in this report.'
          : 'This run kept no rollouts (logging.keep_rollouts), or trained no step.',
      ),
    );
  }
  const { columns, groups } = await block(data.index);
  const state = { run, columns, groups, rows: [], page: 0, coloring: 'version', open: null, search: 0 };
  state.list = el('div', {
    class: 'rows',
    role: 'listbox',
    'aria-label': 'Responses found',
    onkeydown: event => moveRow(event),
  });
  state.detail = el('div', { class: 'group-view', 'aria-live': 'polite' });
  state.status = el('p', { class: 'note', role: 'status' });
  state.fields = filterFields(state);
  const sampled =
    data.shown < data.total
      ? el(
          'p',
          { class: 'warnings' },
          `Sampled: ${number(data.shown)} of ${number(data.total)} responses, whole groups spread evenly over the steps, so that the file stays below 20 MB. rollouts/*.parquet has all of them.`,
        )
      : null;
  await applyFilters(state);
  return section(
    'rollouts',
    'Answers',
    lead,
    sampled,
    el(
      'div',
      { class: 'panel' },
      state.fields.node,
      state.status,
      el('div', { class: 'browser' }, state.list, state.detail),
    ),
  );
}

function filterFields(state) {
  const c = state.columns,
    later = debounce(() => applyFilters(state));
  const low = name => c[name].reduce((a, v) => (v != null && v < a ? v : a), Infinity),
    high = name => c[name].reduce((a, v) => (v != null && v > a ? v : a), -Infinity);
  const range = (label, name) => {
    const [from, to] = ['from', 'to'].map(end =>
      el('input', {
        type: 'number',
        step: 'any',
        'aria-label': `${label} ${end}`,
        placeholder: Number.isFinite(low(name)) ? number(end === 'from' ? low(name) : high(name)) : '',
        oninput: later,
      }),
    );
    return {
      name,
      from,
      to,
      node: el('div', { class: 'field' }, el('span', {}, label), el('div', { class: 'range' }, from, '–', to)),
    };
  };
  const ranges = [
    range('Step', 'step'),
    range('Reward', 'reward'),
    range('Tokens', 'length'),
    range('Policy versions', 'span'),
  ];
  const ends = [...new Set([...c.finish, ...c.failure.filter(Boolean).map(kind => `failed: ${kind}`)])]
    .filter(Boolean)
    .sort();
  const end = el(
    'select',
    { onchange: later },
    el('option', { value: '' }, 'any'),
    ends.map(value => el('option', { value }, visible(value))),
  );
  const text = el('input', { type: 'search', placeholder: 'in prompt or response', oninput: later });
  const order = el(
    'select',
    { onchange: later },
    [
      ['step', 'step'],
      ['-reward', 'highest reward'],
      ['reward', 'lowest reward'],
      ['-length', 'longest'],
      ['length', 'shortest'],
      ['-span', 'most versions'],
    ].map(([value, label]) => el('option', { value }, label)),
  );
  const clear = el(
    'button',
    {
      type: 'button',
      onclick: () => {
        for (const field of node.querySelectorAll('input, select')) field.value = field === order ? 'step' : '';
        applyFilters(state);
      },
    },
    'Clear',
  );
  const node = el(
    'div',
    { class: 'filters', role: 'search' },
    ranges.map(r => r.node),
    el('label', { class: 'field' }, el('span', {}, 'Ended by'), end),
    el('label', { class: 'field wide' }, el('span', {}, 'Text'), text),
    el('label', { class: 'field' }, el('span', {}, 'Order'), order),
    clear,
  );
  return { node, ranges, end, text, order };
}

function debounce(action) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, 200);
  };
}

async function applyFilters(state) {
  const { ranges, end, text, order } = state.fields,
    c = state.columns,
    search = ++state.search;
  let rows = c.step.map((_, i) => i);
  for (const { name, from, to } of ranges) {
    const [a, b] = [from.value, to.value].map(value => (value === '' ? null : Number(value)));
    if (a != null) rows = rows.filter(i => c[name][i] != null && c[name][i] >= a);
    if (b != null) rows = rows.filter(i => c[name][i] != null && c[name][i] <= b);
  }
  if (end.value)
    rows = rows.filter(i => c.finish[i] === end.value || (c.failure[i] && `failed: ${c.failure[i]}` === end.value));
  if (text.value) rows = await searchText(state, rows, text.value.toLowerCase(), search);
  if (search !== state.search) return; // another search has started in the meantime
  const down = order.value.startsWith('-'),
    key = c[order.value.replace('-', '')];
  rows.sort((i, j) => ((key[i] ?? Infinity) - (key[j] ?? Infinity)) * (down ? -1 : 1) || i - j);
  state.rows = rows;
  state.page = 0;
  await showRows(state, search);
  if (rows.length) await openGroup(state, rows[0]);
  else replace(state.detail);
}

async function searchText(state, rows, words, search) {
  const found = [],
    c = state.columns,
    blocks = [...new Set(rows.map(i => c.block[i]))];
  let done = 0;
  for (const n of blocks) {
    const groups = await block(n);
    if (search !== state.search) return found;
    for (const i of rows) {
      if (c.block[i] !== n) continue;
      const group = groups[c.position[i]];
      if (group.prompt.toLowerCase().includes(words) || sampleOf(state, group, i).text.toLowerCase().includes(words))
        found.push(i);
    }
    if (++done % 8 === 0) state.status.textContent = `Searching: ${percent(done / blocks.length, 0)}`;
  }
  return found;
}

// A group's samples are in the order of the index, in consecutive rows.
function sampleOf(state, group, row) {
  const c = state.columns;
  let start = row;
  while (start > 0 && c.group[start - 1] === c.group[row]) start--;
  return group.samples[row - start];
}

async function showRows(state, search) {
  const c = state.columns,
    pages = Math.max(1, Math.ceil(state.rows.length / PAGE_ROWS));
  const shown = state.rows.slice(state.page * PAGE_ROWS, (state.page + 1) * PAGE_ROWS);
  const groups = await Promise.all(shown.map(i => block(c.block[i])));
  if (search !== state.search) return;
  const turn = by => {
    state.page += by;
    showRows(state, state.search);
  };
  state.status.textContent = state.rows.length
    ? `${count(state.rows.length, 'response')} found`
    : 'No response matches these filters.';
  const items = shown.map((i, n) => {
    const group = groups[n][c.position[i]];
    return el(
      'button',
      {
        type: 'button',
        role: 'option',
        class: 'item',
        'aria-selected': String(i === state.open),
        'data-row': i,
        onclick: () => openGroup(state, i),
      },
      el(
        'span',
        { class: 'meta' },
        el('span', {}, `step ${c.step[i]}`),
        el(
          'span',
          {},
          c.reward[i] == null
            ? el('span', { class: 'badge bad' }, visible(c.failure[i] || 'no reward'))
            : `reward ${number(c.reward[i])}`,
        ),
        el('span', {}, count(c.length[i], 'token')),
        c.span[i] > 1 ? el('span', {}, `${c.span[i]} versions`) : null,
        c.finish[i] === 'length' ? el('span', { class: 'badge' }, 'cut') : null,
      ),
      el('bdi', { class: 'snippet' }, shorten(visible(group.prompt.slice(-200)), 60)),
      el(
        'bdi',
        { class: 'snippet response' },
        shorten(visible(sampleOf(state, group, i).text.slice(0, 300)), 110) || '(empty)',
      ),
    );
  });
  const pager =
    pages < 2
      ? null
      : el(
          'div',
          { class: 'pager' },
          el('button', { type: 'button', disabled: state.page === 0, onclick: () => turn(-1) }, '← Previous'),
          el('span', {}, `page ${state.page + 1} of ${number(pages)}`),
          el('button', { type: 'button', disabled: state.page >= pages - 1, onclick: () => turn(1) }, 'Next →'),
        );
  replace(state.list, items, pager);
}

function moveRow(event) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!by) return;
  const items = [...event.currentTarget.querySelectorAll('.item')],
    to = items[items.indexOf(document.activeElement) + by];
  if (to) {
    event.preventDefault();
    to.focus();
    to.click();
  }
}

async function openGroup(state, row) {
  const c = state.columns,
    group = (await block(c.block[row]))[c.position[row]];
  state.open = row;
  for (const item of state.list.querySelectorAll('.item'))
    item.setAttribute('aria-selected', String(Number(item.dataset.row) === row));
  const rows = c.step.length ? siblings(c, row) : [];
  const colorings = [
    ['version', 'policy version'],
    ['logprob', 'logprob'],
    ...(state.run.rollouts.differences_shown ? [['difference', 'trainer − engine']] : []),
    ['none', 'none'],
  ];
  const cards = el(
    'div',
    { class: 'cards' },
    rows.map((i, n) => card(state, group.samples[n], i, i === row)),
  );
  const uid = state.groups[c.group[row]];
  replace(
    state.detail,
    el(
      'div',
      { class: 'controls' },
      el('h4', {}, `Group ${visible(uid)}, trained in step ${c.step[row]}`),
      choice('Color tokens by', colorings, state.coloring, value => {
        state.coloring = value;
        openGroup(state, row);
      }),
    ),
    el('pre', { class: 'prompt', dir: 'auto', 'aria-label': 'Prompt' }, visible(group.prompt)),
    tokenLegend(state, rows),
    cards,
  );
  const active = cards.querySelector('.card.chosen');
  if (active) cards.scrollTo(active.offsetLeft - cards.offsetLeft - 8, active.offsetTop - cards.offsetTop - 8);
}

function siblings(c, row) {
  let start = row,
    end = row;
  while (start > 0 && c.group[start - 1] === c.group[row]) start--;
  while (end + 1 < c.step.length && c.group[end + 1] === c.group[row]) end++;
  return Array.from({ length: end - start + 1 }, (_, n) => start + n);
}

function tokenLegend(state, rows) {
  if (state.coloring === 'none') return null;
  if (!state.run.rollouts.tokens_shown)
    return el('p', { class: 'note' }, 'The run’s tokenizer was not found, so single tokens cannot be shown in the text.');
  if (state.coloring === 'logprob') {
    return el(
      'p',
      { class: 'note' },
      'Probability when sampled: ',
      [0, 0.5, 1, 2, 4, 8].map(nats =>
        el(
          'span',
          { class: 'token', style: { background: logprobTint(-nats) } },
          percent(Math.exp(-nats), nats > 4 ? 2 : 0),
        ),
      ),
    );
  }
  if (state.coloring === 'difference') {
    return el(
      'p',
      { class: 'note' },
      'Logprob at the start of the update minus logprob when sampled, in nats: ',
      [-2, -0.5, -0.1, 0, 0.1, 0.5, 2].map(nats =>
        el('span', { class: 'token', style: { background: differenceTint(nats) } }, signed(nats)),
      ),
    );
  }
  const c = state.columns,
    versions = new Set();
  rows.forEach(i => {
    for (let v = c.oldest[i] ?? 1, end = c.newest[i] ?? 0; v <= end; v++) versions.add(v);
  });
  return el(
    'p',
    { class: 'note' },
    'Policy version: ',
    [...versions].sort((a, b) => a - b).map(v => el('span', { class: `token tint-${versionHue(v)}` }, String(v))),
  );
}

function card(state, sample, row, chosen) {
  const c = state.columns;
  const parts = Object.entries(sample.parts).map(([name, value]) =>
    el('span', {}, `${visible(name)} ${number(value)}`),
  );
  const versions =
    c.oldest[row] == null
      ? ''
      : c.oldest[row] === c.newest[row]
        ? `version ${c.newest[row]}`
        : `versions ${c.oldest[row]} to ${c.newest[row]}`;
  return el(
    'article',
    { class: chosen ? 'card chosen' : 'card', tabindex: '0' },
    el(
      'p',
      { class: 'meta' },
      el('b', {}, `#${c.index[row]}`),
      el('b', {}, c.reward[row] == null ? 'no reward' : `reward ${number(c.reward[row])}`),
      c.advantage[row] == null ? null : el('span', {}, `advantage ${number(c.advantage[row])}`),
      el('span', {}, count(c.length[row], 'token')),
      el('span', {}, versions),
      el('span', {}, c.finish[row] === 'length' ? 'cut at the limit' : visible(c.finish[row])),
    ),
    parts.length ? el('p', { class: 'meta' }, parts) : null,
    sample.failure ? el('p', { class: 'meta' }, el('span', { class: 'badge bad' }, visible(sample.failure))) : null,
    el(
      'pre',
      { class: 'response', dir: 'auto' },
      sample.text ? tokens(state, sample) : el('span', { class: 'note' }, '(empty)'),
    ),
  );
}

function logprobTint(logprob) {
  return `color-mix(in srgb, var(--hue-1) ${Math.round(90 * (1 - Math.exp(logprob / 2)))}%, transparent)`;
}

// Blue: the token is less likely for the trainer than it was when sampled; orange: more likely.
function differenceTint(nats) {
  const share = Math.round(90 * (1 - Math.exp(-Math.abs(nats) / 0.5)));
  return `color-mix(in srgb, var(--hue-${nats < 0 ? 0 : 1}) ${share}%, transparent)`;
}

function signed(nats) {
  return `${nats > 0 ? '+' : ''}${number(nats, 2)}`;
}

// The value of a character of `text`; null if there is none, or if the value was not finite.
function decoded(text, t, values) {
  const level = text ? text.charCodeAt(t) - LOGPROBS.first : -1;
  return level >= 0 ? values[level] : null;
}

// Spans of text: one per token, or one per stretch of the same version.
function tokens(state, sample) {
  const characters = Array.from(sample.text);
  if (!sample.pieces || state.coloring === 'none') return [visible(sample.text)];
  const versionAt = sample.versions.flatMap(([version, n]) => Array(n).fill(version));
  const spans = [];
  let at = 0;
  sample.pieces.forEach((length, t) => {
    const text = characters.slice(at, at + length).join('');
    at += length;
    const logprob = decoded(sample.logprobs, t, LOGPROBS.values),
      difference = decoded(sample.differences, t, LOGPROBS.differences);
    const seen = text === '' ? '·' : visible(text).replace(/\n/g, '↵\n');
    const title = `logprob ≈ ${logprob == null ? 'not finite' : number(logprob, 2)}${logprob == null ? '' : ` (${percent(Math.exp(logprob), 1)})`}, policy version ${versionAt[t]}${difference == null ? '' : `, trainer − engine ≈ ${signed(difference)} nats`}`;
    const shared = { title, class: state.coloring === 'version' ? `token tint-${versionHue(versionAt[t])}` : 'token' };
    const shown = { logprob, difference }[state.coloring];
    const tint = state.coloring === 'logprob' ? logprobTint : differenceTint;
    const paint = shown === undefined ? {} : { style: { background: shown === null ? 'none' : tint(shown) } };
    spans.push(el('span', { ...shared, ...paint }, seen));
  });
  return spans;
}
