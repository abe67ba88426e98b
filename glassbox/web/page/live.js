// The live page: joins the stream, what was seen of it, and the parts that show it.

import { Baselines } from "./baseline.js";
import { diverging, sequential } from "./colours.js";
import { moment, number, signed, time, title, withUnit } from "./format.js";
import { Grid } from "./grid.js";
import { Heatmap } from "./heatmap.js";
import { History } from "./history.js";
import { showLegend } from "./legend.js";
import { difference, KINDS, Matrix } from "./matrix.js";
import { Panel } from "./panel.js";
import { emptyReason, sampledText, windowText } from "./sampled.js";
import { differenceScale, valueScale } from "./scale.js";
import { Stream } from "./stream.js";
import { View } from "./view.js";

// Numbers over several powers of ten.
const LOGARITHMIC = new Set(["effective_keys", "distance_tokens"]);
const HIDDEN_PAUSE_MS = 5 * 60_000;

const calm = matchMedia("(prefers-reduced-motion: reduce)");
const $ = (id) => document.getElementById(id);

const view = new View();
const past = new History();
const baselines = new Baselines();
let about = null; // the table of statistics
let clockAheadS = 0; // this machine's clock before the server's
let newest = null; // {frame, matrix, statistic, phase}: what came last; its matrix is null before there is data
let shown = null; // the same with {key, window, wanted}: the newest that has rows, which is on the screen
let painted = null; // {values, scale, baseline, kind}: of `shown`
let headFrame = null; // {histogram, window} of the selected head
let lastScale = { of: "", scale: null };
const timing = {};
let connection = { state: "connecting", message: "", until: 0 };

const heatmap = new Heatmap($("canvas"), $("map"), () => {
  timing.painted ??= performance.now();
});
const panel = new Panel({ select, step, close: closeHead });
const grid = new Grid(
  { grid: $("grid"), row: $("grid-row"), cell: $("grid-cell"), tooltip: $("tooltip"), heatmap },
  { describe, select, leave: closeHead, moved: mark },
);
const stream = new Stream(onEvent, onState, onRefused);

// ---- the stream

function connect() {
  timing.connected ??= performance.now();
  view.write();
  $("snapshot-link").href = view.snapshotUrl;
  stream.open(view.streamUrl);
}

function onEvent(name, data) {
  if (name === "about") onAbout(data);
  else if (name === "frame") onFrame(data);
  else if (name === "fault") notify(data.error);
}

function onAbout(data) {
  about = data;
  clockAheadS = Date.now() / 1000 - about.now_s;
  $("version").textContent = `glassbox ${about.version}`;
  options($("statistic"), about.statistics.map(({ name }) => [name, title(name)]), view.statistic);
  fillStatistic();
}

function onFrame(frame) {
  timing.received ??= performance.now();
  const { statistic, phase } = view; // the stream is opened anew when they change
  const names = frame.engines.map(({ model, engine }) => [`${model}|${engine}`, `${model}, engine ${engine}`]);
  const own = frame.engine ? `${frame.engine.model}|${frame.engine.engine}` : "";
  options($("engine"), names.length ? names : [["", "none yet"]], own);
  const matrix = frame.engine && new Matrix(frame.engine, statistic, phase);
  newest = { frame, matrix, statistic, phase };
  if (matrix) take(`${own}|${statistic}|${phase}`);
  render();
}

/** Remember the newest matrix, and put it on the screen unless what is there tells more. */
function take(key) {
  const { frame, matrix, statistic, phase } = newest;
  if (frame.window === view.window) past.add(`${key}|${view.window}`, matrix);
  const histogram = frame.engine.head?.phases[phase].histograms[statistic];
  headFrame = histogram && { histogram, window: frame.window };
  const same = shown?.key === key && shown.wanted === view.window && shown.matrix.matches(matrix);
  // An interval without rows, or the whole time of an API server that has not seen an interval yet, tells less than the
  // interval that is on the screen.
  const better = !same || (matrix.totalRows > 0 && (frame.window === view.window || shown.window !== view.window));
  if (better) shown = { ...newest, key, window: frame.window, wanted: view.window };
}

