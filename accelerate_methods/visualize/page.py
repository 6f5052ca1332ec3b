"""A page of its own (no network, no other file): frames with their tokens, sliders over frames and decoder layers."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from accelerate_methods.visualize.cells import DROPPED, KEPT, LEFT, MERGED, NOWHERE, Overlay, Panel
from accelerate_methods.visualize.painting import EMPTY, FRAME, SHADE, TINT, UNDER_TINT, layer_colour, legend, writing

LONG_EDGE = 960  # pixels of a stored picture; many frames are stored smaller
BUDGET = 12e6  # pixels of all stored pictures


def write_page(
    panels: Sequence[Panel], overlays: Sequence[Overlay], path: str | Path, title: str = "", model: str = ""
) -> Path:
    """Save the page. Pictures are stored once and shared by all methods; cells are drawn by the browser."""
    edge = min(LONG_EDGE, int((BUDGET / max(1, len(panels))) ** 0.5))
    layers = max(o.num_layers for o in overlays)
    content = {
        "panels": [{"caption": p.caption, "src": _encoded(p.picture, edge), "aspect": _aspect(p)} for p in panels],
        "methods": [_method(o) for o in overlays],
        "video": len(panels) > 2 and all(p.tiles is None for p in panels),
        "layers": layers,
        "colours": [layer_colour(layer, layers) for layer in range(layers)],
        "states": {"nowhere": NOWHERE, "dropped": DROPPED, "merged": MERGED, "kept": KEPT, "left": LEFT},
        "shade": {str(state): shade for state, shade in SHADE.items()},
        "tint": [TINT, UNDER_TINT],
        "frame": FRAME,
        "empty": EMPTY,
    }
    swatches = "".join(
        f'<span><i style="background:rgb{colour};border-color:rgb{FRAME if framed else colour}"></i>'
        f"{html.escape(text)}</span>"
        for colour, framed, text in legend(overlays)
    )
    filled = {
        "TITLE": html.escape(title),
        "MODEL": html.escape(model),
        "LEGEND": swatches,
        # no "<": neither the end of the script element nor "<!--" may stand in it
        "CONTENT": json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # in one go: a title may hold a placeholder
    page = re.sub("@@([A-Z]+)@@", lambda match: filled[match[1]], _PAGE)
    with writing(path):
        Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def _method(overlay: Overlay) -> dict[str, Any]:
    return {
        "label": overlay.label,
        "counts": overlay.counts(),
        "answer": overlay.answer,
        "notes": overlay.notes(),
        "untouched": overlay.untouched,
        "layers": overlay.layers,
        "cells": [
            {
                "xs": cells.xs.round(5).tolist(),
                "ys": cells.ys.round(5).tolist(),
                "state": cells.state.tolist(),
                "left": cells.left.tolist(),
                "owner": cells.owner.tolist(),
                "joined": None if cells.joined is None else cells.joined.tolist(),
            }
            for cells in overlay.cells
        ],
    }


def _aspect(panel: Panel) -> float:
    return panel.picture.width / panel.picture.height


def _encoded(picture: Image.Image, edge: int) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@@TITLE@@</title>
<style>
:root { color-scheme: light; --ink: #18181b; --grey: #64646c; --line: #e2e2e6; --accent: #0b7285; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #f6f6f7;
  font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
header { padding: 18px 24px 6px; }
h1 { font-size: 21px; margin: 0 0 2px; }
header p { margin: 0; color: var(--grey); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 8px; color: var(--grey); font-size: 14px; }
.legend i { display: inline-block; width: 15px; height: 15px; margin-right: 7px; border: 2.5px solid;
  vertical-align: -2px; }
.controls { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; align-items: center; gap: 8px 26px;
  padding: 10px 24px; background: #f6f6f7ee; border-bottom: 1px solid var(--line); }
.controls label { display: flex; align-items: center; gap: 9px; }
.controls input[type=range] { width: 220px; accent-color: var(--accent); }
.controls output { min-width: 9.5em; font-variant-numeric: tabular-nums; }
button { font: inherit; padding: 2px 12px; border: 1px solid #c4c4ca; border-radius: 6px; background: #fff;
  cursor: pointer; }
main { display: grid; gap: 18px; padding: 18px 24px 30px; }
article { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0; }
h2 { font-size: 18px; margin: 0; overflow-wrap: anywhere; }
article p { margin: 1px 0; }
.answer b { font-weight: 600; }
.note, .here { color: var(--grey); font-size: 14px; }
.panels { display: grid; gap: 8px; margin-top: 10px; align-items: start; }
figure { margin: 0; min-width: 0; }
figcaption { color: var(--grey); font-size: 12.5px; }
figure canvas { display: block; width: 100%; cursor: crosshair; }
figure.current figcaption { color: var(--accent); font-weight: 600; }
.strip { display: block; width: 100%; height: 46px; margin-top: 10px; cursor: pointer; }
#tip { position: fixed; z-index: 3; display: none; max-width: 330px; padding: 6px 10px; border-radius: 6px;
  font-size: 13px; background: #18181bee; color: #fff; pointer-events: none; }
</style>
</head>
<body>
<header>
<h1>@@TITLE@@</h1>
<p>Model: @@MODEL@@. Point at a token to see which others went into the same one.</p>
<div class="legend">@@LEGEND@@</div>
</header>
<div class="controls">
  <label id="frameBox">frame <input type="range" id="frame" min="0" value="0"> <output id="frameText"></output></label>
  <button id="play" type="button">play</button>
  <label id="layerBox">decoder layer <input type="range" id="layer" min="0"> <output id="layerText"></output></label>
  <label id="allBox"><input type="checkbox" id="all"> all frames</label>
  <label><input type="checkbox" id="shade" checked> shade</label>
  <label><input type="checkbox" id="lines" checked> lines</label>
</div>
<main id="methods"></main>
<div id="tip"></div>
<script type="application/json" id="content">@@CONTENT@@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("content").textContent);
const byId = (id) => document.getElementById(id);
const S = data.states, panels = data.panels, methods = data.methods;
const inside = methods.some((m) => m.layers.length);
const pictures = panels.map((p) => { const i = new Image(); i.onload = redraw; i.src = p.src; return i; });
const view = { frame: 0, layer: Math.max(0, data.layers - 1), all: !data.video, hover: null };
const rgb = (c, a = 1) => `rgba(${c[0]},${c[1]},${c[2]},${a})`;

function stateAt(cells, r, c) {
  const state = cells.state[r][c];
  if (state <= S.dropped || cells.left[r][c] > view.layer) return state;
  return cells.joined && cells.joined[r][c] ? S.merged : S.left;
}
function tally(cells) {
  let kept = 0, total = 0;
  cells.state.forEach((row, r) => row.forEach((s, c) => {
    if (s === S.nowhere) return;
    total += 1;
    if (stateAt(cells, r, c) === S.kept) kept += 1;
  }));
  return [kept, total];
}

// -- drawing one panel ------------------------------------------------------------------------------------------------
function drawPanel(canvas, method, m, p) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  if (!width || !pictures[p].naturalWidth) return;
  const W = Math.round(width * ratio), H = Math.round(W / panels[p].aspect);
  canvas.width = W; canvas.height = H;
  const g = canvas.getContext("2d"), cells = method.cells[p];
  const xs = cells.xs.map((x) => Math.round(x * W)), ys = cells.ys.map((y) => Math.round(y * H));
  const R = ys.length - 1, C = xs.length - 1;
  g.fillStyle = rgb(data.empty); g.fillRect(0, 0, W, H);
  g.save(); g.beginPath(); g.rect(xs[0], ys[0], xs[C] - xs[0], ys[R] - ys[0]); g.clip();
  g.imageSmoothingQuality = "high"; g.drawImage(pictures[p], 0, 0, W, H); g.restore();
  const at = (r, c) => r < 0 || c < 0 || r >= R || c >= C ? S.nowhere : stateAt(cells, r, c);
  for (let r = 0; r < R; r++) for (let c = 0; c < C; c++) {
    const s = at(r, c);
    if (s === S.kept || (!byId("shade").checked && s !== S.nowhere)) continue;
    if (s === S.nowhere) g.fillStyle = rgb(data.empty);
    else if (s === S.left) {
      const [tint, under] = data.tint;
      g.fillStyle = rgb(data.colours[cells.left[r][c]].map((v) => v * tint / (1 - under)), 1 - under);
    } else g.fillStyle = rgb([0, 0, 0], 1 - data.shade[s]);
    g.fillRect(xs[c], ys[r], xs[c + 1] - xs[c], ys[r + 1] - ys[r]);
  }
  const least = Math.min(xs[1] - xs[0], ys[1] - ys[0]);
  if (byId("lines").checked && !method.untouched) {
    const holder = (r, c) => [S.kept, S.merged].includes(at(r, c)) ? cells.owner[r][c] : -1;
    g.strokeStyle = rgb([255, 255, 255], .3); g.lineWidth = 1;
    strokes(g, xs, ys, (a, b) => holder(...a) >= 0 && holder(...b) >= 0 && holder(...a) !== holder(...b), 0);
    const thick = Math.max(1.5, Math.min(3.5 * ratio, least / 9));
    g.strokeStyle = rgb(data.frame); g.lineWidth = thick;
    const kept = (a) => at(...a) === S.kept;
    strokes(g, xs, ys, (a, b) => kept(a) !== kept(b), thick / 2, kept);
  }
  const h = view.hover;
  if (h && h.m === m && h.owner >= 0) {
    const same = (r, c) => at(r, c) !== S.nowhere && (cells.owner[r] || [])[c] === h.owner;
    g.fillStyle = "rgba(34,211,238,.30)";
    for (let r = 0; r < R; r++) for (let c = 0; c < C; c++)
      if (same(r, c)) g.fillRect(xs[c], ys[r], xs[c + 1] - xs[c], ys[r + 1] - ys[r]);
    g.strokeStyle = "#22d3ee"; g.lineWidth = Math.max(2, Math.min(4 * ratio, least / 7));
    strokes(g, xs, ys, (a, b) => same(...a) !== same(...b), 0);
  }
}
// lines between cells a and b (above, below; left, right) where wanted(a, b); moved by `shift` into a or b
function strokes(g, xs, ys, wanted, shift, first = () => true) {
  const R = ys.length - 1, C = xs.length - 1;
  g.beginPath();
  for (let r = 0; r <= R; r++) for (let c = 0; c < C; c++) if (wanted([r - 1, c], [r, c])) {
    const y = ys[r] + (first([r - 1, c]) ? -shift : shift);
    g.moveTo(xs[c], y); g.lineTo(xs[c + 1], y);
  }
  for (let r = 0; r < R; r++) for (let c = 0; c <= C; c++) if (wanted([r, c - 1], [r, c])) {
    const x = xs[c] + (first([r, c - 1]) ? -shift : shift);
    g.moveTo(x, ys[r]); g.lineTo(x, ys[r + 1]);
  }
  g.stroke();
}

// -- kept tokens per frame --------------------------------------------------------------------------------------------
function drawStrip(canvas, method, m) {
  const ratio = window.devicePixelRatio || 1;
  const W = canvas.width = Math.round(canvas.clientWidth * ratio), H = canvas.height = Math.round(46 * ratio);
  const g = canvas.getContext("2d"), step = W / panels.length;
  const counts = method.cells.map(tally), most = Math.max(...counts.map((c) => c[0]), 1);
  counts.forEach(([kept], p) => {
    const high = kept / most * (H - 14 * ratio), x = p * step;
    g.fillStyle = p === view.frame ? "#0b7285" : "#c9ccd1";
    g.fillRect(x + 1, H - high, Math.max(1, step - 2), high);
    if (step > 18 * ratio) {
      g.fillStyle = p === view.frame ? "#0b7285" : "#64646c"; g.textAlign = "center";
      g.font = `${10.5 * ratio}px system-ui, sans-serif`; g.fillText(kept, x + step / 2, H - high - 3 * ratio);
    }
    const h = view.hover;
    if (h && h.m === m && h.owner >= 0 && method.cells[p].owner.some((row) => row.includes(h.owner))) {
      g.fillStyle = "#22d3ee"; g.fillRect(x + 1, H - 4 * ratio, Math.max(1, step - 2), 4 * ratio);
    }
  });
}

// -- the page ---------------------------------------------------------------------------------------------------------
const cards = methods.map((method, m) => {
  const card = document.createElement("article");
  const line = (cls) => { const p = document.createElement("p"); p.className = cls; card.append(p); return p; };
  const head = document.createElement("h2"); head.textContent = method.label; card.append(head);
  line("counts").textContent = method.counts;
  const answer = line("answer");
  if (method.answer) {
    const bold = document.createElement("b");
    bold.textContent = method.answer;
    answer.append("answer: ", bold);
  }
  for (const text of method.notes) line("note").textContent = text;
  const here = line("here"), grid = document.createElement("div");
  grid.className = "panels"; card.append(grid);
  const strip = document.createElement("canvas"); strip.className = "strip";
  strip.title = "tokens per frame, at the chosen layer";
  if (data.video) {
    card.append(strip);
    strip.onclick = (e) => { setFrame(Math.floor(e.offsetX / strip.clientWidth * panels.length)); };
  }
  byId("methods").append(card);
  return { method, here, grid, strip, m, drawn: [] };
});
function build() {
  const shown = view.all ? panels.map((_, p) => p) : [view.frame];
  for (const card of cards) {
    card.drawn = shown.map((p, k) => {
      let figure = card.grid.children[k];
      if (!figure) {
        figure = document.createElement("figure");
        figure.append(document.createElement("canvas"), document.createElement("figcaption"));
        card.grid.append(figure);
      }
      const canvas = figure.firstChild;
      canvas.style.aspectRatio = panels[p].aspect;
      canvas.onmousemove = (e) => point(e, canvas, card, p);
      canvas.onmouseleave = forget;
      canvas.onclick = () => { if (data.video) setFrame(p); };
      return { figure, canvas, p };
    });
    while (card.grid.children.length > shown.length) card.grid.lastChild.remove();
    card.grid.style.gridTemplateColumns =
      shown.length > 2 ? `repeat(auto-fill, minmax(${shown.length > 4 ? 150 : 240}px, 1fr))`
        : shown.map((p) => panels[p].aspect + "fr").join(" ");
  }
  const most = shown.length > 1 ? 2 : [5, 6, 9].includes(methods.length) ? 3 : 4;
  const columns = window.innerWidth < 800 ? 1 : Math.min(most, methods.length);
  byId("methods").style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  redraw();
}
function redraw() {
  for (const card of cards) {
    for (const { figure, canvas, p } of card.drawn) {
      const [kept, total] = tally(card.method.cells[p]);
      figure.lastChild.textContent = `${panels[p].caption}: ${kept === total ? kept : kept + " of " + total}`;
      figure.classList.toggle("current", data.video && view.all && p === view.frame);
      drawPanel(canvas, card.method, card.m, p);
    }
    const all = card.method.cells.map(tally).reduce((a, b) => a + b[0], 0);
    card.here.textContent = inside ? `${all} tokens at layer ${view.layer}` : "";
    if (data.video) drawStrip(card.strip, card.method, card.m);
  }
  byId("frameText").textContent = panels[view.frame].caption;
  byId("layerText").textContent = `${view.layer} of 0 to ${data.layers - 1}`;
}
function forget() {
  byId("tip").style.display = "none";
  if (view.hover) { view.hover = null; redraw(); }
}
function point(e, canvas, card, p) {
  const cells = card.method.cells[p], x = e.offsetX / canvas.clientWidth, y = e.offsetY / canvas.clientHeight;
  const c = cells.xs.findIndex((edge, i) => edge <= x && x < cells.xs[i + 1]);
  const r = cells.ys.findIndex((edge, i) => edge <= y && y < cells.ys[i + 1]);
  const tip = byId("tip");
  if (r < 0 || c < 0 || cells.state[r][c] === S.nowhere) { forget(); return; }
  const owner = cells.owner[r][c];
  if (!view.hover || view.hover.m !== card.m || view.hover.owner !== owner) {
    view.hover = { m: card.m, owner };
    redraw();
  }
  tip.textContent = describe(card.method, p, r, c);
  tip.style.display = "block";
  tip.style.left = Math.min(e.clientX + 14, window.innerWidth - 345) + "px";
  tip.style.top = e.clientY + 16 + "px";
}
function describe(method, p, r, c) {
  const cells = method.cells[p], owner = cells.owner[r][c], where = `${panels[p].caption}, row ${r}, column ${c}`;
  if (owner < 0) return `${where}: dropped before the LLM`;
  let members = 0, stands = null; const on = new Set();
  method.cells.forEach((other, q) => other.owner.forEach((row, i) => row.forEach((o, j) => {
    if (o !== owner) return;
    members += 1; on.add(q);
    if (other.state[i][j] === S.kept) stands = [q, i, j];
  })));
  const own = stands && stands[0] === p && stands[1] === r && stands[2] === c;
  const into = stands ? `${panels[stands[0]].caption}, row ${stands[1]}, column ${stands[2]}` : "another token";
  let text = own ? "kept" : "merged into " + into;
  if (members > 1) text += `; that token holds ${members} tokens` + (on.size > 1 ? ` of ${on.size} frames` : "");
  const gone = cells.left[r][c];
  if (method.layers.length)
    text += gone >= data.layers ? "; reaches the last layer"
      : `; ${cells.joined && cells.joined[r][c] ? "merged into another" : "dropped"} before layer ${gone}`;
  return `${where}: ${text}`;
}
function setFrame(p) {
  view.frame = Math.max(0, Math.min(panels.length - 1, p)); view.hover = null;
  byId("frame").value = view.frame;
  build();
}
byId("frame").max = panels.length - 1;
byId("layer").max = data.layers - 1; byId("layer").value = view.layer;
byId("frame").oninput = (e) => setFrame(+e.target.value);
byId("layer").oninput = (e) => { view.layer = +e.target.value; redraw(); };
byId("all").checked = view.all;
byId("all").onchange = (e) => { view.all = e.target.checked; build(); };
byId("shade").onchange = redraw; byId("lines").onchange = redraw;
let timer = null;
byId("play").onclick = () => {
  if (timer) { clearInterval(timer); timer = null; }
  else timer = setInterval(() => setFrame((view.frame + 1) % panels.length), 450);
  byId("play").textContent = timer ? "stop" : "play";
};
document.addEventListener("keydown", (e) => {
  if (e.target.type === "range") return;
  if (e.key === "ArrowRight") setFrame(view.frame + 1);
  if (e.key === "ArrowLeft") setFrame(view.frame - 1);
});
for (const id of ["frameBox", "play", "allBox"]) byId(id).style.display = data.video ? "" : "none";
byId("layerBox").style.display = inside ? "" : "none";
window.addEventListener("resize", build);
// #frame=3&layer=1&all=1 opens the page at that place
for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
  if (key === "all") view.all = value === "1";
  else if (key in view) view[key] = +value;
}
byId("all").checked = view.all; byId("layer").value = view.layer;
setFrame(view.frame);
</script>
</body>
</html>
"""
