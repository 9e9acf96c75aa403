"use strict";
// One circuit drawn: edges and lanes on a canvas, nodes and labels as SVG above it, zoomed by d3.
// Zooming moves things apart and leaves marks and letters as large as they are.

const MOST_EDGES = 5000; // beyond, the strongest are drawn; a chosen node always shows all of its own
const SIDE = { left: 104, right: 40, top: 34, bottom: 34 };
const LETTER = 6.4; // pixels, of a label

class Drawing {
  constructor(host, circuit, choose) {
    Object.assign(this, { host, circuit, choose, chosen: null, hovered: null, cut: 0, whole: false });
    this.hiddenNodes = circuit.nodes.map(() => false);
    this.faint = null; // nodes that a search does not match
    this.into = circuit.nodes.map(() => []);
    this.from = circuit.nodes.map(() => []);
    circuit.edges.forEach((edge, e) => {
      this.from[edge[0]].push(e);
      this.into[edge[1]].push(e);
    });
    const size = (e) => Math.abs(circuit.edges[e][3]);
    for (const list of [...this.into, ...this.from]) list.sort((a, b) => size(b) - size(a));
    this.order = circuit.edges.map((_, e) => e).sort((a, b) => size(a) - size(b)); // the weakest first
    this.largest = this.order.length ? size(this.order[this.order.length - 1]) || 1 : 1;
    this.sizes = this.order.map(size);
    this.place = new Map(circuit.nodes.map((node, i) => [node.id, i]));
    this.setUp();
  }

