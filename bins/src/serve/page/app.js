// The page of l2p-serve. Texts from elsewhere become text and never markup.

import { Compare } from "./compare.js";
import { follow } from "./events.js";
import { History } from "./history.js";
import { Board } from "./mask.js";

const at = (id) => document.getElementById(id);
const SIDES = [64, 128, 256, 512, 768, 1024, 1536, 2048, 4096];

let info = null;
let history = null;
let running = null;
let shown = null;
let begun = null;
const chosen = [];

function say(text) {
  at("status").textContent = text;
}

function fail(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

// Asks the server, with the key that it may want; the error is its own line.
async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    await askForKey();
    return ask(path, options);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
  }
  return response;
}

function askForKey() {
  return new Promise((done) => {
    at("key").addEventListener(
      "close",
      () => {
        sessionStorage.setItem("key", at("key-text").value);
        done();
      },
      { once: true },
    );
    at("key").showModal();
  });
}

function model() {
  return info.models.find((one) => one.id === at("model").value) ?? info.models[0];
}

function rounded(side) {
  const { multiple, max_side: most } = model();
  return Math.min(Math.ceil(Math.max(1, side) / multiple) * multiple, Math.ceil(most / multiple) * multiple);
}

function showRounding() {
  const [width, height] = ["width", "height"].map((id) => Number(at(id).value));
  const other = rounded(width) !== width || rounded(height) !== height;
  at("preset").value = `${width}x${height}`;
  if (at("preset").selectedIndex < 0) at("preset").value = "";
  at("rounded").hidden = !other;
  at("rounded").textContent = `Drawn at ${rounded(width)} × ${rounded(height)}: this model draws multiples of ${model().multiple}.`;
}

function takeDefaults() {
  const usual = model().default;
  for (const id of ["width", "height", "steps", "cfg", "shift"]) at(id).value = usual[id];
  const preset = at("preset");
  preset.replaceChildren(new Option("own", ""));
  const sides = SIDES.filter((side) => side % model().multiple === 0 && side <= model().max_side);
  const sizes = sides.flatMap((side) => [[side, side], [side, side / 2], [side / 2, side]]);
  const sound = ([width, height]) => width % model().multiple === 0 && height % model().multiple === 0;
  for (const [width, height] of sizes.filter(sound)) preset.append(new Option(`${width} × ${height}`, `${width}x${height}`));
  preset.value = `${usual.width}x${usual.height}`;
  if (preset.selectedIndex < 0) preset.value = "";
  showRounding();
}

function takeSettings(settings) {
  for (const id of ["prompt", "negative", "width", "height", "steps", "cfg", "shift", "seed"]) at(id).value = settings[id];
  if (info.models.some((one) => one.id === settings.model)) at("model").value = settings.model;
  at("preset").value = `${settings.width}x${settings.height}`;
  if (at("preset").selectedIndex < 0) at("preset").value = "";
  showRounding();
}

function request() {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const body = {
    model: at("model").value,
    prompt: at("prompt").value,
    negative: at("negative").value,
    steps: number("steps"),
    cfg: number("cfg"),
    shift: number("shift"),
    seed: number("seed"),
    count: number("count"),
  };
  if (begun) {
    body.image = begun;
    const painted = board.isPainted();
    body.strength = painted ? 1 : Number(at("strength").value);
    if (painted) body.mask = board.toBase64();
    else [body.width, body.height] = [number("width"), number("height")];
  } else {
    [body.width, body.height] = [number("width"), number("height")];
  }
  return body;
}

// The figure of a picture's number, made when it is first spoken of.
function figure(index) {
  while (at("shown").children.length <= index) {
    const made = document.createElement("figure");
    made.append(document.createElement("img"), document.createElement("figcaption"));
    at("shown").append(made);
  }
  return at("shown").children[index];
}

function eta(start, done, total) {
  if (!done) return "";
  const left = ((performance.now() - start) / done) * (total - done);
  return `, ${(left / 1000).toFixed(left < 10000 ? 1 : 0)} s left`;
}

