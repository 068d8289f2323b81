"use strict";
const $ = (id) => document.getElementById(id);
const [stage, before, canvas, after] = ["stage", "before", "mask", "after"].map($);
const paint = canvas.getContext("2d", { willReadFrequently: true });
const TINT = "#ff2fb0";
const MAX_CANVAS = 16e6; // pixels; some browsers refuse larger ones

let limits = { max_bytes: Infinity, max_pixels: Infinity };
let picture = null; // the uploaded File
let maskFile = null; // the chosen File, if any
let maskImage = null; // that file as a tinted canvas
let strokes = []; // {tool, size, points: [[x, y], ...]} in canvas pixels
let tool = "outline";
let running = null; // AbortController

// ---- picture and mask ----

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

async function decode(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(image.src);
    throw new Error(`${file.name}: this browser cannot show it; save it as PNG or JPEG`);
  }
  if (image.naturalWidth * image.naturalHeight >= limits.max_pixels) {
    throw new Error(`${file.name}: ${limits.max_pixels / 1e6} megapixels or more; make it smaller`);
  }
  return image;
}

async function setPicture(file) {
  const image = await decode(file);
  URL.revokeObjectURL(before.src);
  picture = file;
  before.src = image.src;
  await before.decode();
  const scale = Math.min(1, Math.sqrt(MAX_CANVAS / (image.naturalWidth * image.naturalHeight)));
  canvas.width = Math.round(image.naturalWidth * scale);
  canvas.height = Math.round(image.naturalHeight * scale);
  maskFile = maskImage = cut = null;
  strokes = [];
  $("mask-file").value = "";
  $("picture-name").textContent = `${file.name}, ${image.naturalWidth} × ${image.naturalHeight}`;
  $("drop").hidden = true;
  $("kind").value = file.type === "image/jpeg" ? "jpg" : "png";
  stage.classList.remove("empty");
  forget();
}

async function setMask(file) {
  if (!picture) throw new Error("choose the composite first, then its mask");
  const image = await decode(file);
  const layer = new OffscreenCanvas(canvas.width, canvas.height);
  const context = layer.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, layer.width, layer.height);
  const pixels = context.getImageData(0, 0, layer.width, layer.height);
  const data = pixels.data;
  const alphas = new Set(); // which of them is the mask is decided as on the server, which refuses what is ambiguous
  for (let i = 3; i < data.length; i += 4) alphas.add(data[i] > 127);
  const from = $("mask-from").value === "auto" && alphas.size > 1 ? "alpha" : $("mask-from").value;
  for (let i = 0; i < data.length; i += 4) {
    const level = from === "alpha" ? data[i + 3] : 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2];
    data.set([255, 47, 176, level > 127 ? 255 : 0], i);
  }
  context.putImageData(pixels, 0, 0);
  URL.revokeObjectURL(image.src);
  maskFile = file;
  maskImage = layer;
  strokes = [];
  cut = null;
  const size = [image.naturalWidth, image.naturalHeight];
  const fits = size[0] === before.naturalWidth && size[1] === before.naturalHeight;
  forget();
  $("fit").hidden = fits;
  $("fit-mask").checked = false;
  $("mask-name").textContent = fits ? file.name : `${file.name} is ${size.join(" × ")}: another size`;
}

function redraw() {
  paint.globalCompositeOperation = "source-over";
  paint.clearRect(0, 0, canvas.width, canvas.height);
  if (cut) drawCutout();
  if (maskImage) paint.drawImage(maskImage, 0, 0);
  strokes.forEach(drawStroke);
  $("go").disabled = !picture || !(cut || maskImage || strokes.length) || Boolean(running);
  $("undo").disabled = !strokes.length;
}

function drawStroke({ tool, size, points }) {
  paint.globalCompositeOperation = tool === "eraser" ? "destination-out" : "source-over";
  paint.fillStyle = paint.strokeStyle = TINT;
  paint.lineWidth = size;
  paint.lineCap = paint.lineJoin = "round";
  paint.beginPath();
  points.forEach(([x, y]) => paint.lineTo(x, y));
  if (points.length === 1) paint.lineTo(points[0][0] + 0.01, points[0][1]);
  if (tool === "outline") paint.fill();
  else paint.stroke();
}

