// The playground: what is pasted becomes a job, the job a ranking, and every change of a control a job again.

import { curlOf, pythonOf } from './code.js';
import { byId, count, counted, duration, make, plain, save, settled } from './elements.js';
import { CallFailed, call, key, plainly, rank } from './gateway.js';
import { askForKey, readyKeyDialog } from './keys.js';
import { Judgements } from './judgements.js';
import { drawMoves, glide } from './moves.js';
import { Unreadable, firstStage, read, readFile } from './reading.js';
import { SIGNALS, activeOf, row, widestOf } from './rows.js';

const BOOSTED = ['content', 'title', 'keywords', 'questions'];
const SETTLE_MS = 180;
const READ_SETTLE_MS = 250;
const FILE_BYTES = 32 * 2 ** 20;
const ROWS = 50;
// Seconds after which a job that no worker takes is explained, and for which it may wait to be taken.
const EXPLAIN_AFTER_S = 2.5;
const WAIT_S = 600;
// Milliseconds after which the list of models is read again, when something was ranked.
const MODELS_AGE_MS = 10_000;

const state = {
  profiles: [],
  samples: [],
  // Names of the models that are served, and when they were read; what the deployment does, if this key may see it.
  models: [],
  readAt: 0,
  deployment: null,
  // The fusion as the controls have it.
  fusion: null,
  // What was read out of the text.
  input: { chunks: [], job: null },
  outcome: null,
  shown: ROWS,
  opened: new Set(),
  everyOpen: false,
  judgements: new Judgements(),
  running: null,
  starting: null,
  // The text was changed, and its job's fields are not in the controls yet.
  fresh: false,
};

/* What goes in */

function readInput() {
  try {
    const found = read(byId('chunks').value, byId('format').value);
    state.input = found;
    // Its profile is among those that the gateway has, once they are read.
    if (state.fresh && state.fusion) takeJob();
    tellFault('chunks', '');
    byId('chunks-read').textContent = found.chunks.length ? `${counted(found.chunks.length, 'chunk')}, read as ${found.kind}` : '';
  } catch (error) {
    if (!(error instanceof Unreadable)) throw error;
    state.input = { chunks: [], job: null, fault: error.message };
    byId('chunks-read').textContent = '';
    tellFault('chunks', error.message);
  }
  fitTopK();
  noteSignals();
}

/** Say below a field what is wrong with it; nothing if it is in order. */
function tellFault(id, text) {
  byId(`${id}-fault`).textContent = text;
  byId(`${id}-fault`).hidden = !text;
  byId(id).setAttribute('aria-invalid', String(Boolean(text)));
}

/** Put the fields of a job that came with its chunks into the controls. */
function takeJob() {
  const { job } = state.input;
  if (job) controlBy(job);
  state.fresh = false;
}

function controlBy(job) {
  for (const [field, names] of Object.entries({ weights: SIGNALS, boosts: BOOSTED })) {
    const other = Object.keys(job.fusion?.[field] ?? {}).find((name) => !names.includes(name));
    if (other !== undefined) throw new Unreadable(`fusion.${field}: expected only ${names.join(', ')}, not ${other}`);
  }
  if (typeof job.fusion === 'string' && !state.profiles.some((one) => one.name === job.fusion)) throw new Unreadable(`fusion: there is no profile "${job.fusion}" here`);
  if (typeof job.query === 'string') byId('query').value = job.query;
  if (typeof job.fusion === 'string') chooseProfile(job.fusion);
  else if (job.fusion && typeof job.fusion === 'object') takeFusion({ ...profile().fusion, boosts: {}, normalise: {}, ...job.fusion });
  setPair('min-score', job.min_score ?? null);
  setPair('top-k', job.top_k ?? null);
  if (typeof job.model === 'string') {
    const select = byId('model');
    if (![...select.options].some((option) => option.value === job.model)) select.append(make('option', { value: job.model }, job.model));
    select.value = job.model;
  }
}

async function loadText(text) {
  byId('chunks').value = text;
  state.fresh = true;
  readInput();
  if (!state.input.fault && state.input.chunks.length && byId('query').value.trim()) await run();
}

