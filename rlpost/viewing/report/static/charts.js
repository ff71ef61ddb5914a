// Charts: uPlot with our axes, clickable legends, tooltips, keyboard, a table of the same numbers.
// A chart is drawn when it is first scrolled into view, and redrawn when the theme changes.

const drawn = new Set(); // of charts on the page
const waiting = new IntersectionObserver(
  entries => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        waiting.unobserve(entry.target);
        entry.target.draw();
      }
    }
  },
  { rootMargin: '300px' },
);

function redrawAll() {
  for (const host of drawn) host.isConnected ? host.draw() : drawn.delete(host);
}

// spec: label (a description for screen readers), x {label, format}, y {label, format, min, max, log},
// lines [{label, x, y, color, width, dash, faint, low, high, bandLabel}], limit {value, text}, bars (stacked), height.
function chart(spec) {
  const host = el('div', { class: 'chart' });
  const known = spec.lines.filter(line => line.y.some(value => value != null));
  if (!known.length) {
    host.classList.add('empty');
    host.append(el('p', {}, spec.absent || 'Nothing was recorded for this.'));
    host.style.minHeight = `${Math.min(spec.height || 220, 120)}px`;
    return host;
  }
  const full = { ...spec, lines: known };
  const plot = el('div', {
    class: 'plot',
    tabindex: '0',
    role: 'img',
    'aria-label': describe(full),
    style: { minHeight: `${spec.height || 220}px` },
  });
  const legend = el('div', { class: 'legend' });
  plot.draw = () => drawInto(plot, legend, full);
  drawn.add(plot);
  host.append(legend, plot, ...(spec.bare ? [] : [tableOf(full)]));
  waiting.observe(plot);
  return host;
}

function describe(spec) {
  const parts = spec.lines
    .filter(line => !line.faint)
    .map(line => {
      const format = spec.y.format || number,
        values = numbers(line.y);
      return `${line.label} from ${format(values[0])} to ${format(values.at(-1))}`;
    });
  return `${spec.label}: ${parts.join('; ')}. Arrow keys move along it.`;
}

function tableOf(spec) {
  const details = el('details', { class: 'numbers' }, el('summary', {}, 'Numbers'));
  details.addEventListener(
    'toggle',
    () => {
      if (!details.open || details.children.length > 1) return;
      const data = align(spec.lines);
      const x = spec.x.format || number,
        y = spec.y.format || number;
      const rows = data[0].map((value, i) => [x(value), ...spec.lines.map((_, n) => y(data[n + 1][i]))]);
      const shown = rows.slice(0, 1000);
      details.append(
        table([spec.x.label, ...spec.lines.map(line => line.label)], shown, {
          numeric: [0, ...spec.lines.map((_, n) => n + 1)],
        }),
      );
      if (rows.length > shown.length) details.append(el('p', {}, `The first ${shown.length} of ${rows.length} rows.`));
    },
    { once: false },
  );
  return details;
}

// One x for all lines: a missing point is undefined (the line is drawn through), a null value is a gap.
function align(lines) {
  const xs = lines.every(line => line.x === lines[0].x);
  if (xs) return [lines[0].x, ...lines.map(line => line.y)];
  return uPlot.join(lines.map(line => [line.x, line.y]));
}

function drawInto(plot, legend, spec) {
  plot.uplot?.destroy();
  const width = plot.clientWidth;
  if (!width) return;
  const { data, series, bands } = spec.bars ? stack(spec) : layers(spec);
  const options = {
    width,
    height: spec.height || 220,
    series,
    bands,
    legend: { show: false },
    padding: [10, 12, 0, 0],
    cursor: { points: { size: 6 }, drag: { x: true, y: false }, sync: spec.sync ? { key: spec.sync } : undefined },
    scales: {
      x: { time: false, range: spec.bars ? (u, a, b) => [a - 0.6 * barWidth(spec), b + 0.6 * barWidth(spec)] : padX },
      y: yScale(spec),
    },
    axes: axes(spec),
    hooks: {
      drawAxes: [u => spec.background?.(u)],
      draw: [u => limitLine(u, spec), ...(spec.draw ? [spec.draw] : [])],
    },
    plugins: [tooltip(spec)],
  };
  plot.uplot = new uPlot(options, data, plot);
  drawLegend(legend, spec, plot.uplot);
  if (!plot.resized) {
    plot.resized = new ResizeObserver(() => {
      if (plot.uplot && plot.clientWidth && Math.abs(plot.uplot.width - plot.clientWidth) > 1) {
        plot.uplot.setSize({ width: plot.clientWidth, height: spec.height || 220 });
      }
    });
    plot.resized.observe(plot);
    plot.addEventListener('keydown', event => moveCursor(event, plot.uplot));
  }
}