/** The mask to send: the chosen file as it is, or what was drawn as black and white PNG. */
function maskBlob() {
  if (maskFile && !strokes.length) return maskFile;
  const layer = new OffscreenCanvas(canvas.width, canvas.height);
  const context = layer.getContext("2d");
  context.drawImage(canvas, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, layer.width, layer.height);
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#000";
  context.fillRect(0, 0, layer.width, layer.height);
  return layer.convertToBlob({ type: "image/png" });
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  $("download").hidden = true;
  if (cut) return grab(place(event));
  const short = Math.min(canvas.width, canvas.height);
  const size = tool === "outline" ? 1 : Math.max(1, ($("brush").value / 100) ** 2 * short * 0.5);
  strokes.push({ tool, size, points: [place(event)] });
  redraw();
});
canvas.addEventListener("pointermove", (event) => {
  if (!canvas.hasPointerCapture(event.pointerId)) return;
  if (cut) return drag(place(event));
  strokes.at(-1).points.push(...(event.getCoalescedEvents?.() ?? [event]).map(place));
  if (tool === "outline") redraw();
  else drawStroke({ ...strokes.at(-1), points: strokes.at(-1).points.slice(-8) });
});
canvas.addEventListener("pointerup", redraw);
canvas.addEventListener("pointercancel", redraw);

document.querySelectorAll("[data-tool]").forEach((button) =>
  button.addEventListener("click", () => {
    tool = button.dataset.tool;
    document.querySelectorAll("[data-tool]").forEach((b) => b.setAttribute("aria-pressed", b === button));
  })
);
$("undo").addEventListener("click", () => {
  strokes.pop();
  redraw();
});
$("clear").addEventListener("click", () => {
  strokes = [];
  maskFile = maskImage = null;
  $("mask-file").value = $("mask-name").textContent = "";
  $("fit").hidden = true;
  redraw();
});

// ---- views ----

function show(comparing) {
  const ready = Boolean(picture);
  before.hidden = !ready;
  canvas.hidden = !ready || (comparing && !cut); // a cut-out belongs to what is compared with
  canvas.classList.toggle("placing", Boolean(cut));
  $("tools").hidden = !ready || comparing || Boolean(cut);
  $("placing").hidden = !cut || comparing;
  if (!cut) $("cutout-file").value = $("cutout-name").textContent = "";
  for (const id of ["after", "cut", "compare", "views"]) $(id).hidden = !comparing;
  stage.classList.toggle("comparing", comparing);
}

/** Drop the last result: the picture, the mask or a setting is another one now. */
function forget() {
  if (after.src) URL.revokeObjectURL(after.src);
  after.removeAttribute("src");
  $("download").hidden = true;
  $("mask-name").textContent = "";
  $("fit").hidden = true;
  fail("");
  show(false);
  redraw();
}

function cutAt(percent) {
  stage.style.setProperty("--at", `${percent}%`);
  $("compare").value = percent;
}
$("compare").addEventListener("input", () => cutAt($("compare").value));
for (const kind of ["pointerdown", "pointermove"]) {
  stage.addEventListener(kind, (event) => {
    if (after.hidden || !(event.buttons & 1)) return;
    const box = stage.getBoundingClientRect();
    cutAt(Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width)));
  });
}
before.addEventListener("dragstart", (event) => event.preventDefault());
$("edit").addEventListener("click", () => show(false));
$("strength").addEventListener("input", () => ($("strength-value").textContent = `${$("strength").value} %`));

// ---- files in ----

const guarded = (work) => async (...given) => {
  try {
    fail("");
    await work(...given);
  } catch (error) {
    fail(error.message);
  }
};
$("picture").addEventListener("change", guarded(async () => $("picture").files[0] && (await setPicture($("picture").files[0]))));
$("mask-file").addEventListener("change", guarded(async () => $("mask-file").files[0] && (await setMask($("mask-file").files[0]))));
$("mask-from").addEventListener("change", guarded(async () => maskFile && (await setMask(maskFile))));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  stage.classList.add("over");
});
document.addEventListener("dragleave", () => stage.classList.remove("over"));
document.addEventListener("drop", guarded(async (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  const files = [...event.dataTransfer.files];
  if (files.length > 2) throw new Error("drop one composite, one mask, or both");
  if (files.length === 2) files.sort((a, b) => /mask/i.test(a.name) - /mask/i.test(b.name));
  if (files.length === 2 || (files.length && !picture)) await setPicture(files.shift());
  if (files.length) await setMask(files[0]);
}));

