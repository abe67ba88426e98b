// Pinned baselines: the matrix of a view as it was, kept in the browser until it is unpinned.

const PREFIX = "glassbox.baseline.";
const KINDS = ["mean", "p50", "p95", "window_max", "rows", "nonfinite"];

export class Baselines {
  #memory = new Map();

  /**
   * Pin a matrix.
   *
   * @returns {boolean} false if the browser would not keep it: then it lasts until the page is left
   */
  pin(view, matrix) {
    const kinds = {};
    for (const kind of KINDS) {
      if (matrix.kinds[kind]) {
        kinds[kind] = Array.from(matrix.kinds[kind], (value) => (Number.isNaN(value) ? null : value));
      }
    }
    const pinned = { layers: matrix.layers, heads: matrix.heads, startS: matrix.startS, timeS: matrix.timeS, kinds };
    this.#memory.set(view, pinned);
    try {
      localStorage.setItem(PREFIX + view, JSON.stringify(pinned));
      return true;
    } catch {
      return false; // full or blocked
    }
  }

  unpin(view) {
    this.#memory.delete(view);
    try {
      localStorage.removeItem(PREFIX + view);
    } catch {
      // Blocked: there is nothing in it either.
    }
  }

  /** The pinned matrix of a view with `of(kind)`, or null; null as well if the model's shape is another one. */
  of(view, matrix) {
    if (!this.#memory.has(view)) this.#memory.set(view, load(view));
    const pinned = this.#memory.get(view);
    if (!pinned || !matrix.matches(pinned)) return null;
    const of = (kind) => Float64Array.from(pinned.kinds[kind] ?? Array(matrix.size).fill(null), (value) => value ?? NaN);
    return { startS: pinned.startS, timeS: pinned.timeS, of };
  }
}

function load(view) {
  try {
    const pinned = JSON.parse(localStorage.getItem(PREFIX + view));
    const size = pinned.layers.length * pinned.heads;
    return Object.values(pinned.kinds).every((values) => values.length === size) ? pinned : null;
  } catch {
    return null; // blocked, never pinned, or written by something else
  }
}
