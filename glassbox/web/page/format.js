// Numbers, units, names and times as people read them.

const three = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric" });
const UNITS = { 1: "", "{key}": "keys", "{token}": "tokens", "{row}": "rows" };

/** Three significant digits; a dash for what is no number. */
export function number(value) {
  if (value === null || Number.isNaN(value)) return "–";
  return (Math.abs(value) >= 1e5 ? compact : three).format(value).replace("-", "−");
}

/** With as many decimals as matter on a scale of this span: short, and as long as its neighbours. */
export function inSpan(value, span) {
  const text = value.toFixed(Math.min(4, Math.max(0, 2 - Math.floor(Math.log10(span * 1.0001)))));
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

export function signed(value) {
  const text = number(value);
  return value > 0 ? `+${text}` : text;
}

export function count(value) {
  return whole.format(value);
}

export function unit(ucum) {
  return UNITS[ucum] ?? ucum;
}

export function withUnit(text, ucum) {
  const name = unit(ucum);
  return name && text !== "–" ? `${text} ${name}` : text;
}

/** entropy_ratio -> Entropy ratio */
export function title(name) {
  const words = name.replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
}

export function time(seconds) {
  return clock.format(seconds * 1000);
}

/** With the date if it is not of today. */
export function moment(seconds) {
  const date = new Date(seconds * 1000);
  return date.toDateString() === new Date().toDateString() ? time(seconds) : `${day.format(date)}, ${time(seconds)}`;
}

export function duration(seconds) {
  if (seconds < 90) return `${three.format(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${three.format(seconds / 3600)} h`;
}
