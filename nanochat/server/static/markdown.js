// Markdown to DOM nodes: what models write of it. There is no HTML in it, so a tag is shown as it is typed.
// Cost is linear in the text, whatever the text: see `missing` in inline().

import { copyButton, el } from "./dom.js";

const MAX_DEPTH = 6;   // of quotes, lists and emphasis in one another; deeper ones stay as typed

// ---- blocks -------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const NEW_ITEM = /^ {0,3}(?:[-*+]|1[.)])[ \t]+\S/;   // what may cut a paragraph short
const ALIGN = /^:?-+:?$/;

const isBlank = (line) => !line.trim();
const cutsShort = (line) => [FENCE, HEADING, RULE, QUOTE, NEW_ITEM].some((start) => start.test(line));

/** The blocks of a text: {type, start (its first character), source, ...}. */
function blocks(text) {
  const lines = text.split("\n");
  const found = [];
  let i = 0, start = 0;
  while (i < lines.length) {
    if (isBlank(lines[i])) {
      start += lines[i++].length + 1;
      continue;
    }
    const [block, end] = blockAt(lines, i);
    const source = lines.slice(i, end).join("\n");
    found.push({ ...block, start, source });
    start += source.length + 1;
    i = end;
  }
  return found;
}

/** The block that begins with line i, and the line behind it. */
function blockAt(lines, i) {
  const line = lines[i];
  if (FENCE.test(line)) return code(lines, i);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = line.slice(heading[0].length).trim();
    return [{ type: "heading", level: heading[1].length, text: text.replace(/(^| )#+$/, "") }, i + 1];
  }
  if (RULE.test(line)) return [{ type: "rule" }, i + 1];
  if (QUOTE.test(line)) return quote(lines, i);
  if (ITEM.test(line)) return list(lines, i);
  if (isTable(lines, i)) return table(lines, i);
  let end = i + 1;
  while (end < lines.length && !isBlank(lines[end]) && !cutsShort(lines[end]) && !isTable(lines, end)) end++;
  return [{ type: "paragraph", text: lines.slice(i, end).map((l) => l.trim()).join("\n") }, end];
}

function code(lines, i) {
  const [, fence, label] = FENCE.exec(lines[i]);
  const indent = lines[i].indexOf(fence[0]);
  let end = i + 1;
  const isClosing = (line) => {
    const text = line.trim();
    return text.length >= fence.length && text === fence[0].repeat(text.length);
  };
  while (end < lines.length && !isClosing(lines[end])) end++;
  const text = lines.slice(i + 1, end).map((line) => dedent(line, indent)).join("\n");
  return [{ type: "code", language: label.trim().split(/\s/)[0], text }, Math.min(end + 1, lines.length)];
}

function quote(lines, i) {
  const inner = [];
  while (i < lines.length && (QUOTE.test(lines[i]) || (!isBlank(lines[i]) && !cutsShort(lines[i])))) {
    inner.push(lines[i++].replace(QUOTE, ""));
  }
  return [{ type: "quote", text: inner.join("\n") }, i];
}

function list(lines, i) {
  const [, indent, marker] = ITEM.exec(lines[i]);
  const isOrdered = /\d/.test(marker), edge = width(indent);
  const begins = (line) => {
    const item = ITEM.exec(line);
    return item && width(item[1]) <= edge + 1 && /\d/.test(item[2]) === isOrdered && !RULE.test(line) ? item : null;
  };
  const items = [];
  let inner = 0, isLoose = false;   // inner: where the text of the present item begins
  while (i < lines.length) {
    const item = begins(lines[i]);
    if (item) {
      inner = width(item[0]);
      items.push([lines[i++].slice(item[0].length)]);
      continue;
    }
    let next = i;
    while (next < lines.length && isBlank(lines[next])) next++;
    const isInside = next < lines.length && width(/^[ \t]*/.exec(lines[next])[0]) > edge;
    if (next > i && next < lines.length && (isInside || begins(lines[next]))) {
      isLoose = true;
    } else if (next > i || (!isInside && cutsShort(lines[i]))) {
      break;
    }
    if (next > i) items.at(-1).push(...lines.slice(i, next));
    else items.at(-1).push(dedent(lines[next++], inner));
    i = next;
  }
  const first = isOrdered ? parseInt(marker, 10) : 1;
  return [{ type: "list", isOrdered, first, isLoose, items: items.map((item) => item.join("\n")) }, i];
}

function isTable(lines, i) {
  if (!lines[i].includes("|")) return false;
  const aligns = cells(lines[i + 1] ?? "");
  return aligns.every((align) => ALIGN.test(align)) && cells(lines[i]).length === aligns.length;
}

function table(lines, i) {
  const head = cells(lines[i]), aligns = cells(lines[i + 1]), rows = [];
  let end = i + 2;
  for (; end < lines.length && lines[end].includes("|"); end++) rows.push(cells(lines[end]));
  const align = aligns.map((a) => (a.endsWith(":") ? (a.startsWith(":") ? "center" : "right") : null));
  return [{ type: "table", head, align, rows }, end];
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** Columns of white space and list markers; a tab counts as four. */
const width = (text) => text.replaceAll("\t", "    ").length;

function dedent(line, columns) {
  let cut = 0;
  for (let left = columns; left > 0 && " \t".includes(line[cut] ?? "x"); cut++) left -= line[cut] === "\t" ? 4 : 1;
  return line.slice(cut);
}

// ---- blocks as nodes ----------------------------------------------------------------------------

const nodes = (text, depth) => blocks(text).map((block) => node(block, depth));

function node(block, depth = 0) {
  switch (block.type) {
    case "code": return codeBlock(block);
    case "heading": return el(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text));   // the page's own are h1, h2
    case "rule": return el("hr");
    case "quote": return el("blockquote", {}, ...inner(block.text, depth));
    case "list": {
      const items = block.items.map((item) => el("li", {}, ...(block.isLoose ? inner : tight)(item, depth)));
      return el(block.isOrdered ? "ol" : "ul", { start: block.first === 1 ? null : block.first }, ...items);
    }
    case "table": return tableNode(block);
    default: return el("p", {}, ...inline(block.text));
  }
}

function inner(text, depth) {
  return depth < MAX_DEPTH ? nodes(text, depth + 1) : [text];
}

/** As inner(), but a paragraph stands without its box. */
function tight(text, depth) {
  return inner(text, depth).flatMap((child) => (child.tagName === "P" ? [...child.childNodes] : [child]));
}

function codeBlock({ language, text }) {
  const content = el("code", {}, document.createTextNode(text));
  const name = language || "text";
  return el("figure", { class: "code" },
    el("figcaption", {}, el("span", {}, name), copyButton("Copy code", () => content.textContent)),
    el("pre", { tabindex: 0, role: "region", "aria-label": `Code, ${name}` }, content));   // scrolls by keyboard too
}

function tableNode({ head, align, rows }) {
  const row = (tag, texts) => el("tr", {}, ...head.map((_, i) =>
    el(tag, { class: align[i], scope: tag === "th" ? "col" : null }, ...inline(texts[i] ?? ""))));
  return el("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" },
    el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...rows.map((texts) => row("td", texts)))));
}

