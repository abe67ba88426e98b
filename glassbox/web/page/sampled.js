// The line below the map: what the numbers are made of, so that an empty cell is understood.

import { count, duration, moment, number, time } from "./format.js";

function plural(n, word) {
  return `${count(n)} ${word}${n === 1 ? "" : "s"}`;
}

/** Which time a matrix covers. */
export function windowText(matrix, window) {
  const span = `${moment(matrix.startS)} to ${time(matrix.timeS)} (${duration(Math.max(0, matrix.timeS - matrix.startS))})`;
  return window === "last" ? `Last interval, ${span}` : `Since start, ${span}`;
}

function reasons(engine) {
  return Object.keys(engine.layers_bypassed_by_reason).join(", ");
}

/** Layers whose output was not reproduced, the first three by name. */
function wrongText(engine) {
  const named = engine.wrong_layers.slice(0, 3).map((one) => `layer ${one.layer} of rank ${one.rank} on ${one.host}`);
  const more = engine.wrong_layers.length - named.length;
  return `wrong output: ${named.join(", ")}${more ? ` and ${count(more)} more` : ""}`;
}

/** How many rows a matrix is made of and why not more. */
export function sampledText(frame, matrix, phase) {
  const engine = frame.engine;
  const heads = matrix.kinds.rows.filter((rows) => rows > 0).length;
  const parts = [
    `${count(matrix.totalRows)} ${phase} rows in ${count(heads)} of ${plural(matrix.size, "head")}`,
    `${count(engine.sampled_steps)} of ${plural(engine.steps, "step")} measured (sample rate ${number(engine.sample_rate)})`,
  ];
  if (matrix.unsampled.size) parts.push(`${plural(matrix.unsampled.size, "layer")} left out by sampling.layers`);
  if (engine.layers_bypassed) parts.push(`${plural(engine.layers_bypassed, "layer")} not observed (${reasons(engine)})`);
  if (engine.wrong_layers.length) parts.push(wrongText(engine));
  if (matrix.totalNonfinite) parts.push(`${plural(matrix.totalNonfinite, "row")} with NaN or Inf`);
  return parts.join(" · ");
}

/** Why a frame has no rows at all; "" if it has some. */
export function emptyReason(frame, matrix, phase) {
  if (!frame.enabled) return "glassbox is switched off: enabled is false in its configuration.";
  if (!frame.engine) return "No data yet. The first snapshot comes when vLLM has warmed up.";
  if (matrix.totalRows) return "";
  if (frame.configured_sample_rate === 0) return "Nothing is measured: sample_rate is 0.";
  const { steps, sampled_steps: sampled, sample_rate: rate } = frame.engine;
  if (!steps) return "The server ran no step: there was nothing to do.";
  if (!sampled) return `None of ${plural(steps, "step")} was measured at sample rate ${number(rate)}.`;
  return `The ${plural(sampled, "measured step")} had no ${phase} rows.`;
}
