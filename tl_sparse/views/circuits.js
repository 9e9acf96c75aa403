"use strict";
(() => {
  const data = JSON.parse(document.getElementById("tls-data").textContent);
  const LISTED = 8;
  const strong = (a, b) => Math.abs(b[3]) - Math.abs(a[3]);

  // Texts only ever enter the page through textContent.
  const make = (parent, tag, text, className) => {
    const child = document.createElement(tag);
    if (text !== undefined) child.textContent = text;
    if (className) child.className = className;
    return parent.appendChild(child);
  };
  const format = (value) => {
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e4) ? value.toExponential(1) : String(+value.toPrecision(3));
    return text.replace(/-/g, "\u2212");
  };
  const colour = (value, strength) =>
    `rgba(var(${value < 0 ? "--negative" : "--positive"}), ${strength.toFixed(3)})`;

  class View {
    constructor(article, circuit, number) {
      Object.assign(this, circuit, { article, number, pinned: null, cut: 0 });
      this.svg = article.querySelector("svg");
      this.panel = article.querySelector(".panel");
      this.place = new Map(this.nodes.map((node, i) => [node.id, i]));
      this.marks = new Map();
      for (const mark of this.svg.querySelectorAll(".tls-node")) this.marks.set(this.place.get(mark.dataset.node), mark);
      this.into = this.nodes.map(() => []);
      this.from = this.nodes.map(() => []);
      for (const edge of this.edges) {
        this.from[edge[0]].push(edge);
        this.into[edge[1]].push(edge);
      }
      for (const list of [...this.into, ...this.from]) list.sort(strong);
      this.drawn = Array.from(this.svg.querySelectorAll(".tls-edge"), (path) => ({
        path,
        source: this.place.get(path.dataset.source),
        target: this.place.get(path.dataset.target),
        size: Math.abs(Number(path.dataset.weight)),
      })).sort((a, b) => a.size - b.size);
      this.setUpSlider();
      this.setUpNodes();
    }

    setUpSlider() {
      // One step of the slider hides about the same number of edges wherever it stands.
      const slider = this.article.querySelector(".threshold");
      slider.max = this.drawn.length;
      slider.disabled = this.drawn.length === 0;
      slider.addEventListener("input", () => this.hideWeak(Number(slider.value)));
      this.hideWeak(0);
    }

    hideWeak(count) {
      const kept = this.drawn[count];
      this.cut = count === 0 ? 0 : kept ? kept.size : Infinity;
      let visible = 0;
      for (const edge of this.drawn) {
        const off = edge.size < this.cut;
        edge.path.classList.toggle("off", off);
        visible += off ? 0 : 1;
      }
      const total = this.edges.length.toLocaleString("en");
      const what = `${visible.toLocaleString("en")} of ${total} edges shown`;
      this.article.querySelector(".shown").textContent =
        Number.isFinite(this.cut) && this.cut > 0 ? `|w| \u2265 ${format(this.cut)} \u00b7 ${what}` : what;
      if (this.pinned !== null) this.highlight(this.pinned);
    }

    setUpNodes() {
      let first = true;
      for (const [i, mark] of this.marks) {
        mark.setAttribute("role", "button");
        mark.setAttribute("aria-label", this.nodes[i].name);
        mark.setAttribute("tabindex", first ? "0" : "-1");
        first = false;
        mark.addEventListener("mouseenter", () => this.pinned === null && this.show(i));
        mark.addEventListener("mouseleave", () => this.pinned === null && this.show(null));
        mark.addEventListener("click", () => this.pin(this.pinned === i ? null : i));
        mark.addEventListener("keydown", (event) => this.key(event, i));
      }
      this.article.querySelector(".clear").addEventListener("click", () => this.pin(null));
      this.article.querySelector(".paths").addEventListener("change", () => this.pinned !== null && this.highlight(this.pinned));
    }

    key(event, i) {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Enter" || event.key === " ") this.pin(this.pinned === i ? null : i);
      else if (event.key === "Escape") this.pin(null);
      else if (step) this.focus(this.neighbour(i, step), i);
      else return;
      event.preventDefault();
    }

    neighbour(i, [dx, dy]) {
      const at = (mark) => mark.getBoundingClientRect();
      const here = at(this.marks.get(i));
      const rows = this.nodes.map((node) => node.row).filter((row) => (dy < 0 ? row > this.nodes[i].row : row < this.nodes[i].row));
      const row = dx ? this.nodes[i].row : dy < 0 ? Math.min(...rows) : Math.max(...rows);
      let best = null;
      let nearest = Infinity;
      for (const [j, mark] of this.marks) {
        if (this.nodes[j].row !== row || j === i) continue;
        const away = at(mark).left - here.left;
        if (dx && away * dx <= 0) continue;
        if (Math.abs(away) < nearest) [best, nearest] = [j, Math.abs(away)];
      }
      return best;
    }

    focus(i, previous) {
      if (i === null) return;
      if (previous !== undefined) this.marks.get(previous).setAttribute("tabindex", "-1");
      for (const mark of this.marks.values()) if (mark.getAttribute("tabindex") === "0") mark.setAttribute("tabindex", "-1");
      this.marks.get(i).setAttribute("tabindex", "0");
      this.marks.get(i).focus();
    }

    pin(i) {
      this.pinned = i;
      this.article.querySelector(".clear").disabled = i === null;
      this.show(i);
      // A page inside an about: frame has no address of its own to change.
      if (location.protocol !== "about:") {
        const hash = i === null ? " " : `#node=${this.number}:${this.nodes[i].id}`;
        history.replaceState(null, "", i === null ? location.pathname + location.search : hash);
      }
    }

    show(i) {
      this.highlight(i);
      this.describe(i);
      this.colourTokens(i);
    }

    highlight(i) {
      for (const element of this.svg.querySelectorAll(".on, .chosen")) element.classList.remove("on", "chosen");
      this.svg.classList.toggle("has-focus", i !== null);
      if (i === null) return;
      const whole = this.article.querySelector(".paths").checked;
      const before = whole ? this.reach(i, false) : new Set([i]);
      const after = whole ? this.reach(i, true) : new Set([i]);
      for (const edge of this.drawn) {
        if (edge.size < this.cut || !(before.has(edge.target) || after.has(edge.source))) continue;
        edge.path.classList.add("on");
        this.marks.get(edge.source).classList.add("on");
        this.marks.get(edge.target).classList.add("on");
      }
      const lit = new Set([...before, ...after].filter((j) => this.nodes[j].site.match(/_(in|out)$/)).map((j) => String(this.nodes[j].channel)));
      for (const lane of this.svg.querySelectorAll(".tls-lane")) lane.classList.toggle("on", lit.has(lane.dataset.channel));
      for (const j of [...before, ...after]) this.marks.get(j).classList.add("on");
      if (!whole) for (const j of [...this.relatives(i, true), ...this.relatives(i, false)]) this.marks.get(j).classList.add("on");
      this.marks.get(i).classList.add("chosen");
    }

    // Nodes joined without an edge: later reads of a written channel, and q and k with v.
    relatives(i, forward) {
      const node = this.nodes[i];
      const wanted = (other) => {
        if (forward && /_out$/.test(node.site)) return /_in$/.test(other.site) && other.channel === node.channel && other.row > node.row;
        if (!forward && /_in$/.test(node.site)) return /_out$/.test(other.site) && other.channel === node.channel && other.row < node.row;
        if (node.head < 0 || other.head !== node.head || other.layer !== node.layer) return false;
        const isValue = node.site === "attn_v";
        return forward ? !isValue && other.site === "attn_v" : isValue && other.site !== "attn_v";
      };
      return this.nodes.flatMap((other, j) => (wanted(other) ? [j] : []));
    }

    reach(start, forward) {
      const seen = new Set([start]);
      const queue = [start];
      while (queue.length) {
        const i = queue.pop();
        const list = forward ? this.from[i] : this.into[i];
        const next = list.filter((edge) => Math.abs(edge[3]) >= this.cut).map((edge) => edge[forward ? 1 : 0]);
        for (const j of [...next, ...this.relatives(i, forward)]) {
          if (!seen.has(j)) {
            seen.add(j);
            queue.push(j);
          }
        }
      }
      return seen;
    }

    describe(i) {
      this.panel.replaceChildren();
      if (i === null) {
        this.panel.textContent = data.hint;
        return;
      }
      const node = this.nodes[i];
      make(this.panel, "h4", node.name);
      make(this.panel, "p", node.facts);
      make(this.panel, "p", node.hook);
      this.links("written before by", /_in$/.test(node.site) ? this.relatives(i, false) : []);
      this.links("read later by", /_out$/.test(node.site) ? this.relatives(i, true) : []);
      this.links(node.site === "attn_v" ? "moved by the pattern of" : "pattern moves", node.head >= 0 ? [...this.relatives(i, true), ...this.relatives(i, false)] : []);
      const sizes = [...this.into[i], ...this.from[i]].map((edge) => Math.abs(edge[3]));
      const largest = sizes.reduce((most, size) => Math.max(most, size), 0) || 1;
      this.list("incoming", this.into[i], 0, largest);
      this.list("outgoing", this.from[i], 1, largest);
    }

    links(title, others) {
      if (!others.length) return;
      const line = make(this.panel, "p", `${title} `);
      for (const j of others) {
        const node = this.nodes[j];
        this.button(line, j, "link").textContent = node.head >= 0 ? node.label : `L${node.layer} ${node.site.replace("_", " ")}`;
      }
    }

    button(parent, i, className) {
      const button = make(parent, "button", undefined, className);
      button.type = "button";
      button.title = this.nodes[i].name;
      button.addEventListener("click", () => {
        this.pin(i);
        this.focus(i);
      });
      return button;
    }

    list(title, edges, end, largest) {
      make(this.panel, "h5", `${title} (${edges.length.toLocaleString("en")})`);
      const list = make(this.panel, "ul");
      const add = (from, to) => {
        for (const edge of edges.slice(from, to)) {
          const button = this.button(make(list, "li"), edge[end], "edge");
          make(button, "span", format(edge[3]), "weight");
          const bar = make(make(button, "span", undefined, "track"), "i");
          bar.style.width = `${(100 * Math.abs(edge[3])) / largest}%`;
          bar.style.background = colour(edge[3], 0.9);
          // Of an edge that stays in its layer, the layer goes without saying.
          const stays = this.nodes[edge[0]].layer === this.nodes[edge[1]].layer;
          const name = this.nodes[edge[end]].name;
          make(button, "span", `${stays ? name.slice(name.indexOf("\u00b7") + 2) : name} \u00b7 ${edge[2]}`, "name");
        }
      };
      add(0, LISTED);
      if (edges.length <= LISTED) return;
      const more = make(this.panel, "button", `${(edges.length - LISTED).toLocaleString("en")} more`, "more");
      more.type = "button";
      more.addEventListener("click", () => {
        add(LISTED, edges.length);
        more.remove();
      });
    }

    colourTokens(i) {
      const scale = this.article.querySelector(".scale");
      if (!scale) return;
      const recorded = i === null ? undefined : this.activations[i];
      const values = (recorded || []).flatMap((row) => row || []);
      const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
      this.article.querySelectorAll(".example").forEach((example, e) => {
        example.querySelectorAll(".token").forEach((token, t) => {
          const value = recorded && recorded[e] ? recorded[e][t] : undefined;
          token.style.background = value === undefined || largest === 0 ? "" : colour(value, (0.8 * Math.abs(value)) / largest);
          if (value === undefined) token.removeAttribute("title");
          else token.title = format(value);
        });
      });
      scale.hidden = i === null;
      scale.replaceChildren();
      if (i === null) return;
      if (!recorded) {
        make(scale, "span", "no activations recorded for this node");
        return;
      }
      make(scale, "span", format(-largest));
      make(scale, "i");
      make(scale, "span", `${format(largest)} \u00b7 ${this.nodes[i].name}`);
    }
  }

  const views = Array.from(document.querySelectorAll(".circuit"), (article) => {
    const number = Number(article.dataset.circuit);
    return new View(article, data.circuits[number], number);
  });

  const followHash = () => {
    const match = /^#node=(?:(\d+):)?(.+)$/.exec(decodeURIComponent(location.hash));
    if (!match) return;
    const candidates = match[1] === undefined ? views : views.filter((view) => view.number === Number(match[1]));
    const view = candidates.find((candidate) => candidate.place.has(match[2]));
    if (view) {
      view.pin(view.place.get(match[2]));
      view.article.scrollIntoView();
    } else if (views.length) views[0].panel.textContent = `No circuit of this page has a node ${match[2]}.`;
  };
  addEventListener("hashchange", followHash);
  followHash();
})();
