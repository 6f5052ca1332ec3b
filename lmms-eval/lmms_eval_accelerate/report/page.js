"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const element = (name, attributes = {}, ...children) => {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
};

// tables: a click on a header sorts, another one reverses; empty cells stay last
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.v;
    const compare = (a, b) => isNaN(a) || isNaN(b) ? String(a).localeCompare(b, undefined, {numeric: true}) : a - b;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      if (key(a) === undefined || key(b) === undefined) return (key(a) === undefined) - (key(b) === undefined);
      return (down ? -1 : 1) * compare(key(a), key(b));
    });
    table.tBodies[0].append(...rows);
  }));
}

// plots
for (const [id, figure] of Object.entries(DATA.plots))
  Plotly.newPlot(id, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: false});
window.addEventListener("beforeprint", () => Object.keys(DATA.plots).forEach(id => Plotly.Plots.resize(id)));

// answers of every document
const PAGE = 50;
for (const box of document.querySelectorAll(".answers")) {
  const task = DATA.tasks[box.dataset.task], dense = task.dense;
  const right = a => a[1] === null ? "" : a[1] >= 1 ? "right" : a[1] <= 0 ? "wrong" : "part";
  const differs = {
    all: () => true,
    "right or wrong differs from dense": (row, i) => row.a[dense] && row.a[i] && row.a[i][1] !== row.a[dense][1],
    "answer differs from dense": (row, i) => row.a[dense] && row.a[i] && row.a[i][0] !== row.a[dense][0],
    "wrong": (row, i) => row.a[i] && row.a[i][1] !== null && row.a[i][1] < 1,
  };
  const kinds = Object.keys(differs).filter(name => dense !== null || !name.includes("dense"));
  const kind = element("select", {}, ...kinds.map(name => element("option", {value: name}, name)));
  const which = element("select", {}, element("option", {value: ""}, "in any setting"),
    ...task.labels.map((label, i) => element("option", {value: i}, "in " + label)));
  const search = element("input", {type: "search", placeholder: "search question or answer"});
  const count = element("span"), more = element("button", {}, "show more");
  const body = element("tbody");
  const table = element("table", {}, element("thead", {}, element("tr", {},
    ...["document", "question", "reference", ...task.labels].map(h => element("th", {}, h)))), body);
  box.append(element("div", {className: "controls"}, kind, which, search, count, more),
    element("div", {className: "pane"}, table));
  let limit = PAGE;
  const cell = answer => {
    if (!answer) return element("td", {}, "–");
    const state = right(answer);
    const sign = {right: "✓ ", wrong: "✗ ", part: `${Number(answer[1]).toPrecision(2)} `, "": ""}[state];
    return element("td", {className: state + (answer[0].length < 24 ? " short" : "")}, sign + (answer[0] || "(empty)"));
  };
  const draw = () => {
    const words = search.value.toLowerCase(), test = differs[kind.value];
    const settings = which.value === "" ? task.labels.map((_, i) => i) : [Number(which.value)];
    const found = task.samples.filter(row => settings.some(i => test(row, i)) && (!words ||
      [row.q, row.t, ...row.a.map(a => a ? a[0] : "")].some(text => text.toLowerCase().includes(words))));
    body.replaceChildren(...found.slice(0, limit).map(row => {
      const number = element("td", {}, String(row.d));
      if (task.documents[row.d]) {
        const link = element("a", {href: "#", title: "show its kept tokens"}, "tokens");
        link.addEventListener("click", event => { event.preventDefault(); task.show(String(row.d)); });
        number.append(" ", link);
      }
      return element("tr", {}, number, element("td", {className: "q"}, row.q), element("td", {}, row.t), ...row.a.map(cell));
    }));
    const held = task.samples.length < task.total ? ` (${task.samples.length} of ${task.total} documents are in this page)` : "";
    count.textContent = `${found.length} documents, ${Math.min(limit, found.length)} shown${held}`;
    more.hidden = found.length <= limit;
  };
  more.addEventListener("click", () => { limit += PAGE; draw(); });
  for (const control of [kind, which, search]) control.addEventListener("input", () => { limit = PAGE; draw(); });
  draw();
}

// kept tokens
const CELL = 76, GAP = 3, COLUMNS = 16;
const pictures = DATA.pictures.map(uri => {
  const picture = new Image();
  picture.src = uri;
  return picture.decode().then(() => picture);
});
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));

