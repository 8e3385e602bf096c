// The list of conversations, and the dialog that asks for a word.

import { el, iconButton } from "./dom.js";

const $ = (id) => document.getElementById(id);

/** Draw the list. `acts`: open, rename, download, remove, each taking a conversation. */
export function drawList(conversations, openId, isWriting, acts) {
  const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
  $("conversations").replaceChildren(...conversations.map((conversation) => {
    const title = conversation.title || "New conversation";
    const isOpen = conversation.id === openId;
    return el("li", { "data-id": conversation.id, class: isOpen ? "open" : null },
      el("button", { type: "button", class: "title", "aria-current": isOpen ? "true" : null, title,
        onclick: () => acts.open(conversation) },
      ...(isWriting(conversation.id) ? [el("i", { class: "pulse", role: "img", "aria-label": "Being answered" })] : []), title),
      el("span", { class: "tools" },
        iconButton("edit", `Rename ${title}`, () => acts.rename(conversation)),
        iconButton("download", `Export ${title}`, () => acts.download(conversation)),
        iconButton("trash", `Delete ${title}`, () => acts.remove(conversation))));
  }));
  if (focused) $("conversations").querySelector(`li[data-id="${focused}"] .title`)?.focus();
}

/** Ask in a dialog. Gives the text typed ("" where there is no `label`, so nothing to type), or null if cancelled. */
export function ask({ title, text = "", label = null, value = "", type = "text", ok }) {
  const dialog = $("ask"), input = $("ask-input");
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-text").hidden = !text;
  $("ask-label").textContent = label ?? "";
  $("ask-field").hidden = label === null;
  $("ask-ok").textContent = ok;
  input.type = type;
  input.value = value;
  dialog.returnValue = "";
  dialog.showModal();
  if (label !== null) input.select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "ok" ? input.value.trim() : null);
      input.value = "";   // it may have been a key
    }, { once: true });
  });
}

/** Let the browser save a text as a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  const link = el("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
