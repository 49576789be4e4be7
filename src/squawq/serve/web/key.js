// The API key: asked for when the server answers 401, kept for the tab (sessionStorage), or longer if the user wants.

const NAME = "squawq.key";
/** @type {string | null} */
let key = stored(sessionStorageOrNull()) ?? stored(localStorageOrNull());
/** @type {Promise<boolean> | null} */
let asking = null; // one dialog, however many requests wait for it

/**
 * Sends a request to this server with the API key. After a 401 it asks the user for a key and sends the request again.
 *
 * @param {string} path A path of this server, such as "/v1/models".
 * @param {RequestInit} [options] As of fetch.
 * @returns {Promise<Response>} The 401 itself if the user gives no key. Rejects as fetch does.
 */
export async function ask(path, options = {}) {
  for (;;) {
    const sent = key;
    const headers = new Headers(options.headers);
    if (sent) headers.set("Authorization", `Bearer ${sent}`);
    const response = await fetch(path, { ...options, headers });
    if (response.status !== 401) return response;
    if (sent !== key) continue; // another request has asked meanwhile
    asking ??= askUser(sent !== null).finally(() => (asking = null));
    if (!(await asking)) return response;
  }
}

/** Forgets the key, here and in the browser's storage. */
function forgetKey() {
  key = null;
  for (const storage of [sessionStorageOrNull(), localStorageOrNull()]) storage?.removeItem(NAME);
}

/**
 * @param {boolean} refused Whether the server refused a key.
 * @returns {Promise<boolean>} Whether the user gave one.
 */
function askUser(refused) {
  const dialog = document.createElement("dialog");
  dialog.setAttribute("aria-labelledby", "key-title");
  dialog.id = "key-dialog";
  dialog.innerHTML = `
    <form class="dialog-form">
      <h2 id="key-title">API key</h2>
      <p id="key-why"></p>
      <div class="field">
        <label for="key">Key</label>
        <input class="input" id="key" type="password" autocomplete="off" spellcheck="false" required aria-describedby="key-why key-problem">
        <span class="problem" id="key-problem" role="alert"></span>
      </div>
      <label class="check"><input id="key-remember" type="checkbox"> Remember it in this browser</label>
      <div class="dialog-buttons">
        <button class="button" type="button">Cancel</button>
        <button class="button primary" type="submit">Use this key</button>
      </div>
    </form>`;
  const find = (/** @type {string} */ selector) => /** @type {any} */ (dialog.querySelector(selector));
  find("#key-why").textContent = refused
    ? "The server refused this key. Enter another one."
    : "This server needs an API key. It is sent to this server alone.";
  document.body.append(dialog);
  return new Promise((resolve) => {
    let given = false;
    find("button[type=button]").addEventListener("click", () => dialog.close());
    find("form").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      const text = find("#key").value.trim();
      if (!/^[\x21-\x7e]+$/.test(text)) {
        find("#key-problem").textContent = "A key has letters, digits and signs of ASCII alone, and no spaces.";
        return;
      }
      forgetKey();
      key = text;
      const storage = find("#key-remember").checked ? localStorageOrNull() : sessionStorageOrNull();
      try {
        storage?.setItem(NAME, text);
      } catch {
        // the browser has no room: the key is kept until the page is closed
      }
      given = true;
      dialog.close();
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(given);
    });
    dialog.showModal();
    find("#key").focus();
  });
}

/** @returns {Storage | null} Null where the browser forbids storage. */
function sessionStorageOrNull() {
  try {
    return sessionStorage;
  } catch {
    return null;
  }
}

/** @returns {Storage | null} */
function localStorageOrNull() {
  try {
    return localStorage;
  } catch {
    return null;
  }
}

/** @param {Storage | null} storage */
function stored(storage) {
  return storage?.getItem(NAME) ?? null;
}
