// Elements, text and numbers as the page shows them. Nothing here knows about runs.
// Everything a run wrote becomes text nodes: no string on this page is ever parsed as HTML.

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === 'class') node.className = value;
    else if (name === 'style') Object.assign(node.style, value);
    else if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter(child => child != null));
  return node;
}

function replace(node, ...children) {
  node.replaceChildren(...children.flat().filter(child => child != null));
}

// Characters that are invisible, move others or end lines are made visible; a line feed stays a line feed.
const HIDDEN =
  /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

function visible(text) {
  return String(text).replace(HIDDEN, character => {
    const code = character.charCodeAt(0);
    if (code === 9) return '⇥\t';
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    if (code === 0x7f) return '␡';
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, '0')}⟩`;
  });
}

function shorten(text, limit) {
  const line = text.replace(/\s+/g, ' ').trim();
  return line.length > limit ? line.slice(0, limit - 1) + '…' : line;
}

const DASH = '–';

function number(value, digits = 3) {
  if (value == null || !Number.isFinite(value)) return DASH;
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential(1).replace('.0e', 'e').replace('e-', 'e−');
  if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString('en');
  return String(Number(value.toPrecision(digits)));
}

function percent(value, digits = 1) {
  if (value == null || !Number.isFinite(value)) return DASH;
  return value === 0 ? '0 %' : `${(100 * value).toFixed(digits)} %`;
}

function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return DASH;
  if (seconds < 60) return `${number(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${String(Math.floor(seconds % 60)).padStart(2, '0')} s`;
  return `${Math.floor(seconds / 3600)} h ${String(Math.floor((seconds % 3600) / 60)).padStart(2, '0')} min`;
}

function count(value, noun) {
  if (value == null || !Number.isFinite(value)) return DASH;
  return `${number(value)} ${noun}${value === 1 ? '' : 's'}`;
}

function withUnit(value, unit) {
  if (unit === 'share') return percent(value);
  if (unit === 's') return duration(value);
  return value == null ? DASH : number(value) + (unit && unit !== 'reward' ? ` ${unit}` : '');
}

// A row of buttons, one of which is selected.
function choice(label, options, chosen, onchoose) {
  const row = el('div', { class: 'choice', role: 'group', 'aria-label': label });
  for (const [value, text] of options) {
    row.append(
      el(
        'button',
        {
          type: 'button',
          'aria-pressed': String(value === chosen),
          onclick: event => {
            for (const button of row.children)
              button.setAttribute('aria-pressed', String(button === event.currentTarget));
            onchoose(value);
          },
        },
        text,
      ),
    );
  }
  return row;
}

function select(label, options, chosen, onchoose) {
  const box = el(
    'select',
    { onchange: event => onchoose(event.currentTarget.value) },
    options.map(([value, text]) => el('option', { value, selected: String(value) === String(chosen) }, text)),
  );
  return el('label', { class: 'field' }, el('span', {}, label), box);
}

function section(id, title, lead, ...children) {
  return el(
    'section',
    { id, 'aria-labelledby': `${id}-title` },
    el('h2', { id: `${id}-title` }, title),
    lead ? el('p', { class: 'lead' }, lead) : null,
    ...children,
  );
}

function panel(title, ...children) {
  return el('div', { class: 'panel' }, title ? el('h3', {}, title) : null, ...children);
}

function table(head, rows, { numeric = [] } = {}) {
  const cell = (tag, content, i) => el(tag, numeric.includes(i) ? { class: 'numeric' } : {}, content);
  return el(
    'div',
    { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': 'table' },
    el(
      'table',
      {},
      el(
        'thead',
        {},
        el(
          'tr',
          {},
          head.map((text, i) => cell('th', text, i)),
        ),
      ),
      el(
        'tbody',
        {},
        rows.map(row =>
          el(
            'tr',
            {},
            row.map((content, i) => cell('td', content, i)),
          ),
        ),
      ),
    ),
  );
}

// Colors: Okabe and Ito's palette, distinguishable with every common kind of color blindness; lighter on dark backgrounds.
function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

const HUES = 6;
function hue(n) {
  return color(`hue-${((n % HUES) + HUES) % HUES}`);
}

// For policy versions: neighbors must differ, so the sixth color, which resembles the first, is omitted.
const versionHue = version => version % (HUES - 1);

function alpha(hex, share) {
  return (
    hex +
    Math.round(255 * share)
      .toString(16)
      .padStart(2, '0')
  );
}

/** A tooltip over a chart that disappears when the pointer leaves it. */
function attachTip(u, box) {
  u.over.append(box);
  u.over.addEventListener('mouseleave', () => {
    box.style.display = 'none';
  });
}
