// The switch between light and dark. A plain script in <head>: it sets the theme before the page is drawn. A button with
// the id "theme" switches; without a choice the page follows the system.
(() => {
  const NAME = "squawq.theme";
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");

  const chosen = () => {
    try {
      return localStorage.getItem(NAME);
    } catch {
      return null; // the browser forbids storage
    }
  };
  const current = () => root.dataset.theme ?? (system.matches ? "dark" : "light");
  const label = () => {
    const button = document.getElementById("theme");
    if (button) {
      const text = current() === "dark" ? "Use light colours" : "Use dark colours";
      button.setAttribute("aria-label", text);
      button.title = text;
    }
  };

  const theme = chosen();
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  system.addEventListener("change", label);
  document.addEventListener("DOMContentLoaded", () => {
    label();
    document.getElementById("theme")?.addEventListener("click", () => {
      root.dataset.theme = current() === "dark" ? "light" : "dark";
      try {
        localStorage.setItem(NAME, root.dataset.theme);
      } catch {
        // the choice holds for this page
      }
      label();
    });
  });
})();