async function loadFile(file) {
  if (!file) return;
  try {
    byId('format').value = 'auto';
    await loadText(await readFile(file, FILE_BYTES));
  } catch (error) {
    if (!(error instanceof Unreadable)) throw error;
    tellFault('chunks', error.message);
  }
}

async function loadSample(at) {
  const job = state.samples[at];
  if (!job) return;
  byId('format').value = 'auto';
  byId('query').value = job.query;
  await loadText(job.chunks.map((chunk) => JSON.stringify(chunk)).join('\n'));
}

/** The fields of the text that are not controls go with the job: query_tags and the like. */
function otherFields() {
  const kept = ['query_tokens', 'query_tags', 'max_length', 'query_max_tokens', 'long_chunks', 'instruction'];
  return Object.fromEntries(Object.entries(state.input.job ?? {}).filter(([name]) => kept.includes(name)));
}

/* Fusion */

const profile = () => state.profiles.find((one) => one.name === byId('profile').value) ?? state.profiles[0];

function chooseProfile(name) {
  byId('profile').value = name;
  takeFusion(profile().fusion);
}

function takeFusion(fusion) {
  state.fusion = structuredClone(fusion);
  for (const name of SIGNALS) setWeight(`weight-${name}`, fusion.weights[name] ?? 0, 1);
  for (const name of BOOSTED) setWeight(`boost-${name}`, fusion.boosts[name] ?? 0, 10);
  describeFusion();
}

function setWeight(id, value, usual) {
  const slider = byId(id);
  slider.max = String(Math.max(usual, value));
  slider.step = Number(slider.max) > 2 ? '0.1' : '0.01';
  slider.value = String(value);
  byId(`${id}-number`).value = plain(value);
}

function describeFusion() {
  const { fusion } = state;
  const method = fusion.method === 'rrf' ? `reciprocal ranks, k = ${fusion.rrf_k}` : 'weighted sum';
  byId('profile-about').textContent = `${profile().description} (${method})`;
  byId('reset').hidden = same(fusion, profile().fusion);
  const boosted = Object.keys(fusion.boosts).length;
  byId('boosts-of').querySelector('summary').textContent =
    fusion.token_rule === 'ragflow' ? 'Field boosts: RAGFlow’s token rule has none'
      : boosted ? 'Field boosts of the token signal' : 'Field boosts of the token signal: none, a token counts once';
  noteSignals();
}

const same = (one, other) => JSON.stringify(sorted(one)) === JSON.stringify(sorted(other));

function sorted(fusion) {
  const clean = (mapping) => Object.entries(mapping).filter(([, value]) => value).sort();
  return [fusion.method, clean(fusion.weights), clean(fusion.boosts), clean(fusion.normalise), fusion.rrf_k, fusion.token_rule];
}

/** Say beside a weight that no chunk has the signal, or under which rule it is normalised. */
function noteSignals() {
  if (!state.fusion) return;
  const { chunks, job } = state.input;
  const some = (test) => chunks.some(test);
  const lacking = {
    vector: chunks.length && !some((chunk) => Number.isFinite(chunk.vector_score)) && 'no chunk has a vector_score',
    keyword: chunks.length && !some((chunk) => Number.isFinite(chunk.keyword_score)) && 'no chunk has a keyword_score',
    pagerank: chunks.length && !some((chunk) => chunk.pagerank > 0) && 'no chunk has a pagerank above 0',
    tags: chunks.length && !Object.keys(job?.query_tags ?? {}).length && 'the query asks for no tags',
  };
  for (const name of SIGNALS) {
    const note = byId(`note-${name}`);
    const told = state.fusion.weights[name] ? lacking[name] : '';
    note.textContent = told || '';
    note.hidden = !told;
    note.parentElement.classList.toggle('idle', Boolean(lacking[name]) || !state.fusion.weights[name]);
  }
}

