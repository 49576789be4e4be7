// Code blocks: language, copy button, and colours by highlight.js, which is loaded when the first block appears.

import { copyButton, element } from "./dom.js";

const MOST = 50_000; // characters that are coloured
/** @type {any} */
let highlighter = null;
/** @type {Promise<void> | null} */
let loading = null;

/**
 * @param {string} text
 * @param {string} language As the model named it; may be empty.
 * @returns {HTMLElement}
 */
export function codeBlock(text, language) {
  const code = element("code", { text });
  const name = language.slice(0, 30);
  const block = element(
    "div",
    { class: "code" },
    element("div", { class: "code-head" }, element("span", { text: name || "text" }), copyButton("Copy code", () => text)),
    element("pre", { tabindex: "0", role: "region", "aria-label": name ? `Code in ${name}` : "Code" }, code),
  );
  if (name && text.length <= MOST) {
    if (highlighter) colour(code, name);
    else load().then(() => colour(code, name));
  }
  return block;
}

function load() {
  loading ??= import("../vendor/highlightjs-cdn-assets/highlight.min.js").then(
    (module) => void (highlighter = module.default),
    () => void (loading = null), // without it code has no colours
  );
  return loading;
}

/** @param {HTMLElement} code @param {string} language */
function colour(code, language) {
  if (!highlighter?.getLanguage(language)) return;
  code.className = `language-${language}`;
  highlighter.highlightElement(code);
}
