// What the gallery does beyond showing: without it the page is a plain one of pictures, strips and tables.
// Settings come from each card's data-facts; they are written as text, never as markup.

// ---------------------------------------------------------------- words

const CHINESE = { // 正體中文, by the English that stands in the page
  "Mega Man LoRA gallery": "洛克人 LoRA 畫廊",
  "{n} pictures": "{n} 張圖片",
  "1 picture": "1 張圖片",
  "{n} of {of} pictures": "{of} 張圖片中的 {n} 張",
  "No pictures yet.": "還沒有圖片。",
  "No picture matches.": "沒有符合的圖片。",
  "newest by adapter {n}": "最新一批使用 LoRA：{n}",
  "trigger “{n}”": "觸發詞「{n}」",
  "base {n}": "基礎模型 {n}",
  "base alone": "僅基礎模型",
  "base": "基礎模型",
  "strength {n}": "強度 {n}",
  "step {n}": "第 {n} 步",
  "seed {n}": "種子 {n}",
  "Search prompts, seeds, files": "搜尋提示詞、種子、檔名",
  "Pictures": "圖片",
  "Base ⇄ LoRA": "基礎模型 ⇄ LoRA",
  "Drag: left the base, right the LoRA": "拖曳比較：左為基礎模型，右為 LoRA",
  "Group by": "分組方式",
  "by prompt": "依提示詞分組",
  "by seed": "依種子分組",
  "{name}: all": "{name}：全部",
  "☆ Favourite": "☆ 收藏",
  "★ Favourite": "★ 已收藏",
  "★ {n}": "★ {n}",
  "Favourites only": "只看收藏",
  "Export": "匯出",
  "Export favourites": "匯出收藏",
  "This browser keeps nothing for files: export your favourites before you close the page.":
    "瀏覽器無法為本機檔案儲存資料：關閉頁面前請先匯出收藏。",
  "Picture and its settings": "圖片與設定",
  "← Previous": "← 上一張",
  "Next →": "下一張 →",
  "Close": "關閉",
  "Copy prompt": "複製提示詞",
  "Copy seed": "複製種子",
  "Copy command": "複製指令",
  "Copied": "已複製",
  "Copying is not allowed here": "此處無法複製",
  "Where the adapter or a base on your disk lies elsewhere, change its path in the copied command.":
    "若 LoRA 或本機的基礎模型放在別處，請修改所複製指令中的路徑。",
  "Keys: ← → Home End, F favourite, C compare, Esc.": "按鍵：← → Home End，F 收藏，C 比較，Esc 關閉。",
  "Theme: system": "主題：跟隨系統",
  "Theme: light": "主題：淺色",
  "Theme: dark": "主題：深色",
  "Negative prompt": "負面提示詞",
  "Seed": "種子",
  "Size": "尺寸",
  "Steps": "步數",
  "Guidance": "引導強度",
  "Sampler": "取樣器",
  "LoRA strength": "LoRA 強度",
  "Adapter": "LoRA",
  "Base": "基礎模型",
  "Precision": "精度",
  "Seconds": "秒數",
  "Made": "產生時間",
  "File": "檔案",
};
// ---------------------------------------------------------------- pictures

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const plain = (text) => text.normalize("NFKC").toLowerCase();

let pictures = []; // in the page's order, as it is arranged now
let shown = []; // those that the filters leave

const SEARCHED = ["Prompt", "Negative prompt", "Seed", "Adapter", "Sampler", "Base", "File"];
const readPicture = (holder) => {
  const card = holder.querySelector("a.card"), facts = JSON.parse(card.dataset.facts);
  const words = plain(SEARCHED.map((name) => facts[name]).join("\n"));
  return { holder, card, facts, words, scene: holder.closest(".scene"), image: card.querySelector("img") };
};
const inOrder = () => {
  const places = new Map([...document.querySelectorAll("#sections .picture")].map((holder, at) => [holder, at]));
  pictures.sort((a, b) => places.get(a.holder) - places.get(b.holder));
};
/** The pictures of each scene: they differ in adapter and strength alone. */
const gather = () => {
  const scenes = new Map();
  for (const picture of pictures) scenes.set(picture.scene, [...(scenes.get(picture.scene) ?? []), picture]);
  for (const picture of pictures) picture.siblings = scenes.get(picture.scene);
};
const isBase = (picture) => picture.facts["LoRA strength"] === 0;
/** The picture of the base alone that this one can be compared with. */
const baseOf = (picture) => isBase(picture) ? undefined : picture.siblings.find(isBase);
const copyOf = (picture, properties = {}) => make("img", {
  src: picture.card.getAttribute("href"), alt: picture.image.alt, className: picture.image.className,
  width: picture.image.width, height: picture.image.height, decoding: "async", ...properties,
});
const adapterName = (picture) => {
  const name = picture.facts.Adapter.replace(/ \(\w*\)$/, ""), step = /^step-0{0,5}(\d{1,12})$/.exec(name);
  return step ? told("step {n}", { n: step[1] }) : name;
};
/** What tells a picture from its siblings. */
const shortLabel = (picture) => {
  if (isBase(picture)) return told("base");
  const names = new Set(picture.siblings.filter((other) => !isBase(other)).map((other) => other.facts.Adapter));
  const strength = told("strength {n}", { n: picture.facts["LoRA strength"] });
  return names.size > 1 ? `${adapterName(picture)} · ${strength}` : strength;
};

