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
export type JsonObject = {
    [name: string]: unknown;
};
export type State = {
    id: string | null;
    /**
     * the number before the first event of what runs
     */
    after: number;
    history: JsonObject[];
    /**
     * `turn`: what goes into the history before the answer
     */
    running: {
        id: string;
        turn: JsonObject[] | null;
    }[];
};
export type Tool = {
    /**
     * `[A-Za-z0-9_-]{1,64}`
     */
    name: string;
    /**
     * tells the model what it is for
     */
    description?: string;
    /**
     * JSON Schema of the arguments
     */
    parameters?: JsonObject;
    /**
     * may be async. What it returns goes to the model as
     * JSON, what it throws as an error. Without it, calls are answered with the event's `respond` or `fail`.
     */
    run?: (args: any, context: ToolContext) => unknown;
};
export type ToolContext = {
    /**
     * the call's id
     */
    id: string;
    /**
     * aborted when the generation ends before the tool does
     */
    signal: AbortSignal;
};
export type SessionOptions = {
    /**
     * for all generations of the session
     */
    tools?: Tool[];
    /**
     * where the server asks for one; it goes into HTTP headers only, never into a URL
     */
    token?: string;
    /**
     * in place of the global one, for instance to have a backend of your own add the token
     */
    fetch?: typeof fetch;
    /**
     * milliseconds without a connection after which running generations fail (120,000)
     */
    giveUpAfter?: number;
    /**
     * milliseconds of silence after which a connection in use is asked for a sign of life
     * (10,000); one that gives none in as many is given up for a new one, and so is a handshake
     */
    pingEvery?: number;
    /**
     * milliseconds before the attempt, from 0, to connect again
     */
    backoff?: (attempt: number) => number;
    /**
     * where there is no global one: Node 20
     * without `--experimental-websocket` takes the class of the package `ws`
     */
    WebSocket?: new (url: string, protocols: string[]) => WebSocketLike;
    /**
     * what has become of the connection
     */
    onStatus?: (status: Status) => void;
};
export type Status = "connecting" | "open" | "draining" | "waiting" | "idle" | "closed";
export type WebSocketLike = {
    send: (data: string) => void;
    close: (code?: number) => void;
    addEventListener: (type: any, listener: (event: any) => void) => void;
};
export type GenerateOptions = {
    /**
     * messages to go on from, in place of the session's own, which then stays as it is
     */
    history?: JsonObject[];
    /**
     * a system message put before the history, for this generation
     */
    system?: string;
    /**
     * in place of the session's, for this generation
     */
    tools?: Tool[];
    /**
     * cancels it; the generation then ends with the status `cancelled`, and fails not
     */
    signal?: AbortSignal;
    model?: string;
    max_new_tokens?: number;
    temperature?: number;
    top_p?: number;
    tool_choice?: "none" | "auto" | "required" | JsonObject;
};
export type Usage = {
    input_tokens: number;
    output_tokens: number;
    total_tokens: number;
};
export type Result = {
    taskId: string | null;
    text: string;
    status: "completed" | "cancelled" | "length" | "content_filter";
    /**
     * the provider's own
     */
    finishReason: string | null;
    /**
     * over all rounds; null where the provider gave none
     */
    usage: Usage | null;
    /**
     * what the generation adds to the history, valid to be sent back as it is
     */
    messages: JsonObject[];
};
export type ToolCall = {
    type: "toolCall";
    id: string;
    name: string;
    arguments: any;
    /**
     * seconds until the server no longer waits
     */
    timeout: number;
    /**
     * the first answer counts, also before that of `run`
     */
    respond: (result: unknown) => void;
    /**
     * a text, or an error whose message is one
     */
    fail: (reason?: unknown) => void;
};
export type GenerationEvent = {
    type: "text";
    text: string;
} | {
    type: "reasoning";
    text: string;
} | ToolCall | {
    type: "toolResult";
    id: string;
    name: string;
    result?: unknown;
    error?: string;
} | {
    type: "disconnected";
} | {
    type: "resumed";
    gap: boolean;
} | ({
    type: "end";
} & Result);
/**
 * What went wrong. `code` is the server's (a number, see the README) or one of the client's own: `unreachable` (no
 * inference server is at the URL; the message says what is found there), `unauthorized`, `session_gone` (expired, or the
 * server was started anew), `connection_lost` (given up, or not to be settled after a gap), `taken_over` (a newer
 * connection has the session), `too_big`, `invalid` (it cannot be sent), `closed`.
 * Where a generation had begun, `data.partial_text` has its text so far.
 */
