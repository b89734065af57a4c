/**
 * A client for the browser and for Node: sessions, generations as async iterators, tools as functions.
 *
 *     import { createSession } from "./client.js";
 *
 *     const session = await createSession("http://127.0.0.1:8000", { tools: [weather] });
 *     const generation = session.generate("Do I need an umbrella in Paris?");
 *     for await (const event of generation) if (event.type === "text") show(event.text);
 *     const { text, usage } = await generation.result;
 *
 * How a broken connection is mended
 * ---------------------------------
 * The client connects with `?after=N`, where N is the last number (`seq`) that it has seen, and the server first says
 * in `resumed` which tasks run and which tool calls they wait for, then repeats what came after N. Whatever the old
 * connection still carried is dropped by the server from then on, so this is a picture of what has arrived, and what
 * was under way when the line broke is settled by it and never sent blindly a second time:
 *
 * - `generate`: at most one is unanswered at a time, and it has arrived exactly if the server speaks of a task that is
 *   not known here, among those that run or in what it repeats. Otherwise it is sent again.
 * - a tool's result has arrived exactly if its call is no longer waited for. Otherwise it is sent again. Tools go on
 *   running meanwhile, and each call is run once.
 * - `cancel` is sent again as long as the task runs: that is harmless.
 *
 * What the server no longer keeps is announced (`gap`). Then text may be missing from the events, never from the
 * result; and a generation that cannot be settled fails with the code `connection_lost` instead of running twice.
 * While the picture is incomplete nothing is sent.
 *
 * @module
 */

/**
 * @typedef {{ [name: string]: unknown }} JsonObject
 *
 * @typedef {object} State What `resumeSession` needs of a session. It can be written as JSON, and has no token.
 * @property {string | null} id
 * @property {number} after the number before the first event of what runs
 * @property {JsonObject[]} history
 * @property {{ id: string, turn: JsonObject[] | null }[]} running `turn`: what goes into the history before the answer
 *
 * @typedef {object} Tool A function that the model may call, in this process.
 * @property {string} name `[A-Za-z0-9_-]{1,64}`
 * @property {string} [description] tells the model what it is for
 * @property {JsonObject} [parameters] JSON Schema of the arguments
 * @property {(args: any, context: ToolContext) => unknown} [run] may be async. What it returns goes to the model as
 *   JSON, what it throws as an error. Without it, calls are answered with the event's `respond` or `fail`.
 *
 * @typedef {object} ToolContext
 * @property {string} id the call's id
 * @property {AbortSignal} signal aborted when the generation ends before the tool does
 *
 * @typedef {object} SessionOptions
 * @property {Tool[]} [tools] for all generations of the session
 * @property {string} [token] where the server asks for one; it goes into HTTP headers only, never into a URL
 * @property {typeof fetch} [fetch] in place of the global one, for instance to have a backend of your own add the token
 * @property {number} [giveUpAfter] milliseconds without a connection after which running generations fail (120,000)
 * @property {number} [pingEvery] milliseconds of silence after which a connection in use is asked for a sign of life
 *   (10,000); one that gives none in as many is given up for a new one, and so is a handshake
 * @property {(attempt: number) => number} [backoff] milliseconds before the attempt, from 0, to connect again
 * @property {new (url: string, protocols: string[]) => WebSocketLike} [WebSocket] where there is no global one: Node 20
 *   without `--experimental-websocket` takes the class of the package `ws`
 * @property {(status: Status) => void} [onStatus] what has become of the connection
 *
 * @typedef {"connecting" | "open" | "draining" | "waiting" | "idle" | "closed"} Status `draining`: the server stops
 *   soon; `waiting`: until the next attempt to connect; `idle`: given up, until the next generation
 *
 * @typedef {object} WebSocketLike What is used of a WebSocket.
 * @property {(data: string) => void} send
 * @property {(code?: number) => void} close
 * @property {(type: any, listener: (event: any) => void) => void} addEventListener
 *
 * @typedef {object} GenerateOptions As on the wire, and as in OpenAI's chat completions; besides those named here also
 *   `seed`, `stop`, `presence_penalty`, `frequency_penalty`, `parallel_tool_calls`, `response_format`,
 *   `reasoning_effort` and `logit_bias`.
 * @property {JsonObject[]} [history] messages to go on from, in place of the session's own, which then stays as it is
 * @property {string} [system] a system message put before the history, for this generation
 * @property {Tool[]} [tools] in place of the session's, for this generation
 * @property {AbortSignal} [signal] cancels it; the generation then ends with the status `cancelled`, and fails not
 * @property {string} [model]
 * @property {number} [max_new_tokens]
 * @property {number} [temperature]
 * @property {number} [top_p]
 * @property {"none" | "auto" | "required" | JsonObject} [tool_choice]
 *
 * @typedef {{ input_tokens: number, output_tokens: number, total_tokens: number }} Usage
 *
 * @typedef {object} Result
 * @property {string | null} taskId
 * @property {string} text
 * @property {"completed" | "cancelled" | "length" | "content_filter"} status
 * @property {string | null} finishReason the provider's own
 * @property {Usage | null} usage over all rounds; null where the provider gave none
 * @property {JsonObject[]} messages what the generation adds to the history, valid to be sent back as it is
 *
 * @typedef {object} ToolCall A tool is to be called. One with `run` is being run already.
 * @property {"toolCall"} type
 * @property {string} id
 * @property {string} name
 * @property {any} arguments
 * @property {number} timeout seconds until the server no longer waits
 * @property {(result: unknown) => void} respond the first answer counts, also before that of `run`
 * @property {(reason?: unknown) => void} fail a text, or an error whose message is one
 *
 * @typedef {{ type: "text", text: string }
 *   | { type: "reasoning", text: string }
 *   | ToolCall
 *   | { type: "toolResult", id: string, name: string, result?: unknown, error?: string }
 *   | { type: "disconnected" }
 *   | { type: "resumed", gap: boolean }
 *   | ({ type: "end" } & Result)} GenerationEvent
 */

