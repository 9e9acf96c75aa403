"use strict";
// What all parts of the viewer share: making elements, writing numbers, colours.

// Texts only ever enter the page through textContent.
const make = (parent, tag, text, className) => {
  const child = document.createElement(tag);
  if (text !== undefined) child.textContent = text;
  if (className) child.className = className;
  return parent.appendChild(child);
};

const makeButton = (parent, text, className, action) => {
  const button = make(parent, "button", text, className);
  button.type = "button";
  button.addEventListener("click", action);
  return button;
};

const SVG = "http://www.w3.org/2000/svg";
const makeSvg = (parent, tag, attributes, text) => {
  const child = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) child.setAttribute(name, value);
  if (text !== undefined) child.textContent = text;
  return parent.appendChild(child);
};

// Three digits, a true minus sign.
const format = (value) => {
  if (value === null || value === undefined) return "\u2013";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(+value.toPrecision(3));
  return text.replace(/-/g, "\u2212");
};
const count = (number) => number.toLocaleString("en");
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

const tint = (value, strength) =>
  `rgba(var(${value < 0 ? "--negative" : "--positive"}), ${Math.min(strength, 1).toFixed(3)})`;

// A colour of the style sheet, for canvas and pictures, which know no variables.
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const isResidual = (node) => node.reads || node.writes;

const download = (name, content, type) => {
  const link = document.createElement("a");
  const url = content instanceof Blob ? URL.createObjectURL(content) : URL.createObjectURL(new Blob([content], { type }));
  link.href = url;
  link.download = name;
  document.body.appendChild(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
};

const fileName = (text) => text.replace(/[^\w.-]+/g, "_").slice(0, 80) || "circuit";
