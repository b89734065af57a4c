/** The playground. It uses the server through `client.js` alone, as any page could. */

import { Answer } from "./answer.js";
import { createSession, InferenceError, resumeSession } from "./client.js";
import { $, h, icon } from "./dom.js";
import { Frames } from "./frames.js";
import { Line } from "./line.js";
import { Parameters } from "./parameters.js";
import { DEMOS } from "./tools.js";
import { welcome } from "./welcome.js";

/**
 * @typedef {import("./client.js").Generation} Generation
 * @typedef {import("./client.js").Session} Session
 * @typedef {import("./answer.js").Story} Story
 * @typedef {{ text: string, answers: Answer[], kept: number }} Turn
 * @typedef {{ session: import("./client.js").State, turns: { text: string, kept: number, stories: Story[] }[] }} Kept
 */

const KEPT = "conversation";
const ICONS = new Map(DEMOS.map((demo) => [demo.tool.name, demo.icon]));

const CUT_SECONDS = 3;
const STATUS = {
  connecting: "Connecting",
  open: "Connected",
  draining: "The server is stopping",
  waiting: "Reconnecting",
  idle: "Connects when you ask",
  closed: "Closed",
};

const about = await (await fetch("playground.json")).json();
const frames = new Frames();
const line = new Line((passed) => frames.add(passed));
const parameters = new Parameters(about, showTools);
const message = $("message");
const scroll = $("scroll");

/** @type {Session | null} */
let session = null;
/** @type {Promise<void> | null} */
let connecting = null;
let token = "";
/** @type {Turn[]} */
let turns = [];
/** @type {Set<Generation>} */
const running = new Set();
/** Tools that are offered, by the ids of their chips. */
const offered = new Set(about.provider === "local" ? [] : DEMOS.map((demo) => demo.id));
let followsEnd = true;
/** The conversation from before the page was loaded anew. */
let before = takeKept();

// The session

/** Connects, where that is not under way already. Whatever fails is shown. */
function connect() {
  connecting ??= tryToConnect().finally(() => {
    connecting = null;
  });
  return connecting;
}

async function tryToConnect() {
  $("turns").querySelector(":scope > .failure")?.remove();
  const options = { token: token || undefined, WebSocket: line.WebSocket, onStatus: showStatus };
  try {
    session = before
      ? await resumeSession(".", before.session, { ...options, tools: DEMOS.map((demo) => demo.tool) })
      : await createSession(".", options);
    for (const turn of before?.turns ?? []) showAgain(turn, session.resumed);
    before = null;
  } catch (error) {
    if (error instanceof InferenceError && error.code === "unauthorized") {
      token = "";
      return askForToken("The server does not know this token. Is it complete?");
    }
    showStatus("idle");
    $("turns").append(h("p", { class: "failure", role: "alert" }, error instanceof Error ? error.message : `${error}`));
  }
}

/** Keeps the conversation while the page is loaded anew. The token is not kept. */
function keep() {
  if (!session) return;
  const stories = (/** @type {Turn} */ { answers }) => answers.map(({ story }) => story);
  const all = turns.map((turn) => ({ text: turn.text, kept: turn.kept, stories: stories(turn) }));
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ session: session.state, turns: all }));
  } catch {
    sessionStorage.removeItem(KEPT); // it is too long to be kept
  }
}

/** @returns {Kept | null} */
function takeKept() {
  return JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
}

/** @param {Kept["turns"][0]} turn @param {Generation[]} resumed */
function showAgain({ text, kept, stories }, resumed) {
  const turn = { text, kept, answers: stories.map(() => new Answer(followEnd, iconOf)) };
  stories.forEach((story, index) => {
    const generation = resumed.find(({ taskId }) => taskId !== null && taskId === story.taskId);
    const lost = { message: "The page was left before the server had the question", code: "lost", data: {} };
    if (story.times.endedAt !== null) turn.answers[index].repeat(story);
    else if (generation) follow(turn.answers[index], generation, story.times);
    else turn.answers[index].repeat({ ...story, failure: lost });
  });
  add(turn);
}