const REQUEST_LIMIT = 10_000;
const HEALTHY_AFTER = 10_000;
const PING_EVERY = 10_000;
const CLOSE_LIMIT = 100;
const GIVE_UP_AFTER = 120_000;
const TAKEN_OVER = 4409;
const TOO_BIG = 1009;
const OF_A_PROXY = [502, 503, 504];
const SCHEMES = /** @type {{ [scheme: string]: string }} */ ({
  "http:": "http:",
  "https:": "https:",
  "ws:": "http:",
  "wss:": "https:",
});
const NO_SUCH_TASK = -32004;
const LONGEST_REASON = 10_000;
const NO_REASON = "It failed, and no reason was given";
const UNSENDABLE = failure("The tool's answer cannot be sent");
const RETRYABLE = [-32001, -32005, "unreachable", "connection_lost", "session_gone"];

/** @param {number} attempt */
const backoff = (attempt) => Math.min(250 * 2 ** attempt, 5_000) * (0.5 + Math.random() / 2);

/**
 * What went wrong. `code` is the server's (a number, see the README) or one of the client's own: `unreachable` (no
 * inference server is at the URL; the message says what is found there), `unauthorized`, `session_gone` (expired, or the
 * server was started anew), `connection_lost` (given up, or not to be settled after a gap), `taken_over` (a newer
 * connection has the session), `too_big`, `invalid` (it cannot be sent), `closed`.
 * Where a generation had begun, `data.partial_text` has its text so far.
 */
export class InferenceError extends Error {
  /**
   * @param {string} message
   * @param {number | string} code
   * @param {{ [name: string]: any }} [data]
   * @param {ErrorOptions} [options]
   */
  constructor(message, code, data = {}, options) {
    super(message, options);
    this.name = "InferenceError";
    this.code = code;
    this.data = data;
  }

  /** Whether the same may succeed when it is tried again, after `data.retry_after` seconds where that is given. */
  get retryable() {
    return this.data.retryable ?? (this.data.phase === "connect" || RETRYABLE.includes(this.code));
  }
}

/**
 * Creates a session and connects to it.
 *
 * @param {string | URL} url the server's address; in a browser also relative to the page
 * @param {SessionOptions} [options]
 * @returns {Promise<Session>}
 * @throws {InferenceError} `unreachable`, `unauthorized`, `invalid`, or as the server refuses it
 */
export async function createSession(url, options = {}) {
  const session = new Session(url, options);
  await session.open();
  return session;
}

/**
 * Goes on with a session whose `state` was kept, for instance in `sessionStorage` while a page loads anew. The
 * generations that ran are in `session.resumed`, and their events come again from the first one on. A call that was
 * answered is not run again; one that was not, is. Where the server has forgotten the session, they fail with
 * `session_gone`, and the next generation gets a new session with the same history.
 *
 * @param {string | URL} url
 * @param {State} state
 * @param {SessionOptions} [options] functions are not in the state: the tools have to be given again
 * @returns {Promise<Session>}
 * @throws {InferenceError} as `createSession`
 */
export async function resumeSession(url, state, options = {}) {
  const session = new Session(url, options);
  await session.restore(state);
  return session;
}

/** One generation: an async iterator of its events, for one reader, and a promise of its result. */
export class Generation {
  #task;
  #cancel;

  /** @param {Task} task @param {() => void} cancel */
  constructor(task, cancel) {
    this.#task = task;
    this.#cancel = cancel;
  }

  /** The server's id for it, once there is one. */
  get taskId() {
    return this.#task.id;
  }

  /** The text so far. */
  get text() {
    return this.#task.text;
  }

