// Parts of the picture with prompts of their own, as boxes or painted. Shares of width and height, 0 to 1.
// value: {regions: [{prompt, box: [left, top, right, bottom]} or {prompt, mask: data URL}], tokens: [...]}
const COLOURS = ["#7c3aed", "#0d9488", "#d97706", "#db2777", "#2563eb", "#65a30d"];
const SIDE = 128; // of a painted mask, in pixels
const root = element.querySelector(".regions");
const LAST = 30; // changes that can be taken back
let tool = "box"; // or "paint", "erase"
let chosen = -1; // the region that is painted or erased; none: painting begins a new one
const past = []; // lists of regions as they were, for undoing

const make = (tag, about, ...inside) => {
  const node = Object.assign(document.createElement(tag), about);
  node.append(...inside);
  return node;
};
const regions = () => props.value?.regions ?? [];
const clamp = (x) => Math.min(1, Math.max(0, Math.round(x * 100) / 100));
const colour = (index) => COLOURS[index % COLOURS.length];

const painted = (index) => "mask" in (regions()[index] ?? {});

function put(list, redraw = true) {
  props.value = { ...props.value, regions: list };
  if (redraw) draw();
  trigger("input");
}
function remember() {
  past.push(regions());
  if (past.length > LAST) past.shift();
}
const changed = (index, about) => regions().map((r, i) => (i === index ? { ...r, ...about } : r));
function change(index, about, redraw) {
  remember();
  put(changed(index, about), redraw);
}

function undo() {
  if (!past.length) return;
  const before = past.pop();
  if (!("mask" in (before[chosen] ?? {}))) chosen = -1;
  put(before);
}

function newPrompt() {
  const used = regions().map((region) => region.prompt).join(" ");
  const tokens = props.value?.tokens ?? [];
  // A token alone: the region then follows the picture's prompt, with all other concepts by their nouns.
  return tokens.find((word) => !used.includes(word)) ?? tokens[0] ?? "";
}

function add(about) {
  remember();
  chosen = regions().length;
  put([...regions(), { prompt: newPrompt(), ...about }]);
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
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data.set([red, green, blue, pixels.data[i] > 127 ? 255 : 0], i);
    pen.putImageData(pixels, 0, 0);
  };
  image.src = mask;
}

function exported(canvas) {
  const copy = make("canvas", { width: SIDE, height: SIDE });
  const pen = copy.getContext("2d");
  const pixels = canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const white = pixels.data[i + 3] > 127 ? 255 : 0;
    pixels.data.set([white, white, white, 255], i);
  }
  pen.putImageData(pixels, 0, 0);
  return pixels.data.some((value, i) => i % 4 === 0 && value) ? copy.toDataURL("image/png") : "";
}

// The right button and shift erase too, whichever of the two tools is chosen.
function stroke(plane, event) {
  const erasing = tool === "erase" || event.shiftKey || event.button === 2;
  if (erasing && !painted(chosen)) chosen = regions().findLastIndex((region) => region.mask);
  if (erasing && chosen < 0) return;
  if (painted(chosen)) remember();
  else add({ mask: "" });
  const index = chosen;
  const canvas = root.querySelector(`canvas[data-index="${index}"]`);
  const pen = canvas.getContext("2d");
  Object.assign(pen, { lineCap: "round", lineJoin: "round", lineWidth: 22, strokeStyle: colour(index) });
  pen.globalCompositeOperation = erasing ? "destination-out" : "source-over";
  pen.beginPath();
  const to = (moved) => {
    const [x, y] = at(root.querySelector(".plane"), moved);
    pen.lineTo(x * SIDE, y * SIDE);
    pen.lineTo(x * SIDE, y * SIDE + 0.01); // a tap alone leaves a dot
    pen.stroke();
  };
  to(event);
  follow(to, () => put(changed(index, { mask: (canvas.mask = exported(canvas)) })));
}

function follow(move, end) {
  const stop = () => {
    window.removeEventListener("pointermove", move);
    window.removeEventListener("pointerup", stop);
    window.removeEventListener("pointercancel", stop);
    end();
  };
  window.addEventListener("pointermove", move);
  window.addEventListener("pointerup", stop);
  window.addEventListener("pointercancel", stop);
}

function begin(event) {
  const plane = event.currentTarget;
  event.preventDefault();
  plane.focus({ preventScroll: true }); // so that Ctrl-Z reaches this element
  if (tool !== "box") return stroke(plane, event);
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
    const existing = root.querySelector(`canvas[data-index="${index}"]`);
    if (existing?.mask === region.mask) return existing; // a new one would be empty until its picture is decoded
    const canvas = make("canvas", { width: SIDE, height: SIDE, mask: region.mask });
    canvas.dataset.index = index;
    if (region.mask) show(canvas, region.mask, colour(index));
    return canvas;
  }
  const node = make("div", { className: "box", textContent: region.prompt });
  node.dataset.index = index;
  node.style.setProperty("--tint", colour(index));
  outline(node, region.box);
  return node;
}

