// Lines from the order before to the order after, beside the rows.

import { draw } from './elements.js';

// Pixels on the left that the ranks of the order before take.
const LABELS = 24;

/** Draw lines in an SVG. `before` and `after` are lists of {index, y}, y in pixels of the SVG; `labelled`: with ranks. */
export function drawMoves(svg, before, after, { width, height, labelled }) {
  const from = new Map(before.map(({ index, y }, at) => [index, { y, at }]));
  const left = labelled && width > 40 ? LABELS : 0;
  const drawn = [];
  after.forEach(({ index, y }, at) => {
    const start = from.get(index);
    if (start === undefined) return;
    const kind = start.at === at ? 'same' : start.at > at ? 'up' : 'down';
    drawn.push(line(index, start.y, y, left, width, kind));
    if (left && start.y < height) drawn.push(draw('text', { x: left - 5, y: start.y + 4, 'data-index': index }, String(start.at + 1)));
  });
  svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
  svg.replaceChildren(...drawn);
}

function line(index, start, end, left, width, kind) {
  const half = (left + width) / 2;
  const path = `M${left} ${start.toFixed(1)} C${half} ${start.toFixed(1)} ${half} ${end.toFixed(1)} ${width} ${end.toFixed(1)}`;
  return draw('path', { class: kind, d: path, 'data-index': index });
}

/** Let rows glide from where they were: `before` maps an index to the top that its row had, in pixels of the page. */
export function glide(rows, before) {
  if (matchMedia('(prefers-reduced-motion: reduce)').matches) return;
  for (const row of rows) {
    const was = before.get(Number(row.dataset.index));
    const is = row.getBoundingClientRect().top;
    if (was === undefined || Math.abs(was - is) < 1 || is > innerHeight + 400 || is < -400) continue;
    row.animate([{ transform: `translateY(${was - is}px)` }, { transform: 'none' }], { duration: 320, easing: 'cubic-bezier(.2,.8,.2,1)' });
  }
}
