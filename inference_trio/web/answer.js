/** One answer on the page: what a generation does, as it does it. */

import { copyButton, h, icon } from "./dom.js";
import { StreamingMarkdown } from "./markdown.js";

/**
 * @typedef {Pick<import("./client.js").Generation, "text" | "taskId" | "result" | typeof Symbol.asyncIterator>} Generation
 * @typedef {import("./client.js").GenerationEvent} GenerationEvent
 * @typedef {import("./client.js").ToolCall} ToolCall
 * @typedef {import("./client.js").InferenceError} InferenceError
 * @typedef {import("./client.js").Result} Result
 * @typedef {{ startedAt: number, firstAt: number | null, endedAt: number | null }} Times of the clock, in milliseconds
 * @typedef {{ message: string, code: number | string, data: any }} Failure
 * @typedef {{ taskId: string | null, times: Times, events: GenerationEvent[], failure: Failure | null }} Story What has
 *   happened, so that it can be shown again
 */

const HINTS = /** @type {{ [code: string]: string }} */ ({
  taken_over: "This conversation goes on in another window. Start a new one here.",
  session_gone: "The server was started anew, or had forgotten the conversation. Send the message again.",
  unauthorized: "The server does not know this token.",
});

/** What `change` is told: something was added that may have to be scrolled to. */
export class Answer {
  /** The result, once there is one. @type {Result | null} */
  result = null;
  element;
  /** @type {Story} */
  #story = { taskId: null, times: { startedAt: Date.now(), firstAt: null, endedAt: null }, events: [], failure: null };
  #change;
  #icons;
  #isRepeated = false;
  #wasCut = false;
  /** @type {Generation | null} */
  #generation = null;
  /**
   * What is being written: prose or thoughts.
   * @type {{ type: string, append: (text: string) => void, close: () => void } | null}
   */
  #writing = null;
  /** @type {Map<string, Call>} */
  #calls = new Map();
  #parts = h("div", { class: "parts" });
  #notice = h("p", { class: "event", hidden: true });
  #hasGap = false;
  #waiting = h("div", { class: "waiting", role: "img", "aria-label": "Waiting for the model" }, h("i"), h("i"), h("i"));

  /** @param {() => void} change @param {(name: string) => string} icons the icon of a tool */
  constructor(change, icons) {
    this.#change = change;
    this.#icons = icons;
    this.element = h(
      "article",
      { class: "answer is-streaming", "aria-busy": "true", "aria-label": "Answer" },
      this.#parts,
      this.#waiting,
      this.#notice,
    );
  }