// ---- inside a line ------------------------------------------------------------------------------

const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;
const LINK = /!?\[((?:[^[\]\\\n]|\\.|\[[^[\]\n]*\])*)\]\((<[^<>\n]*>|[^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)(?: "[^"\n]*")?\)/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const BARE_LINK = /https?:\/\/[^\s<>"'`]*[^\s<>"'`.,:;!?)\]*_~]/y;
const ESCAPE = /\\([!-/:-@[-`{-~])/y;
const MARKS = [["***", "em", "strong"], ["**", "strong"], ["*", "em"], ["__", "strong"], ["_", "em"], ["~~", "del"]];
const SCHEMES = ["http:", "https:", "mailto:"];

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** A text's nodes: strings and elements. */
function inline(text, depth = 0, isInLink = false) {
  const found = [];
  const missing = new Set();   // marks that nothing closes any more: not to be looked for again from each that opens
  let plain = "", at = 0;
  for (let special; (special = match(SPECIAL, text, at)); ) {
    plain += text.slice(at, special.index);
    at = special.index;
    const taken = span(text, at, depth, isInLink, missing);
    if (taken === null) {
      plain += text[at++];
    } else if (typeof taken[0] === "string") {
      plain += taken[0];
      at = taken[1];
    } else {
      found.push(plain, taken[0]);
      plain = "";
      at = taken[1];
    }
  }
  return [...found, plain + text.slice(at)].filter((child) => child !== "");
}

/** [what begins at this character, where it ends], or null if that is the character itself. */
function span(text, at, depth, isInLink, missing) {
  const char = text[at];
  if (char === "\n") return [el("br"), at + 1];
  if (char === "\\") {
    const escape = match(ESCAPE, text, at);
    return escape && [escape[1], at + 2];
  }
  if (char === "`") return codeSpan(text, at, missing);
  if (char === "[" || char === "!" || char === "<" || char === "h") return isInLink ? null : link(text, at, depth);
  if (depth >= MAX_DEPTH || (char !== "~" && /\w/.test(text[at - 1] ?? ""))) return null;   // 2*3*4 is a product
  for (const [mark, ...tags] of MARKS) {
    if (!text.startsWith(mark, at) || missing.has(mark)) continue;
    const from = at + mark.length;
    if (/\s/.test(text[from] ?? " ")) continue;
    const end = closing(text, from, mark);
    if (end < 0) {
      missing.add(mark);
      continue;
    }
    const children = inline(text.slice(from, end), depth + 1, isInLink);
    return [tags.reduceRight((inside, tag) => [el(tag, {}, ...inside)], children)[0], end + mark.length];
  }
  return null;
}

/** Where emphasis that begins before `from` ends; -1 if it does not. Marks in code do not count. */
function closing(text, from, mark) {
  const char = mark[0], length = mark.length;
  const run = new RegExp(`\\\\[^]|\`[^\`\\n]*\`|\\${char}+`, "g");
  run.lastIndex = from;
  for (let found; (found = run.exec(text)); ) {
    const size = found[0].length, end = found.index + size - length;
    if (found[0][0] !== char || size < length || end <= from || (length === 1 && size === 2)) continue;
    if (/\s/.test(text[found.index - 1]) || (char === "_" && /\w/.test(text[found.index + size] ?? ""))) continue;
    return end;
  }
  return -1;
}

function codeSpan(text, at, missing) {
  const fence = match(/`+/y, text, at)[0], from = at + fence.length;
  if (!missing.has(fence)) {
    const run = /`+/g;
    run.lastIndex = from;
    for (let found; (found = run.exec(text)); ) {
      if (found[0] !== fence) continue;
      const inside = text.slice(from, found.index).replaceAll("\n", " ");
      const isPadded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim();
      return [el("code", {}, isPadded ? inside.slice(1, -1) : inside), run.lastIndex];
    }
    missing.add(fence);
  }
  return [fence, from];
}

function link(text, at, depth) {
  const named = match(LINK, text, at);
  if (named) {
    const [all, label, target] = named;
    const href = safe(target.replace(/^<|>$/g, ""));
    const children = depth < MAX_DEPTH ? inline(label, depth + 1, true) : [label];
    return href && [anchor(href, children.length ? children : [href]), at + all.length];
  }
  const bare = match(AUTOLINK, text, at) ?? (/\w/.test(text[at - 1] ?? "") ? null : match(BARE_LINK, text, at));
  if (!bare) return null;
  const href = safe(bare[1] ?? bare[0]);
  return href && [anchor(href, [bare[1] ?? bare[0]]), at + bare[0].length];
}

/** The address, if it is whole and of a scheme that only opens a page or a letter. */
function safe(address) {
  try {
    const url = new URL(address);
    return SCHEMES.includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

const anchor = (href, children) => el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" }, ...children);

// ---- a text that grows --------------------------------------------------------------------------

/** Markdown in an element. When the text grows, only its last blocks are read and drawn again. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.shown = [];   // blocks with their node
  }

  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) this.shown = [];
    this.text = text;
    // a new line may still join the last two: "- a", an empty line, "-", and then " b" makes them one list
    const settled = this.shown.slice(0, -2), open = this.shown.slice(-2);
    const from = open[0]?.start ?? 0;
    const fresh = blocks(text.slice(from)).map((block, i) => redraw(open[i], { ...block, start: block.start + from }));
    this.shown = [...settled, ...fresh];
    let place = settled.length ? settled.at(-1).node.nextSibling : this.element.firstChild;
    for (const block of fresh) {
      if (block.node === place) place = place.nextSibling;
      else this.element.insertBefore(block.node, place);
    }
    for (let old; (old = place); ) {
      place = old.nextSibling;
      old.remove();
    }
  }
}

/** The block with its node: the old one's, where that still fits. */
function redraw(old, block) {
  if (old?.source === block.source && old.type === block.type) return { ...block, node: old.node };
  if (old?.type === "code" && block.type === "code" && old.language === block.language) {
    old.node.querySelector("code").firstChild.data = block.text;   // its copy button and scroll position stay
    return { ...block, node: old.node };
  }
  return { ...block, node: node(block) };
}
