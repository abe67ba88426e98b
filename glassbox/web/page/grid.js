// Pointing at cells: mouse, touch and keyboard, and what a screen reader is told about the cell.

const PAGE = 8; // layers

export class Grid {
  /** Index of the cell that the pointer or the keyboard is at; -1 for none. */
  active = -1;
  #matrix = null;

  /**
   * @param {object} parts `grid`, `row`, `cell` and `tooltip` elements, and the `heatmap`
   * @param {{describe: (index: number) => {label: string, lines: string[]}, select: (index: number) => void,
   *     leave: () => void, moved: () => void}} actions
   */
  constructor(parts, actions) {
    Object.assign(this, parts, { actions });
    this.grid.addEventListener("pointermove", (event) => this.#point(event));
    this.grid.addEventListener("pointerleave", () => this.#go(this.#focused() ? this.active : -1, true));
    this.grid.addEventListener("click", (event) => {
      this.#point(event);
      if (this.active >= 0) this.actions.select(this.active);
    });
    this.grid.addEventListener("keydown", (event) => this.#key(event));
    this.grid.addEventListener("focus", () => this.#focused() && this.#go(Math.max(this.active, 0)));
    this.grid.addEventListener("blur", () => this.#go(-1));
  }

  /** The matrix whose cells these are. */
  show(matrix) {
    this.#matrix = matrix;
    this.grid.setAttribute("aria-rowcount", String(matrix.layers.length));
    this.grid.setAttribute("aria-colcount", String(matrix.heads));
    if (this.active >= matrix.size) this.active = -1;
    this.#describe();
  }

  /** Move to a cell without selecting it. */
  go(index) {
    this.#go(index, true);
  }

  #focused() {
    return this.grid.matches(":focus-visible");
  }

  #point(event) {
    const box = this.heatmap.canvas.getBoundingClientRect();
    this.#go(this.heatmap.cellAt(event.clientX - box.left, event.clientY - box.top));
  }

  #key(event) {
    if (!this.#matrix || event.altKey || event.ctrlKey || event.metaKey) return;
    const { layers, heads } = this.#matrix;
    const at = Math.max(this.active, 0);
    const [row, column] = [Math.floor(at / heads), at % heads];
    const move = (toRow, toColumn) => {
      const inside = (value, count) => Math.min(count - 1, Math.max(0, value));
      this.#go(inside(toRow, layers.length) * heads + inside(toColumn, heads));
    };
    const keys = {
      ArrowUp: () => move(row - 1, column),
      ArrowDown: () => move(row + 1, column),
      ArrowLeft: () => move(row, column - 1),
      ArrowRight: () => move(row, column + 1),
      PageUp: () => move(row - PAGE, column),
      PageDown: () => move(row + PAGE, column),
      Home: () => move(row, 0),
      End: () => move(row, heads - 1),
      Enter: () => this.actions.select(at),
      " ": () => this.actions.select(at),
      Escape: () => this.actions.leave(),
    };
    const action = keys[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  #go(index, quiet = false) {
    this.active = index;
    this.#describe(quiet);
    this.actions.moved();
  }

  #describe(quiet = false) {
    const known = this.#matrix && this.active >= 0;
    this.tooltip.hidden = !known || quiet;
    if (!known) {
      this.grid.removeAttribute("aria-activedescendant");
      return;
    }
    const { heads } = this.#matrix;
    const { label, lines } = this.actions.describe(this.active);
    this.row.setAttribute("aria-rowindex", String(Math.floor(this.active / heads) + 1));
    this.cell.setAttribute("aria-colindex", String((this.active % heads) + 1));
    this.cell.textContent = `${label}: ${lines.join(", ")}`;
    this.grid.setAttribute("aria-activedescendant", this.cell.id);
    if (!quiet) this.#place(label, lines);
  }

  #place(label, lines) {
    const { tooltip } = this;
    const name = document.createElement("strong");
    name.textContent = label;
    tooltip.replaceChildren(
      name,
      ...lines.map((line) => {
        const element = document.createElement("span");
        element.textContent = line;
        return element;
      }),
    );
    const cell = this.heatmap.rectOf(this.active);
    const { clientWidth } = this.heatmap.host;
    const right = cell.x + cell.width + 10;
    const left = right + tooltip.offsetWidth > clientWidth ? cell.x - tooltip.offsetWidth - 10 : right;
    tooltip.style.left = `${Math.max(0, Math.min(left, clientWidth - tooltip.offsetWidth))}px`;
    tooltip.style.top = `${cell.y + cell.height + (left < 0 ? 8 : 0)}px`;
  }
}