  setUp() {
    const { height } = this.circuit;
    let { rows } = this.circuit;
    this.host.style.height = `${Math.round(Math.min(Math.max(height * 58 + 110, 220), Math.max(innerHeight * 0.74, 430)))}px`;
    this.canvas = make(this.host, "canvas");
    this.svg = makeSvg(this.host, "svg", {
      role: "group",
      "aria-label": `${this.circuit.title}: ${plural(this.circuit.nodes.length, "node")} and ${plural(this.circuit.edges.length, "edge")}`,
    });
    this.boxes = makeSvg(this.svg, "g");
    this.labelled = makeSvg(this.svg, "g", { "aria-hidden": "true" });
    this.layer = makeSvg(this.svg, "g");
    this.tip = make(this.host, "div", undefined, "tip");
    this.tip.hidden = true;
    const heads = [...this.circuit.heads].sort((a, b) => a[1] - b[1]);
    this.headBoxes = heads.map((head) => {
      const group = makeSvg(this.boxes, "g");
      return { head, box: makeSvg(group, "rect", { rx: 5, class: "head" }), name: makeSvg(group, "text", { class: "head-name", "text-anchor": "end" }, head[0]) };
    });
    if (this.circuit.ends.length) rows = [["tokens", null], ...rows, ["logits", null]];
    this.rowNames = rows.map(([label, y]) => ({ y, text: makeSvg(this.labelled, "text", { x: 8, class: "row" }, label) }));
    this.columnNames = this.circuit.columns.map(([label, x]) => ({ x, wide: label.length * LETTER, text: makeSvg(this.labelled, "text", { class: "row", "text-anchor": "middle" }, label) }));
    this.marks = this.circuit.nodes.map((node, i) => this.mark(node, i));
    this.ends = this.circuit.ends.map((end, i) => this.endMark(end, i));
    if (this.marks.length) this.marks[0].group.setAttribute("tabindex", "0");
    if (!this.marks.length) makeSvg(this.svg, "text", { x: 20, y: 40, class: "row" }, "no node was kept");
    this.view = d3.zoomIdentity;
    // The wheel alone scrolls the page; with ctrl, or a pinch, it zooms.
    const meant = (event) => (event.type === "wheel" ? event.ctrlKey || event.metaKey : !event.button);
    this.zoom = d3.zoom().filter(meant).scaleExtent([0.4, 40]).on("zoom", (event) => {
      this.view = event.transform;
      this.later();
    });
    d3.select(this.svg).call(this.zoom).on("dblclick.zoom", null);
    this.svg.addEventListener("click", (event) => event.target === this.svg && this.choose(null));
    this.svg.addEventListener("mousemove", (event) => this.pointAt(event));
    this.svg.addEventListener("mouseleave", () => (this.tip.hidden = true));
    new ResizeObserver(() => this.measure()).observe(this.host);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.later());
    this.measure();
  }

  // Mark and label are one target, without a dead spot between them.
  mark(node, i) {
    const group = makeSvg(this.layer, "g", {
      class: "node", "data-node": node.id, role: "button", tabindex: "-1",
      "aria-label": `${node.name}, ${node.what}`,
    });
    const target = makeSvg(group, "rect", { class: "target", x: -11, y: -11, height: 22 });
    const shape = node.square
      ? makeSvg(group, "rect", { x: -5.5, y: -5.5, width: 11, height: 11, rx: 1.5, class: "dot" })
      : makeSvg(group, "circle", { r: 6.2, class: "dot" });
    shape.style.fill = node.colour;
    if (node.alone) shape.classList.add("alone");
    const label = makeSvg(group, "text", { class: "label", x: 10, y: 4 }, node.label);
    makeSvg(group, "title", {}, `${node.name}\n${node.what}`);
    group.addEventListener("mouseenter", () => this.hover(i));
    group.addEventListener("mouseleave", () => this.hover(null));
    group.addEventListener("click", () => this.choose(this.chosen === i ? null : i));
    group.addEventListener("keydown", (event) => this.key(event, i));
    return { group, target, shape, label, wide: 14 + node.label.length * LETTER };
  }

  endMark(end, i) {
    const above = end.side === "logits";
    const group = makeSvg(this.layer, "g", { class: "end", "data-end": `${end.side}.${end.channel}`, role: "button", tabindex: "-1", "aria-label": `${end.side} of channel ${end.channel}: ${end.words}` });
    const target = makeSvg(group, "rect", { class: "target", y: -10, height: 20, rx: 4 });
    const text = makeSvg(group, "text", { class: "end-words", y: 4, "text-anchor": "middle" }, end.words);
    const dot = makeSvg(group, "circle", { r: 3, class: "end-dot" });
    makeSvg(group, "title", {}, `${above ? "logits that channel" : "tokens whose embedding writes channel"} ${end.channel}${above ? " moves" : ""}: ${end.words}`);
    const choose = () => this.choose(end.node, end);
    group.addEventListener("click", choose);
    group.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      choose();
      event.preventDefault();
    });
    return { group, target, text, dot, wide: 12 + end.words.length * LETTER };
  }

  measure() {
    const box = this.host.getBoundingClientRect();
    if (!box.width) return;
    Object.assign(this, { wide: box.width, tall: box.height });
    const sharp = devicePixelRatio || 1;
    this.canvas.width = Math.round(box.width * sharp);
    this.canvas.height = Math.round(box.height * sharp);
    for (const part of [this.canvas, this.svg]) {
      part.style.width = `${box.width}px`;
      part.style.height = `${box.height}px`;
    }
    const { width, height } = this.circuit;
    const ends = this.circuit.ends.length || this.circuit.columns.length ? 20 : 0;
    const room = Math.max(box.width - SIDE.left - SIDE.right, 60);
    this.unit = Math.min(room / Math.max(width, 1), 110);
    this.start = SIDE.left + (room - this.unit * width) / 2;
    this.step = Math.min((box.height - SIDE.top - SIDE.bottom - 2 * ends) / Math.max(height, 0.5), 130);
    this.base = box.height - SIDE.bottom - ends - Math.max(0, (box.height - SIDE.top - SIDE.bottom - 2 * ends - this.step * height) / 2);
    this.later();
  }

  x(x) {
    return this.view.applyX(this.start + x * this.unit);
  }

  y(y) {
    return this.view.applyY(this.base - y * this.step);
  }

  later() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = null;
      this.draw();
    });
  }

  draw() {
    const begun = performance.now();
    this.lit = this.litSet();
    this.paint();
    this.placeMarks();
    this.host.dataset.drawn = (performance.now() - begun).toFixed(1);
  }

  // What the canvas shows, drawn on any 2D context that is given.
  paint() {
    const context = this.canvas.getContext("2d");
    const sharp = devicePixelRatio || 1;
    context.setTransform(sharp, 0, 0, sharp, 0, 0);
    context.clearRect(0, 0, this.wide, this.tall);
    for (const stroke of this.strokes()) {
      context.strokeStyle = stroke.colour;
      context.globalAlpha = stroke.opacity;
      context.lineWidth = stroke.width;
      context.setLineDash(stroke.dash || []);
      context.beginPath();
      for (const [x0, y0, x1, y1] of stroke.lines) {
        context.moveTo(x0, y0);
        if (x0 === x1) context.lineTo(x1, y1);
        else context.bezierCurveTo(x0, (y0 + y1) / 2, x1, (y0 + y1) / 2, x1, y1);
      }
      context.stroke();
    }
    context.globalAlpha = 1;
  }

  // All lines as few strokes: one a colour and class of width.
  strokes() {
    const found = [];
    const grey = ink("--lane");
    const lanes = (lit) => this.circuit.lanes.filter((lane) => (this.lit ? this.lit.channels.has(lane[0]) : false) === lit);
    const line = (lane) => {
      const x = this.x(lane[1]);
      const below = lane[5] ? 26 : 0;
      const above = lane[6] ? 26 : 0;
      return [x, this.y(lane[2]) + below, x, this.y(lane[6] ? lane[4] : lane[3]) - above];
    };
    found.push({ colour: grey, opacity: this.lit ? 0.25 : 0.55, width: 1, lines: lanes(false).map(line) });
    found.push({ colour: ink("--ink"), opacity: 0.8, width: 1.8, lines: lanes(true).map(line) });
    const shown = this.shown();
    this.visible = shown.length;
    const crowd = shown.length;
    const steps = 5;
    const colours = [`rgb(${ink("--negative")})`, `rgb(${ink("--positive")})`];
    const groups = new Map();
    const { edges, nodes } = this.circuit;
    for (const e of shown) {
      const edge = edges[e];
      const on = this.lit !== null && this.lit.edges.has(e);
      const line = [this.x(nodes[edge[0]].x), this.y(nodes[edge[0]].y), this.x(nodes[edge[1]].x), this.y(nodes[edge[1]].y)];
      if (Math.max(line[0], line[2]) < 0 || Math.min(line[0], line[2]) > this.wide || Math.max(line[1], line[3]) < 0 || Math.min(line[1], line[3]) > this.tall) continue;
      const relative = Math.abs(edge[3]) / this.largest;
      const key = (on ? 100 : 0) + Math.min(Math.floor(relative * steps), steps - 1) * 2 + (edge[3] < 0 ? 0 : 1);
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(line);
    }
    for (const key of [...groups.keys()].sort((a, b) => a - b)) {
      const on = key >= 100;
      const relative = (Math.floor((key % 100) / 2) + 0.5) / steps;
      const thinnest = crowd <= 150 ? 1.1 : crowd <= 1500 ? 0.6 : 0.4;
      const faintest = crowd <= 60 ? 0.7 : crowd <= 600 ? 0.45 : 0.22;
      found.push({
        colour: colours[key % 2],
        opacity: this.lit && !on ? 0.06 : on ? 0.95 : faintest + (0.95 - faintest) * relative,
        width: (on ? 1.4 : thinnest) + 3 * relative,
        lines: groups.get(key),
      });
    }
    return found;
  }

  // Edges that are drawn, the weakest first: those that no filter hides, at most MOST_EDGES, and all
  // of a chosen node.
  shown() {
    const { edges } = this.circuit;
    const kept = (e) => !this.hiddenNodes[edges[e][0]] && !this.hiddenNodes[edges[e][1]];
    const strong = [];
    for (let at = this.order.length - 1; at >= 0 && strong.length < MOST_EDGES && this.sizes[at] >= this.cut; at--) if (kept(this.order[at])) strong.push(this.order[at]);
    strong.reverse();
    if (this.lit === null || this.lit === undefined) return strong;
    const there = new Set(strong);
    return [...strong, ...[...this.lit.edges].filter((e) => !there.has(e))];
  }

  // What belongs to the node that is chosen, or else hovered: edges, nodes, residual channels.
  litSet() {
    const i = this.chosen === null ? this.hovered : this.chosen;
    const { edges, nodes, lanes } = this.circuit;
    if (i === null || !(edges.length || lanes.length)) return null; // nothing that could belong to it
    const before = this.whole ? this.reach(i, false) : new Set([i]);
    const after = this.whole ? this.reach(i, true) : new Set([i]);
    const lit = { edges: new Set(), nodes: new Set([...before, ...after]), channels: new Set() };
    for (const j of before) for (const e of this.into[j]) lit.edges.add(e);
    for (const j of after) for (const e of this.from[j]) lit.edges.add(e);
    for (const e of lit.edges) lit.nodes.add(edges[e][0]).add(edges[e][1]);
    for (const j of [...before, ...after]) if (isResidual(nodes[j])) lit.channels.add(nodes[j].channel);
    if (!this.whole) for (const j of [...this.relatives(i, true), ...this.relatives(i, false)]) lit.nodes.add(j);
    return lit;
  }

  // Nodes joined without an edge: later reads of a written channel, and q and k with v.
  relatives(i, forward) {
    const node = this.circuit.nodes[i];
    const wanted = (other) => {
      if (isResidual(node) && isResidual(other) && other.channel === node.channel) {
        if (forward && node.writes && other.reads) return other.y > node.y;
        if (!forward && node.reads && other.writes) return other.y < node.y;
      }
      if (node.head === null || other.head !== node.head || other.layer !== node.layer) return false;
      const value = (one) => one.site === "attn_v";
      return forward ? !value(node) && value(other) : value(node) && !value(other);
    };
    return this.circuit.nodes.flatMap((other, j) => (j !== i && wanted(other) ? [j] : []));
  }

  reach(start, forward) {
    const seen = new Set([start]);
    const queue = [start];
    while (queue.length) {
      const i = queue.pop();
      const strong = (forward ? this.from[i] : this.into[i]).filter((e) => Math.abs(this.circuit.edges[e][3]) >= this.cut);
      for (const j of [...strong.map((e) => this.circuit.edges[e][forward ? 1 : 0]), ...this.relatives(i, forward)]) {
        if (seen.has(j)) continue;
        seen.add(j);
        queue.push(j);
      }
    }
    return seen;
  }

  placeMarks() {
    const { nodes } = this.circuit;
    for (const row of this.rowNames) {
      const end = row.text.textContent === "logits" ? this.base - this.circuit.height * this.step - 30 : this.base + 30;
      row.at = row.y === null ? this.view.applyY(end) : this.y(row.y);
      row.text.setAttribute("y", row.at + 4);
    }
    const named = new Map(); // a row's height to where its last head's name ends
    for (const { head, box, name } of this.headBoxes) {
      const [left, right, low, high] = [this.x(head[1]), this.x(head[2]), this.y(head[3]) + 13, this.y(head[4]) - 13];
      for (const [key, value] of Object.entries({ x: left, y: high, width: Math.max(right - left, 1), height: Math.max(low - high, 1) })) box.setAttribute(key, value);
      name.setAttribute("x", right - 3);
      name.setAttribute("y", high - 8); // above the nodes' labels
      const begins = right - 3 - head[0].length * 5.2;
      const room = right - left > head[0].length * 5 && begins > (named.get(head[4]) ?? -Infinity);
      name.style.display = room ? "" : "none";
      if (room) named.set(head[4], right + 3);
    }
    const shown = nodes.map((_, i) => !this.hiddenNodes[i]);
    const at = nodes.map((node) => [this.x(node.x), this.y(node.y)]);
    // Of a chosen node's surroundings alone, more labels have room.
    const few = this.lit !== null && this.lit.nodes.size < nodes.length;
    const fits = this.fitting(at, few ? shown.map((one, i) => one && this.lit.nodes.has(i)) : shown);
    const radius = Math.min(6.2, Math.max(3, 0.42 * this.unit * this.view.k));
    this.marks.forEach((mark, i) => {
      const [x, y] = at[i];
      mark.group.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
      mark.group.style.display = shown[i] ? "" : "none";
      mark.label.style.display = fits[i] ? "" : "none";
      const above = fits[i] === "above";
      mark.label.setAttribute("x", above ? 0 : 10);
      mark.label.setAttribute("y", above ? -9 : 4);
      mark.label.setAttribute("text-anchor", above ? "middle" : "start");
      mark.target.setAttribute("width", fits[i] === "beside" ? 11 + mark.wide : 22);
      mark.shape.setAttribute("transform", `scale(${(radius / 6.2).toFixed(2)})`);
      const lit = this.lit && this.lit.nodes.has(i);
      mark.group.classList.toggle("on", !!lit);
      mark.group.classList.toggle("off", (this.lit !== null && !lit) || (this.faint !== null && this.faint[i]));
      mark.group.classList.toggle("chosen", this.chosen === i);
    });
    let free = -Infinity;
    for (const { x, wide, text } of this.columnNames) {
      const at = this.x(x);
      const fits = at - wide / 2 > free;
      text.style.display = fits ? "" : "none";
      text.setAttribute("x", at);
      text.setAttribute("y", this.view.applyY(this.base + 30));
      if (fits) free = at + wide / 2 + 3;
    }
    this.placeEnds();
  }

  placeEnds() {
    const below = this.base + 30;
    const above = this.base - this.circuit.height * this.step - 30;
    const free = { embedding: -Infinity, logits: -Infinity };
    const order = this.circuit.ends.map((end, i) => [this.x(end.x), i]).sort((a, b) => a[0] - b[0]);
    for (const [x, i] of order) {
      const end = this.circuit.ends[i];
      const mark = this.ends[i];
      const y = this.view.applyY(end.side === "logits" ? above : below);
      const fits = x - mark.wide / 2 > free[end.side];
      mark.group.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
      mark.text.style.display = fits ? "" : "none";
      mark.dot.style.display = fits || x < free[end.side] + 4 ? "none" : "";
      mark.target.classList.toggle("bare", !fits);
      mark.target.setAttribute("x", fits ? -mark.wide / 2 : -6);
      mark.target.setAttribute("width", fits ? mark.wide : 12);
      mark.group.classList.toggle("off", this.lit !== null && !this.lit.channels.has(end.channel));
      free[end.side] = Math.max(free[end.side], x + (fits ? mark.wide / 2 + 2 : 5));
    }
  }

  // Which labels have room on the right of their marks, or above them: none covers a mark or a label.
  fitting(at, shown) {
    const taken = new Map(); // squares of the drawing to what lies in them
    const side = 48;
    const squares = ([left, top, right, bottom]) => {
      const found = [];
      for (let column = Math.floor(left / side); column <= Math.floor(right / side); column++)
        for (let row = Math.floor(top / side); row <= Math.floor(bottom / side); row++) found.push(column * 8192 + row);
      return found;
    };
    const take = (box, i) => {
      for (const square of squares(box)) {
        if (!taken.has(square)) taken.set(square, []);
        taken.get(square).push([box, i]);
      }
    };
    const free = (box, i) =>
      squares(box).every((square) => (taken.get(square) || []).every(([other, j]) => j === i || box[2] < other[0] || other[2] < box[0] || box[3] < other[1] || other[3] < box[1]));
    at.forEach(([x, y], i) => shown[i] && take([x - 6, y - 6, x + 6, y + 6], i));
    const order = at.map((_, i) => i).filter((i) => shown[i]).sort((a, b) => at[a][0] - at[b][0]);
    const fits = at.map(() => false);
    for (const i of order) {
      const [x, y] = at[i];
      const half = (this.marks[i].wide - 12) / 2;
      const beside = [x + 7, y - 5, x + this.marks[i].wide, y + 5];
      const above = [x - half, y - 18, x + half, y - 8];
      if (free(beside, i)) fits[i] = "beside";
      else if (free(above, i)) fits[i] = "above";
      if (fits[i]) take(fits[i] === "beside" ? beside : above, i);
    }
    return fits;
  }

  pointAt(event) {
    const [x, y] = [event.offsetX, event.offsetY];
    if (event.target.closest(".node, .end")) {
      this.tip.hidden = true;
      return;
    }
    const { edges, nodes } = this.circuit;
    let best = null;
    let nearest = 25; // five pixels, squared
    for (const e of this.lit ? this.lit.edges : this.shown()) {
      const [a, b] = [nodes[edges[e][0]], nodes[edges[e][1]]];
      const [x0, y0, x1, y1] = [this.x(a.x), this.y(a.y), this.x(b.x), this.y(b.y)];
      if (y < Math.min(y0, y1) - 5 || y > Math.max(y0, y1) + 5 || x < Math.min(x0, x1) - 6 || x > Math.max(x0, x1) + 6) continue;
      for (let t = 0; t <= 1; t += 0.05) {
        const ease = t * t * (3 - 2 * t);
        const rise = 1.5 * t * (1 - t) + t ** 3;
        const away = (x0 + (x1 - x0) * ease - x) ** 2 + (y0 + (y1 - y0) * rise - y) ** 2;
        if (away < nearest) [best, nearest] = [e, away];
      }
    }
    this.tip.hidden = best === null;
    if (best === null) return;
    const edge = edges[best];
    this.tip.textContent = `${nodes[edge[0]].name} \u2192 ${nodes[edge[1]].name}\n${this.circuit.matrices[edge[2]]} ${format(edge[3])}`;
    this.tip.style.left = `${Math.min(x + 12, this.wide - 230)}px`;
    this.tip.style.top = `${y + 14}px`;
  }

  hover(i) {
    this.hovered = i;
    if (this.chosen === null) this.later();
  }

  key(event, i) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Enter" || event.key === " ") this.choose(this.chosen === i ? null : i);
    else if (step) this.focus(this.neighbour(i, step));
    else return;
    event.preventDefault();
  }

  neighbour(i, [dx, dy]) {
    const { nodes } = this.circuit;
    const here = nodes[i];
    const rows = nodes.filter((node, j) => !this.hiddenNodes[j] && (dy < 0 ? node.row > here.row : node.row < here.row)).map((node) => node.row);
    const row = dx ? here.row : dy < 0 ? Math.min(...rows) : Math.max(...rows);
    let best = null;
    let nearest = Infinity;
    nodes.forEach((node, j) => {
      const away = node.x - here.x;
      if (node.row !== row || j === i || this.hiddenNodes[j] || (dx && away * dx <= 0)) return;
      if (Math.abs(away) < nearest) [best, nearest] = [j, Math.abs(away)];
    });
    return best;
  }

  focus(i) {
    if (i === null) return;
    for (const mark of this.marks) mark.group.setAttribute("tabindex", "-1");
    this.marks[i].group.setAttribute("tabindex", "0");
    this.marks[i].group.focus({ preventScroll: true });
  }

  // Bring a node into the middle if it is out of sight.
  reveal(i) {
    const [x, y] = [this.x(this.circuit.nodes[i].x), this.y(this.circuit.nodes[i].y)];
    if (x > 0 && x < this.wide && y > 0 && y < this.tall) return;
    d3.select(this.svg).call(this.zoom.translateTo, this.start + this.circuit.nodes[i].x * this.unit, this.base - this.circuit.nodes[i].y * this.step);
  }

  magnify(factor) {
    if (factor === null) d3.select(this.svg).call(this.zoom.transform, d3.zoomIdentity);
    else d3.select(this.svg).call(this.zoom.scaleBy, factor);
  }
}