  /** @returns {Story} */
  get story() {
    return { ...this.#story, taskId: this.#generation?.taskId ?? null };
  }

  /** Shows again what was shown before. @param {Story} story */
  async repeat({ taskId, times, events, failure }) {
    const text = events.map((event) => (event.type === "text" ? event.text : "")).join("");
    const result = /** @type {any} */ (events.find((event) => event.type === "end"));
    const generation = (async function* () {
      yield* events;
      if (failure) throw failure;
    })();
    const parts = { taskId, text, result, [Symbol.asyncIterator]: () => generation };
    await this.follow(/** @type {any} */ (parts), times);
  }

  /**
   * Shows the generation to its end. Never raises.
   * @param {Generation} generation @param {Times} [times] of one that was shown before
   */
  async follow(generation, times) {
    this.#generation = generation;
    this.#isRepeated = times !== undefined;
    if (times) this.#story.times = times;
    try {
      for await (const event of generation) {
        this.#note(event);
        this.#show(event);
      }
      this.result = await generation.result;
      if (this.#hasGap) this.#showWhole(this.result.text);
      this.#end(this.result.status, this.result.text, this.result.usage);
    } catch (error) {
      this.#fail(/** @type {InferenceError} */ (error), generation.text);
    }
    this.element.classList.remove("is-streaming");
    this.element.removeAttribute("aria-busy");
    this.#change();
  }

  /** Text is kept in one piece. @param {GenerationEvent} event */
  #note(event) {
    const { events } = this.#story;
    const last = events.at(-1);
    if ((event.type === "text" || event.type === "reasoning") && last?.type === event.type) last.text += event.text;
    else events.push({ ...event });
  }

  /** @param {GenerationEvent} event */
  #show(event) {
    if (event.type === "text" || event.type === "reasoning" || event.type === "toolCall") {
      this.#story.times.firstAt ??= Date.now();
      this.#waiting.remove();
    }
    if (event.type === "text" || event.type === "reasoning") {
      if (this.#writing?.type !== event.type) this.#open(event.type);
      this.#writing?.append(event.text);
      return;
    }
    if (event.type === "toolCall") this.#call(event);
    if (event.type === "toolResult") {
      this.#calls.get(event.id)?.answered(event);
      this.#notice.before(this.#waiting);
    }
    if (event.type === "disconnected") {
      this.#wasCut = true;
      this.#notify("The line is cut", "bad");
    }
    if (event.type === "resumed") {
      this.#hasGap ||= event.gap;
      if (event.gap) this.#notify("The line was cut. What is missing comes with the end", "bad");
      else if (!this.#wasCut) this.#notify("The page was loaded anew, and the answer went on: nothing lost", "good");
      else this.#notify("The line was cut, and resumed where it was: nothing lost, nothing twice", "good");
    }
    this.#change();
  }

  /** @param {string} words @param {"good" | "bad"} mood */
  #notify(words, mood) {
    this.#notice.textContent = words;
    this.#notice.dataset.mood = mood;
    this.#notice.hidden = false;
  }

  /** In place of text with a gap. @param {string} text */
  #showWhole(text) {
    for (const prose of this.#parts.querySelectorAll(".prose")) prose.remove();
    this.#open("text");
    this.#writing?.append(text);
  }

  /** @param {"text" | "reasoning"} type */
  #open(type) {
    this.#close();
    this.#writing = type === "text" ? this.#prose() : this.#thoughts();
  }

  #close() {
    this.#writing?.close();
    this.#writing = null;
  }

  #prose() {
    const prose = this.#add(h("div", { class: "prose" }));
    const markdown = new StreamingMarkdown(prose, this.#change);
    return {
      type: "text",
      append: (/** @type {string} */ text) => markdown.append(text),
      close: () => markdown.flush(),
    };
  }

  #thoughts() {
    const since = performance.now();
    const thoughts = h("div", { class: "thoughts" });
    const title = h("span", {}, "Reasoning …");
    this.#add(
      h(
        "details",
        { class: "reasoning" },
        h("summary", {}, icon("thought"), title, icon("chevron", "chevron")),
        thoughts,
      ),
    );
    return {
      type: "reasoning",
      append: (/** @type {string} */ text) => thoughts.append(text),
      close: () => {
        title.textContent = this.#isRepeated ? "Reasoning" : `Reasoning, ${seconds(performance.now() - since)}`;
      },
    };
  }

  /** @param {ToolCall} event */
  #call(event) {
    this.#close();
    const call = new Call(event, this.#icons(event.name));
    this.#calls.set(event.id, call);
    this.#add(call.element);
    call.focus();
  }

  /** @template {HTMLElement} T @param {T} element @returns {T} */
  #add(element) {
    this.#parts.append(element);
    return element;
  }

  /** @param {string} status @param {string} text @param {Result["usage"]} usage */
  #end(status, text, usage) {
    this.#close();
    this.#waiting.remove();
    for (const [id, call] of this.#calls) call.ended(resultIn(this.result, id));
    const { times } = this.#story;
    times.endedAt ??= Date.now();
    const [startedAt, now, firstAt] = [times.startedAt, times.endedAt, times.firstAt];
    const words = [h("span", { class: "status", "data-status": status }, status.replace("_", " "))];
    if (firstAt !== null) words.push(h("span", {}, `first token ${seconds(firstAt - startedAt)}`));
    if (usage) {
      words.push(
        h("span", { title: "tokens read and written" }, `${usage.input_tokens} in, ${usage.output_tokens} out`),
      );
      const rate = usage.output_tokens / ((now - (firstAt ?? now)) / 1_000);
      if (Number.isFinite(rate) && usage.output_tokens > 5) words.push(h("span", {}, `${rate.toFixed(0)} tokens/s`));
    }
    words.push(h("span", {}, `${seconds(now - startedAt)} in all`));
    if (text)
      words.push(
        h(
          "span",
          { class: "end" },
          copyButton(() => text),
        ),
      );
    this.element.append(h("footer", { class: "meta" }, ...words));
  }

  /** @param {InferenceError} error @param {string} text */
  #fail(error, text) {
    this.#story.failure = { message: error.message, code: error.code, data: error.data };
    this.#close();
    this.#waiting.remove();
    const code = h("code", {}, `${error.code ?? error.name}`);
    const more = [error.data?.provider_message, HINTS[error.code]].filter(Boolean).map((words) => ` ${words}`);
    this.element.append(h("p", { class: "failure", role: "alert" }, h("b", {}, `${error.message} `), code, ...more));
    this.#end("failed", text, null);
  }
}