function barWidth(spec) {
  const { x } = spec.lines[0];
  return x.length > 1 ? x[1] - x[0] : 1;
}

function padX(u, a, b) {
  return a === b ? [a - 1, b + 1] : [a, b];
}

function yScale(spec) {
  return {
    range: (u, low, high) => {
      if (low == null) return [0, 1];
      if (spec.limit && spec.limit.value <= high * 4 && spec.limit.value >= low)
        high = Math.max(high, spec.limit.value * 1.05);
      if (low === high)
        [low, high] =
          low === 0
            ? [0, spec.limit ? spec.limit.value * 1.3 : spec.y.whenZero || 1]
            : [Math.min(0, 2 * low), Math.max(0, 2 * high)];
      const space = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
      let bottom = low >= 0 && low - space < 0.35 * high ? 0 : low - space,
        top = high + space;
      if (spec.y.min != null) bottom = Math.max(spec.y.min, bottom);
      if (spec.y.max != null) top = Math.min(spec.y.max, top);
      if (spec.y.range) [bottom, top] = spec.y.range;
      return bottom < top ? [bottom, top] : [bottom - 0.5, top + 0.5];
    },
  };
}

const FONT = '11px system-ui, -apple-system, "Segoe UI", sans-serif';

function axes(spec) {
  const style = {
    stroke: color('muted'),
    font: FONT,
    labelFont: FONT,
    labelSize: 16,
    grid: { stroke: color('grid'), width: 1 },
    ticks: { show: false },
  };
  const write = format => (u, splits) => splits.map(value => (value == null ? '' : format(value)));
  const small = (spec.height || 220) < 140;
  const x = {
    ...style,
    label: small ? undefined : spec.x.label,
    size: small ? 24 : 28,
    gap: 4,
    space: spec.x.space || 60,
    values: write(spec.x.format || axisNumber),
    grid: { show: false },
  };
  if (spec.x.whole) x.incrs = [1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 2000, 5000, 10000];
  if (spec.x.incrs) x.incrs = spec.x.incrs;
  const y = {
    ...style,
    label: spec.y.label,
    gap: 4,
    space: small ? 28 : 34,
    values: write(spec.y.tick || spec.y.format || axisNumber),
    size: (u, values) => Math.max(28, ...(values || []).map(text => 10 + 6.2 * text.length)),
  };
  if (spec.y.whole) y.incrs = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000];
  return [x, y];
}

