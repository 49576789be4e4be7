// The dialog of the system prompt and the sampling settings.

import { element } from "./dom.js";
import { FIELDS, problem } from "./sampling.js";

/**
 * Shows the dialog. Changes are told as they are made.
 *
 * @param {{
 *   system: string, written: Record<string, string>, defaults: Record<string, number>,
 *   onsystem: (text: string) => void, onwritten: (written: Record<string, string>) => void
 * }} options `written`: what the user wrote in each field; `defaults`: the model's.
 */
export function showSettings({ system, written, defaults, onsystem, onwritten }) {
  const values = { ...written };
  const prompt = element("textarea", { class: "input", id: "system", rows: "4", placeholder: "None", "aria-describedby": "system-hint" });
  prompt.value = system;
  prompt.addEventListener("input", () => onsystem(prompt.value));

  const inputs = FIELDS.map((field) => fieldInput(field, values, defaults, () => onwritten(values)));
  const reset = element("button", { type: "button", class: "button", text: "Use the model's defaults" });
  reset.addEventListener("click", () => {
    for (const { input } of inputs) {
      input.value = "";
      input.dispatchEvent(new Event("input"));
    }
  });
  const close = element("button", { type: "button", class: "button primary", text: "Done", onclick: () => dialog.close() });
  const dialog = element(
    "dialog",
    { class: "drawer-dialog", id: "settings-dialog", "aria-labelledby": "settings-title", onclose: () => dialog.remove() },
    element("h2", { id: "settings-title", text: "Settings" }),
    element(
      "div",
      { class: "field" },
      element("label", { for: "system", text: "System prompt" }),
      prompt,
      element("span", { class: "hint", id: "system-hint", text: "Of this conversation: how the model should answer" }),
    ),
    element("h3", { text: "Sampling" }),
    element("p", { class: "hint", text: "Of all conversations. An empty field takes the model's default, shown in grey." }),
    element("div", { class: "fields" }, ...inputs.map(({ row }) => row)),
    element("div", { class: "dialog-buttons" }, reset, close),
  );
  dialog.addEventListener("click", (/** @type {Event} */ event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
}

/**
 * @param {import("./sampling.js").Field} field
 * @param {Record<string, string>} values Takes what the user writes.
 * @param {Record<string, number>} defaults
 * @param {() => void} onchange
 */
function fieldInput(field, values, defaults, onchange) {
  const id = `field-${field.name}`;
  const input = element(field.text ? "textarea" : "input", {
    class: "input",
    id,
    autocomplete: "off",
    rows: field.text ? "2" : null,
    inputmode: field.text ? null : "decimal",
    placeholder: defaults[field.name] ?? field.otherwise,
    "aria-describedby": `${id}-hint ${id}-problem`,
  });
  const wrong = element("span", { class: "problem", id: `${id}-problem`, "aria-live": "polite" });
  const check = () => {
    wrong.textContent = problem(field, input.value);
    input.setAttribute("aria-invalid", String(wrong.textContent !== ""));
  };
  input.value = values[field.name] ?? "";
  check();
  input.addEventListener("input", () => {
    values[field.name] = input.value;
    check();
    onchange();
  });
  const row = element(
    "div",
    { class: field.text ? "field whole" : "field" },
    element("label", { for: id, text: field.label }),
    input,
    element("span", { class: "hint", id: `${id}-hint`, text: field.hint }),
    wrong,
  );
  return { input, row };
}
