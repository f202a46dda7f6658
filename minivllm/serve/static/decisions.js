// What the scheduler decided and why, in its own sentences.

import { h, setText } from "./dom.js";
import { paintChip } from "./queues.js";

const MAX_ROWS = 60;
const HINT = "Who is admitted, who waits and for what, who is preempted and who ends: it is told here as it happens.";

export class DecisionList {
  constructor(names) {
    Object.assign(this, { names, rows: [] });
    this.title = h("span", { class: "note" });
    this.list = h("ol", { class: "rows decisions", tabindex: 0, "aria-label": "Decisions" });
    this.empty = h("p", { class: "note empty" }, HINT);
    const head = h("div", { class: "head" }, h("h2", {}, "Decisions"), this.title);
    this.element = h("section", { class: "panel grow" }, head, this.empty, this.list);
  }

  makeRow() {
    const row = { chip: h("b", { class: "chip" }), text: h("span", { class: "why" }), step: h("span", { class: "when" }) };
    row.element = h("li", { class: "row" }, row.chip, row.text, row.step);
    this.rows.push(row);
    this.list.append(row.element);
    return row;
  }

  /** Standing still, every decision of the step, then what came before; running, only what is not said in every step. */
  draw(state, history, isStill) {
    const now = isStill ? history.now.map(({ request_id: id, action, reason }) =>
      ({ step: state.step, id, action, text: reason, times: 1, isNow: true })) : [];
    const before = history.entries.filter((entry) => !isStill || entry.step !== state.step);
    const entries = [...now, ...before].slice(0, MAX_ROWS + now.length);
    while (this.rows.length < entries.length) this.makeRow();
    this.rows.forEach((row, index) => this.drawRow(row, entries[index]));
    this.empty.hidden = entries.length > 0;
    setText(this.title, isStill ? `all of step ${state.step}, then earlier ones` : "newest first");
  }

  drawRow(row, entry) {
    row.element.hidden = !entry;
    if (!entry) return;
    paintChip(row.chip, this.names, entry.id);
    setText(row.text, this.names.shorten(entry.text) + (entry.times > 1 ? ` (${entry.times} times)` : ""));
    setText(row.step, entry.isNow ? "" : `step ${entry.step}`);
    row.element.className = `row ${entry.action}${entry.isNow ? " now" : ""}`;
  }
}
