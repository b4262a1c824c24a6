// Talk to the gateway: jobs, their events, errors in plain words. The key lives in this tab's session.

const KEY = 'rerankq-key';

export const key = {
  read: () => sessionStorage.getItem(KEY) ?? '',
  keep: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

/** What went wrong; `status` 0: the gateway was not reached. */
export class CallFailed extends Error {
  constructor(status, message, { retryAfter = null, field = '', kind = '' } = {}) {
    super(message);
    Object.assign(this, { status, retryAfter, field, kind });
  }
}

function headers(more = {}) {
  return key.read() ? { ...more, Authorization: `Bearer ${key.read()}` } : more;
}

async function fetched(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new CallFailed(0, 'no answer');
  }
  if (response.ok) return response;
  let told = {};
  try {
    told = await response.json();
  } catch { /* an error that somebody between us and the gateway wrote */ }
  throw new CallFailed(response.status, String(told.message ?? told.detail ?? response.statusText), {
    retryAfter: Number(response.headers.get('Retry-After')) || null,
    field: told.field ?? '',
    kind: told.code ?? '',
  });
}

/** Call the gateway; answers what it says, read as JSON. */
export async function call(path, { method = 'GET', body, signal } = {}) {
  const sent = body === undefined ? {} : { body: JSON.stringify(body) };
  const type = body === undefined ? {} : { 'Content-Type': 'application/json' };
  const response = await fetched(path, { method, headers: headers(type), signal, ...sent });
  return response.json();
}

/** Submit a job and answer its ranking; tells `onProgress({state, done, total})`. Aborted, it cancels the job. */
export async function rank(job, { signal, onProgress = () => {} } = {}) {
  const accepted = await call('/v1/jobs', { method: 'POST', body: job, signal });
  const path = `/v1/jobs/${encodeURIComponent(accepted.job_id)}`;
  try {
    const response = await fetched(`${path}/events`, { headers: headers({ Accept: 'text/event-stream' }), signal });
    for await (const { event, data } of events(response.body)) {
      if (event === 'ranking') return data;
      if (event === 'error') throw new CallFailed(500, data.error, { kind: data.error_type });
      if (event === 'state') onProgress({ state: data.state });
      if (event === 'progress') onProgress({ state: 'running', done: data.pairs_done, total: data.pairs_total });
    }
    // The connection ended before the job did, as some proxies end it.
    for (;;) {
      const answer = await call(`${path}?wait=20`, { signal });
      if (answer.ranking) return answer.ranking;
      if (answer.error) throw new CallFailed(500, answer.error, { kind: answer.error_type });
    }
  } catch (error) {
    if (error.name === 'AbortError') {
      fetch(path, { method: 'DELETE', headers: headers(), keepalive: true }).catch(() => {});
    }
    if (error instanceof TypeError) throw new CallFailed(0, 'the connection broke off');
    throw error;
  }
}

/** Read server-sent events out of a response's body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = '';
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value.replaceAll('\r\n', '\n');
      for (let end = held.indexOf('\n\n'); end >= 0; end = held.indexOf('\n\n')) {
        const found = parsed(held.slice(0, end));
        held = held.slice(end + 2);
        if (found) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  let event = 'message';
  const data = [];
  for (const line of block.split('\n')) {
    if (line.startsWith('event:')) event = line.slice(6).trim();
    else if (line.startsWith('data:')) data.push(line.slice(5).trimStart());
  }
  return data.length ? { event, data: JSON.parse(data.join('\n')) } : null;
}

/** Say in plain words what went wrong and what helps: {text, serious}. */
export function plainly(error) {
  const said = error.message.replace(/\.$/, '');
  const later = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : ' Try again in a moment.';
  switch (error.status) {
    case undefined:
      return { text: `This page has a fault: ${error.message}`, serious: true };
    case 0:
      return { text: `The gateway cannot be reached (${error.message}). Is it running, and is the network there?`, serious: true };
    case 403:
      return { text: `Not allowed: ${error.message}`, serious: true };
    case 401:
      return { text: `The gateway asks for an API key, or does not accept this one: ${error.message}`, serious: true };
    case 413:
      return { text: `Too large: ${said}. Send fewer or shorter chunks.`, serious: true };
    case 422:
      return { text: `The gateway refused the job: ${error.message}`, serious: true };
    case 429:
      return { text: `Too much is waiting: ${said}.${later}`, serious: false };
    case 503:
      return { text: `Not available now: ${said}.${later}`, serious: false };
    default:
      return { text: `It did not work: ${error.message}`, serious: true };
  }
}
