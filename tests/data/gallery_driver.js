"use strict";
// The body of a function that uses every control of a gallery and returns what it saw; test_pages.py runs it.
const one = (selector) => document.querySelector(selector), all = (selector) => [...document.querySelectorAll(selector)];
const files = (root) => all(root + " .picture:not([hidden]) a.card").filter((card) => card.offsetParent)
  .map((card) => card.getAttribute("href"));
const click = (selector) => one(selector).click();
const press = (key) => (document.activeElement ?? one("dialog"))
  .dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const set = (selector, value, event = "input") => {
  one(selector).value = value;
  one(selector).dispatchEvent(new Event(event));
};
const pause = () => new Promise((done) => setTimeout(done, 50));
const seen = () => one(".stage img").getAttribute("src");
const found = {};

const filters = () => {
  found.all = files("#sections");
  found.facets = all("#facets select").map((select) => [select.name, select.options.length - 1]);
  set("#search", "RUNNING sand"); found.searched = files("#sections"); found.status = one("#status").textContent;
  found.hiddenScenes = all(".scene[hidden]").length;
  set("#search", "no such words"); found.nothing = [files("#sections"), one("#status").textContent];
  set("#search", "");
  set("#facets select", "1", "change"); found.strong = files("#sections");
  found.heads = all("thead th:not([hidden])").map((head) => head.textContent);
  set("#facets select", "", "change"); found.again = files("#sections");
  set("#grouping", "seed", "change"); found.seeds = all("#sections h2").map((title) => title.textContent);
  found.bySeed = files("#sections");
  set("#grouping", "prompt", "change"); found.byPrompt = files("#sections");
};
const lightbox = async () => {
  all("a.card")[0].click();
  found.opened = [one("dialog").open, seen(), one("dialog .facts p").textContent];
  press("ArrowRight"); found.right = seen();
  press("ArrowLeft"); press("ArrowLeft"); found.left = seen();
  press("Home"); found.home = seen();
  press("End"); found.end = seen();
  click('[data-do="next"]'); found.next = seen();
  found.noSlider = [one('[data-do="compare"]').hidden, all(".stage .slider").length];
  press("ArrowRight"); press("c");
  found.compared = all(".stage img").map((image) => image.getAttribute("src"));
  found.isPressed = one('[data-do="compare"]').getAttribute("aria-pressed");
  set(".stage input", "20");
  found.clip = getComputedStyle(one(".stage .over")).clipPath;
  one(".stage input").focus(); press("ArrowRight"); found.slides = all(".stage .slider").length;
  press("C"); found.uncompared = all(".stage img").length;
  one("dialog").focus();
  found.siblings = all(".siblings button").map((button) => button.textContent);
  all(".siblings button")[0].click(); found.sibling = seen();
  const copied = [];
  Object.defineProperty(navigator, "clipboard", { value: { writeText: async (text) => copied.push(text) }, writable: true });
  for (const what of ["prompt", "seed", "command"]) click(`[data-do="${what}"]`);
  await pause(); found.told = one('[data-do="seed"]').textContent;
  navigator.clipboard = undefined;
  document.execCommand = () => copied.push(document.activeElement.value);
  click('[data-do="seed"]'); await pause();
  found.copied = copied;
  press("f"); found.starred = one('[data-do="star"]').textContent;
  const closed = new Promise((done) => one("dialog").addEventListener("close", done));
  click('[data-do="close"]'); await closed; found.closed = [one("dialog").open, document.activeElement.getAttribute("href")];
};
const favourites = async () => {
  click("#starred"); found.only = files("#sections");
  let file;
  URL.createObjectURL = (blob) => { file = blob; return "#"; };
  click("#export");
  found.exported = JSON.parse(await file.text());
  click("#starred"); all(".star")[1].click(); found.count = one("#starred").textContent;
  const honest = Storage.prototype.setItem;
  Storage.prototype.setItem = () => { throw new DOMException("no"); };
  all(".star")[2].click();
  found.refused = [one("#starred").textContent, one("#status").textContent];
  Storage.prototype.setItem = honest;
};
const comparisons = () => {
  click("#views button:last-child");
  found.sliders = all("#sliders .slider").map((each) => [...each.querySelectorAll("img")].map((i) => i.getAttribute("src")));
  found.sectionsHidden = one("#sections").hidden;
  click("#views button:first-child");
  found.backAgain = [one("#sections").hidden, all("#sliders .slider").length];
};
const appearance = () => {
  const paper = () => getComputedStyle(document.body).backgroundColor;
  found.system = paper();
  click("#theme"); found.light = [document.documentElement.dataset.theme, paper()];
  click("#theme"); found.dark = [document.documentElement.dataset.theme, paper()];
  click("#language");
  found.chinese = [document.documentElement.lang, document.title, one("h1").textContent, one("#search").placeholder];
};
const safety = () => {
  found.scripts = document.scripts.length;
  found.foreign = [all("img[onerror], svg, [onclick], b b").length, window.hacked ?? "no"];
};
return (async () => {
  safety(); filters(); await lightbox(); await favourites(); comparisons(); appearance();
  return found;
})();
