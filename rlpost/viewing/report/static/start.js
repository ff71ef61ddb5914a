// Assembles the page.

const THEMES = ['light', 'dark'];

function currentTheme() {
  return (
    document.documentElement.dataset.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')
  );
}

function switchTheme() {
  document.documentElement.dataset.theme = THEMES[1 - THEMES.indexOf(currentTheme())];
  redrawAll();
}

// The sections about one run at a time, with a choice of the run if there are several.
function oneRun(report, chosen, render_) {
  const host = el('div');
  const show = async i => {
    replace(host, await render_(report.runs[i]));
  };
  return { host, show, shown: show(chosen) };
}

async function start() {
  const page = document.getElementById('page');
  if (typeof DecompressionStream === 'undefined') {
    replace(
      page,
      el(
        'p',
        { class: 'lead' },
        'This browser cannot inflate the report’s data (DecompressionStream). Any browser since 2023 can.',
      ),
    );
    return;
  }
  const report = await inflate('overview');
  Object.assign(LOGPROBS, {
    first: report.logprob_first,
    values: report.logprob_levels,
    differences: report.difference_levels,
  });
  const top = oneRun(report, 0, run => overview(report, run));
  const below = oneRun(report, 0, run => [lengths(run), rewards(report, run)]);
  const browser = oneRun(report, 0, run => rolloutBrowser(run));
  const samples = oneRun(report, 0, run => timeline(run));
  const parts = [top, below, browser, samples];
  const chooser =
    report.runs.length < 2
      ? null
      : el(
          'div',
          { class: 'chooser' },
          select(
            'Run shown in detail',
            report.runs.map((run, i) => [i, visible(run.name)]),
            0,
            i => parts.forEach(part => part.show(Number(i))),
          ),
        );
  replace(
    page,
    header(report, switchTheme),
    chooser,
    parts.map(part => part.host),
    allMetrics(report),
    settings(report),
  );
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redrawAll);
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  await Promise.all(parts.map(part => part.shown));
  await new Promise(requestAnimationFrame); // observers of what is in view run before the next frame
  await new Promise(requestAnimationFrame);
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start().catch(error => {
  document.getElementById('page').append(el('p', { class: 'lead' }, `The report could not be drawn: ${error}`));
  document.documentElement.dataset.failed = String(error);
  throw error;
});
