// The chat page: its state, and what each action does to it.

import { Answer } from "./answer.js";
import { Composer } from "./composer.js";
import { Connection } from "./connection.js";
import { newConversation, setTitle } from "./conversation.js";
import { showExport, showKeys } from "./dialogs.js";
import { byId, icon } from "./dom.js";
import { listenToKeys } from "./keys.js";
import { openLibrary } from "./library.js";
import { announce, notify } from "./notices.js";
import { splitReasoning } from "./reasoning.js";
import { firstProblem, sampling } from "./sampling.js";
import { showSettings } from "./settings.js";
import { openDrawer, Sidebar } from "./sidebar.js";
import { keep, recall } from "./store.js";
import { Thread, welcome } from "./thread.js";
import { chosenModel, showContext, showModels } from "./toolbar.js";
import { importJson } from "./transfer.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Message} Message
 */

const SAVE_EVERY_MS = 2000; // while an answer is being made
const ANNOUNCED = 500; // characters of an answer that are read to screen readers

const library = await openLibrary();
let current = library.all.find(({ id }) => id === recall("open", "")) ?? newConversation();
/** @type {Map<string, Answer>} */
const answers = new Map(); // those that are being made, by conversation
/** @type {Record<string, string>} */
let written = recall("sampling", {}); // what the user wrote in the settings
let probabilities = recall("probabilities", false);

const thread = new Thread((message) => ({
  regenerate: () => regenerate(message),
  proceed: () => start({ continued: true }),
  remove: () => removeMessage(message),
  change: (text, send) => change(message, text, send),
}));
const composer = new Composer({ send, stop, editLast });
const sidebar = new Sidebar({ open, rename, remove: removeConversation });
const connection = new Connection((models) => {
  showModels(models, draw);
  draw();
});

// Messages and answers

/** @param {string} text @returns {boolean} Whether it was sent. */
function send(text) {
  if (!ready()) return false;
  current.messages.push({ role: "user", content: text });
  return answer();
}

/** Adds an answer to the current conversation and has the model make it. */
function answer() {
  current.messages.push({ role: "assistant", content: "" });
  thread.following = true;
  start({ continued: false });
  return true;
}

/** @returns {boolean} Whether a request may be sent: the settings are valid, and no answer is being made here. */
function ready() {
  return valid() && !answers.has(current.id);
}

/** @returns {boolean} Whether the settings are valid; says so if they are not. */
function valid() {
  const wrong = firstProblem(written);
  composer.complain(wrong, wrong ? openSettings : undefined);
  return !wrong;
}

/** @returns {boolean} Whether an answer was being made. */
function stop() {
  answers.get(current.id)?.stop();
  return answers.has(current.id);
}

/** Stops the answer that is being made. @returns {Promise<boolean>} Whether the conversation is still on the page then. */
async function halt() {
  const conversation = current;
  stop();
  await answers.get(current.id)?.done;
  return conversation === current;
}

/** @param {{continued: boolean}} options Whether the model continues the last message. */
function start({ continued }) {
  if (!ready()) return;
  const conversation = current;
  const message = /** @type {Message} */ (conversation.messages.at(-1));
  const scored = probabilities && (!message.content || Boolean(message.tokens));
  if (!scored) delete message.tokens;
  let saved = Date.now();
  const options = { model: chosenModel()?.id, sampling: sampling(written), probabilities: scored, continued };
  const made = new Answer(conversation, options, () => {
    if (conversation === current) thread.changed();
    if (Date.now() - saved < SAVE_EVERY_MS || !library.has(conversation)) return;
    saved = Date.now();
    save(conversation);
  });
  answers.set(conversation.id, made);
  setTitle(conversation);
  save(conversation);
  draw();
  made.done.then(() => finish(conversation, made));
}

/** @param {Conversation} conversation @param {Answer} made */
function finish(conversation, made) {
  answers.delete(conversation.id);
  if (library.has(conversation)) save(conversation);
  if (made.unreachable) connection.lost("The server does not answer.");
  else if (made.keyless) connection.refused();
  else connection.reached();
  const { error } = made.message;
  announce(error ? `The answer failed. ${error}` : `Answer: ${splitReasoning(made.message).answer.slice(0, ANNOUNCED)}`);
  draw();
}

/** @param {Message} message An answer; it and what follows are replaced. */
async function regenerate(message) {
  if (!(await halt()) || !ready()) return;
  const at = current.messages.indexOf(message);
  if (at < 0) return;
  const followed = at < current.messages.length - 1;
  const undo = undoing(message.content || followed ? "The answer is made again." : "");
  current.messages.splice(at);
  answer();
  undo();
}

/**
 * Takes an edited message.
 *
 * @param {Message} message
 * @param {string} text
 * @param {boolean} again Whether to send it again: what follows is replaced.
 * @returns {boolean} Whether it was taken.
 */
