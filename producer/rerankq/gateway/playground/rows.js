// One ranked chunk as a row: its bar, its text with the place where it was cut, and the arithmetic of its score.

import { count, make, number, plain } from './elements.js';

export const SIGNALS = ['model', 'token', 'vector', 'keyword', 'pagerank', 'tags'];

// Characters that a row shows before it is opened, and at most; the rest of a long text is only counted.
const SHORT = 400;
const MOST = 20_000;

/** Characters of text between the chunk's title and its text, as the model reads them. */
const modelText = (chunk) => `${chunk.title ?? ''} ${chunk.text}`.trim();

/** A row. `widest` is the score whose bar is as long as the row; `moved` says where the chunk comes from. */
export function row(ranked, chunk, { fusion, widest, active, moved = null, judgement = null, open = false, on }) {
  const body = make('div');
  const item = make('li', { class: 'row', 'data-index': ranked.index });
  item.append(place(ranked, moved), body);
  body.append(make('div', { class: 'scored' }, bar(ranked, widest), make('span', { class: 'score' }, number(ranked.score))));
  const text = make('p', { class: 'text', dir: 'auto' });
  write(text, chunk, ranked, open);
  body.append(text);

  const why = make('button', { type: 'button', class: 'plain why', 'aria-expanded': String(open) }, 'Arithmetic');
  const foot = make('div', { class: 'foot' });
  foot.append(make('span', { class: 'name', title: ranked.id }, ranked.id));
  if (ranked.truncated) foot.append(make('span', { class: 'chip warn' }, cutSaid(ranked, chunk)));
  if (ranked.cached) foot.append(make('span', { class: 'chip' }, 'cached'));
  if (on.judge) {
    foot.append(make('span', { class: 'end' }, why, ...grades(ranked, judgement, on.judge)));
  } else {
    foot.append(make('span', { class: 'end' }, why));
  }
  body.append(foot);

  let shown = null;
  const toggle = (opened) => {
    why.setAttribute('aria-expanded', String(opened));
    write(text, chunk, ranked, opened);
    shown?.remove();
    shown = opened ? arithmetic(ranked, fusion, active) : null;
    if (shown) body.append(shown);
  };
  if (open) toggle(true);
  why.addEventListener('click', () => {
    const opened = why.getAttribute('aria-expanded') !== 'true';
    toggle(opened);
    on.open?.(ranked.index, opened);
  });
  return item;
}

function place(ranked, moved) {
  const found = make('div', { class: 'place' }, make('span', { class: 'rank' }, count(ranked.rank)));
  if (moved) found.append(movement(moved));
  return found;
}

/** Say how a chunk moved: {from, to, where}, ranks from 1; `from` null: it was not there. */
function movement({ from, to, where }) {
  if (from === null) return make('span', { class: 'move' }, 'new');
  const steps = from - to;
  const [kind, sign, said] = steps > 0 ? ['up', '▲', 'up'] : steps < 0 ? ['down', '▼', 'down'] : ['', '', ''];
  if (!steps) return make('span', { class: 'move' }, make('span', { 'aria-hidden': 'true' }, '='), hidden(`as in ${where}`));
  const shown = make('span', { 'aria-hidden': 'true' }, `${sign} ${count(Math.abs(steps))}`);
  return make('span', { class: `move ${kind}` }, shown, hidden(`${said} ${Math.abs(steps)} from ${from} in ${where}`));
}

const hidden = (text) => make('span', { class: 'visually-hidden' }, text);

function bar(ranked, widest) {
  const parts = SIGNALS.filter((name) => name in ranked.parts).map((name) => [name, ranked.parts[name]]);
  const said = parts.map(([name, value]) => `${name} ${number(value)}`).join(', ') || 'no signal';
  const found = make('div', { class: 'bar', role: 'img', 'aria-label': `${number(ranked.score)}: ${said}` });
  for (const [name, value] of parts) {
    if (!value) continue;
    const part = make('span', { class: `of-${name}${value < 0 ? ' below' : ''}` });
    part.style.width = `${Math.min(100, (100 * Math.abs(value)) / widest)}%`;
    found.append(part);
  }
  return found;
}

/** The widest bar of a ranking: the largest sum of the sizes of a chunk's parts. */
export function widestOf(ranking) {
  const sizes = ranking.chunks.map((chunk) => Object.values(chunk.parts).reduce((sum, part) => sum + Math.abs(part), 0));
  return sizes.reduce((one, other) => Math.max(one, other), 0) || 1;
}

/** Signals that at least one chunk of the ranking has. */
export const activeOf = (ranking) => new Set(ranking.chunks.flatMap((chunk) => Object.keys(chunk.scores)));

function grades(ranked, judgement, judge) {
  const buttons = [[1, 'yes', '✓', 'Relevant'], [0, 'no', '✗', 'Not relevant']].map(([grade, kind, sign, name]) => {
    const button = make('button', { type: 'button', class: kind, 'aria-pressed': String(judgement === grade), 'aria-label': `${name}: ${ranked.id}`, title: name }, sign);
    button.addEventListener('click', () => {
      const given = button.getAttribute('aria-pressed') !== 'true' ? grade : null;
      for (const other of buttons) other.setAttribute('aria-pressed', String(other === button && given !== null));
      judge(ranked, given);
    });
    return button;
  });
  return buttons;
}

