// The page: chat on one side, the engine on the other, fed from the server or from a file.

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { setText } from "./dom.js";
import { Experiments } from "./experiments.js";
import { Player } from "./player.js";
import { Viewer } from "./viewer.js";
import { Watch } from "./watch.js";

const $ = (id) => document.getElementById(id);
const api = new Api(askForKey);
const HINT = "Nothing runs. Ask something in the chat, or send 8 requests at once, and watch their blocks.";
const viewer = new Viewer($("engine"), HINT);
const player = new Player(viewer, { onclose: leaveTrace });
const watch = new Watch(api, onEvent, onStatus);
const experiments = new Experiments($("experiments"), api);
new Chat($("chat"), api, (part) => viewer.names.claim(part));
$("player").append(player.element);

// Live ---------------------------------------------------------------------------------------------------------------------------

const clock = { engine: null, page: 0 }; // the engine's time of the newest record, and when it came
let isAllowed = null; // to hold the engine; null until the server has said it
let isPaused = false;
let isSlowed = false; // an engine that plans a step ahead does not while it is watched
let step = null; // of the engine that the records are from

function onEvent({ paused, records }) {
  setPaused(paused);
  for (const record of records) {
    if (record.type === "keyframe" && record.step < step) viewer.reset({ keepNames: false }); // the server was started anew
    step = record.step ?? step;
    viewer.feed(record);
    if (record.time !== undefined) Object.assign(clock, { engine: record.time, page: performance.now() });
  }
}

setInterval(() => {
  const silent = (performance.now() - clock.page) / 1000;
  if (clock.engine !== null && !isPaused && !player.isOpen && silent > 0.25) viewer.advance(clock.engine + silent);
}, 250);

function onStatus(status, reason = "") {
  const live = isPaused ? "Paused" : isSlowed ? "Live, slower while watched" : "Live";
  const words = { connecting: "Connecting", live, lost: "Not connected" };
  $("status").title = isSlowed ? "This engine plans a step ahead, but not while a page watches: a record is one whole step." : "";
  $("status").dataset.status = status === "live" && isPaused ? "paused" : status;
  setText($("status"), words[status]);
  setText($("problem"), status === "lost" ? `${reason} Trying again.` : "");
}

function setPaused(paused) {
  if (paused === isPaused) return;
  isPaused = paused;
  viewer.setStill(paused);
  $("pause").hidden = paused;
  $("resume").hidden = !paused;
  $("step").disabled = !paused;
  onStatus("live");
}

/** The engine's buttons, while it is the engine that is shown. */
function showControl() {
  $("control").hidden = !isAllowed || player.isOpen;
  $("no-control").hidden = isAllowed !== false || player.isOpen;
}

async function loadControl() {
  try {
    const [models, control] = await Promise.all([api.json("v1/models"), api.json("control")]);
    setText($("model"), models.data[0].id);
    experiments.longest = Math.max(16, Math.floor(models.data[0].max_model_len / 4));
    isAllowed = control.allowed;
    isSlowed = control.slows;
    showControl();
    if (player.isOpen) return;
    setPaused(control.paused);
    if (isSlowed && watch.status === "live") onStatus("live");
  } catch (error) {
    setText($("problem"), error.message);
  }
}

for (const action of ["pause", "step", "resume"]) {
  $(action).addEventListener("click", async () => {
    try {
      const { paused } = await api.json(`control/${action}`, { json: {} });
      setPaused(paused);
      if (action !== "step") $(paused ? "resume" : "pause").focus(); // the button that had it is gone
    } catch (error) {
      setText($("problem"), error.message);
    }
  });
}

// A recorded trace ---------------------------------------------------------------------------------------------------------------

function show(name, text) {
  try {
    player.open(name, text);
  } catch (error) {
    return setText($("problem"), `${name}: ${error.message}`);
  }
  watch.stop();
  showControl();
  step = null;
  $("status").dataset.status = "file";
  setText($("status"), "Recorded");
  setText($("problem"), "");
}

function leaveTrace() {
  viewer.setStill(isPaused);
  showControl();
  watch.start();
}

$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  if (file) show(file.name, await file.text());
  $("file").value = ""; // the same file can be chosen again
});
$("open").addEventListener("click", () => $("file").click());

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => !event.relatedTarget && document.body.classList.remove("dropping"));
addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (file) show(file.name, await file.text());
});

// The key ------------------------------------------------------------------------------------------------------------------------

function askForKey(wasWrong) {
  const dialog = $("key-dialog");
  $("key").value = "";
  setText($("key-problem"), wasWrong ? "The server does not know this key." : "");
  dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.addEventListener("close", () => {
      if (dialog.returnValue === "ok" && $("key").value) resolve($("key").value);
      else reject(new Error("This server wants an API key: reload the page to enter one."));
    }, { once: true });
    dialog.addEventListener("cancel", () => (dialog.returnValue = ""), { once: true });
  });
}

watch.start();
loadControl();
