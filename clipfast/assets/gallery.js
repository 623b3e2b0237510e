"use strict";
// The pictures are in the document; without this script it is a page that can only be scrolled.
const find = name => document.getElementById(name);
const text = node => node ? node.textContent : "";
const list = [...document.querySelectorAll(".card")].map((card, place) => {
  const columns = new Map(), score = card.querySelector(".score"), caption = card.querySelector(".caption");
  const add = (name, node) => columns.set(name, node.dataset.value ?? node.textContent);
  for (const name of card.querySelectorAll("dt")) add(name.textContent, name.nextElementSibling);
  if (score) add("score", score);
  if (caption) add("caption", caption);
  const group = text(card.closest("section").querySelector(".name"));
  return {card, place, columns, score: score ? Number(score.dataset.value) : NaN,
          text: `${text(card)}\n${group}`.toLowerCase()};
});

function compare(one, other, column, way) {
  const x = one.columns.get(column), y = other.columns.get(column);
  // What lacks the column comes last in both directions, and equal ones stay in the order given.
  if (x === undefined || y === undefined) return (x === undefined) - (y === undefined) || one.place - other.place;
  const numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
  return way * (numbers ? x - y : x.localeCompare(y)) || one.place - other.place;
}

function sort() {
  const column = find("column").value, way = find("way").value === "down" ? -1 : 1;
  find("way").disabled = !column;
  const order = column ? (x, y) => compare(x, y, column, way) : (x, y) => x.place - y.place;
  const sorted = [...list].sort(order);
  for (const section of document.querySelectorAll("section"))
    section.querySelector(".cards").append(...sorted.filter(one => section.contains(one.card)).map(one => one.card));
}

function filter() {
  const words = find("words").value.toLowerCase().split(/\s+/).filter(Boolean);
  const least = find("least")?.value ?? "", most = find("most")?.value ?? "";
  let shown = 0;
  for (const one of list) {
    const fits = words.every(word => one.text.includes(word))
      && (least === "" || one.score >= Number(least)) && (most === "" || one.score <= Number(most));
    one.card.hidden = !fits;
    shown += fits;
  }
  for (const section of document.querySelectorAll("section")) {
    const count = section.querySelectorAll(".card:not([hidden])").length;
    section.hidden = !count;
    text(section.querySelector(".n")) && (section.querySelector(".n").textContent = `${count.toLocaleString("en")} shown`);
  }
  find("none").hidden = shown > 0 || !list.length;
  find("count").textContent = `${shown.toLocaleString("en")} of ${list.length.toLocaleString("en")} shown`;
}

const larger = find("larger");
let current = null;

function show(card) {
  current = card;
  const picture = card.querySelector("img"), line = card.querySelector(".line"), fields = card.querySelector("dl").cloneNode(true);
  fields.hidden = false;
  find("content").replaceChildren(...[picture, line].filter(Boolean).map(node => node.cloneNode(true)), fields);
  if (!larger.open) larger.showModal();
  larger.scrollTop = 0;
}

function step(by) {
  const shown = [...document.querySelectorAll(".card:not([hidden])")];
  const next = shown[shown.indexOf(current) + by];
  if (next) show(next);
}

document.addEventListener("click", event => {
  const button = event.target.closest(".open");
  if (button) show(button.closest(".card"));
  else if (event.target === larger || event.target.closest("#close")) larger.close();  // the dialog itself is its backdrop
  else if (event.target.closest("#back")) step(-1);
  else if (event.target.closest("#next")) step(1);
});
larger.addEventListener("keydown", event => {
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (by) step(by);
});
larger.addEventListener("close", () => current.querySelector(".open").focus());
find("controls").hidden = !list.length;
find("controls").addEventListener("input", event => {
  if (event.target.id === "column") find("way").value = event.target.value === "score" ? "down" : "up";  // the best first
  (event.target.tagName === "SELECT" ? sort : filter)();
});
filter();
