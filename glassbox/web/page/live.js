// The live view: joins the stream, what was seen of it, and the parts that show it.
//
// Each view owns all of its state and touches only the elements of its root, so that two of them can share a page.

import { Access } from "./access.js";
import { Baselines } from "./baseline.js";
import { diverging, sequential } from "./colours.js";
import { Controls } from "./controls.js";
import { moment, number, signed, time, title, withUnit } from "./format.js";
import { Grid } from "./grid.js";
import { Heatmap } from "./heatmap.js";
import { History } from "./history.js";
import { showLegend } from "./legend.js";
import { Login } from "./login.js";
import { difference, KINDS, Matrix } from "./matrix.js";
import { Panel } from "./panel.js";
import { emptyReason, sampledText, windowText } from "./sampled.js";
import { differenceScale, valueScale } from "./scale.js";
import { Status } from "./status.js";
import { Stream } from "./stream.js";

// Numbers over several powers of ten.
const LOGARITHMIC = ["effective_keys", "distance_tokens"];
const HIDDEN_PAUSE_MS = 5 * 60_000;

export class LiveView {
  /** When the view did what, in ms since the page's start, for whoever measures. */
  timing = {};
  #about = null; // the table of statistics
  #clockAheadS = 0; // this machine's clock before the server's
  #newest = null; // {frame, matrix, statistic, phase}: what came last; its matrix is null before there is data
  #shown = null; // the same with {key, window, wanted}: the newest that has rows, which is on the screen
  #painted = null; // {values, scale, baseline, kind}: of #shown
  #headFrame = null; // {histogram, window} of the selected head
  #lastScale = { of: "", scale: null };
  #past = new History();
  #baselines = new Baselines();
  #hiddenTimer = 0;
  #paused = false;

  /**
   * @param {Document | ShadowRoot} root has the elements of `index.html`, by their ids
   * @param {View} view what is looked at
   * @param {(title: string) => void} setTitle is told what is on the screen
   */
  constructor(root, view, setTitle) {
    Object.assign(this, { root, view, setTitle });
    this.heatmap = new Heatmap(this.#element("canvas"), this.#element("map"), () => {
      this.timing.painted ??= performance.now();
    });
    const [select, leave] = [(index) => this.#select(index), () => this.#closeHead()];
    this.panel = new Panel(root, { select, step: (rows, columns) => this.#step(rows, columns), close: leave });
    this.grid = new Grid(
      {
        grid: this.#element("grid"),
        row: this.#element("grid-row"),
        cell: this.#element("grid-cell"),
        tooltip: this.#element("tooltip"),
        heatmap: this.heatmap,
      },
      { describe: (index) => this.#describe(index), select, leave, moved: () => this.#mark() },
    );
    this.controls = new Controls(root, view, {
      repaint: () => this.#shown && this.#render(),
      reconnect: () => this.#reconnect(),
      pin: () => this.#pin(),
      compare: () => this.#compare(view.compare ? "" : "1"),
      unpin: () => this.#unpin(),
    });
    this.status = new Status(this.#element("status"), this.#element("status-text"));
    const access = new Access();
    this.stream = new Stream(
      access,
      (name, data) => this.#onEvent(name, data),
      (state, message, pauseS) => this.#onState(state, message, pauseS),
      (message) => this.#onRefused(message),
      () => this.#onLocked(),
    );
    this.login = new Login(root, access, () => this.#connect());
    this.#watchThePage();
    this.controls.sync();
    this.#connect();
  }

  #element(id) {
    return this.root.getElementById(id);
  }

  #watchThePage() {
    document.addEventListener("themechange", () => {
      this.heatmap.retheme();
      this.panel.retheme();
      if (this.#shown) this.#render();
    });
    document.addEventListener("visibilitychange", () => this.#onVisibility());
    this.view.onChange(() => {
      this.view.read();
      this.controls.sync();
      this.#connect();
    });
    setInterval(() => this.#showStatus(), 1000);
  }

  #onVisibility() {
    clearTimeout(this.#hiddenTimer);
    if (document.hidden) {
      // A forgotten tab must not hold one of the server's places.
      this.#hiddenTimer = setTimeout(() => {
        this.#paused = true;
        this.stream.close();
      }, HIDDEN_PAUSE_MS);
    } else if (this.#paused) {
      this.#paused = false;
      this.#connect();
    }
  }

  /** What is on the screen, as numbers; null before there is anything. */
  get shown() {
    if (!this.#shown) return null;
    const { layers, heads, kinds, startS, timeS } = this.#shown.matrix;
    return { ...this.#painted, layers, heads, kinds, startS, timeS, window: this.#shown.window };
  }

  /** The newest frame of the stream, or null. */
  get frame() {
    return this.#newest?.frame ?? null;
  }

  // ---- the stream

  #connect() {
    this.timing.connected ??= performance.now();
    this.view.write();
    this.#element("snapshot-link").href = this.view.snapshotUrl;
    this.stream.open(this.view.streamUrl);
  }

  /** Something else is looked at: what came of the selected head is of what was looked at before. */
  #reconnect() {
    this.#headFrame = null;
    this.#connect();
  }

  #onEvent(name, data) {
    if (name === "about") this.#onAbout(data);
    else if (name === "frame") this.onFrame(data);
    else if (name === "fault") this.#notify(data.error);
  }

  #onLocked() {
    this.status.turn("locked", "", 0);
    this.#showStatus();
    this.login.show();
  }

  #onAbout(about) {
    this.login.hide();
    this.#about = about;
    this.#clockAheadS = Date.now() / 1000 - about.now_s;
    this.#element("version").textContent = `glassbox ${about.version}`;
    this.controls.offer(about);
  }

  /** Show a frame of the stream. */
  onFrame = (frame) => {
    this.timing.received ??= performance.now();
    const { statistic, phase } = this.view; // the stream is opened anew when they change
    this.controls.offerEngines(frame);
    const matrix = frame.engine && new Matrix(frame.engine, statistic, phase);
    this.#newest = { frame, matrix, statistic, phase };
    if (matrix) this.#take(`${frame.engine.model}|${frame.engine.engine}|${statistic}|${phase}`);
    this.#render();
  };

  /** Remember the newest matrix, and put it on the screen unless what is there tells more. */
  #take(key) {
    const { frame, matrix, statistic, phase } = this.#newest;
    const wanted = this.view.window;
    if (frame.window === wanted) this.#past.add(`${key}|${wanted}`, matrix);
    const histogram = frame.engine.head?.phases[phase].histograms[statistic];
    this.#headFrame = histogram && { histogram, window: frame.window };
    const shown = this.#shown;
    const same = shown?.key === key && shown.wanted === wanted && shown.matrix.matches(matrix);
    // An interval without rows, or the whole time of an API server that has not seen an interval yet, tells less than
    // the interval that is on the screen.
    const better = !same || (matrix.totalRows > 0 && (frame.window === wanted || shown.window !== wanted));
    if (better) this.#shown = { ...this.#newest, key, window: frame.window, wanted };
  }

