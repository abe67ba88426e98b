// The panel of one head: its numbers, histogram and history; without a head, the extreme ones.

import { bucketName, Histogram, HistoryChart } from "./charts.js";
import { count, number, signed, withUnit } from "./format.js";
import { KINDS } from "./matrix.js";

const EXTREMES = 5;
const EXTREMES_PAUSE_MS = 2000;
const QUOTED = ["mean", "p50", "p95", "window_max"];

export class Panel {
  #extremesAt = -Infinity;

  /**
   * @param {Document | ShadowRoot} root has the panel's elements, by their ids
   * @param {{select: (index: number) => void, step: (rows: number, columns: number) => void, close: () => void}} actions
   */
  constructor(root, actions) {
    Object.assign(this, { root, actions });
    this.histogram = new Histogram(this.#element("histogram"), this.#element("histogram-readout"));
    this.history = new HistoryChart(this.#element("history"));
    const steps = { left: [0, -1], right: [0, 1], up: [-1, 0], down: [1, 0] };
    for (const [name, [rows, columns]] of Object.entries(steps)) {
      this.#element(`step-${name}`).addEventListener("click", () => actions.step(rows, columns));
    }
    this.#element("close").addEventListener("click", () => actions.close());
    this.#element("panel").addEventListener("keydown", (event) => event.key === "Escape" && actions.close());
  }

  #element(id) {
    return this.root.getElementById(id);
  }

  retheme() {
    this.histogram.clear();
    this.history.clear();
  }

  #switch(withHead) {
    this.#element("panel-empty").hidden = withHead;
    this.#element("panel-head").hidden = !withHead;
    this.#element("steps").hidden = !withHead;
    if (!withHead) this.#element("panel-title").textContent = "No head selected";
  }

  /** No head is selected: offer those with the largest and the smallest shown values. */
  showExtremes(matrix, values, text) {
    this.#switch(false);
    const list = this.#element("extremes");
    const now = performance.now();
    // Not under a pointer or a focus: what was read is what must be selected.
    if (now - this.#extremesAt < EXTREMES_PAUSE_MS || list.matches(":hover, :focus-within")) return;
    this.#extremesAt = now;
    const order = [...values.keys()].filter((i) => !Number.isNaN(values[i])).sort((a, b) => values[a] - values[b]);
    const group = (name, indices) => {
      const box = document.createElement("div");
      const heading = document.createElement("h4");
      heading.textContent = name;
      box.append(heading);
      for (const index of indices) {
        const { layer, head } = matrix.placeOf(index);
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = `L${layer} H${head}`;
        button.setAttribute("aria-label", `Layer ${layer}, head ${head}: ${text(values[index])}`);
        const value = document.createElement("span");
        value.textContent = text(values[index]);
        button.append(value);
        button.addEventListener("click", () => this.actions.select(index));
        box.append(button);
      }
      return box;
    };
    const most = Math.min(EXTREMES, Math.floor(order.length / 2));
    list.replaceChildren(
      group("Highest", order.slice(order.length - most).reverse()),
      group("Lowest", order.slice(0, most)),
    );
  }

  /**
   * @param {object} shown `matrix`, `index`, `statistic`, `baseline` (or null), `histogram` (or null), `histogramWindow`,
   *     `history`
   */
  showHead({ matrix, index, statistic, baseline, histogram, histogramWindow, history }) {
    this.#switch(true);
    const { layer, head } = matrix.placeOf(index);
    this.#element("panel-title").textContent = `Layer ${layer}, head ${head}`;
    this.#showNumbers(matrix, index, statistic, baseline);
    this.#element("histogram-title").textContent = `Histogram, ${histogramWindow}`;
    if (histogram) {
      this.histogram.show(histogram);
      this.#showTable(histogram);
    } else {
      // Another head or statistic: its own comes with the next frame.
      this.histogram.clear();
      this.#element("histogram-readout").textContent = "";
      this.#element("histogram-rows").replaceChildren();
    }
    const points = history.times.length;
    this.#element("history-title").textContent = "History since this page was opened";
    this.#element("history-readout").textContent = points < 2 ? "Each interval adds a point." : "";
    this.history.show(history, baseline && !Number.isNaN(baseline.of("mean")[index]) ? baseline.of("mean")[index] : null);
  }

  #showNumbers(matrix, index, statistic, baseline) {
    const list = this.#element("numbers");
    const entries = QUOTED.filter((kind) => matrix.kinds[kind]).map((kind) => {
      const value = matrix.of(kind)[index];
      const text = withUnit(number(value), statistic.unit);
      const before = baseline?.of(kind)[index];
      const compared = baseline && !Number.isNaN(before) && !Number.isNaN(value);
      return [KINDS[kind], text, compared ? `${signed(value - before)} from ${number(before)}` : ""];
    });
    entries.push(["Rows", count(matrix.kinds.rows[index]), ""]);
    const bad = matrix.kinds.nonfinite[index];
    entries.push(["Non-finite rows", count(bad), ""]);
    list.replaceChildren(
      ...entries.flatMap(([name, text, note]) => {
        const [term, value] = [document.createElement("dt"), document.createElement("dd")];
        term.textContent = name;
        value.textContent = text;
        if (note) {
          const small = document.createElement("small");
          small.textContent = note;
          value.append(small);
        }
        return [term, value];
      }),
    );
    list.classList.toggle("bad", bad > 0);
  }

  #showTable({ bounds, counts }) {
    if (!this.#element("histogram-details").open && this.#element("histogram-rows").children.length === counts.length) return;
    this.#element("histogram-rows").replaceChildren(
      ...counts.map((rows, at) => {
        const row = document.createElement("tr");
        row.title = bucketName(bounds, at);
        for (const text of [at ? number(bounds[at - 1]) : "", at < bounds.length ? number(bounds[at]) : "", count(rows)]) {
          const cell = document.createElement("td");
          cell.textContent = text;
          row.append(cell);
        }
        return row;
      }),
    );
  }
}
