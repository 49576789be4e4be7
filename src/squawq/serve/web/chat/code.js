// Code blocks: language, copy button, and colours by highlight.js, of which a language is loaded when it first appears.

import { copyButton, element } from "./dom.js";

const MOST = 50_000; // characters that are coloured
const LIBRARY = "../vendor/highlightjs-cdn-assets";
const LANGUAGES = new Set(
  (
    "bash c cpp csharp css diff dockerfile go ini java javascript json python ruby rust shell sql " +
    "typescript xml yaml"
  ).split(" "),
);
/** Other names of the languages. @type {Record<string, string>} */
const ALIASES = {
  ...{ "c#": "csharp", "c++": "cpp", cc: "cpp", console: "shell", cs: "csharp", docker: "dockerfile", golang: "go" },
  ...{ h: "c", hpp: "cpp", html: "xml", js: "javascript", jsonc: "json", jsx: "javascript" },
  ...{ patch: "diff", py: "python", python3: "python", rb: "ruby", rs: "rust", sh: "bash", svg: "xml", toml: "ini" },
  ...{ ts: "typescript", tsx: "typescript", yml: "yaml", zsh: "bash" },
};
/** @type {Map<string, Promise<any>>} */
const loading = new Map();
/** @type {any} */
let highlighter = null;

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
  const known = ALIASES[name.toLowerCase()] ?? name.toLowerCase();
  if (LANGUAGES.has(known) && text.length <= MOST) {
    if (highlighter?.getLanguage(known)) colour(code, known);
    else load(known).then(() => colour(code, known), () => loading.delete(known)); // without it code has no colours
  }
  return block;
}

/** @param {string} language @returns {Promise<void>} */
async function load(language) {
  const modules = [`${LIBRARY}/core.min.js`, `${LIBRARY}/languages/${language}.min.js`];
  if (!loading.has(language)) loading.set(language, Promise.all(modules.map((module) => import(module))));
  const [core, grammar] = await loading.get(language);
  highlighter = core.default;
  if (!highlighter.getLanguage(language)) highlighter.registerLanguage(language, grammar.default);
}

/** @param {HTMLElement} code @param {string} language */
function colour(code, language) {
  code.className = `language-${language}`;
  highlighter.highlightElement(code);
}
