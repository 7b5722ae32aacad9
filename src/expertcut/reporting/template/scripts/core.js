"use strict";
// What every part uses: the data, elements, numbers as text, the tip, the theme, drawing anew.
// Text of quizzes and models only ever becomes text nodes.

const started = performance.now();
const DATA = JSON.parse(document.getElementById("data").textContent);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const html = (name, attributes = {}, ...children) =>
  fill(document.createElement(name), attributes, children);

const svg = (name, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

/** A number as Python's format specification says, a share with `p` in points; nothing is a dash. */
function format(spec, value) {
  if (value === null || value === undefined) return "–";
  const [, sign, comma, digits, kind] = /^(\+?)(,?)(?:\.(\d+))?([%fdgp]?)$/.exec(spec);
  if (kind === "g") return withSign(sign, value, String(Number(value.toPrecision(Number(digits)))));
  const shown = kind === "%" || kind === "p" ? 100 * value : value;
  const places = kind === "d" ? 0 : Number(digits ?? 6);
  const text = comma
    ? shown.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places })
    : shown.toFixed(places);
  return withSign(sign, value, text + (kind === "%" ? "%" : ""));
}

const withSign = (sign, value, text) => (sign && value >= 0 ? `+${text}` : text.replace(/^-/, "−"));

const tip = document.getElementById("tip");

/** Shows a title and rows of name and text beside a place of the window. */
function showTip(title, rows, x, y) {
  tip.replaceChildren(html("strong", {}, title));
  for (const [name, text] of rows) {
    tip.append(html("div", {}, html("span", {}, name), html("span", {}, text)));
  }
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
  const top = y + 16 + box.height > innerHeight ? y - 16 - box.height : y + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

const hideTip = () => { tip.hidden = true; };

/** Ticks at round numbers from low to high, at most `most` of them. */
function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most - 1) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

/** Every so many of a count of places, so that labels have room. */
const every = (count, space, each) => Math.max(1, Math.ceil((count * each) / Math.max(space, 1)));

const redraws = new Map();
const observer = new ResizeObserver((entries) => {
  for (const entry of entries) redraw(entry.target);
});

/** Draws into a box now and whenever its width changes. */
function drawn(box, draw) {
  redraws.set(box, { draw, width: 0 });
  redraw(box);
  observer.observe(box);
}

function redraw(box) {
  const its = redraws.get(box);
  const width = box.clientWidth;
  if (width === 0 || width === its.width) return;
  its.width = width;
  its.draw(width);
}

const THEMES = ["automatic", "light", "dark"];
const themeButton = document.getElementById("theme");

function remembered(theme) {
  try {
    if (theme) localStorage.setItem("expertcut-theme", theme);
    return localStorage.getItem("expertcut-theme");
  } catch {
    return null; // a page in a frame may not remember
  }
}

function setTheme(theme) {
  if (theme === "automatic") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  themeButton.textContent = `Theme: ${theme}`;
  themeButton.dataset.theme = theme;
}

themeButton.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(themeButton.dataset.theme) + 1) % THEMES.length];
  remembered(next);
  setTheme(next);
});
setTheme(THEMES.find((theme) => theme === remembered()) ?? "automatic");

// On paper all but a recipe is open, drawn for the width of a sheet; no table or map is wider.
const WIDE = ".scroll > table, .plot > .heat";
let opened = [];
addEventListener("beforeprint", () => {
  hideTip();
  opened = [...document.querySelectorAll("details:not([open], :has(pre))")];
  for (const details of opened) details.open = true;
  document.documentElement.classList.add("printing");
  for (const box of redraws.keys()) redraw(box);
  for (const wide of document.querySelectorAll(WIDE)) {
    const share = () => Math.min(1, wide.parentElement.clientWidth / wide.offsetWidth);
    wide.classList.toggle("tight", share() < 0.7); // headings may break within words
    wide.style.zoom = share();
  }
});
addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
  document.documentElement.classList.remove("printing");
  for (const wide of document.querySelectorAll(WIDE)) wide.style.zoom = "";
  for (const box of redraws.keys()) redraw(box);
});
