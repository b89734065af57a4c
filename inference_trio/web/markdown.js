/**
 * Markdown as it streams in. Marked's lexer finds the structure; the elements are made here, from a short list, and
 * text is set as text. So whatever a model writes, no element, attribute or address comes to be that is not below.
 *
 * Appending is cheap: only the last blocks are lexed and made again, at most once a frame, and then not before four
 * times the time has passed that this took, layout included. So a single block that grows long does not take all of
 * the page's time either.
 */

import { Lexer } from "./vendor/marked.js";
import { copyButton, h } from "./dom.js";

const DEEPEST = 24;
const LONGEST_BLOCK = 200_000;
const SHARE = 4;
const LINKS = ["http:", "https:", "mailto:"];
const ENTITIES = /** @type {{ [name: string]: string }} */ ({
  amp: "&",
  lt: "<",
  gt: ">",
  quot: '"',
  apos: "'",
  nbsp: "\u00a0",
});

/** The text of an answer as elements in `target`. */
export class StreamingMarkdown {
  #target;
  #tail = "";
  /** @type {Node[]} */
  #tailNodes = [];
  #timer = 0;
  #cost = 0;
  #rendered = () => {};

  /** @param {HTMLElement} target @param {() => void} [rendered] called after each change; its time counts too */
  constructor(target, rendered = () => {}) {
    this.#target = target;
    this.#rendered = rendered;
  }

  /** @param {string} text */
  append(text) {
    this.#tail += text.replaceAll("\r", "");
    this.#timer ||= window.setTimeout(() => requestAnimationFrame(() => this.flush()), this.#cost * SHARE);
  }

  /** Shows all that was appended. */
  flush() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const started = performance.now();
    const blocks = lex(this.#tail);
    const done = settled(blocks, this.#tail);
    for (const node of this.#tailNodes) node.parentNode?.removeChild(node);
    const nodes = blocks.map(({ token }) => block(token));
    this.#target.append(...nodes.flat());
    this.#tailNodes = nodes.slice(done).flat();
    this.#tail = this.#tail.slice(blocks[done]?.at ?? 0);
    this.#rendered();
    this.#cost = performance.now() - started;
  }
}

/**
 * How many of the blocks cannot change any more: those before the last one that has a whole line. A line that is not
 * complete may still turn out to belong to the block before it.
 *
 * @param {Block[]} blocks @param {string} text
 */
function settled(blocks, text) {
  const lastLine = text.lastIndexOf("\n");
  const last = blocks.findLastIndex(({ token, at }) => token.type !== "space" && at < lastLine);
  return Math.max(last, 0);
}

/**
 * The blocks of a text, with where they begin. The lexer changes white space at the end of some.
 *
 * @typedef {{ token: any, at: number }} Block
 * @param {string} text @returns {Block[]}
 */
function lex(text) {
  const plain = [{ token: { type: "plain", text }, at: 0 }];
  if (text.length > LONGEST_BLOCK) return plain;
  try {
    let end = 0;
    return new Lexer({ gfm: true }).lex(text).map((token) => {
      const raw = token.raw.trimEnd();
      const at = text.indexOf(raw, end);
      if (at < 0 || text.slice(end, at).trim()) throw new Error("The lexer has changed the text");
      end = at + raw.length;
      return { token, at };
    });
  } catch {
    return plain; // or it is nested deeper than the lexer can follow
  }
}

/** A block by itself, which runs from right to left where its text does. @param {any} token */
function block(token) {
  const nodes = render([token]);
  for (const node of nodes) if (node instanceof HTMLElement && token.type !== "code") node.dir = "auto";
  return nodes;
}

/** @param {any[] | undefined} tokens @returns {Node[]} */
function render(tokens, depth = 0) {
  if (depth > DEEPEST) return (tokens ?? []).map((token) => text(token.raw));
  return (tokens ?? []).flatMap((token) => {
    const make = ELEMENTS[token.type];
    return make ? make(token, depth + 1) : [text(token.text ?? token.raw)];
  });
}

/** @param {string} tag */
const inline = (tag) => (/** @type {any} */ token, /** @type {number} */ depth) => [
  h(tag, {}, ...render(token.tokens, depth)),
];

/** @type {{ [type: string]: (token: any, depth: number) => Node[] }} */
const ELEMENTS = {
  space: () => [],
  def: () => [],
  plain: (token) => [h("p", {}, token.text)],
  paragraph: inline("p"),
  blockquote: inline("blockquote"),
  strong: inline("strong"),
  em: inline("em"),
  del: inline("del"),
  br: () => [h("br")],
  hr: () => [h("hr")],
  heading: (token, depth) => [h(`h${Math.min(token.depth + 2, 6)}`, {}, ...render(token.tokens, depth))],
  codespan: (token) => [h("code", {}, token.text)],
  code: (token) => [code(token.text, token.lang)],
  html: (token) => (token.block ? [h("p", {}, token.text.trim())] : [new Text(token.text)]),
  text: (token, depth) => (token.tokens ? render(token.tokens, depth) : [text(token.text)]),
  escape: (token) => [new Text(token.text)],
  checkbox: (token) => [h("input", { type: "checkbox", disabled: true, checked: token.checked }), " "],
  link: (token, depth) => [link(token.href, render(token.tokens, depth))],
  image: (token) => [link(token.href, [text(`[image: ${token.text || token.href}]`)])],
  list: (token, depth) => [
    h(
      token.ordered ? "ol" : "ul",
      { start: token.ordered && token.start !== 1 && token.start },
      ...token.items.map((/** @type {any} */ item) => h("li", {}, ...render(item.tokens, depth))),
    ),
  ],
  table: (token, depth) => {
    const row = (/** @type {string} */ tag) => (/** @type {any[]} */ cells) =>
      h("tr", {}, ...cells.map((cell) => h(tag, { class: cell.align ?? undefined }, ...render(cell.tokens, depth))));
    const head = h("thead", {}, row("th")(token.header));
    return [
      h("div", { class: "table", tabindex: "0" }, h("table", {}, head, h("tbody", {}, ...token.rows.map(row("td"))))),
    ];
  },
};

/** @param {string} source @param {string} [language] */
function code(source, language) {
  const head = h(
    "div",
    { class: "code-head" },
    h("span", {}, language?.split(/\s/)[0] || "text"),
    copyButton(() => source),
  );
  return h("div", { class: "code" }, head, h("pre", { tabindex: "0" }, h("code", {}, source)));
}

/**
 * A link that opens elsewhere; what is no whole address of the web is only text.
 *
 * @param {string} address @param {Node[]} children
 */
function link(address, children) {
  let url = null;
  try {
    url = new URL(address);
  } catch {
    // relative, or no address at all
  }
  if (!url || !LINKS.includes(url.protocol)) return h("span", {}, ...children);
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer", title: url.href }, ...children);
}

/** The lexer leaves entities in the text. @param {string} source */
function text(source) {
  return new Text(
    source.replace(/&(?:#(\d{1,7})|#x([0-9a-f]{1,6})|(\w{2,6}));/gi, (whole, decimal, hex, name) => {
      if (name) return ENTITIES[name.toLowerCase()] ?? whole;
      const point = decimal ? Number(decimal) : parseInt(hex, 16);
      return point > 0 && point <= 0x10ffff ? String.fromCodePoint(point) : whole;
    }),
  );
}
