// Keeps conversations in the browser (IndexedDB), and settings (localStorage).

/** @typedef {import("./conversation.js").Conversation} Conversation */

const DATABASE = "squawq";
const CONVERSATIONS = "conversations";

/**
 * @typedef {{
 *   persistent: boolean,
 *   all: () => Promise<Conversation[]>,
 *   get: (id: string) => Promise<Conversation | undefined>,
 *   put: (conversation: Conversation) => Promise<void>,
 *   remove: (id: string) => Promise<void>,
 *   onchange: (listener: (id: string) => void) => void,
 * }} Store `onchange` tells of changes in other tabs.
 */

/** @returns {Promise<Store>} Without IndexedDB (some private windows), one that forgets: `persistent` is false. */
export async function openStore() {
  try {
    return databaseStore(await openDatabase());
  } catch {
    return memoryStore();
  }
}

/** @returns {Promise<IDBDatabase>} */
async function openDatabase() {
  const request = indexedDB.open(DATABASE, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
  return result(request);
}

/** @param {IDBDatabase} database @returns {Store} */
function databaseStore(database) {
  const channel = new BroadcastChannel(DATABASE);
  const objects = (/** @type {IDBTransactionMode} */ mode) =>
    database.transaction(CONVERSATIONS, mode).objectStore(CONVERSATIONS);
  return {
    persistent: true,
    all: () => result(objects("readonly").getAll()),
    get: (id) => result(objects("readonly").get(id)),
    put: async (conversation) => {
      const objectStore = objects("readwrite");
      const request = objectStore.put(conversation);
      objectStore.transaction.commit(); // at once: the page may be about to close
      await result(request);
      channel.postMessage(conversation.id);
    },
    remove: async (id) => {
      await result(objects("readwrite").delete(id));
      channel.postMessage(id);
    },
    onchange: (listener) => channel.addEventListener("message", (event) => listener(event.data)),
  };
}

/** @returns {Store} */
function memoryStore() {
  /** @type {Map<string, Conversation>} */
  const kept = new Map();
  return {
    persistent: false,
    all: async () => [...kept.values()],
    get: async (id) => kept.get(id),
    put: async (conversation) => void kept.set(conversation.id, conversation),
    remove: async (id) => void kept.delete(id),
    onchange: () => {},
  };
}

/** @template T @param {IDBRequest<T>} request @returns {Promise<T>} */
function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** @template T @param {string} name @param {T} otherwise @returns {T} A value that `keep` stored. */
export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`squawq.${name}`) ?? "null") ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** @param {string} name @param {unknown} value */
export function keep(name, value) {
  try {
    localStorage.setItem(`squawq.${name}`, JSON.stringify(value));
  } catch {
    // it holds until the page is closed
  }
}
