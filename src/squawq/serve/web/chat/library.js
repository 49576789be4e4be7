// All conversations of this browser, in memory and in the store; newest first.

import { notify } from "./notices.js";
import { openStore } from "./store.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

/** @returns {Promise<Library>} */
export async function openLibrary() {
  const store = await openStore();
  if (!store.persistent) notify("This browser keeps no data here: conversations end with this tab.");
  return new Library(store, await store.all());
}

/** The conversations. */
class Library {
  /** @param {import("./store.js").Store} store @param {Conversation[]} all */
  constructor(store, all) {
    this.store = store;
    this.all = all;
    this.sort();
  }

  sort() {
    this.all.sort((a, b) => b.updated - a.updated);
  }

  /** @param {Conversation} conversation @returns {boolean} Whether it is kept; a new chat without messages is not. */
  has(conversation) {
    return this.all.includes(conversation);
  }

  /** Keeps a conversation that has new messages: it becomes the first. @param {Conversation} conversation */
  async save(conversation) {
    conversation.updated = Date.now();
    this.all = [conversation, ...this.all.filter((one) => one !== conversation)];
    await this.write(conversation);
  }

  /** Keeps a conversation in its place. @param {Conversation} conversation */
  async write(conversation) {
    if (!this.has(conversation)) return;
    try {
      await this.store.put(conversation);
    } catch (error) {
      notify(`The browser could not keep the conversation: ${error instanceof Error ? error.message : error}`);
    }
  }

  /** @param {Conversation} conversation @returns {() => void} Brings it back. */
  remove(conversation) {
    this.all = this.all.filter((one) => one !== conversation);
    this.store.remove(conversation.id);
    return () => {
      this.all.push(conversation);
      this.sort();
      this.write(conversation);
    };
  }

  /**
   * Takes what another tab changes.
   *
   * @param {(id: string) => boolean} ignored Which conversations this tab knows better.
   * @param {(id: string, changed: Conversation | undefined) => void} onchange Called after a change; undefined: deleted.
   */
  follow(ignored, onchange) {
    this.store.onchange(async (id) => {
      const changed = await this.store.get(id);
      if (ignored(id)) return;
      const known = this.all.find((one) => one.id === id);
      if (known && changed) Object.assign(known, changed); // the page holds on to the object
      else if (changed) this.all.push(changed);
      else this.all = this.all.filter((one) => one.id !== id);
      this.sort();
      onchange(id, changed);
    });
  }
}
