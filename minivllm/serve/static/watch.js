// The live stream: kept open while the page is looked at, and opened again when it breaks.

import { events } from "./sse.js";

const RETRY_MS = [500, 1000, 2000, 5000];
const HIDDEN_MS = 3000;

export class Watch {
  /** `onevent({paused, records})`; `onstatus("connecting" | "live" | "lost", reason)`. */
  constructor(api, onevent, onstatus) {
    Object.assign(this, { api, onevent, onstatus, controller: null, failures: 0, isWanted: false });
    // A page that nobody sees should cost the engine nothing.
    document.addEventListener("visibilitychange", () => {
      clearTimeout(this.hiding);
      if (document.hidden) this.hiding = setTimeout(() => this.disconnect(), HIDDEN_MS);
      else if (this.isWanted) this.connect();
    });
  }

  start() {
    this.isWanted = true;
    this.connect();
  }

  stop() {
    this.isWanted = false;
    this.disconnect();
  }

  disconnect() {
    clearTimeout(this.retry);
    this.controller?.abort();
    this.controller = null;
  }

  /** Say it once: a message that the page shows beside should stay. */
  tell(status, reason) {
    if (status !== this.status) this.onstatus(status, reason);
    this.status = status;
  }

  async connect() {
    if (this.controller) return;
    clearTimeout(this.retry);
    const controller = (this.controller = new AbortController());
    this.tell("connecting");
    let reason = "The connection was closed.";
    try {
      const response = await this.api.fetch("trace", { signal: controller.signal });
      for await (const event of events(response)) {
        if (controller.signal.aborted) return;
        if (event.error) throw new Error(event.error.message);
        this.failures = 0;
        this.tell("live");
        this.onevent(event);
      }
    } catch (error) {
      reason = error.message;
    }
    if (this.controller !== controller) return; // ended on purpose
    this.controller = null;
    this.tell("lost", reason);
    const wait = RETRY_MS[Math.min(this.failures++, RETRY_MS.length - 1)];
    this.retry = setTimeout(() => this.connect(), wait);
  }
}
