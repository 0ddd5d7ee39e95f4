// Pictures as they will be learned, each with its caption. value: [{id, name, crop, notes, caption}]
const root = element.querySelector(".pictures");

function draw() {
  const cards = (props.value || []).map((picture, index) => {
    const card = document.createElement("figure");
    if (picture.crop) {
      const image = document.createElement("img");
      image.src = picture.crop;
      image.alt = `${picture.name}, as it will be learned`;
      card.append(image);
    }
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.className = "remove";
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    remove.onclick = () => {
      props.value = props.value.filter((_, i) => i !== index);
      draw();
      trigger("input");
    };
    card.append(remove);
    for (const note of picture.notes) {
      const line = document.createElement("p");
      line.textContent = note;
      line.className = picture.crop ? "note" : "note bad";
      card.append(line);
    }
    if (picture.crop) {
      const caption = document.createElement("textarea");
      caption.rows = 2;
      caption.value = picture.caption;
      caption.placeholder = "What else is in it?";
      caption.setAttribute("aria-label", `Caption of ${picture.name}`);
      caption.oninput = () => {
        props.value = props.value.map((p, i) => (i === index ? { ...p, caption: caption.value } : p));
      };
      card.append(caption);
    }
    return card;
  });
  root.replaceChildren(...cards);
}

watch("value", draw);
draw();