/** @param {keyof typeof STATUS} status */
function showStatus(status) {
  $("line").dataset.status = status;
  $("line-text").textContent = STATUS[status];
}

/** @param {string} reason */
function askForToken(reason) {
  $("token-error").textContent = reason;
  if (!$("token-dialog").open) $("token-dialog").showModal();
}

$("token-form").addEventListener("submit", () => {
  token = $("token").value;
});
$("token-dialog").addEventListener("close", () => {
  if (!token) return askForToken("");
  connect();
  message.focus();
});

// Asking

/**
 * Asks for as many answers as are wanted, all going on from the answers that were kept.
 *
 * @param {string} text
 * @param {import("./welcome.js").Wanted} [wanted] in place of what the form and the chips say
 */
async function ask(text, wanted = {}) {
  if (!session) await connect();
  if (!session) return;
  const tools = toolsOf(wanted.tools ? new Set(wanted.tools) : offered);
  if (!tools) return openPanel("parameters", true);
  const options = { ...parameters.given(), ...wanted.given, history: [...(wanted.before ?? []), ...history()], tools };
  /** @type {Turn} */
  const turn = { text, answers: [], kept: 0 };
  for (let number = 0; number < (wanted.answers ?? parameters.answers); number++) {
    const answer = new Answer(followEnd, iconOf);
    const seed = options.seed === undefined ? {} : { seed: options.seed + number };
    turn.answers.push(answer);
    follow(answer, session.generate(text, { ...options, ...seed }));
  }
  add(turn);
}

/** @param {string} name */
function iconOf(name) {
  return ICONS.get(name) ?? "hand";
}

/** @param {Turn} turn */
function add(turn) {
  turns.push(turn);
  $("turns").append(turnElement(turn));
  $("welcome").hidden = true;
  followsEnd = true;
  followEnd();
}

/** @param {Answer} answer @param {Generation} generation @param {import("./answer.js").Times} [times] */
async function follow(answer, generation, times) {
  running.add(generation);
  showRunning();
  speak("Answering");
  await answer.follow(generation, times);
  running.delete(generation);
  showRunning();
  speak(answer.result ? `Answer ${answer.result.status}: ${answer.result.text.slice(0, 600)}` : "The answer failed");
}

/** The conversation so far: each question with the answer that was kept. A turn that is not over is left out. */
function history() {
  return turns.flatMap(({ text, answers, kept }) => {
    const added = answers[kept].result?.messages ?? [];
    return added.length ? [{ role: "user", content: text }, ...added] : [];
  });
}

/** @param {Set<string>} ids @returns null where the own tool is none yet */
function toolsOf(ids) {
  const tools = DEMOS.filter((demo) => ids.has(demo.id)).map((demo) => demo.tool);
  if (!ids.has("own")) return tools;
  const own = parameters.ownTool();
  return own && [...tools, own];
}

async function stop() {
  for (const generation of running) generation.cancel();
}

// What is on the page

/** @param {Turn} turn */
function turnElement(turn) {
  const several = turn.answers.length > 1;
  const answers = h("div", { class: several ? "answers several" : "answers" });
  turn.answers.forEach((answer, index) => {
    if (several) answer.element.prepend(choice(turn, index));
    answers.append(answer.element);
  });
  return h(
    "div",
    { class: "turn" },
    h("p", { class: "question", dir: "auto" }, h("span", { class: "hidden", dir: "ltr" }, "You: "), turn.text),
    answers,
  );
}

/** @param {Turn} turn @param {number} index */
function choice(turn, index) {
  const name = `kept-${turns.length}`;
  const change = () => {
    turn.kept = index;
  };
  return h(
    "label",
    { class: "keep" },
    h("input", { type: "radio", name, checked: index === turn.kept, change }),
    "Go on from this one",
  );
}

