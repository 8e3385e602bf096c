// Conversations and settings in the browser's storage, an entry each, so that two tabs do not undo each other's work.
// Storage may be full, forbidden or hold nonsense: everything then goes on in memory, and `onTrouble` says so.
//
// A conversation: {id, title, system, created, updated, messages}. A message: {role: "user", content: text} or
// {role: "assistant", content: [{type: "text" | "python" | "python_output", text}], end, ...what is shown under it}.

const PREFIX = "nanochat.conversation.", SETTINGS = "nanochat.settings", OPEN = "nanochat.open", KEY = "nanochat.key";

const memory = new Map();   // id -> conversation: of each the one object that all work with
export let onTrouble = () => {};
export const setTroubleHandler = (handler) => { onTrouble = handler; };

function attempt(action) {
  try {
    return action();
  } catch (error) {
    const isFull = error.name === "QuotaExceededError";
    onTrouble(isFull
      ? "The browser's storage is full: what comes now is lost when you leave. Export or delete conversations."
      : "The browser keeps nothing for this page: conversations are lost when you leave.");
    return null;
  }
}

function parse(text, isRight) {
  try {
    const value = JSON.parse(text);
    return isRight(value) ? value : null;
  } catch {
    return null;
  }
}

// ---- conversations ------------------------------------------------------------------------------

const isText = (value) => typeof value === "string";
const isPart = (part) => isText(part?.type) && isText(part?.text);
const isMessage = (message) => (message?.role === "user" && isText(message.content))
  || (message?.role === "assistant" && Array.isArray(message.content) && message.content.every(isPart));
const isConversation = (value) => isText(value?.id) && isText(value.title) && isText(value.system)
  && Array.isArray(value.messages) && value.messages.every(isMessage);

export function newConversation(system = "") {
  const id = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
  return { id, title: "", system, created: Date.now(), updated: Date.now(), messages: [] };
}

/** All conversations, the one that was used last first. */
export function conversations() {
  attempt(() => {
    for (const name of Object.keys(localStorage)) {
      if (name.startsWith(PREFIX) && !memory.has(name.slice(PREFIX.length))) read(name);
    }
  });
  return [...memory.values()].sort((a, b) => b.updated - a.updated);
}

function read(name) {
  const conversation = parse(localStorage.getItem(name), isConversation);
  if (conversation) memory.set(conversation.id, conversation);
  return conversation;
}

export function save(conversation) {
  memory.set(conversation.id, conversation);
  attempt(() => localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation)));
}

export function remove(conversation) {
  memory.delete(conversation.id);
  attempt(() => localStorage.removeItem(PREFIX + conversation.id));
}

/** Call `changed(id)` when another tab has written or deleted a conversation, unless this one `isBusy(id)` with it. */
export function followOtherTabs(isBusy, changed) {
  window.addEventListener("storage", ({ key, newValue }) => {
    const id = key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null;
    if (id === null || isBusy(id)) return;
    if (newValue === null) memory.delete(id);
    else attempt(() => read(key));
    changed(id);
  });
}

// ---- what else is kept --------------------------------------------------------------------------

/** {system, theme, temperature, top_k, top_p, max_tokens, seed}: only what the user has set. */
export const settings = parse(attempt(() => localStorage.getItem(SETTINGS)), (value) => value?.constructor === Object) ?? {};

export function saveSettings() {
  attempt(() => localStorage.setItem(SETTINGS, JSON.stringify(settings)));
}

const kept = {};
const ofTab = (name) => ({
  get: () => attempt(() => sessionStorage.getItem(name)) ?? kept[name],
  set: (value) => { kept[name] = value; attempt(() => sessionStorage.setItem(name, value)); },
});
export const openId = ofTab(OPEN), apiKey = ofTab(KEY);

// ---- the project's conversation format ----------------------------------------------------------

/** A message's content as the server takes it: a string, or parts where a tool was called. */
export function content(message) {
  if (message.role === "user") return message.content;
  const parts = message.content.filter((part) => part.text).map(({ type, text }) => ({ type, text }));
  return parts.every((part) => part.type === "text") ? parts.map((part) => part.text).join("") : parts;
}

/** What of a conversation is sent: no empty answers. */
export function messages(conversation) {
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  const said = conversation.messages.map((message) => ({ role: message.role, content: content(message) }));
  return [...system, ...said.filter((message) => message.content.length)];
}

/** Conversations as lines that training takes: roles take turns, and the last word is the model's. */
export function toJsonl(chosen) {
  const lines = [];
  for (const conversation of chosen) {
    const turns = [];
    for (const message of messages(conversation)) {
      if (turns.at(-1)?.role === message.role) turns.at(-1).content += `\n\n${message.content}`;   // only users repeat
      else turns.push({ ...message });
    }
    while (turns.length && turns.at(-1).role !== "assistant") turns.pop();
    if (turns.length) lines.push(JSON.stringify({ messages: turns }) + "\n");
  }
  return lines.join("");
}
