"use strict";
// What the pages share: words in two languages, light and dark. A page's own script comes behind this one, with
// its table CHINESE: 正體中文, by the English that stands in the page.

// ---------------------------------------------------------------- words

const ENGLISH_TAG = "en", CHINESE_TAG = "zh-TW";
let language = ENGLISH_TAG;

/** The text in the reader's language, with its {names} filled in. */
const told = (text, values = {}) => {
  const words = language === CHINESE_TAG ? CHINESE[text] ?? text : text;
  return words.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
};

const translate = (root) => {
  for (const each of root.querySelectorAll("[data-t]")) each.textContent = told(each.dataset.t, { n: each.dataset.n });
  for (const each of root.querySelectorAll("[data-label]")) each.setAttribute("aria-label", told(each.dataset.label));
  for (const each of root.querySelectorAll("[data-hint]")) each.placeholder = told(each.dataset.hint);
};

// ---------------------------------------------------------------- what the browser remembers

const KEY = "megaman-gallery."; // all pages from the disk share one storage
const recall = (name) => {
  try { return localStorage.getItem(KEY + name); } catch { return null; } // some browsers refuse it for files
};
const remember = (name, value) => {
  try { localStorage.setItem(KEY + name, value); return true; } catch { return false; }
};

const THEMES = { "": "Theme: system", light: "Theme: light", dark: "Theme: dark" };
const showTheme = (name) => {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
};
const knownTheme = () => { const name = recall("theme"); return Object.hasOwn(THEMES, name ?? "") ? name ?? "" : ""; };
const chosenLanguage = () => {
  const wanted = recall("language") ?? navigator.language ?? "";
  return wanted.toLowerCase().startsWith("zh") ? CHINESE_TAG : ENGLISH_TAG;
};

// ---------------------------------------------------------------- the buttons for both

const find = (id) => document.getElementById(id);

/** Puts all of the page into a language. */
const speak = (wanted, title) => {
  language = wanted;
  document.documentElement.lang = language;
  document.title = told(title);
  translate(document);
  find("theme").textContent = told(THEMES[document.documentElement.dataset.theme ?? ""]);
  find("language").textContent = language === CHINESE_TAG ? "English" : "繁體中文";
  find("language").lang = language === CHINESE_TAG ? ENGLISH_TAG : CHINESE_TAG;
};
const nextTheme = () => {
  const names = Object.keys(THEMES), now = document.documentElement.dataset.theme ?? "";
  const name = names[(names.indexOf(now) + 1) % names.length];
  remember("theme", name);
  showTheme(name);
  find("theme").textContent = told(THEMES[name]);
};
/** Shows the buttons, and the page in the reader's language. show: puts the page into a language. */
const offerAppearance = (show) => {
  find("theme").addEventListener("click", nextTheme);
  find("language").addEventListener("click", () => {
    const wanted = language === CHINESE_TAG ? ENGLISH_TAG : CHINESE_TAG;
    remember("language", wanted);
    show(wanted);
  });
  find("appearance").hidden = false;
  show(chosenLanguage());
};

