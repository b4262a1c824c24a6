// The deployment: what runs, what waits, who works; the dead jobs, to retry or to drop. Read again every two seconds.

import { byId, count, counted, draw, duration, make } from './elements.js';
import { CallFailed, call, plainly } from './gateway.js';
import { askForKey, readyKeyDialog } from './keys.js';

const EVERY_MS = 2_000;
const HISTORY = 150;
const DEAD_SHOWN = 100;

const EVENTS = {
  claimed: 'a worker claimed it',
  alone: 'from here on alone on the device',
  'lease-over': 'its lease ended while the worker held it',
  'handed-back': 'the worker gave it back in good order',
  rerouted: 'sent on to the queue of its model',
  'came-back': 'the worker was alive after all',
  retried: 'queued again by hand',
};

const state = { paused: false, before: null, rates: [], waiting: [], opened: new Set(), dead: null };

async function read() {
  try {
    const found = await call('/v1/deployment');
    const dead = found.dead ? await call(`/v1/dead?limit=${DEAD_SHOWN}`) : { jobs: [], total: 0 };
    notice(null);
    show(found, dead);
  } catch (error) {
    if (!(error instanceof CallFailed)) console.error(error);
    notice(plainly(error));
    if (error.status === 401 || error.status === 403) pause(true);
    if (error.status === 401) askForKey(() => pause(false), error.message);
  }
}

async function follow() {
  for (;;) {
    if (!state.paused && !document.hidden) await read();
    await new Promise((resolve) => { setTimeout(resolve, EVERY_MS); });
  }
}

function pause(now) {
  state.paused = now;
  byId('pause').setAttribute('aria-pressed', String(now));
  if (!now) read();
}

function notice(found) {
  // The same words again would be read aloud again.
  if (found && byId('notice').textContent === found.text) return;
  byId('notice').replaceChildren(...(found ? [make('p', { class: `notice ${found.serious ? 'bad' : 'warn'}` }, found.text)] : []));
}

function show(found, dead) {
  const at = performance.now() / 1000;
  byId('read-at').textContent = `rerankq ${found.version}, read at ${new Date().toLocaleTimeString('en-GB')}`;
  const rate = rateNow(found.workers, at);
  showTiles(found, rate);
  state.waiting = [...state.waiting, found.waiting_pairs].slice(-HISTORY);
  showSpark();
  byId('queues').replaceChildren(found.queues.length ? queueTable(found.queues) : make('p', { class: 'quiet' }, 'No job is waiting.'));
  byId('workers').replaceChildren(found.workers.length ? workerTable(found.workers) : make('p', { class: 'notice warn' }, 'No worker is running; jobs wait until one is started: rerankq worker.'));
  showDead(dead);
}

/** Pairs ranked per second between two readings, and how many of them came from the score cache; null at first. */
function rateNow(workers, at) {
  const totals = new Map(workers.map(({ id, pairs, cached_pairs: cached }) => [id, { pairs, cached }]));
  const { before } = state;
  state.before = { at, totals };
  if (!before || at <= before.at) return null;
  let [pairs, cached] = [0, 0];
  for (const [id, now] of totals) {
    const then = before.totals.get(id);
    if (!then) continue;
    pairs += now.pairs - then.pairs;
    cached += now.cached - then.cached;
  }
  state.rates = [...state.rates, { pairs, cached, seconds: at - before.at }].slice(-5);
  const seconds = state.rates.reduce((sum, one) => sum + one.seconds, 0);
  return state.rates.reduce((sum, one) => sum + one.pairs, 0) / seconds;
}

