// The colour scheme: the system's, or the one that was chosen here before. A classic script in the head, so that the
// page is never painted in the wrong one.
(() => {
  const KEY = "glassbox.theme";
  const root = document.documentElement;

  function read() {
    try {
      return localStorage.getItem(KEY) ?? "system";
    } catch {
      return "system"; // storage is blocked
    }
  }

  function apply(theme) {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
    document.dispatchEvent(new Event("themechange"));
  }

  apply(read());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => apply(read()));
  addEventListener("DOMContentLoaded", () => {
    const select = document.getElementById("theme");
    select.value = root.dataset.theme ?? "system";
    select.addEventListener("change", () => {
      try {
        localStorage.setItem(KEY, select.value);
      } catch {
        // Storage is blocked: the choice holds until the page is left.
      }
      apply(select.value);
    });
  });
})();
