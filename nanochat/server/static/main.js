// The page: which conversation is open, the answers being written, and what the user does.

import * as store from "./store.js";
import { commands } from "./commands.js";
import { el, icon } from "./dom.js";
import { openSettings, showTheme, toggleTheme } from "./settings.js";
import { ask, download, drawList } from "./sidebar.js";
import { checkHealth, loadModel, setReachable } from "./reach.js";
import { ApiError, chat } from "./stream.js";
import { AnswerView, fit, isSend, UserView } from "./view.js";

const $ = (id) => document.getElementById(id);
const { settings } = store;
const EXAMPLES = ["What is the capital of France?", "What is 12 + 30?", "How many letters e are in cheese?", "Who are you?"];

let open = null;            // the conversation on the page
let views = [];             // of its messages
const jobs = new Map();     // conversation id -> AbortController of the answer that is being written
let follows = true;         // the page scrolls with the answer

// ---- drawing ------------------------------------------------------------------------------------

function draw() {
  views = open.messages.map((message, i) => {
    if (message.role === "user") {
      return new UserView(message, {
        edit: (text) => resend(message, text),
        laterMessages: () => open.messages.length - 1 - i,
      });
    }
    const view = new AnswerView(message, { regenerate: () => regenerate(message) });
    view.update(isBeingWritten(message));
    return view;
  });
  $("messages").replaceChildren(...(open.system ? [systemNote()] : []), ...views.map((view) => view.node));
  $("welcome").hidden = open.messages.length > 0;
  $("title").textContent = open.title || "New conversation";
  document.title = open.title ? `${open.title} · NanoChat` : "NanoChat";
  showRunning();
  toBottom();
}

const isBeingWritten = (message) => jobs.has(open.id) && message === open.messages.at(-1);

function systemNote() {
  return el("details", { class: "system" }, el("summary", {}, "System prompt"), el("p", {}, open.system));
}

function showRunning() {
  const isRunning = jobs.has(open.id);
  $("send").replaceChildren(icon(isRunning ? "stop" : "send"));
  $("send").setAttribute("aria-label", isRunning ? "Stop" : "Send");
  $("send").title = isRunning ? "Stop (Esc)" : "Send (Enter)";
  drawList(store.conversations(), open.id, (id) => jobs.has(id), { open: show, rename, download: exportOne, remove });
}

function note(text) {
  $("messages").append(el("p", { class: "note local", role: "status" }, text));
  $("welcome").hidden = true;
  toBottom();
}

function trouble(text) {
  $("trouble-text").textContent = text;
  $("trouble").hidden = !text;
}

