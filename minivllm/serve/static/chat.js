// A chat with the model: the whole conversation goes with every question, and the answer comes piece by piece.

import { h, plural, setText } from "./dom.js";
import { events } from "./sse.js";

export class Chat {
  /** `onask(id)` is called with a part of the request's id, so that the viewer can mark it as the reader's own. */
  constructor(root, api, onask) {
    Object.assign(this, { api, onask, messages: [], controller: null });
    this.log = root.querySelector("#log");
    this.welcome = root.querySelector("#welcome");
    this.input = root.querySelector("#question");
    this.send = root.querySelector("#send");
    root.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.controller) this.controller.abort();
      else this.ask(this.input.value.trim());
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.controller) this.ask(this.input.value.trim());
    });
    for (const example of root.querySelectorAll("[data-example]")) {
      example.addEventListener("click", () => !this.controller && this.ask(example.textContent));
    }
    root.querySelector("#clear").addEventListener("click", () => this.clear());
  }

  clear() {
    this.controller?.abort();
    this.messages = [];
    this.log.replaceChildren(this.welcome);
    this.input.focus();
  }

  async ask(question) {
    if (!question) return this.input.focus();
    this.input.value = "";
    this.welcome.remove();
    const messages = this.messages;
    messages.push({ role: "user", content: question });
    this.say("user", question);
    const answer = this.say("assistant", "");
    answer.element.classList.add("busy");
    this.setBusy(new AbortController());
    try {
      await this.stream(messages, answer);
    } catch (error) {
      if (error.name === "AbortError") setText(answer.note, "Stopped. Its blocks are free again.");
      else {
        answer.note.classList.add("error");
        setText(answer.note, error.message);
      }
    }
    answer.element.classList.remove("busy");
    // A question without an answer is not asked again with the next one.
    if (answer.text.textContent) messages.push({ role: "assistant", content: answer.text.textContent });
    else messages.pop();
    this.setBusy(null);
  }

  async stream(messages, answer) {
    const json = { messages, stream: true, stream_options: { include_usage: true } };
    const began = performance.now();
    let [first, text] = [null, ""];
    const requestId = `page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
    this.onask(requestId);
    const response = await this.api.fetch("v1/chat/completions", { json, requestId, signal: this.controller.signal });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices[0]?.delta.content;
      if (piece) {
        first ??= performance.now();
        this.show(answer, (text += piece));
      }
      if (chunk.usage) setText(answer.note, describe(chunk.usage, (first ?? began) - began, performance.now() - began));
    }
    this.show(answer, text);
  }

  show(answer, text) {
    const isAtEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
    setText(answer.text, text);
    if (isAtEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  say(role, content) {
    const [text, note] = [h("p", { class: "text" }, content), h("p", { class: "note" })];
    const who = role === "user" ? "You" : "Model";
    const element = h("div", { class: `message ${role}` }, h("span", { class: "unseen" }, `${who}: `), text, note);
    this.log.append(element);
    this.log.scrollTop = this.log.scrollHeight;
    return { element, text, note };
  }

  setBusy(controller) {
    this.controller = controller;
    this.log.setAttribute("aria-busy", String(controller !== null));
    setText(this.send, controller ? "Stop" : "Send");
    this.send.classList.toggle("stop", controller !== null);
  }
}

function describe(usage, firstMs, allMs) {
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const seconds = (allMs / 1000).toFixed(allMs < 10_000 ? 2 : 0);
  const hits = cached ? ` · ${cached} of ${usage.prompt_tokens} prompt tokens from the cache` : "";
  return `${plural(usage.completion_tokens, "token")} in ${seconds} s, the first after ${Math.round(firstMs)} ms${hits}`;
}