export declare class InferenceError extends Error {
    code: string | number;
    data: {
        [name: string]: any;
    };
    /**
     * @param {string} message
     * @param {number | string} code
     * @param {{ [name: string]: any }} [data]
     * @param {ErrorOptions} [options]
     */
    constructor(message: string, code: number | string, data?: {
        [name: string]: any;
    }, options?: ErrorOptions);
    /** Whether the same may succeed when it is tried again, after `data.retry_after` seconds where that is given. */
    get retryable(): any;
}
/**
 * Creates a session and connects to it.
 *
 * @param {string | URL} url the server's address; in a browser also relative to the page
 * @param {SessionOptions} [options]
 * @returns {Promise<Session>}
 * @throws {InferenceError} `unreachable`, `unauthorized`, `invalid`, or as the server refuses it
 */
export declare function createSession(url: string | URL, options?: SessionOptions): Promise<Session>;
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
export declare function resumeSession(url: string | URL, state: State, options?: SessionOptions): Promise<Session>;
/** One generation: an async iterator of its events, for one reader, and a promise of its result. */
export declare class Generation {
    #private;
    /** @param {Task} task @param {() => void} cancel */
    constructor(task: Task, cancel: () => void);
    /** The server's id for it, once there is one. */
    get taskId(): string | null;
    /** The text so far. */
    get text(): string;
    /** Rejects with an `InferenceError`, as the iteration does. Needs no iteration. */
    get result(): Promise<Result>;
    /** Stops it, also at the provider. Returns when it has ended, in whatever way. */
    cancel(): Promise<void>;
    /** @returns {AsyncIterator<GenerationEvent, undefined>} leaving a `for await` early cancels the generation */
    [Symbol.asyncIterator](): AsyncIterator<GenerationEvent, undefined>;
}
/** What a session keeps of a generation until it has ended. It has an id from when the server is known to have it. */
declare class Task {
    #private;
    tools: Tool[];
    turn: JsonObject[] | null;
    remember: (added: JsonObject[]) => void;
    /** @type {Promise<Result>} */
    result: Promise<Result>;
    /** @type {string | null} */
    id: string | null;
    asked: boolean;
    cancelled: boolean;
    text: string;
    /**
     * Calls the server waits for, as far as is known here, with the answers that it has not confirmed.
     * @type {Map<string, JsonObject | null>}
     */
    calls: Map<string, JsonObject | null>;
    ending: AbortController;
    since: number;
    /** @type {JsonObject} */
    params: JsonObject;
    /**
     * @param {Tool[]} tools
     * @param {JsonObject[] | null} turn what goes into the history before the answer; null: neither does
     * @param {(added: JsonObject[]) => void} remember
     */
    constructor(tools: Tool[], turn: JsonObject[] | null, remember: (added: JsonObject[]) => void);
    get isOver(): boolean;
    /** @returns {Promise<IteratorResult<GenerationEvent, undefined>>} */
    next(): Promise<IteratorResult<GenerationEvent, undefined>>;
    /** Text that nobody has read yet grows in place: it costs little when nobody reads. @param {GenerationEvent} event */
    emit(event: GenerationEvent): void;
    /** @param {Result} result */
    finish(result: Result): void;
    /** @param {InferenceError} error */
    fail(error: InferenceError): void;
}
/** Made by `createSession`. */
export declare class Session {
    #private;
    /**
     * The turns so far, which generations go on from: the message and what the generation added, as each ends.
     * @type {JsonObject[]}
     */
    history: JsonObject[];
    /** The generations that `resumeSession` found running, in order. @type {Generation[]} */
    resumed: Generation[];
    /** @param {string | URL} url @param {SessionOptions} options */
    constructor(url: string | URL, options: SessionOptions);
    /** The server's id for the session. Another one after the server has forgotten the session; null in between. */
    get id(): string | null;
    /** What `resumeSession` needs to go on with it, as of now. @returns {State} */
    get state(): State;
    /**
     * Starts a generation; several may run at a time. Never throws: what is wrong, the iteration and the result tell.
     *
     * @param {string | JsonObject[] | null} [message] of the user, a text or content parts, not empty; null: the history
     *   has it
     * @param {GenerateOptions & JsonObject} [options]
     * @returns {Generation}
     */
    generate(message?: string | JsonObject[] | null, options?: GenerateOptions & JsonObject): Generation;
    /**
     * The result of a whole generation, where its events do not matter.
     *
     * @param {string | JsonObject[] | null} [message]
     * @param {GenerateOptions & JsonObject} [options] as for `generate`
     */
    ask(message?: string | JsonObject[] | null, options?: GenerateOptions & JsonObject): Promise<Result>;
    /** Drops the connection and resumes on a new one, where the network is known to have changed. Nothing is lost. */
    reconnect(): void;
    /** Cancels what runs and ends the session. What has not ended fails with the code `closed`. */
    close(): void;
    /** Use `createSession`. */
    open(): Promise<void>;
    /** Use `resumeSession`. @param {State} state */
    restore({ id, after, history, running }: State): Promise<void>;
}
export type Call = {
    method: string;
    size: number;
    answered: (result: any) => void;
    refused: (error: InferenceError) => void;
};
export {};