function change(message, text, again) {
  if (again && !valid()) return false;
  halt().then((here) => {
    if (!here) return;
    const at = current.messages.indexOf(message);
    if (at < 0) return;
    const followed = at < current.messages.length - 1;
    const undo = undoing(again && followed ? "The conversation goes on from the edited message." : "");
    current.messages.splice(at, again ? Infinity : 1, { role: message.role, content: text });
    if (again) answer();
    else save(current);
    draw();
    undo();
  });
  return true;
}

/** @param {Message} message */
async function removeMessage(message) {
  if (!(await halt())) return;
  const at = current.messages.indexOf(message);
  if (at < 0) return;
  const undo = undoing("Message deleted.");
  current.messages.splice(at, 1);
  save(current);
  draw();
  undo();
  composer.focus();
}

/**
 * Remembers the current messages.
 *
 * @param {string} text What the notice says; empty: no notice.
 * @returns {() => void} Shows the notice, whose button brings those messages back.
 */
function undoing(text) {
  const conversation = current;
  const before = [...conversation.messages];
  return () =>
    text &&
    notify(text, async () => {
      if (conversation === current) await halt();
      conversation.messages = before;
      save(conversation);
      draw();
    });
}

function editLast() {
  const last = current.messages.findLast((message) => message.role === "user");
  if (last && !answers.has(current.id)) thread.view(last)?.edit();
}

// Conversations

/** @param {Conversation} conversation */
function open(conversation) {
  current = conversation;
  keep("open", current.id);
  thread.clear();
  draw();
  composer.complain("");
  composer.focus();
}

/** @param {Conversation} conversation */
function save(conversation) {
  if (conversation === current) keep("open", conversation.id);
  return library.save(conversation);
}

/** @param {Conversation} conversation @param {string} title */
function rename(conversation, title) {
  Object.assign(conversation, { title, named: true });
  library.write(conversation);
  draw();
}

/** @param {Conversation} conversation */
function removeConversation(conversation) {
  answers.get(conversation.id)?.stop();
  const restore = library.remove(conversation);
  if (conversation === current) open(newConversation());
  draw();
  notify(`"${conversation.title}" is deleted.`, () => {
    restore();
    open(conversation);
  });
}

/** @param {File} file */
async function importFile(file) {
  try {
    const imported = await importJson(file);
    for (const conversation of imported.reverse()) await save(conversation);
    open(library.all[0]);
    notify(imported.length === 1 ? "1 conversation imported." : `${imported.length} conversations imported.`);
  } catch (error) {
    notify(error instanceof Error ? error.message : String(error));
  }
}

// What the page shows

function draw() {
  const running = answers.get(current.id);
  sidebar.show(library.all, current.id);
  thread.probabilities = probabilities;
  thread.show(current.messages, running?.message ?? null, welcome(chosenModel()?.id ?? "", (text) => composer.write(text)));
  composer.show(Boolean(running));
  byId("probabilities").setAttribute("aria-pressed", String(probabilities));
  document.title = current.messages.length ? `${current.title} · squawq` : "squawq chat";
  showContext(current);
}

function openSettings() {
  const conversation = current;
  showSettings({
    system: conversation.system,
    written,
    defaults: chosenModel()?.sampling_defaults ?? {},
    onsystem: (text) => {
      conversation.system = text;
      library.write(conversation);
    },
    onwritten: (changed) => {
      written = changed;
      keep("sampling", written);
      composer.complain("");
    },
  });
}

function newChat() {
  openDrawer(false);
  open(newConversation());
}

// Buttons and keys

byId("new-chat").prepend(icon("plus"));
byId("drawer").append(icon("menu"));
byId("settings").prepend(icon("sliders"));
byId("probabilities").prepend(icon("bars"));
byId("to-end").prepend(icon("down"));
byId("new-chat").addEventListener("click", newChat);
byId("settings").addEventListener("click", openSettings);
byId("keys").addEventListener("click", showKeys);
byId("export").addEventListener("click", () => showExport(current, library.all));
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", async (/** @type {any} */ event) => {
  const [file] = event.target.files;
  if (file) await importFile(file);
  event.target.value = ""; // the same file may be chosen again
});
byId("probabilities").addEventListener("click", () => {
  probabilities = !probabilities;
  keep("probabilities", probabilities);
  draw();
});
listenToKeys({
  stop,
  newChat,
  help: showKeys,
  search: () => {
    openDrawer(true);
    byId("search").focus();
  },
});
addEventListener("pagehide", () => {
  for (const conversation of library.all) {
    const answer = answers.get(conversation.id);
    if (!answer) continue;
    answer.stop();
    library.write(conversation);
  }
});
library.follow((id) => answers.has(id), (id, changed) => {
  if (id === current.id && !changed) {
    current = newConversation();
    thread.clear();
  }
  draw();
});

draw();
connection.check();
