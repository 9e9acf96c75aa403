"use strict";
// The picture as SVG and PNG, the tables as CSV, JSON and Neuronpedia's lines.

// A file of its own: shapes with their colours written out, no style sheet.
const pictureOf = (drawing) => {
  const svg = document.createElementNS(SVG, "svg");
  const { wide, tall, circuit } = drawing;
  for (const [name, value] of Object.entries({ xmlns: SVG, viewBox: `0 0 ${wide} ${tall}`, width: wide, height: tall, "font-family": "system-ui, sans-serif", "font-size": 11 })) svg.setAttribute(name, value);
  const [paper, dark, soft] = ["--paper", "--ink", "--soft"].map(ink);
  makeSvg(svg, "rect", { width: wide, height: tall, fill: paper });
  for (const stroke of drawing.strokes()) {
    const path = stroke.lines.map(([x0, y0, x1, y1]) => {
      const [a, b, c, d] = [x0, y0, x1, y1].map((v) => v.toFixed(1));
      const middle = ((y0 + y1) / 2).toFixed(1);
      return x0 === x1 ? `M${a} ${b}V${d}` : `M${a} ${b}C${a} ${middle} ${c} ${middle} ${c} ${d}`;
    });
    if (path.length) makeSvg(svg, "path", { d: path.join(""), fill: "none", stroke: stroke.colour, "stroke-width": stroke.width.toFixed(2), "stroke-opacity": stroke.opacity.toFixed(2) });
  }
  for (const { at, text } of drawing.rowNames) makeSvg(svg, "text", { x: 8, y: at + 4, fill: soft }, text.textContent);
  for (const { box, name } of drawing.headBoxes) {
    const at = Object.fromEntries(["x", "y", "width", "height"].map((key) => [key, box.getAttribute(key)]));
    makeSvg(svg, "rect", { ...at, rx: 5, fill: "none", stroke: soft, "stroke-opacity": 0.6 });
    if (name.style.display !== "none") makeSvg(svg, "text", { x: name.getAttribute("x"), y: name.getAttribute("y"), fill: soft, "text-anchor": "end", "font-size": 10 }, name.textContent);
  }
  drawing.marks.forEach(({ group, label }, i) => {
    const node = circuit.nodes[i];
    if (group.style.display === "none") return;
    const place = makeSvg(svg, "g", { transform: group.getAttribute("transform"), opacity: group.classList.contains("off") ? 0.25 : 1 });
    const paint = { fill: node.colour, stroke: drawing.chosen === i ? dark : paper, "stroke-width": 1.5 };
    makeSvg(place, node.square ? "rect" : "circle", node.square ? { x: -5.5, y: -5.5, width: 11, height: 11, rx: 1.5, ...paint } : { r: 6.2, ...paint });
    if (label.style.display !== "none") makeSvg(place, "text", { x: label.getAttribute("x"), y: label.getAttribute("y"), "text-anchor": label.getAttribute("text-anchor"), fill: dark }, node.label);
  });
  drawing.ends.forEach(({ group, text }) => {
    if (text.style.display !== "none") makeSvg(makeSvg(svg, "g", { transform: group.getAttribute("transform") }), "text", { y: 4, fill: dark, "text-anchor": "middle" }, text.textContent);
  });
  return new XMLSerializer().serializeToString(svg);
};

const savePng = (drawing, name) => {
  const image = new Image();
  image.addEventListener("load", () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [2 * drawing.wide, 2 * drawing.tall];
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => download(`${name}.png`, blob));
  });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(pictureOf(drawing))}`;
};

// A cell that no spreadsheet takes for a formula.
const csvCell = (value) => {
  let text = value === null || value === undefined ? "" : String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
};
const csv = (columns, rows) => `${[columns, ...rows].map((row) => row.map(csvCell).join(",")).join("\n")}\n`;

const nodeRows = (circuit, notes) =>
  circuit.nodes.map((node) => ({
    name: node.name, ours: node.id, hook: node.hook, layer: node.layer, site: node.site, channel: node.channel, head: node.head,
    ...Object.fromEntries(node.numbers.map(([name, value]) => [name, value])), note: notes.of(circuit, node),
  }));
const edgeRows = (circuit) =>
  circuit.edges.map(([source, target, matrix, weight]) => ({
    source: circuit.nodes[source].name, target: circuit.nodes[target].name, matrix: circuit.matrices[matrix], weight,
  }));
const tableCsv = (rows) => {
  const columns = [...new Set(rows.flatMap(Object.keys))];
  return csv(columns, rows.map((row) => columns.map((column) => row[column])));
};

// Lines of Neuronpedia's table Neuron and of its connections, as export_neuronpedia writes them.
const neuronpedia = (circuit, name) => {
  const set = (node) => (node.site === "mlp_neuron" ? "mlp" : node.site);
  const layer = (node) => `${node.layer}-${set(node)}`;
  const model = name.toLowerCase().replace(/[^a-z0-9._-]/g, "-");
  const lines = circuit.nodes.map((node) => ({ modelId: model, layer: layer(node), index: String(node.channel), sourceSetName: set(node), hookName: node.hook, vectorLabel: node.name }));
  const end = (node) => ({ layer: layer(node), index: String(node.channel), name: node.name, ours: node.id });
  const links = circuit.edges.map(([source, target, matrix, weight]) => ({ modelId: model, source: end(circuit.nodes[source]), target: end(circuit.nodes[target]), matrix: circuit.matrices[matrix], weight }));
  return `${[...lines, ...links].map((line) => JSON.stringify(line)).join("\n")}\n`;
};

const EXPORTS = {
  "picture (SVG)": (drawing, name) => download(`${name}.svg`, pictureOf(drawing), "image/svg+xml"),
  "picture (PNG)": savePng,
  "nodes (CSV)": (drawing, name, notes) => download(`${name}-nodes.csv`, tableCsv(nodeRows(drawing.circuit, notes)), "text/csv"),
  "edges (CSV)": (drawing, name) => download(`${name}-edges.csv`, tableCsv(edgeRows(drawing.circuit)), "text/csv"),
  "nodes and edges (JSON)": (drawing, name, notes) => download(`${name}.json`, JSON.stringify({ nodes: nodeRows(drawing.circuit, notes), edges: edgeRows(drawing.circuit) }, null, 1), "application/json"),
  "Neuronpedia (JSON lines)": (drawing, name) => download(`${name}-neuronpedia.jsonl`, neuronpedia(drawing.circuit, name), "application/jsonl"),
  "notes (JSON)": (drawing, name, notes) => download(`${name}-notes.json`, JSON.stringify(notes.all(drawing.circuit), null, 1), "application/json"),
};
