// Elements of a page. Texts are always set as text, so no chunk can become markup.

const SVG = 'http://www.w3.org/2000/svg';

/** Find an element by its id. */
export const byId = (id) => document.getElementById(id);

/** Make an element: properties by name; `class`, `aria-…`, `data-…` and `role` as attributes; strings become text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name in element && !name.startsWith('aria')) element[name] = value;
    else element.setAttribute(name === 'class' ? 'class' : name, value === true ? '' : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Make an element of an SVG. */
export function draw(tag, attributes = {}, text = '') {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

/** Let the user save a text as a file. */
export function save(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = make('a', { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Call a function once nothing was asked for so many milliseconds. */
export function settled(wait, work) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), wait);
  };
}

const grouped = new Intl.NumberFormat('en');

/** Write a whole number, with commas. */
export const count = (value) => grouped.format(value);

/** Write "1 chunk" or "2 chunks". */
export const counted = (value, noun, plural = `${noun}s`) => `${count(value)} ${value === 1 ? noun : plural}`;

/** Write a score or one of its parts: three digits after the point, four figures if it is small. */
export function number(value) {
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2);
  return size < 0.1 ? value.toFixed(4) : value.toFixed(3);
}

/** Write a weight as it was given, without noise of binary fractions. */
export const plain = (value) => String(Number(value.toPrecision(6)));

/** Write a time given in seconds: the two largest units that it has. */
export function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const units = [['d', 86_400], ['h', 3_600], ['min', 60], ['s', 1]];
  const at = units.findIndex(([, size]) => seconds >= size);
  const [[large, size], [small, rest]] = [units[at], units[at + 1]];
  return `${Math.floor(seconds / size)} ${large} ${Math.floor((seconds % size) / rest)} ${small}`;
}
