// The data in the page: compressed blocks, inflated when first viewed; and curves built from a run's columns.

const inflated = new Map();

function inflate(id) {
  if (!inflated.has(id)) inflated.set(id, inflateNow(id));
  return inflated.get(id);
}

async function inflateNow(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate'));
  return JSON.parse(await new Response(stream).text());
}

const block = n => inflate(`block-${n}`);

// Possible x axes of a curve: the column with the value, and its label.
const AXES = {
  time: { column: 'time_s', label: 'Wall time' },
  samples: { column: 'total/samples', label: 'Trained samples' },
  tokens: { column: 'total/tokens', label: 'Trained tokens' },
  step: { column: 'step', label: 'Step' },
};

// {x, y} of one run: only points where both are numbers, by increasing x. A null is a gap and stays one in y.
function curve(columns, name, axis) {
  const xs = columns[AXES[axis].column] || [],
    ys = columns[name] || [];
  const points = xs
    .map((x, i) => [x, ys[i] ?? null, i])
    .filter(([x]) => x != null)
    .sort((a, b) => a[0] - b[0]);
  return { x: points.map(p => p[0]), y: points.map(p => p[1]), row: points.map(p => p[2]) };
}

function at(line, x) {
  let right = line.x.findIndex(value => value >= x);
  if (right < 0) return null;
  if (line.x[right] === x) return line.y[right];
  if (right === 0 || line.y[right] == null || line.y[right - 1] == null) return null;
  const share = (x - line.x[right - 1]) / (line.x[right] - line.x[right - 1]);
  return line.y[right - 1] + share * (line.y[right] - line.y[right - 1]);
}

// Mean, lowest and highest of several runs' curves where all of them have a value (linear between points).
function aggregate(lines) {
  const whole = lines.map(line => {
    const kept = line.x.map((x, i) => i).filter(i => line.y[i] != null);
    return { x: kept.map(i => line.x[i]), y: kept.map(i => line.y[i]) };
  });
  const xs = [...new Set(whole.flatMap(line => line.x))].sort((a, b) => a - b);
  const result = { x: [], mean: [], low: [], high: [] };
  for (const x of xs) {
    const values = whole.map(line => at(line, x));
    if (values.some(value => value == null)) continue;
    result.x.push(x);
    result.mean.push(values.reduce((a, b) => a + b, 0) / values.length);
    result.low.push(Math.min(...values));
    result.high.push(Math.max(...values));
  }
  return result;
}

const last = values => (values || []).findLast(value => value != null);
const first = values => (values || []).find(value => value != null);
const numbers = values => (values || []).filter(value => value != null);
const mean = values => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
const largest = values => values.reduce((a, b) => (b > a ? b : a), -Infinity); // Math.max accepts a limited number of arguments
const smallest = values => values.reduce((a, b) => (b < a ? b : a), Infinity);
const sum = values => values.reduce((a, b) => a + b, 0);
