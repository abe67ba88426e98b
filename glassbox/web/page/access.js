// The key of a server that wants one: typed by the user, kept for the tab, sent in a header and never in an address.

// The page of a traced request (../locked_page.html) finds it under this name.
const NAME = "glassbox.key";

export class Access {
  #typed = null; // where the browser keeps nothing: until the page is left

  /** The key, or null. */
  get key() {
    try {
      return sessionStorage.getItem(NAME) ?? this.#typed;
    } catch {
      return this.#typed;
    }
  }

  /** Keep a key; null forgets it. */
  keep(key) {
    this.#typed = key;
    try {
      if (key === null) sessionStorage.removeItem(NAME);
      else sessionStorage.setItem(NAME, key);
    } catch {
      // Blocked: #typed has it.
    }
  }

  /** Whether a header can hold it. */
  isPossible(key) {
    return /^[\x21-\x7e]+$/.test(key);
  }

  /** These headers, with the key if there is one. */
  authorised(headers) {
    const { key } = this;
    return key === null ? headers : { ...headers, Authorization: `Bearer ${key}` };
  }
}
