// The model's name or choice above the thread, and the context used below it.

import { byId, element } from "./dom.js";
import { count } from "./message.js";
import { keep, recall } from "./store.js";

/** @typedef {import("./api.js").Model} Model */

const NEARLY_FULL = 0.8; // of the context
const select = byId("model");
const name = byId("model-name");
/** @type {Model[]} */
let models = [];

/** Shows the served models; a choice if there are several. @param {Model[]} found @param {() => void} onchange */
export function showModels(found, onchange) {
  models = found;
  const chosen = select.value || recall("model", "");
  select.replaceChildren(...models.map(({ id }) => element("option", { value: id, text: id })));
  select.value = models.some(({ id }) => id === chosen) ? chosen : (models[0]?.id ?? "");
  select.hidden = models.length < 2;
  select.onchange = () => {
    keep("model", select.value);
    onchange();
  };
  name.hidden = models.length > 1;
  name.textContent = models[0]?.id ?? "";
}

/** @returns {Model | undefined} Undefined before the server has told its models. */
export function chosenModel() {
  return models.find(({ id }) => id === select.value);
}

/** @param {import("./conversation.js").Conversation} conversation */
export function showContext(conversation) {
  const usage = conversation.messages.findLast((message) => message.usage)?.usage;
  const most = chosenModel()?.max_model_len;
  byId("context").hidden = !usage || !most;
  if (!usage || !most) return;
  const used = usage.prompt + usage.completion;
  const meter = byId("context-meter");
  meter.setAttribute("aria-valuemax", most);
  meter.setAttribute("aria-valuenow", used);
  meter.classList.toggle("nearly-full", used > NEARLY_FULL * most);
  meter.firstElementChild.style.width = `${(used / most) * 100}%`;
  byId("context-text").textContent = `${count(used)} of ${count(most)} tokens`;
}
