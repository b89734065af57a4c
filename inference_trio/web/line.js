/** The line to the server as the playground sees it: every frame that passes, and a pair of scissors. */

/**
 * @typedef {{ way: "in" | "out" | "mark", at: number, text: string, method: string }} Passed
 */

export class Line {
  isCut = false;
  /** A class of WebSocket for the client. */
  WebSocket;

  /** @param {(passed: Passed) => void} pass */
  constructor(pass) {
    const line = this;
    const mark = (/** @type {string} */ method, /** @type {string} */ text) =>
      pass({ way: "mark", at: performance.now(), method, text });
    this.WebSocket = class extends WebSocket {
      /** @param {string} url @param {string[]} protocols */
      constructor(url, protocols) {
        super(url, protocols);
        this.addEventListener("message", ({ data }) => pass(frame("in", data)));
        this.addEventListener("open", () => mark("connected", new URL(url).search));
        this.addEventListener("close", ({ code }) => mark("closed", `${code}`));
        if (line.isCut) this.close();
      }

      /** @param {string} data */
      send(data) {
        pass(frame("out", data));
        super.send(data);
      }
    };
  }
}

/** @param {"in" | "out"} way @param {string} text @returns {Passed} */
function frame(way, text) {
  const { method, error } = JSON.parse(text);
  return { way, at: performance.now(), text, method: method ?? (error ? "error" : "result") };
}