  /** Rejects with an `InferenceError`, as the iteration does. Needs no iteration. */
  get result() {
    return this.#task.result;
  }

  /** Stops it, also at the provider. Returns when it has ended, in whatever way. */
  async cancel() {
    this.#cancel();
    await this.#task.result.catch(() => {});
  }

  /** @returns {AsyncIterator<GenerationEvent, undefined>} leaving a `for await` early cancels the generation */
  [Symbol.asyncIterator]() {
    return {
      next: () => this.#task.next(),
      return: async () => {
        this.#cancel();
        return { done: true, value: undefined };
      },
    };
  }
}

/** What a session keeps of a generation until it has ended. It has an id from when the server is known to have it. */
class Task {
  /** @type {string | null} */
  id = null;
  asked = false; // whether the request went out on this connection, or on one whose fate is not yet settled
  cancelled = false;
  text = "";
  /**
   * Calls the server waits for, as far as is known here, with the answers that it has not confirmed.
   * @type {Map<string, JsonObject | null>}
   */
  calls = new Map();
  ending = new AbortController();
  since = 0; // the number before its first event
  /** @type {GenerationEvent[]} */
  #events = [];
  /** @type {InferenceError | null} */
  #error = null;
  /** @type {(() => void)[]} */
  #waiting = [];
  /** @type {(result: Result) => void} */
  #resolve = () => {};
  /** @type {(error: InferenceError) => void} */
  #reject = () => {};

  /** @type {JsonObject} */
  params = {};