function toBottom() {
  follows = true;
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

// ---- answers ------------------------------------------------------------------------------------

/** Have an answer written to what the conversation holds, to its end or to the user's stop. */
async function answer(conversation) {
  const controller = new AbortController();
  const reply = { role: "assistant", content: [] };
  const body = request(conversation);
  conversation.messages.push(reply);
  conversation.updated = Date.now();
  jobs.set(conversation.id, controller);
  store.save(conversation);
  if (conversation === open) draw();
  announce("The answer is being written.");
  const times = { sent: performance.now(), first: 0, last: 0, saved: Date.now() };
  const paint = painter(conversation, reply);
  try {
    for await (const chunk of withKey(body, controller.signal)) {
      if (take(reply, chunk)) {
        times.last = performance.now();
        times.first ||= times.last;
        paint();
      }
      if (Date.now() - times.saved > 1000) {   // so that a closed page has lost little
        times.saved = Date.now();
        store.save(conversation);
      }
    }
    reply.end ??= "stop";
    setReachable();
  } catch (error) {
    reply.end = controller.signal.aborted ? "stopped" : "failed";
    if (reply.end === "failed") explain(reply, error);
  }
  if (times.first) Object.assign(reply, { wait: (times.first - times.sent) / 1000, seconds: (times.last - times.first) / 1000 });
  finish(conversation, reply, controller);
}

function finish(conversation, reply, controller) {
  if (jobs.get(conversation.id) !== controller) return;   // deleted, or answered anew
  jobs.delete(conversation.id);
  store.save(conversation);
  if (conversation === open) {
    views.at(-1).update(false);
    if (follows) toBottom();
  }
  showRunning();
  announce(reply.problem ?? (conversation === open ? views.at(-1).body.innerText : `${conversation.title}: answered.`));
}

function request(conversation) {
  const { temperature, top_k, top_p, max_tokens, seed } = settings;   // undefined: the server's
  return { messages: store.messages(conversation), temperature, top_k, top_p, max_tokens, seed };
}

/** Put a chunk into the reply; true if it brought text. */
function take(reply, chunk) {
  if (chunk.dropped_messages) reply.dropped = chunk.dropped_messages;
  if (chunk.usage) reply.usage = chunk.usage;
  const choice = chunk.choices[0];
  if (!choice) return false;
  if (choice.finish_reason) reply.end = choice.finish_reason;
  const { content, parts = [] } = choice.delta;
  const pieces = content ? [{ type: "text", text: content }, ...parts] : parts;
  for (const { type, text } of pieces) {
    const last = reply.content.at(-1);
    if (last?.type === type) last.text += text;
    else reply.content.push({ type, text });
  }
  return pieces.length > 0;
}

/** Draws the reply at most once a frame, and so that drawing takes no more than a third of the time. */
function painter(conversation, reply) {
  let isWaiting = false, notBefore = 0;
  const paint = () => {
    if (performance.now() < notBefore) return requestAnimationFrame(paint);
    isWaiting = false;
    if (conversation !== open || !isBeingWritten(reply)) return;
    const start = performance.now();
    views.at(-1).update(true);
    if (follows) toBottom();
    notBefore = performance.now() + 2 * (performance.now() - start);
  };
  return () => {
    if (isWaiting) return;
    isWaiting = true;
    if (document.hidden) setTimeout(paint, 500);   // a hidden page has no frames
    else requestAnimationFrame(paint);
  };
}

let askedKey = null;

/** chat() with the key of this tab; asks for one when the server wants another. */
async function* withKey(body, signal) {
  for (;;) {
    const key = store.apiKey.get();
    try {
      return yield* chat(body, key, signal);
    } catch (error) {
      if (error.status !== 401) throw error;
      if (store.apiKey.get() === key) {   // several answers may wait for one key
        askedKey ??= ask({ title: "API key", text: "This server answers only those who have its key. It is kept until the tab is closed.",
          label: "Key", type: "password", ok: "Continue" }).finally(() => { askedKey = null; });
        const entered = await askedKey;
        if (!entered) throw new ApiError("The server wants an API key.", 401);
        store.apiKey.set(entered);
        loadModel();
      }
      signal.throwIfAborted();
    }
  }
}

function explain(reply, error) {
  if (!(error instanceof ApiError)) console.error(error);
  reply.problem = error instanceof ApiError ? error.message : `The answer cannot be read (${error.message}).`;
  if (error.wait) reply.problem += ` Try again in ${error.wait} seconds.`;
  if (error.status === 0) checkHealth();
}

function announce(text) {
  $("announce").textContent = text;
}

// ---- what the user does -------------------------------------------------------------------------

function show(conversation) {
  open = conversation;
  store.openId.set(open.id);
  setDrawer(false);
  draw();
  if (matchMedia("(pointer: fine)").matches) $("input").focus();   // on a phone this would open the keyboard
}

function startNew() {
  trouble("");
  show(store.newConversation(settings.system));
}

function send(text) {
  if (!open.title) open.title = text.split("\n")[0].slice(0, 80);
  open.messages.push({ role: "user", content: text });
  answer(open);
}

function stop() {
  jobs.get(open.id)?.abort();
}

/** End an answer whose place another one takes. */
function forget(conversation) {
  const controller = jobs.get(conversation.id);
  jobs.delete(conversation.id);
  controller?.abort();
}

function resend(message, text) {
  forget(open);
  const isFirst = message === open.messages[0];
  if (isFirst && message.content.startsWith(open.title)) open.title = "";   // it was named after this message
  open.messages.length = open.messages.indexOf(message);
  send(text);
  $("input").focus();
}

async function regenerate(message) {
  const conversation = open, at = open.messages.indexOf(message);
  const later = open.messages.length - 1 - at;
  if (later && (await ask({ title: "Write this answer anew?", text: `What follows (${later} messages) is deleted.`, ok: "Write anew" })) === null) return;
  if (conversation.messages[at] !== message) return;
  forget(conversation);
  conversation.messages.length = at;
  answer(conversation);
  $("input").focus();
}

async function rename(conversation) {
  const title = await ask({ title: "Rename the conversation", label: "Title", value: conversation.title, ok: "Rename" });
  if (!title) return;
  conversation.title = title.slice(0, 200);
  store.save(conversation);
  if (conversation === open) $("title").textContent = conversation.title;
  showRunning();
}

async function remove(conversation) {
  if ((await ask({ title: "Delete the conversation?", text: conversation.title, ok: "Delete" })) === null) return;
  forget(conversation);
  store.remove(conversation);
  if (conversation === open) startNew();
  else showRunning();
}

function exportOne(conversation) {
  exportAs(conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation", [conversation]);
}

function exportAs(name, conversations) {
  const lines = store.toJsonl(conversations);
  if (lines) download(`nanochat-${name}.jsonl`, lines);
  else trouble("There is no answered conversation to export.");
}

function setDrawer(isOpen) {
  const wasOpen = document.body.classList.contains("drawer");
  document.body.classList.toggle("drawer", isOpen);
  $("page").inert = isOpen;
  $("menu").setAttribute("aria-expanded", isOpen);
  if (isOpen) $("new").focus();
  else if (wasOpen) $("menu").focus();
}

function submit() {
  if (jobs.has(open.id)) return;         // Enter does not cut an answer short
  const text = $("input").value.trim();
  if (!text) return;
  trouble("");
  const command = /^\/([a-z]+)(?:\s+(.*))?$/s.exec(text);
  if (command) {
    const reply = commands(command[1], command[2] ?? "", { startNew, note });
    if (reply) return trouble(reply);
  }
  $("input").value = "";
  fit($("input"));
  if (!command) send(text);
}

// ---- wiring -------------------------------------------------------------------------------------

function listen() {
  $("form").addEventListener("submit", (event) => { event.preventDefault(); jobs.has(open.id) ? stop() : submit(); });
  $("input").addEventListener("input", () => fit($("input")));
  $("input").addEventListener("keydown", (event) => { if (isSend(event)) { event.preventDefault(); submit(); } });
  $("new").addEventListener("click", startNew);
  $("menu").addEventListener("click", () => setDrawer(true));
  $("backdrop").addEventListener("click", () => setDrawer(false));
  $("export").addEventListener("click", () => exportAs(new Date().toISOString().slice(0, 10), store.conversations()));
  $("theme").addEventListener("click", toggleTheme);
  $("settings-open").addEventListener("click", () => openSettings(open, () => { if (open.messages.length) store.save(open); draw(); }));
  $("trouble-close").addEventListener("click", () => trouble(""));
  for (const button of document.querySelectorAll("dialog .cancel")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  $("latest").addEventListener("click", toBottom);
  $("scroll").addEventListener("scroll", () => {
    const { scrollHeight, scrollTop, clientHeight } = $("scroll");
    follows = scrollHeight - scrollTop - clientHeight < 40;
    $("latest").hidden = follows;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
      document.body.classList.contains("drawer") ? setDrawer(false) : stop();
    }
    if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "n") { event.preventDefault(); startNew(); }
  });
  for (const event of ["online", "visibilitychange"]) {
    (event === "online" ? window : document).addEventListener(event, () => { if (!document.hidden) checkHealth(); });
  }
  window.addEventListener("offline", () => checkHealth());
  window.addEventListener("pagehide", () => { for (const c of store.conversations()) if (jobs.has(c.id)) store.save(c); });
  store.followOtherTabs((id) => jobs.has(id), (id) => {
    const changed = store.conversations().find((conversation) => conversation.id === id);
    if (id === open.id && changed) { open = changed; draw(); } else showRunning();
  });
}

store.setTroubleHandler(trouble);
for (const text of EXAMPLES) {
  $("examples").append(el("button", { type: "button", onclick: () => send(text) }, text));
}
showTheme();
listen();
show(store.conversations().find((conversation) => conversation.id === store.openId.get()) ?? store.newConversation(settings.system));
checkHealth();