function axisNumber(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${number(value / 1e9)}G`;
  if (size >= 1e6) return `${number(value / 1e6)}M`;
  if (size >= 1e4) return `${number(value / 1e3)}k`;
  if (size > 0 && size < 1e-3) return value.toExponential(1).replace('.0e', 'e').replace('e-', 'e−');
  return String(Number(value.toPrecision(4)));
}

function layers(spec) {
  const flat = [],
    series = [{}],
    bands = [];
  for (const line of spec.lines) {
    const points = numbers(line.y).length <= 40 && !line.faint && !line.noPoints;
    line.at = [series.length];
    series.push({
      label: line.label,
      stroke: line.color(),
      width: line.width || (line.faint ? 1 : 2),
      dash: line.dash,
      alpha: line.faint ? 0.45 : 1,
      points: { show: points, size: 5, fill: line.color() },
    });
    flat.push({ x: line.x, y: line.y });
    for (const [low, high] of line.bands || []) {
      bands.push({ series: [series.length + 1, series.length], fill: alpha(line.color(), 0.16) });
      line.at.push(series.length, series.length + 1);
      for (const y of [low, high]) {
        series.push({ stroke: 'transparent', width: 0, points: { show: false } });
        flat.push({ x: line.x, y });
      }
    }
  }
  return { data: align(flat), series, bands };
}

// Stacked bars: each series holds the cumulative sum, the tallest is drawn first.
function stack(spec) {
  const visible = spec.lines.filter(line => !line.off);
  const xs = spec.lines[0].x,
    series = [{}],
    data = [xs];
  const sums = [],
    running = xs.map(() => 0);
  for (const line of visible) {
    line.y.forEach((value, i) => {
      running[i] += value || 0;
    });
    sums.push([...running]);
  }
  visible
    .map((line, n) => [line, sums[n]])
    .reverse()
    .forEach(([line, values]) => {
      series.push({
        label: line.label,
        fill: line.color(),
        stroke: line.color(),
        width: 0,
        points: { show: false },
        paths: uPlot.paths.bars({ size: [xs.length > 60 ? 0.9 : 0.72, 48, 1] }),
      });
      data.push(values);
    });
  return { data, series, bands: [] };
}

function limitLine(u, spec) {
  if (!spec.limit) return;
  const y = u.valToPos(spec.limit.value, 'y', true),
    { left, top, width, height } = u.bbox;
  if (y < top || y > top + height) return;
  const c = u.ctx;
  c.save();
  c.strokeStyle = color('warn');
  c.lineWidth = devicePixelRatio;
  c.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
  c.beginPath();
  c.moveTo(left, y);
  c.lineTo(left + width, y);
  c.stroke();
  c.restore();
}

function drawLegend(legend, spec, u) {
  const named = spec.lines.filter(line => !line.faint);
  if (spec.legend === false || (named.length < 2 && !spec.alwaysLegend && !named.some(line => line.bandLabel))) {
    replace(legend);
    return;
  }
  replace(
    legend,
    named.map(line => {
      const swatch = el('span', {
        class: line.dash ? 'swatch dashed' : 'swatch',
        'aria-hidden': 'true',
        style: { [line.dash ? 'borderColor' : 'background']: line.color() },
      });
      const text = line.bandLabel ? `${line.label} (${line.bandLabel})` : line.label;
      return el(
        'button',
        {
          type: 'button',
          class: 'key',
          'aria-pressed': String(!line.off),
          title: 'Show or hide',
          onclick: event => {
            line.off = !line.off;
            event.currentTarget.setAttribute('aria-pressed', String(!line.off));
            if (spec.bars) u.root.parentElement.draw();
            else for (const n of line.at) u.setSeries(n, { show: !line.off });
          },
        },
        swatch,
        text,
      );
    }),
  );
  if (!spec.bars) spec.lines.forEach(line => line.off && line.at.forEach(n => u.setSeries(n, { show: false })));
}

function tooltip(spec) {
  const box = el('div', { class: 'tip', role: 'status' });
  const nearest = (line, x, reach) => {
    let best = null;
    line.x.forEach((value, i) => {
      const away = Math.abs(value - x);
      if (line.y[i] != null && away <= reach && (best == null || away < Math.abs(line.x[best] - x))) best = i;
    });
    return best;
  };
  return {
    hooks: {
      init: u => attachTip(u, box),
      setCursor: u => {
        const { left, idx } = u.cursor;
        if (idx == null || left < 0) {
          box.style.display = 'none';
          return;
        }
        const x = u.data[0][idx],
          reach = (u.scales.x.max - u.scales.x.min) * 0.03;
        const rows = spec.lines
          .filter(line => !line.off && !(line.faint && spec.lines.length > 12))
          .flatMap(line => {
            const i = nearest(line, x, reach);
            if (i == null) return [];
            const format = spec.y.format || number;
            const band = (line.bands || [])
              .slice(0, 1)
              .map(([low, high]) => ` (${format(low[i])} to ${format(high[i])})`);
            return [
              el(
                'div',
                { class: 'row' },
                el('span', { class: 'swatch', style: { background: line.color() } }),
                el('span', {}, line.label),
                el('b', {}, format(line.y[i]) + band.join('')),
              ),
            ];
          });
        if (spec.total) rows.push(spec.total(idx));
        replace(
          box,
          el('div', { class: 'head' }, `${spec.x.label} ${(spec.x.precise || spec.x.format || number)(x)}`),
          rows,
        );
        box.style.display = rows.length ? 'block' : 'none';
        position(box, u.over, left);
      },
    },
  };
}

function position(box, over, left) {
  const flips = left + box.offsetWidth + 24 > over.clientWidth && left > box.offsetWidth;
  box.style.left = `${Math.max(0, Math.min(flips ? left - box.offsetWidth - 12 : left + 12, Math.max(0, over.clientWidth - box.offsetWidth)))}px`;
}

function moveCursor(event, u) {
  const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  if (!by || !u) return;
  event.preventDefault();
  const n = u.data[0].length - 1,
    from = u.cursor.idx ?? (by > 0 ? -1 : n + 1);
  const idx = Math.max(0, Math.min(n, by === -Infinity ? 0 : by === Infinity ? n : from + by));
  u.setCursor({ left: u.valToPos(u.data[0][idx], 'x'), top: u.over.clientHeight / 2 });
}

// A time axis in a suitable unit.
function timeAxis(longest) {
  const [unit, size] = longest > 3 * 3600 ? ['h', 3600] : longest > 180 ? ['min', 60] : ['s', 1];
  const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1200, 1800, 3600, 7200, 18000, 36000, 86400, 172800];
  return {
    label: `Wall time (${unit})`,
    format: value => number(value / size),
    precise: duration,
    incrs: longest < 2 ? undefined : steps,
  };
}

function axisFor(axis, lines) {
  if (axis === 'time') return timeAxis(largest(lines.flatMap(line => line.x)));
  return { label: AXES[axis].label, whole: axis === 'step', format: axisNumber, precise: number };
}