function weightRow(kind, name, onChange) {
  const id = `${kind}-${name}`;
  const label = make('label', { htmlFor: id }, ...(kind === 'weight' ? [make('span', { class: `swatch of-${name}` })] : []), name);
  const slider = make('input', { type: 'range', id, min: '0', max: '1', step: '0.01' });
  const box = make('input', { type: 'number', id: `${id}-number`, min: '0', step: 'any', 'aria-label': `${kind} of ${name} as a number` });
  slider.addEventListener('input', () => {
    box.value = plain(Number(slider.value));
    onChange(name, Number(slider.value));
  });
  box.addEventListener('input', () => {
    const value = Number(box.value);
    if (box.value === '' || !Number.isFinite(value) || value < 0) return;
    if (value > Number(slider.max)) slider.max = String(value);
    slider.value = String(value);
    onChange(name, value);
  });
  const found = make('div', { class: 'weight' }, label, slider, box);
  if (kind === 'weight') {
    found.append(make('span', { class: 'note', id: `note-${name}`, hidden: true }));
    slider.setAttribute('aria-describedby', `note-${name}`);
  }
  return found;
}

function buildWeights() {
  byId('weights').append(...SIGNALS.map((name) => weightRow('weight', name, (signal, value) => {
    if (!state.fusion) return;
    state.fusion.weights[signal] = value;
    fusionChanged();
  })));
  byId('boosts').append(...BOOSTED.map((name) => weightRow('boost', name, (field, value) => {
    if (!state.fusion) return;
    if (value) state.fusion.boosts[field] = value;
    else delete state.fusion.boosts[field];
    fusionChanged();
  })));
}

function fusionChanged() {
  describeFusion();
  again();
}

/* Threshold and top k: a slider and a number each; an empty number means none. */

function setPair(id, value) {
  byId(`${id}-number`).value = value === null ? '' : String(value);
  const slider = byId(id);
  if (value !== null && value > Number(slider.max)) slider.max = String(value);
  slider.value = value === null ? (id === 'top-k' ? slider.max : slider.min) : String(value);
}

function pair(id) {
  const text = byId(`${id}-number`).value;
  return text === '' || !Number.isFinite(Number(text)) ? null : Number(text);
}

function readyPair(id, none) {
  byId(id).addEventListener('input', () => {
    byId(`${id}-number`).value = none(byId(id)) ? '' : byId(id).value;
    again();
  });
  byId(`${id}-number`).addEventListener('input', () => {
    setPair(id, pair(id));
    again();
  });
}

function fitTopK() {
  const slider = byId('top-k');
  const asked = pair('top-k');
  slider.max = String(Math.max(1, state.input.chunks.length));
  slider.value = asked === null ? slider.max : String(asked);
}

/** Let the slider of the threshold reach over the scores that there are. */
function fitThreshold(scores) {
  const slider = byId('min-score');
  const [low, high] = [Math.min(0, ...scores), Math.max(...scores, 0)];
  const steps = 10 ** Math.floor(Math.log10((high - low || 1) / 50));
  slider.step = String(Number(steps.toPrecision(1)));
  slider.min = String(Math.floor(low / steps) * Number(slider.step));
  slider.max = String(Math.ceil(high / steps) * Number(slider.step));
  const asked = pair('min-score');
  slider.value = asked === null ? slider.min : String(asked);
}

/* The job */

function jobNow({ fusion = state.fusion, model = byId('model').value } = {}) {
  const weights = Object.fromEntries(Object.entries(fusion.weights).filter(([, weight]) => weight > 0));
  const job = {
    query: byId('query').value,
    chunks: state.input.chunks,
    fusion: { ...fusion, weights: Object.keys(weights).length ? weights : fusion.weights },
    ...otherFields(),
  };
  if (model) job.model = model;
  if (pair('top-k') !== null) job.top_k = pair('top-k');
  if (pair('min-score') !== null) job.min_score = pair('min-score');
  return job;
}

/** Name it: a change of a control is a job of its own, and cancelling it cancels nobody else's. */
function named(job) {
  const random = crypto.getRandomValues(new Uint32Array(4));
  const id = `playground-${[...random].map((part) => part.toString(16).padStart(8, '0')).join('')}`;
  return { ...job, id, explain: true, deadline_s: WAIT_S };
}

/** Rank a job; if chunks were cut off, once more without the cut, so that their scores can be shown. */
async function rankWhole(job, options) {
  const began = performance.now();
  const ranking = await rank(named(job), options);
  const seconds = (performance.now() - began) / 1000;
  if (!ranking.dropped) return { job, ranking, whole: ranking, seconds };
  const { top_k: _, min_score: __, ...uncut } = job;
  return { job, ranking, whole: await rank(named(uncut), options), seconds };
}

