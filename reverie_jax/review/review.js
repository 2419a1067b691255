"use strict";
const main = document.querySelector("main"), status = document.getElementById("status");
const current = () => document.activeElement.closest("article");
const isOpen = (article) => !article.querySelector("form").hidden;

// Changes are sent one after the other; each to the article as the one before left it.
let queue = Promise.resolve();
const later = (article, action) => (queue = queue.then(() => action(document.getElementById(article.id))));

function say(text, failed = false) {
  status.textContent = text;
  status.classList.toggle("error", failed);
}

function go(step) {
  const articles = [...main.querySelectorAll("article")], at = articles.indexOf(current());
  const next = at < 0 ? articles[step > 0 ? 0 : articles.length - 1] : articles[at + step];
  if (next) {
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "start" });
  } else {
    const link = document.querySelector(step > 0 ? "a[rel=next]" : "a[rel=prev]");
    if (link) location.assign(link.href + (step > 0 ? "#first" : "#last"));
    else say(step > 0 ? "This is the last sample." : "This is the first sample.");
  }
}

function show(article, open) {
  const form = article.querySelector("form");
  form.hidden = !open;
  article.querySelector("[name=open]").setAttribute("aria-expanded", open);
  if (open) form.querySelector("textarea").focus();
  else {
    form.reset();
    article.focus();
  }
}

async function send(article, change, words) {
  try {
    const response = await fetch(`marks/${article.dataset.row}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(change),
    });
    if (!response.ok) throw new Error((await response.json()).error);
    const open = isOpen(article) && !("edits" in change), held = document.createElement("template");
    held.innerHTML = await response.text();
    const fresh = held.content.querySelector("article");
    if (!fresh) throw new Error("the answer is not a sample");
    if (open) {
      const typed = [...article.querySelectorAll("textarea")];
      fresh.querySelectorAll("textarea").forEach((area, index) => (area.value = typed[index].value));
      fresh.querySelector("form").hidden = false;
    }
    const focused = current() === article || document.activeElement === document.body;
    article.replaceWith(fresh);
    if (focused) fresh.focus({ preventScroll: true });
    say(words);
  } catch (error) {
    say(`Not saved: ${error.message}`, true);
  }
}

function mark(article, value) {
  const pressed = article.querySelector(`button[value=${value}]`).getAttribute("aria-pressed") === "true";
  return send(article, { mark: pressed ? "" : value }, pressed ? "Mark taken back" : `Marked ${value}`);
}

function save(article) {
  const changed = [...article.querySelectorAll("textarea")].filter((area) => area.value !== area.defaultValue);
  const change = { edits: Object.fromEntries(changed.filter((area) => area.name).map((area) => [area.name, area.value])) };
  for (const area of changed) if (!area.name) change.note = area.value;
  if (changed.length) return send(article, change, "Saved");
  show(article, false);
}

main.addEventListener("click", (event) => {
  const button = event.target.closest("button"), article = event.target.closest("article");
  if (button?.name === "mark") later(article, (fresh) => mark(fresh, button.value));
  if (button?.name === "open") show(article, !isOpen(article));
  if (button?.name === "cancel") show(article, false);
});

main.addEventListener("submit", (event) => {
  event.preventDefault();
  later(event.target.closest("article"), save);
});

document.addEventListener("keydown", (event) => {
  const article = current();
  if (event.target.matches("input, select, textarea")) {
    if (article && event.key === "Escape") show(article, false);
    if (article && event.key === "Enter" && (event.ctrlKey || event.metaKey)) later(article, save);
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "j") go(1);
  else if (event.key === "k") go(-1);
  else if (article && event.key === "g") later(article, (fresh) => mark(fresh, "good"));
  else if (article && event.key === "b") later(article, (fresh) => mark(fresh, "bad"));
  else if (article && event.key === "e") show(article, true);
  else return;
  event.preventDefault(); // the key would be typed into what it opens
});

window.addEventListener("beforeunload", (event) => {
  const typed = [...main.querySelectorAll("form:not([hidden]) textarea")];
  if (typed.some((area) => area.value !== area.defaultValue)) event.preventDefault();
});

if (location.hash === "#first") go(1);
if (location.hash === "#last") go(-1);
