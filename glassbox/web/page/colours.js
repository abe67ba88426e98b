// Colour scales and the page's colours as the canvas needs them.
//
// viridis: Stéfan van der Walt and Nathaniel Smith, CC0, its 11 evenly spaced control points. vik and berlin: Fabio
// Crameri, Scientific colour maps (MIT), likewise; the one has a light middle, the other a dark one. All three are
// perceptually uniform and can be told apart with any kind of colour blindness.

const VIRIDIS = "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725";
const VIK = "001261 023a7b 116496 5496b7 a7c9da ece5e0 e1b8a0 cd8961 b75a26 852206 590008";
const BERLIN = "9eb0ff 60a5df 3280a6 20526a 112732 190c09 371000 5f1f0a 964a36 ca7b71 ffadad";
const STEPS = 256;

/** 256 colours, interpolated between control points; `rgb` holds three bytes of each. */
class Ramp {
  constructor(points) {
    const stops = points.split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
    this.rgb = new Uint8ClampedArray(STEPS * 3);
    for (let step = 0; step < STEPS; step += 1) {
      const place = (step / (STEPS - 1)) * (stops.length - 1);
      const left = Math.min(Math.floor(place), stops.length - 2);
      for (let channel = 0; channel < 3; channel += 1) {
        const [from, to] = [stops[left][channel], stops[left + 1][channel]];
        this.rgb[step * 3 + channel] = from + (to - from) * (place - left);
      }
    }
  }

  /** Where a position, 0 to 1, lies in `rgb`. */
  offset(position) {
    return Math.round(Math.min(1, Math.max(0, position)) * (STEPS - 1)) * 3;
  }

  css(position) {
    const at = this.offset(position);
    return `rgb(${this.rgb[at]} ${this.rgb[at + 1]} ${this.rgb[at + 2]})`;
  }

  /** Black or white, whichever can be read on the colour (relative luminance of WCAG 2). */
  ink(position) {
    const at = this.offset(position);
    const [r, g, b] = [0, 1, 2].map((channel) => {
      const share = this.rgb[at + channel] / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
  }

  /** A CSS gradient from left to right. */
  gradient() {
    const stops = Array.from({ length: 21 }, (_, i) => this.css(i / 20));
    return `linear-gradient(to right, ${stops.join(", ")})`;
  }
}

const ramps = { viridis: new Ramp(VIRIDIS), vik: new Ramp(VIK), berlin: new Ramp(BERLIN) };

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

export function sequential() {
  return ramps.viridis;
}

export function diverging() {
  return isDark() ? ramps.berlin : ramps.vik;
}

/** Colours of the style sheet by name (`ink` for `--ink`), as the browser resolves them in this theme. */
export function paint(...names) {
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  const found = {};
  for (const name of names) {
    probe.style.color = `var(--${name})`;
    found[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return found;
}
