// Read what was pasted or loaded: plain lines, JSON lines, a JSON array, or a whole job. Pure functions.

const FIELDS = new Set([
  'text', 'id', 'title', 'keywords', 'questions', 'vector_score', 'keyword_score', 'pagerank', 'tags', 'tokens', 'metadata',
]);
const NAMES = { _id: 'id', content: 'text', contents: 'text', document: 'text', passage: 'text' };

/** Raised where a text cannot be read; the message says where and why. */
export class Unreadable extends Error {}

/** Read chunks out of a text. Answers {chunks, kind, job}: `job` has the other fields, if the text is a whole job. */
export function read(text, format = 'auto') {
  const trimmed = text.trim();
  if (!trimmed) return { chunks: [], kind: 'nothing', job: null };
  if (format === 'lines') return lines(text);
  if (format === 'jsonl') return jsonLines(text);
  if (!/^[[{"]/.test(trimmed)) return lines(text);
  const whole = parsedOrNull(trimmed);
  if (Array.isArray(whole)) {
    return { chunks: whole.map((value, at) => chunkOf(value, `element ${at + 1}`)), kind: 'a JSON array', job: null };
  }
  if (whole && typeof whole === 'object' && Array.isArray(whole.chunks)) {
    const { chunks, ...job } = whole;
    checkJob(job);
    return { chunks: chunks.map((value, at) => chunkOf(value, `chunk ${at + 1}`)), kind: 'a job', job };
  }
  // The body of a call in somebody's dialect: of its options only the query is sure to mean the same here.
  const list = whole && typeof whole.query === 'string' && [whole.documents, whole.texts, whole.passages].find(Array.isArray);
  if (list) {
    const chunks = list.map((value, at) => chunkOf(value, `document ${at + 1}`));
    return { chunks, kind: 'a rerank call', job: { query: whole.query } };
  }
  const first = trimmed.slice(0, trimmed.search(/\r?\n|$/));
  // A line in braces or quotes that is no JSON may be a text, unless the lines after it are JSON.
  if (parsedOrNull(first) === undefined && !text.split(/\r?\n/).some((line) => isObject(parsedOrNull(line)))) {
    if (!/^[[{]\s*["{[]/.test(trimmed)) return lines(text);
  }
  return jsonLines(text);
}

/** Check those fields of a job that become controls; all others the gateway checks. */
function checkJob({ query, model, min_score: threshold, top_k: most, fusion }) {
  const expect = (value, good, name, what) => {
    if (value !== undefined && value !== null && !good(value)) throw new Unreadable(`${name}: expected ${what}`);
  };
  const isNumber = (value) => typeof value === 'number' && Number.isFinite(value);
  const weighs = (value) => isObject(value) && Object.values(value).every((weight) => isNumber(weight) && weight >= 0);
  expect(query, (value) => typeof value === 'string', 'query', 'a text');
  expect(model, (value) => typeof value === 'string', 'model', 'a name');
  expect(threshold, isNumber, 'min_score', 'a number');
  expect(most, (value) => Number.isInteger(value) && value > 0, 'top_k', 'a whole number above 0');
  expect(fusion, (value) => typeof value === 'string' || isObject(value), 'fusion', 'the name of a profile, or an object');
  if (!isObject(fusion)) return;
  for (const name of ['weights', 'boosts']) expect(fusion[name], weighs, `fusion.${name}`, 'numbers by name, none below 0');
  expect(fusion.method, (value) => ['weighted', 'rrf'].includes(value), 'fusion.method', '"weighted" or "rrf"');
  expect(fusion.normalise, isObject, 'fusion.normalise', 'rules by name');
  for (const [name, value] of Object.entries(fusion)) if (value === null) delete fusion[name];
}

function lines(text) {
  const found = text.split(/\r?\n|\r/).filter((line) => line.trim());
  return { chunks: found.map((line) => ({ text: line.trim() })), kind: 'lines', job: null };
}

function jsonLines(text) {
  const chunks = [];
  text.split(/\r?\n/).forEach((line, at) => {
    if (!line.trim()) return;
    let value;
    try {
      value = JSON.parse(line);
    } catch (error) {
      throw new Unreadable(`line ${at + 1} is not JSON: ${error.message}`);
    }
    chunks.push(chunkOf(value, `line ${at + 1}`));
  });
  return { chunks, kind: 'JSON lines', job: null };
}

function chunkOf(value, place) {
  if (typeof value === 'string') return { text: value };
  if (!isObject(value)) throw new Unreadable(`${place}: expected a text or an object`);
  const chunk = {};
  const others = {};
  for (const [name, given] of Object.entries(value)) {
    const field = FIELDS.has(name) ? name : NAMES[name];
    if (!field || (field !== name && field in value)) others[name] = given;
    else if (given !== null) chunk[field] = given;
  }
  if (typeof chunk.text !== 'string') throw new Unreadable(`${place}: expected a field "text"`);
  if (typeof chunk.id === 'number') chunk.id = String(chunk.id);
  // What a chunk has no field for comes back with the ranking.
  if (Object.keys(others).length) chunk.metadata = { ...others, ...chunk.metadata };
  return chunk;
}

function parsedOrNull(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

const isObject = (value) => value !== null && typeof value === 'object' && !Array.isArray(value);

/** Read a file as UTF-8. */
export async function readFile(file, most) {
  if (file.size > most) throw new Unreadable(`${file.name} has ${file.size} bytes; at most ${most} are read`);
  const bytes = await file.arrayBuffer();
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch {
    throw new Unreadable(`${file.name} is not UTF-8 text`);
  }
}

/** Order positions by the first stage: as given, or by a score (higher first, chunks without one last, in their order). */
export function firstStage(chunks, by) {
  const positions = chunks.map((_, at) => at);
  if (by === 'given') return positions;
  const score = (at) => (Number.isFinite(chunks[at][by]) ? chunks[at][by] : -Infinity);
  return positions.sort((one, other) => (score(other) > score(one)) - (score(other) < score(one)) || one - other);
}
