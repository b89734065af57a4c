/** The side panel with the raw frames. */

import { $, h } from "./dom.js";

/** @typedef {import("./line.js").Passed} Passed */

const MOST = 400;
const WAYS = { in: "←", out: "→", mark: "·" };

export class Frames {
  /** @type {Passed[]} */
  #kept = [];
  #count = 0;
  #shown = 0;
  #isDue = false;
  #list = $("frame-list");
  #panel = $("frames");
  #start = performance.now();

  /** @param {Passed} passed */
  add(passed) {
    this.#kept.push(passed);
    this.#count += 1;
    if (this.#kept.length > 2 * MOST) this.#kept = this.#kept.slice(-MOST);
    this.show();
  }

  /** Brings the list up to date, once a frame of the screen, while the panel is open. */
  show() {
    if (this.#isDue || this.#panel.hidden) return;
    this.#isDue = true;
    requestAnimationFrame(() => {
      this.#isDue = false;
      const isAtEnd = this.#list.scrollHeight - this.#list.scrollTop - this.#list.clientHeight < 40;
      const added = Math.min(this.#count - this.#shown, this.#kept.length, MOST);
      if (added > 0) this.#list.append(...this.#kept.slice(-added).map((passed) => this.#row(passed)));
      while (this.#list.childElementCount > MOST) this.#list.firstElementChild.remove();
      this.#shown = this.#count;
      $("frame-count").textContent = this.#count > MOST ? `last ${MOST} of ${this.#count}` : `${this.#count}`;
      if (isAtEnd) this.#list.scrollTop = this.#list.scrollHeight;
    });
  }

  clear() {
    this.#kept = [];
    this.#count = this.#shown = 0;
    this.#start = performance.now();
    this.#list.replaceChildren();
    $("frame-count").textContent = "";
  }

  /** @param {Passed} passed */
  #row({ way, at, text, method }) {
    const cells = [
      h("span", { class: "time" }, ((at - this.#start) / 1_000).toFixed(2)),
      h(
        "span",
        { class: "way", "aria-label": way === "in" ? "received" : way === "out" ? "sent" : "connection" },
        WAYS[way],
      ),
      h("span", { class: "method" }, method),
      h("span", { class: "gist" }, way === "mark" ? text : gist(JSON.parse(text))),
    ];
    if (way === "mark")
      return h("li", { class: "frame", "data-way": way, "data-mark": method }, h("div", { class: "mark" }, ...cells));
    const details = h(
      "details",
      {
        toggle: () => {
          if (details.childElementCount === 1) details.append(h("pre", {}, JSON.stringify(JSON.parse(text), null, 2)));
        },
      },
      h("summary", {}, ...cells),
    );
    return h("li", { class: "frame", "data-way": way }, details);
  }
}

/** @param {any} frame */
function gist({ method, params, result, error }) {
  if (method === "resumed") return `${params.after} of ${params.latest_seq}${params.gap ? ", with a gap" : ""}`;
  const { seq, chunk, tool_name: tool, status_message: status, message, error: failed } = params ?? {};
  const what =
    chunk ?? tool ?? status ?? message ?? failed?.message ?? error?.message ?? result?.task_id ?? params?.task_id;
  const words = typeof what === "string" && chunk !== undefined ? JSON.stringify(what) : (what ?? "");
  return `${seq ? `${seq} ` : ""}${typeof words === "string" ? words : JSON.stringify(words)}`.slice(0, 120);
}