function showTiles(found, rate) {
  const pairs = found.workers.reduce((sum, worker) => sum + worker.pairs, 0);
  const cached = found.workers.reduce((sum, worker) => sum + worker.cached_pairs, 0);
  const tiles = [
    ['Workers', count(found.workers.length), '', !found.workers.length],
    ['Jobs running', count(found.running)],
    ['Jobs waiting', count(found.waiting_jobs), found.waiting_pairs ? counted(found.waiting_pairs, 'pair') : ''],
    ['Oldest waits', found.oldest_s === null ? '–' : duration(found.oldest_s)],
    ['Ranked now', rate === null ? '–' : rate < 10 ? rate.toFixed(1) : count(Math.round(rate)), 'pairs/s'],
    ['Score cache', pairs ? `${Math.round((100 * cached) / pairs)} %` : '–', pairs ? `of ${counted(pairs, 'pair')}` : ''],
    ['Dead jobs', count(found.dead), '', found.dead > 0],
  ];
  byId('tiles').replaceChildren(...tiles.map(([name, value, more, alert]) => make('div', { class: `tile${alert ? ' alert' : ''}` }, make('dt', {}, name), make('dd', {}, value, ...(more ? [' ', make('small', {}, more)] : [])))));
}

function showSpark() {
  const { waiting } = state;
  const [width, height] = [300, 56];
  const most = Math.max(...waiting, 1);
  const points = waiting.map((value, at) => `${((at / Math.max(1, HISTORY - 1)) * width).toFixed(1)} ${(height - 3 - (value / most) * (height - 8)).toFixed(1)}`);
  const svg = byId('spark');
  svg.toggleAttribute('hidden', Math.max(...waiting) === 0);
  byId('spark-about').hidden = svg.hasAttribute('hidden');
  svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
  svg.setAttribute('aria-label', `Pairs waiting: ${count(waiting.at(-1))} now, ${count(Math.max(...waiting))} at most since this page was opened`);
  const last = (((waiting.length - 1) / Math.max(1, HISTORY - 1)) * width).toFixed(1);
  const line = `M${points.join(' L')}`;
  svg.replaceChildren(draw('path', { class: 'area', d: `${line} L${last} ${height} L0 ${height} Z` }), draw('path', { d: line }));
}

function table(titles, rows) {
  const head = make('thead', {}, make('tr', {}, ...titles.map(([title, kind]) => make('th', { scope: 'col', class: kind ?? '' }, title))));
  const body = make('tbody', {}, ...rows.map((cells) => make('tr', {}, ...cells.map((cell, at) => {
    const [name, kind] = titles[at];
    return at ? make('td', { class: kind ?? '', 'data-name': name }, cell) : make('th', { scope: 'row' }, cell);
  }))));
  return make('table', { class: 'grid' }, head, body);
}

function queueTable(queues) {
  const titles = [['Queue'], ['Jobs', 'number'], ['Pairs', 'number'], ['Tenants', 'number'], ['Oldest waits', 'number'], ['Workers', 'number']];
  return table(titles, queues.map((queue) => [
    queue.name, count(queue.jobs), count(queue.pairs), count(queue.tenants),
    queue.oldest_s === null ? '–' : duration(queue.oldest_s), queue.workers ? count(queue.workers) : 'none',
  ]));
}

function workerTable(workers) {
  const titles = [['Worker'], ['Model'], ['Device'], ['Seen', 'number'], ['Pace', 'number'], ['Jobs', 'number'], ['Pairs', 'number'], ['Cached', 'number'], ['Version', 'number']];
  return table(titles, workers.map((worker) => [
    worker.id, worker.model, worker.device || '–', `${duration(worker.age_s)} ago`,
    worker.pairs_per_s ? `${count(Math.round(worker.pairs_per_s))} pairs/s` : '–',
    count(worker.jobs), count(worker.pairs), worker.pairs ? `${Math.round((100 * worker.cached_pairs) / worker.pairs)} %` : '–', worker.version || '–',
  ]));
}

/* Dead jobs */

function showDead({ jobs, total }) {
  const now = JSON.stringify([jobs, total]);
  // Drawn again only when there is something else to show: a person may be reading, or about to press a button.
  if (state.dead === now) return;
  state.dead = now;
  const box = byId('dead');
  if (!jobs.length) {
    box.replaceChildren(make('p', { class: 'quiet' }, 'There are none.'));
    return;
  }
  box.replaceChildren(...jobs.map(deadJob), ...(total > jobs.length ? [make('p', { class: 'quiet' }, `and ${count(total - jobs.length)} more: rerankq dead list`)] : []));
}

