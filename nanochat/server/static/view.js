// A message on the page.

import { copyButton, el, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { BROKEN } from "./stream.js";

export class UserView {
  /** `edit(text)` is called with the new text when the user sends an edited message. */
  constructor(message, { edit, laterMessages }) {
    this.message = message;
    this.edit = edit;
    this.laterMessages = laterMessages;
    this.node = el("article", { class: "message user", "aria-label": "You" });
    this.show();
  }

  show() {
    this.editButton = iconButton("edit", "Edit and send again", () => this.startEdit());
    const actions = [copyButton("Copy message", () => this.message.content), this.editButton];
    this.node.replaceChildren(
      el("div", { class: "bubble" }, this.message.content), el("div", { class: "actions" }, ...actions));
  }

  startEdit() {
    const area = el("textarea", { "aria-label": "Edited message", rows: 1, oninput: () => fit(area) });
    area.value = this.message.content;
    const cancel = () => { this.show(); this.editButton.focus(); };
    const send = () => { if (area.value.trim()) this.edit(area.value.trim()); };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); cancel(); }
      if (isSend(event)) { event.preventDefault(); send(); }
    });
    const later = this.laterMessages();
    const note = later ? `What follows (${later} ${later === 1 ? "message" : "messages"}) is replaced.` : "";
    this.node.replaceChildren(el("form", { class: "editor", onsubmit: (e) => { e.preventDefault(); send(); } }, area,
      el("div", { class: "row" }, el("span", { class: "note" }, note),
        el("button", { type: "button", onclick: cancel }, "Cancel"), el("button", { class: "primary" }, "Send"))));
    fit(area);
    area.focus();
  }
}

export class AnswerView {
  constructor(message, { regenerate }) {
    this.message = message;
    this.segments = [];   // of each part, what brings its text up to date
    this.body = el("div", { class: "body" });
    this.foot = el("div", { class: "foot" });
    this.regenerate = regenerate;
    this.node = el("article", { class: "message assistant", "aria-label": "Answer" }, this.body, this.foot);
  }

  /** Show what the message has now; `isWriting`: there may be more. */
  update(isWriting) {
    const { content } = this.message;
    content.forEach((part, i) => {
      this.segments[i] ??= this.addSegment(part, i);
      this.segments[i](part.text);
    });
    this.node.classList.toggle("writing", isWriting);
    this.node.setAttribute("aria-busy", isWriting);
    if (isWriting) this.foot.replaceChildren(...(content.length ? [] : [el("span", { class: "dots", role: "img", "aria-label": "Waiting" },
      el("i"), el("i"), el("i"))]));
    else this.showFoot();
  }

  addSegment(part, i) {
    if (part.type === "text") {
      const box = el("div", { class: "markdown" });
      this.body.append(box);
      const view = new MarkdownView(box);
      return (text) => view.update(text);
    }
    if (part.type === "python" || this.message.content[i - 1]?.type !== "python") {
      this.tool = toolBox();
      this.body.append(this.tool.node);
    }
    return this.tool[part.type];
  }

  showFoot() {
    const { message, regenerate } = this;
    const shown = [], actions = [];
    if (message.dropped) shown.push(el("p", { class: "note" }, droppedNote(message.dropped)));
    if (message.end === "stop" && !message.content.length) shown.push(el("p", { class: "note" }, "The answer is empty."));
    if (message.end === "length") shown.push(el("p", { class: "note" }, "The answer was cut at the token limit."));
    if (message.content.length) actions.push(copyButton("Copy answer", () => plainText(message)));
    if (message.end === "stop" || message.end === "length") {
      actions.push(iconButton("again", "Write this answer anew", regenerate));
    } else {   // without an end, the page was closed meanwhile
      const isProblem = message.end !== "stopped";
      shown.push(el("div", { class: isProblem ? "problem" : "note", role: isProblem ? "alert" : null },
        el("span", {}, isProblem ? message.problem ?? BROKEN : "Stopped."),
        el("button", { type: "button", onclick: regenerate }, icon("again"), "Try again")));
    }
    actions.push(el("span", { class: "stats" }, stats(message)));
    this.foot.replaceChildren(...shown, el("div", { class: "actions" }, ...actions));
  }
}

function toolBox() {
  const pairs = { python: ["Call", "call"], python_output: ["Result", "result"] };
  const list = el("dl"), heads = [el("span", { class: "tool-name" }, icon("tool"), "Tool")];
  const box = {};
  for (const [type, [label, className]] of Object.entries(pairs)) {
    const head = el("code", { class: className }), whole = el("code");
    heads.push(head);
    list.append(el("dt", {}, label), el("dd", {}, el("pre", { tabindex: 0 }, whole)));
    box[type] = (text) => { head.textContent = text; whole.textContent = text; };
  }
  return { ...box, node: el("details", { class: "tool" }, el("summary", {}, ...heads), list) };
}

function droppedNote(number) {
  const what = number === 1 ? "message was" : `${number} messages were`;
  return `The conversation is longer than the model's context: the oldest ${what} dropped for this answer.`;
}

/** An answer's text, tool calls left out. */
function plainText(message) {
  return message.content.filter((part) => part.type === "text").map((part) => part.text).join("");
}

/** The server counts the tokens; of an answer that was stopped or broke off, nobody knows. */
function stats({ usage, seconds, wait }) {
  if (!usage) return "";
  const count = usage.completion_tokens;
  const shown = [`${count} ${count === 1 ? "token" : "tokens"}`];
  if (seconds >= 0.1) shown.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
  if (wait) shown.push(`first after ${wait.toFixed(2)} s`);
  const cached = usage.prompt_tokens_details?.cached_tokens;
  shown.push(`prompt ${usage.prompt_tokens}${cached ? ` (${cached} cached)` : ""}`);
  return shown.map((text) => text.replaceAll(" ", "\u00a0")).join(" · ");   // lines break between them
}

/** Make a textarea as high as its text, up to its CSS max-height. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/** Enter alone, and not the one that ends a Chinese or Japanese word. */
export const isSend = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;
