// The same job as a command and as a program. Pure functions.

const END = 'JSON';

/** Write a text for a POSIX shell, so that the shell changes nothing in it. */
export const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Write a JSON value as Python. */
export function python(value, indent = '') {
  const deeper = `${indent}    `;
  if (value === null || value === undefined) return 'None';
  if (value === true) return 'True';
  if (value === false) return 'False';
  // A string of JSON is one of Python; lone surrogates, and what looks like a blank or an end of line, as escapes.
  if (typeof value === 'string') {
    return JSON.stringify(value).replace(/[\u007f-\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, escaped);
  }
  if (typeof value === 'number') return String(value);
  const list = Array.isArray(value);
  const parts = list ? value : Object.entries(value);
  if (!parts.length) return list ? '[]' : '{}';
  const written = parts.map((part) => (list ? python(part, deeper) : `${python(part[0])}: ${python(part[1], deeper)}`));
  const [open, close] = list ? '[]' : '{}';
  const short = `${open}${written.join(', ')}${close}`;
  if (short.length < 90 && !short.includes('\n')) return short;
  return `${open}\n${written.map((part) => `${deeper}${part},\n`).join('')}${indent}${close}`;
}

const escaped = (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, '0')}`;

/** Write the job as two curl commands in one line: submit it, and wait for the ranking. */
export function curlOf(job, origin, withKey) {
  const key = withKey ? ' -H "Authorization: Bearer $RERANKQ_API_KEY"' : '';
  const jobs = `${origin}/v1/jobs`;
  // JSON has no line breaks of its own, so the line that ends the text cannot be in it.
  return [
    `curl -sS ${shellQuoted(jobs)}${key} -H 'Content-Type: application/json' --data-binary @- <<'${END}' |`,
    JSON.stringify(job),
    END,
    `  sed -n 's/.*"job_id": *"\\([^"]*\\)".*/\\1/p' |`,
    `  xargs -I ID curl -sS ${shellQuoted(`${jobs}/ID?wait=60`)}${key}`,
    '',
  ].join('\n');
}

/** Write the job as a Python program that uses only what Python has. */
export function pythonOf(job, origin, withKey) {
  return [
    'import json',
    ...(withKey ? ['import os'] : []),
    'import urllib.request',
    '',
    `GATEWAY = ${python(origin)}`,
    `HEADERS = {"Content-Type": "application/json"${withKey ? ', "Authorization": f"Bearer {os.environ[\'RERANKQ_API_KEY\']}"' : ''}}`,
    `JOB = ${python(job)}`,
    '',
    '',
    'def call(path, body=None):',
    '    data = None if body is None else json.dumps(body).encode()',
    '    with urllib.request.urlopen(urllib.request.Request(GATEWAY + path, data, HEADERS)) as answer:',
    '        return json.load(answer)',
    '',
    '',
    'job_id = call("/v1/jobs", JOB)["job_id"]',
    'answer = call(f"/v1/jobs/{job_id}?wait=60")',
    'if not answer.get("ranking"):',
    '    raise SystemExit(f"{answer[\'state\']}: {answer.get(\'error\') or \'no ranking yet\'}")',
    'for chunk in answer["ranking"]["chunks"]:',
    '    print(chunk["rank"], round(chunk["score"], 4), chunk["id"])',
    '',
  ].join('\n');
}
