"use strict";
(() => {
  const holder = document.getElementById("points");
  if (!holder) return;
  const { size, columns, names, colours, points } = JSON.parse(holder.textContent);
  const canvas = document.getElementById("canvas"), box = document.getElementById("shown");
  const thumb = document.getElementById("thumb"), words = document.getElementById("words");
  const pen = canvas.getContext("2d"), hidden = new Set(), edge = 14;
  const zoom = 96 / size, rows = Math.ceil(points.length / columns);
  thumb.style.backgroundSize = `${columns * size * zoom}px ${rows * size * zoom}px`;
  let current = -1, width = 0, height = 0;
  const at = (p) => [edge + p[0] * (width - 2 * edge), edge + p[1] * (height - 2 * edge)];

  function draw() {
    const scale = window.devicePixelRatio || 1;
    width = canvas.clientWidth; height = canvas.clientHeight;
    canvas.width = width * scale; canvas.height = height * scale;
    pen.scale(scale, scale);
    points.forEach((p, n) => {
      if (hidden.has(p[2])) return;
      const [x, y] = at(p);
      pen.beginPath(); pen.fillStyle = pen.strokeStyle = colours[p[2]]; pen.lineWidth = 1.5;
      if (p[3]) { pen.rect(x - 3, y - 3, 6, 6); pen.stroke(); } else { pen.arc(x, y, 3.5, 0, 7); pen.fill(); }
      if (n === current) { pen.beginPath(); pen.strokeStyle = "#d35400"; pen.lineWidth = 3; pen.arc(x, y, 9, 0, 7); pen.stroke(); }
    });
  }
  function show(n) {
    if (n < 0 || n === current) return;
    current = n;
    const p = points[n], [x] = at(p);
    thumb.style.backgroundPosition = `-${(n % columns) * size * zoom}px -${Math.floor(n / columns) * size * zoom}px`;
    words.textContent = `${names[p[2]]}, ${p[3] ? "Test" : "Training"}: ${p[4]}`;
    box.style.left = x < width / 2 ? "auto" : ".5rem"; box.style.right = x < width / 2 ? ".5rem" : "auto";
    box.hidden = false;
    draw();
  }
  function nearest(event) {
    const area = canvas.getBoundingClientRect();
    let best = -1, least = 30 * 30;
    points.forEach((p, n) => {
      if (hidden.has(p[2])) return;
      const [x, y] = at(p), far = (x - event.clientX + area.left) ** 2 + (y - event.clientY + area.top) ** 2;
      if (far < least) { least = far; best = n; }
    });
    return best;
  }
  function step(by) {
    for (let n = current, tries = 0; tries < points.length; tries++) {
      n = (n + by + points.length) % points.length;
      if (!hidden.has(points[n][2])) return show(n);
    }
  }
  canvas.addEventListener("pointermove", (event) => show(nearest(event)));
  canvas.addEventListener("pointerdown", (event) => show(nearest(event)));
  canvas.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "mouse") return; // a finger leaves with each tap
    box.hidden = true; current = -1; draw();
  });
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (by) { event.preventDefault(); step(by); }
  });
  document.querySelectorAll(".legend button").forEach((button) => button.addEventListener("click", () => {
    const label = Number(button.dataset.label);
    if (!hidden.delete(label)) hidden.add(label);
    button.setAttribute("aria-pressed", String(!hidden.has(label)));
    draw();
  }));
  new ResizeObserver(draw).observe(canvas);
})();
