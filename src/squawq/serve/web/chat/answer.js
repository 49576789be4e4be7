// One answer under way: sends the chat, and writes what arrives into the message.

import { streamChat, ServerError } from "./api.js";
import { apiMessages } from "./conversation.js";
import { splitReasoning } from "./reasoning.js";
import { scoredTokens } from "./tokens.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Message} Message
 */

const ALTERNATIVES = 5; // tokens beside each chosen one

/** An answer that is being made. `done` ends when it has, or has failed: then message.error says why. */
export class Answer {
  /**
   * @param {Conversation} conversation Its last message becomes the answer.
   * @param {{model: string | undefined, sampling: object, probabilities: boolean, continued: boolean}} options
   * @param {() => void} onchange Called after each change of the message.
   */
  constructor(conversation, options, onchange) {
    this.message = /** @type {Message} */ (conversation.messages.at(-1));
    this.onchange = onchange;
    this.unreachable = false;
    this.keyless = false;
    this.controller = new AbortController();
    this.began = performance.now();
    this.firstToken = 0;
    this.thoughtEnded = this.message.thoughtSeconds !== undefined;
    const body = {
      model: options.model,
      messages: apiMessages(conversation, options.continued),
      ...options.sampling,
      ...(options.probabilities ? { logprobs: true, top_logprobs: ALTERNATIVES } : {}),
      ...(options.continued ? { continue_final_message: true, add_generation_prompt: false } : {}),
    };
    this.done = this.run(body);
  }

  /** Stops; what has arrived stays. */
  stop() {
    this.controller.abort();
  }

  /** @param {object} body */
  async run(body) {
    const { message } = this;
    delete message.error;
    delete message.finish;
    try {
      for await (const chunk of streamChat(body, this.controller.signal)) this.take(chunk);
    } catch (error) {
      message.finish = "stopped";
      if (!this.controller.signal.aborted) {
        message.error = error instanceof ServerError ? error.message : "The page could not read the answer.";
        if (error instanceof ServerError) ({ unreachable: this.unreachable, keyless: this.keyless } = error);
        else console.error(error);
      }
    }
    this.timeThought(true);
    this.onchange();
  }

  /** @param {any} chunk */
  take(chunk) {
    const { message } = this;
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (!this.firstToken && (delta.content || thought)) this.firstToken = performance.now();
    if (thought) message.reasoning = (message.reasoning ?? "") + thought;
    if (delta.content) message.content += delta.content;
    if (choice?.logprobs) (message.tokens ??= []).push(...scoredTokens(choice.logprobs));
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (chunk.usage) this.measure(chunk.usage);
    this.timeThought(false);
    this.onchange();
  }

  /** @param {{prompt_tokens: number, completion_tokens: number}} usage */
  measure(usage) {
    const now = performance.now();
    this.message.usage = {
      prompt: usage.prompt_tokens,
      completion: usage.completion_tokens,
      firstToken: ((this.firstToken || now) - this.began) / 1000,
      seconds: (now - this.began) / 1000,
    };
  }

  /** @param {boolean} ended Whether the answer has ended. */
  timeThought(ended) {
    if (this.thoughtEnded) return;
    const { thought, thinking } = splitReasoning(this.message);
    if (!thought || (thinking && !ended)) return;
    this.message.thoughtSeconds = (performance.now() - (this.firstToken || this.began)) / 1000;
    this.thoughtEnded = true;
  }
}
