// The server's events, for as long as the page is looked at: connects, reads, notices silence, connects again.
//
// fetch instead of EventSource, which hides the answer's status: "too many pages look" could not be shown.

const LONGEST_PAUSE_S = 10;
// The server sends something every 15 s.
const SILENCE_S = 40;

export class Stream {
  #abort = null;
  #timer = 0;
  #silence = 0;
  #failures = 0;
  #url = "";

  /**
   * @param {Access} access has the server's key
   * @param {(name: string, data: object) => void} onEvent
   * @param {(state: "connecting" | "open" | "waiting", message: string, pauseS: number) => void} onState
   * @param {(message: string) => boolean} onRefused the address asks for something that the server does not have; true
   *     if another one has been opened
   * @param {() => void} onLocked the server wants another key than the one that is kept
   */
  constructor(access, onEvent, onState, onRefused, onLocked) {
    Object.assign(this, { access, onEvent, onState, onRefused, onLocked });
    addEventListener("online", () => this.#abort === null && this.#url && this.open(this.#url));
  }

  /** Read from this address from now on, and from no other. */
  open(url) {
    this.close();
    this.#url = url;
    const abort = new AbortController();
    this.#abort = abort;
    this.onState("connecting", "", 0);
    this.#read(url, abort)
      .then(() => "the server ended the stream")
      .catch((error) => (error instanceof TypeError ? "the server does not answer" : error.message))
      .then((message) => abort === this.#abort && message && this.#retry(message));
  }

  close() {
    clearTimeout(this.#timer);
    clearTimeout(this.#silence);
    this.#abort?.abort();
    this.#abort = null;
    this.#url = "";
  }

  #retry(message) {
    const url = this.#url;
    this.close();
    this.#url = url;
    this.#failures += 1;
    const pauseS = Math.min(LONGEST_PAUSE_S, 2 ** (this.#failures - 1));
    this.onState("waiting", message, pauseS);
    this.#timer = setTimeout(() => this.open(url), pauseS * 1000);
  }

  async #read(url, abort) {
    const headers = this.access.authorised({ Accept: "text/event-stream" });
    const answer = await fetch(url, { signal: abort.signal, headers, cache: "no-store" });
    if (answer.status === 401 && abort === this.#abort) {
      this.close();
      this.onLocked();
      return;
    }
    if (!answer.ok) {
      const text = await answer.text();
      let message = `the server answered ${answer.status}`;
      try {
        message = JSON.parse(text).error ?? message;
      } catch {
        // Not glassbox's own answer but, say, a proxy's: the status has to do.
      }
      const elsewhere = answer.status === 400 && abort === this.#abort && this.onRefused(message);
      throw new Error(elsewhere ? "" : message);
    }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      this.#expectSomething(abort);
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const text of events) if (abort === this.#abort) this.#handle(text);
    }
  }

  #expectSomething(abort) {
    clearTimeout(this.#silence);
    this.#silence = setTimeout(() => abort.abort(new Error("the server is silent")), SILENCE_S * 1000);
  }

  #handle(text) {
    let [name, data] = ["message", ""];
    for (const line of text.split("\n")) {
      if (line.startsWith("event: ")) name = line.slice(7);
      else if (line.startsWith("data: ")) data += line.slice(6);
    }
    if (!data) return;
    this.#failures = 0;
    this.onState("open", "", 0);
    this.onEvent(name, JSON.parse(data));
  }
}
