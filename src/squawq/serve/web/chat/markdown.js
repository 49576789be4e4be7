// Shows markdown that a model wrote. The text is untrusted: HTML in it is shown as text, images become links, and what
// remains passes DOMPurify. The content security policy is a second wall.

import { Marked } from "../vendor/marked/marked.esm.js";
import "../vendor/dompurify/purify.min.js";
import { codeBlock } from "./code.js";
import { element } from "./dom.js";

const MOST = 200_000; // characters that are shown as markdown; longer texts are shown as they are
const PLAIN_HTML = /^<\/?(?:br|sub|sup|kbd|mark)\s*\/?>$/i; // HTML that models write into tables and formulas
const DEFINITION = /^ {0,3}\[[^\]\n]+\]:/m; // of a link, for [text][name]
const SAFE_LINK = /^(?:https?:|mailto:)/i;
const TAGS =
  "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr kbd li mark ol p pre strong sub sup table tbody td th thead tr ul";
const SANITIZING = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["align", "data-language", "href", "start", "title"],
  ADD_URI_SAFE_ATTR: ["align", "data-language", "start"], // all other attributes' values must be links
  ALLOWED_URI_REGEXP: SAFE_LINK,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => (PLAIN_HTML.test(text.trim()) ? text : escape(text)),
    image: ({ href, text }) => link(href, escape(text || "image")),
    link({ href, tokens }) {
      return link(href, this.parser.parseInline(tokens));
    },
    code: ({ text, lang }) => `<pre data-language="${escape(/^\S*/.exec(lang ?? "")?.[0] ?? "")}"><code>${escape(text)}</code></pre>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

/** Markdown in an element. While a text grows, only the blocks that changed are made again. */
export class MarkdownView {
  /** @param {HTMLElement} container */
  constructor(container) {
    this.container = container;
    /** @type {string[]} */
    this.blocks = []; // the markdown of each block that is shown
  }

  /** @param {string} text @param {boolean} [grows] Whether it is not complete yet. */
  show(text, grows = false) {
    const blocks = text.length > MOST ? null : lex(text);
    if (!grows && DEFINITION.test(text)) this.blocks = []; // earlier blocks may have links that later ones define
    if (blocks === null) {
      this.blocks = [];
      this.container.replaceChildren(element("div", { class: "plain", text }));
      return;
    }
    let same = 0;
    while (same < blocks.length && this.blocks[same] === blocks[same].raw) same++;
    if (same === 0) this.container.replaceChildren();
    while (this.container.children.length > same) this.container.lastElementChild?.remove();
    for (const block of blocks.slice(same)) this.container.append(render(block));
    this.blocks = blocks.map((block) => block.raw);
  }
}

/** @param {string} text @returns {any[] | null} The text's blocks; null if it nests too deeply. */
function lex(text) {
  try {
    return marked.lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
  } catch {
    return null;
  }
}

/** @param {any} block @returns {HTMLElement} */
function render(block) {
  const made = element("div", { class: "block" });
  try {
    const html = marked.parser([block]);
    made.append(globalThis.DOMPurify.sanitize(html, SANITIZING));
  } catch {
    made.append(element("div", { class: "plain", text: block.raw }));
    return made;
  }
  for (const anchor of made.querySelectorAll("a")) {
    anchor.target = "_blank";
    anchor.rel = "noopener noreferrer";
  }
  for (const pre of made.querySelectorAll("pre")) {
    pre.replaceWith(codeBlock(pre.textContent ?? "", pre.dataset.language ?? ""));
  }
  for (const table of made.querySelectorAll("table")) {
    const frame = element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return made;
}

/** @param {string} href @param {string} inner HTML. */
function link(href, inner) {
  return SAFE_LINK.test(href) ? `<a href="${escape(href)}" title="${escape(href)}">${inner}</a>` : inner;
}

/** @param {string} text */
function escape(text) {
  return text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
}
