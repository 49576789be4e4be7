// Export and import of conversations: JSON with `messages` in OpenAI's form, and Markdown. An imported file is untrusted.

import { newConversation, shortTitle } from "./conversation.js";
import { splitReasoning } from "./reasoning.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Message} Message
 */

const MOST_BYTES = 50_000_000;
const MOST_TITLE = 200;

/** @param {Conversation} conversation */
function toJson(conversation) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const messages = conversation.messages.map((message) => {
    if (message.role === "user") return { role: message.role, content: message.content };
    const { thought, answer } = splitReasoning(message);
    return { role: message.role, content: answer, ...(thought ? { reasoning_content: thought } : {}) };
  });
  return { title: conversation.title, messages: [...system, ...messages] };
}

/** @param {Conversation[]} conversations @returns {string} An object for one conversation, an array for several. */
export function exportJson(conversations) {
  const all = conversations.map(toJson);
  return JSON.stringify(all.length === 1 ? all[0] : all, null, 2);
}

/** @param {Conversation} conversation */
export function exportMarkdown(conversation) {
  const titles = { user: "User", assistant: "Assistant", system: "System" };
  const parts = toJson(conversation).messages.map(
    ({ role, content }) => `## ${titles[/** @type {keyof titles} */ (role)]}\n\n${content}\n`,
  );
  return `# ${conversation.title}\n\n${parts.join("\n")}`;
}

/**
 * Reads exported conversations, or others of OpenAI's form: an object with `messages`, an array of such objects, or an
 * array of messages.
 *
 * @param {File} file
 * @returns {Promise<Conversation[]>} Rejects with an Error in words.
 */
export async function importJson(file) {
  if (file.size > MOST_BYTES) throw new Error(`${file.name} has ${file.size} bytes; at most ${MOST_BYTES} are read.`);
  let data;
  try {
    data = JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name} is no JSON.`);
  }
  const isMessages = Array.isArray(data) && data.length > 0 && data.every((one) => typeof one?.role === "string");
  const all = isMessages ? [{ messages: data }] : Array.isArray(data) ? data : [data];
  if (!all.length) throw new Error(`${file.name} has no conversation.`);
  return all.map((one, at) => fromJson(one, all.length > 1 ? `conversation ${at + 1} of ${file.name}` : file.name));
}

/** @param {any} data @param {string} where @returns {Conversation} */
function fromJson(data, where) {
  if (!Array.isArray(data?.messages)) throw new Error(`${where} has no list "messages".`);
  const conversation = newConversation();
  for (const [at, message] of data.messages.entries()) {
    const content = textOf(message?.content);
    const place = `message ${at + 1} of ${where}`;
    if (content === null) throw new Error(`${place} has no text as its content.`);
    if (message.role === "system" || message.role === "developer") {
      conversation.system += (conversation.system ? "\n\n" : "") + content;
    } else if (message.role === "user" || message.role === "assistant") {
      /** @type {Message} */
      const made = { role: message.role, content };
      const thought = message.reasoning_content ?? message.reasoning;
      if (message.role === "assistant" && typeof thought === "string" && thought) made.reasoning = thought;
      conversation.messages.push(made);
    } else {
      throw new Error(`${place} has the role ${JSON.stringify(message.role)}; choose one of system, user, assistant.`);
    }
  }
  const title = typeof data.title === "string" ? data.title.trim().slice(0, MOST_TITLE) : "";
  const first = conversation.messages.find((message) => message.role === "user");
  conversation.named = title !== "";
  conversation.title = title || shortTitle(first?.content ?? "");
  return conversation;
}

/** @param {unknown} content Text, or a list of parts of text. @returns {string | null} */
function textOf(content) {
  if (typeof content === "string") return content;
  if (!Array.isArray(content) || !content.every((part) => typeof part?.text === "string")) return null;
  return content.map((part) => part.text).join("\n");
}

/** Has the browser save a text as a file. @param {string} name @param {string} text @param {string} type */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** @param {string} title @returns {string} A name for a file. */
export function fileName(title) {
  return title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60).toLowerCase() || "conversation";
}
