// What the user looks at: the selection, kept in an address (the page's own, say) so that it can be sent to somebody.

const DEFAULTS = {
  statistic: "entropy_ratio",
  value: "mean",
  phase: "decode",
  window: "last",
  fit: "full",
  model: "",
  engine: "",
  layer: "",
  head: "",
  compare: "",
};

export class View {
  #address;

  /**
   * @param {{read: () => string, write: (text: string) => void, onChange: (changed: () => void) => void}} address keeps
   *     the selection as a query; `changed` is called when somebody else has written it
   */
  constructor(address) {
    this.#address = address;
    this.read();
  }

  onChange(changed) {
    this.#address.onChange(changed);
  }

  /** Take over what the address says. */
  read() {
    const given = new URLSearchParams(this.#address.read());
    for (const [name, value] of Object.entries(DEFAULTS)) this[name] = given.get(name) ?? value;
    if (!["last", "total"].includes(this.window)) this.window = DEFAULTS.window;
    if (!/^\d{1,6}$/.test(this.layer) || !/^\d{1,6}$/.test(this.head)) this.layer = this.head = "";
  }

  get isDefault() {
    return Object.entries(DEFAULTS).every(([name, value]) => this[name] === value);
  }

  reset() {
    Object.assign(this, DEFAULTS);
  }

  write() {
    const changed = Object.entries(DEFAULTS).filter(([name, value]) => this[name] !== value);
    this.#address.write(new URLSearchParams(changed.map(([name]) => [name, this[name]])).toString());
  }

  get hasHead() {
    return this.layer !== "";
  }

  #query(...names) {
    return new URLSearchParams(names.filter((name) => this[name] !== "").map((name) => [name, this[name]])).toString();
  }

  get streamUrl() {
    return `v1/stream?${this.#query("statistic", "phase", "window", "model", "engine", "layer", "head")}`;
  }

  get snapshotUrl() {
    return `v1/snapshot?${this.#query("statistic", "phase", "model", "engine", "layer", "head")}`;
  }
}
