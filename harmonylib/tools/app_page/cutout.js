"use strict";
// A cut-out on the picture: dragged, scaled and turned here as `placing.place` does it on the server.

let cut = null; // {file, image, x, y}: its centre, in the picture's pixels
let held = [0, 0]; // from there to where the pointer has hold of it

const ratio = () => canvas.width / before.naturalWidth; // of the canvas to the picture
const scale = () => 2 ** ($("scale").value / 50);
const sides = () => [cut.image.naturalWidth, cut.image.naturalHeight].map((side) => Math.max(1, Math.round(side * scale())));

/** The fields of a request; `at` is the upper left corner once scaled and before it is turned. */
function placed() {
  const [width, height] = sides();
  return { at: [cut.x - width / 2, cut.y - height / 2].map(Math.round), scale: scale(), angle: $("angle").value };
}

async function setCutout(file) {
  if (!picture) throw new Error("choose the background first, then the cut-out");
  const image = await decode(file);
  maskFile = maskImage = null;
  strokes = [];
  cut = { file, image, x: before.naturalWidth / 2, y: before.naturalHeight / 2 };
  const room = [before.naturalWidth / image.naturalWidth, before.naturalHeight / image.naturalHeight];
  $("scale").value = Math.floor(50 * Math.log2(Math.min(1, 0.7 * Math.min(...room))));
  $("angle").value = 0;
  $("mask-file").value = "";
  $("cutout-name").textContent = `${file.name}, ${image.naturalWidth} × ${image.naturalHeight}`;
  forget();
}

function drawCutout() {
  const [width, height] = sides();
  paint.setTransform(ratio(), 0, 0, ratio(), cut.x * ratio(), cut.y * ratio());
  paint.rotate((-$("angle").value * Math.PI) / 180);
  paint.drawImage(cut.image, -width / 2, -height / 2, width, height);
  paint.resetTransform();
  $("scale-value").textContent = `${(100 * scale()).toPrecision(3)} %`;
  $("angle-value").textContent = `${$("angle").value}°`;
}

function grab([x, y]) {
  held = [x / ratio() - cut.x, y / ratio() - cut.y];
}

function drag([x, y]) {
  [cut.x, cut.y] = [x / ratio() - held[0], y / ratio() - held[1]];
  redraw();
}

for (const id of ["scale", "angle"]) $(id).addEventListener("input", forget);
$("cutout-file").addEventListener("change", guarded(async () => $("cutout-file").files[0] && (await setCutout($("cutout-file").files[0]))));
$("cutout-clear").addEventListener("click", () => {
  cut = null;
  forget();
});