function onState(state, message, pauseS) {
  const before = connection.state;
  if (before !== state || connection.message !== message) {
    if (state === "waiting") announce(`No connection: ${message}`);
    if (state === "open" && connection.message) announce("Connected again");
  }
  connection = { state, message: state === "connecting" ? connection.message : message, until: performance.now() + pauseS * 1000 };
  if (shown && before !== state) render();
  else showStatus();
}

function onRefused(message) {
  // A link from another server, say: show what this one has.
  if (view.isDefault) return false;
  announce(message);
  view.reset();
  syncControls();
  connect();
  return true;
}

/** Names what is on the screen, for what is remembered of it. */
function viewKey() {
  return `${shown.key}|${shown.wanted}`;
}

// ---- showing

function render() {
  const reason = newest ? emptyReason(newest.frame, newest.matrix, newest.phase) : "";
  const usable = shown && shown.matrix.totalRows > 0 && newest.matrix && isOf(newest, shown);
  showStatus();
  notify(usable ? "" : reason);
  $("map").classList.toggle("stale", Boolean(usable && (reason || connection.state === "waiting")));
  if (!shown) return;
  paintMatrix();
  const waiting = shown.window !== shown.wanted ? " (until the first interval has passed)" : "";
  const lines = [`${windowText(shown.matrix, shown.window)}${waiting}: ${sampledText(shown.frame, shown.matrix, shown.phase)}.`];
  if (usable && reason) lines.push(`Newest interval, until ${time(newest.matrix.timeS)}: ${reason}`);
  if (painted.comparing) lines.push(`The baseline is of ${moment(painted.baseline.timeS)}.`);
  $("sampled").textContent = lines.join(" ");
}

function isOf(one, other) {
  return one.statistic === other.statistic && one.phase === other.phase;
}

function paintMatrix() {
  const { matrix } = shown;
  const statistic = about.statistics.find(({ name }) => name === shown.statistic);
  const kind = matrix.kinds[view.value] ? view.value : "mean";
  const baseline = baselines.of(viewKey(), matrix);
  const comparing = Boolean(view.compare && baseline);
  const values = comparing ? difference(matrix.of(kind), baseline.of(kind)) : matrix.of(kind);
  const counting = kind === "rows" || kind === "nonfinite";
  const of = [shown.key, kind, comparing, view.fit].join();
  const previous = lastScale.of === of ? lastScale.scale : null;
  const range = counting
    ? { lower: 0, upper: null, log: true, fit: "data" }
    : { lower: statistic.lower, upper: statistic.upper, log: LOGARITHMIC.has(statistic.name), fit: view.fit };
  const scale = comparing ? differenceScale(values, previous) : valueScale(values, range, previous);
  lastScale = { of, scale };
  const ramp = comparing ? diverging() : sequential();
  painted = { values, scale, ramp, baseline, comparing, kind, statistic, ucum: counting ? "{row}" : statistic.unit };

  const heading = `${title(statistic.name)}, ${KINDS[kind].toLowerCase()}${comparing ? ", against the baseline" : ""}`;
  if ($("map-title").textContent !== heading) $("map-title").textContent = heading;
  document.title = `${title(statistic.name)} · glassbox live`;
  heatmap.show({
    layers: matrix.layers,
    heads: matrix.heads,
    values,
    nonfinite: matrix.kinds.nonfinite,
    scale,
    ramp,
    difference: comparing,
  });
  showLegend($("legend"), { scale, ramp, difference: comparing, name: KINDS[kind], ucum: painted.ucum });
  $("fit").disabled = comparing || counting || statistic.lower === null || statistic.upper === null;
  showBaselineButtons();
  grid.show(matrix);
  mark();
  showPanel();
}

