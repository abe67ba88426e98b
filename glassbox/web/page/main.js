// The live page: one live view over the whole document, whose selection is the page's address.

import { LiveView } from "./live.js";
import { View } from "./view.js";

// For the console and for tests: what is on the screen, as numbers, and when the page did what (ms after its start).
globalThis.glassbox = new LiveView(
  document,
  new View({
    read: () => location.hash.slice(1),
    write: (text) => history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search),
    onChange: (changed) => addEventListener("hashchange", changed),
  }),
  (title) => {
    document.title = `${title} · glassbox live`;
  },
);
