// A frame of the stream as arrays: one number per layer and head, row by row.

export const KINDS = {
  mean: "Mean",
  p50: "Median (p50)",
  p95: "95th percentile (p95)",
  window_max: "Largest in the window",
  rows: "Rows measured",
  nonfinite: "Non-finite rows",
};

export class Matrix {
  /**
   * @param {object} engine of a frame
   * @param {string} statistic
   * @param {string} phase
   */
  constructor(engine, statistic, phase) {
    const found = engine.phases[phase];
    this.layers = engine.layers;
    this.heads = engine.heads;
    this.unsampled = new Set(engine.unsampled_layers);
    this.startS = engine.start_time_s;
    this.timeS = engine.time_s;
    this.kinds = { rows: flat(found.rows), nonfinite: flat(found.nonfinite) };
    for (const [kind, values] of Object.entries(found.statistics[statistic] ?? {})) this.kinds[kind] = flat(values);
    this.totalRows = sum(this.kinds.rows);
    this.totalNonfinite = sum(this.kinds.nonfinite);
  }

  get size() {
    return this.layers.length * this.heads;
  }

  /** The numbers of a kind; all NaN if there is no such kind. */
  of(kind) {
    return this.kinds[kind] ?? new Float64Array(this.size).fill(NaN);
  }

  /** Index of a layer and head given by their global numbers, or -1. */
  indexOf(layer, head) {
    const row = this.layers.indexOf(layer);
    return row < 0 || head < 0 || head >= this.heads ? -1 : row * this.heads + head;
  }

  placeOf(index) {
    return { layer: this.layers[Math.floor(index / this.heads)], head: index % this.heads };
  }

  /** True if the other one has the same layers and heads, so that cells can be compared. */
  matches(other) {
    return other.heads === this.heads && other.layers.length === this.layers.length
      && other.layers.every((layer, i) => layer === this.layers[i]);
  }
}

/** this - that, cell by cell; NaN where one of them has no number. */
export function difference(these, those) {
  return these.map((value, i) => value - those[i]);
}

function flat(rows) {
  return Float64Array.from(rows.flat(), (value) => value ?? NaN);
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}