function showPanel() {
  const { matrix } = shown;
  const index = selectedIndex();
  if (index < 0) {
    panel.showExtremes(matrix, painted.values, text);
    return;
  }
  panel.showHead({
    matrix,
    index,
    statistic: painted.statistic,
    baseline: painted.baseline,
    histogram: headFrame?.histogram ?? null,
    histogramWindow: headFrame?.window === "last" ? "last interval" : "since start",
    history: past.of(viewKey(), index),
  });
}

function text(value) {
  return painted.comparing ? signed(value) : withUnit(number(value), painted.ucum);
}

function describe(index) {
  const { matrix } = shown;
  const { layer, head } = matrix.placeOf(index);
  const rows = matrix.kinds.rows[index];
  const bad = matrix.kinds.nonfinite[index];
  const lines = [];
  const value = matrix.of(painted.kind)[index];
  if (rows === 0) lines.push(matrix.unsampled.has(layer) ? "no rows: the layer is left out by sampling.layers" : "no rows");
  else if (Number.isNaN(value)) lines.push("no row with finite scores");
  else lines.push(`${KINDS[painted.kind].toLowerCase()} ${withUnit(number(value), painted.ucum)}`);
  if (painted.comparing) {
    lines.push(`baseline ${number(painted.baseline.of(painted.kind)[index])}, difference ${signed(painted.values[index])}`);
  }
  if (rows > 0 && painted.kind !== "rows") lines.push(`${number(rows)} rows`);
  if (bad > 0) lines.push(`${number(bad)} rows with NaN or Inf`);
  return { label: `Layer ${layer}, head ${head}`, lines };
}

function mark() {
  heatmap.mark(grid.active, shown ? selectedIndex() : -1);
}

function showStatus() {
  const { state, message, until } = connection;
  const element = $("status");
  let [kind, words] = ["connecting", "Connecting"];
  if (state === "waiting") {
    kind = "gone";
    const left = Math.max(0, Math.ceil((until - performance.now()) / 1000));
    words = `No connection: ${message}. Trying again${left ? ` in ${left} s` : ""}`;
  } else if (state === "open" && newest?.matrix) {
    const { frame } = newest;
    const age = Date.now() / 1000 - clockAheadS - frame.engine.time_s;
    const idle = age > Math.max(20, 3 * frame.interval_s) || (frame.window === "last" && !frame.engine.steps);
    kind = idle ? "idle" : "live";
    words = idle ? `Idle, newest data of ${moment(frame.engine.time_s)}` : `Live, every ${number(frame.interval_s)} s`;
  } else if (state === "open") {
    [kind, words] = ["idle", "Connected, no data yet"];
  } else if (connection.message) {
    [kind, words] = ["gone", "Connecting again"];
  } else if (newest) {
    return; // another selection: a moment without a stream is no news
  }
  element.dataset.state = kind;
  if ($("status-text").textContent !== words) $("status-text").textContent = words;
}

function notify(message) {
  $("notice").textContent = message;
  $("notice").hidden = !message;
}

function announce(message) {
  $("announce").textContent = message;
}

// ---- controls

function options(select, entries, chosen) {
  const key = JSON.stringify(entries);
  if (select.dataset.key !== key) {
    select.dataset.key = key;
    select.replaceChildren(...entries.map(([value, name]) => new Option(name, value)));
  }
  if (select.value !== chosen) select.value = chosen;
}

/** What depends on the statistic: its meaning, its phases, the values it has. */
function fillStatistic() {
  const statistic = about.statistics.find(({ name }) => name === view.statistic);
  $("meaning").textContent = statistic.meaning;
  options($("phase"), statistic.phases.map((phase) => [phase, title(phase)]), view.phase);
  const kinds = Object.entries(KINDS).filter(([kind]) => kind !== "window_max" || statistic.name === "max_logit");
  options($("value"), kinds, kinds.some(([kind]) => kind === view.value) ? view.value : "mean");
  view.value = $("value").value;
}

function syncControls() {
  for (const name of ["statistic", "value", "phase", "window", "fit"]) $(name).value = view[name];
}

