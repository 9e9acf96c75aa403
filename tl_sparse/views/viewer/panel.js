"use strict";
// What is known of the chosen node: names, numbers, a note, tokens, edges, texts.

const LISTED = 8;
const HINT = "Choose a node: click it, search for it, or walk there with the arrow keys. Hover to see its edges.";

class Panel {
  constructor(host, choose, notes) {
    Object.assign(this, { host, choose, notes });
    this.show(null);
  }

  show(drawing, i, end) {
    this.host.replaceChildren();
    if (drawing === null || i === null) {
      make(this.host, "p", HINT, "hint");
      return;
    }
    const node = drawing.circuit.nodes[i];
    Object.assign(this, { drawing, i });
    const head = make(this.host, "div", undefined, "node-head");
    const dot = make(head, "i", undefined, node.square ? "key square" : "key");
    dot.style.background = node.colour;
    make(head, "h4", node.name);
    makeButton(head, "copy code", "copy", (event) => this.copy(node.code, event.currentTarget));
    make(this.host, "p", node.what, "what");
    this.facts(node);
    if (node.standing) make(this.host, "p", node.standing, "standing");
    this.note(node);
    this.tokens(node, end);
    this.links(node);
    if (drawing.circuit.edges.length) this.bothEdges();
    this.texts(node);
  }

  bothEdges() {
    const { drawing, i } = this;
    const own = [...drawing.into[i], ...drawing.from[i]].map((e) => Math.abs(drawing.circuit.edges[e][3]));
    const largest = own.reduce((most, size) => Math.max(most, size), 0) || 1;
    this.edges("reads from", drawing.into[i], 0, largest);
    this.edges("is read by", drawing.from[i], 1, largest);
  }

  facts(node) {
    const list = make(this.host, "dl", undefined, "node-facts");
    const add = (name, value, title, wide) => {
      if (value === null || value === undefined || value === "") return;
      const pair = make(list, "div", undefined, wide || "");
      if (title) pair.title = title;
      make(pair, "dt", name);
      make(pair, "dd", value);
    };
    add("TransformerLens", node.tl, "", "wide code");
    add("also called", node.aliases.join(", "), "", "wide");
    for (const [name, value, title] of node.numbers) add(name, format(value), title);
  }

  copy(text, button) {
    const done = (words) => {
      button.textContent = words;
      setTimeout(() => (button.textContent = "copy code"), 1600);
    };
    const byHand = () => {
      const area = make(document.body, "textarea");
      area.value = text;
      area.select();
      const copied = document.execCommand("copy");
      area.remove();
      done(copied ? "copied" : text);
    };
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(() => done("copied"), byHand);
    else byHand();
  }

  note(node) {
    const box = make(this.host, "div", undefined, "note");
    const label = make(box, "label", "note ");
    const area = make(label, "textarea");
    area.rows = 2;
    area.placeholder = "What does this node do?";
    area.value = this.notes.of(this.drawing.circuit, node);
    area.addEventListener("input", () => this.notes.set(this.drawing, this.i, area.value));
    make(box, "small", this.drawing.circuit.graph ? "Kept in this browser; save \u25be notes writes a file." : this.notes.where);
  }

  tokens(node, end) {
    const ends = this.drawing.circuit.ends.filter((one) => isResidual(node) && one.channel === node.channel);
    const tokens = this.drawing.circuit.tokens[this.i] || {};
    const titles = { embedding: "tokens whose embedding writes it", logits: "logits that it moves" };
    for (const side of ["embedding", "logits"]) {
      const from = ends.find((one) => one.side === side);
      const lists = tokens[side] || (from && (node.writes ? side === "logits" : side === "embedding") ? from : null);
      if (!lists) continue;
      const box = make(this.host, "div", undefined, end && end.side === side ? "tokens-of on" : "tokens-of");
      make(box, "h5", titles[side]);
      for (const sign of ["positive", "negative"]) {
        if (!lists[sign].length) continue;
        const row = make(box, "p");
        make(row, "b", sign === "positive" ? "+" : "\u2212");
        for (const [text, weight] of lists[sign]) {
          const chip = make(row, "code", text);
          chip.title = format(weight);
          chip.style.background = tint(weight, (0.45 * Math.abs(weight)) / (lists.largest || 1));
        }
      }
      if (lists.note) make(box, "small", lists.note);
    }
  }

