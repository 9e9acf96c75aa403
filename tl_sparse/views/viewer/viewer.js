"use strict";
// The circuits of one task: drawings side by side, one toolbar, one panel, linked examples.

class Viewer {
  constructor(host, circuits, notes) {
    Object.assign(this, { host, circuits, notes });
    this.articles = [...host.querySelectorAll(".circuit")];
    this.panel = new Panel(host.querySelector(".panel"), (drawing, i) => this.choose(drawing, i, true), notes);
    this.drawings = this.articles.map((article, k) => {
      const drawing = new Drawing(article.querySelector(".drawing"), circuits[k], (i, end) => this.choose(drawing, i, false, end));
      return drawing;
    });
    this.examples = this.articles.map((article, k) => new Examples(article.querySelector(".examples"), circuits[k]));
    host.addEventListener("token", ({ detail: [e, t] }) => this.examples.forEach((examples) => examples.point(e, t)));
    for (const { circuit, marks } of this.drawings) marks.forEach(({ group }, i) => group.classList.toggle("noted", notes.of(circuit, circuit.nodes[i]) !== ""));
    this.toolbar(host.querySelector(".toolbar"));
    this.articles.forEach((article, k) => this.tables(article.querySelector(".tables"), this.drawings[k]));
    this.update();
    const place = () => this.placePanel(this.drawings.find((drawing) => drawing.chosen !== null) || null);
    matchMedia("(min-width: 1101px)").addEventListener("change", place);
    place();
  }

  get shown() {
    return this.drawings.filter((_, k) => !this.articles[k].hidden);
  }

  // ------------------------------------------------------------------------------ the toolbar

  toolbar(bar) {
    this.searchBox(bar);
    const joined = this.circuits.some((circuit) => circuit.edges.length);
    if (joined) this.weightSlider(bar);
    this.filterMenu(bar);
    const whole = make(bar, "label", undefined, "check");
    whole.hidden = !joined;
    this.whole = make(whole, "input");
    this.whole.type = "checkbox";
    this.whole.className = "paths";
    make(whole, "span", "whole paths");
    this.whole.addEventListener("change", () => this.each((drawing) => (drawing.whole = this.whole.checked)));
    const zoom = make(bar, "span", undefined, "zoom");
    for (const [text, title, factor] of [["\u2212", "zoom out", 1 / 1.5], ["+", "zoom in (or ctrl and the wheel)", 1.5], ["fit", "show all", null]]) makeButton(zoom, text, "", () => this.shown.forEach((drawing) => drawing.magnify(factor))).title = title;
    this.exportMenu(bar);
    this.clear = makeButton(bar, "clear", "clear", () => this.choose(null, null));
    if (this.circuits.length > 1) this.chooser(bar);
    this.status = make(bar, "output", "", "shown");
  }