function cutSaid(ranked, chunk) {
  const end = ranked.span?.[1];
  return end === undefined ? 'cut' : `cut after ${count(end)} of ${count([...modelText(chunk)].length)} characters`;
}

/** Write a chunk's text; opened, with a mark where the model's reading ended, if the ranking says where. */
function write(element, chunk, ranked, opened) {
  element.classList.toggle('whole', opened);
  element.tabIndex = opened ? 0 : -1;
  if (!opened) element.removeAttribute('tabindex');
  const title = chunk.title ? [make('b', {}, chunk.title), ' '] : [];
  if (!opened) {
    element.replaceChildren(...title, chunk.text.slice(0, SHORT));
    return;
  }
  // In code points, as the ranking counts.
  const letters = [...modelText(chunk)];
  const end = ranked.truncated ? ranked.span?.[1] : undefined;
  const from = end !== undefined && end > MOST / 2 ? end - MOST / 2 : 0;
  const to = Math.min(letters.length, from + MOST);
  const piece = (start, stop) => letters.slice(start, stop).join('');
  const before = from ? [make('mark', {}, `${count(from)} characters`), ' '] : [];
  const after = to < letters.length ? [' ', make('mark', {}, `and ${count(letters.length - to)} characters more`)] : [];
  if (end === undefined) {
    const told = ranked.truncated ? [' ', make('mark', {}, 'cut: the model read only the beginning; where it stopped is not known')] : [];
    element.replaceChildren(piece(from, to), ...after, ...told);
    return;
  }
  const unread = make('span', { class: 'unread' }, piece(end, to));
  const told = end < letters.length ? 'cut here: the model read no further' : 'the query was cut: the model read all of this chunk';
  const mark = make('mark', {}, told);
  element.replaceChildren(...before, piece(from, Math.min(end, to)), ' ', mark, ' ', unread, ...after);
  // Once it is on the page: the place is what a person opened it for.
  requestAnimationFrame(() => { element.scrollTop = mark.offsetTop - element.offsetTop - element.clientHeight / 2; });
}

function arithmetic(ranked, fusion, active) {
  const box = make('div', { class: 'arithmetic', tabIndex: 0, role: 'group', 'aria-label': `Arithmetic of the score of ${ranked.id}` });
  const byRank = fusion.method === 'rrf';
  const rowsOf = SIGNALS.filter((name) => name in ranked.parts).map((name) => {
    const cells = byRank ? rankCells(ranked.parts[name], fusion, name) : weightCells(ranked, fusion, name);
    const label = make('th', { scope: 'row' }, make('span', { class: `swatch of-${name}` }), name);
    return make('tr', {}, label, ...cells.map((cell) => make('td', {}, cell)));
  });
  const titles = byRank ? ['signal', 'weight', '÷ (k + rank)', 'adds'] : ['signal', 'weight', '× normalised', 'adds'];
  const head = make('thead', {}, make('tr', {}, ...titles.map((title) => make('th', { scope: 'col' }, title))));
  const sum = make('tr', {}, make('th', { scope: 'row', colSpan: 3 }, 'score'), make('td', {}, `= ${number(ranked.score)}`));
  box.append(make('table', {}, head, make('tbody', {}, ...rowsOf), make('tfoot', {}, sum)));
  for (const name of ranked.missing) box.append(make('p', {}, missingSaid(name, ranked, fusion, active)));
  if (ranked.model_logit !== null) {
    box.append(make('p', {}, `The model's raw output (logit) is ${number(ranked.model_logit)}.`));
  }
  return box;
}

function weightCells(ranked, fusion, name) {
  const [weight, value, part] = [fusion.weights[name], ranked.scores[name], ranked.parts[name]];
  // What the weight came to, from the ranking's own numbers.
  const came = value ? part / value : weight;
  const grew = Math.abs(came - weight) > 1e-6 * Math.max(1, Math.abs(weight));
  return [grew ? `${plain(weight)} → ${number(came)}` : plain(weight), `× ${number(value)}`, number(part)];
}

function rankCells(part, fusion, name) {
  const weight = fusion.weights[name];
  return [plain(weight), `÷ (${fusion.rrf_k} + ${Math.round(weight / part - fusion.rrf_k)})`, number(part)];
}

function missingSaid(name, ranked, fusion, active) {
  if (!active.has(name)) return `${name}: no chunk has a value, so its weight ${plain(fusion.weights[name])} is dropped.`;
  if (fusion.method === 'rrf') return `${name}: this chunk has no value, so it adds nothing.`;
  if (fusion.normalise[name] === 'raw') return `${name}: this chunk has no value; it is added on top, so here it adds nothing.`;
  const others = Object.keys(ranked.parts).filter((other) => fusion.normalise[other] !== 'raw');
  if (!others.length) return `${name}: this chunk has no value.`;
  return `${name}: this chunk has no value; its weight ${plain(fusion.weights[name])} is shared out over ${others.join(' and ')}, in proportion to theirs.`;
}
