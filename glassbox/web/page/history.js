// What the page has seen so far, for the history of a head: the server keeps none.

const MOST_FRAMES = 720; // an hour at 5 s
const MOST_NUMBERS = 6_000_000; // 48 MB
const KEPT = ["mean", "p50", "p95", "rows"];

export class History {
  #views = new Map();

  /** Remember a matrix of a view (a text that names statistic, phase, engine and window). */
  add(view, matrix) {
    let frames = this.#views.get(view) ?? [];
    const last = frames.at(-1);
    if (last?.timeS === matrix.timeS) return; // the same moment again, after a reconnection
    // A server that was started anew, perhaps with another model, whose heads are not the same heads.
    if (last && (last.timeS > matrix.timeS || !matrix.matches(last))) frames = [];
    const kinds = Object.fromEntries(KEPT.map((kind) => [kind, matrix.of(kind)]));
    frames.push({ timeS: matrix.timeS, layers: matrix.layers, heads: matrix.heads, kinds });
    // Last in the map is the view that was looked at last.
    this.#views.delete(view);
    this.#views.set(view, frames);
    this.#forget(frames);
  }

  #forget(current) {
    if (current.length > MOST_FRAMES) current.shift();
    const size = (frames) => frames.reduce((total, frame) => total + KEPT.length * frame.kinds.rows.length, 0);
    let numbers = [...this.#views.values()].reduce((total, frames) => total + size(frames), 0);
    for (const [view, frames] of this.#views) {
      while (numbers > MOST_NUMBERS && frames.length > 1) {
        numbers -= KEPT.length * frames.shift().kinds.rows.length;
      }
      if (numbers <= MOST_NUMBERS) return;
      if (frames !== current) this.#views.delete(view);
    }
  }

  /** Times in seconds and numbers of one cell, null where it had no row. */
  of(view, index) {
    const frames = this.#views.get(view) ?? [];
    const column = (kind) =>
      frames.map(({ kinds }) => {
        const value = kinds[kind][index];
        return Number.isNaN(value) ? null : value;
      });
    return { times: frames.map(({ timeS }) => timeS), mean: column("mean"), p50: column("p50"), p95: column("p95") };
  }
}
