// The controls above the map: what is looked at, and the baseline. They change the view, and say what follows of it.

import { moment, title } from "./format.js";
import { KINDS } from "./matrix.js";

export class Controls {
  #about = null;

  /**
   * @param {Document | ShadowRoot} root has the controls, by their ids
   * @param {View} view
   * @param {{repaint: () => void, reconnect: () => void, pin: () => void, compare: () => void, unpin: () => void}} actions
   */
  constructor(root, view, actions) {
    Object.assign(this, { root, view, actions });
    for (const name of ["value", "fit"]) {
      this.#on(name, "change", (select) => {
        view[name] = select.value;
        view.write();
        actions.repaint();
      });
    }
    for (const name of ["statistic", "phase", "window"]) {
      this.#on(name, "change", (select) => {
        view[name] = select.value;
        const phases = this.#about?.statistics.find((entry) => entry.name === view.statistic)?.phases ?? [];
        if (phases.length && !phases.includes(view.phase)) [view.phase] = phases;
        if (this.#about) this.#showStatistic();
        actions.reconnect();
      });
    }
    this.#on("engine", "change", ({ value }) => {
      const at = value.lastIndexOf("|");
      [view.model, view.engine] = [value.slice(0, at), value.slice(at + 1)];
      actions.reconnect();
    });
    this.#on("controls", "submit", (_, event) => event.preventDefault());
    for (const name of ["pin", "compare", "unpin"]) this.#on(name, "click", () => actions[name]());
  }

  #element(id) {
    return this.root.getElementById(id);
  }

  #on(id, kind, action) {
    const element = this.#element(id);
    element.addEventListener(kind, (event) => action(element, event));
  }

  /** Show what the view is. */
  sync() {
    for (const name of ["statistic", "value", "phase", "window", "fit"]) this.#element(name).value = this.view[name];
  }

  /** The table of statistics has come. */
  offer(about) {
    this.#about = about;
    const names = about.statistics.map(({ name }) => [name, title(name)]);
    options(this.#element("statistic"), names, this.view.statistic);
    this.#showStatistic();
  }

  /** @param {object} frame names the engines there are, and its own */
  offerEngines(frame) {
    const names = frame.engines.map(({ model, engine }) => [`${model}|${engine}`, `${model}, engine ${engine}`]);
    const own = frame.engine ? `${frame.engine.model}|${frame.engine.engine}` : "";
    options(this.#element("engine"), names.length ? names : [["", "none yet"]], own);
  }

  /** What depends on the statistic: its meaning, its phases, the values it has. */
  #showStatistic() {
    const { view } = this;
    const statistic = this.#about.statistics.find(({ name }) => name === view.statistic);
    this.#element("meaning").textContent = statistic.meaning;
    options(this.#element("phase"), statistic.phases.map((phase) => [phase, title(phase)]), view.phase);
    const kinds = Object.entries(KINDS).filter(([kind]) => kind !== "window_max" || statistic.name === "max_logit");
    const value = this.#element("value");
    options(value, kinds, kinds.some(([kind]) => kind === view.value) ? view.value : "mean");
    view.value = value.value;
  }

  /**
   * What can be chosen for the matrix that is on the screen.
   *
   * @param {{baseline: object | null, comparing: boolean, counting: boolean, statistic: object}} painted
   */
  show({ baseline, comparing, counting, statistic }) {
    this.#element("fit").disabled = comparing || counting || statistic.lower === null || statistic.upper === null;
    const compare = this.#element("compare");
    compare.disabled = !baseline;
    compare.setAttribute("aria-pressed", String(comparing));
    compare.title = baseline ? `Pinned at ${moment(baseline.timeS)}` : "Nothing is pinned for this view";
    this.#element("unpin").hidden = !baseline;
  }

  focusPin() {
    this.#element("pin").focus();
  }
}

function options(select, entries, chosen) {
  const key = JSON.stringify(entries);
  if (select.dataset.key !== key) {
    select.dataset.key = key;
    select.replaceChildren(...entries.map(([value, name]) => new Option(name, value)));
  }
  if (select.value !== chosen) select.value = chosen;
}
