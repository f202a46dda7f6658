// Small charts on canvas: a line with its newest point, and stacked bars of the last steps.

import { contextOf } from "./dom.js";

/** A line over `values`, from 0 to their maximum (or `top`), newest at the right edge. */
export function drawLine(canvas, values, theme, { room = 80, top = 0 } = {}) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const context = contextOf(canvas, width, height);
  context.fillStyle = theme.line;
  context.fillRect(0, height - 1, width, 1);
  if (!values.length) return;
  const most = Math.max(top, ...values) || 1;
  const x = (index) => width - 4 - ((values.length - 1 - index) * (width - 8)) / (room - 1);
  const y = (value) => height - 3 - (value / most) * (height - 7);
  context.beginPath();
  values.forEach((value, index) => context.lineTo(x(index), y(value)));
  context.strokeStyle = theme.accent;
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(x(values.length - 1), height - 1);
  context.lineTo(x(0), height - 1);
  context.globalAlpha = 0.12;
  context.fillStyle = theme.accent;
  context.fill();
  context.globalAlpha = 1;
  context.beginPath();
  context.arc(x(values.length - 1), y(values.at(-1)), 2.5, 0, 7);
  context.fill();
}

/** One bar a step, prefill on top of decode; returns what the full height stands for. */
export function drawSteps(canvas, steps, theme) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const context = contextOf(canvas, width, height);
  context.fillStyle = theme.line;
  context.fillRect(0, height - 1, width, 1);
  const bar = 4;
  const shown = steps.slice(-Math.floor(width / bar));
  const most = Math.max(8, ...shown.map(({ prefill, decode }) => prefill + decode));
  shown.forEach(({ prefill, decode }, index) => {
    const x = width - (shown.length - index) * bar;
    const low = decode ? Math.max(1.5, (decode / most) * (height - 2)) : 0;
    const high = prefill ? Math.max(1.5, (prefill / most) * (height - 2)) : 0;
    context.fillStyle = theme.decode;
    context.fillRect(x, height - 1 - low, bar - 1, low);
    context.fillStyle = theme.prefill;
    context.fillRect(x, height - 1 - low - high, bar - 1, high);
  });
  return most;
}

/** The page's colors, as the style sheet has them for light or dark. */
export function readTheme(element) {
  const style = getComputedStyle(element);
  const names = ["ink", "muted", "line", "panel", "accent", "prefill", "decode", "block-free", "block-edge"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}
