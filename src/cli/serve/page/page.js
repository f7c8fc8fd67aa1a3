// The page of megafuse serve: it asks the same routes as every other client. Texts of users and files become text nodes, never markup.
"use strict";

const by = (id) => document.getElementById(id);
const form = by("form");
const FIELDS = ["prompt", "negative_prompt", "method", "size", "steps", "guidance", "seed", "scheduler", "count", "stages", "model"];
const NUMBERS = ["steps", "guidance", "count"];

let token = sessionStorage.getItem("token") || "";
let methods = [];
let models = [];
let shownPicture = null;

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

function askForToken() {
  const dialog = by("login");
  if (!dialog.open) dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => {
    token = by("token").value;
    by("token").value = "";
    sessionStorage.setItem("token", token);
    done();
  }, { once: true }));
}

// A reply, once the server knows us. Credentials are ours alone, so that the browser asks for none.
async function ask(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers };
    if (token) headers.Authorization = `Bearer ${token}`;
    if (options.body) headers["Content-Type"] = "application/json";
    const reply = await fetch(path, { ...options, headers, credentials: "omit" });
    if (reply.status !== 401) return reply;
    await askForToken();
  }
}

async function json(path, options) {
  const reply = await ask(path, options);
  const body = await reply.json();
  if (!reply.ok) throw new Error(body.error?.message || `the server says ${reply.status}`);
  return body;
}

// What the form says, as the fields of a job; what is empty is the server's to choose.
function settings() {
  const body = {};
  for (const name of FIELDS) {
    const text = by(name).value.trim();
    if (text === "") continue;
    body[name] = NUMBERS.includes(name) ? Number(text) : text;
  }
  if (body.stages) { delete body.size; delete body.steps; }
  body.prompt ??= "";
  for (const input of by("fields").querySelectorAll("[data-option]")) {
    const value = input.type === "checkbox" ? input.checked || "" : input.value.trim();
    if (value !== "") body[input.dataset.option] = value;
  }
  return body;
}

// Puts the fields of a picture's own text into the form.
function use(fields) {
  for (const name of FIELDS) {
    if (name === "count" || (name === "model" && !models.some((model) => model.name === fields.model))) continue;
    const value = fields[name] ?? "";
    by(name).value = Array.isArray(value) ? value.join(",") : value;
  }
  // One stage is what size and steps say already.
  if (!methods.find((method) => method.name === fields.method)?.relays) by("stages").value = "";
  showMethod();
  for (const input of by("fields").querySelectorAll("[data-option]")) {
    const value = fields[input.dataset.option];
    if (input.type === "checkbox") input.checked = value === true;
    else input.value = value ?? "";
  }
  estimate();
  by("prompt").focus();
}

function showMethod() {
  const method = methods.find((one) => one.name === by("method").value);
  by("summary").textContent = method ? method.summary : "";
  const fields = by("fields");
  fields.replaceChildren();
  for (const option of method ? method.options : []) {
    const id = `option-${option.name}`;
    const label = element("label", { htmlFor: id, textContent: option.name.replaceAll("_", " ") });
    let input;
    if (option.kind === "switch") {
      input = element("input", { type: "checkbox", id });
      fields.append(element("div", { className: "switch" }, input, label));
    } else if (option.values.length) {
      input = element("select", { id }, element("option", { value: "", textContent: "own" }));
      option.values.forEach((value) => input.append(element("option", { value, textContent: value })));
      fields.append(label, input);
    } else {
      input = element("input", { id, placeholder: option.expects || "own", autocomplete: "off" });
      fields.append(label, input);
    }
    input.dataset.option = option.name;
    input.title = option.help;
  }
  by("options").hidden = !fields.childElementCount;
}

