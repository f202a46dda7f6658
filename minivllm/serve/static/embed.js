// A recorded trace on any page, without a server: <div data-trace="run.trace.jsonl"></div>, this module and viewer.css.
// With an empty attribute the page's address names the file: ?trace=run.trace.jsonl. With data-play it begins to play.

import { h, setText } from "./dom.js";
import { Player } from "./player.js";
import { Viewer } from "./viewer.js";

async function embed(element) {
  const address = element.dataset.trace || new URLSearchParams(location.search).get("trace");
  if (!address) return;
  const [bar, problem, panels] = [h("div"), h("p", { class: "note", role: "alert" }), h("div", { class: "viewer" })];
  element.append(problem, bar, panels);
  const player = new Player(new Viewer(panels), { canClose: false });
  bar.append(player.element);
  try {
    const response = await fetch(address);
    if (!response.ok) throw new Error(`there is none (${response.status}).`);
    player.open(address.split("/").at(-1), await response.text());
    if ("play" in element.dataset && !matchMedia("(prefers-reduced-motion: reduce)").matches) player.start();
  } catch (error) {
    setText(problem, `${address}: ${error.message}`);
  }
}

for (const element of document.querySelectorAll("[data-trace]")) embed(element);
