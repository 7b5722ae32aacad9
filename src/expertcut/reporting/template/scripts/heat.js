// Maps of layers × experts: cells on a canvas, everything that follows the theme in an SVG above.

const LEFT = 40;
const BOTTOM = 36;
const NARROWEST = 5; // below, the map scrolls in its own box

function colourOf(figure, value) {
  const share = (value - figure.low) / (figure.high - figure.low);
  const last = DATA.colours.length - 1;
  return DATA.colours[Math.round(Math.min(1, Math.max(0, share)) * last)];
}

/** A grey hatch with the paper behind it, for what is undefined: seen in both themes. */
function hatch(context) {
  const tile = html("canvas", { width: 6, height: 6 });
  const pen = tile.getContext("2d");
  pen.strokeStyle = "#8c8c8c";
  pen.beginPath();
  for (const at of [-6, 0, 6]) {
    pen.moveTo(at, 6);
    pen.lineTo(at + 6, 0);
  }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

/** A map in a box; `on.hover(row, column, x, y)` and `on.pick(row, column)` are told of cells. */
class Heat {
  constructor(box, figure, on) {
    this.box = box;
    this.figure = figure;
    this.on = on;
    this.columns = Math.max(...figure.rows.map((row) => row.length));
    this.canvas = html("canvas");
    this.over = svg("svg", { class: "over" });
    this.plane = html("div", {
      class: "heat", tabindex: "0", role: "application",
      "aria-label": `${figure.title}: a map of ${figure.down}s and ${figure.across}s; arrow keys move, Enter chooses`,
    }, this.canvas, this.over);
    this.legend = this.makeLegend();
    this.marked = { removed: [], tilted: [] };
    box.replaceChildren(this.plane);
    box.after(this.legend);
    this.listen();
    drawn(box, (width) => this.draw(width));
  }

  makeLegend() {
    const { low, high, spec, rows, undefined: nothing } = this.figure;
    const values = rows.flat().filter((value) => value !== null);
    const bar = html("canvas", { width: 128, height: 12, role: "img", "aria-label": "colours from low to high" });
    const pen = bar.getContext("2d");
    DATA.colours.forEach((colour, i) => {
      pen.fillStyle = colour;
      pen.fillRect((i * 128) / DATA.colours.length, 0, 128, 12);
    });
    const below = values.some((value) => value < low) ? "≤ " : "";
    const above = values.some((value) => value > high) ? "≥ " : "";
    const legend = html("div", { class: "legend" }, below + format(spec, low), bar, above + format(spec, high));
    if (rows.flat().includes(null)) {
      const swatch = html("canvas", { width: 18, height: 12 });
      const context = swatch.getContext("2d");
      context.fillStyle = hatch(context);
      context.fillRect(0, 0, 18, 12);
      legend.append(html("span", { class: "gap" }), swatch, nothing);
    }
    return legend;
  }

  draw(width) {
    const rows = this.figure.rows.length;
    this.w = Math.max(NARROWEST, Math.min(44, (width - LEFT - 2) / this.columns));
    this.h = Math.min(26, Math.max(7, 380 / rows));
    const size = [Math.ceil(LEFT + this.w * this.columns + 2), Math.ceil(this.h * rows + BOTTOM)];
    this.plane.style.width = `${size[0]}px`;
    this.over.setAttribute("width", size[0]);
    this.over.setAttribute("height", size[1]);
    this.paint(...size);
    this.decorate();
  }

  paint(width, height) {
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const pen = this.canvas.getContext("2d");
    const nothing = hatch(pen);
    const edge = (start, size, i) => Math.round((start + size * i) * scale);
    const gap = this.w > 7 ? Math.round(scale) : 0;
    this.figure.rows.forEach((values, row) => {
      const [top, end] = [edge(0, this.h, row), edge(0, this.h, row + 1)];
      values.forEach((value, column) => {
        const [left, right] = [edge(LEFT, this.w, column), edge(LEFT, this.w, column + 1)];
        pen.fillStyle = value === null ? nothing : colourOf(this.figure, value);
        pen.fillRect(left, top, right - left - gap, end - top - gap);
      });
    });
  }

  /** Labels, what is marked, and the frames around the cells that are pointed at and chosen. */
  decorate() {
    const { figure, w, h } = this;
    const height = h * figure.rows.length;
    const nodes = [];
    for (let row = 0; row < figure.rows.length; row += every(figure.rows.length, height, 15)) {
      nodes.push(svg("text", { x: LEFT - 6, y: (row + 0.5) * h + 4, "text-anchor": "end" }, String(row)));
    }
    const step = every(this.columns, w * this.columns, 26);
    const round = [1, 2, 4, 8, 16, 32, 64, 128].find((n) => n >= step) ?? step;
    for (let column = 0; column < this.columns; column += round) {
      const x = LEFT + (column + 0.5) * w;
      nodes.push(svg("text", { x, y: height + 14, "text-anchor": "middle" }, String(figure.first + column)));
    }
    nodes.push(svg("text", { x: LEFT + (w * this.columns) / 2, y: height + 31, "text-anchor": "middle" }, figure.across));
    nodes.push(svg("text", { transform: `translate(11 ${height / 2}) rotate(-90)`, "text-anchor": "middle" }, figure.down));
    this.marks = [svg("path", { class: "mark-halo" }), svg("path", { class: "mark" })];
    this.frame = svg("g", { visibility: "hidden" }, svg("rect", { class: "halo" }), svg("rect", { class: "hover" }));
    this.pickedFrame = svg("g", { visibility: "hidden" }, svg("rect", { class: "halo" }), svg("rect", { class: "picked" }));
    this.over.replaceChildren(...nodes, ...this.marks, this.pickedFrame, this.frame);
    this.mark(this.marked);
    if (this.picked) this.pick(...this.picked);
  }

  place(group, row, column) {
    const room = Math.min(this.w, this.h) < 10 ? 3 : 1; // a frame must not hide a small cell
    for (const rect of group.children) {
      rect.setAttribute("x", LEFT + column * this.w - room);
      rect.setAttribute("y", row * this.h - room);
      rect.setAttribute("width", this.w + 2 * room - 1);
      rect.setAttribute("height", this.h + 2 * room - 1);
    }
    group.setAttribute("visibility", "visible");
  }

  hover(row, column) {
    if (this.frame) this.place(this.frame, row, column);
  }

  leave() {
    this.frame?.setAttribute("visibility", "hidden");
  }

  pick(row, column) {
    this.picked = [row, column];
    this.cursor = [row, column];
    if (this.pickedFrame) this.place(this.pickedFrame, row, column);
  }

  /** Crosses where experts are removed, rings where they are tilted: lists of [row, column]. */
  mark(marked) {
    this.marked = marked;
    if (!this.marks) return;
    const r = Math.max(1.5, Math.min(5, 0.28 * Math.min(this.w, this.h)));
    const at = ([row, column]) => [LEFT + (column + 0.5) * this.w - 0.5, (row + 0.5) * this.h - 0.5];
    const lines = marked.removed.map((cell) => {
      const [x, y] = at(cell);
      return `M${x - r} ${y - r}l${2 * r} ${2 * r}m0 ${-2 * r}l${-2 * r} ${2 * r}`;
    });
    const rings = marked.tilted.map((cell) => {
      const [x, y] = at(cell);
      return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`;
    });
    for (const path of this.marks) path.setAttribute("d", lines.concat(rings).join(""));
  }

  cellAt(event) {
    const box = this.over.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / this.h);
    const column = Math.floor((event.clientX - box.left - LEFT) / this.w);
    const isThere = row >= 0 && column >= 0 && column < (this.figure.rows[row]?.length ?? 0);
    return isThere ? [row, column] : null;
  }

  listen() {
    this.over.addEventListener("pointermove", (event) => {
      const cell = this.cellAt(event);
      if (cell) this.on.hover(...cell, event.clientX, event.clientY);
      else this.on.leave();
    });
    this.over.addEventListener("pointerleave", () => this.on.leave());
    this.over.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (cell) this.on.pick(...cell);
    });
    this.plane.addEventListener("keydown", (event) => this.press(event));
    this.plane.addEventListener("blur", () => this.on.leave());
  }

  press(event) {
    const [row, column] = this.cursor ?? [0, 0];
    if (event.key === "Enter" || event.key === " ") this.on.pick(row, column);
    else if (event.key === "Escape") this.on.leave();
    else {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      const within = (value, count) => Math.min(count - 1, Math.max(0, value));
      const to = within(row + step[0], this.figure.rows.length);
      this.cursor = [to, within(column + step[1], this.figure.rows[to].length)];
      const box = this.over.getBoundingClientRect();
      const x = box.left + LEFT + (this.cursor[1] + 0.5) * this.w;
      this.on.hover(...this.cursor, x, box.top + (this.cursor[0] + 0.5) * this.h);
    }
    event.preventDefault();
  }
}

/** A map that stands alone: pointing at a cell says its number. */
function plainHeat(box, figure) {
  const heat = new Heat(box, figure, {
    hover(row, column, x, y) {
      heat.hover(row, column);
      const title = `${figure.down} ${row}, ${figure.across} ${figure.first + column}`;
      showTip(title, [[figure.name, format(figure.spec, figure.rows[row][column])]], x, y);
    },
    leave() { heat.leave(); hideTip(); },
    pick() {},
  });
}
