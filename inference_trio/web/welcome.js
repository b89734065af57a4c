/** What the page shows before there is a conversation. */

import { h, icon } from "./dom.js";

const BETTER = `export OPENAI_API_KEY=sk-…
export API_KEY_ENV_VAR=OPENAI_API_KEY
export LLM_BASE_URL=https://api.openai.com/v1
export LLM_MODEL_NAME=gpt-4.1-mini
inference-trio serve`;

/**
 * @typedef {{ tools?: string[], answers?: number, given?: object, before?: object[] }} Wanted
 * @typedef {{ ask: (text: string, wanted?: Wanted) => void, cut: () => void }} Actions
 * @typedef {[question: string, given: object, result: object, answer: string]} Case
 * @typedef {{ icon: string, title: string, text: string, wanted?: Wanted, cuts?: boolean, cases?: Cases }} Example
 * @typedef {[tool: string, ...Case[]]} Cases
 */

const REQUIRED = { tool_choice: "required" };

/** `cases`: calls of a tool that were answered. @type {Example[]} */
const EXAMPLES = [
  { icon: "send", title: "Watch it stream", text: "Write a short story about a lighthouse keeper." },
  {
    icon: "clock",
    title: "Let it call a function of this page",
    text: "What time is it in Berlin?",
    wanted: { tools: ["time"], given: REQUIRED },
    cases: [
      "get_time",
      [
        "What time is it in Paris?",
        { time_zone: "Europe/Paris" },
        { local: "Monday 2 March 2026 at 09:15:00" },
        "In Paris it is Monday 2 March 2026, 09:15:00.",
      ],
      [
        "What time is it in New York?",
        { time_zone: "America/New_York" },
        { local: "Friday 6 June 2025 at 18:40:00" },
        "In New York it is Friday 6 June 2025, 18:40:00.",
      ],
    ],
  },
  {
    icon: "calculator",
    title: "Let it calculate",
    text: "What is (17.5 * 23) - 2^7?",
    wanted: { tools: ["calculator"], given: REQUIRED },
    cases: [
      "calculate",
      ["What is 12 * 4?", { expression: "12 * 4" }, { value: 48 }, "12 * 4 is 48."],
      ["What is (8 + 1) / 3?", { expression: "(8 + 1) / 3" }, { value: 3 }, "(8 + 1) / 3 is 3."],
    ],
  },
  { icon: "cut", title: "Cut the line while it writes", text: "List ten facts about the sea.", cuts: true },
  {
    icon: "frames",
    title: "Compare three answers",
    text: "Suggest a name for a sailing boat.",
    wanted: { answers: 3 },
  },
  {
    icon: "hand",
    title: "Answer a call by hand",
    text: "What is the weather in Paris?",
    wanted: { tools: ["own"], given: REQUIRED },
    cases: [
      "get_weather",
      [
        "What is the weather in Rome?",
        { city: "Rome" },
        { sky: "sunny", temperature: 24 },
        "The weather in Rome is sunny, with 24 degrees.",
      ],
      [
        "What is the weather in Oslo?",
        { city: "Oslo" },
        { sky: "snow", temperature: -3 },
        "The weather in Oslo is snow, with -3 degrees.",
      ],
    ],
  },
];

/**
 * The embedded model is too small to call a tool of itself: it is shown how, and nudged.
 *
 * @param {Example} example @returns {Wanted}
 */
function nudged({ wanted, cases }) {
  if (!cases) return { ...wanted };
  const [name, ...shown] = cases;
  const before = shown.flatMap(([question, given, result, answer], number) => {
    const id = `example_${number}`;
    const call = { id, type: "function", function: { name, arguments: JSON.stringify(given) } };
    return [
      { role: "user", content: question },
      { role: "assistant", content: null, tool_calls: [call] },
      { role: "tool", tool_call_id: id, content: JSON.stringify(result) },
      { role: "assistant", content: answer },
    ];
  });
  const given = { ...wanted?.given, logit_bias: { "<tool_call>": 4 }, temperature: 0, seed: 1, max_new_tokens: 150 };
  return { ...wanted, given, before };
}

/** @param {{ model: string, provider: string }} about @param {Actions} actions @returns {Node[]} */
export function welcome({ model, provider }, { ask, cut }) {
  const examples = EXAMPLES.map((example) => {
    const click = () => {
      ask(example.text, provider === "local" ? nudged(example) : example.wanted);
      if (example.cuts) setTimeout(cut, 1_200);
    };
    const words = h("span", {}, h("b", {}, example.title), h("span", {}, example.text));
    return h("button", { type: "button", class: "example", click }, icon(example.icon), words);
  });
  const words = "Answers stream in, functions of this page can be called, and a broken line is mended. Try it out:";
  const page = [
    h("h2", {}, "What shall the model do?"),
    h("p", {}, words),
    h("div", { class: "examples" }, ...examples),
  ];
  return provider === "local" ? [...page, notice(model)] : page;
}

/** @param {string} model */
function notice(model) {
  return h(
    "details",
    { class: "notice" },
    h(
      "summary",
      {},
      h("b", {}, model),
      " answers here: a tiny model inside the server, for trying things out. ",
      h("span", { class: "more" }, "Connect a better one"),
    ),
    h(
      "p",
      {},
      "Without ",
      h("code", {}, "LLM_PROVIDER"),
      ", three variables name an endpoint that is compatible with OpenAI's, and which variable has the key:",
    ),
    h("pre", { tabindex: "0" }, BETTER),
  );
}
