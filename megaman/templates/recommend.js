// The page of --recommend: the cells sorted by any measure. Without it the page is a plain one, in the order of
// the scores.

const CHINESE = { // 正體中文, by the English that stands in the page
  "Which checkpoint, what strength": "用哪個檢查點、多大強度",
  "{n} pictures": "{n} 張圖片",
  "adapter {n}": "LoRA：{n}",
  "base {n}": "基礎模型 {n}",
  "trigger “{n}”": "觸發詞「{n}」",
  "looked at by the base's own UNet": "由基礎模型自己的 UNet 觀看",
  "looked at by {n}": "由 {n} 觀看",
  "Recommended": "推薦",
  "step {n}": "第 {n} 步",
  "strength {n}": "強度 {n}",
  "base alone": "僅基礎模型",
  "What to type next": "接下來輸入",
  "All cells": "所有組合",
  "A heading's button sorts by that measure; a row's name leads to its pictures.":
    "按欄位標題可依該項排序；點名稱可看它的圖片。",
  "adapter": "LoRA",
  "strength": "強度",
  "score": "分數",
  "likeness": "相似",
  "copies": "照抄",
  "obedience": "聽話",
  "leakage": "外洩",
  "damage": "損壞",
  "loss rise": "損失回升",
  "What the measures mean": "各項量測的意思",
  "The score is the sum of what each measure costs; 0 is perfect.": "分數是各項扣分的總和；0 最好。",
  "costs {n}": "扣分：{n}",
  "Pictures": "圖片",
  "With the trigger": "有觸發詞",
  "Without the trigger": "沒有觸發詞",
  "not drawn: its numbers overflowed": "沒畫出來：數值溢位",
  "repeats a training picture": "照抄訓練圖片",
  "Below each drawing: the nearest training picture, and how far it is ({n} = as far as a training picture usually is from its nearest other).":
    "每張圖片下方是最接近的訓練圖片，以及距離（{n} 表示和訓練圖片與其最接近者之間的一般距離相同）。",
  "This page holds small copies of your training pictures: think of that before you publish it.":
    "本頁含有您的訓練圖片的縮圖：公開之前請想一想。",
  "Likeness and copies are left out: the adapter lies in no training run of ours.":
    "沒有量相似和照抄：這個 LoRA 不屬於我們的任何一次訓練。",
  "Likeness and copies are left out: the training pictures are no longer in {n}.":
    "沒有量相似和照抄：訓練圖片已經不在 {n}。",
  "Likeness and copies are left out: {n} holds other pictures than those of the training.":
    "沒有量相似和照抄：{n} 裡的圖片和訓練時的不同。",
  "Leakage is left out: no prompt lacks the trigger.": "沒有量外洩：每個提示詞都有觸發詞。",
  "Obedience and leakage are left out: they need two seeds (--num_images_per_prompt 2).":
    "沒有量聽話和外洩：它們需要兩個種子（--num_images_per_prompt 2）。",
  "Obedience is left out: it needs two prompts with the trigger, of two seeds each.":
    "沒有量聽話：它需要兩個有觸發詞的提示詞，各有兩個種子。",
  "Obedience is left out: the base could not draw all of its pictures, or they were changed since.":
    "沒有量聽話：基礎模型沒能畫出全部的圖片，或者圖片後來被改過。",
  "Obedience is left out: what prompts change in the base's own drawings is lost in what seeds change.":
    "沒有量聽話：在基礎模型自己的圖片裡，提示詞造成的差別淹沒在種子造成的差別裡。",
  "Of cells within {n} of the best score the one nearest to strength 1 is taken, then the best.":
    "與最好的分數相差 {n} 以內的組合裡，取強度最接近 1 的，再取分數最好的。",
  "No held-out loss was measured in this run.": "這次訓練沒有量保留圖片的損失。",
  "How much nearer to your training pictures the drawings are than the base's, by the features of what looks at them and by the colours of the middle, the mean of both: 0 % as far as the base's, 100 % as near as your pictures are to each other.":
    "依觀看者的特徵和中央的色彩，取兩者平均：畫出的圖片比基礎模型的更接近您的訓練圖片多少；0 % 和基礎模型一樣遠，100 % 和您的圖片彼此之間一樣近。",
  "The share of drawings that lie nearer to a training picture than half of what a training picture usually lies from its nearest other, in the VAE's latents.":
    "有多少圖片與某張訓練圖片的距離，小於訓練圖片與其最接近者之間一般距離的一半（在 VAE 的潛在表示裡）。",
  "Whether prompts still decide: how much of the base's answer to the prompts is left, in the VAE's latents, beside what seeds change.":
    "提示詞是否仍然作主：基礎模型對提示詞的反應還剩多少（在 VAE 的潛在表示裡，扣除種子造成的差別）。",
  "How far pictures of prompts without the trigger have moved from the base's of the same seeds, measured by what another seed changes.":
    "沒有觸發詞的圖片，與基礎模型同一種子的圖片差多少，以換一個種子的差別為單位。",
  "The share of drawings that are missing, whose burnt channels, contrast or colour lie outside of what the training pictures and the base show, or that are noise: neighbouring spots differ over twice as much as in any of those.":
    "有多少圖片沒畫出來，或者過曝、對比、色彩超出訓練圖片和基礎模型的範圍，或者只是雜訊：相鄰之處的差別超過其中任何一張的兩倍。",
  "How far the loss on pictures that were never trained on lies above its smallest until then; one number a checkpoint, at strength 1.":
    "從未參與訓練的圖片的損失，比到那時為止的最小值高多少；每個檢查點一個數字，以強度 1 量測。",
  "It is what the LoRA was trained for, and half a character is hardly one: it counts half as much again. More than the training pictures' own gains nothing.":
    "這正是訓練 LoRA 的目的，半個角色幾乎不算角色：它以一點五倍計算。超過訓練圖片本身並不加分。",
  "A drawing that repeats a training picture shows nothing new. It counts threefold, since what is learnt by heart also looks most like the pictures; one in twenty may be chance. A stronger or later adapter pays no less than a weaker or earlier one: more training on the same pictures only hides it.":
    "照抄訓練圖片的圖沒有新東西。它以三倍計算，因為背下來的也最像訓練圖片；二十張裡有一張可能是碰巧。強度更高或更晚的 LoRA，扣分不會比更弱或更早的少：用同樣的圖片再訓練，只會把它藏起來。",
  "A LoRA that no longer does what the prompt says is of little use. A tenth may go to the character, who looks the same under every prompt.":
    "不再聽提示詞的 LoRA 沒什麼用。一成可以讓給角色，因為角色在每個提示詞下都一樣。",
  "Prompts without the trigger should stay the base's. It counts half: many never draw anything else with the LoRA, and 0.7 of what another seed changes is hardly noticed.":
    "沒有觸發詞的提示詞應該仍屬於基礎模型。它只算一半：許多人不會用這個 LoRA 畫別的；換種子差別的七成幾乎看不出來。",
  "Burnt, pale, noisy or missing pictures can't be repaired by a prompt. One in ten may be the prompt's.":
    "過曝、慘白、滿是雜訊或缺少的圖片不是改提示詞能救的。十張裡有一張可能是提示詞造成的。",
  "Where the loss on pictures that were never trained on rises again, the others are learnt by heart. Two per cent are noise.":
    "從未參與訓練的圖片的損失回升，就是把其他圖片背了下來。百分之二屬於雜訊。",
  "likeness: {n} of the way from the base's drawings to your pictures": "相似：從基礎模型的圖走向您的圖片的 {n}",
  "drawings that repeat a training picture: {n}": "照抄訓練圖片的圖：{n}",
  "obedience to prompts: {n} of the base's": "聽提示詞的程度：基礎模型的 {n}",
  "without the trigger it changes {n} of what another seed would": "沒有觸發詞時的改變，是換一個種子的 {n}",
  "drawings with wild colours or noise: {n}": "色彩失控或滿是雜訊的圖：{n}",
  "held-out loss above its smallest by {n}": "保留圖片的損失比最小值高 {n}",
  "more likeness than this is bought with copies: up to {n} of the drawings elsewhere":
    "更像的組合是靠照抄換來的：別處多達 {n} 的圖",
  "more likeness than this is bought with obedience: down to {n} of the base's elsewhere":
    "更像的組合是靠不聽話換來的：別處只剩基礎模型的 {n}",
  "more likeness than this leaks into other prompts: up to {n} of a seed's change elsewhere":
    "更像的組合會外洩到其他提示詞：別處多達換種子差別的 {n}",
  "more likeness than this is bought with wild colours or noise: up to {n} of drawings elsewhere":
    "更像的組合是靠失控的色彩或雜訊換來的：別處多達 {n} 的圖",
  "more likeness than this is learnt by heart: a held-out loss up to {n} above its smallest":
    "更像的組合是背下來的：保留圖片的損失比最小值高達 {n}",
  "no other cell looks clearly more like your pictures": "沒有別的組合明顯更像您的圖片",
  "Theme: system": "主題：跟隨系統",
  "Theme: light": "主題：淺色",
  "Theme: dark": "主題：深色",
};

/** Rows and their pictures by a column's numbers; what has none comes last, however it is turned. */
const sortBy = (head) => {
  const isUp = head.getAttribute("aria-sort") === (head.dataset.first === "up" ? "none" : "descending");
  const column = [...head.parentElement.children].indexOf(head), sign = isUp ? 1 : -1;
  const table = head.closest("table"), rows = [...table.tBodies[0].rows];
  const value = (row) => Number.parseFloat(row.cells[column].dataset.value);
  rows.sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return sign * (a - b);
  });
  table.tBodies[0].append(...rows);
  find("cells").append(...rows.map((row) => find(row.dataset.cell)));
  for (const each of head.parentElement.children) if (each.hasAttribute("aria-sort")) each.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
};

const start = () => {
  for (const head of document.querySelectorAll("th[data-first]")) {
    const label = head.querySelector("span"), button = document.createElement("button");
    button.type = "button";
    label.replaceWith(button);
    button.append(label);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sortBy(head));
  }
  document.querySelector("table").addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (link) document.querySelector(link.getAttribute("href")).open = true;
  });
  offerAppearance((wanted) => speak(wanted, "Which checkpoint, what strength"));
};

showTheme(knownTheme()); // before anything is painted
document.addEventListener("DOMContentLoaded", start);