// What is typed changes the plane in root: a redraw would take the focus away from where the Tab key goes next.
function row(region, index) {
  const name = `Region ${index + 1}`;
  const box = () => root.querySelector(`.box[data-index="${index}"]`);
  const badge = make("b", { textContent: index + 1, className: "badge" });
  badge.style.background = colour(index);
  const prompt = make("input", { value: region.prompt, placeholder: "What is here?", ariaLabel: `${name}: prompt` });
  const concept = make("select", { ariaLabel: `${name}: concept` }, make("option", { value: "", textContent: "concept" }));
  for (const token of props.value?.tokens ?? []) {
    concept.append(make("option", { value: token, textContent: token, selected: region.prompt.includes(token) }));
  }
  let typing = false; // what is typed in one go is taken back in one go
  prompt.onblur = () => (typing = false);
  prompt.oninput = () => {
    if (!typing) remember();
    typing = true;
    put(changed(index, { prompt: prompt.value }), false);
    if (box()) box().textContent = prompt.value;
    concept.value = [...concept.options].find((o) => o.value && prompt.value.includes(o.value))?.value ?? "";
  };
  concept.onchange = () => {
    const rest = regions()[index].prompt.replace(/<[a-z0-9_-]+>/g, "").trim();
    change(index, { prompt: concept.value ? `${rest || "a"} ${concept.value}` : rest });
  };
  const remove = button("×", `Remove region ${index + 1}`, null, () => {
    remember();
    chosen = -1;
    put(regions().filter((_, i) => i !== index));
  });
  remove.className = "remove";
  const numbers = make("div", { className: "numbers" });
  if (region.box) {
    ["left", "top", "right", "bottom"].forEach((side, i) => {
      const about = { type: "number", min: 0, max: 100, step: 1, ariaLabel: `${name}: ${side}, percent` };
      const field = make("input", { ...about, value: Math.round(100 * region.box[i]) });
      field.onchange = () => {
        const sides = regions()[index].box.map((v, j) => (j === i ? clamp(field.value / 100) : v));
        change(index, { box: sides }, false);
        outline(box(), sides);
      };
      numbers.append(make("label", { textContent: `${side} % ` }, field));
    });
  } else {
    const working = (kind) => tool === kind && chosen === index;
    const work = (kind) => () => ([tool, chosen] = [kind, index]);
    const paint = region.mask ? "Paint more" : "Paint";
    numbers.append(
      button(paint, `${name}: ${paint.toLowerCase()}`, working("paint"), work("paint")),
      button("Erase", `${name}: erase`, working("erase"), work("erase")),
      button("Clear", `${name}: clear`, null, () => {
        [tool, chosen] = ["paint", index];
        change(index, { mask: "" });
      }),
    );
  }
  return make("li", {}, badge, concept, prompt, remove, numbers);
}

function button(text, label, pressed, action) {
  const node = make("button", { type: "button", textContent: text, className: "plain" });
  if (label) node.ariaLabel = label;
  if (pressed !== null) node.ariaPressed = String(pressed);
  node.onclick = () => {
    action();
    draw();
  };
  return node;
}

function statusText() {
  const which = painted(chosen) ? `region ${chosen + 1}` : "";
  if (tool === "box") return "Drag a box, or add a half.";
  if (tool === "paint") return `Painting ${which || "a new region"}. Shift or the right button erases.`;
  return regions().some((region) => region.mask) ? `Erasing ${which || "what was painted last"}.` : "Nothing is painted yet.";
}

function draw() {
  const focused = root.contains(document.activeElement) ? document.activeElement : null;
  const name = (node) => node.ariaLabel || node.textContent;
  const plane = make("div", { className: "plane", tabIndex: -1, ariaLabel: "The picture's regions" }, ...regions().map(shape));
  plane.addEventListener("pointerdown", begin);
  plane.addEventListener("contextmenu", (event) => event.preventDefault());
  if (!regions().length) plane.append(make("p", { textContent: tool === "box" ? "Drag a box here" : "Paint here" }));
  const kinds = [["Boxes", "box", -1], ["Paint", "paint", -1], ["Erase", "erase", chosen]];
  const back = button("Undo", "Undo the last change of regions", null, undo);
  back.disabled = !past.length;
  const tools = make(
    "div",
    { className: "tools", role: "group", ariaLabel: "Regions" },
    ...kinds.map(([text, kind, index]) => button(text, null, tool === kind, () => ([tool, chosen] = [kind, index]))),
    back,
    button("Add left half", null, null, () => add({ box: [0, 0, 0.5, 1] })),
    button("Add right half", null, null, () => add({ box: [0.5, 0, 1, 1] })),
  );
  const list = make("ol", {}, ...regions().map(row));
  // The line stays the same node, or screen readers would not notice the new text.
  const line = root.querySelector(".status") ?? make("p", { className: "status hint", role: "status" });
  line.textContent = statusText();
  root.replaceChildren(tools, make("div", { className: "desk" }, make("div", {}, plane, line), list));
  if (!focused) return;
  const controls = [...root.querySelectorAll("button, input, select, .plane")];
  const again = controls.find((node) => name(node) === name(focused) && !node.disabled) ?? controls[0];
  again.focus({ preventScroll: true });
}

// Ctrl-Z in a field is the field's own.
root.addEventListener("keydown", (event) => {
  if (event.key !== "z" || !(event.ctrlKey || event.metaKey) || event.target.matches("input")) return;
  event.preventDefault();
  undo();
});
watch("value", draw);
draw();