async function draw() {
  if (running || !at("form").reportValidity()) return;
  running = new AbortController();
  fail("");
  at("shown").replaceChildren();
  at("draw").disabled = true;
  at("cancel").disabled = false;
  at("progress").hidden = false;
  at("progress").removeAttribute("value");
  say("Waiting");
  let begin = null;
  const told = async (name, data) => {
    if (name === "accepted" || name === "queued") {
      say(data.position ? `Waiting behind ${data.position}` : "Waiting");
    } else if (name === "step") {
      begin ??= performance.now();
      at("progress").value = data.done / data.total;
      say(`Step ${data.done} of ${data.total}${eta(begin, data.done - 1, data.total)}`);
    } else if (name === "preview") {
      const image = figure(data.index).firstElementChild;
      image.className = "partial";
      image.alt = "preview";
      image.src = data.image;
      document.body.dataset.previews = Number(document.body.dataset.previews ?? 0) + 1;
    } else if (name === "picture") {
      const blob = bytesOf(data.image);
      const kept = await history.add({ blob, settings: data.settings, at: Date.now() });
      show(kept, data.index);
      await listHistory();
    } else if (name === "done") {
      say(`Done in ${data.seconds.toFixed(1)} s`);
    } else if (name === "error") {
      throw new Error(data.message);
    }
  };
  try {
    const response = await ask("/api/draw", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(request()),
      signal: running.signal,
    });
    await follow(response, told);
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled");
    else {
      say("");
      fail(error.message);
    }
  }
  running = null;
  at("draw").disabled = false;
  at("cancel").disabled = true;
  at("progress").hidden = true;
}

// The bytes of a data URL, which the page may not fetch.
function bytesOf(url) {
  const [head, data] = url.split(",");
  const text = atob(data);
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: head.slice(5).split(";")[0] });
}

function link(kept, text) {
  const made = document.createElement("a");
  made.href = kept.url;
  made.download = `${kept.settings.seed}.${kept.blob.type.split("/")[1] ?? "png"}`;
  made.textContent = text;
  return made;
}

function show(kept, index) {
  kept.url ??= URL.createObjectURL(kept.blob);
  shown = kept;
  const [image, caption] = figure(index).children;
  image.className = "";
  image.src = kept.url;
  image.alt = kept.settings.prompt;
  const { width, height, seed, steps } = kept.settings;
  const words = document.createElement("span");
  words.textContent = `seed ${seed}, ${width} × ${height}, ${steps} steps`;
  caption.replaceChildren(words, link(kept, "Save"));
}

function button(text, act, label) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  if (label) made.title = label;
  made.addEventListener("click", act);
  return made;
}

async function listHistory() {
  const all = await history.all();
  at("nothing").hidden = all.length > 0;
  const entries = all.map((kept) => {
    kept.url = urls.get(kept.id) ?? URL.createObjectURL(kept.blob);
    urls.set(kept.id, kept.url);
    const entry = document.createElement("li");
    const image = document.createElement("img");
    image.src = kept.url;
    image.alt = kept.settings.prompt;
    image.tabIndex = 0;
    image.loading = "lazy";
    const open = () => {
      at("shown").replaceChildren();
      show(kept, 0);
    };
    image.addEventListener("click", open);
    image.addEventListener("keydown", (event) => {
      const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
      if (step) entry[step]?.firstElementChild.focus();
      if (event.key === "Enter") open();
      if (event.key === "Delete") forget();
    });
    const forget = async () => {
      await history.remove(kept.id);
      URL.revokeObjectURL(kept.url);
      urls.delete(kept.id);
      await listHistory();
    };
    const words = document.createElement("p");
    words.textContent = kept.settings.prompt;
    const compare = () => {
      const place = chosen.findIndex((one) => one.id === kept.id);
      if (place >= 0) chosen.splice(place, 1);
      else chosen.push(kept);
      if (chosen.length > 2) chosen.shift();
      mark();
      if (chosen.length === 2) sides.show(chosen);
    };
    const buttons = document.createElement("div");
    buttons.className = "buttons";
    buttons.append(
      button("Use", () => takeSettings(kept.settings), "Take the settings of this picture"),
      button("Edit", () => begin(kept.blob), "Begin with this picture"),
      button("Compare", compare, "Choose two to see them side by side"),
      button("Delete", forget),
    );
    entry.dataset.id = kept.id;
    entry.append(image, words, buttons);
    return entry;
  });
  at("history").replaceChildren(...entries);
  mark();
}