// The cost of what the form says, a little after the last key.
let pause = 0;
let asked = 0;
function estimate() {
  clearTimeout(pause);
  pause = setTimeout(async () => {
    const number = ++asked;
    let text = "", problem = "";
    try {
      const plan = await json("/v1/plan", { method: "POST", body: JSON.stringify(settings()) });
      const size = (bytes) => bytes > 5e8 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(0)} MB`;
      text = `${plan.stages.join(", ")} — ${(plan.flops / 1e12).toPrecision(3)} TFLOP, ${size(plan.peak_bytes)}`;
      if (plan.seconds) text += `, about ${seconds(plan.seconds)} per picture`;
    } catch (error) {
      problem = error.message;
    }
    if (number !== asked) return;
    by("estimate").textContent = text;
    by("problem").textContent = problem;
  }, 250);
}

function seconds(value) {
  if (value < 90) return `${value.toPrecision(2)} s`;
  return value < 5400 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

async function make(event) {
  event?.preventDefault();
  if (!form.reportValidity()) return;
  const body = settings();
  const compared = [...by("compare").querySelectorAll("input:checked")].map((box) => box.value);
  by("problem").textContent = "";
  try {
    if (!compared.length) return watch([await submit(body)], body.prompt);
    // The same seed for all; options belong to one method and are left to the others' defaults.
    const seed = body.seed ?? String(Math.floor(Math.random() * 2 ** 32));
    const common = Object.fromEntries(["prompt", "negative_prompt", "guidance", "scheduler", "count", "model"].filter((name) => name in body).map((name) => [name, body[name]]));
    if (body.size) common.size = body.size;
    if (body.steps) common.steps = body.steps;
    const jobs = [];
    for (const method of compared) jobs.push(await submit({ ...common, seed, method }));
    watch(jobs, body.prompt, compared);
  } catch (error) {
    by("problem").textContent = error.message;
  }
}

const submit = (body) => json("/v1/jobs", { method: "POST", body: JSON.stringify(body) });

// A card for jobs that belong together, which follows them to their ends.
function watch(jobs, title, names = []) {
  by("nothing").hidden = true;
  const line = element("p", { className: "quiet" });
  line.setAttribute("role", "status");
  const bar = element("progress", { max: 1, value: 0 });
  bar.setAttribute("aria-label", `Progress of ${title}`);
  const pictures = element("div", { className: "pictures" });
  const cancel = element("button", { type: "button", textContent: "Cancel" });
  const head = element("div", { className: "head" }, element("h2", { textContent: title || "(no prompt)" }), cancel);
  by("jobs").prepend(element("article", { className: "job" }, head, bar, line, pictures));
  const states = jobs.map((job) => job);
  const seen = new Set();
  cancel.addEventListener("click", () => jobs.forEach((job) => ask(`/v1/jobs/${job.id}`, { method: "DELETE" })));
  const show = () => {
    const share = (job) => (job.made + (job.state === "running" ? job.step / Math.max(job.steps, 1) : 0)) / job.count;
    bar.value = states.reduce((sum, job) => sum + Math.min(share(job), 1), 0) / states.length;
    const over = states.every((job) => ["done", "failed", "cancelled"].includes(job.state));
    const running = states.find((job) => job.state === "running") || states.find((job) => job.state === "queued");
    cancel.hidden = bar.hidden = over;
    const warnings = [...new Set(states.flatMap((job) => job.warnings))].join("; ");
    const errors = states.filter((job) => job.error).map((job) => job.error).join("; ");
    line.className = errors ? "wrong" : "quiet";
    line.textContent = [errors || (over ? (states.some((job) => job.state === "cancelled") ? "cancelled" : "") : describe(running)), warnings]
      .filter(Boolean).join(" — ");
  };
  jobs.forEach((job, index) => follow(job.id, (status) => {
    states[index] = status;
    for (const picture of status.pictures) {
      if (seen.has(picture.url)) continue;
      seen.add(picture.url);
      pictures.append(figure(picture, names[index]));
    }
    show();
  }));
  show();
}

function describe(job) {
  if (job.state === "queued") return job.before ? `queued, ${job.before} picture(s) before it` : "queued";
  let text = `step ${job.step} of ${job.steps}`;
  if (job.stages > 1) text += `, stage ${job.stage} of ${job.stages}`;
  if (job.size) text += ` at ${job.size}`;
  if (job.steps_per_second) text += `, ${job.steps_per_second.toPrecision(2)} steps/s`;
  if (job.eta_seconds) text += `, ${seconds(job.eta_seconds)} left`;
  return text;
}

// Server-sent events by fetch, which can send the token.
async function follow(id, tell) {
  try {
    const reply = await ask(`/v1/jobs/${id}/events`);
    if (!reply.ok) throw new Error(`the server says ${reply.status}`);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "";;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
        if (data) tell(JSON.parse(data));
      }
    }
  } catch (error) {
    tell({ id, state: "failed", error: `the server cannot be reached: ${error.message}`, made: 0, step: 0, steps: 1, count: 1, warnings: [], pictures: [] });
  }
}

function figure(picture, name) {
  const image = element("img", { alt: picture.parameters.prompt, width: picture.width, height: picture.height });
  const button = element("button", { type: "button", title: "Show it large" }, image);
  const words = [name, `seed ${picture.seed}`, `${picture.width}x${picture.height}`].filter(Boolean).join(", ");
  ask(picture.url).then((reply) => reply.blob()).then((blob) => { image.src = URL.createObjectURL(blob); });
  button.addEventListener("click", () => show(picture, image.src));
  return element("figure", {}, button, element("figcaption", { textContent: words }));
}

function show(picture, source) {
  shownPicture = picture;
  by("shown-picture").src = source;
  by("shown-picture").alt = picture.parameters.prompt;
  by("shown-text").textContent = picture.infotext;
  by("shown-save").href = source;
  by("shown-save").download = `megafuse-${picture.seed}.png`;
  by("shown").showModal();
}

// The text `megafuse` of a PNG (chunks tEXt and iTXt without compression, as this program writes them).
function textOf(buffer) {
  const view = new DataView(buffer);
  if (buffer.byteLength < 8 || view.getUint32(0) !== 0x89504e47) throw new Error("this is no PNG");
  for (let at = 8; at + 12 <= buffer.byteLength;) {
    const length = view.getUint32(at);
    const bytes = new Uint8Array(buffer, at + 8, Math.min(length, buffer.byteLength - at - 8));
    const kind = String.fromCharCode(...new Uint8Array(buffer, at + 4, 4));
    const end = bytes.indexOf(0);
    if ((kind === "tEXt" || kind === "iTXt") && new TextDecoder("latin1").decode(bytes.slice(0, end)) === "megafuse") {
      if (kind === "tEXt") return JSON.parse(new TextDecoder("latin1").decode(bytes.slice(end + 1)));
      const language = bytes.indexOf(0, end + 3), translated = bytes.indexOf(0, language + 1);
      return JSON.parse(new TextDecoder().decode(bytes.slice(translated + 1)));
    }
    at += length + 12;
  }
  throw new Error("this PNG does not say how it was made by megafuse");
}

async function take(file) {
  if (!file) return;
  try {
    use(textOf(await file.arrayBuffer()));
  } catch (error) {
    by("problem").textContent = `${file.name}: ${error.message}`;
  }
}

async function begin() {
  const known = await json("/v1/methods");
  methods = known.methods;
  models = known.models;
  by("server").textContent = `${models.map((model) => model.name).join(", ")}, ${known.dtype} on ${known.device}`;
  for (const { name } of models) by("model").append(element("option", { value: name, textContent: name }));
  by("models").hidden = models.length < 2;
  const select = by("method");
  for (const method of methods) {
    const own = method.name === models[0].method;
    select.append(element("option", { value: method.name, textContent: own ? `${method.name} (this server's)` : method.name, selected: own }));
    const box = element("input", { type: "checkbox", value: method.name });
    by("compare").append(element("label", {}, box, method.name));
  }
  known.samplers.forEach((value) => by("scheduler").append(element("option", { value, textContent: value })));
  if (models[0].native) {
    const [width, height] = models[0].native.split("x").map(Number);
    for (const times of [1, 1.5, 2, 3, 4]) by("sizes").append(element("option", { value: `${width * times}x${height * times}` }));
  }
  showMethod();
  estimate();
  for (const job of (await json("/v1/jobs")).reverse()) {
    watch([job], job.pictures[0]?.parameters.prompt ?? "an earlier job");
  }
}

form.addEventListener("submit", make);
form.addEventListener("input", estimate);
by("method").addEventListener("change", () => { showMethod(); estimate(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) make(event);
});
by("repeat").addEventListener("click", () => by("file").click());
by("file").addEventListener("change", () => take(by("file").files[0]));
by("shown-close").addEventListener("click", () => by("shown").close());
by("shown-use").addEventListener("click", () => { by("shown").close(); use(shownPicture.parameters); });
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  take(event.dataTransfer.files[0]);
});
begin().catch((error) => { by("server").textContent = error.message; });
