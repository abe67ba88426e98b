// Histogram and history of one head, drawn by uPlot (vendor/uplot).

import { paint } from "./colours.js";
import { count, number, time } from "./format.js";

const HEIGHT = 170;
const FONT = "11px system-ui, sans-serif";

/** A uPlot in an element, made anew when the theme changes, as wide as the element. */
class Chart {
  plot = null;

  constructor(element) {
    this.element = element;
    new ResizeObserver(() => {
      if (this.plot && element.clientWidth) this.plot.setSize({ width: element.clientWidth, height: HEIGHT });
    }).observe(element);
  }

  clear() {
    this.plot?.destroy();
    this.plot = null;
  }

  /** Show data; `options` is only asked when the chart has to be made. */
  draw(data, options) {
    if (this.plot) {
      this.plot.setData(data);
      return;
    }
    if (!this.element.clientWidth) return; // not visible: there is another frame soon
    this.plot = new uPlot({ width: this.element.clientWidth, height: HEIGHT, ...options() }, data, this.element);
  }
}

function axis(colours, more) {
  const line = { stroke: colours.line, width: 1 };
  return { stroke: colours.muted, font: FONT, grid: line, ticks: { ...line, size: 4 }, ...more };
}

export class Histogram extends Chart {
  #key = "";

  /**
   * @param {HTMLElement} element
   * @param {HTMLElement} readout says what the pointer is at
   */
  constructor(element, readout) {
    super(element);
    this.readout = readout;
  }

  /** @param {{bounds: number[], counts: number[]}} histogram the last count is of what lies above all bounds */
  show({ bounds, counts }) {
    const key = bounds.join();
    if (key !== this.#key) this.clear();
    this.#key = key;
    this.total = counts.reduce((sum, rows) => sum + rows, 0);
    this.counts = counts;
    const shares = counts.map((rows) => (this.total ? (100 * rows) / this.total : 0));
    this.draw([counts.map((_, i) => i + 0.5), shares], () => this.#options(bounds, counts.length));
    this.#read(this.plot?.cursor.idx ?? null, bounds);
  }

  #options(bounds, buckets) {
    const colours = paint("muted", "line", "accent");
    return {
      legend: { show: false },
      cursor: { points: { show: false }, drag: { x: false, y: false } },
      scales: { x: { time: false, range: [0, buckets] }, y: { range: (_, __, high) => [0, Math.max(1, high * 1.08)] } },
      axes: [
        axis(colours, {
          // Bounds stand between bars, the first and the last bucket are open.
          splits: () => bounds.map((_, i) => i + 1),
          values: (plot, splits) => spread(splits.map((at) => short(bounds[at - 1])), plot.bbox.width / devicePixelRatio / buckets),
          grid: { show: false },
          size: 28,
        }),
        axis(colours, { values: (_, splits) => splits.map((share) => `${number(share)} %`), size: 48 }),
      ],
      series: [{}, { fill: colours.accent, stroke: colours.accent, width: 0, paths: uPlot.paths.bars({ size: [0.92, 100] }), points: { show: false } }],
      hooks: { setCursor: [(plot) => this.#read(plot.cursor.idx, bounds)] },
    };
  }

  #read(at, bounds) {
    if (at === null || at === undefined || !this.total) {
      this.readout.textContent = this.total ? `${count(this.total)} rows with finite scores` : "No rows";
      return;
    }
    const share = number((100 * this.counts[at]) / this.total);
    this.readout.textContent = `${bucketName(bounds, at)}: ${count(this.counts[at])} rows (${share} %)`;
  }
}

/** Labels at equal distances (in pixels), without those that would run into their left neighbour. */
function spread(labels, distance) {
  let free = -Infinity;
  return labels.map((label, i) => {
    const half = 3.2 * label.length + 2;
    if (i * distance - half < free) return "";
    free = i * distance + half;
    return label;
  });
}

function short(bound) {
  if (Math.abs(bound) < 1000) return number(bound);
  return `${number(bound % 1024 ? bound / 1000 : bound / 1024)}k`;
}

/** "0.1 to 0.2"; the first and the last bucket are open. */
export function bucketName(bounds, at) {
  if (at === 0) return `up to ${number(bounds[0])}`;
  if (at === bounds.length) return `above ${number(bounds.at(-1))}`;
  return `${number(bounds[at - 1])} to ${number(bounds[at])}`;
}

export class HistoryChart extends Chart {
  #withBaseline = false;

  /**
   * @param {{times: number[], mean: number[], p50: number[], p95: number[]}} history
   * @param {number | null} baseline of the mean
   */
  show({ times, mean, p50, p95 }, baseline) {
    if ((baseline !== null) !== this.#withBaseline || !times.length) this.clear();
    if (!times.length) return;
    this.#withBaseline = baseline !== null;
    const data = [times, mean, p50, p95];
    if (baseline !== null) data.push(times.map(() => baseline));
    this.draw(data, () => this.#options());
    // Without a pointer the legend tells the newest values.
    if (this.plot && this.plot.cursor.idx == null) this.plot.setLegend({ idx: times.length - 1 }, false);
  }

  #options() {
    const colours = paint("ink", "muted", "line", "accent", "second", "third");
    const line = (label, stroke, more) => ({
      label,
      stroke,
      width: 2,
      spanGaps: false,
      points: { size: 4 },
      value: (_, value) => (value === null ? "–" : number(value)),
      ...more,
    });
    const series = [
      { value: (_, seconds) => (seconds === null ? "–" : time(seconds)), label: "at" },
      line("mean", colours.accent),
      line("p50", colours.second, { width: 1.5 }),
      line("p95", colours.third, { width: 1.5 }),
    ];
    if (this.#withBaseline) series.push(line("baseline", colours.ink, { dash: [6, 4], width: 1, points: { show: false } }));
    return {
      cursor: { drag: { x: false, y: false } },
      scales: { y: { range: (_, low, high) => padded(low, high) } },
      axes: [
        axis(colours, { values: (_, splits) => splits.map(time), space: 70, size: 28 }),
        axis(colours, { values: (_, splits) => splits.map(number), size: 48 }),
      ],
      series,
    };
  }
}

function padded(low, high) {
  if (low === null || high === null) return [0, 1];
  const pad = (high - low || Math.abs(high) || 1) * 0.1;
  return [low - pad, high + pad];
}
