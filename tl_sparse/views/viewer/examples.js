"use strict";
// The task's examples: tokens coloured by the chosen node's values, in model and circuit, and where
// its head looks.

class Examples {
  constructor(host, circuit) {
    Object.assign(this, { host, circuit, chosen: null, query: null });
    this.boxes = circuit.examples.map((example, e) => this.box(example, e));
  }

  box(example, e) {
    const box = make(this.host, "div", undefined, "example");
    const rows = {};
    rows.model = this.row(box, example, "model", e);
    rows.circuit = this.row(box, example, "circuit", e);
    rows.attention = this.row(box, example, "attention", e);
    rows.circuit.frame.hidden = rows.attention.frame.hidden = true;
    rows.model.name.hidden = true;
    const odds = make(box, "p", undefined, "odds");
    make(odds, "code", example.correct);
    make(odds, "span", " over ");
    make(odds, "code", example.incorrect);
    for (const [name, p] of [["model", example.p_model], ["circuit", example.p_circuit]]) {
      if (p === null) continue;
      const share = make(odds, "span", `${name} `, "share");
      make(make(share, "span", undefined, "track"), "i").style.width = `${100 * p}%`;
      make(share, "span", ` ${Math.round(100 * p)} %`);
    }
    if (example.bigram.length) {
      const line = make(box, "p", "the bigram table alone adds to the answers, and to its highest ", "bigram");
      for (const [text, weight] of example.bigram) make(line, "code", `${text} ${format(weight)}`).style.background = tint(weight, 0.15);
    }
    return rows;
  }

  row(box, example, name, e) {
    const frame = make(box, "div", undefined, `tokens of-${name}`);
    const label = make(frame, "small", name);
    const tokens = example.tokens.map((token, t) => {
      const span = make(frame, "span", token, "token");
      span.addEventListener("mouseenter", () => this.host.dispatchEvent(new CustomEvent("token", { bubbles: true, detail: [e, t] })));
      if (name === "attention") span.addEventListener("click", () => this.look(e, t));
      make(frame, token.includes("\u21b5") ? "br" : "wbr");
      return span;
    });
    return { frame, name: label, tokens };
  }

  // The same token of the same example, in the circuit beside.
  point(e, t) {
    for (const token of this.host.querySelectorAll(".pointed")) token.classList.remove("pointed");
    const rows = this.boxes[e];
    if (rows) for (const row of Object.values(rows)) if (row.tokens[t]) row.tokens[t].classList.add("pointed");
  }

  show(i) {
    this.chosen = i;
    this.query = null;
    const { circuit } = this;
    const recorded = i === null ? null : circuit.activations[i];
    const alone = i === null ? null : circuit.circuit_activations[i];
    const values = [...(recorded || []), ...(alone || [])].flatMap((row) => row || []);
    const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const scale = this.host.querySelector(".scale");
    if (scale) scale.remove();
    const looks = i !== null && circuit.nodes[i].head !== null && !recorded; // a whole head
    if (i !== null && this.boxes.length && !looks) this.scale(circuit.nodes[i].name, recorded ? largest : null);
    this.boxes.forEach((rows, e) => {
      this.colour(rows.model, recorded && recorded[e], largest);
      this.colour(rows.circuit, alone && alone[e], largest);
      const both = !!(alone && alone[e]);
      rows.circuit.frame.hidden = !both;
      rows.model.name.hidden = !both;
      this.look(e, circuit.examples[e].tokens.length - 1);
    });
  }

  scale(name, largest) {
    const scale = document.createElement("div");
    scale.className = "scale";
    this.host.prepend(scale);
    if (largest === null) {
      make(scale, "span", `no values of ${name} were recorded`);
      return;
    }
    make(scale, "span", format(-largest));
    make(scale, "i");
    make(scale, "span", `${format(largest)} \u00b7 values of ${name}`);
  }

  colour(row, values, largest) {
    row.tokens.forEach((token, t) => {
      const value = values ? values[t] : undefined;
      token.style.background = value === undefined || largest === 0 ? "" : tint(value, (0.8 * Math.abs(value)) / largest);
      if (value === undefined) token.removeAttribute("title");
      else token.title = format(value);
    });
  }

  // Where the chosen node's head looks from token t: darker is more.
  look(e, t) {
    const rows = this.boxes[e];
    const node = this.chosen === null ? null : this.circuit.nodes[this.chosen];
    const name = node === null || node.head === null ? null : `L${node.layer}H${node.head}`;
    const packed = name && this.circuit.attention[name] ? this.circuit.attention[name][e] : null;
    rows.attention.frame.hidden = !packed;
    if (!packed) return;
    const weights = atob(packed); // rows of the lower triangle, a byte a weight
    const start = (t * (t + 1)) / 2;
    rows.attention.name.textContent = `${name} looks from token ${t + 1} (boxed; click another)`;
    rows.attention.tokens.forEach((token, s) => {
      const weight = s <= t ? weights.charCodeAt(start + s) / 255 : 0;
      token.style.background = weight ? `rgba(var(--attention), ${(0.9 * weight).toFixed(3)})` : "";
      token.title = s <= t ? `${Math.round(100 * weight)} %` : "";
      token.classList.toggle("own", s === t);
    });
  }
}