function jobs() {
  const [kind, name] = split(byId('compare').value);
  const first = { title: titleOf(), job: jobNow() };
  if (kind === 'profile') {
    const other = state.profiles.find((one) => one.name === name);
    return [first, { title: `Profile ${name}`, job: jobNow({ fusion: other.fusion }) }];
  }
  if (kind === 'model') return [{ ...first, title: byId('model').value || state.deployment?.default_model || 'The default model' }, { title: name, job: jobNow({ model: name }) }];
  return [first];
}

const split = (value) => [value.slice(0, value.indexOf(':')), value.slice(value.indexOf(':') + 1)];
const titleOf = () => `Profile ${byId('profile').value}${byId('reset').hidden ? '' : ', changed'}`;

/** Check what a person can mend before anything is sent. */
function ready() {
  const asked = byId('query').value.trim();
  tellFault('query', asked ? '' : 'Write a query first.');
  if (!state.input.chunks.length && !state.input.fault) tellFault('chunks', 'Paste chunks first, or load a sample.');
  if (!asked) byId('query').focus();
  else if (!state.input.chunks.length) byId('chunks').focus();
  return Boolean(asked && state.input.chunks.length);
}

async function run({ reveal = true } = {}) {
  readInput();
  // What the last try said is over.
  notice(null);
  if (!ready()) return;
  // Pressed before the page knew the gateway's profiles, or after it could not read them.
  if (!state.fusion) await start();
  if (!state.fusion || state.input.fault) return;
  state.running?.abort();
  const running = (state.running = new AbortController());
  const wanted = jobs();
  const explain = setTimeout(() => explainWaiting(running), EXPLAIN_AFTER_S * 1000);
  working(true);
  try {
    const progress = wanted.map(() => ({ done: 0, total: state.input.chunks.length, state: 'queued' }));
    const found = await Promise.all(wanted.map(({ job, title }, at) => rankWhole(job, {
      signal: running.signal,
      onProgress: (told) => {
        Object.assign(progress[at], told);
        if (told.state !== 'queued') clearTimeout(explain);
        showProgress(progress);
      },
    }).then((outcome) => ({ ...outcome, title }))));
    if (state.running !== running) return;
    state.outcome = { sides: found, chunks: state.input.chunks, query: wanted[0].job.query };
    notice(null);
    fitThreshold(found.flatMap(({ whole }) => whole.chunks.map((chunk) => chunk.score)));
    show();
    if (performance.now() - state.readAt > MODELS_AGE_MS) readDeployment().catch(() => {});
    if (reveal && matchMedia('(max-width: 59.99rem)').matches) byId('results').scrollIntoView({ block: 'start' });
  } catch (error) {
    running.abort();
    if (error.name === 'AbortError' || state.running !== running) return;
    failed(error);
  } finally {
    clearTimeout(explain);
    if (state.running === running) {
      state.running = null;
      working(false);
    }
  }
}

/** A control was changed: rank again, if there is something that was ranked. */
const again = settled(SETTLE_MS, () => {
  if (state.outcome || state.running) run({ reveal: false });
});

function cancel() {
  state.running?.abort();
  state.running = null;
  working(false);
  notice({ text: 'Cancelled.', serious: false });
}

async function explainWaiting(running) {
  try {
    await readDeployment();
  } catch { /* the job itself will say it */ }
  if (state.running !== running) return;
  const model = byId('model').value || state.deployment?.default_model;
  const pairs = state.deployment?.waiting_pairs ?? 0;
  if (model ? !state.models.includes(model) : !state.models.length) {
    notice({ text: `No worker serves ${model ?? 'the default model'} at the moment. The job waits until one is started (rerankq worker), or until you cancel it.`, serious: false });
  } else {
    notice({ text: `The job waits for its turn${pairs ? `: pairs waiting: ${count(pairs)}` : ''}.`, serious: false });
  }
}

function failed(error) {
  if (!(error instanceof CallFailed)) console.error(error);
  notice(plainly(error));
  if (error.status === 401) askForKey(start, error.message);
}

