// Who runs and who waits, as rows that keep their place while their numbers change.

import { count, h, plural, setText } from "./dom.js";

const MAX_ROWS = 64;

/** Bring a list to `number` rows; rows are made once and used again. */
function resize(list, rows, number, make) {
  while (rows.length < number) {
    rows.push(make());
    list.append(rows.at(-1).element);
  }
  rows.forEach((row, index) => (row.element.hidden = index >= number));
}

export function paintChip(chip, names, name) {
  const [color, ink] = names.color(name);
  setText(chip, String(names.number(name)));
  chip.style.background = color;
  chip.style.color = ink;
}

export class RequestList {
  /** `highlight(name or null)` is called when the reader points at a request. */
  constructor(names, highlight) {
    Object.assign(this, { names, highlight, rows: [] });
    this.title = h("span", { class: "note" });
    this.list = h("ul", { class: "rows running", "aria-label": "Running requests",
      onpointerleave: (event) => event.pointerType === "mouse" && highlight(null) });
    this.more = h("p", { class: "note more" });
    this.unit = h("p", { class: "note pushed" }, "prompt + generated tokens");
    this.empty = h("p", { class: "note empty" }, "No request runs.");
    this.element = h("section", { class: "panel" }, h("div", { class: "head" }, h("h2", {}, "Running"), this.title, this.unit),
      h("div", { class: "tall" }, this.empty, this.list), this.more);
  }

  makeRow() {
    const parts = {
      chip: h("b", { class: "chip" }),
      old: h("i", { class: "old" }), new: h("i", { class: "new" }), missing: h("i", { class: "missing" }),
      tokens: h("span", { class: "tokens" }), mine: h("span", { class: "mine" }), blocks: h("span", { class: "held" }),
    };
    const row = { ...parts, name: null };
    const point = () => this.highlight(row.name);
    const listeners = { onpointerenter: point, onclick: point, onfocus: point, onblur: () => this.highlight(null) };
    row.button = h("button", { type: "button", class: "row", ...listeners },
      parts.chip, h("span", { class: "bar" }, parts.old, parts.new, parts.missing), parts.mine, parts.tokens, parts.blocks);
    row.element = h("li", {}, row.button);
    return row;
  }

  draw(state) {
    const shown = [...state.requests].slice(0, MAX_ROWS);
    const longest = Math.max(64, ...shown.map(([, request]) => request.num_tokens));
    resize(this.list, this.rows, shown.length, () => this.makeRow());
    shown.forEach(([name, request], index) => this.drawRow(this.rows[index], name, request, longest));
    this.empty.hidden = shown.length > 0;
    setText(this.title, `${state.requests.size} of at most ${count(state.header.max_num_seqs)}`);
    setText(this.more, state.requests.size > MAX_ROWS ? `and ${state.requests.size - MAX_ROWS} more` : "");
  }

  drawRow(row, name, request, longest) {
    const { num_prompt_tokens: prompt, num_tokens: known, num_computed_tokens: computed } = request;
    row.name = name;
    paintChip(row.chip, this.names, name);
    const part = (tokens) => `${(100 * Math.max(0, tokens)) / longest}%`;
    const [color] = this.names.color(name);
    row.old.style.width = part(Math.min(computed, prompt));
    row.new.style.width = part(computed - prompt);
    row.missing.style.width = part(known - computed);
    row.old.style.background = row.new.style.background = color;
    setText(row.tokens, `${count(prompt)} + ${count(known - prompt)}`);
    setText(row.mine, this.names.isMine(name) ? "yours" : "");
    setText(row.blocks, plural(request.blocks.length, "block"));
    row.button.title = `${name}: ${prompt} prompt tokens, ${known - prompt} generated, ${computed} computed`;
  }
}

export class WaitingList {
  constructor(names) {
    Object.assign(this, { names, rows: [] });
    this.title = h("span", { class: "note" });
    this.list = h("ul", { class: "rows waiting", tabindex: 0, "aria-label": "Waiting requests" });
    this.empty = h("p", { class: "note empty" }, "The queue is empty.");
    this.element = h("section", { class: "panel" }, h("div", { class: "head" }, h("h2", {}, "Waiting"), this.title),
      h("div", { class: "short" }, this.empty, this.list));
  }

  makeRow() {
    const row = { chip: h("b", { class: "chip" }), text: h("span", { class: "why" }) };
    row.element = h("li", { class: "row" }, row.chip, row.text);
    return row;
  }

  draw(state, history) {
    const { first, count: number } = state.waiting;
    const shown = first.slice(0, MAX_ROWS);
    resize(this.list, this.rows, shown.length, () => this.makeRow());
    shown.forEach((name, index) => {
      const row = this.rows[index];
      paintChip(row.chip, this.names, name);
      setText(row.text, this.reason(name, state, history, shown[index - 1]));
      row.element.classList.toggle("preempted", history.preempted.has(name));
    });
    this.empty.hidden = shown.length > 0;
    setText(this.title, number > shown.length ? `${count(number)}, of which the first ${shown.length}` : String(number));
  }

  /** The scheduler gives a reason for the first in the queue; all others wait behind it, since nobody overtakes. */
  reason(name, state, history, before) {
    const decision = state.last?.decisions.findLast((each) => each.request_id === name && each.action === "wait");
    const said = decision && this.names.shorten(decision.reason).replace(/^request \S+ (waits: )?/, "");
    const lost = history.preempted.has(name) ? "preempted" : "";
    const place = before === undefined ? "next in turn" : `behind request ${this.names.number(before)}`;
    const mine = this.names.isMine(name) ? "yours" : "";
    return [mine, lost, said ?? (lost && before === undefined ? "" : place)].filter(Boolean).join("; ");
  }
}
