// Series over categories: upright as lines with bars, flat as rows with points.

const SHAPES = [
  (x, y) => `M${x - 4} ${y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0`,
  (x, y) => `M${x - 3.5} ${y - 3.5}h7v7h-7z`,
  (x, y) => `M${x} ${y - 4.5}l4.5 8h-9z`,
  (x, y) => `M${x} ${y - 5}l5 5l-5 5l-5 -5z`,
  (x, y) => `M${x} ${y + 4.5}l4.5 -8h-9z`,
];
const shape = (number, x, y) => SHAPES[number % SHAPES.length](x, y);

class Curves {
  constructor(box, figure) {
    this.box = box;
    this.figure = figure;
    let number = 0;
    this.looks = figure.series.map((its) => (its.reference ? null : number++));
    this.drawnCount = number;
    this.over = svg("svg", {
      class: "over", tabindex: "0", role: "img",
      "aria-label": `${figure.title}: ${figure.name} by ${figure.across}; arrow keys read it out`,
    });
    box.replaceChildren(this.over);
    if (figure.series.length > 1) box.before(this.legend());
    this.setRange();
    this.listen();
    drawn(box, (width) => this.draw(width));
  }

  legend() {
    const legend = html("div", { class: "legend" });
    this.figure.series.forEach((its, i) => {
      const look = this.looks[i];
      const line = svg("path", { d: "M0 7h26", stroke: "currentColor", "stroke-width": 1.5, "stroke-dasharray": look === null ? "5 4" : "none" });
      const key = svg("svg", { width: 26, height: 14, class: look === null ? "ref" : `s${look % 7}` }, line);
      if (look !== null) key.append(svg("path", { d: shape(look, 13, 7), fill: "currentColor" }));
      legend.append(key, html("span", { class: "name" }, its.name));
    });
    return legend;
  }

  setRange() {
    const { series, zero } = this.figure;
    const values = series.flatMap((its) => [...its.values, ...its.low, ...its.high]);
    const found = values.concat(zero ?? []).filter((value) => value !== null);
    let [low, high] = found.length ? [Math.min(...found), Math.max(...found)] : [0, 1];
    const room = 0.06 * (high - low) || Math.abs(high) * 0.1 || 1;
    low = zero !== null && low === zero ? low : low - room;
    this.range = [low, high + room];
  }

  draw(width) {
    const flat = this.figure.flat;
    const count = this.figure.categories.length;
    const longest = Math.max(0, ...this.figure.categories.map((name) => name.length));
    this.left = flat ? Math.min(width * 0.42, 24 + 7 * longest) : 58;
    this.width = width;
    this.rowHeight = Math.max(24, 10 + 11 * this.drawnCount);
    this.height = flat ? count * this.rowHeight + 44 : Math.min(300, Math.max(220, width * 0.4));
    this.over.setAttribute("width", width);
    this.over.setAttribute("height", this.height);
    this.cross = svg("path", { class: "axis" });
    this.over.replaceChildren(...this.axes(), this.cross, ...this.figure.series.map((its, i) => this.line(its, i)));
  }

  /** Where a category and a value lie. */
  at(i, value, shift = 0) {
    const [low, high] = this.range;
    const share = (value - low) / (high - low);
    if (this.figure.flat) {
      return [this.left + share * (this.width - this.left - 16), (i + 0.5) * this.rowHeight + shift];
    }
    const step = (this.width - this.left - 16) / Math.max(1, this.figure.categories.length);
    return [this.left + (i + 0.5) * step + shift, 8 + (1 - share) * (this.height - 52)];
  }

  axes() {
    const { flat, categories, zero } = this.figure;
    const [low, high] = this.range;
    const nodes = [];
    const most = flat ? Math.max(4, Math.floor((this.width - this.left) / 75)) : 6;
    const end = flat ? this.height - 40 : this.width - 12;
    for (const tick of ticks(low, high, most)) {
      const [x, y] = this.at(0, tick);
      const label = format(this.tickSpec(most), tick);
      nodes.push(svg("path", { class: "axis", d: flat ? `M${x} 0V${end}` : `M${this.left} ${y}H${end}` }));
      nodes.push(flat
        ? svg("text", { x, y: this.height - 25, "text-anchor": "middle" }, label)
        : svg("text", { x: this.left - 8, y: y + 4, "text-anchor": "end" }, label));
    }
    if (zero !== null) {
      const [x, y] = this.at(0, zero);
      nodes.push(svg("path", { class: "zero", d: flat ? `M${x} 0V${end}` : `M${this.left} ${y}H${end}` }));
    }
    return nodes.concat(flat ? this.rowNames() : this.columnNames(categories));
  }