function notice(found) {
  // The same words again would be read aloud again.
  if (found && byId('notice').textContent === found.text) return;
  byId('notice').replaceChildren(...(found ? [make('p', { class: `notice ${found.serious ? 'bad' : 'warn'}` }, found.text)] : []));
}

function working(now) {
  const bar = byId('progress');
  bar.hidden = !now;
  if (now) bar.removeAttribute('value');
  byId('cancel').hidden = !now;
  byId('results').setAttribute('aria-busy', String(now));
}

function showProgress(progress) {
  const [done, total] = ['done', 'total'].map((name) => progress.reduce((sum, one) => sum + one[name], 0));
  const bar = byId('progress');
  if (!done) return;
  bar.max = total;
  bar.value = done;
}

/* What comes out */

function show() {
  const { outcome } = state;
  byId('empty').hidden = true;
  byId('outcome').hidden = false;
  offerFirstStages();
  const top = byId('rankings');
  const before = new Map([...top.querySelectorAll('.column:last-child .rows:first-of-type .row')].map((one) => [Number(one.dataset.index), one.getBoundingClientRect().top]));
  const focused = focusOf(top);
  const compared = outcome.sides.length > 1;
  byId('facts').replaceChildren(...(compared ? [`${outcome.sides[0].title} beside ${outcome.sides[1].title}`] : factsOf(outcome.sides[0], outcome.chunks.length)));
  showLegend();
  top.classList.toggle('compared', compared);
  if (compared) compareColumns(top);
  else singleColumn(top);
  glide(top.querySelectorAll('.column:last-child .rows:first-of-type .row'), before);
  focused?.();
  redraw();
}

function singleColumn(top) {
  const { outcome } = state;
  const [side] = outcome.sides;
  const order = firstStage(outcome.chunks, byId('first-stage').value);
  const from = new Map(order.map((index, at) => [index, at + 1]));
  const column = make('div', { class: 'column' });
  const gutter = make('div', { class: 'gutter', 'aria-hidden': 'true' });
  gutter.append(document.createElementNS('http://www.w3.org/2000/svg', 'svg'));
  top.replaceChildren(gutter, column);
  fill(column, side, (ranked) => ({ from: from.get(ranked.index), to: ranked.rank, where: 'the first stage' }), order);
}

function compareColumns(top) {
  const { outcome } = state;
  const [left, right] = outcome.sides;
  const from = new Map(left.whole.chunks.map((chunk) => [chunk.index, chunk.rank]));
  const both = [left, right].map(() => make('div', { class: 'column' }));
  const gutter = make('div', { class: 'gutter', 'aria-hidden': 'true' });
  gutter.append(document.createElementNS('http://www.w3.org/2000/svg', 'svg'));
  top.replaceChildren(both[0], gutter, both[1]);
  for (const [at, side] of [left, right].entries()) {
    both[at].append(make('h3', {}, side.title), make('p', { class: 'facts' }, ...factsOf(side, outcome.chunks.length)));
  }
  fill(both[0], left, () => null);
  fill(both[1], right, (ranked) => ({ from: from.get(ranked.index) ?? null, to: ranked.rank, where: left.title }));
}

const columns = () => [...byId('rankings').querySelectorAll('.column')];

function fill(column, side, movedOf) {
  const { outcome } = state;
  const widest = widestOf(side.whole);
  const active = activeOf(side.whole);
  const options = (ranked) => ({
    fusion: side.job.fusion, widest, active, moved: movedOf(ranked),
    judgement: state.judgements.get(outcome.query, ranked.id, outcome.chunks[ranked.index]),
    open: state.everyOpen || state.opened.has(ranked.index),
    on: { judge, open: (index, opened) => { state.opened[opened ? 'add' : 'delete'](index); redraw(); } },
  });
  const kept = side.ranking.chunks.slice(0, state.shown);
  const list = make('ol', { class: 'rows', 'aria-label': `Ranking, ${side.title}` });
  list.append(...kept.map((ranked) => row(ranked, outcome.chunks[ranked.index], options(ranked))));
  column.append(list);
  if (!side.ranking.chunks.length) column.append(make('p', { class: 'quiet' }, 'No chunk reaches the threshold.'));
  if (side.ranking.chunks.length > state.shown) {
    const left = side.ranking.chunks.length - state.shown;
    const more = make('button', { type: 'button', class: 'more' }, `Show ${count(Math.min(left, 4 * ROWS))} more of ${count(left)}`);
    more.addEventListener('click', () => {
      const [next, at] = [side.ranking.chunks[state.shown], columns().indexOf(column)];
      state.shown += 4 * ROWS;
      show();
      // The button is gone: whoever works with the keyboard goes on where it was.
      columns()[at]?.querySelector(`.row[data-index="${next.index}"] button`)?.focus({ preventScroll: true });
    });
    column.append(make('div', { class: 'stack' }, more));
  }
  addDropped(column, side, options);
}

