// The list of conversations: search, rename, delete. On a phone it is a drawer.

import { byId, element, iconButton } from "./dom.js";
import { hasText } from "./conversation.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {{
 *   open: (conversation: Conversation) => void, rename: (conversation: Conversation, title: string) => void,
 *   remove: (conversation: Conversation) => void
 * }} Actions
 */

const list = byId("conversations");
const search = byId("search");
const sidebar = byId("sidebar");
const backdrop = byId("backdrop");
const opener = byId("drawer");

/** The list. */
export class Sidebar {
  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions;
    /** @type {Conversation[]} */
    this.all = [];
    this.currentId = "";
    search.addEventListener("input", () => this.draw());
    opener.addEventListener("click", () => openDrawer(true));
    backdrop.addEventListener("click", () => openDrawer(false));
    document.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Escape" && opener.getAttribute("aria-expanded") === "true") {
        openDrawer(false);
        event.stopImmediatePropagation(); // it does not stop an answer, too
      }
    });
  }

  /** @param {Conversation[]} all Newest first. @param {string} currentId */
  show(all, currentId) {
    this.all = all;
    this.currentId = currentId;
    this.draw();
  }

  draw() {
    if (list.querySelector("form")) return; // the user is writing a title
    const wanted = search.value.trim();
    const found = wanted ? this.all.filter((one) => hasText(one, wanted)) : this.all;
    const rows = found.map((conversation) => this.row(conversation));
    const nothing = wanted ? "No conversation has this text." : "No conversations yet.";
    list.replaceChildren(...(rows.length ? rows : [element("li", { class: "nothing", text: nothing })]));
  }

  /** @param {Conversation} conversation */
  row(conversation) {
    const current = conversation.id === this.currentId;
    const row = element(
      "li",
      { class: current ? "row current" : "row" },
      element("button", {
        type: "button",
        class: "open",
        "aria-current": current ? "true" : null,
        text: conversation.title,
        title: conversation.title,
        onclick: () => {
          openDrawer(false);
          this.actions.open(conversation);
        },
      }),
      iconButton("edit", `Rename ${conversation.title}`, () => this.rename(row, conversation)),
      iconButton("trash", `Delete ${conversation.title}`, () => this.actions.remove(conversation)),
    );
    return row;
  }

  /** @param {HTMLElement} row @param {Conversation} conversation */
  rename(row, conversation) {
    const input = element("input", { class: "input", "aria-label": "Title", maxlength: "200" });
    input.value = conversation.title;
    const form = element("form", {}, input);
    let open = true;
    const end = (/** @type {boolean} */ keep) => {
      if (!open) return;
      open = false;
      const title = input.value.trim();
      form.remove();
      if (keep && title && title !== conversation.title) this.actions.rename(conversation, title);
      else this.draw();
    };
    form.addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      end(true);
    });
    input.addEventListener("blur", () => end(true));
    input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      end(false);
    });
    row.replaceChildren(form);
    input.select();
  }
}

/** @param {boolean} open Only on a narrow screen; elsewhere the list is always there. */
export function openDrawer(open) {
  if (open && getComputedStyle(opener).display === "none") return;
  const was = opener.getAttribute("aria-expanded") === "true";
  sidebar.classList.toggle("open", open);
  backdrop.hidden = !open;
  opener.setAttribute("aria-expanded", String(open));
  if (open) byId("new-chat").focus();
  else if (was) opener.focus();
}