function showBaselineButtons() {
  const pinned = painted.baseline;
  $("compare").disabled = !pinned;
  $("compare").setAttribute("aria-pressed", String(painted.comparing));
  $("compare").title = pinned ? `Pinned at ${moment(pinned.timeS)}` : "Nothing is pinned for this view";
  $("unpin").hidden = !pinned;
}

for (const name of ["value", "fit"]) {
  $(name).addEventListener("change", () => {
    view[name] = $(name).value;
    view.write();
    if (shown) render();
  });
}

for (const name of ["statistic", "phase", "window"]) {
  $(name).addEventListener("change", () => {
    view[name] = $(name).value;
    const phases = about?.statistics.find((entry) => entry.name === view.statistic)?.phases ?? [];
    if (phases.length && !phases.includes(view.phase)) [view.phase] = phases;
    if (about) fillStatistic();
    headFrame = null;
    connect();
  });
}

$("engine").addEventListener("change", () => {
  const at = $("engine").value.lastIndexOf("|");
  [view.model, view.engine] = [$("engine").value.slice(0, at), $("engine").value.slice(at + 1)];
  headFrame = null;
  connect();
});

$("controls").addEventListener("submit", (event) => event.preventDefault());

$("pin").addEventListener("click", () => {
  if (!shown) return;
  const kept = baselines.pin(viewKey(), shown.matrix);
  view.compare = "1";
  view.write();
  render();
  announce(kept ? "Pinned; the map shows differences from now on" : "Pinned until this page is left: the browser keeps nothing");
});

$("compare").addEventListener("click", () => {
  view.compare = view.compare ? "" : "1";
  view.write();
  render();
});

$("unpin").addEventListener("click", () => {
  baselines.unpin(viewKey());
  view.compare = "";
  view.write();
  render();
  $("pin").focus();
  announce("Unpinned");
});

// ---- the head

function selectedIndex() {
  return view.hasHead ? shown.matrix.indexOf(Number(view.layer), Number(view.head)) : -1;
}

function select(index) {
  if (!shown) return;
  const { layer, head } = shown.matrix.placeOf(index);
  [view.layer, view.head] = [String(layer), String(head)];
  headFrame = null;
  connect();
  render();
  announce(`Layer ${layer}, head ${head} is open`);
  const { top } = $("panel").getBoundingClientRect();
  // On a phone the panel is below the map.
  if (top > innerHeight - 80) $("panel").scrollIntoView({ block: "nearest", behavior: calm.matches ? "auto" : "smooth" });
}

function step(rows, columns) {
  const { layers, heads } = shown.matrix;
  const index = selectedIndex();
  const row = Math.min(layers.length - 1, Math.max(0, Math.floor(index / heads) + rows));
  const column = Math.min(heads - 1, Math.max(0, (index % heads) + columns));
  select(row * heads + column);
}

function closeHead() {
  if (!view.hasHead) return;
  const inPanel = $("panel").contains(document.activeElement);
  view.layer = view.head = "";
  headFrame = null;
  connect();
  render();
  if (inPanel) $("grid").focus();
  announce("Closed");
}

// ---- the page

document.addEventListener("themechange", () => {
  heatmap.retheme();
  panel.retheme();
  if (shown) render();
});

let hiddenTimer = 0;
let paused = false;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiddenTimer);
  if (document.hidden) {
    // A forgotten tab must not hold one of the server's places.
    hiddenTimer = setTimeout(() => {
      paused = true;
      stream.close();
    }, HIDDEN_PAUSE_MS);
  } else if (paused) {
    paused = false;
    connect();
  }
});

addEventListener("hashchange", () => {
  view.read();
  syncControls();
  connect();
});

setInterval(showStatus, 1000);
syncControls();
connect();

// For the console and for tests: what is on the screen, as numbers, and when the page did what (ms after its start).
globalThis.glassbox = {
  timing,
  heatmap,
  onFrame,
  get frame() {
    return newest?.frame ?? null;
  },
  get shown() {
    if (!shown) return null;
    const { layers, heads, kinds, startS, timeS } = shown.matrix;
    return { ...painted, layers, heads, kinds, startS, timeS, window: shown.window };
  },
};
