// A recorded trace: a file, a place in it, and a bar to move that place.

import { h, setText } from "./dom.js";
import { checkVersion } from "./state.js";

const BEFORE = 300; // steps fed before the wanted one, so that charts and decisions have their past
const SPEEDS = [2, 10, 50, 250];

/** The records of a trace file. Throws an Error that says what is wrong with it. */
export function parseTrace(text) {
  const lines = text.split("\n");
  while (lines.length && !lines.at(-1).trim()) lines.pop();
  const records = [];
  for (const [index, line] of lines.entries()) {
    try {
      records.push(JSON.parse(line));
    } catch {
      if (index && index === lines.length - 1) break; // the server that writes it is in the middle of this line
      throw new Error(`This is no trace: line ${index + 1} is not JSON.`);
    }
  }
  if (records[0]?.type !== "header") throw new Error("This is no trace of minivllm: it does not begin with a header.");
  checkVersion(records[0]);
  return records;
}

export class Player {
  constructor(viewer, { canClose = true, onclose = () => {} } = {}) {
    this.viewer = viewer;
    this.records = [];
    this.timer = null;
    this.build(canClose, onclose);
  }

  build(canClose, onclose) {
    const button = (label, text, onclick) => h("button", { type: "button", "aria-label": label, title: label, onclick }, text);
    const leave = () => {
      this.close();
      onclose();
    };
    this.play = button("Play", "▶", () => (this.timer ? this.stop() : this.start()));
    const slide = () => this.move(Number(this.slider.value));
    this.slider = h("input", { type: "range", min: 0, value: 0, "aria-label": "Step", oninput: slide });
    this.place = h("output", { class: "place" });
    this.name = h("span", { class: "file" });
    const speeds = SPEEDS.map((speed) => h("option", { value: speed }, `${speed} steps/s`));
    this.speed = h("select", { "aria-label": "Steps per second" }, ...speeds);
    this.speed.value = SPEEDS[1];
    this.speed.addEventListener("change", () => this.timer && this.start());
    this.element = h("div", { class: "player", role: "group", "aria-label": "Recorded trace", hidden: true },
      button("Back one step", "◀", () => this.move(this.position - 1)), this.play,
      button("Forward one step", "▶|", () => this.move(this.position + 1)), this.slider, this.place, this.speed, this.name,
      h("button", { type: "button", class: "quiet", hidden: !canClose, onclick: leave }, "Close trace"));
  }

  get isOpen() {
    return !this.element.hidden;
  }

  /** Show a trace from its first step. Throws an Error, having changed nothing, for a text that is no trace. */
  open(name, text) {
    const records = parseTrace(text);
    const isPlace = (record, index) => record.type === "step" || (index === 1 && record.type === "keyframe");
    const places = records.flatMap((record, index) => (isPlace(record, index) ? [index] : []));
    if (!places.length) throw new Error("This trace has no step yet.");
    this.stop();
    Object.assign(this, { records, places, position: -1 });
    this.viewer.reset({ keepNames: false });
    this.viewer.setStill(true);
    this.slider.max = places.length - 1;
    setText(this.name, name);
    this.element.hidden = false;
    this.nameAll();
    this.move(0);
  }

  /** Number the requests in the file's order, from wherever it is looked at. */
  nameAll() {
    for (const record of this.records) {
      const named = [...Object.keys(record.requests ?? record.admitted ?? {}), ...(record.waiting?.first ?? [])];
      for (const name of named) this.viewer.names.number(name);
    }
  }

  /** Go to a place: one step on is fed, anything else begins at a keyframe before. */
  move(position) {
    position = Math.max(0, Math.min(this.places.length - 1, position));
    let from = this.places[this.position] + 1;
    if (position !== this.position + 1 || this.position < 0) {
      from = this.places[Math.max(0, position - BEFORE)];
      while (from > 1 && this.records[from].type !== "keyframe") from -= 1;
      this.viewer.reset();
      this.viewer.feed(this.records[0]);
      if (from < 1) from = 1;
    }
    for (let index = from; index <= this.places[position]; index++) {
      this.viewer.feed(this.records[index], { isPast: index < this.places[position] });
    }
    this.position = position;
    this.slider.value = position;
    const last = this.records[this.places.at(-1)].step;
    const step = this.records[this.places[position]].step;
    setText(this.place, `step ${step} of ${last}`);
    this.slider.setAttribute("aria-valuetext", this.place.textContent);
    if (position === this.places.length - 1) this.stop();
  }

  start() {
    this.stop();
    if (this.position === this.places.length - 1) this.move(0);
    const perSecond = Number(this.speed.value);
    let due = performance.now();
    this.timer = setInterval(() => {
      while (this.timer && due <= performance.now()) {
        due += 1000 / perSecond;
        this.move(this.position + 1);
      }
    }, 1000 / Math.min(perSecond, 60));
    this.label("Pause", "❚❚");
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.label("Play", "▶");
  }

  label(text, sign) {
    setText(this.play, sign);
    this.play.setAttribute("aria-label", text);
    this.play.title = text;
  }

  close() {
    this.stop();
    this.records = [];
    this.element.hidden = true;
    this.viewer.reset({ keepNames: false });
    this.viewer.setStill(false);
  }
}
