// Judgements: which chunk is relevant for which query, and the files that `rerankq rescore --qrels` reads.

// What separates columns there, so that no id may hold it.
const BLANK = /[\t\n\v\f\r \0]/;

/** Judgements of several queries; each query is named q1, q2 … in the order in which it was judged first. */
export class Judgements {
  #queries = new Map();

  /** Set a grade (1 relevant, 0 not), or take it back with null. A chunk without an id is named by its position. */
  set(query, id, grade, { text }) {
    const grades = this.#queries.get(query) ?? new Map();
    if (grade === null) grades.delete(id);
    else grades.set(id, { grade, text });
    this.#queries.set(query, grades);
  }

  /** Tell a chunk's grade; null for none, and for another chunk that has its id by now. */
  get(query, id, { text }) {
    const found = this.#queries.get(query)?.get(id);
    return found?.text === text ? found.grade : null;
  }

  get size() {
    return [...this.#queries.values()].reduce((sum, grades) => sum + grades.size, 0);
  }

  #judged() {
    return [...this.#queries].map(([text, grades], at) => ({ id: `q${at + 1}`, text, grades })).filter((one) => one.grades.size);
  }

  /** Write them as tab-separated values; `left` counts those whose ids have blanks, which that form cannot hold. */
  qrels() {
    const rows = ['query-id\tcorpus-id\tscore'];
    let left = 0;
    for (const { id, grades } of this.#judged()) {
      for (const [chunk, { grade }] of grades) {
        if (BLANK.test(chunk)) left += 1;
        else rows.push(`${id}\t${chunk}\t${grade}`);
      }
    }
    return { text: `${rows.join('\n')}\n`, left };
  }

  /** Write the queries as JSON lines, with the ids that the judgements use. */
  queries() {
    return this.#judged().map(({ id, text }) => `${JSON.stringify({ _id: id, text })}\n`).join('');
  }
}
