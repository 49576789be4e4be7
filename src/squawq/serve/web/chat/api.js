// The server's API: its models, and chats as streams.

import { ask } from "../key.js";

/**
 * @typedef {{id: string, max_model_len: number, sampling_defaults?: Record<string, number>}} Model
 */

/** A failure in words that a user can read. */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {{unreachable?: boolean, keyless?: boolean}} [why] Whether the server did not answer at all, or refused for
   *   want of a valid API key.
   */
  constructor(message, { unreachable = false, keyless = false } = {}) {
    super(message);
    this.unreachable = unreachable;
    this.keyless = keyless;
  }
}

/** @returns {Promise<Model[]>} The models by their served names. Rejects with ServerError. */
export async function listModels() {
  const response = await send("/v1/models", {});
  return (await response.json()).data;
}

/**
 * Sends a chat and yields the chunks of the answer. Throws ServerError, and AbortError after signal.abort().
 *
 * @param {object} body The body of /v1/chat/completions, without `stream`.
 * @param {AbortSignal} signal
 */
export async function* streamChat(body, signal) {
  const response = await send("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.body) throw new ServerError("The server sent an empty answer.");
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(words(chunk, response.status));
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ServerError || signal.aborted) throw error;
    throw new ServerError("The connection broke before the answer ended.", { unreachable: error instanceof TypeError });
  }
  throw new ServerError("The connection ended before the answer did.");
}

/**
 * @param {string} path
 * @param {RequestInit} options
 */
async function send(path, options) {
  let response;
  try {
    response = await ask(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError("The server does not answer.", { unreachable: true });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ServerError(words(body, response.status), { keyless: response.status === 401 });
}

/**
 * The message of an error's body: OpenAI's object, or TGI's text.
 *
 * @param {any} body
 * @param {number} status
 */
function words(body, status) {
  const message = typeof body.error === "string" ? body.error : body.error?.message;
  if (status === 401) return "The server needs a valid API key.";
  return typeof message === "string" && message ? message : `The server answered with status ${status}.`;
}

/**
 * The data of server-sent events.
 *
 * @param {ReadableStream<Uint8Array>} stream
 */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
      rest = lines.pop() ?? "";
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