/** The chunks that the threshold or top k left out, with the scores that they have. */
function addDropped(column, side, options) {
  if (!side.ranking.dropped) return;
  const kept = new Set(side.ranking.chunks.map((chunk) => chunk.index));
  const left = side.whole.chunks.filter((chunk) => !kept.has(chunk.index));
  const below = side.job.min_score === undefined ? [] : left.filter((chunk) => chunk.score < side.job.min_score);
  const under = new Set(below.map((chunk) => chunk.index));
  const beyond = left.filter((chunk) => !under.has(chunk.index));
  const groups = [
    [beyond, `Beyond the first ${side.job.top_k}`],
    [below, `Below the threshold ${plain(side.job.min_score ?? 0)}`],
  ];
  for (const [chunks, title] of groups) {
    if (!chunks.length) continue;
    const list = make('ol', { class: 'rows', 'aria-label': `${title}, ${side.title}` });
    list.append(...chunks.slice(0, state.shown).map((ranked) => row(ranked, state.outcome.chunks[ranked.index], options(ranked))));
    const section = make('section', { class: 'dropped', 'aria-label': `${title}, ${side.title}` }, make('h3', {}, `${title}: ${counted(chunks.length, 'chunk')}`), list);
    if (chunks.length > state.shown) section.append(make('p', { class: 'quiet' }, `and ${count(chunks.length - state.shown)} more`));
    column.append(section);
  }
}

function factsOf({ ranking, seconds }, chunks) {
  const { usage, timings_ms: times } = ranking;
  const fact = (value, text) => make('span', {}, make('b', {}, value), ` ${text}`);
  return [
    fact(count(ranking.chunks.length), ranking.dropped ? `of ${counted(chunks, 'chunk')} kept` : chunks === 1 ? 'chunk ranked' : 'chunks ranked'),
    fact(duration(seconds), 'here'),
    fact(duration(times.total / 1000), 'in the worker'),
    fact(count(usage.cached_pairs), `of ${counted(usage.pairs, 'pair')} from the score cache`),
    ...(usage.tokens ? [fact(count(usage.tokens), 'tokens computed')] : []),
    ...(usage.truncated_pairs ? [fact(count(usage.truncated_pairs), 'cut')] : []),
    make('span', {}, `model ${ranking.model.name}`),
  ];
}

function showLegend() {
  const parts = state.outcome.sides.flatMap(({ whole }) => whole.chunks.flatMap((chunk) => Object.entries(chunk.parts)));
  const used = new Set(parts.filter(([, part]) => part).map(([name]) => name));
  const swatches = SIGNALS.filter((name) => used.has(name)).map((name) => make('li', {}, make('span', { class: `swatch of-${name}` }), name));
  const lines = state.outcome.sides.length > 1 ? 'lines: from the left ranking to the right one' : 'lines: from the first stage to the ranking';
  byId('legend').replaceChildren(...swatches, make('li', { class: 'lines' }, lines));
}

function offerFirstStages() {
  const select = byId('first-stage');
  const { chunks } = state.outcome;
  const offered = [['given', 'the order given'], ['vector_score', 'by vector score'], ['keyword_score', 'by keyword score']]
    .filter(([name]) => name === 'given' || chunks.some((chunk) => Number.isFinite(chunk[name])));
  const chosen = offered.some(([name]) => name === select.value) ? select.value : 'given';
  select.replaceChildren(...offered.map(([value, text]) => make('option', { value }, text)));
  select.value = chosen;
}

