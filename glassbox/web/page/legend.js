// The legend: the colour bar with ticks and unit, and what the marks mean.

import { number, signed, unit } from "./format.js";

/**
 * @param {HTMLElement} element
 * @param {{scale: object, ramp: object, difference: boolean, name: string, ucum: string}} shown
 */
export function showLegend(element, { scale, ramp, difference, name, ucum }) {
  const gradient = ramp.gradient();
  const key = [scale.low, scale.high, scale.log, difference, name, ucum, gradient].join();
  if (element.dataset.key === key) return;
  element.dataset.key = key;
  const caption = make("div", "caption", [name, unit(ucum) && `in ${unit(ucum)}`].filter(Boolean).join(", "));
  const bar = make("div", "bar");
  bar.style.background = gradient;
  const ticks = make("div", "ticks");
  for (const value of scale.ticks()) {
    const at = scale.position(value);
    if (at < -0.001 || at > 1.001) continue;
    const tick = make("span", "", difference ? signed(value) : number(value));
    tick.style.left = `${100 * at}%`;
    ticks.append(tick);
  }
  const marks = make("div", "marks");
  marks.append(mark("no-rows", "no rows"), mark("some-bad", "some rows NaN or Inf"), mark("all-bad", "only NaN or Inf"));
  element.replaceChildren(caption, bar, ticks, marks);
}

function mark(kind, text) {
  const entry = make("span", "mark", text);
  entry.prepend(make("span", `swatch ${kind}`));
  return entry;
}

function make(tag, name, text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
}
