// The engine as panels: fed with flight records from anywhere, it knows no server. `new Viewer(element)`, then `feed(record)`.
//
// Records may come faster than a screen can show them. Each is taken in at once; drawing waits for the next frame and shows
// the newest state, and texts change ten times a second at most, so that they can be read.

import { drawLine, drawSteps, readTheme } from "./charts.js";
import { count, h, plural, setText } from "./dom.js";
import { BlockGrid } from "./grid.js";
import { History } from "./history.js";
import { RequestNames } from "./names.js";
import { RequestList, WaitingList } from "./queues.js";
import { DecisionList } from "./decisions.js";
import { EngineState } from "./state.js";

const TEXT_MS = 100;
const MAX_IDS = 40; // of a block table in words

export class Viewer {
  /** `hint` is what to do when there is nothing to see. */
  constructor(root, hint = "") {
    this.hint = hint;
    this.names = new RequestNames();
    this.state = new EngineState();
    this.history = new History();
    this.isStill = false; // paused, or one step of a file: every decision of the step is shown, and read out
    this.isTold = false;
    this.build(root);
    this.readTheme();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.readTheme());
    new ResizeObserver(() => this.schedule()).observe(root);
  }

  build(root) {
    this.root = root;
    this.tiles = {
      rate: tile("Tokens per second", "Generated, over the last second"),
      first: tile("Time to first token", "From a request's arrival; one point a request"),
      hits: tile("Prefix cache hits", "Prompt tokens found in the cache, of the last 32 requests"),
      usage: tile("KV cache in use", "Blocks that requests hold"),
    };
    this.canvas = h("canvas", { class: "blocks", tabindex: 0, role: "img", "aria-describedby": "inspector" });
    this.inspector = h("p", { id: "inspector", class: "inspector", "aria-live": "polite" });
    this.caption = h("p", { class: "note pushed" });
    this.steps = h("canvas", { class: "steps", role: "img" });
    this.stepNumber = h("span", { class: "number" });
    this.budgetText = h("p", { class: "budget-text" });
    this.budget = { prefill: h("i", { class: "prefill" }), decode: h("i", { class: "decode" }) };
    this.announcer = h("p", { class: "unseen", role: "status" });
    this.running = new RequestList(this.names, (name) => this.highlight(name));
    this.waiting = new WaitingList(this.names);
    this.decisions = new DecisionList(this.names);
    root.append(h("div", { class: "tiles" }, ...Object.values(this.tiles).map((each) => each.element)), this.buildBlocks(),
      h("div", { class: "columns" }, h("div", {}, this.buildStep(), this.running.element, this.waiting.element),
        this.decisions.element), this.announcer);
    this.grid = new BlockGrid(this.canvas, this.names, () => this.schedule());
  }

  buildBlocks() {
    this.size = h("span", {}, "16");
    const legend = [["free", "free"], ["used", "in use, filled from the bottom"], ["shared", "shared by several requests"],
      ["remembered", "free, still in the prefix cache"]];
    return h("section", { class: "panel" },
      h("div", { class: "head" }, h("h2", {}, "KV cache"), h("p", { class: "note" }, "A square is a block: room for ", this.size,
        " tokens. Its color is its request's."),
        this.caption),
      h("ul", { class: "legend" }, ...legend.map(([name, text]) => h("li", {}, h("i", { class: name }), text))),
      h("div", { class: "stage" }, this.canvas), this.inspector);
  }

  buildStep() {
    const legend = ["prefill", "decode"].map((name) => h("li", {}, h("i", { class: name }), name));
    return h("section", { class: "panel" },
      h("div", { class: "head" }, h("h2", {}, "Step ", this.stepNumber), h("ul", { class: "legend" }, ...legend)),
      h("div", { class: "budget" }, this.budget.prefill, this.budget.decode), this.budgetText, this.steps);
  }

  readTheme() {
    this.theme = readTheme(this.root);
    this.schedule();
  }

  /** Forget everything but the colors: another engine, another file, or another place in it. */
  reset({ keepNames = true } = {}) {
    if (!keepNames) this.names.numbers.clear();
    this.state = new EngineState();
    this.history = new History();
    this.grid.reset();
    this.schedule();
  }

  /** Take in one record; `isPast` if it is only on the way to the one that is wanted. Throws an Error for another version. */
  feed(record, { isPast = false } = {}) {
    if (record.type === "step") {
      for (const name of isPast ? [] : record.preempted) {
        this.grid.flash(this.state.requests.get(name)?.blocks ?? [], performance.now());
      }
      this.history.add(record, this.state);
    }
    this.state.apply(record);
    for (const name of [...Object.keys(record.requests ?? record.admitted ?? {}), ...(record.waiting?.first ?? [])]) {
      this.names.number(name);
    }
    this.history.usage = 1 - this.state.freeBlocks / Math.max(1, this.state.numBlocks);
    this.schedule();
  }

  /** The engine's clock has reached `time` without a step. */
  advance(time) {
    this.history.advance(time);
    this.schedule();
  }

  setStill(isStill) {
    this.isStill = isStill;
    this.schedule();
  }

  highlight(name) {
    this.grid.highlight = name;
    this.schedule();
  }

  schedule() {
    this.isTold = false;
    this.frame ??= requestAnimationFrame((now) => {
      this.frame = null;
      this.draw(now);
    });
  }

  draw(now) {
    if (!this.canvas.clientWidth) return; // not on screen
    const { highlight } = this.grid;
    if (highlight && !this.state.requests.has(highlight)) this.grid.highlight = null;
    const shown = this.grid.draw(this.state, this.theme, now);
    if (this.isStill || now - (this.drawnAt ?? 0) >= TEXT_MS) {
      this.drawnAt = now;
      this.isTold = true;
      this.drawTexts(shown);
    }
    const isFlashing = this.grid.isFlashing(performance.now());
    if (isFlashing || !this.isTold) this.schedule();
  }

  drawTexts(shown) {
    const { state, history } = this;
    this.drawTiles();
    setText(this.size, String(state.header.block_size));
    const numUsed = state.numBlocks - state.freeBlocks;
    const numLeft = state.numBlocks - shown.numShown; // that are not drawn
    setText(this.caption, shown.numHidden
      ? `${plural(shown.numHidden, "block")} in use and ${count(numLeft - shown.numHidden)} free ones have no room here.`
      : numLeft ? `And ${count(numLeft)} more free blocks.` : `All ${plural(state.numBlocks, "block")}.`);
    const users = plural(state.requests.size, "request");
    this.canvas.setAttribute("aria-label", `KV cache: ${numUsed} of ${state.numBlocks} blocks in use by ${users}. `
      + "Arrow keys move from block to block.");
    setText(this.inspector, this.inspect());
    setText(this.stepNumber, count(state.step));
    this.drawBudget();
    this.running.draw(state);
    this.waiting.draw(state, history);
    this.decisions.draw(state, history, this.isStill);
    if (this.isStill) setText(this.announcer, this.summary(numUsed));
  }

  drawTiles() {
    const { rate, first, hits, usage } = this.tiles;
    const { rates, firstTokens, hitRates, usages } = this.history;
    rate.show(rates.length ? count(Math.round(rates.at(-1))) : "–", "", rates, this.theme);
    first.show(firstTokens.length ? milliseconds(firstTokens.at(-1)) : "–", "ms", firstTokens, this.theme, { room: 40 });
    hits.show(hitRates.length ? String(Math.round(100 * hitRates.at(-1))) : "–", "%", hitRates, this.theme, { top: 1 });
    const share = this.history.usage * 100;
    usage.show(share && share < 10 ? share.toFixed(1) : String(Math.round(share)), "%", usages, this.theme);
  }

  drawBudget() {
    const { prefill, decode } = this.history.steps.at(-1) ?? { prefill: 0, decode: 0 };
    const budget = this.state.header.max_num_batched_tokens || 1;
    for (const [name, tokens] of Object.entries({ prefill, decode })) {
      this.budget[name].style.width = tokens ? `max(3px, ${(100 * tokens) / budget}%)` : "0";
    }
    setText(this.budgetText, `${count(prefill)} prefill + ${count(decode)} decode of ${count(budget)} tokens`);
    const most = drawSteps(this.steps, this.history.steps, this.theme);
    this.steps.setAttribute("aria-label", `Tokens of the last ${this.history.steps.length} steps, ${most} at most`);
  }

  /** One sentence on what the reader points at. */
  inspect() {
    const { pointed, highlight } = this.grid;
    const held = pointed === null ? null : this.state.blockOwners().get(pointed);
    if (held) return this.describeBlock(pointed, held);
    if (pointed !== null) {
      const known = ", and a prompt that begins like its old one finds it in the prefix cache";
      return `Block ${pointed} is free${this.state.cached.has(pointed) ? known : ""}.`;
    }
    if (highlight) return this.describeTable(highlight);
    if (!this.state.requests.size && !this.state.waiting.count && this.hint) return this.hint;
    return "Point at a block or a request to read its block table.";
  }

  describeBlock(block, held) {
    const { name, index } = held[0];
    const size = this.state.header.block_size;
    const others = held.slice(1).map((owner) => this.names.number(owner.name));
    const shared = others.length ? ` It is shared with request ${others.slice(0, 8).join(", ")}.` : "";
    const positions = `${count(index * size)} to ${count((index + 1) * size - 1)}`;
    return `Block ${block} has positions ${positions} of request ${this.names.number(name)}, `
      + `${this.state.fillOf(held[0])} of ${size} filled.${shared} ${this.describeTable(name)}`;
  }

  describeTable(name) {
    const { blocks } = this.state.requests.get(name);
    const more = blocks.length > MAX_IDS ? ` and ${blocks.length - MAX_IDS} more` : "";
    return `Block table of request ${this.names.number(name)}: ${blocks.slice(0, MAX_IDS).join(" ")}${more}`;
  }

  summary(numUsed) {
    const { state } = this;
    return `Step ${state.step}: ${state.requests.size} running, ${state.waiting.count} waiting, `
      + `${numUsed} of ${plural(state.numBlocks, "block")} in use.`;
  }
}

const milliseconds = (seconds) => (seconds < 0.01 ? (seconds * 1000).toFixed(1) : count(Math.round(seconds * 1000)));

/** A number with its recent past. */
function tile(title, explanation) {
  const [value, unit, canvas] = [h("b", {}, "–"), h("span", { class: "unit" }), h("canvas", { "aria-hidden": "true" })];
  const element = h("section", { class: "panel tile", title: explanation }, h("h2", {}, title), h("p", {}, value, unit), canvas);
  const show = (text, unitText, values, theme, options) => {
    setText(value, text);
    setText(unit, text === "–" ? "" : unitText);
    drawLine(canvas, values, theme, options);
  };
  return { element, show };
}