/** Remember which control of which row has the focus; answers how to give it back. */
function focusOf(top) {
  const held = document.activeElement;
  const item = held?.closest?.('.row');
  if (!item || !top.contains(item)) return null;
  const [index, at] = [item.dataset.index, [...item.querySelectorAll('button')].indexOf(held)];
  return () => top.querySelector(`.row[data-index="${index}"]`)?.querySelectorAll('button')[at]?.focus({ preventScroll: true });
}

const redraw = settled(0, () => {
  const svg = byId('rankings').querySelector('.gutter svg');
  if (!svg || !state.outcome) return;
  const box = svg.parentElement.getBoundingClientRect();
  if (!box.width) return;
  const middles = (list) => [...list.querySelectorAll('.row')].map((one) => {
    const bounds = one.getBoundingClientRect();
    return { index: Number(one.dataset.index), y: bounds.top - box.top + Math.min(bounds.height / 2, 28) };
  });
  const shown = columns();
  const after = middles(shown.at(-1));
  let before;
  if (shown.length > 1) before = middles(shown[0]);
  else {
    const order = firstStage(state.outcome.chunks, byId('first-stage').value);
    before = order.map((index, at) => ({ index, y: after[at]?.y ?? box.height + 24 }));
  }
  drawMoves(svg, before, after, { width: box.width, height: box.height, labelled: shown.length === 1 });
});

function light(event) {
  const index = event.type === 'pointerover' || event.type === 'focusin' ? event.target.closest?.('.row')?.dataset.index : undefined;
  for (const path of byId('rankings').querySelectorAll('.gutter [data-index]')) path.classList.toggle('lit', path.dataset.index === index);
}

/* Judgements and code */

function judge(ranked, grade) {
  state.judgements.set(state.outcome.query, ranked.id, grade, state.outcome.chunks[ranked.index]);
  for (const other of byId('rankings').querySelectorAll(`.row[data-index="${ranked.index}"]`)) {
    other.querySelector('.yes').setAttribute('aria-pressed', String(grade === 1));
    other.querySelector('.no').setAttribute('aria-pressed', String(grade === 0));
  }
  tellJudged();
}

function tellJudged() {
  const { size } = state.judgements;
  const { left } = state.judgements.qrels();
  byId('save-qrels').disabled = !size;
  byId('save-qrels').textContent = size ? `Save ${counted(size, 'judgement')}` : 'Save judgements';
  byId('judged').hidden = !left;
  byId('judged').textContent = left
    ? `${counted(left, 'judgement')} cannot be saved: a chunk's id has a blank in it, and the file's columns are separated by blanks.`
    : '';
}

function saveJudgements() {
  save('qrels.tsv', state.judgements.qrels().text, 'text/tab-separated-values');
  save('queries.jsonl', state.judgements.queries(), 'application/jsonl');
}

function showCode() {
  const job = { ...jobNow(), explain: true };
  byId('curl').textContent = curlOf(job, location.origin, Boolean(key.read()));
  byId('python').textContent = pythonOf(job, location.origin, Boolean(key.read()));
  byId('copied').textContent = '';
  byId('code-dialog').showModal();
}

async function copy({ currentTarget: button }) {
  const name = button.dataset.copies;
  const shown = byId(name);
  let done = true;
  try {
    await navigator.clipboard.writeText(shown.textContent);
  } catch {
    // Not a secure context, or not allowed: by the selection, as a person would.
    getSelection().selectAllChildren(shown);
    done = document.execCommand('copy');
  }
  byId('copied').textContent = done ? `Copied: ${name}.` : 'It is selected: copy it with Ctrl+C.';
}

/* Beginning */

/** Read which models are served, and what the deployment does, if this key may see it. */
async function readDeployment() {
  const { data } = await call('/v1/models');
  const names = [...new Set(data.map((model) => model.root))].sort();
  state.models = names;
  state.readAt = performance.now();
  try {
    state.deployment = await call('/v1/deployment');
  } catch (error) {
    if (error.status !== 403) throw error;
  }
  const select = byId('model');
  const chosen = select.value;
  const listed = new Set(names);
  const usual = state.deployment?.default_model;
  if (chosen) listed.add(chosen);
  select.replaceChildren(make('option', { value: '' }, usual ? `${usual} (default)` : 'the default'), ...[...listed].filter((name) => name !== usual).map((name) => make('option', { value: name }, name)));
  select.value = chosen;
  offerComparisons(names);
}

