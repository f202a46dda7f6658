// The KV cache as squares, one a block: color says whose, height how full, stripes that several hold it.
//
// A small pool is drawn whole. Of a large one only rows in use are drawn, and a row stays where it is until its place is
// needed: ids wander upwards, because a freed block with a known content is reused last.

import { contextOf } from "./dom.js";

const SIZES = [32, 28, 24, 20, 17, 14, 12, 10, 8, 7, 6, 5, 4, 3];
const LARGEST = 36;
const LARGEST_OF_MANY = 20;
const SMALLEST_LEGIBLE = 10; // a whole pool is drawn as long as its squares are this large
const MAX_HEIGHT = 228;
export const FLASH_MS = 900;

export class BlockGrid {
  /** `inspect(block or null)` is called when the pointer or the keyboard points at another block. */
  constructor(canvas, names, inspect) {
    Object.assign(this, { canvas, names, inspect, pointed: null, highlight: null });
    this.isCalm = matchMedia("(prefers-reduced-motion: reduce)");
    canvas.addEventListener("pointermove", (event) => this.point(this.blockAt(event.offsetX, event.offsetY)));
    canvas.addEventListener("pointerdown", (event) => this.point(this.blockAt(event.offsetX, event.offsetY)));
    canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.point(null));
    canvas.addEventListener("blur", () => this.point(null));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    this.reset();
  }

  reset() {
    this.layout = null;
    this.flashes = new Map(); // block -> when its preemption was seen
    this.point(null);
  }

  /** Lay the pool out for the width at hand; anew only if the width or the pool changes. */
  arrange(width, height, numBlocks) {
    if (this.layout && this.layout.width === width && this.layout.numBlocks === numBlocks) return;
    const whole = SIZES.find((size) => size >= SMALLEST_LEGIBLE && capacity(width, height, size) >= numBlocks);
    this.shape(width, height, numBlocks, whole ?? SIZES.find((size) => size <= LARGEST_OF_MANY), whole !== undefined);
  }

  shape(width, height, numBlocks, size, isWhole) {
    const columns = columnsOf(width, size);
    const numRows = Math.ceil(numBlocks / columns);
    const maxRows = Math.min(numRows, Math.floor(height / size));
    const rows = Array.from({ length: isWhole ? numRows : maxRows }, (_, row) => row);
    const gutter = gutterOf(width);
    size = Math.min(Math.floor((width - gutter) / columns), Math.floor(height / rows.length), LARGEST); // use what is left over
    this.layout = { width, height, gutter, numBlocks, size, columns, maxRows, isWhole, rows, used: new Map(), tick: 0 };
  }

  /** Bring every row with a block in use on stage, in place of the row that has been idle longest. */
  follow(owners) {
    const layout = this.layout;
    if (layout.isWhole) return;
    const inUse = new Set();
    for (const block of owners.keys()) inUse.add(Math.floor((block - 1) / layout.columns));
    if (inUse.size > layout.maxRows) return this.shrink(owners);
    layout.tick += 1;
    for (const row of inUse) layout.used.set(row, layout.tick);
    const missing = [...inUse].filter((row) => !layout.rows.includes(row));
    if (!missing.length) return;
    const idle = layout.rows.filter((row) => !inUse.has(row));
    // first those never used, from the bottom: they say nothing; then the longest idle
    idle.sort((a, b) => (layout.used.get(a) ?? 0) - (layout.used.get(b) ?? 0) || b - a);
    const gone = new Set(idle.slice(0, missing.length));
    layout.rows = layout.rows.filter((row) => !gone.has(row)).concat(missing).sort((a, b) => a - b);
  }

  shrink(owners) {
    const { width, height, numBlocks, size } = this.layout;
    const smaller = SIZES.find((other) => other < size);
    if (smaller === undefined) return; // what does not fit is counted below the grid
    this.shape(width, height, numBlocks, smaller, false);
    this.follow(owners);
  }

  /** Draw the state; returns how many blocks are shown, and how many in use are not. */
  draw(state, theme, now) {
    this.arrange(this.canvas.clientWidth, MAX_HEIGHT, state.numBlocks);
    const owners = state.blockOwners();
    this.follow(owners);
    this.owners = owners;
    const { width, size, columns, rows, gutter } = this.layout;
    this.canvas.style.height = `${rows.length * size}px`;
    const context = contextOf(this.canvas, width, rows.length * size);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    let [numShown, numUsedShown] = [0, 0];
    rows.forEach((row, line) => {
      context.globalAlpha = 1;
      context.fillStyle = theme.muted;
      context.textAlign = "right";
      if (size >= 10 || line % Math.ceil(14 / size) === 0) context.fillText(row * columns + 1, gutter - 8, (line + 0.5) * size);
      const last = Math.min((row + 1) * columns, state.numBlocks);
      for (let block = row * columns + 1; block <= last; block++) {
        const x = gutter + ((block - 1) % columns) * size;
        this.drawBlock(context, state, theme, block, x, line * size, now);
        numShown += 1;
        numUsedShown += owners.has(block) ? 1 : 0;
      }
    });
    return { numShown, numHidden: owners.size - numUsedShown };
  }

  drawBlock(context, state, theme, block, x, y, now) {
    const { size } = this.layout;
    const gap = size >= 14 ? 3 : size >= 8 ? 2 : size >= 5 ? 1 : 0;
    const side = size - gap;
    const held = this.owners.get(block);
    const isDim = this.highlight !== null && !held?.some(({ name }) => name === this.highlight);
    context.globalAlpha = isDim && held ? 0.3 : 1;
    context.fillStyle = theme["block-free"];
    square(context, x, y, side);
    if (held) this.drawHeld(context, state, theme, held, x, y, side);
    else if (state.cached.has(block)) drawRemembered(context, theme, x, y, side);
    this.drawMarks(context, theme, block, x, y, side, now);
  }

  drawHeld(context, state, theme, held, x, y, side) {
    const alpha = context.globalAlpha;
    const fill = Math.max(...held.map((owner) => state.fillOf(owner))) / state.header.block_size;
    const [color, ink] = this.names.color(held[0].name);
    context.fillStyle = color;
    context.globalAlpha = alpha * 0.28;
    square(context, x, y, side);
    context.globalAlpha = alpha;
    context.save();
    context.beginPath();
    context.rect(x, y + side * (1 - fill), side, side * fill);
    context.clip();
    square(context, x, y, side);
    if (held.length > 1 && side >= 5) stripes(context, held.slice(1, 4).map(({ name }) => this.names.color(name)[0]), x, y, side);
    context.restore();
    if (held.length > 1) outline(context, theme.ink, x, y, side, side >= 10 ? 1.5 : 1);
    const [middleX, middleY] = [x + side / 2, y + side / 2 + 0.5];
    if (held.length > 1 && side >= 20) label(context, `×${held.length}`, ink, middleX, middleY, color);
    if (held.length === 1 && side >= 14) {
      label(context, this.names.number(held[0].name), fill > 0.5 ? ink : theme.ink, middleX, middleY);
    }
  }

  drawMarks(context, theme, block, x, y, side, now) {
    context.globalAlpha = 1;
    const since = now - (this.flashes.get(block) ?? -FLASH_MS);
    if (since < FLASH_MS) {
      context.globalAlpha = this.isCalm.matches ? 1 : 1 - since / FLASH_MS;
      outline(context, theme.ink, x, y, side, 3);
      context.globalAlpha = 1;
    }
    if (block === this.pointed) outline(context, theme.ink, x, y, side, 2);
  }

  flash(blocks, now) {
    for (const block of blocks) this.flashes.set(block, now);
  }

  isFlashing(now) {
    for (const [block, since] of this.flashes) if (now - since >= FLASH_MS) this.flashes.delete(block);
    return this.flashes.size > 0;
  }

  blockAt(x, y) {
    if (!this.layout || x < this.layout.gutter) return null;
    const { size, columns, rows, numBlocks, gutter } = this.layout;
    const [column, line] = [Math.floor((x - gutter) / size), Math.floor(y / size)];
    if (column >= columns || line >= rows.length) return null;
    const block = rows[line] * columns + column + 1;
    return block <= numBlocks ? block : null;
  }

  point(block) {
    if (block === this.pointed) return;
    this.pointed = block;
    this.inspect(block);
  }

  onKey(event) {
    if (!this.layout) return;
    const { columns, rows } = this.layout;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -Infinity };
    if (event.key === "Escape") return this.point(null);
    if (!(event.key in moves)) return;
    event.preventDefault();
    const first = rows[0] * columns + 1;
    const next = this.pointed === null ? first : Math.max(first, this.pointed + moves[event.key]);
    if (next <= this.layout.numBlocks && rows.includes(Math.floor((next - 1) / columns))) this.point(next);
  }
}

