// Tells a model's reasoning from its answer.

const OPEN = "<think>";
const CLOSE = "</think>";

/**
 * Splits a text of the model. Reasoning stands between <think> and the first </think>, at the beginning of the text. Some
 * templates write <think> into the prompt: then the text begins with the reasoning, and </think> begins a line outside
 * of code. In any other place the marks are text.
 *
 * @param {{content: string, reasoning?: string}} message `reasoning` is what the server sent in a field of its own.
 * @returns {{thought: string, answer: string, thinking: boolean}} `thinking`: the reasoning has no end yet.
 */
export function splitReasoning({ content, reasoning = "" }) {
  if (reasoning) return { thought: reasoning.trim(), answer: content.trimStart(), thinking: !content };
  const text = content.trimStart();
  if (text.startsWith(OPEN)) {
    const end = text.indexOf(CLOSE);
    if (end < 0) return { thought: text.slice(OPEN.length).trim(), answer: "", thinking: true };
    return parts(text.slice(OPEN.length, end), text.slice(end + CLOSE.length));
  }
  if (text && OPEN.startsWith(text)) return { thought: "", answer: "", thinking: true }; // the mark has begun
  const end = /^<\/think>/m.exec(text)?.index ?? -1;
  if (end > 0 && !insideCode(text.slice(0, end))) return parts(text.slice(0, end), text.slice(end + CLOSE.length));
  return { thought: "", answer: content, thinking: false };
}

/** @param {string} thought @param {string} answer */
function parts(thought, answer) {
  return { thought: thought.trim(), answer: answer.trimStart(), thinking: false };
}

/** @param {string} before */
function insideCode(before) {
  return (before.match(/^\s*(```|~~~)/gm) ?? []).length % 2 === 1;
}