  /**
   * @param {Tool[]} tools
   * @param {JsonObject[] | null} turn what goes into the history before the answer; null: neither does
   * @param {(added: JsonObject[]) => void} remember
   */
  constructor(tools, turn, remember) {
    this.tools = tools;
    this.turn = turn;
    this.remember = remember;
    /** @type {Promise<Result>} */
    this.result = new Promise((resolve, reject) => ([this.#resolve, this.#reject] = [resolve, reject]));
    this.result.catch(() => {}); // whoever only iterates is told there
  }

  get isOver() {
    return this.ending.signal.aborted;
  }

  /** @returns {Promise<IteratorResult<GenerationEvent, undefined>>} */
  async next() {
    while (this.#events.length === 0 && !this.isOver) {
      await new Promise((resolve) => this.#waiting.push(() => resolve(null)));
    }
    const event = this.#events.shift();
    if (event) return { done: false, value: event };
    if (this.#error) throw this.#error;
    return { done: true, value: undefined };
  }

  #wake() {
    for (const wake of this.#waiting.splice(0)) wake();
  }

  /** Text that nobody has read yet grows in place: it costs little when nobody reads. @param {GenerationEvent} event */
  emit(event) {
    if (this.isOver) return;
    if (event.type === "text") this.text += event.text;
    const last = this.#events.at(-1);
    if (last && (last.type === "text" || last.type === "reasoning") && last.type === event.type) {
      this.#events[this.#events.length - 1] = { type: last.type, text: last.text + event.text };
    } else {
      this.#events.push(event);
    }
    this.#wake();
  }

  /** @param {Result} result */
  finish(result) {
    if (this.isOver) return;
    this.emit({ type: "end", ...result });
    if (this.turn && result.messages.length) this.remember([...this.turn, ...result.messages]);
    this.ending.abort();
    this.#resolve(result);
    this.#wake();
  }

  /** @param {InferenceError} error */
  fail(error) {
    if (this.isOver) return;
    if (this.text && error.data.partial_text === undefined) error.data.partial_text = this.text;
    this.#error = error;
    this.ending.abort();
    this.#reject(error);
    this.#wake();
  }
}

/** Made by `createSession`. */
export class Session {
  /**
   * The turns so far, which generations go on from: the message and what the generation added, as each ends.
   * @type {JsonObject[]}
   */
  history = [];
  /** The generations that `resumeSession` found running, in order. @type {Generation[]} */
  resumed = [];
  #url;
  #options;
  /** @type {string | null} */
  #id = null;
  #lastSeq = 0;
  /** @type {WebSocketLike | null} */
  #socket = null;
  /** What `resumed` said, until all that it announced has come. @type {any} */
  #replay = null;
  #isReady = false;
  #progressed = false;
  #heard = false;
  /** Tasks without an id, in order; only the first may have been asked for. @type {Task[]} */
  #queue = [];
  /** @type {Map<string, Task>} */
  #tasks = new Map();
  /** Requests of this connection that are not answered. @type {Map<number, Call>} */
  #calls = new Map();
  #lastCall = 0;
  /** The answer to the creation of the session, until it is used for the first connection. @type {any} */
  #created = null;
  #isConnecting = false;
  /** @type {InferenceError | null} */
  #closed = null;
  #interrupt = () => {};
  #online = () => this.reconnect();

  /** @param {string | URL} url @param {SessionOptions} options */
  constructor(url, options) {
    this.#url = base(url);
    this.#options = options;
    globalThis.addEventListener?.("online", this.#online);
  }

  /** The server's id for the session. Another one after the server has forgotten the session; null in between. */
  get id() {
    return this.#id;
  }

  /** What `resumeSession` needs to go on with it, as of now. @returns {State} */
  get state() {
    const running = [...this.#tasks.values()];
    return {
      id: this.#id,
      after: Math.min(this.#lastSeq, ...running.map((task) => task.since)),
      history: this.history,
      running: running.map(({ id, turn }) => ({ id: String(id), turn })),
    };
  }

  /**
   * Starts a generation; several may run at a time. Never throws: what is wrong, the iteration and the result tell.
   *
   * @param {string | JsonObject[] | null} [message] of the user, a text or content parts, not empty; null: the history
   *   has it
   * @param {GenerateOptions & JsonObject} [options]
   * @returns {Generation}
   */
  generate(message = null, options = {}) {
    const { history, tools, signal } = options;
    const turn = message === null ? [] : [{ role: "user", content: message }];
    const task = this.#task(tools ?? this.#options.tools, history ? null : turn);
    const cancel = () => this.#cancel(task);
    try {
      if (this.#closed) throw this.#closed;
      if (message?.length === 0)
        throw invalid("Expected a message that is not empty, or null where the history has it");
      task.params = parameters(message, { ...options, history: history ?? this.history });
      if (signal?.aborted) cancel();
      else this.#start(task);
      signal?.addEventListener("abort", cancel, { once: true, signal: task.ending.signal });
    } catch (error) {
      task.fail(error instanceof InferenceError ? copy(error) : invalid(reasonFrom(error)));
    }
    return new Generation(task, cancel);
  }

  /** @param {Tool[] | undefined} tools @param {JsonObject[] | null} turn */
  #task(tools = [], turn) {
    return new Task(tools, turn, (added) => this.history.push(...added));
  }

  /**
   * The result of a whole generation, where its events do not matter.
   *
   * @param {string | JsonObject[] | null} [message]
   * @param {GenerateOptions & JsonObject} [options] as for `generate`
   */
  async ask(message, options) {
    return this.generate(message, options).result;
  }

  /** Drops the connection and resumes on a new one, where the network is known to have changed. Nothing is lost. */
  reconnect() {
    this.#interrupt();
  }

  /** Cancels what runs and ends the session. What has not ended fails with the code `closed`. */
  close() {
    if (this.#isReady || this.#replay) this.#send({ method: "cancel" });
    this.#end(new InferenceError("The session is closed", "closed"));
  }

  /** Use `createSession`. */
  async open() {
    this.#socketClass();
    await this.#create();
    this.#connect();
  }

  /** Use `resumeSession`. @param {State} state */
  async restore({ id, after, history, running }) {
    this.#socketClass();
    [this.#id, this.#lastSeq, this.history] = [id, after, [...history]];
    for (const { id: taskId, turn } of running) {
      const task = this.#task(this.#options.tools, turn);
      [task.id, task.since] = [taskId, after];
      this.#tasks.set(taskId, task);
      this.resumed.push(new Generation(task, () => this.#cancel(task)));
    }
    try {
      if (id !== null) this.#created = await this.#ticket();
    } catch (error) {
      if (!(error instanceof InferenceError) || error.code !== "session_gone") throw error;
      this.#forget(error);
    }
    this.#connect();
  }

  // Connecting

  /** Keeps the session connected, until it is closed or given up. */
  async #connect() {
    if (this.#isConnecting) return;
    this.#isConnecting = true;
    let attempt = 0;
    let lostAt = Date.now();
    while (!this.#closed) {
      this.#status("connecting");
      const startedAt = Date.now();
      const refusal = await this.#connectOnce();
      if (this.#progressed || Date.now() - startedAt >= HEALTHY_AFTER) [attempt, lostAt] = [0, Date.now()];
      const patience = (this.#options.giveUpAfter ?? GIVE_UP_AFTER) - (Date.now() - lostAt);
      if (this.#closed || !this.#mayGoOn(refusal, patience)) break;
      this.#status("waiting");
      const least = (refusal?.data.retry_after ?? 0) * 1_000;
      await this.#pause(Math.max(least, (this.#options.backoff ?? backoff)(attempt++)));
    }
    this.#isConnecting = false;
    this.#status(this.#closed ? "closed" : "idle");
  }

  /**
   * Returns when the connection is gone, with the reason where there was none.
   * @returns {Promise<InferenceError | null>}
   */
  async #connectOnce() {
    this.#progressed = false;
    try {
      const protocols = await this.#protocols();
      if (!this.#closed) await this.#converse(protocols);
      return null;
    } catch (error) {
      return error instanceof InferenceError ? error : new InferenceError(String(error), "unreachable");
    }
  }

  /**
   * Whether to connect again; fails what can no longer be answered.
   * @param {InferenceError | null} refusal
   * @param {number} patience
   */
  #mayGoOn(refusal, patience) {
    if (refusal?.code === "session_gone") {
      this.#forget(refusal);
      return this.#queue.length > 0;
    }
    if (refusal?.retryable !== false && patience > 0) return true;
    const lost = new InferenceError("The connection was lost, and none could be made anew", "connection_lost");
    this.#forget(refusal?.retryable === false ? refusal : lost, true);
    return false;
  }

  /** What to say in the handshake; creates the session where there is none. @returns {Promise<string[]>} */
  async #protocols() {
    if (this.#id === null) await this.#create();
    const { ticket } = this.#created ?? (await this.#ticket());
    this.#created = null;
    return ticket ? ["inference-trio", `ticket.${ticket}`] : [];
  }

  #ticket() {
    return this.#post(`sessions/${this.#id}/ticket`);
  }

  async #create() {
    const created = await this.#post("create_session", { tools: (this.#options.tools ?? []).map(declaration) });
    if (typeof created.session_id !== "string")
      throw noServer(this.#url, "another one, which makes no sessions", false);
    this.#created = created;
    this.#id = created.session_id;
    this.#lastSeq = 0;
  }

  /** @param {string} path @param {JsonObject} body @returns {Promise<any>} */
  async #post(path, body = {}) {
    const { token } = this.#options;
    const url = new URL(path, this.#url);
    let response;
    try {
      response = await (this.#options.fetch ?? fetch)(url, {
        method: "POST",
        headers: { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) },
        body: JSON.stringify(body),
        signal: AbortSignal.timeout(REQUEST_LIMIT),
      });
    } catch (cause) {
      throw noServer(this.#url, reasonOf(cause, this.#url), true, {}, cause);
    }
    const answer = await response.json().catch(() => null);
    if (response.ok && answer) return answer;
    throw refusalOf(this.#url, response.status, answer?.error ?? {}, path !== "create_session");
  }

  #socketClass() {
    const WebSocket = this.#options.WebSocket ?? globalThis.WebSocket;
    if (WebSocket) return WebSocket;
    throw invalid(
      "There is no WebSocket here: start Node 20 with --experimental-websocket, take Node 22 or newer, " +
        "or give a class as the option `WebSocket`",
    );
  }

  /** Serves one connection. Returns when it is gone. @param {string[]} protocols @returns {Promise<void>} */
  #converse(protocols) {
    const url = new URL(`ws/${this.#id}?after=${this.#lastSeq}`, this.#url);
    url.protocol = url.protocol.replace("http", "ws");
    const WebSocket = this.#socketClass();
    return new Promise((resolve) => {
      /** @type {WebSocketLike} */
      const socket = new WebSocket(url.href, protocols);
      const gone = (/** @type {number} */ code) => {
        clearTimeout(timer);
        clearInterval(pulse);
        if (this.#socket === socket) this.#disconnected(code);
        resolve();
      };
      const drop = () => {
        gone(0);
        socket.close();
      };
      const patience = this.#options.pingEvery ?? PING_EVERY;
      const timer = setTimeout(drop, patience);
      /** @type {ReturnType<typeof setInterval> | undefined} */
      let pulse;
      this.#socket = socket;
      this.#interrupt = drop;
      socket.addEventListener("open", () => {
        clearTimeout(timer);
        pulse = this.#watch(patience, drop);
      });
      socket.addEventListener("message", ({ data }) => this.#socket === socket && this.#receive(JSON.parse(data)));
      socket.addEventListener("close", ({ code }) => gone(code));
      // The event `close` follows and says more; but not with Node's, where the handshake failed.
      socket.addEventListener("error", () => setTimeout(gone, CLOSE_LIMIT, 1006));
    });
  }

  /**
   * Finds out whether the line is dead without having said so. A page cannot send a WebSocket's own ping; cancelling
   * what there is not is answered at once and changes nothing.
   *
   * @param {number} patience
   * @param {() => void} drop
   */
  #watch(patience, drop) {
    let isAsked = false;
    return setInterval(() => {
      const isInUse = this.#tasks.size > 0 || this.#queue.length > 0;
      if (this.#heard || !isInUse) [this.#heard, isAsked] = [false, false];
      else if (isAsked) drop();
      else {
        isAsked = true;
        this.#call("cancel", { task_id: "none" });
      }
    }, patience);
  }

  /** @param {number} code */
  #disconnected(code) {
    const calls = [...this.#calls.values()];
    const wasOpen = this.#isReady || this.#replay !== null;
    this.#calls.clear();
    this.#socket = this.#replay = null;
    this.#isReady = false;
    if (code === TAKEN_OVER) return this.#end(new InferenceError("A newer connection has the session", "taken_over"));
    if (code === TOO_BIG && calls.length) {
      const largest = calls.reduce((a, b) => (a.size < b.size ? b : a));
      largest.refused(new InferenceError(`The server takes no message of ${largest.size} characters`, "too_big"));
    }
    if (wasOpen) for (const task of this.#tasks.values()) task.emit({ type: "disconnected" });
  }

  /** Sleeps so many milliseconds, or until `reconnect` or `close`. @param {number} time @returns {Promise<void>} */
  #pause(time) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, time);
      this.#interrupt = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  /**
   * The server no longer has the session: what it was asked for fails.
   * @param {InferenceError} error
   * @param {boolean} all also what it was not asked for yet
   */
  #forget(error, all = false) {
    this.#id = this.#created = null;
    const lost = [...this.#tasks.values(), ...this.#queue.filter((task) => all || task.asked)];
    this.#tasks.clear();
    this.#queue = this.#queue.filter((task) => !lost.includes(task));
    for (const task of lost) task.fail(copy(error));
  }

  /** @param {InferenceError} error */
  #end(error) {
    if (this.#closed) return;
    this.#closed = error;
    globalThis.removeEventListener?.("online", this.#online);
    this.#forget(error, true);
    this.#interrupt();
  }

  /** @param {Status} status */
  #status(status) {
    try {
      this.#options.onStatus?.(status);
    } catch (error) {
      // It is reported as whatever is thrown in a listener, and does not end the connection.
      queueMicrotask(() => {
        throw error;
      });
    }
  }

  // Receiving

  /** @param {any} frame */
  #receive(frame) {
    this.#heard = true;
    if (frame.method === undefined) return this.#answered(frame);
    if (frame.method === "draining") return this.#status("draining");
    if (frame.method === "resumed") return this.#resume(frame.params);
    if (!(frame.params?.seq > this.#lastSeq)) return;
    this.#lastSeq = frame.params.seq;
    this.#progressed = true;
    const task = this.#tasks.get(frame.params.task_id) ?? this.#adopt(frame.params.task_id);
    if (task) this.#notice(task, frame.method, frame.params);
    this.#settle();
  }

  /** @param {any} frame */
  #answered({ id, result, error }) {
    // An error without an id is about a frame that the server could not read. It answers in order, but for `cancel`.
    const key = id ?? [...this.#calls].find(([, call]) => call.method !== "cancel")?.[0];
    const call = this.#calls.get(key);
    this.#calls.delete(key);
    this.#progressed = true;
    if (error) call?.refused(new InferenceError(error.message, error.code, error.data));
    else call?.answered(result);
  }

  /** @param {any} resumed */
  #resume(resumed) {
    this.#replay = resumed;
    if (resumed.gap) this.#lastSeq = Math.max(this.#lastSeq, resumed.oldest_seq - 1);
    for (const { task_id } of resumed.tasks.filter(isActive)) if (!this.#tasks.has(task_id)) this.#adopt(task_id);
    for (const task of this.#tasks.values()) task.emit({ type: "resumed", gap: resumed.gap });
    this.#status("open");
    this.#settle();
  }

  /** Once all that `resumed` announced has come: settles what was under way when the connection broke, and goes on. */
  #settle() {
    if (!this.#replay || this.#lastSeq < this.#replay.latest_seq) return;
    const { gap, tasks } = this.#replay;
    this.#replay = null;
    this.#isReady = true;
    const active = new Map(tasks.filter(isActive).map((/** @type {any} */ task) => [task.task_id, task]));
    for (const [id, task] of this.#tasks) {
      if (active.has(id)) this.#reconcile(task, active.get(id).outstanding);
      else this.#lose(task, "Its end is among what the server no longer keeps");
    }
    const [asked] = this.#queue.filter((task) => task.asked);
    if (asked && gap) this.#lose(asked, "Whether it ran is among what the server no longer keeps");
    else if (asked) asked.asked = false;
    if (asked?.cancelled) this.#dismiss(asked);
    for (const id of active.keys()) if (!this.#tasks.has(id)) this.#call("cancel", { task_id: id });
    this.#ask();
  }

  /** @param {Task} task @param {string[]} outstanding */
  #reconcile(task, outstanding) {
    if (task.cancelled) return this.#call("cancel", { task_id: task.id });
    for (const id of task.calls.keys()) if (!outstanding.includes(id)) task.calls.delete(id);
    for (const id of outstanding) {
      if (!task.calls.has(id)) task.calls.set(id, failure("The client did not get this call"));
      this.#give(task, id);
    }
  }

  /** The server has taken on the task that it was asked for. @param {string} id */
  #adopt(id) {
    const [task] = this.#queue;
    if (!task?.asked) return undefined;
    this.#queue.shift();
    task.id = id;
    this.#tasks.set(id, task);
    if (task.cancelled && this.#isReady) this.#call("cancel", { task_id: id });
    this.#ask();
    return task;
  }

  /** @param {Task} task @param {string} method @param {any} params */
  #notice(task, method, params) {
    if (method === "text_chunk") task.emit({ type: "text", text: params.chunk });
    if (method === "reasoning_chunk") task.emit({ type: "reasoning", text: params.chunk });
    if (method === "function_call_request") this.#run(task, params);
    if (method === "end" || method === "error") this.#tasks.delete(params.task_id);
    if (method === "error") task.fail(new InferenceError(params.error.message, params.error.code, params.error.data));
    if (method === "end") {
      task.finish({
        taskId: params.task_id,
        text: params.final_text,
        status: params.status_message,
        finishReason: params.finish_reason ?? null,
        usage: params.usage ?? null,
        messages: params.messages ?? [],
      });
    }
  }

  /** @param {Task} task @param {string} reason */
  #lose(task, reason) {
    this.#remove(task);
    task.fail(new InferenceError(`The generation is lost: ${reason}`, "connection_lost"));
  }

  /** @param {Task} task */
  #remove(task) {
    if (task.id !== null) this.#tasks.delete(task.id);
    this.#queue = this.#queue.filter((other) => other !== task);
  }

  // Asking

  /** @param {Task} task */
  #start(task) {
    this.#queue.push(task);
    this.#connect();
    this.#ask();
  }

  /** Asks for the next generation, if the one before is answered. */
  #ask() {
    const [task] = this.#queue;
    if (!this.#isReady || !task || task.asked) return;
    task.asked = true;
    task.since = this.#lastSeq;
    this.#call(
      "generate",
      task.params,
      ({ task_id }) => this.#adopt(task_id),
      (error) => {
        this.#remove(task);
        task.fail(error);
        this.#ask();
      },
    );
  }

  /** @param {Task} task */
  #cancel(task) {
    if (task.isOver || task.cancelled) return;
    task.cancelled = true;
    if (task.id === null && !task.asked) this.#dismiss(task);
    else if (task.id !== null && this.#isReady) this.#call("cancel", { task_id: task.id });
  }

  /** Cancels what the server does not have. @param {Task} task */
  #dismiss(task) {
    this.#remove(task);
    task.finish({ taskId: null, text: "", status: "cancelled", finishReason: null, usage: null, messages: [] });
  }

  /** @param {Task} task @param {any} request */
  async #run(task, { request_id: id, tool_name: name, parameters, timeout }) {
    task.calls.set(id, null);
    const answer = (/** @type {JsonObject} */ given) => {
      if (task.isOver || task.calls.get(id) !== null) return;
      task.calls.set(id, given);
      const { result, error_message: error } = given;
      task.emit({ type: "toolResult", id, name, ...(given.is_error ? { error: String(error) } : { result }) });
      this.#give(task, id);
    };
    const respond = (/** @type {unknown} */ result) => answer(success(result));
    const fail = (/** @type {unknown} */ reason) => answer(failure(reason));
    task.emit({ type: "toolCall", id, name, arguments: parameters, timeout, respond, fail });
    const tool = task.tools.find((one) => one.name === name);
    if (!tool?.run || !this.#isOutstanding(task, id)) return;
    try {
      respond(await tool.run(parameters, { id, signal: task.ending.signal }));
    } catch (error) {
      fail(error);
    }
  }

  /** Whether the server waits for the call: not if it is repeated after it was answered. @param {Task} task */
  #isOutstanding(task, /** @type {string} */ id) {
    if (!this.#replay) return true;
    return this.#replay.tasks.some((/** @type {any} */ status) => {
      return status.task_id === task.id && status.outstanding.includes(id);
    });
  }

  /**
   * Sends the answer to a call, if there is one and a connection to send it on.
   * @param {Task} task
   * @param {string} id
   */
  #give(task, id) {
    const answer = task.calls.get(id);
    if (!answer || !this.#isReady) return;
    const params = { task_id: task.id, results: [{ tool_call_id: id, ...answer }] };
    this.#call(
      "tool_result",
      params,
      () => task.calls.delete(id),
      (error) => {
        if (answer === UNSENDABLE || error.code === NO_SUCH_TASK || !task.calls.has(id)) return;
        task.calls.set(id, answer.is_error ? UNSENDABLE : failure(`The result cannot be sent: ${error.message}`));
        this.#give(task, id);
      },
    );
  }

  /**
   * @param {string} method
   * @param {JsonObject} params
   * @param {(result: any) => void} [answered]
   * @param {(error: InferenceError) => void} [refused]
   */
  #call(method, params, answered = () => {}, refused = () => {}) {
    const id = ++this.#lastCall;
    this.#calls.set(id, { method, size: this.#send({ id, method, params }), answered, refused });
  }

  /** Sends a frame. Returns its size. @param {JsonObject} frame */
  #send(frame) {
    const text = JSON.stringify({ jsonrpc: "2.0", ...frame });
    this.#socket?.send(text);
    return text.length;
  }
}

/**
 * A request that is not answered yet.
 *
 * @typedef {object} Call
 * @property {string} method
 * @property {number} size
 * @property {(result: any) => void} answered
 * @property {(error: InferenceError) => void} refused
 */

/** A tool as the server is told of it. @param {Tool} tool */
function declaration({ name, description, parameters }) {
  return { name, ...(description && { description }), ...(parameters && { parameters }) };
}

/** @param {any} status of a task, in `resumed` */
function isActive(status) {
  return status.state === "streaming" || status.state === "awaiting_tools";
}

/**
 * What a tool gave, as it goes to the server; a failure where it cannot go there.
 * @param {unknown} result
 * @returns {JsonObject}
 */
function success(result) {
  try {
    const text = JSON.stringify(result ?? null);
    if (text !== undefined) return { result: JSON.parse(text) };
  } catch (error) {
    return failure(`The result cannot be written as JSON: ${reasonFrom(error)}`);
  }
  return failure(`The result cannot be written as JSON: it is a ${typeof result}`);
}

/** @param {unknown} reason whatever was thrown @returns {JsonObject} */
function failure(reason) {
  return { is_error: true, error_message: reasonFrom(reason) };
}

/**
 * Whatever was thrown, as a text that can be sent: well-formed, not empty, not long.
 * @param {unknown} thrown
 */
function reasonFrom(thrown) {
  try {
    const reason = String((thrown instanceof Error ? thrown.message || thrown.name : thrown) ?? "");
    return reason.slice(0, LONGEST_REASON).replace(/\p{Surrogate}/gu, "\ufffd") || NO_REASON;
  } catch {
    return NO_REASON; // it cannot even be read
  }
}

/**
 * The parameters of `generate` as they are now, whatever becomes of the objects they are made of.
 *
 * @param {string | JsonObject[] | null} message
 * @param {GenerateOptions & JsonObject} options
 * @returns {JsonObject}
 */
function parameters(message, { system, tools, signal, history = [], ...given }) {
  const instruction = system ? [{ role: "system", content: system }] : [];
  return JSON.parse(
    JSON.stringify({
      ...given,
      history: [...instruction, ...history],
      ...(message !== null && { message }),
      ...(tools && { tools: tools.map(declaration) }),
    }),
  );
}

/** The same error for one more generation, with a stack and data of its own. @param {InferenceError} error */
function copy(error) {
  return new InferenceError(error.message, error.code, { ...error.data }, { cause: error });
}

/** @param {string} message */
function invalid(message) {
  return new InferenceError(message, "invalid");
}

/** The server's address, to which paths are added. @param {string | URL} url @returns {URL} */
function base(url) {
  const absolute = URL.canParse(url, globalThis.location?.href) ? new URL(url, globalThis.location?.href) : null;
  const scheme = SCHEMES[absolute?.protocol ?? ""];
  if (!absolute || !scheme) throw invalid(`Expected a URL like http://127.0.0.1:8000, got ${url || "nothing"}`);
  absolute.protocol = scheme;
  return absolute.pathname.endsWith("/") ? absolute : new URL(`${absolute.pathname}/`, absolute);
}

/**
 * @param {URL} url
 * @param {string} found there
 * @param {boolean} retryable
 * @param {JsonObject} [data]
 * @param {unknown} [cause]
 */
function noServer(url, found, retryable, data = {}, cause) {
  const message = `There is no inference server at ${url}: ${found}`;
  return new InferenceError(message, "unreachable", { ...data, retryable }, { cause });
}

/** Why nothing was reached: Node says it further down, a browser not at all. @param {any} cause @param {URL} url */
function reasonOf({ message, cause }, url) {
  const page = globalThis.location?.origin;
  if (page === undefined || page === url.origin) return cause?.message || cause?.code || message;
  return `${message}, or it refuses pages of ${page} (INFERENCE_ALLOWED_ORIGINS)`;
}

/**
 * @param {URL} url
 * @param {number} status of an HTTP answer
 * @param {any} error in its body
 * @param {boolean} isOfSession
 */
function refusalOf(url, status, error, isOfSession) {
  const data = { ...error.data, status };
  const message = error.message ?? `The server answers with the HTTP status ${status}`;
  if (status === 401) return new InferenceError(message, "unauthorized", data);
  if (status === 404 && isOfSession) return new InferenceError(message, "session_gone", data);
  if (error.code === undefined || status === 404 || status === 405) {
    return noServer(url, `what is there answers with the HTTP status ${status}`, OF_A_PROXY.includes(status), data);
  }
  return new InferenceError(message, error.code, data);
}
