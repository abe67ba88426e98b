// The line at the top: whether the stream is open, and how new the data is.

import { moment, number } from "./format.js";

export class Status {
  #connection = { state: "connecting", message: "", until: 0 };

  /**
   * @param {HTMLElement} element its `data-state` colours the line
   * @param {HTMLElement} text
   */
  constructor(element, text) {
    Object.assign(this, { element, text });
  }

  get state() {
    return this.#connection.state;
  }

  /**
   * The stream's state is another one.
   *
   * @param {"connecting" | "open" | "waiting" | "locked"} state
   * @param {string} message why it waits
   * @param {number} pauseS until it connects again
   * @returns {string} what is news to somebody who does not see the line; "" if nothing
   */
  turn(state, message, pauseS) {
    const before = this.#connection;
    const changed = before.state !== state || before.message !== message;
    // While it connects again the reason is still the one that it waited for.
    this.#connection = {
      state,
      message: state === "connecting" ? before.message : message,
      until: performance.now() + pauseS * 1000,
    };
    if (changed && state === "waiting") return `No connection: ${message}`;
    return changed && state === "open" && before.message ? "Connected again" : "";
  }

  /**
   * @param {object | null} frame the newest
   * @param {boolean} hasData false while the frame is without an engine
   * @param {number} clockAheadS this machine's clock before the server's
   */
  show(frame, hasData, clockAheadS) {
    const { state, message, until } = this.#connection;
    let [kind, words] = ["connecting", "Connecting"];
    if (state === "locked") {
      [kind, words] = ["gone", "Locked"];
    } else if (state === "waiting") {
      kind = "gone";
      const left = Math.max(0, Math.ceil((until - performance.now()) / 1000));
      words = `No connection: ${message}. Trying again${left ? ` in ${left} s` : ""}`;
    } else if (state === "open" && hasData) {
      const age = Date.now() / 1000 - clockAheadS - frame.engine.time_s;
      const idle = age > Math.max(20, 3 * frame.interval_s) || (frame.window === "last" && !frame.engine.steps);
      kind = idle ? "idle" : "live";
      words = idle ? `Idle, newest data of ${moment(frame.engine.time_s)}` : `Live, every ${number(frame.interval_s)} s`;
    } else if (state === "open") {
      [kind, words] = ["idle", "Connected, no data yet"];
    } else if (message) {
      [kind, words] = ["gone", "Connecting again"];
    } else if (frame) {
      return; // another selection: a moment without a stream is no news
    }
    this.element.dataset.state = kind;
    if (this.text.textContent !== words) this.text.textContent = words;
  }
}
