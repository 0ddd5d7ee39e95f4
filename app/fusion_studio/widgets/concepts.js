// Chips of concepts; what is picked has a strength. value: {choices: [{key, label, tokens, picture}], picked: {key: strength}}
// Where the server leaves `picked` open, or answers to what was picked before the last click, what the page has stays.
const root = element.querySelector(".concepts");
let last = {}, at = 0; // the strengths picked here, and the time of the last click
const make = (tag, about, ...inside) => {
  const node = Object.assign(document.createElement(tag), about);
  node.append(...inside);
  return node;
};

function put(picked) {
  last = picked;
  at = Date.now();
  props.value = { ...props.value, picked, at };
  trigger("input");
}

function chip(choice, picked) {
  const on = choice.key in picked;
  const button = make("button", { type: "button", className: "chip" });
  button.setAttribute("aria-pressed", on);
  if (choice.picture) button.append(make("img", { src: choice.picture, alt: "" }));
  button.append(make("span", { textContent: choice.label }));
  button.onclick = () => {
    const next = { ...props.value.picked };
    if (on) delete next[choice.key];
    else next[choice.key] = 1;
    put(next);
    draw();
    [...root.querySelectorAll(".chip")].find((c) => c.textContent === choice.label)?.focus();
  };
  return button;
}

function row(choice, strength) {
  const slider = make("input", { type: "range", min: 0, max: 1.5, step: 0.05, value: strength });
  slider.setAttribute("aria-label", `Strength of ${choice.label}`);
  const output = make("output", { textContent: Number(strength).toFixed(2) });
  slider.oninput = () => (output.textContent = Number(slider.value).toFixed(2));
  slider.onchange = () => put({ ...props.value.picked, [choice.key]: Number(slider.value) });
  const words = props.inserts
    ? choice.tokens.map((token) => {
        const button = make("button", { type: "button", className: "token", textContent: `+ ${token}` });
        button.title = `Put ${token} into the prompt`;
        button.onclick = () => trigger("select", { token });
        return button;
      })
    : [make("span", { className: "token", textContent: choice.label })];
  return make("div", { className: "strength" }, ...words, slider, output);
}

function draw() {
  const { choices = [] } = props.value || {};
  const known = Object.fromEntries(Object.entries(last).filter(([key]) => choices.some((c) => c.key === key)));
  const stale = props.value?.at < at;
  if (choices.length && (stale || !props.value.picked)) props.value = { ...props.value, picked: known, at };
  const picked = props.value?.picked ?? {};
  last = picked;
  const chips = make("div", { className: "chips" }, ...choices.map((choice) => chip(choice, picked)));
  const rows = choices.filter((c) => c.key in picked).map((c) => row(c, picked[c.key]));
  root.replaceChildren(chips, ...rows);
}

watch("value", draw);
draw();