async function drawStrip(canvas, item, layer) {
  const picture = await pictures[item.picture], [rows, columns] = item.grid, count = item.frames.length;
  const side = count === 1 ? 3 * CELL : CELL, across = Math.min(count, COLUMNS), scale = 2, step = side + GAP;
  const left = bytes(item.left), kept = bytes(item.kept), source = picture.height;
  canvas.width = scale * (across * step - GAP);
  canvas.height = scale * (Math.ceil(count / across) * step - GAP);
  canvas.style.width = canvas.width / scale + "px";
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  for (let f = 0; f < count; f++) {
    const x0 = (f % across) * step, y0 = Math.floor(f / across) * step;
    pen.drawImage(picture, f * source, 0, source, source, x0, y0, side, side);
    const w = side / columns, h = side / rows, framed = [];
    for (let n = 0; n < rows * columns; n++) {
      const index = f * rows * columns + n, x = x0 + (n % columns) * w, y = y0 + Math.floor(n / columns) * h;
      if (left[index] <= layer) pen.fillStyle = "rgba(10,14,20,0.84)";
      else if (!kept[index]) pen.fillStyle = "rgba(10,14,20,0.48)";
      else { framed.push([x, y]); continue; }
      pen.fillRect(x, y, w, h);
    }
    pen.strokeStyle = "#ffd11a";
    pen.lineWidth = Math.max(0.6, Math.min(1.6, w / 7));
    if (framed.length < rows * columns) for (const [x, y] of framed) pen.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
  }
}

for (const box of document.querySelectorAll(".overlays")) {
  const task = DATA.tasks[box.dataset.task], numbers = Object.keys(task.documents);
  const dense = task.dense === null ? null : task.labels[task.dense];
  const shown = new Set(task.labels.filter(label => label !== dense).slice(0, 6));
  const pick = element("select", {}, ...numbers.map(number => {
    const row = task.samples.find(sample => String(sample.d) === number);
    return element("option", {value: number}, `document ${number}` + (row ? `: ${row.q.slice(0, 70)}` : ""));
  }));
  const slider = element("input", {type: "range", min: 0, max: 0}), said = element("span"), chips = element("div", {className: "chips"});
  const sliding = element("label", {}, "LLM layer ", slider, " ", said);
  const strips = element("div", {className: "strips"});
  const key = element("p", {className: "note key"});
  for (const [colour, text] of [["#fff", "kept (framed)"], ["#8b8e92", "merged into another token"], ["#1f2329", "dropped"]])
    key.append(element("span", {}, element("span", {className: "swatch", style: `background:${colour}`}), text));
  box.append(element("div", {className: "controls"}, pick, sliding), chips, key, strips);
  const draw = () => {
    const items = task.documents[pick.value], layers = Math.max(...items.map(item => item.layers));
    const steps = items.some(item => item.steps.length > 1);
    if (Number(slider.max) !== layers - 1) slider.value = slider.max = layers - 1; // starts after the last drop
    sliding.hidden = !steps;
    const layer = steps ? Math.min(Number(slider.value), layers - 1) : 0;
    said.textContent = `${layer} of 0 to ${layers - 1}`;
    chips.replaceChildren(...task.labels.filter(label => items.some(item => item.setting === label)).map(label => {
      const chip = element("button", {}, label);
      chip.setAttribute("aria-pressed", shown.has(label));
      chip.addEventListener("click", () => { shown.has(label) ? shown.delete(label) : shown.add(label); draw(); });
      return chip;
    }));
    const row = task.samples.find(sample => String(sample.d) === pick.value);
    strips.replaceChildren(...items.filter(item => shown.has(item.setting)).map(item => {
      const answer = row && row.a[task.labels.indexOf(item.setting)];
      const many = items.filter(other => other.setting === item.setting).length > 1 ? `, item ${item.item + 1}` : "";
      const at = Math.min(layer, item.layers - 1);
      const text = `${many}: ${item.alive[at]} of ${item.before} tokens before layer ${at}` + (answer ? `; answer: ${answer[0]}` : "");
      const strip = element("div", {className: "strip"}, element("p", {}, element("b", {}, item.setting), text));
      if (item.grid && item.frames.length === 1) strip.style.width = 3 * CELL + 12 + "px";
      if (item.grid) {
        const canvas = element("canvas");
        strip.append(canvas);
        drawStrip(canvas, item, at);
      } else strip.append(element("p", {className: "note"}, "Its tokens lie on no single grid (any resolution, or another input size): nothing to draw."));
      return strip;
    }));
  };
  slider.addEventListener("input", draw);
  pick.addEventListener("input", draw);
  task.show = number => { pick.value = number; draw(); box.scrollIntoView({behavior: "smooth"}); };
  draw();
}
document.documentElement.dataset.ready = "yes";
