// A recorded trace on any page, without a server: <div data-trace="run.trace.jsonl"></div>, this module and viewer.css.
// With an empty attribute the page's address names the file: ?trace=run.trace.jsonl. If that names none either, a file of the
// reader's own can be chosen or dropped, and it stays on the reader's machine. With data-play the trace begins to play.

import { h, setText } from "./dom.js";
import { Player } from "./player.js";
import { Viewer } from "./viewer.js";

function embed(element) {
  const address = element.dataset.trace || new URLSearchParams(location.search).get("trace");
  const [bar, problem, panels] = [h("div"), h("p", { class: "note", role: "alert" }), h("div", { class: "viewer" })];
  const player = new Player(new Viewer(panels), { canClose: false });
  bar.append(player.element);
  const open = async (name, read) => {
    setText(problem, "");
    try {
      player.open(name, await read());
      if ("play" in element.dataset && !matchMedia("(prefers-reduced-motion: reduce)").matches) player.start();
    } catch (error) {
      setText(problem, `${name}: ${error.message}`);
    }
  };
  element.append(...(address ? [] : [chooser((file) => open(file.name, () => file.text()))]), problem, bar, panels);
  if (address) open(address.split("/").at(-1), () => load(address));
}

async function load(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`there is none (${response.status}).`);
  return response.text();
}

function chooser(choose) {
  const onchange = ({ target }) => target.files.length && choose(target.files[0]);
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
  });
  const input = h("input", { type: "file", accept: ".jsonl,.json", onchange });
  return h("div", { class: "viewer chooser" }, h("label", {}, "A trace of your own, from LLM(trace=\"run.jsonl\"): ", input));
}

for (const element of document.querySelectorAll("[data-trace]")) embed(element);
