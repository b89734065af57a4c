/** The demo tools: functions that run in the page, and one that is answered by hand. */

/**
 * @typedef {import("./client.js").Tool} Tool
 * @typedef {{ id: string, label: string, icon: string, tool: Tool }} Demo
 */

/** @type {Demo[]} */
export const DEMOS = [
  {
    id: "time",
    label: "Time",
    icon: "clock",
    tool: {
      name: "get_time",
      description: "Get the current date and time, here or in a named time zone",
      parameters: {
        type: "object",
        properties: { time_zone: { type: "string", description: "IANA name, such as Europe/Paris" } },
      },
      run: ({ time_zone: timeZone }) => time(timeZone || undefined),
    },
  },
  {
    id: "calculator",
    label: "Calculator",
    icon: "calculator",
    tool: {
      name: "calculate",
      description: "Calculate an arithmetic expression with + - * / % ^ and parentheses",
      parameters: {
        type: "object",
        properties: { expression: { type: "string", description: "such as (17.5 * 23) - 2^7" } },
        required: ["expression"],
      },
      run: ({ expression }) => ({ expression, value: calculate(String(expression)) }),
    },
  },
];

/** @param {string | undefined} timeZone */
function time(timeZone) {
  const options = /** @type {const} */ ({ dateStyle: "full", timeStyle: "medium", timeZone });
  return { local: new Intl.DateTimeFormat("en-GB", options).format(new Date()) };
}

const TOKEN = /\s*(?:((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)|(\*\*|[-+*/%^()]))/iy;

/**
 * The value of an arithmetic expression, by precedence climbing.
 *
 * @param {string} expression
 * @throws {SyntaxError} where it is none
 */
export function calculate(expression) {
  const tokens = tokenize(expression.replaceAll("×", "*").replaceAll("÷", "/").replaceAll("−", "-"));
  const value = climb(tokens, 0, 0);
  if (tokens.length) throw new SyntaxError(`Expected an operator, got ${tokens[0]}`);
  return value;
}

/** @param {string} expression @returns {(number | string)[]} */
function tokenize(expression) {
  const tokens = [];
  TOKEN.lastIndex = 0;
  const source = expression.trimEnd();
  while (TOKEN.lastIndex < source.length) {
    const at = TOKEN.lastIndex;
    const match = TOKEN.exec(source);
    if (!match) throw new SyntaxError(`Expected a number or an operator at ${source.slice(at, at + 10)}`);
    tokens.push(match[1] === undefined ? match[2].replace("**", "^") : Number(match[1]));
  }
  return tokens;
}

/** @type {{ [operator: string]: [number, (a: number, b: number) => number] }} */
const OPERATORS = {
  "+": [1, (a, b) => a + b],
  "-": [1, (a, b) => a - b],
  "*": [2, (a, b) => a * b],
  "/": [2, (a, b) => a / b],
  "%": [2, (a, b) => a % b],
  "^": [4, (a, b) => a ** b],
};

/** @param {(number | string)[]} tokens @param {number} least precedence @param {number} depth @returns {number} */
function climb(tokens, least, depth) {
  let left = operand(tokens, depth);
  for (;;) {
    const [precedence, apply] = OPERATORS[String(tokens[0])] ?? [0];
    if (!apply || precedence < Math.max(least, 1)) return left;
    const operator = tokens.shift();
    left = apply(left, climb(tokens, operator === "^" ? precedence : precedence + 1, depth + 1));
  }
}

/** @param {(number | string)[]} tokens @param {number} depth @returns {number} */
function operand(tokens, depth) {
  if (depth > 200) throw new SyntaxError("The expression is nested too deep");
  const token = tokens.shift();
  if (typeof token === "number") return token;
  if (token === "-") return -climb(tokens, 3, depth + 1);
  if (token === "+") return climb(tokens, 3, depth + 1);
  if (token !== "(") throw new SyntaxError(`Expected a number, got ${token ?? "the end"}`);
  const value = climb(tokens, 0, depth + 1);
  if (tokens.shift() !== ")") throw new SyntaxError("Expected )");
  return value;
}