// ---------------------------------------------------------------- favourites

let favourites = new Set(); // jobs: the same picture in another folder is a favourite there too
let isKept = true;
const readFavourites = () => {
  try {
    const kept = JSON.parse(recall("favourites") ?? "[]");
    return new Set(Array.isArray(kept) ? kept.filter((job) => typeof job === "string") : []);
  } catch { return new Set(); }
};
const isFavourite = (picture) => favourites.has(picture.facts.Job);
const toggleFavourite = (picture) => {
  if (isKept) favourites = readFavourites(); // another page may have added some
  if (!favourites.delete(picture.facts.Job)) favourites.add(picture.facts.Job);
  isKept = remember("favourites", JSON.stringify([...favourites]));
  showFavourites();
};
const showFavourites = () => {
  for (const picture of pictures) markStar(picture.star, isFavourite(picture), "");
  const count = pictures.filter(isFavourite).length;
  find("starred").textContent = told("★ {n}", { n: count });
  find("starred").setAttribute("aria-label", `${told("Favourites only")} (${count})`);
  find("export").disabled = count === 0;
  if (dialog.open) markStar(doing("star"), isFavourite(current), "Favourite");
  applyFilters();
};
const markStar = (button, on, word) => {
  button.setAttribute("aria-pressed", on);
  button.textContent = word ? told(`${on ? "★" : "☆"} ${word}`) : on ? "★" : "☆";
};
const addStar = (picture) => {
  picture.star = make("button", { type: "button", className: "star", textContent: "☆" });
  picture.star.dataset.label = "☆ Favourite";
  picture.star.addEventListener("click", () => toggleFavourite(picture));
  picture.holder.append(picture.star);
};
const exportFavourites = () => {
  const list = pictures.filter(isFavourite).map(({ facts }) => facts);
  const file = new Blob([JSON.stringify(list, null, 2)], { type: "application/json" });
  const link = make("a", { href: URL.createObjectURL(file), download: "favourites.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
};

// ---------------------------------------------------------------- filters

const FACETS = ["LoRA strength", "Adapter", "Seed", "Size", "Sampler", "Steps", "Guidance", "Base", "Precision"];
const isPressed = (button) => button.getAttribute("aria-pressed") === "true";
const matches = (picture) => {
  const words = plain(find("search").value).split(/\s+/).filter(Boolean);
  const chosen = [...find("facets").children].filter((select) => select.value);
  return words.every((word) => picture.words.includes(word))
    && chosen.every((select) => String(picture.facts[select.name]) === select.value)
    && (!isPressed(find("starred")) || isFavourite(picture));
};

/** A choice for every setting in which the pictures differ, with counts. */
const buildFacets = () => {
  for (const name of FACETS) {
    const counts = new Map();
    for (const { facts } of pictures) counts.set(String(facts[name]), (counts.get(String(facts[name])) ?? 0) + 1);
    if (counts.size < 2) continue;
    const values = [...counts.keys()].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    const options = values.map((value) => new Option(`${value} (${counts.get(value)})`, value));
    const select = make("select", { name }, new Option("", ""), ...options);
    select.dataset.label = name;
    select.addEventListener("change", applyFilters);
    find("facets").append(select);
  }
};
const nameFacets = () => {
  for (const select of find("facets").children) {
    select.options[0].textContent = told("{name}: all", { name: told(select.name) });
  }
};

/** Hides the rows and columns of a grid that the filters leave empty. */
const tidyGrid = (table) => {
  const isEmpty = (cell) => !cell.querySelector(".picture:not([hidden])");
  const rows = [...table.tBodies[0].rows], hasBase = Boolean(table.querySelector("td.base"));
  for (const row of rows) row.hidden = !hasBase && [...row.querySelectorAll("td")].every(isEmpty);
  const scales = (row) => [...row.querySelectorAll("td:not(.base)")];
  const heads = [...table.tHead.rows[0].querySelectorAll("th")].slice(hasBase ? 1 : 0);
  heads.forEach((head, at) => {
    const column = rows.map((row) => scales(row)[at]);
    head.hidden = column.every(isEmpty);
    for (const cell of column) cell.hidden = head.hidden;
  });
};

const applyFilters = () => {
  shown = pictures.filter(matches);
  const visible = new Set(shown);
  for (const picture of pictures) picture.holder.hidden = !visible.has(picture);
  for (const table of document.querySelectorAll("table")) tidyGrid(table);
  const isHidden = (holder) => !holder.querySelector(".picture:not([hidden])");
  for (const part of document.querySelectorAll(".strip li, .scene, #sections section")) {
    if (!part.closest("#sliders")) part.hidden = isHidden(part);
  }
  for (const select of find("facets").children) select.className = select.value ? "chosen" : "";
  showStatus();
  if (!find("sliders").hidden) buildSliders();
};
const showStatus = () => {
  const few = shown.length ? told("{n} of {of} pictures", { n: shown.length, of: pictures.length })
    : told("No picture matches.");
  const warning = told("This browser keeps nothing for files: export your favourites before you close the page.");
  find("status").textContent = [shown.length < pictures.length ? few : "", isKept ? "" : warning].join(" ").trim();
  find("status").hidden = !find("status").textContent;
};

// ---------------------------------------------------------------- arrangement

let sections = []; // the page's own, prompt by prompt, each with its scenes

const readSections = () => [...document.querySelectorAll("#sections section")].map((section) => {
  const list = section.querySelector(".scenes");
  return { section, list, scenes: [...list.children] };
});
const byPrompt = () => sections.map(({ section, list, scenes }) => { list.replaceChildren(...scenes); return section; });
const bySeed = () => {
  const scenes = new Map(), seeds = new Map(pictures.map(({ scene, facts }) => [scene, facts.Seed]));
  for (const scene of sections.flatMap((each) => each.scenes)) {
    const seed = seeds.get(scene);
    scenes.set(seed, [...(scenes.get(seed) ?? []), scene]);
  }
  return [...scenes].map(([seed, members]) => {
    const title = make("h2", { textContent: told("seed {n}", { n: seed }) });
    title.dataset.t = "seed {n}";
    title.dataset.n = seed;
    return make("section", {}, title, make("ul", { className: "scenes" }, ...members));
  });
};
const arrange = () => {
  find("sections").replaceChildren(...(find("grouping").value === "seed" ? bySeed() : byPrompt()));
  inOrder();
  applyFilters();
};

// ---------------------------------------------------------------- base versus LoRA

/** Two pictures on top of each other; a range input, so keys move it too, decides how much of each is seen. */
const makeSlider = (base, drawn) => {
  const range = make("input", { type: "range", min: 0, max: 100, value: 50 });
  range.dataset.label = "Drag: left the base, right the LoRA";
  range.setAttribute("aria-label", told(range.dataset.label));
  const labels = [told("base"), `LoRA · ${shortLabel(drawn)}`];
  const frame = make("div", { className: "slider" }, copyOf(base), copyOf(drawn),
    ...labels.map((textContent) => make("i", { textContent })), range);
  frame.querySelectorAll("img")[1].classList.add("over");
  range.addEventListener("input", () => frame.style.setProperty("--split", `${range.value}%`));
  return frame;
};
const buildSliders = () => {
  const pairs = shown.map((picture) => [baseOf(picture), picture]).filter(([base]) => base);
  find("sliders").replaceChildren(...pairs.map(([base, picture]) => {
    const about = make("button", { type: "button" }, make("b", { textContent: picture.facts.Prompt }),
      told("seed {n}", { n: picture.facts.Seed }));
    about.addEventListener("click", () => open(picture));
    return make("li", {}, make("figure", {}, makeSlider(base, picture), make("figcaption", {}, about)));
  }));
};
const showView = (wanted) => {
  const isComparing = wanted === "Base ⇄ LoRA";
  for (const button of find("views").children) button.setAttribute("aria-pressed", button.dataset.t === wanted);
  find("sections").hidden = find("grouping").hidden = isComparing;
  find("sliders").hidden = !isComparing;
  find("sliders").replaceChildren();
  if (isComparing) buildSliders();
};

// ---------------------------------------------------------------- lightbox

let dialog, current, isComparing = false;
const doing = (what) => dialog.querySelector(`[data-do="${what}"]`);

const open = (picture) => {
  current = picture;
  const isNew = !dialog.open;
  if (isNew) dialog.showModal();
  showStage();
  dialog.querySelector(".facts p").textContent = current.facts.Prompt;
  showFacts();
  showSiblings();
  markStar(doing("star"), isFavourite(current), "Favourite");
  doing("command").hidden = !current.facts.Command;
  for (const step of [-1, 1]) new Image().src = beside(step).card.getAttribute("href"); // so that it is there at once
  if (isNew) dialog.scrollTop = 0; // on a small screen the focused button would be scrolled to
};
const showStage = () => {
  const base = baseOf(current);
  doing("compare").hidden = !base;
  doing("compare").setAttribute("aria-pressed", Boolean(base && isComparing));
  dialog.querySelector(".stage").replaceChildren(base && isComparing ? makeSlider(base, current) : copyOf(current));
};
const UNLISTED = ["Prompt", "Job", "Command"];
const showFacts = () => {
  const listed = Object.entries(current.facts).filter(([name]) => !UNLISTED.includes(name));
  dialog.querySelector("dl").replaceChildren(...listed.flatMap(([name, value]) => [
    make("dt", { textContent: told(name) }),
    make("dd", { textContent: value === "" ? "–" : name === "Made" ? localTime(value) : value }),
  ]));
};
const localTime = (iso) => {
  const time = new Date(iso);
  return Number.isNaN(time.getTime()) ? iso : time.toLocaleString(language);
};
const showSiblings = () => {
  const all = current.siblings;
  const buttons = all.map((picture) => {
    const button = make("button", { type: "button" }, copyOf(picture, { alt: "" }), shortLabel(picture));
    button.setAttribute("aria-pressed", picture === current);
    button.addEventListener("click", () => open(picture));
    return button;
  });
  const list = dialog.querySelector(".siblings"), own = buttons[all.indexOf(current)];
  list.hidden = all.length < 2;
  list.replaceChildren(...(all.length < 2 ? [] : buttons));
  list.scrollLeft = own.offsetLeft - list.offsetLeft - (list.clientWidth - own.offsetWidth) / 2;
};
const at = (index) => shown[(index + shown.length) % shown.length] ?? current;
const beside = (step) => at(shown.includes(current) ? shown.indexOf(current) + step : 0);
const compare = () => {
  if (!baseOf(current)) return;
  isComparing = !isComparing;
  showStage();
};

const ACTIONS = {
  previous: () => open(beside(-1)),
  next: () => open(beside(1)),
  close: () => dialog.close(),
  star: () => toggleFavourite(current),
  compare,
  prompt: (button) => copy(current.facts.Prompt, button),
  seed: (button) => copy(current.facts.Seed, button),
  command: (button) => copy(current.facts.Command, button),
};
const KEYS = {
  ArrowLeft: ACTIONS.previous, ArrowRight: ACTIONS.next, Home: () => open(at(0)), End: () => open(at(-1)),
  f: ACTIONS.star, c: compare,
};
const onKey = (event) => {
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  const isSliding = event.target.type === "range" && event.key.length > 1;
  if (!dialog.open || !action || isSliding || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  action();
};

const copy = async (text, button) => {
  const isCopied = await navigator.clipboard?.writeText(text).then(() => true, () => false) || copyByHand(text);
  button.textContent = told(isCopied ? "Copied" : "Copying is not allowed here");
  setTimeout(() => { button.textContent = told(button.dataset.t); }, 1200);
};
/** For browsers without a clipboard for pages from the disk. */
const copyByHand = (text) => {
  const area = make("textarea", { value: text, readOnly: true }), before = document.activeElement;
  dialog.append(area); // what lies outside an open dialog can't be selected
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  before.focus();
  return isCopied;
};

// ---------------------------------------------------------------- the page

const showLanguage = (wanted) => {
  speak(wanted, "Mega Man LoRA gallery");
  nameFacets();
  showFavourites();
};
const listenToPage = () => {
  for (const picture of pictures) {
    picture.card.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      open(picture);
    });
  }
  find("search").addEventListener("input", applyFilters);
  find("grouping").addEventListener("change", arrange);
  find("starred").addEventListener("click", () => {
    find("starred").setAttribute("aria-pressed", !isPressed(find("starred")));
    applyFilters();
  });
  find("export").addEventListener("click", exportFavourites);
  for (const button of find("views").children) button.addEventListener("click", () => showView(button.dataset.t));
  addEventListener("storage", (event) => {
    if (event.key !== `${KEY}favourites`) return;
    favourites = readFavourites();
    showFavourites();
  });
};
const listenToDialog = () => {
  dialog.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    if (button) ACTIONS[button.dataset.do](button);
    else if (event.target === dialog) dialog.close();
  });
  document.addEventListener("keydown", onKey); // the focus may have been on a button that is gone
  dialog.addEventListener("close", () => current.card.focus());
};

const start = () => {
  dialog = document.querySelector("dialog");
  sections = readSections();
  pictures = [...document.querySelectorAll(".picture")].map(readPicture);
  gather();
  favourites = readFavourites();
  pictures.forEach(addStar);
  buildFacets();
  listenToPage();
  listenToDialog();
  find("views").hidden = !pictures.some(baseOf);
  document.querySelector(".tools").hidden = pictures.length === 0;
  offerAppearance(showLanguage);
};

showTheme(knownTheme()); // before anything is painted
document.addEventListener("DOMContentLoaded", start);
