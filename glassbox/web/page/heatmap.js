// The matrix on a canvas: one pixel per cell in an image that is blown up, so that 80 x 64 cells cost as much as one.

import { paint } from "./colours.js";
import { inSpan, number } from "./format.js";

const LEFT = 44;
const BOTTOM = 34;
const TOP = 4;
const RIGHT = 2;
const LEAST_CELL = { width: 38, height: 15 }; // in which a number can be read

export class Heatmap {
  /** Frames painted so far, for whoever measures. */
  frames = 0;
  #image = document.createElement("canvas");
  #colours = {};
  #shown = null;
  #marked = { active: -1, selected: -1 };

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {HTMLElement} host the canvas is as wide as it
   * @param {() => void} onPaint
   */
  constructor(canvas, host, onPaint) {
    Object.assign(this, { canvas, host, onPaint });
    this.context = canvas.getContext("2d");
    this.retheme();
    new ResizeObserver(() => this.#request()).observe(host);
  }

  /** The theme has changed. */
  retheme() {
    this.#colours = paint("ink", "muted", "line", "surface", "empty", "empty-line", "bad");
    this.#hatch = null;
    this.#request();
  }

  /**
   * @param {{layers: number[], heads: number, values: Float64Array, nonfinite: Float64Array, rows: Float64Array,
   *     scale: object, ramp: object, difference: boolean}} shown
   */
  show(shown) {
    this.#shown = shown;
    this.#request();
  }

  /** Cells with a frame around them, by index; -1 for none. */
  mark(active, selected) {
    if (active === this.#marked.active && selected === this.#marked.selected) return;
    this.#marked = { active, selected };
    this.#request();
  }

  #requested = 0;

  #request() {
    this.#requested ||= requestAnimationFrame(() => {
      this.#requested = 0;
      this.#paint();
    });
  }

  get #size() {
    const { layers, heads } = this.#shown;
    const width = this.host.clientWidth;
    const cellWidth = (width - LEFT - RIGHT) / heads;
    const cellHeight = Math.min(24, Math.max(8, Math.round(640 / layers.length)));
    return { width, height: TOP + BOTTOM + cellHeight * layers.length, cellWidth, cellHeight };
  }

  /** Index of the cell at a point of the canvas (CSS pixels), or -1. */
  cellAt(x, y) {
    if (!this.#shown) return -1;
    const { cellWidth, cellHeight } = this.#size;
    const [row, column] = [Math.floor((y - TOP) / cellHeight), Math.floor((x - LEFT) / cellWidth)];
    const inside = row >= 0 && column >= 0 && row < this.#shown.layers.length && column < this.#shown.heads;
    return inside ? row * this.#shown.heads + column : -1;
  }

  /** Where a cell is on the canvas, in CSS pixels. */
  rectOf(index) {
    const { cellWidth, cellHeight } = this.#size;
    const [row, column] = [Math.floor(index / this.#shown.heads), index % this.#shown.heads];
    return { x: LEFT + column * cellWidth, y: TOP + row * cellHeight, width: cellWidth, height: cellHeight };
  }

  #paint() {
    if (!this.#shown || !this.host.clientWidth) return;
    const { width, height, cellWidth, cellHeight } = this.#size;
    const ratio = devicePixelRatio || 1;
    const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== wide || this.canvas.height !== high) {
      [this.canvas.width, this.canvas.height] = [wide, high];
      [this.canvas.style.width, this.canvas.style.height] = [`${width}px`, `${height}px`];
    }
    const { context } = this;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    this.#paintCells(cellWidth, cellHeight);
    this.#paintMarks(cellWidth, cellHeight);
    this.#paintAxes(width, height, cellWidth, cellHeight);
    this.#frame(this.#marked.selected, 3);
    this.#frame(this.#marked.active, 2);
    this.frames += 1;
    this.host.dataset.frames = String(this.frames);
    this.onPaint();
  }

  #paintCells(cellWidth, cellHeight) {
    const { layers, heads, values, scale, ramp } = this.#shown;
    if (this.#image.width !== heads || this.#image.height !== layers.length) {
      [this.#image.width, this.#image.height] = [heads, layers.length];
    }
    const pixels = new ImageData(heads, layers.length);
    for (let i = 0; i < values.length; i += 1) {
      if (Number.isNaN(values[i])) continue; // stays transparent, is marked later
      const from = ramp.offset(scale.position(values[i]));
      pixels.data.set(ramp.rgb.subarray(from, from + 3), i * 4);
      pixels.data[i * 4 + 3] = 255;
    }
    this.#image.getContext("2d").putImageData(pixels, 0, 0);
    const { context } = this;
    context.imageSmoothingEnabled = false;
    context.drawImage(this.#image, LEFT, TOP, cellWidth * heads, cellHeight * layers.length);
    if (cellWidth >= 6 && cellHeight >= 6) this.#paintGaps(cellWidth, cellHeight);
    if (cellWidth >= LEAST_CELL.width && cellHeight >= LEAST_CELL.height) this.#paintNumbers(cellWidth, cellHeight);
  }

  #paintGaps(cellWidth, cellHeight) {
    const { layers, heads } = this.#shown;
    const { context } = this;
    context.fillStyle = this.#colours.surface;
    for (let column = 1; column < heads; column += 1) {
      context.fillRect(LEFT + column * cellWidth - 0.5, TOP, 1, cellHeight * layers.length);
    }
    for (let row = 1; row < layers.length; row += 1) {
      context.fillRect(LEFT, TOP + row * cellHeight - 0.5, cellWidth * heads, 1);
    }
  }

  #paintNumbers(cellWidth, cellHeight) {
    const { values, scale, ramp, heads, difference } = this.#shown;
    const { context } = this;
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    values.forEach((value, i) => {
      if (Number.isNaN(value)) return;
      context.fillStyle = ramp.ink(scale.position(value));
      const text = scale.log ? number(value) : inSpan(value, scale.high - scale.low);
      const sign = difference && value > 0 ? "+" : "";
      const [row, column] = [Math.floor(i / heads), i % heads];
      context.fillText(sign + text, LEFT + (column + 0.5) * cellWidth, TOP + (row + 0.5) * cellHeight + 0.5);
    });
  }

  #hatch = null;

  /** Cells without rows are hatched; a cell with NaN or infinite scores has a red corner, or a cross if nothing else. */
  #paintMarks(cellWidth, cellHeight) {
    const { values, nonfinite, heads } = this.#shown;
    const { context } = this;
    const at = (i) => [LEFT + (i % heads) * cellWidth, TOP + Math.floor(i / heads) * cellHeight];
    this.#hatch ??= this.#makeHatch();
    context.fillStyle = this.#hatch;
    const gap = cellWidth >= 6 && cellHeight >= 6 ? 0.5 : 0;
    const bad = [];
    for (let i = 0; i < values.length; i += 1) {
      if (nonfinite[i] > 0) bad.push(i);
      if (!Number.isNaN(values[i])) continue;
      const [x, y] = at(i);
      context.fillRect(x + gap, y + gap, cellWidth - 2 * gap, cellHeight - 2 * gap);
    }
    for (const i of bad) this.#paintBad(...at(i), cellWidth, cellHeight, Number.isNaN(values[i]));
  }

  #makeHatch() {
    const tile = document.createElement("canvas");
    [tile.width, tile.height] = [6, 6];
    const context = tile.getContext("2d");
    context.fillStyle = this.#colours.empty;
    context.fillRect(0, 0, 6, 6);
    context.strokeStyle = this.#colours["empty-line"];
    context.beginPath();
    for (const shift of [-6, 0, 6]) {
      context.moveTo(shift, 6);
      context.lineTo(shift + 6, 0);
    }
    context.stroke();
    return this.context.createPattern(tile, "repeat");
  }

  #paintBad(x, y, width, height, whole) {
    const { context } = this;
    const side = Math.min(width, height);
    context.fillStyle = this.#colours.bad;
    context.strokeStyle = "#fff";
    context.lineWidth = Math.max(1, side / 8);
    context.beginPath();
    if (whole) {
      context.fillRect(x + 0.5, y + 0.5, width - 1, height - 1);
      const inset = side * 0.22;
      const [left, top] = [x + (width - side) / 2, y + (height - side) / 2];
      context.moveTo(left + inset, top + inset);
      context.lineTo(left + side - inset, top + side - inset);
      context.moveTo(left + side - inset, top + inset);
      context.lineTo(left + inset, top + side - inset);
      context.stroke();
      return;
    }
    const corner = Math.max(4, side * 0.6);
    const [right, top] = [x + width - 0.5, y + 0.5];
    context.moveTo(right, top);
    context.lineTo(right, top + corner);
    context.lineTo(right - corner, top);
    context.fill();
    context.beginPath();
    context.moveTo(right, top + corner);
    context.lineTo(right - corner, top);
    context.stroke();
  }

  #paintAxes(width, height, cellWidth, cellHeight) {
    const { layers, heads } = this.#shown;
    const { context } = this;
    context.fillStyle = this.#colours.muted;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const bottom = TOP + cellHeight * layers.length;
    const everyRow = spacing(14 / cellHeight);
    layers.forEach((layer, row) => {
      if (row % everyRow === 0) context.fillText(String(layer), LEFT - 6, TOP + (row + 0.5) * cellHeight);
    });
    context.textAlign = "center";
    const everyColumn = spacing(24 / cellWidth);
    for (let head = 0; head < heads; head += everyColumn) {
      context.fillText(String(head), LEFT + (head + 0.5) * cellWidth, bottom + 9);
    }
    context.fillText("head", LEFT + (cellWidth * heads) / 2, bottom + 25);
    context.save();
    context.translate(8, TOP + (cellHeight * layers.length) / 2);
    context.rotate(-Math.PI / 2);
    context.fillText("layer", 0, 0);
    context.restore();
  }

  #frame(index, thickness) {
    if (index < 0 || index >= this.#shown.values.length) return;
    const { x, y, width, height } = this.rectOf(index);
    const { context } = this;
    // Dark and light line side by side: seen on every colour of every scale.
    context.lineWidth = thickness + 2;
    context.strokeStyle = "#000";
    context.strokeRect(x, y, width, height);
    context.lineWidth = thickness - 0.5;
    context.strokeStyle = "#fff";
    context.strokeRect(x, y, width, height);
  }
}

/** The smallest of 1, 2, 4, 5, 8, 10, 16, 20 ... that is at least `least`. */
function spacing(least) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100].find((step) => step >= least) ?? Math.ceil(least);
}