  /** As many digits as the distance of ticks needs. */
  tickSpec(most) {
    const spec = this.figure.spec;
    const found = ticks(...this.range, most);
    if (!spec.endsWith("%") && !spec.endsWith("f")) return spec;
    const step = (found[1] - found[0] || 1) * (spec.endsWith("%") ? 100 : 1);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return spec.replace(/\.\d+/, `.${digits}`);
  }

  rowNames() {
    const nodes = this.figure.categories.map((name, i) => {
      const room = Math.max(4, Math.floor((this.left - 16) / 6.8));
      const short = name.length > room ? `${name.slice(0, room - 1)}…` : name;
      const text = svg("text", { x: this.left - 10, y: (i + 0.5) * this.rowHeight + 4, "text-anchor": "end" }, short);
      if (short !== name) text.append(svg("title", {}, name));
      return text;
    });
    const middle = (this.left + this.width) / 2;
    return [...nodes, svg("text", { x: middle, y: this.height - 7, "text-anchor": "middle" }, this.figure.name)];
  }

  columnNames(categories) {
    const longest = Math.max(...categories.map((name) => name.length), 1);
    const step = every(categories.length, this.width - this.left, 14 + 7 * longest);
    const nodes = [];
    for (let i = 0; i < categories.length; i += step) {
      const [x] = this.at(i, 0);
      nodes.push(svg("text", { x, y: this.height - 27, "text-anchor": "middle" }, categories[i]));
    }
    const middle = (this.left + this.width) / 2;
    nodes.push(svg("text", { x: middle, y: this.height - 8, "text-anchor": "middle" }, this.figure.across));
    const up = `translate(13 ${(this.height - 44) / 2}) rotate(-90)`;
    nodes.push(svg("text", { transform: up, "text-anchor": "middle" }, this.figure.name));
    return nodes;
  }

  line(its, i) {
    const look = this.looks[i];
    const between = this.figure.flat ? 11 : 5;
    const shift = look === null ? 0 : (look - (this.drawnCount - 1) / 2) * between;
    const points = its.values.map((value, at) => (value === null ? null : this.at(at, value, shift)));
    const path = points.map((p, at) => p && `${at > 0 && points[at - 1] ? "L" : "M"}${p[0]} ${p[1]}`);
    const group = svg("g", { class: look === null ? "ref" : `s${look % 7}`, stroke: "currentColor", fill: "none", "stroke-width": 1.5 });
    if (look === null || !this.figure.flat) {
      group.append(svg("path", { d: path.filter(Boolean).join(""), "stroke-dasharray": look === null ? "5 4" : "none" }));
    }
    if (look === null) return group;
    const bars = its.low.map((low, at) => {
      if (low === null || its.high[at] === null) return "";
      const [[x1, y1], [x2, y2]] = [this.at(at, low, shift), this.at(at, its.high[at], shift)];
      return this.figure.flat ? `M${x1} ${y1}H${x2}M${x1} ${y1 - 3}v6M${x2} ${y1 - 3}v6` : `M${x1} ${y1}V${y2}M${x1 - 3} ${y1}h6M${x2 - 3} ${y2}h6`;
    });
    group.append(svg("path", { d: bars.join("") }));
    group.append(svg("path", { d: points.map((p) => (p ? shape(look, ...p) : "")).join(""), fill: "currentColor" }));
    return group;
  }

  show(i, x, y) {
    this.current = i;
    const [px, py] = this.at(i, this.range[0]);
    this.cross.setAttribute("d", this.figure.flat ? `M${this.left} ${py}H${this.width - 12}` : `M${px} 4V${this.height - 44}`);
    const { spec, across, categories, series } = this.figure;
    const rows = series.map((its) => {
      const [low, high] = [its.low[i] ?? null, its.high[i] ?? null];
      const ends = low === null ? "" : ` (${format(spec, low)} … ${format(spec, high)})`;
      return [its.name, format(spec, its.values[i]) + ends];
    });
    showTip(this.figure.flat ? categories[i] : `${across} ${categories[i]}`, rows, x, y);
  }

  leave() {
    this.cross?.setAttribute("d", "");
    hideTip();
  }

  listen() {
    const last = this.figure.categories.length - 1;
    this.over.addEventListener("pointermove", (event) => {
      const box = this.over.getBoundingClientRect();
      const step = (this.width - this.left - 16) / (last + 1);
      const i = this.figure.flat
        ? Math.floor((event.clientY - box.top) / this.rowHeight)
        : Math.floor((event.clientX - box.left - this.left) / step);
      if (i >= 0 && i <= last) this.show(i, event.clientX, event.clientY);
      else this.leave();
    });
    this.over.addEventListener("pointerleave", () => this.leave());
    this.over.addEventListener("blur", () => this.leave());
    this.over.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const i = Math.min(last, Math.max(0, (this.current ?? -step) + step));
      const box = this.over.getBoundingClientRect();
      const [x, y] = this.at(i, this.range[0]);
      this.show(i, box.left + x, box.top + Math.min(y, this.height / 2));
    });
  }
}
