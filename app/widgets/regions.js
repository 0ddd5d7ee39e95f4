// Parts of the picture with prompts of their own, as boxes or painted. Shares of width and height, 0 to 1.
// value: {regions: [{prompt, box: [left, top, right, bottom]} or {prompt, mask: data URL}], tokens: [...]}
const COLOURS = ["#7c3aed", "#0d9488", "#d97706", "#db2777", "#2563eb", "#65a30d"];
const SIDE = 128; // of a painted mask, in pixels
const place = element.querySelector(".regions");
let painting = false;
let chosen = -1;

const make = (tag, about, ...inside) => {
  const node = Object.assign(document.createElement(tag), about);
  node.append(...inside);
  return node;
};
const regions = () => props.value?.regions ?? [];
const clamp = (x) => Math.min(1, Math.max(0, Math.round(x * 100) / 100));
const colour = (index) => COLOURS[index % COLOURS.length];

function put(list, redraw = true) {
  props.value = { ...props.value, regions: list };
  if (redraw) draw();
  trigger("input");
}
const change = (index, about, redraw) => put(regions().map((r, i) => (i === index ? { ...r, ...about } : r)), redraw);

function wording() {
  const used = regions().map((region) => region.prompt).join(" ");
  const tokens = props.value?.tokens ?? [];
  const token = tokens.find((word) => !used.includes(word)) ?? tokens[0];
  return token ? `a ${token}` : "";
}

function add(about) {
  chosen = regions().length;
  put([...regions(), { prompt: wording(), ...about }]);
}

function at(plane, event) {
  const edge = plane.getBoundingClientRect();
  return [clamp((event.clientX - edge.left) / edge.width), clamp((event.clientY - edge.top) / edge.height)];
}

function show(canvas, mask, tint) {
  const image = new Image();
  image.onload = () => {
    const pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0, SIDE, SIDE);
    const pixels = pen.getImageData(0, 0, SIDE, SIDE);
    const [red, green, blue] = [1, 3, 5].map((i) => parseInt(tint.slice(i, i + 2), 16));
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data.set([red, green, blue, pixels.data[i] > 127 ? 130 : 0], i);
    pen.putImageData(pixels, 0, 0);
  };
  image.src = mask;
}

function exported(canvas) {
  const copy = make("canvas", { width: SIDE, height: SIDE });
  const pen = copy.getContext("2d");
  const pixels = canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const white = pixels.data[i + 3] > 60 ? 255 : 0;
    pixels.data.set([white, white, white, 255], i);
  }
  pen.putImageData(pixels, 0, 0);
  return copy.toDataURL("image/png");
}

function stroke(plane, event) {
  if (!regions()[chosen]?.mask) add({ mask: "" });
  const canvas = place.querySelector(`canvas[data-index="${chosen}"]`);
  const pen = canvas.getContext("2d");
  Object.assign(pen, { lineCap: "round", lineJoin: "round", lineWidth: 22, strokeStyle: colour(chosen) });
  pen.beginPath();
  const to = (moved) => {
    const [x, y] = at(place.querySelector(".plane"), moved);
    pen.lineTo(x * SIDE, y * SIDE);
    pen.stroke();
  };
  to(event);
  follow(to, () => change(chosen, { mask: exported(canvas) }));
}

function follow(move, end) {
  const stop = () => {
    window.removeEventListener("pointermove", move);
    end();
  };
  window.addEventListener("pointermove", move);
  window.addEventListener("pointerup", stop, { once: true });
}

function begin(event) {
  const plane = event.currentTarget;
  event.preventDefault();
  if (painting) return stroke(plane, event);
  const [x, y] = at(plane, event);
  const frame = make("div", { className: "box new" });
  plane.append(frame);
  let box = [x, y, x, y];
  const move = (moved) => {
    const [u, v] = at(plane, moved);
    box = [Math.min(x, u), Math.min(y, v), Math.max(x, u), Math.max(y, v)];
    outline(frame, box);
  };
  follow(move, () => {
    frame.remove();
    if (box[2] - box[0] > 0.05 && box[3] - box[1] > 0.05) add({ box });
  });
}

function outline(node, [left, top, right, bottom]) {
  const sides = { left, top, width: right - left, height: bottom - top };
  for (const [side, share] of Object.entries(sides)) node.style[side] = `${100 * share}%`;
}

function shape(region, index) {
  if ("mask" in region) {
    const canvas = make("canvas", { width: SIDE, height: SIDE });
    canvas.dataset.index = index;
    if (region.mask) show(canvas, region.mask, colour(index));
    return canvas;
  }
  const node = make("div", { className: "box", textContent: region.prompt });
  node.style.setProperty("--tint", colour(index));
  outline(node, region.box);
  return node;
}

function row(region, index) {
  const name = `Region ${index + 1}`;
  const badge = make("b", { textContent: index + 1, className: "badge" });
  badge.style.background = colour(index);
  const prompt = make("input", { value: region.prompt, placeholder: "What is here?" });
  prompt.setAttribute("aria-label", `${name}: prompt`);
  prompt.oninput = () => change(index, { prompt: prompt.value }, false);
  prompt.onchange = draw;
  const concept = make("select", {}, make("option", { value: "", textContent: "concept" }));
  concept.setAttribute("aria-label", `${name}: concept`);
  for (const token of props.value?.tokens ?? []) {
    concept.append(make("option", { value: token, textContent: token, selected: region.prompt.includes(token) }));
  }
  concept.onchange = () => {
    const said = region.prompt.replace(/<[a-z0-9_-]+>/g, "").trim();
    change(index, { prompt: concept.value ? `${said || "a"} ${concept.value}` : said });
  };
  const remove = make("button", { type: "button", textContent: "×", className: "remove" });
  remove.setAttribute("aria-label", `Remove region ${index + 1}`);
  remove.onclick = () => put(regions().filter((_, i) => i !== index));
  const numbers = make("div", { className: "numbers" });
  if (region.box) {
    ["left", "top", "right", "bottom"].forEach((side, i) => {
      const field = make("input", { type: "number", min: 0, max: 100, step: 1, value: Math.round(100 * region.box[i]) });
      field.onchange = () => change(index, { box: region.box.map((v, j) => (j === i ? clamp(field.value / 100) : v)) });
      numbers.append(make("label", { textContent: `${side} % ` }, field));
    });
  } else {
    const more = make("button", { type: "button", textContent: "painted; paint more of it", className: "plain" });
    more.onclick = () => {
      [painting, chosen] = [true, index];
      draw();
    };
    numbers.append(more);
  }
  return make("li", {}, badge, concept, prompt, remove, numbers);
}

function tool(text, pressed, action) {
  const button = make("button", { type: "button", textContent: text, className: "plain" });
  if (pressed !== null) button.setAttribute("aria-pressed", pressed);
  button.onclick = () => {
    action();
    draw();
  };
  return button;
}

function draw() {
  const plane = make("div", { className: "plane" }, ...regions().map(shape));
  plane.addEventListener("pointerdown", begin);
  if (!regions().length) plane.append(make("p", { textContent: painting ? "Paint here" : "Drag a box here" }));
  const tools = make(
    "div",
    { className: "tools" },
    tool("Boxes", !painting, () => (painting = false)),
    tool("Paint", painting, () => ([painting, chosen] = [true, -1])),
    tool("Add left half", null, () => add({ box: [0, 0, 0.5, 1] })),
    tool("Add right half", null, () => add({ box: [0.5, 0, 1, 1] })),
  );
  const list = make("ol", {}, ...regions().map(row));
  place.replaceChildren(tools, make("div", { className: "desk" }, plane, list));
}

watch("value", draw);
draw();
