/** The form with the parameters: what of it goes into `generate`. */

import { $, h } from "./dom.js";

/** @typedef {import("./client.js").Tool} Tool */

const OWN_SCHEMA = {
  type: "object",
  properties: { city: { type: "string", description: "such as Paris" } },
  required: ["city"],
};

export class Parameters {
  #form = $("settings");
  #own = $("own-error");

  /** @param {{ model: string, models: string[] }} about @param {() => void} changed called when the own tool changed */
  constructor({ model, models }, changed) {
    const { elements } = this.#form;
    elements.model.append(...models.map((name) => h("option", { selected: name === model }, name)));
    elements.own_parameters.defaultValue = JSON.stringify(OWN_SCHEMA, null, 2);
    this.#form.addEventListener("submit", (/** @type {Event} */ event) => event.preventDefault());
    this.#form.addEventListener("reset", () => setTimeout(changed));
    this.#form.addEventListener("input", () => {
      this.ownTool();
      changed();
    });
  }

  get answers() {
    return Number(this.#form.elements.answers.value);
  }

  get ownName() {
    return this.#form.elements.own_name.value;
  }

  /** The tool as the form has it; `null`, with the reason shown, where that is none. @returns {Tool | null} */
  ownTool() {
    const { own_name: name, own_description: description, own_parameters: schema } = this.#form.elements;
    try {
      const parameters = JSON.parse(schema.value);
      if (typeof parameters !== "object" || parameters === null || Array.isArray(parameters))
        throw new Error("it is no object");
      if (!/^[A-Za-z0-9_-]{1,64}$/.test(name.value)) throw new Error("the name may have letters, digits, _ and -");
      this.#own.textContent = "";
      return { name: name.value, description: description.value, parameters };
    } catch (error) {
      this.#own.textContent = `Not a tool yet: ${error instanceof Error ? error.message : error}`;
      return null;
    }
  }

  /** The parameters that are set. A number out of its range is left to the server to refuse. @returns {any} */
  given() {
    const { elements } = this.#form;
    /** @type {any} */
    const given = { model: elements.model.value, system: elements.system.value.trim() || undefined };
    for (const name of ["temperature", "top_p", "max_new_tokens", "seed"]) {
      if (elements[name].value !== "") given[name] = Number(elements[name].value);
    }
    const stop = elements.stop.value.split("\n").filter((/** @type {string} */ line) => line !== "");
    if (stop.length) given.stop = stop;
    if (elements.tool_choice.value) given.tool_choice = elements.tool_choice.value;
    return given;
  }
}