/** A tool call as a card. */
class Call {
  element;
  #event;
  #state = h("span", { class: "state" });
  #body;
  #byHand;

  /** @param {ToolCall} event @param {string} picture the tool's icon */
  constructor(event, picture) {
    this.#event = event;
    this.#byHand = picture === "hand" ? this.#form() : null;
    this.#body = h(
      "div",
      { class: "body" },
      h("span", { class: "label" }, "Arguments"),
      h("pre", {}, pretty(event.arguments)),
    );
    if (this.#byHand) this.#body.append(this.#byHand);
    const name = h("span", { class: "name" }, event.name);
    const summary = h("summary", {}, icon(picture), name, this.#state, icon("chevron", "chevron"));
    this.element = h("details", { class: "call", open: true }, summary, this.#body);
    this.#set(this.#byHand ? "asked" : "running", this.#byHand ? "waits for you" : "running");
  }

  /** Goes to the form, unless something is being written elsewhere. */
  focus() {
    const { activeElement } = document;
    if (activeElement instanceof HTMLTextAreaElement && activeElement.value) return;
    this.#byHand?.querySelector("textarea")?.focus();
  }

  /** @param {{ result?: unknown, error?: string }} given */
  answered({ result, error }) {
    this.#byHand?.remove();
    this.#body.append(
      h("span", { class: "label" }, error === undefined ? "Result" : "Error"),
      h("pre", {}, error ?? pretty(result)),
    );
    this.#set(error === undefined ? "done" : "failed", error === undefined ? "answered" : "failed");
  }

  /** The generation has ended. @param {unknown} result of a call that was answered before the page was loaded anew */
  ended(result) {
    if (this.element.dataset.state === "done" || this.element.dataset.state === "failed") return;
    if (result !== undefined) return this.answered({ result });
    this.#byHand?.remove();
    this.#set("failed", "not answered");
  }

  /** @param {string} state @param {string} words */
  #set(state, words) {
    this.element.dataset.state = state;
    this.#state.textContent = words;
  }

  #form() {
    const input = h("textarea", {
      rows: 2,
      class: "code-input",
      placeholder: '{"temperature": 21} or any text',
      spellcheck: false,
    });
    const answer = (/** @type {Event} */ event) => {
      event.preventDefault();
      this.#event.respond(parsed(input.value));
    };
    const fail = () => this.#event.fail(input.value || "The tool failed");
    return h(
      "form",
      { class: "by-hand", submit: answer },
      h("label", { class: "field" }, h("span", {}, "Your answer ", h("small", {}, "JSON or text")), input),
      h(
        "div",
        { class: "row" },
        h("button", { type: "submit", class: "button small solid" }, "Answer"),
        h("button", { type: "button", class: "button small", click: fail }, "Fail"),
      ),
    );
  }
}

/** What the model was told of a call. @param {Result | null} result @param {string} id */
function resultIn(result, id) {
  return result?.messages.find(({ role, tool_call_id: of }) => role === "tool" && of === id)?.content;
}

/** @param {string} text */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** @param {unknown} value */
function pretty(value) {
  if (typeof value === "string") return value;
  const short = JSON.stringify(value);
  return short.length <= 60 ? short : JSON.stringify(value, null, 2);
}

/** @param {number} milliseconds */
function seconds(milliseconds) {
  return milliseconds < 1_000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1_000).toFixed(1)} s`;
}