async function setUp() {
  limits = await (await fetch("setup")).json();
  $("model").append(...limits.models.map((name) => new Option(name)));
  for (const name of limits.examples) {
    const button = document.createElement("button");
    const image = new Image();
    const path = `examples/${encodeURIComponent(name)}`;
    button.type = "button";
    button.title = image.alt = name;
    image.src = `${path}/picture`;
    button.append(image);
    button.addEventListener("click", guarded(async () => {
      const [photo, mask] = await Promise.all(["picture", "mask"].map(async (part) => (await fetch(`${path}/${part}`)).blob()));
      await setPicture(new File([photo], `${name}.jpg`, { type: "image/jpeg" }));
      await setMask(new File([mask], `${name} mask.png`, { type: "image/png" }));
    }));
    $("examples").append(button);
  }
}

// ---- harmonize ----

function join(first, second) {
  const both = new Uint8Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}

/** Calls `line` with each JSON line of the answer; returns {name, type, data: Blob}. */
async function receive(answer, line) {
  const reader = answer.body.getReader();
  let text = new Uint8Array();
  let head = null;
  const parts = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (head) {
      parts.push(value);
      continue;
    }
    text = join(text, value);
    for (let end; !head && (end = text.indexOf(10)) >= 0; text = text.slice(end + 1)) {
      const state = JSON.parse(new TextDecoder().decode(text.slice(0, end)));
      if (state.error) throw new Error(state.error);
      if (state.bytes) head = state;
      else line(state);
    }
    if (head) parts.push(text);
  }
  const data = head && new Blob(parts, { type: head.type });
  if (!head || data.size !== head.bytes) throw new Error("the answer broke off; is `harmonylib app` still running?");
  return { ...head, data };
}

$("form").addEventListener("submit", guarded(async (event) => {
  event.preventDefault();
  await ready; // pressed before the models were known
  const body = new FormData();
  const mask = cut ? cut.file : await maskBlob();
  if (mask === maskFile && !$("fit").hidden && !$("fit-mask").checked) {
    throw new Error(`${$("mask-name").textContent}; tick "Resize the mask" or choose another`);
  }
  if (picture.size + mask.size > limits.max_bytes - 65536) {
    throw new Error(`the two pictures are over ${limits.max_bytes >> 20} MB together; make them smaller`);
  }
  body.append("picture", picture, picture.name);
  body.append("strength", $("strength").value / 100);
  if (cut) {
    body.append("cutout", mask, mask.name);
    Object.entries(placed()).forEach(([name, value]) => body.append(name, value));
  } else {
    body.append("mask", mask, "the mask");
    body.append("fit_mask", mask === maskFile ? $("fit-mask").checked : true);
    body.append("mask_from", mask === maskFile ? $("mask-from").value : "luminance");
  }
  for (const id of ["model", "seed", "feather", "kind"]) body.append(id, $(id).value);

  running = new AbortController();
  $("cancel").hidden = $("status").hidden = false;
  $("download").hidden = true;
  redraw();
  try {
    const answer = await fetch("harmonize", { method: "POST", body, signal: running.signal });
    if (!answer.ok) throw new Error((await answer.json()).error);
    const { name, data } = await receive(answer, ({ stage, step, steps }) => {
      $("stage-name").textContent = steps ? `${stage}, step ${step} of ${steps}` : `${stage} …`;
      if (steps) [$("bar").value, $("bar").max] = [step, steps];
      else $("bar").removeAttribute("value");
    });
    if (after.src) URL.revokeObjectURL(after.src);
    after.src = URL.createObjectURL(data);
    await after.decode();
    [$("download").href, $("download").download] = [after.src, name];
    $("download").hidden = false;
    cutAt(50);
    show(true);
    $("views").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (error.name === "TypeError") throw new Error("no answer; is `harmonylib app` still running?");
    if (error.name !== "AbortError") throw error;
  } finally {
    running = null;
    $("cancel").hidden = $("status").hidden = true;
    redraw();
  }
}));
$("cancel").addEventListener("click", () => running?.abort());

const ready = guarded(setUp)();
