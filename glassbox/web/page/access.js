// The key of a server that wants one: typed by the user, kept for the tab, sent in a header and never in an address.

// The page of a traced request (../locked_page.html) finds it under this name.
const NAME = "glassbox.key";
let typed = null; // where the browser keeps nothing: until the page is left

/** The key, or null. */
export function key() {
  try {
    return sessionStorage.getItem(NAME) ?? typed;
  } catch {
    return typed;
  }
}

/** Keep a key; null forgets it. */
export function keep(value) {
  typed = value;
  try {
    if (value === null) sessionStorage.removeItem(NAME);
    else sessionStorage.setItem(NAME, value);
  } catch {
    // Blocked: `typed` has it.
  }
}

/** Whether a header can hold it. */
export function isPossible(value) {
  return /^[\x21-\x7e]+$/.test(value);
}

/** These headers, with the key if there is one. */
export function authorised(headers) {
  const value = key();
  return value === null ? headers : { ...headers, Authorization: `Bearer ${value}` };
}
