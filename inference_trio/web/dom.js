/** Making elements. Text is only ever set as text: there is no HTML from strings anywhere on the page. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {{ [name: string]: any }} [attributes] functions are listeners; `true` is an empty attribute, `false` and
 *   `undefined` none
 * @param {...(Node | string)} children
 * @returns {any}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children);
  return element;
}

/** @param {string} name of a symbol in the page @returns {SVGElement} */
export function icon(name, extra = "") {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", `icon ${extra}`);
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** @param {string} id @returns {any} the element of the page */
export function $(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`There is no #${id}`);
  return element;
}

/** A button that copies what `text` gives. @param {() => string} text */
export function copyButton(text) {
  const label = h("span", {}, "Copy");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text());
      label.textContent = "Copied";
    } catch {
      label.textContent = "Not allowed";
    }
    setTimeout(() => {
      label.textContent = "Copy";
    }, 1_500);
  };
  return h("button", { type: "button", class: "quiet", click: copy }, icon("copy"), label);
}
