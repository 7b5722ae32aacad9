// Experts of a profile: linked maps, the chosen one with its subjects, and a table of all.

const FEW = 25;
const COLUMNS = [
  // heading, figure, format, interval
  ["appearances", "appearances", ".1%"],
  ["accuracy", "accuracy", ".1%", "accuracy_ci95"],
  ["weighted accuracy", "weighted_accuracy", ".1%", "weighted_accuracy_ci95"],
  ["contribution, %", "contribution_pct", ".2f"],
  ["tokens", "tokens", ",d"],
  ["difference, points", "difference", "+.1p"],
  ["z", "z", "+.2f"],
  ["p, adjusted", "p_adjusted", ".2g"],
  ["p, family-wise", "p_family", ".2g"],
];
const COMMON = 0.01; // the paper's tables list experts in at least 1 % of questions

class Explorer {
  constructor(root) {
    Object.assign(this, DATA.explorers[root.dataset.explorer]);
    this.root = root;
    this.detail = root.querySelector(".detail");
    this.experts = this.layers.flatMap((layer, row) =>
      Array.from({ length: layer.experts }, (_, column) => ({ row, column, layer: layer.layer })));
    this.starts = this.layers.map((_, row) => this.experts.findIndex((its) => its.row === row));
    this.maps = [...root.querySelectorAll(".grid .plot")].map((box) =>
      new Heat(box, DATA.figures[box.dataset.figure], this.events()));
    this.offerMarks(root.querySelector(".marks"));
    this.makeTable();
    this.pick(this.suspect ?? this.busiest(), false);
  }

  events() {
    return {
      hover: (row, column, x, y) => this.hover(this.starts[row] + column, x, y),
      leave: () => this.leave(),
      pick: (row, column) => this.pick(this.starts[row] + column, true),
    };
  }

  busiest() {
    const start = this.starts.at(-1);
    const last = this.figures.appearances.slice(start);
    return start + last.indexOf(Math.max(...last));
  }

  name(x) {
    const { layer, column } = this.experts[x];
    return `layer ${layer}, expert ${column}`;
  }

  /** Its figures as rows of name and text. */
  rows(x) {
    return COLUMNS.map(([name, figure, spec, interval]) => [name, this.text(x, figure, spec, interval)]);
  }

  text(x, figure, spec, interval) {
    const value = format(spec, this.figures[figure][x]);
    const low = interval ? this.figures[`${interval}_low`][x] : null;
    if (low === null) return value;
    return `${value} (${format(spec, low)} … ${format(spec, this.figures[`${interval}_high`][x])})`;
  }

  /** Which plans remove or tilt it, in words. */
  fate(x) {
    return this.marks.flatMap(({ name, removed, tilted, verb }) =>
      (removed.includes(x) ? [`${verb} in ${name}`] : []).concat(tilted.includes(x) ? [`tilted in ${name}`] : []));
  }

  hover(x, atX, atY) {
    const { row, column } = this.experts[x];
    for (const map of this.maps) map.hover(row, column);
    const fate = this.fate(x).map((words) => ["", words]);
    showTip(this.name(x), this.rows(x).concat(fate), atX, atY);
  }

  leave() {
    for (const map of this.maps) map.leave();
    hideTip();
  }

  pick(x, isAsked) {
    const { row, column } = this.experts[x];
    this.picked = x;
    for (const map of this.maps) map.pick(row, column);
    this.showDetail(x);
    for (const line of this.body.rows) line.classList.toggle("picked", Number(line.dataset.x) === x);
    if (isAsked) this.detail.scrollIntoView({ block: "nearest" });
  }

  offerMarks(choice) {
    if (!this.marks.length) return;
    choice.parentElement.hidden = false;
    choice.append(html("option", { value: "" }, "nothing"));
    this.marks.forEach(({ name }, i) => choice.append(html("option", { value: i }, name)));
    const mark = (value) => {
      choice.value = value;
      const its = choice.value === "" ? { removed: [], tilted: [] } : this.marks[Number(choice.value)];
      const places = (list) => list.map((x) => [this.experts[x].row, this.experts[x].column]);
      for (const map of this.maps) map.mark({ removed: places(its.removed), tilted: places(its.tilted) });
    };
    choice.addEventListener("change", () => mark(choice.value));
    for (const link of document.querySelectorAll(".cuts a")) {
      if (link.hash.slice(1) === this.root.closest("section").id) link.addEventListener("click", () => mark(link.dataset.cut));
    }
    mark("0");
  }

  showDetail(x) {
    const name = this.name(x);
    const facts = html("dl", { class: "facts" });
    for (const [term, text] of this.rows(x)) {
      facts.append(html("div", {}, html("dt", {}, term), html("dd", {}, text)));
    }
    const fate = this.fate(x);
    this.detail.replaceChildren(
      html("h3", {}, name.charAt(0).toUpperCase() + name.slice(1)),
      html("p", { class: "note" }, [this.layers[this.experts[x].row].block, ...fate].join(" · ")),
      facts, this.subjectTable(x));
    this.detail.scrollTop = 0;
  }