  searchBox(bar) {
    const box = make(bar, "span", undefined, "search");
    const input = make(box, "input");
    input.type = "search";
    input.placeholder = "node, token or note  ( / )";
    input.setAttribute("aria-label", "search nodes, tokens and notes");
    const list = make(box, "ul", undefined, "found");
    list.hidden = true;
    this.search = input;
    let found = [];
    const pick = (entry) => {
      list.hidden = true;
      for (const drawing of this.drawings) drawing.faint = null;
      this.choose(entry[0], entry[1], true);
    };
    input.addEventListener("input", () => {
      const text = input.value.trim().toLowerCase();
      found = text ? this.find(text) : [];
      list.replaceChildren();
      list.hidden = !text;
      if (text && !found.length) make(list, "li", "nothing found", "none");
      for (const entry of found.slice(0, 12)) {
        const [drawing, i, why] = entry;
        const button = makeButton(make(list, "li"), drawing.circuit.nodes[i].name, "", () => pick(entry));
        make(button, "small", this.circuits.length > 1 ? `${drawing.circuit.title} \u00b7 ${why}` : why);
      }
      if (found.length > 12) make(list, "li", `${count(found.length - 12)} more`, "none");
      for (const drawing of this.drawings) {
        const hits = new Set(found.filter((entry) => entry[0] === drawing).map((entry) => entry[1]));
        drawing.faint = text ? drawing.circuit.nodes.map((_, i) => !hits.has(i)) : null;
        drawing.later();
      }
    });
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && found.length) pick(found[0]);
      else if (event.key === "ArrowDown" && list.querySelector("button")) list.querySelector("button").focus();
      else if (event.key === "Escape") {
        input.value = "";
        input.dispatchEvent(new Event("input"));
      } else return;
      event.preventDefault();
      event.stopPropagation();
    });
    list.addEventListener("keydown", (event) => {
      const buttons = [...list.querySelectorAll("button")];
      const at = buttons.indexOf(document.activeElement);
      if (event.key === "ArrowDown") buttons[Math.min(at + 1, buttons.length - 1)].focus();
      else if (event.key === "ArrowUp") (at > 0 ? buttons[at - 1] : input).focus();
      else if (event.key === "Escape") {
        list.hidden = true;
        input.focus();
      } else return;
      event.preventDefault();
      event.stopPropagation();
    });
    document.addEventListener("click", (event) => box.contains(event.target) || (list.hidden = true));
  }

  // Nodes by name first, then by words, by token, by note.
  find(text) {
    const hits = [];
    for (const drawing of this.shown) {
      drawing.circuit.nodes.forEach((node, i) => {
        const names = [node.name, node.id, node.tl, node.hook, ...node.aliases];
        const exact = names.some((name) => name.toLowerCase() === text);
        if (exact || names.some((name) => name.toLowerCase().includes(text))) hits.push([drawing, i, node.what, exact ? 0 : 1]);
        else if (node.what.toLowerCase().includes(text)) hits.push([drawing, i, node.what, 2]);
        else if (this.notes.of(drawing.circuit, node).toLowerCase().includes(text)) hits.push([drawing, i, `note: ${this.notes.of(drawing.circuit, node)}`, 3]);
        else {
          const token = this.tokenHit(drawing.circuit, node, i, text);
          if (token) hits.push([drawing, i, token, 4]);
        }
      });
    }
    return hits.sort((a, b) => a[3] - b[3]);
  }

  tokenHit(circuit, node, i, text) {
    const holds = (words) => words.toLowerCase().includes(text);
    for (const end of circuit.ends) {
      if (end.node !== i) continue;
      const hit = [...end.positive, ...end.negative].find(([words]) => holds(words));
      if (hit) return `${end.side}: ${hit[0]} ${format(hit[1])}`;
    }
    for (const [side, lists] of Object.entries(circuit.tokens[i] || {})) {
      const hit = [...lists.positive, ...lists.negative].find(([words]) => holds(words));
      if (hit) return `${side}: ${hit[0]} ${format(hit[1])}`;
    }
    for (const [name, examples] of circuit.texts[i] || []) {
      const hit = examples.find(([tokens]) => holds(tokens.join("")));
      if (hit) return `${name}: ${hit[0].join("").slice(0, 40)}`;
    }
    return null;
  }

  // One step of the slider hides about the same number of edges wherever it stands.
  weightSlider(bar) {
    const label = make(bar, "label", "hide weak edges ", "weak");
    const slider = make(label, "input");
    slider.type = "range";
    slider.className = "threshold";
    const sizes = this.drawings.flatMap((drawing) => drawing.sizes).sort((a, b) => a - b);
    [slider.min, slider.max, slider.value] = [0, sizes.length, 0];
    slider.disabled = !sizes.length;
    slider.addEventListener("input", () => {
      const at = Number(slider.value);
      const cut = at === 0 ? 0 : at < sizes.length ? sizes[at] : Infinity;
      this.each((drawing) => (drawing.cut = cut));
    });
  }

  filterMenu(bar) {
    const menu = make(bar, "details", undefined, "menu");
    make(menu, "summary", "filter");
    const box = make(menu, "div");
    const nodes = this.circuits.flatMap((circuit) => circuit.nodes);
    const layers = [...new Set(nodes.map((node) => node.layer))].sort((a, b) => a - b);
    const hidden = { layers: new Set(), kinds: new Set() };
    const apply = () =>
      this.each((drawing) => (drawing.hiddenNodes = drawing.circuit.nodes.map((node) => hidden.layers.has(node.layer) || hidden.kinds.has(node.kind))));
    const checks = (title, values, set, words) => {
      make(box, "h6", title);
      for (const value of values) {
        const label = make(box, "label", undefined, "check");
        const input = make(label, "input");
        Object.assign(input, { type: "checkbox", checked: true });
        make(label, "span", words(value));
        input.addEventListener("change", () => {
          if (input.checked) set.delete(value);
          else set.add(value);
          apply();
        });
      }
    };
    if (layers.length > 1) checks("layers", layers, hidden.layers, (layer) => `L${layer}`);
    checks("sites", [...new Set(nodes.map((node) => node.kind))], hidden.kinds, (kind) => kind);
    this.closeOutside(menu);
  }

  exportMenu(bar) {
    const menu = make(bar, "details", undefined, "menu");
    make(menu, "summary", "save");
    const box = make(menu, "div");
    for (const [name, save] of Object.entries(EXPORTS)) {
      makeButton(box, name, "item", () => {
        menu.open = false;
        for (const drawing of this.shown) save(drawing, fileName(this.circuits.length > 1 ? `${drawing.circuit.task}-${drawing.circuit.title}` : drawing.circuit.task), this.notes);
      });
    }
    this.closeOutside(menu);
  }

  closeOutside(menu) {
    document.addEventListener("click", (event) => menu.contains(event.target) || (menu.open = false));
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      menu.open = false;
      menu.querySelector("summary").focus();
      event.stopPropagation();
    });
  }

  chooser(bar) {
    const label = make(bar, "label", "show ");
    const select = make(label, "select");
    select.className = "which";
    make(select, "option", "side by side").value = "all";
    this.circuits.forEach((circuit, k) => (make(select, "option", circuit.title).value = k));
    const apply = () => {
      this.articles.forEach((article, k) => (article.hidden = select.value !== "all" && Number(select.value) !== k));
      this.host.classList.toggle("alone", select.value !== "all");
      this.shown.forEach((drawing) => drawing.measure());
    };
    if (this.circuits.length > 2) select.value = "0";
    select.addEventListener("change", apply);
    apply();
  }

  each(change) {
    for (const drawing of this.drawings) {
      change(drawing);
      drawing.later();
    }
    this.update();
  }

  // How much is shown, and what is not.
  update() {
    const words = this.drawings.map((drawing, k) => {
      const { circuit } = drawing;
      const total = circuit.edges.length;
      const lit = drawing.lit;
      drawing.lit = null;
      const shown = drawing.shown().length;
      drawing.lit = lit;
      const gone = total - shown;
      const nodes = drawing.hiddenNodes.filter(Boolean).length;
      const cut = drawing.cut > 0 && Number.isFinite(drawing.cut) ? ` (|w| \u2265 ${format(drawing.cut)})` : "";
      const parts = total ? [`${count(shown)} of ${plural(total, "edge")} shown${cut}`] : [];
      if (gone && drawing.cut === 0 && !nodes) parts.push(`the weakest ${count(gone)} are hidden: a chosen node shows all of its own`);
      if (nodes) parts.push(`${plural(nodes, "node")} hidden`);
      if (circuit.lone) parts.push(`${plural(circuit.lone, "node")} without edges (dashed)`);
      const text = parts.join(" \u00b7 ");
      this.articles[k].querySelector(".hidden-note").textContent = text;
      if (!total) return plural(circuit.nodes.length, "node");
      return this.circuits.length > 1 ? `${circuit.title}: ${count(shown)} of ${count(total)}` : `${count(shown)} of ${plural(total, "edge")}`;
    });
    this.status.textContent = words.join(" \u00b7 ");
  }

  // ---------------------------------------------------------------------------------- choosing

  choose(drawing, i, move, end) {
    this.clear.disabled = i === null;
    this.drawings.forEach((other, k) => {
      other.hovered = null;
      // The same node in the circuit beside, if it has one.
      const twin = i === null ? null : other === drawing ? i : null;
      other.chosen = twin;
      other.later();
      this.examples[k].show(twin);
    });
    this.panel.show(i === null ? null : drawing, i, end);
    this.placePanel(drawing);
    if (i !== null && move) {
      drawing.reveal(i);
      drawing.focus(i);
    }
    // A page inside an about: frame has no address of its own to change.
    if (location.protocol !== "about:") {
      const number = i === null ? null : drawing.circuit.number;
      history.replaceState(null, "", i === null ? location.pathname + location.search : `#node=${number}:${encodeURIComponent(drawing.circuit.nodes[i].id)}`);
    }
  }

  // Where there is no room at the side, the panel stands below the drawing that it speaks of.
  placePanel(drawing) {
    const { host } = this.panel;
    const narrow = !matchMedia("(min-width: 1101px)").matches;
    const home = this.host.querySelector(".board");
    const article = this.articles[Math.max(this.drawings.indexOf(drawing), 0)];
    if (narrow && host.parentElement !== article) article.querySelector(".hidden-note").after(host);
    else if (!narrow && host.parentElement !== home) home.append(host);
  }

  // ------------------------------------------------------------------------------------ tables

  tables(host, drawing) {
    const { circuit } = drawing;
    const fold = (title, rows, columns, cells) => {
      if (!rows.length) return;
      const details = make(host, "details");
      make(make(details, "summary", `${title} `), "small", plural(rows.length, "row"));
      details.addEventListener("toggle", () => {
        if (!details.open || details.querySelector("table")) return;
        const table = make(make(details, "div", undefined, "scroll"), "table");
        const head = make(make(table, "thead"), "tr");
        for (const [name, numeric] of columns) make(head, "th", name, numeric ? "n" : "").scope = "col";
        const body = make(table, "tbody");
        let at = 0;
        const add = () => {
          for (const row of rows.slice(at, at + 200)) cells(make(body, "tr"), row);
          at += 200;
          more.textContent = `${count(rows.length - at)} more`;
          more.hidden = at >= rows.length;
        };
        const more = makeButton(details, "", "more", () => add());
        add();
      });
    };
    const name = (parent, i) => makeButton(make(parent, "td"), circuit.nodes[i].name, "link", () => this.choose(drawing, i, true));
    const numbers = [...new Set(circuit.nodes.flatMap((node) => node.numbers.map((number) => number[0])))];
    fold("Nodes", circuit.nodes.map((_, i) => i), [["node"], ["what it is"], ["reads", true], ["is read by", true], ...numbers.map((number) => [number, true])], (row, i) => {
      const node = circuit.nodes[i];
      name(row, i);
      make(row, "td", node.what);
      make(row, "td", count(drawing.into[i].length), "n");
      make(row, "td", count(drawing.from[i].length), "n");
      const own = new Map(node.numbers.map((number) => [number[0], number[1]]));
      for (const number of numbers) make(row, "td", format(own.get(number)), "n");
    });
    fold("Edges, the strongest first", [...drawing.order].reverse(), [["from"], ["to"], ["matrix"], ["weight", true]], (row, e) => {
      const [source, target, matrix, weight] = circuit.edges[e];
      name(row, source);
      name(row, target);
      make(row, "td", circuit.matrices[matrix]);
      make(row, "td", format(weight), "n");
    });
  }
}