function mark() {
  for (const entry of at("history").children) {
    entry.classList.toggle("chosen", chosen.some((one) => String(one.id) === entry.dataset.id));
  }
}

// Begins with a picture from a file.
async function begin(blob) {
  try {
    const image = await createImageBitmap(blob);
    begun = await new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result.split(",")[1]);
      reader.onerror = () => failed(reader.error);
      reader.readAsDataURL(blob);
    });
    board.show(image);
    at("edit").open = true;
    at("begun").hidden = false;
    at("drop").hidden = true;
    [at("width").value, at("height").value] = [image.width, image.height];
    showRounding();
  } catch {
    fail("this file is no picture that the browser can show");
  }
}

function leave() {
  begun = null;
  at("begun").hidden = true;
  at("drop").hidden = false;
}

// A PNG with settings gives them; any other picture is one to begin with.
async function drop(file) {
  fail("");
  if (file.type === "image/png") {
    try {
      const response = await ask("/api/settings", { method: "POST", body: file });
      takeSettings(await response.json());
      say("The settings of the picture are taken");
      return;
    } catch {
      // It carries none.
    }
  }
  await begin(file);
}

const urls = new Map();
const sides = new Compare(at("compare"));
const board = new Board(at("picture"), at("mask"), () => {
  at("strength").disabled = Boolean(begun) && board.isPainted();
});

function listen() {
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  at("cancel").addEventListener("click", () => running?.abort());
  at("model").addEventListener("change", takeDefaults);
  for (const id of ["width", "height"]) at(id).addEventListener("input", showRounding);
  at("preset").addEventListener("change", () => {
    if (!at("preset").value) return;
    [at("width").value, at("height").value] = at("preset").value.split("x");
    showRounding();
  });
  at("same").addEventListener("click", () => {
    if (shown) at("seed").value = shown.settings.seed;
  });
  at("random").addEventListener("click", () => (at("seed").value = ""));
  at("strength").addEventListener("input", () => (at("strength-value").textContent = at("strength").value));
  at("radius").addEventListener("input", () => (board.radius = Number(at("radius").value)));
  for (const id of ["brush", "eraser"]) {
    at(id).addEventListener("click", () => {
      board.erases = id === "eraser";
      at("brush").setAttribute("aria-pressed", String(!board.erases));
      at("eraser").setAttribute("aria-pressed", String(board.erases));
    });
  }
  at("undo").addEventListener("click", () => board.undo());
  at("invert").addEventListener("click", () => board.invert());
  at("clear").addEventListener("click", () => board.clear());
  at("leave").addEventListener("click", leave);
  at("uncompare").addEventListener("click", () => (at("compare").hidden = true));
  at("drop").addEventListener("click", () => at("file").click());
  at("drop").addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") at("file").click();
  });
  at("file").addEventListener("change", () => at("file").files[0] && begin(at("file").files[0]));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw();
    if (event.key === "Escape" && !at("key").open) running?.abort();
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
  document.addEventListener("dragleave", () => document.body.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    const file = event.dataTransfer.files[0];
    if (!file) return;
    if (event.target.closest?.("#drop")) begin(file);
    else drop(file);
  });
}

async function main() {
  listen();
  at("strength-value").textContent = at("strength").value;
  try {
    info = await (await ask("/api/info")).json();
  } catch (error) {
    fail(error.message);
    return;
  }
  at("about").textContent = `${info.version} on ${info.device}`;
  for (const one of info.models) at("model").append(new Option(`${one.id} (${one.kind})`, one.id));
  at("count").max = info.limits.count;
  takeDefaults();
  history = await History.open();
  await listHistory();
  document.body.dataset.ready = "yes";
}

main();