  subjectTable(x) {
    const { names, questions, right, activated, activated_right: hits } = this.subjects;
    const headings = ["subject", "chose it", "right then", "right in all"];
    const head = html("tr", {}, ...headings.map((text) =>
      html("th", { scope: "col", class: text === "subject" ? "" : "n" }, html("button", { type: "button" }, text))));
    const body = html("tbody");
    const order = sorted(names.map((_, s) => s), (s) => activated[s][x] / questions[s], true);
    for (const s of order) {
      const share = activated[s][x] / questions[s];
      const bar = html("i");
      bar.style.width = `${100 * share}%`;
      const then = activated[s][x] ? hits[s][x] / activated[s][x] : null;
      body.append(html("tr", { title: `${activated[s][x]} of ${questions[s]} questions chose it, ${hits[s][x]} of them answered right` },
        html("td", {}, names[s]),
        html("td", { class: "n s share", "data-v": share }, format(".1%", share), bar),
        html("td", { class: "n s", "data-v": then ?? "" }, format(".1%", then)),
        html("td", { class: "n s", "data-v": right[s] / questions[s] }, format(".1%", right[s] / questions[s]))));
    }
    const table = html("table", {}, html("caption", {}, "Its subjects"), html("thead", {}, head), body);
    makeSortable(table);
    return table;
  }

  makeTable() {
    const table = this.root.querySelector(".all-experts");
    this.body = table.tBodies[0];
    this.shown = FEW;
    this.order = this.experts.map((_, x) => x);
    const keys = [["layer", (x) => this.experts[x].row], ["expert", (x) => this.experts[x].column],
      ...COLUMNS.map(([name, figure]) => [name, (x) => this.figures[figure][x]])];
    const head = html("tr");
    keys.forEach(([name, key], i) => {
      const button = html("button", { type: "button" }, name);
      const heading = html("th", { scope: "col", class: "n" }, button);
      button.addEventListener("click", () => {
        this.order = sorted(this.order, key, turn(heading, i > 1));
        this.fillTable();
      });
      head.append(heading);
    });
    table.tHead.replaceChildren(head);
    this.listenToTable();
    this.fillTable();
  }

  listenToTable() {
    const [layer, common] = [this.root.querySelector(".layer"), this.root.querySelector(".common")];
    layer.append(html("option", { value: "" }, "all"));
    this.layers.forEach((its, row) => layer.append(html("option", { value: row }, String(its.layer))));
    this.passes = (x) => (layer.value === "" || this.experts[x].row === Number(layer.value))
      && (!common.checked || this.figures.appearances[x] >= COMMON);
    for (const control of [layer, common]) {
      control.addEventListener("change", () => { this.shown = FEW; this.fillTable(); });
    }
    // Never all of thousands at once: 3,000 rows took Chromium more than a second.
    const show = (count) => () => { this.shown = count(); this.fillTable(); };
    this.root.querySelector(".more").addEventListener("click", show(() => this.shown + 100));
    this.root.querySelector(".many").addEventListener("click", show(() => this.shown + 500));
    this.body.addEventListener("click", (event) => {
      const line = event.target.closest("tr");
      if (line) this.pick(Number(line.dataset.x), true);
    });
  }

  fillTable() {
    const found = this.order.filter((x) => this.passes(x));
    this.body.replaceChildren(...found.slice(0, this.shown).map((x) => this.line(x)));
    const shown = Math.min(found.length, this.shown);
    const total = this.experts.length.toLocaleString("en");
    const words = `${shown.toLocaleString("en")} of ${found.length.toLocaleString("en")} shown, ${total} experts in all`;
    this.root.querySelector(".count").textContent = words;
    for (const button of this.root.querySelectorAll(".more, .many")) button.disabled = shown === found.length;
  }

  line(x) {
    const { layer, column } = this.experts[x];
    const pick = html("button", { type: "button", class: "pick", "aria-label": `choose ${this.name(x)}` }, String(column));
    const cells = COLUMNS.map(([, figure, spec, interval]) => html("td", { class: "n s" }, this.text(x, figure, spec, interval)));
    return html("tr", { "data-x": x, class: x === this.picked ? "picked" : "" },
      html("td", { class: "n" }, String(layer)), html("td", { class: "n" }, pick), ...cells);
  }
}

for (const root of document.querySelectorAll("[data-explorer]")) new Explorer(root);
for (const box of document.querySelectorAll(".plot:not(.grid .plot)")) {
  const figure = DATA.figures[box.dataset.figure];
  if (figure.kind === "heat") plainHeat(box, figure);
  else new Curves(box, figure);
}
performance.measure("drawn", { start: started, end: performance.now() });
