// From a value to a position on a colour scale, and the ticks of its legend.

/** The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `value`. */
function niceStep(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((step) => step >= value * 0.999999);
}

/** The largest of them that is at most `value`. */
function niceFloor(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [5, 2.5, 2, 1].map((factor) => factor * power).find((step) => step <= value * 1.000001);
}

function linearTicks(low, high) {
  const step = niceStep((high - low) / 5);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = 1; power <= high; power *= 10) {
    for (const factor of high / Math.max(low, 1) > 30 ? [1, 3] : [1, 2, 5]) {
      if (factor * power >= low && factor * power <= high) ticks.push(factor * power);
    }
  }
  const all = low === 0 ? [0, ...ticks] : ticks;
  return all.length > 7 ? all.filter((tick) => tick === 0 || Number.isInteger(Math.log10(tick))) : all;
}

export class Scale {
  /**
   * @param {number} low value at position 0
   * @param {number} high value at position 1
   * @param {boolean} log positions by log(1 + value), for numbers of keys, tokens and rows
   */
  constructor(low, high, log = false) {
    Object.assign(this, { low, high, log });
    const bend = log ? Math.log1p : (value) => value;
    const [from, to] = [bend(low), bend(high)];
    this.position = (value) => (bend(value) - from) / (to - from);
  }

  ticks() {
    return this.log ? logTicks(this.low, this.high) : linearTicks(this.low, this.high);
  }
}

/** Smallest and largest number of an array, NaN left out; null if there is none. */
export function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : null;
}

function nice(low, high) {
  const span = high - low || Math.abs(high) || 1;
  const step = niceStep(span / 8);
  const [from, to] = [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
  return [Number(from.toPrecision(12)), Number((to > from ? to : from + step).toPrecision(12))];
}

/** A symmetric scale for differences. */
export function differenceScale(values, previous) {
  const found = extent(values) ?? [0, 0];
  const largest = niceStep(Math.max(Math.abs(found[0]), Math.abs(found[1]), 1e-4));
  const kept = previous && previous.low === -previous.high && previous.high >= largest && previous.high <= 2.5 * largest;
  return kept ? previous : new Scale(-largest, largest);
}

/**
 * The scale of a matrix: the statistic's whole range if it has one and `fit` does not ask for the data's.
 *
 * While new values still fill half of the previous scale it is kept, so that colours mean the same from frame to frame.
 */
export function valueScale(values, { lower, upper, log, fit }, previous) {
  if (lower !== null && upper !== null && fit !== "data") return new Scale(lower, upper);
  const found = extent(values) ?? [lower ?? 0, upper ?? 1];
  let [low, high] = found;
  if (log) [low, high] = [low >= 1 ? niceFloor(low) : (lower ?? 0), niceStep(Math.max(high, low + 1))];
  else [low, high] = nice(low, high);
  const inside = previous && previous.log === log && previous.low <= found[0] && previous.high >= found[1];
  if (inside && high - low >= (previous.high - previous.low) / 2) return previous;
  return new Scale(low, high, log);
}