function showTools() {
  const chip = (/** @type {string} */ id, /** @type {string} */ label, /** @type {string} */ picture) => {
    const toggle = () => {
      if (!offered.delete(id)) offered.add(id);
      button.setAttribute("aria-pressed", String(offered.has(id)));
      if (id === "own" && offered.has(id)) openPanel("parameters", true);
    };
    const button = h("button", { type: "button", class: "chip", click: toggle }, icon(picture), label);
    button.setAttribute("aria-pressed", String(offered.has(id)));
    return button;
  };
  const demos = DEMOS.map((demo) => chip(demo.id, demo.label, demo.icon));
  $("tools").replaceChildren(...demos, chip("own", parameters.ownName || "Your tool", "hand"));
}

function showRunning() {
  $("stop").hidden = running.size === 0;
  $("send").disabled = message.value.trim() === "";
}

/** @param {string} words to whoever listens to the page */
function speak(words) {
  $("spoken").textContent = words;
}

function followEnd() {
  if (followsEnd) scroll.scrollTop = scroll.scrollHeight;
  showLatest();
}

function showLatest() {
  const isAway = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight > 120;
  $("latest").hidden = !isAway || turns.length === 0;
}

/** @param {string} id @param {boolean} isOpen */
function openPanel(id, isOpen) {
  $(id).hidden = !isOpen;
  $(`show-${id}`).setAttribute("aria-expanded", String(isOpen));
  frames.show();
  if (isOpen) $(id).querySelector("button, select")?.focus();
  else $(`show-${id}`).focus();
}

/** Breaks the connection, and holds it broken for long enough to watch. */
async function cut() {
  if (!session || line.isCut) return;
  line.isCut = true;
  session.reconnect();
  for (let left = CUT_SECONDS; left > 0; left--) {
    $("cut").dataset.left = left;
    $("cut-text").textContent = `Cut, ${left}`;
    await new Promise((resolve) => setTimeout(resolve, 1_000));
  }
  delete $("cut").dataset.left;
  $("cut-text").textContent = "Cut the line";
  line.isCut = false;
  session.reconnect();
}

function startAnew() {
  session?.close();
  session = null;
  before = null;
  sessionStorage.removeItem(KEPT);
  turns = [];
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  message.focus();
  connect();
}

// Listening

$("composer").addEventListener("submit", async (/** @type {Event} */ event) => {
  event.preventDefault();
  if (!session && message.value.trim()) await connect();
  const text = message.value.trim(); // what is there now: while it connected, it may have been sent already
  if (!text || !session) return;
  message.value = "";
  grow();
  ask(text);
});
message.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
message.addEventListener("input", grow);

function grow() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
  showRunning();
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("token-dialog").open) return;
  const open = ["parameters", "frames"].find((id) => $(id).contains(document.activeElement));
  if (open) openPanel(open, false);
  else stop();
});
scroll.addEventListener("scroll", () => {
  followsEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  showLatest();
});
$("latest").addEventListener("click", () => {
  followsEnd = true;
  followEnd();
});
$("stop").addEventListener("click", stop);
$("cut").addEventListener("click", cut);
addEventListener("pagehide", keep);
$("new").addEventListener("click", startAnew);
$("clear-frames").addEventListener("click", () => frames.clear());
for (const id of ["parameters", "frames"]) {
  $(`show-${id}`).addEventListener("click", () => openPanel(id, $(id).hidden));
  document.querySelector(`[data-closes="${id}"]`)?.addEventListener("click", () => openPanel(id, false));
}
$("theme").addEventListener("click", () => {
  const { style } = document.documentElement;
  const isDark = style.colorScheme ? style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  style.colorScheme = isDark ? "light" : "dark";
});

$("model").append(
  h("b", {}, about.model),
  h("span", {}, about.provider === "local" ? " · embedded" : ` · ${about.provider}`),
);
$("welcome").append(...welcome(about, { ask, cut }));
showTools();
showRunning();
if (about.auth) askForToken("");
else connect();