  #onState(state, message, pauseS) {
    const before = this.status.state;
    const news = this.status.turn(state, message, pauseS);
    if (news) this.#announce(news);
    if (this.#shown && before !== state) this.#render();
    else this.#showStatus();
  }

  #onRefused(message) {
    // A link from another server, say: show what this one has.
    if (this.view.isDefault) return false;
    this.#announce(message);
    this.view.reset();
    this.controls.sync();
    this.#connect();
    return true;
  }

  /** Names what is on the screen, for what is remembered of it. */
  #viewKey() {
    return `${this.#shown.key}|${this.#shown.wanted}`;
  }

  // ---- showing

  #render() {
    const [newest, shown] = [this.#newest, this.#shown];
    const reason = newest ? emptyReason(newest.frame, newest.matrix, newest.phase) : "";
    const usable = shown && shown.matrix.totalRows > 0 && newest.matrix && isOf(newest, shown);
    this.#showStatus();
    this.#notify(usable ? "" : reason);
    const stale = Boolean(usable && (reason || this.status.state === "waiting"));
    this.#element("map").classList.toggle("stale", stale);
    if (!shown) return;
    this.#paintMatrix();
    const waiting = shown.window !== shown.wanted ? " (until the first interval has passed)" : "";
    const lines = [`${windowText(shown.matrix, shown.window)}${waiting}: ${sampledText(shown.frame, shown.matrix, shown.phase)}.`];
    if (usable && reason) lines.push(`Newest interval, until ${time(newest.matrix.timeS)}: ${reason}`);
    if (this.#painted.comparing) lines.push(`The baseline is of ${moment(this.#painted.baseline.timeS)}.`);
    this.#element("sampled").textContent = lines.join(" ");
  }

  #paintMatrix() {
    const { matrix } = this.#shown;
    this.#painted = this.#toPaint();
    const { values, scale, ramp, comparing, kind, statistic, ucum } = this.#painted;
    const heading = `${title(statistic.name)}, ${KINDS[kind].toLowerCase()}${comparing ? ", against the baseline" : ""}`;
    const caption = this.#element("map-title");
    if (caption.textContent !== heading) caption.textContent = heading;
    this.setTitle(title(statistic.name));
    this.heatmap.show({
      layers: matrix.layers,
      heads: matrix.heads,
      values,
      nonfinite: matrix.kinds.nonfinite,
      scale,
      ramp,
      difference: comparing,
    });
    showLegend(this.#element("legend"), { scale, ramp, difference: comparing, name: KINDS[kind], ucum });
    this.controls.show(this.#painted);
    this.grid.show(matrix);
    this.#mark();
    this.#showPanel();
  }

  /** Values, colours and words of the matrix that is on the screen. */
  #toPaint() {
    const { matrix, key } = this.#shown;
    const statistic = this.#about.statistics.find(({ name }) => name === this.#shown.statistic);
    const kind = matrix.kinds[this.view.value] ? this.view.value : "mean";
    const baseline = this.#baselines.of(this.#viewKey(), matrix);
    const comparing = Boolean(this.view.compare && baseline);
    const values = comparing ? difference(matrix.of(kind), baseline.of(kind)) : matrix.of(kind);
    const counting = kind === "rows" || kind === "nonfinite";
    const of = [key, kind, comparing, this.view.fit].join();
    const previous = this.#lastScale.of === of ? this.#lastScale.scale : null;
    const range = counting
      ? { lower: 0, upper: null, log: true, fit: "data" }
      : { lower: statistic.lower, upper: statistic.upper, log: LOGARITHMIC.includes(statistic.name), fit: this.view.fit };
    const scale = comparing ? differenceScale(values, previous) : valueScale(values, range, previous);
    this.#lastScale = { of, scale };
    const ramp = comparing ? diverging() : sequential();
    const ucum = counting ? "{row}" : statistic.unit;
    return { values, scale, ramp, baseline, comparing, counting, kind, statistic, ucum };
  }

  #showPanel() {
    const { matrix } = this.#shown;
    const index = this.#selectedIndex();
    if (index < 0) {
      this.panel.showExtremes(matrix, this.#painted.values, (value) => this.#text(value));
      return;
    }
    this.panel.showHead({
      matrix,
      index,
      statistic: this.#painted.statistic,
      baseline: this.#painted.baseline,
      histogram: this.#headFrame?.histogram ?? null,
      histogramWindow: this.#headFrame?.window === "last" ? "last interval" : "since start",
      history: this.#past.of(this.#viewKey(), index),
    });
  }

  #text(value) {
    return this.#painted.comparing ? signed(value) : withUnit(number(value), this.#painted.ucum);
  }

  #describe(index) {
    const { matrix } = this.#shown;
    const { kind, comparing, baseline, values, ucum } = this.#painted;
    const { layer, head } = matrix.placeOf(index);
    const rows = matrix.kinds.rows[index];
    const bad = matrix.kinds.nonfinite[index];
    const lines = [];
    const value = matrix.of(kind)[index];
    if (rows === 0) lines.push(matrix.unsampled.has(layer) ? "no rows: the layer is left out by sampling.layers" : "no rows");
    else if (Number.isNaN(value)) lines.push("no row with finite scores");
    else lines.push(`${KINDS[kind].toLowerCase()} ${withUnit(number(value), ucum)}`);
    if (comparing) lines.push(`baseline ${number(baseline.of(kind)[index])}, difference ${signed(values[index])}`);
    if (rows > 0 && kind !== "rows") lines.push(`${number(rows)} rows`);
    if (bad > 0) lines.push(`${number(bad)} rows with NaN or Inf`);
    return { label: `Layer ${layer}, head ${head}`, lines };
  }

  #mark() {
    this.heatmap.mark(this.grid.active, this.#shown ? this.#selectedIndex() : -1);
  }

  #showStatus() {
    this.status.show(this.frame, Boolean(this.#newest?.matrix), this.#clockAheadS);
  }

  #notify(message) {
    const notice = this.#element("notice");
    notice.textContent = message;
    notice.hidden = !message;
  }

  #announce(message) {
    this.#element("announce").textContent = message;
  }

  // ---- the baseline

  #pin() {
    if (!this.#shown) return;
    const kept = this.#baselines.pin(this.#viewKey(), this.#shown.matrix);
    this.#compare("1");
    this.#announce(
      kept ? "Pinned; the map shows differences from now on" : "Pinned until this page is left: the browser keeps nothing",
    );
  }

  #unpin() {
    this.#baselines.unpin(this.#viewKey());
    this.#compare("");
    this.controls.focusPin();
    this.#announce("Unpinned");
  }

  #compare(compare) {
    this.view.compare = compare;
    this.view.write();
    this.#render();
  }

  // ---- the head

  #selectedIndex() {
    return this.view.hasHead ? this.#shown.matrix.indexOf(Number(this.view.layer), Number(this.view.head)) : -1;
  }

  #select(index) {
    if (!this.#shown) return;
    const { layer, head } = this.#shown.matrix.placeOf(index);
    [this.view.layer, this.view.head] = [String(layer), String(head)];
    this.#reconnect();
    this.#render();
    this.#announce(`Layer ${layer}, head ${head} is open`);
    const panel = this.#element("panel");
    // On a phone the panel is below the map.
    if (panel.getBoundingClientRect().top > innerHeight - 80) {
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      panel.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
    }
  }

  #step(rows, columns) {
    const { layers, heads } = this.#shown.matrix;
    const index = this.#selectedIndex();
    const row = Math.min(layers.length - 1, Math.max(0, Math.floor(index / heads) + rows));
    const column = Math.min(heads - 1, Math.max(0, (index % heads) + columns));
    this.#select(row * heads + column);
  }

  #closeHead() {
    if (!this.view.hasHead) return;
    const inPanel = this.#element("panel").contains(this.root.activeElement);
    this.view.layer = this.view.head = "";
    this.#reconnect();
    this.#render();
    if (inPanel) this.#element("grid").focus();
    this.#announce("Closed");
  }
}

function isOf(one, other) {
  return one.statistic === other.statistic && one.phase === other.phase;
}
