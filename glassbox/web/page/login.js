// The form that asks for the server's key, shown while the server refuses.

export class Login {
  /**
   * @param {Document | ShadowRoot} root has the form's elements, by their ids
   * @param {Access} access keeps the key
   * @param {() => void} onKey a key was typed, and is kept
   */
  constructor(root, access, onKey) {
    this.access = access;
    [this.form, this.input, this.text] = ["login", "key", "login-text"].map((id) => root.getElementById(id));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      const typed = this.input.value;
      this.input.value = "";
      if (!access.isPossible(typed)) {
        this.#say("A key has printable ASCII characters alone.");
        return;
      }
      access.keep(typed);
      onKey();
    });
  }

  /** Ask for the key; the one that is kept was refused. */
  show() {
    const wrong = this.access.key !== null;
    this.access.keep(null);
    this.form.hidden = false;
    this.#say(wrong ? "This key is not the server's; try another one." : "The server asks for its API key or token.");
    this.input.focus();
  }

  hide() {
    this.form.hidden = true;
  }

  #say(words) {
    this.text.textContent = words;
  }
}
