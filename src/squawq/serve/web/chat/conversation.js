// A conversation: its data, its title, and what is sent to the server of it.

import { splitReasoning } from "./reasoning.js";

/**
 * @typedef {[string, number, [string, number][]]} ScoredToken A token, its log probability, and the likeliest tokens.
 * @typedef {{
 *   completion: number, prompt: number, firstToken: number, seconds: number
 * }} Usage Tokens of answer and prompt, seconds to the first token and to the last.
 * @typedef {{
 *   role: "user" | "assistant", content: string, reasoning?: string, thoughtSeconds?: number, tokens?: ScoredToken[],
 *   finish?: string, usage?: Usage, error?: string
 * }} Message
 * @typedef {{id: string, title: string, named: boolean, updated: number, system: string, messages: Message[]}} Conversation
 *   `named`: the user chose the title.
 */

const TITLE_LENGTH = 48;

/** @returns {Conversation} */
export function newConversation() {
  return { id: randomId(), title: "New chat", named: false, updated: Date.now(), system: "", messages: [] };
}

/** Sets the title to the first words of the first message, unless the user chose one. @param {Conversation} conversation */
export function setTitle(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  if (!conversation.named) conversation.title = first ? shortTitle(first.content) : "New chat";
}

/** @param {string} text @returns {string} Its first words on one line. */
export function shortTitle(text) {
  const line = text.slice(0, 1000).replace(/\s+/g, " ").trim();
  if (!line) return "New chat";
  if (line.length <= TITLE_LENGTH) return line;
  const cut = line.slice(0, TITLE_LENGTH);
  return `${cut.slice(0, cut.lastIndexOf(" ")) || cut}…`;
}

/**
 * The messages in OpenAI's form. Reasoning is not sent back.
 *
 * @param {Conversation} conversation
 * @param {boolean} continued Whether the model continues the last answer; that one is sent as it is.
 */
export function apiMessages(conversation, continued) {
  /** @type {{role: string, content: string}[]} */
  const sent = [];
  if (conversation.system.trim()) sent.push({ role: "system", content: conversation.system });
  const last = conversation.messages.at(-1);
  for (const message of conversation.messages) {
    const whole = message.role === "user" || (continued && message === last);
    const content = whole ? message.content : splitReasoning(message).answer;
    if (whole || content) sent.push({ role: message.role, content });
  }
  return sent;
}

/** @param {Conversation} conversation @param {string} text @returns {boolean} Whether its title or a message has it. */
export function hasText(conversation, text) {
  const wanted = text.toLowerCase();
  const texts = [conversation.title, conversation.system, ...conversation.messages.map((message) => message.content)];
  return texts.some((one) => one.toLowerCase().includes(wanted));
}

function randomId() {
  // crypto.randomUUID is there on https and localhost alone
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