  links(node) {
    const { drawing, i } = this;
    const add = (title, others) => {
      if (!others.length) return;
      const line = make(this.host, "p", `${title} `, "links");
      for (const j of others) this.nodeButton(line, j, "link").textContent = drawing.circuit.nodes[j].name;
    };
    if (node.reads && !node.writes) add("written before by", drawing.relatives(i, false));
    if (node.writes) add("read later by", drawing.relatives(i, true));
    if (node.head !== null) add(node.site === "attn_v" ? "moved by the pattern of" : "the pattern moves", [...drawing.relatives(i, true), ...drawing.relatives(i, false)]);
  }

  nodeButton(parent, j, className) {
    const button = makeButton(parent, undefined, className, () => this.choose(this.drawing, j));
    button.title = this.drawing.circuit.nodes[j].what;
    return button;
  }

  edges(title, edges, end, largest) {
    make(this.host, "h5", `${title} (${count(edges.length)})`);
    if (!edges.length) return;
    const list = make(this.host, "ul", undefined, "edges");
    const { circuit } = this.drawing;
    const add = (part) => {
      for (const e of part) {
        const edge = circuit.edges[e];
        const button = this.nodeButton(make(list, "li"), edge[end], "edge");
        make(button, "span", format(edge[3]), "weight");
        const bar = make(make(button, "span", undefined, "track"), "i");
        bar.style.width = `${(100 * Math.abs(edge[3])) / largest}%`;
        bar.style.background = tint(edge[3], 0.9);
        make(button, "span", circuit.nodes[edge[end]].name, "name");
        make(button, "span", circuit.matrices[edge[2]], "matrix");
      }
    };
    add(edges.slice(0, LISTED));
    if (edges.length <= LISTED) return;
    const more = makeButton(this.host, `${count(edges.length - LISTED)} more`, "more", () => {
      add(edges.slice(LISTED));
      more.remove();
    });
  }

  texts(node) {
    const lists = this.drawing.circuit.texts[this.i];
    if (!lists) return;
    make(this.host, "h5", "where it is largest and smallest in ordinary text");
    // Where a node is zero is no example of it: of one that is never below zero there is no bottom.
    const active = lists.map(([name, examples]) => [name, examples.filter(([, values, own]) => values[own])]);
    if (active.every(([, examples]) => !examples.length)) make(this.host, "p", "It is zero everywhere in the text that was searched.", "hint");
    let largest = 0;
    for (const [, examples] of lists) for (const [, values] of examples) for (const value of values) largest = Math.max(largest, Math.abs(value || 0));
    for (const [name, examples] of active) {
      if (!examples.length) continue;
      make(this.host, "h6", name);
      for (const [tokens, values, own, note] of examples) {
        const line = make(this.host, "p", undefined, "text-example");
        line.title = note;
        tokens.forEach((token, t) => {
          const span = make(line, "span", token, t === own ? "token own" : "token");
          if (values[t]) span.style.background = tint(values[t], (0.8 * Math.abs(values[t])) / (largest || 1));
          span.title = format(values[t]);
        });
      }
    }
  }
}

// Notes of nodes: those stored with the circuit, and what is written here on top of them.
class Notes {
  constructor(circuits) {
    this.own = new Map();
    this.kept = true;
    for (const circuit of circuits) this.own.set(circuit.key, this.read(circuit.key));
    this.where = this.kept
      ? "Kept in this browser. To keep it with the circuit: save \u25be notes, then circuit.with_notes(file)."
      : "Nothing is kept here: save \u25be notes, then circuit.with_notes(file).";
  }

  read(key) {
    try {
      const found = JSON.parse(localStorage.getItem(`tls-notes:${key}`) || "{}");
      return Object.fromEntries(Object.entries(found || {}).filter(([, text]) => typeof text === "string"));
    } catch {
      this.kept = false; // a frame without an address, or storage is switched off
      return {};
    }
  }

  of(circuit, node) {
    const own = this.own.get(circuit.key)[node.name];
    return own === undefined ? node.note : own;
  }

  set(drawing, i, text) {
    const { circuit, marks } = drawing;
    const notes = this.own.get(circuit.key);
    notes[circuit.nodes[i].name] = text;
    marks[i].group.classList.toggle("noted", text !== "");
    try {
      localStorage.setItem(`tls-notes:${circuit.key}`, JSON.stringify(notes));
    } catch {
      this.kept = false;
    }
  }

  all(circuit) {
    return Object.fromEntries(circuit.nodes.map((node) => [node.name, this.of(circuit, node)]).filter(([, text]) => text));
  }
}
