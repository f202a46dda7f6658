// Work for the scheduler at one press of a button.

import { setText } from "./dom.js";
import { events } from "./sse.js";

const BEGINNINGS = [
  "Once upon a time there was a fox", "The scheduler decides", "A little bird lived in", "The block table",
  "One day a girl found", "A request that waits", "In the forest there was", "The prefix cache",
];
// A browser opens six connections to a server at most, and a held engine answers none of these: the trace, the chat and the
// button that resumes it must have one left.
const MAX_AT_ONCE = 3;
const PREFIX = "A block is a piece of memory for the keys and values of sixteen tokens. The block pool numbers all blocks and "
  + "knows which of them are free. A request has a block table, which says where its tokens are. When a request ends, its blocks "
  + "go back to the pool, and what was in them can still be found by a request that begins with the same words. ";
const QUESTIONS = ["What is a block?", "What is a request?"].map((question) => PREFIX.repeat(3) + question);

export class Experiments {
  constructor(root, api) {
    Object.assign(this, { api, status: root.querySelector("#experiment-status"), longest: 256, number: 0, numRunning: 0 });
    this.buttons = root.querySelectorAll("button");
    root.querySelector("#eight").addEventListener("click", () => this.run(BEGINNINGS));
    root.querySelector("#prefix").addEventListener("click", () => this.run(QUESTIONS));
  }

  /** Send the prompts at once, in one body, and say how they fare. */
  async run(prompt) {
    const run = ++this.number;
    const tell = (text) => run === this.number && setText(this.status, text); // a newer experiment has the line
    const longest = Math.min(this.longest, 320); // long enough to be seen, and not all equally long
    const json = { prompt, max_tokens: longest, min_tokens: Math.floor(longest / 2), temperature: 1, stream: true };
    let numEnded = 0;
    this.count(1);
    tell(`${prompt.length} requests sent, none answered yet.`);
    try {
      const response = await this.api.fetch("v1/completions", { json });
      for await (const chunk of events(response)) {
        if (chunk.error) throw new Error(chunk.error.message);
        if (chunk.choices[0]?.finish_reason) tell(`${prompt.length} requests sent, ${++numEnded} answered.`);
      }
    } catch (error) {
      tell(error.message);
    }
    this.count(-1);
  }

  count(change) {
    this.numRunning += change;
    for (const button of this.buttons) button.disabled = this.numRunning >= MAX_AT_ONCE;
  }
}
