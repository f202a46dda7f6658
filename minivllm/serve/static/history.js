// What a single state cannot tell: rates over time, the last steps' shapes, and what the scheduler said.

import { plural } from "./dom.js";
import { numTokens } from "./state.js";

const NUM_POINTS = 80;
const INTERVAL = 0.25; // seconds between two points of the rate
const WINDOW = 1; // seconds over which a rate is taken
const NUM_STEPS = 160;
const NUM_FIRST_TOKENS = 40;
const NUM_ADMISSIONS = 32;
const NUM_ENTRIES = 60;

const push = (list, item, limit) => {
  list.push(item);
  if (list.length > limit) list.shift();
};

export class History {
  constructor() {
    this.rates = []; // tokens per second, one every INTERVAL
    this.usage = 0; // share of the blocks that requests hold, now
    this.usages = []; // and before, one every INTERVAL
    this.arrivals = []; // [time, tokens] of the last WINDOW
    this.pointAt = null;
    this.firstTokens = []; // seconds
    this.admissions = []; // [cached positions, positions]
    this.hitRates = [];
    this.steps = []; // {prefill, decode}
    this.preempted = new Set();
    this.now = []; // every decision of the newest step
    this.entries = []; // notable decisions, newest first: {step, id, action, text, times}
    this.numPreemptions = 0;
  }

  /** Take in a step's record, with the state as it was before it. */
  add(record, state) {
    push(this.steps, split(record, state), NUM_STEPS);
    this.addTokens(record);
    for (const seconds of Object.values(record.first_tokens ?? {})) push(this.firstTokens, seconds, NUM_FIRST_TOKENS);
    for (const name of record.preempted) this.preempted.add(name);
    this.numPreemptions += record.preempted.length;
    for (const [name, entry] of Object.entries(record.admitted)) this.addAdmission(name, entry);
    for (const decision of this.decisionsOf(record, state)) this.addDecision(record.step, decision);
    for (const name of Object.keys(record.finished)) this.preempted.delete(name);
  }

  addTokens(record) {
    if (record.time === undefined) return;
    this.advance(record.time);
    const tokens = Object.values(record.sampled).reduce((sum, sampled) => sum + numTokens(sampled), 0);
    this.arrivals.push([record.time, tokens]);
  }

  /** Let the clock run to `time`: an idle engine's rate goes down to 0. */
  advance(time) {
    // after a long pause, or with another engine's clock, begin anew
    if (this.pointAt === null || Math.abs(time - this.pointAt) > NUM_POINTS * INTERVAL) this.pointAt = time - INTERVAL;
    while (this.pointAt + INTERVAL <= time) {
      this.pointAt += INTERVAL;
      while (this.arrivals.length && this.arrivals[0][0] <= this.pointAt - WINDOW) this.arrivals.shift();
      const tokens = this.arrivals.reduce((sum, [when, number]) => sum + (when <= this.pointAt ? number : 0), 0);
      push(this.rates, tokens / WINDOW, NUM_POINTS);
      push(this.usages, this.usage, NUM_POINTS);
    }
  }

  /** A return after a preemption finds its own blocks, and that says nothing about the cache. */
  addAdmission(name, entry) {
    if (this.preempted.has(name)) return;
    push(this.admissions, [entry.num_computed_tokens, entry.num_tokens], NUM_ADMISSIONS);
    const [hits, all] = this.admissions.reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
    push(this.hitRates, hits / all, NUM_POINTS);
  }

  /**
   * The step's decisions, with the ends that it brought. The engine notes an end when it plans the next step, and after the
   * last request there is none.
   */
  decisionsOf(record, state) {
    const ends = Object.entries(record.finished).map(([name, why]) => {
      const held = (record.admitted[name] ?? state.requests.get(name))?.blocks.length ?? 0;
      const number = held + (record.new_blocks[name]?.length ?? 0);
      return { request_id: name, action: "finish", reason: `request ${name} ends (${why}): ${plural(number, "block")} back` };
    });
    return (this.now = [...record.decisions.filter(({ action }) => action !== "finish"), ...ends]);
  }

  /** Decoding is what every step does; a wait that goes on is one entry with a count. */
  addDecision(step, { request_id: id, action, reason }) {
    if (action === "schedule") return;
    const latest = this.entries.find((entry) => entry.id === id);
    if (action === "wait" && latest?.action === "wait") {
      Object.assign(latest, { step, text: reason, times: latest.times + 1 });
      return;
    }
    this.entries.unshift({ step, id, action, text: reason, times: 1 });
    this.entries.length = Math.min(this.entries.length, NUM_ENTRIES);
  }
}

/** The step's tokens: a decode is one token behind a finished prompt; everything else fills KV for known tokens. */
export function split(record, state) {
  let [prefill, decode] = [0, 0];
  for (const [name, tokens] of Object.entries(record.scheduled)) {
    const { num_computed_tokens: computed, num_tokens: known, num_prompt_tokens: prompt } =
      record.admitted[name] ?? state.requests.get(name);
    if (tokens === 1 && computed === known - 1 && computed >= prompt) decode += 1;
    else prefill += tokens;
  }
  return { prefill, decode };
}
