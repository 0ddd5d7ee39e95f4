// Cards, one of which can be chosen. value: the cards as HTML, which the server has escaped.
const root = element.firstElementChild;
const draw = () => (root.innerHTML = props.value || "");

root.addEventListener("click", (event) => {
  const card = event.target.closest("[data-key]");
  if (card) trigger("select", { key: card.dataset.key });
});
watch("value", draw);
draw();