const gutterOf = (width) => (width < 500 ? 34 : 46); // for the id of each row's first block
const columnsOf = (width, size) => Math.max(8, Math.floor((width - gutterOf(width)) / size / 8) * 8);
const capacity = (width, height, size) => columnsOf(width, size) * Math.floor(height / size);

function square(context, x, y, side) {
  if (side < 9) return context.fillRect(x, y, side, side);
  context.beginPath();
  context.roundRect(x, y, side, side, 3);
  context.fill();
}

function outline(context, color, x, y, side, width) {
  context.strokeStyle = color;
  context.lineWidth = width;
  context.strokeRect(x + width / 2 - 0.5, y + width / 2 - 0.5, side - width + 1, side - width + 1);
}

/** Free, and its content still known: the next request that begins like this finds it here. */
function drawRemembered(context, theme, x, y, side) {
  context.fillStyle = theme["block-edge"];
  if (side < 7) return context.fillRect(x, y, side, side);
  context.beginPath();
  context.arc(x + side / 2, y + side / 2, Math.max(1.5, side / 8), 0, 7);
  context.fill();
}

function stripes(context, colors, x, y, side) {
  const width = Math.max(2, side / 7);
  context.beginPath();
  context.rect(x, y, side, side);
  context.clip();
  context.lineWidth = width;
  for (let index = 0, offset = width; offset < 2 * side; index++, offset += width * 2.6) {
    context.strokeStyle = colors[index % colors.length];
    context.beginPath();
    context.moveTo(x + offset - side, y + side);
    context.lineTo(x + offset, y);
    context.stroke();
  }
}

function label(context, text, color, x, y, ground = null) {
  context.textAlign = "center";
  context.font = "600 10px system-ui, sans-serif";
  if (ground) {
    const width = context.measureText(text).width + 4;
    context.fillStyle = ground;
    context.fillRect(x - width / 2, y - 6.5, width, 12);
  }
  context.fillStyle = color;
  context.fillText(text, x, y);
  context.font = "11px system-ui, sans-serif";
}