function deadJob(job) {
  const at = (seconds) => (seconds === null ? 'unknown' : new Date(seconds * 1000).toLocaleString('en-GB'));
  const button = (text, name, work, kind = '') => {
    const made = make('button', { type: 'button', class: kind, 'aria-label': `${text}: ${job.job_id}`, 'data-does': name }, text);
    made.addEventListener('click', () => work(made));
    return made;
  };
  const texts = make('div', { class: 'texts' });
  // Beside the buttons, and not where the next reading would take it away.
  const fault = make('p', { class: 'fault', role: 'alert' });
  const history = make('details', { open: state.opened.has(job.job_id) }, make('summary', {}, `History: ${counted(job.history.length, 'event')}`), make('ol', { class: 'history' }, ...job.history.map((event) => make('li', {}, make('span', {}, at(event.at)), make('b', {}, event.event), make('span', {}, [EVENTS[event.event], event.worker].filter(Boolean).join(' · '))))));
  history.addEventListener('toggle', () => state.opened[history.open ? 'add' : 'delete'](job.job_id));
  return make(
    'article', { class: 'corpse', 'data-job': job.job_id },
    make('h3', {}, job.job_id),
    make('p', {}, job.error || 'No reason was written down.'),
    make('p', { class: 'quiet' }, `Died ${at(job.died_at)}, accepted ${at(job.submitted_at)}. ${counted(job.deaths, 'crash', 'crashes')}, ${counted(job.pairs, 'pair')}, queue ${job.queue}${job.tenant ? `, tenant ${job.tenant}` : ''}.`),
    history,
    make('div', { class: 'line' }, button('Retry', 'retry', (made) => act(made, job, 'retry', fault)), button('Drop', 'drop', (made) => drop(made, job, fault), 'danger'), button('Show its texts', 'texts', (made) => showTexts(made, job, texts, fault), 'plain')),
    fault,
    texts,
  );
}

async function act(button, job, what, fault) {
  button.disabled = true;
  fault.textContent = '';
  const path = `/v1/dead/${encodeURIComponent(job.job_id)}`;
  try {
    await (what === 'retry' ? call(`${path}/retry`, { method: 'POST' }) : call(path, { method: 'DELETE' }));
    state.dead = null;
    await read();
    byId('dead-title').focus();
  } catch (error) {
    button.disabled = false;
    fault.textContent = plainly(error).text;
  }
}

function drop(button, job, fault) {
  const dialog = byId('drop-dialog');
  byId('drop-about').textContent = `${job.job_id}: ${counted(job.pairs, 'pair')}. Its texts and its history are forgotten.`;
  dialog.returnValue = 'keep';
  dialog.addEventListener('close', () => { if (dialog.returnValue === 'drop') act(button, job, 'drop', fault); }, { once: true });
  dialog.showModal();
}

async function showTexts(button, job, box, fault) {
  fault.textContent = '';
  if (box.firstChild) {
    box.replaceChildren();
    button.textContent = 'Show its texts';
    return;
  }
  try {
    const found = await call(`/v1/dead/${encodeURIComponent(job.job_id)}?payload=true`);
    let text = found.payload ?? 'Its texts are gone.';
    try {
      text = JSON.stringify(JSON.parse(text), null, 2);
    } catch { /* what crashed a worker need not be JSON */ }
    box.replaceChildren(make('pre', { tabIndex: 0, role: 'region', 'aria-label': `Texts of ${job.job_id}` }, text));
    button.textContent = 'Hide its texts';
  } catch (error) {
    fault.textContent = plainly(error).text;
  }
}

byId('pause').addEventListener('click', () => pause(!state.paused));
document.addEventListener('visibilitychange', () => { if (!document.hidden && !state.paused) read(); });
readyKeyDialog(() => pause(false));
follow();
