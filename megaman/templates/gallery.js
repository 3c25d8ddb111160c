"use strict";
// The lightbox. It reads each card's settings from its data attribute and writes them as text, never as markup.
const cards = [...document.querySelectorAll("a.card")];
const dialog = document.querySelector("dialog");
const large = dialog.querySelector("img");
let current = 0;
const open = (index) => {
  current = (index + cards.length) % cards.length;
  const card = cards[current], picture = card.querySelector("img");
  const facts = JSON.parse(card.dataset.facts);
  large.src = card.getAttribute("href");
  large.alt = picture.alt;
  large.className = picture.className;
  dialog.querySelector("p").textContent = facts.Prompt;
  const list = dialog.querySelector("dl");
  list.replaceChildren();
  for (const [name, value] of Object.entries(facts)) {
    if (name === "Prompt") continue;
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value === "" ? "–" : value;
    list.append(term, text);
  }
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0; // on a small screen the focused button would be scrolled to, and the picture away
};
cards.forEach((card, index) => card.addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  open(index);
}));
dialog.addEventListener("click", (event) => {
  const step = event.target.dataset.step;
  if (step) open(current + Number(step));
  else if (event.target === dialog || "close" in event.target.dataset) dialog.close();
});
dialog.addEventListener("keydown", (event) => {
  const target = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: cards.length - 1 }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  open(target);
});
dialog.addEventListener("close", () => cards[current].focus());
