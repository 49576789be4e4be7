// The API page: Swagger UI shows /openapi.json, and sends its requests with the API key.

import { ask } from "../key.js";

const DOCUMENT = "/openapi.json";
const LABELS = { ".body-param__text": "Request body", ".examples-select-element": "Example" }; // which Swagger UI leaves out

async function show() {
  const target = /** @type {HTMLElement} */ (document.getElementById("api"));
  const response = await ask(DOCUMENT);
  if (!response.ok) throw new Error(`${DOCUMENT} answers with status ${response.status}.`);
  globalThis.SwaggerUIBundle({
    spec: await response.json(),
    domNode: target,
    validatorUrl: null, // else a badge is loaded from elsewhere
    tryItOutEnabled: true,
    syntaxHighlight: { theme: "obsidian" },
    displayRequestDuration: true,
    defaultModelsExpandDepth: 0,
    requestInterceptor: (request) => Object.assign(request, { userFetch: ask }),
  });
  new MutationObserver(() => label(target)).observe(target, { childList: true, subtree: true });
}

/** @param {HTMLElement} target */
function label(target) {
  for (const [selector, text] of Object.entries(LABELS)) {
    for (const field of target.querySelectorAll(`${selector}:not([aria-label])`)) field.setAttribute("aria-label", text);
  }
}

/** Swagger UI's dark mode is a class; ours is an attribute, or the system's. */
function followTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => root.classList.toggle("dark-mode", (root.dataset.theme ?? (system.matches ? "dark" : "")) === "dark");
  new MutationObserver(apply).observe(root, { attributeFilter: ["data-theme"] });
  system.addEventListener("change", apply);
  apply();
}

followTheme();
show().catch((error) => {
  const note = /** @type {HTMLElement} */ (document.getElementById("problem"));
  note.textContent = error instanceof TypeError ? "The server cannot be reached. Reload the page to try again." : error.message;
  note.hidden = false;
});
