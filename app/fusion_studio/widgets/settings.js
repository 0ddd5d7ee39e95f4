// Every setting of a training, from a form made of its own schema. value: {filled: {name: text}, defaults: {name: text}}
const form = element.querySelector(".settings");
form.innerHTML = props.form;

function draw() {
  const { filled = {}, defaults = {} } = props.value || {};
  for (const field of form.querySelectorAll("[name]")) {
    if (field !== document.activeElement) field.value = filled[field.name] ?? "";
    if (!(field.name in defaults)) continue;
    if (field.options) field.options[0].textContent = defaults[field.name];
    else field.placeholder = defaults[field.name];
  }
}

form.addEventListener("input", () => {
  const filled = {};
  for (const field of form.querySelectorAll("[name]")) if (field.value.trim()) filled[field.name] = field.value.trim();
  props.value = { ...props.value, filled };
});
watch("value", draw);
draw();