function offerComparisons(models) {
  const select = byId('compare');
  const chosen = select.value;
  const group = (label, kind, names) => make('optgroup', { label }, ...names.map((name) => make('option', { value: `${kind}:${name}` }, name)));
  select.replaceChildren(
    make('option', { value: '' }, 'nothing'),
    group('a profile', 'profile', state.profiles.map((one) => one.name)),
    ...(models.length > 1 ? [group('a model', 'model', models)] : []),
  );
  select.value = chosen;
  if (select.selectedIndex < 0) select.value = '';
}

/** Read what the controls offer; once at a time. */
function start() {
  state.starting ??= begin().finally(() => { state.starting = null; });
  return state.starting;
}

async function begin() {
  try {
    const [{ profiles }, samples] = await Promise.all([call('/v1/fusion-profiles'), call('/playground/sample.json')]);
    state.profiles = profiles;
    state.samples = samples;
    const chosen = byId('profile').value;
    byId('profile').replaceChildren(...profiles.map(({ name }) => make('option', { value: name }, name)));
    byId('sample').replaceChildren(make('option', { value: '' }, 'Load a sample …'), ...samples.map(({ query }, at) => make('option', { value: String(at) }, query)));
    if (state.fusion && profiles.some(({ name }) => name === chosen)) byId('profile').value = chosen;
    else {
      chooseProfile('default');
      // What was written before, or kept by the browser from the last visit.
      state.fresh = true;
      readInput();
    }
    await readDeployment();
    notice(null);
  } catch (error) {
    failed(error);
  }
}

function listen() {
  const on = (id, event, work) => byId(id).addEventListener(event, work);
  on('form', 'submit', (event) => { event.preventDefault(); run(); });
  on('form', 'keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
  });
  on('cancel', 'click', cancel);
  on('query', 'input', () => tellFault('query', ''));
  on('chunks', 'input', () => { state.fresh = true; });
  on('chunks', 'input', settled(READ_SETTLE_MS, readInput));
  on('format', 'change', readInput);
  on('sample', 'change', (event) => { loadSample(Number(event.target.value)); event.target.value = ''; });
  on('try', 'click', () => loadSample(0));
  on('open-file', 'click', () => byId('file').click());
  on('file', 'change', async (event) => { await loadFile(event.target.files[0]); event.target.value = ''; });
  for (const kind of ['dragover', 'dragleave', 'drop']) {
    on('chunks', kind, (event) => {
      if (!event.dataTransfer?.types.includes('Files')) return;
      event.preventDefault();
      byId('chunks').classList.toggle('dropping', kind === 'dragover');
      if (kind === 'drop') loadFile(event.dataTransfer.files[0]);
    });
  }
  on('profile', 'change', () => { takeFusion(profile().fusion); again(); });
  on('reset', 'click', () => { takeFusion(profile().fusion); byId('profile').focus(); again(); });
  on('model', 'change', again);
  on('compare', 'change', again);
  readyPair('min-score', (slider) => Number(slider.value) <= Number(slider.min));
  readyPair('top-k', (slider) => Number(slider.value) >= Number(slider.max));
  on('first-stage', 'change', show);
  on('explain-all', 'click', (event) => {
    state.everyOpen = !state.everyOpen;
    state.opened.clear();
    event.currentTarget.setAttribute('aria-pressed', String(state.everyOpen));
    show();
  });
  on('open-code', 'click', showCode);
  on('close-code', 'click', () => byId('code-dialog').close());
  for (const button of document.querySelectorAll('.copy')) button.addEventListener('click', copy);
  on('save-qrels', 'click', saveJudgements);
  for (const kind of ['pointerover', 'pointerleave', 'focusin', 'focusout']) on('rankings', kind, light);
  new ResizeObserver(redraw).observe(byId('rankings'));
  addEventListener('beforeunload', () => state.running?.abort());
}

buildWeights();
readyKeyDialog(start);
listen();
start();
