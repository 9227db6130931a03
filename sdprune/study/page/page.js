// All texts come from other people's captions, labels and names: they go into the page as text nodes and attributes only.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "light-dark(#B07A00, #E69F00)", "light-dark(#2F95CF, #56B4E9)", "#8F6BC1", "#8A8A8A"]; // 3:1 on either ground
const DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]];  // of the lines of each round through the colours
const SHAPES = { text: "circle", image: "square", both: "triangle-up", dense: "diamond" };
const STEP = 18; // pairs of pictures that are shown at once
let group, series, state;

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  return fill(made, ...children);
}
function fill(node, ...children) { // null stands for nothing
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const options = (select, pairs, chosen) => fill(select, pairs.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text)));
const percent = (share) => `${Number((100 * share).toFixed(1))}\u00a0%`.replace("-", "\u2212");
// Decimals of a measure, the same for all runs: four digits of the dense model's value, or of the largest.
function places(key) {
  const size = Math.abs(dense()?.values[key]?.[0] ?? Math.max(...group.runs.map((run) => run.values[key]?.[0] ?? 0)));
  return size > 0 ? Math.min(6, Math.max(1, 3 - Math.floor(Math.log10(size)))) : 4;
}
const round = (value, key) => value.toFixed(places(key)).replace("-", "\u2212").replace(/^\u2212(?=[0.]+$)/, "");
const signed = (value, key) => { const text = round(value, key); return text.startsWith("\u2212") || !/[1-9]/.test(text) ? text : `+${text}`; };
function interval(values, key) {
  const [value, ...ends] = values.filter(Number.isFinite).map((one) => signed(one, key));
  return ends.length ? `${value} [${ends.join(", ")}]` : value;
}
const share = (run, axis) => `${run.axes[axis].toFixed(1)}\u00a0%`;
const measure = (key) => group.measures.find((one) => one.key === key);
const label = (one) => one.label + (one.better ? ` (${one.better} is better)` : "");
const dense = () => (group.dense === null ? null : group.runs[group.dense]);

// --- pictures -------------------------------------------------------------------------------------------------

// A picture of a run: of a sample prompt ("s", place), or of a caption ("c", place) that lies in the run's sheet or directory.
function picture(run, which, place) {
  const prompt = which === "s" ? group.samples[place] : group.prompts.captions[place];
  const alt = `${run ? run.name : "no run"}: ${prompt}`;
  const source = run && (which === "s" ? run.samples[place]?.[0] : run.sheet || (run.link && run.prompts && `${run.link}/${group.files[place]}`));
  if (!source) return el("div", { class: "picture none", role: "img", "aria-label": `no picture of ${alt}` }, "no picture");
  if (which === "s" || !run.sheet) return el("img", { class: "picture", src: source, alt, loading: "lazy", draggable: "false" });
  const rows = Math.ceil(group.prompts.captions.length / group.columns);
  const at = (index, count) => (count > 1 ? (100 * index) / (count - 1) : 0);
  const made = el("div", { class: "picture", role: "img", "aria-label": alt });
  made.style.backgroundImage = `url("${source}")`;
  made.style.backgroundSize = `${100 * group.columns}% ${100 * rows}%`;
  made.style.backgroundPosition = `${at(place % group.columns, group.columns)}% ${at(Math.floor(place / group.columns), rows)}%`;
  return made;
}

// The pictures of the dense model and of a run for one prompt, above a caption.
function pair(run, which, place, ...caption) {
  const cell = (one, name) => el("div", {}, el("small", {}, name), full(one, which, place));
  const two = which === "s" || run.link ? el("div", { class: "two" }, dense() ? cell(dense(), "dense") : null, cell(run, "pruned")) : null;
  return el("figure", { class: "pair" }, two, el("figcaption", {}, ...caption));
}

// The picture as a link to the one in full size, in the run's own directory.
function full(run, which, place) {
  const made = picture(run, which, place);
  const file = which === "s" ? run.samples[place]?.[1] : group.files[place];
  if (!file || run.link === null) return made;
  return el("a", { href: `${run.link}/${file}`, target: "_blank" }, made);
}

// --- the best run ---------------------------------------------------------------------------------------------

function drawBest() {
  const best = group.runs.find((run) => run.rank === 1);
  if (!best) return fill($("best"), el("h2", {}, "Only the dense model was run"));
  const safe = best.lost !== null && best.lost <= group.safe;
  const claim = safe ? `The sparsest run that surely lost at most ${percent(group.safe)} of the CLIP score`
    : best.lost !== null ? "The run that lost least of the CLIP score" : best.values.fid ? "The run with the lowest FID" : "One of the runs";
  fill($("best"),
    el("h2", {}, `${claim}: `, el("button", { class: "link", click: () => openRun(best) }, best.name)),
    el("p", {}, facts(best).join(", ")),
    el("div", { class: "cards" }, group.samples.map((prompt, place) => (best.samples[place] ? pair(best, "s", place, prompt) : null))),
  );
}

function facts(run) {
  const found = [`${share(run, "zeros")} ${group.axes.zeros}`, `${group.axes.nominal} ${share(run, "nominal")}`];
  for (const one of group.measures.slice(0, 2)) {
    const value = run.values[one.key];
    if (value) found.push(`${one.label} ${round(value[0], one.key)}` + (value[3] === undefined || value[3] === null ? "" : ` (difference to dense ${interval(value.slice(3), one.key)})`));
  }
  return [...found, `n\u00a0=\u00a0${run.n}`];
}

// --- the chart ------------------------------------------------------------------------------------------------

function drawLegend() {
  const toggle = (name) => () => {
    state.off.has(name) ? state.off.delete(name) : state.off.add(name);
    drawLegend();
    drawChart();
    drawGallery();
  };
  const button = (name) => el("button", { type: "button", "aria-pressed": String(!state.off.has(name)), click: toggle(name) }, swatch(name), name);
  const some = state.off.size < series.length;
  const every = el("button", { type: "button", click: () => { state.off = new Set(some ? series : []); drawLegend(); drawChart(); drawGallery(); } }, some ? "none" : "all");
  const focused = [...document.querySelectorAll(".legend button")].indexOf(document.activeElement);
  fill(document.querySelector(".legend"), series.map(button), series.length > 2 ? every : null);
  document.querySelectorAll(".legend button")[focused]?.focus();
}

function swatch(name) {
  const made = el("i", { class: group.runs.find((run) => run.series === name).kind });
  const [drawn, left] = dash(name);
  made.style.background = `repeating-linear-gradient(90deg, ${colour(name)} 0 ${drawn}px, transparent 0 ${drawn + left}px)`;
  made.style.outline = `1.5px solid ${colour(name)}`;
  return made;
}
const colour = (name) => COLOURS[series.indexOf(name) % COLOURS.length];
const lap = (name) => Math.floor(Math.max(0, series.indexOf(name)) / COLOURS.length);
const dash = (name) => DASHES[lap(name) % DASHES.length];

async function drawChart() {
  const key = state.measure, axis = state.axis, one = measure(key);
  const values = group.runs.flatMap((run, i) => {
    const value = run.values[key];
    return value && !state.off.has(run.series)
      ? [{ i, x: run.axes[axis], y: value[0], low: value[1], high: value[2], series: run.series, open: lap(run.series) > 0, kind: run.kind, title: run.name }]
      : [];
  });
  const bars = values.filter((value) => Number.isFinite(value.low));
  const level = one.compared ? null : dense()?.values[key]?.[0];
  const shown = series.filter((name) => !state.off.has(name));
  const x = { field: "x", type: "quantitative", title: `${group.axes[axis]}, %`, axis: { format: "~g", tickCount: 10 } };
  const y = { field: "y", type: "quantitative", title: label(one), scale: { zero: false } };
  const color = { field: "series", type: "nominal", legend: null, scale: { domain: [...shown, "dense"], range: [...shown.map(colour), "currentColor"] } };
  const strokeDash = { field: "series", type: "nominal", legend: null, scale: { domain: [...shown, "dense"], range: [...shown.map(dash), DASHES[0]] } };
  const fillOpacity = { condition: { test: "datum.open", value: 0 }, value: 1 };
  const spec = {
    description: `Chart: ${label(one)} against ${group.axes[axis]}; the table of runs below has the same numbers`,
    width: "container", height: 320, data: { values }, background: null, autosize: { type: "fit", contains: "padding" },
    layer: [
      ...(level === undefined || level === null ? [] : [{ data: { values: [{ y: level }] }, mark: { type: "rule", strokeDash: [6, 4], color: "currentColor", opacity: 0.7, aria: false }, encoding: { y } }]),
      { mark: { type: "line", strokeWidth: 1.5, opacity: 1, aria: false }, encoding: { x, y, color, strokeDash } },
      ...(bars.length ? [{ data: { values: bars }, mark: { type: "rule", opacity: 1, aria: false }, encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color } }] : []),
      { mark: { type: "point", filled: true, size: 90, opacity: 1, cursor: "pointer" }, name: "points",
        encoding: { x, y, color, stroke: color, fillOpacity, shape: { field: "kind", legend: null, scale: { domain: Object.keys(SHAPES), range: Object.values(SHAPES) } }, description: { field: "title" } } },
    ],
    config: {
      axis: { labelColor: "currentColor", titleColor: "currentColor", gridColor: "currentColor", gridOpacity: 0.12, domainColor: "currentColor", tickColor: "currentColor", labelFontSize: 12, titleFontSize: 13, titleFontWeight: "normal" },
      view: { stroke: null }, font: "system-ui, sans-serif",
    },
  };
  const turn = (state.turn = (state.turn || 0) + 1);
  const { view } = await window.vegaEmbed("#chart", spec, { actions: false, renderer: "svg", ast: true, tooltip: false });
  if (turn !== state.turn) return;
  document.querySelector("#chart svg").setAttribute("role", "presentation"); // else it is a picture, whose points no screen reader reaches
  const runOf = (item) => (item?.datum && Number.isInteger(item.datum.i) ? group.runs[item.datum.i] : null);
  view.addEventListener("click", (event, item) => runOf(item) && openRun(runOf(item)));
  view.addEventListener("mousemove", (event, item) => tip(runOf(item), event.clientX, event.clientY));
  view.addEventListener("mouseout", () => tip(null));
  for (const path of document.querySelectorAll("#chart .mark-symbol path")) {
    const run = runOf(path.__data__);
    if (!run) continue;
    const box = () => path.getBoundingClientRect();
    path.setAttribute("tabindex", 0);
    path.setAttribute("role", "button");
    path.addEventListener("focus", () => tip(run, box().right, box().bottom));
    path.addEventListener("blur", () => tip(null));
    path.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault(); // or the same key presses the dialog's first button
      openRun(run);
    });
  }
  $("chart").dataset.drawn = `${key} ${axis} ${shown.length}`;
}

function tip(run, x, y) {
  $("tip").hidden = !run;
  if (!run) return;
  const lines = [...facts(run)], value = run.values[state.measure];
  if (value && group.measures.findIndex((one) => one.key === state.measure) > 1) lines.push(`${measure(state.measure).label} ${round(value[0], state.measure)}`);
  fill($("tip"), el("b", {}, run.name), ...lines.map((line) => el("div", {}, line)));
  const { width, height } = $("tip").getBoundingClientRect();
  $("tip").style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
  $("tip").style.top = `${scrollY + (y + 14 + height > innerHeight ? y - height - 8 : y + 14)}px`; // it scrolls with its point
}

const linked = (run, text, file = "") => (run.link === null ? text : el("a", { href: `${run.link}/${file}` }, text));

// --- one run --------------------------------------------------------------------------------------------------

function openRun(run) {
  state.chosen = run;
  tip(null);
  drawTable();
  const rows = group.measures.filter((one) => run.values[one.key]).map((one) => {
    const value = run.values[one.key];
    const change = one.compared ? (value[1] === null ? "" : `[${round(value[1], one.key)}, ${round(value[2], one.key)}]`) : value[3] === null ? "" : interval(value.slice(3), one.key);
    return el("tr", {}, el("td", {}, label(one)), el("td", {}, round(value[0], one.key)), el("td", {}, change));
  });
  const broken = () => { $("run").close(); state.broken = group.runs.indexOf(run); drawPrompts(); $("broken").focus(); $("prompts").scrollIntoView(); };
  fill($("run"),
    el("button", { type: "button", class: "close", "aria-label": "close", click: () => $("run").close() }, "\u2715"),
    el("h2", { id: "run-name" }, run.name),
    el("p", { class: "note" }, linked(run, run.run), ...["results.json", "config.yaml"].flatMap((file) => [" \u00b7 ", linked(run, file, file)])),
    el("p", {}, Object.entries(group.axes).map(([key, name]) => `${name} ${share(run, key)}`).join(", ") + `, n\u00a0=\u00a0${run.n}`),
    run.bad ? el("p", { class: "bad" }, `${run.bad} of its images are black or came out of numbers that are not finite.`) : null,
    el("div", { class: "cards" }, group.samples.map((prompt, place) => (run.samples[place] ? pair(run, "s", place, prompt) : null))),
    el("div", { class: "wide" }, el("table", {}, el("tr", {}, ["score", "this run", "difference to the dense model, 95 %"].map((head) => el("th", { scope: "col" }, head))), rows)),
    el("p", { class: "controls" }, run.prompts && run.rank ? el("button", { type: "button", click: broken }, "which prompts it broke") : null),
  );
  $("run").showModal();
}

// --- the table ------------------------------------------------------------------------------------------------

function columns() {
  const number = (key, name, get, show, format = (value) => round(value, key)) => ({ key, name, get, show, format });
  const found = [
    number("rank", "rank", (run) => run.rank, true, (rank) => (rank ? String(rank) : "")),
    { key: "name", name: "run", get: (run) => run.name, show: true, text: true },
    { key: "run", name: "directory", get: (run) => run.run, show: false, text: true },
    number("zeros", "zeros, %", (run) => run.axes.zeros, true, (value) => value.toFixed(1)),
    number("nominal", "nominal, %", (run) => run.axes.nominal, true, (value) => value.toFixed(1)),
    number("own", "requested, %", (run) => run.axes.own, false, (value) => value.toFixed(1)),
    number("pipeline", "pipeline zeros, %", (run) => run.axes.pipeline, false, (value) => value.toFixed(1)),
    number("lost", "lost at most, %", (run) => (run.lost === null ? null : 100 * run.lost), true, (value) => value.toFixed(1)),
    number("n", "n", (run) => run.n, false, String),
  ];
  group.measures.forEach((one, place) => {
    found.push(number(one.key, one.label, (run) => run.values[one.key]?.[0] ?? null, place < 2));
    if (!one.compared && group.runs.some((run) => run.values[one.key]?.[3] != null))
      found.push({ key: `${one.key}_diff`, name: `${one.label} \u2212 dense`, get: (run) => run.values[one.key]?.[3] ?? null, show: place === 0,
        format: (value, run) => interval(run.values[one.key].slice(3), one.key) });
  });
  return found;
}

function visibleRows() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const column = state.columns.find((one) => one.key === state.sort.key);
  const rows = group.runs.filter((run) => words.every((word) => `${run.name} ${run.run}`.toLowerCase().includes(word)));
  const compare = (a, b) => {
    const [x, y] = [column.get(a), column.get(b)];
    if (x === null || y === null) return (x === null) - (y === null); // what is missing comes last either way
    return state.sort.way * (column.text ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  };
  return rows.sort(compare);
}
const cell = (column, run) => { const value = column.get(run); return value === null ? "" : column.text ? value : column.format(value, run); };

function drawTable() {
  const shown = state.columns.filter((column) => column.show);
  const sortBy = (column) => () => {
    state.sort = { key: column.key, way: state.sort.key === column.key ? -state.sort.way : 1 };
    drawTable();
    document.querySelector(`th[data-key="${CSS.escape(column.key)}"] button`).focus();
  };
  const head = (column) => el("th", { class: column.text ? "text" : null, "data-key": column.key, scope: "col",
    "aria-sort": state.sort.key === column.key ? (state.sort.way > 0 ? "ascending" : "descending") : "none" },
    el("button", { type: "button", click: sortBy(column) }, column.name));
  const body = (run, column) => {
    const text = cell(column, run);
    if (column.key === "name") return el("td", { class: "text" }, el("button", { type: "button", click: () => openRun(run) }, text));
    if (column.key === "run") return el("td", { class: "text" }, linked(run, text));
    return el("td", {}, text);
  };
  fill($("table").tHead, el("tr", {}, shown.map(head)));
  const rows = visibleRows();
  $("copied").textContent = rows.length ? "" : "no run has these words";
  fill($("table").tBodies[0], rows.map((run) => el("tr", { class: run === state.chosen ? "chosen" : null }, shown.map((column) => body(run, column)))));
}

function drawColumns() {
  const box = (column) => el("label", {}, el("input", { type: "checkbox", checked: column.show, change: (event) => { column.show = event.target.checked; drawTable(); } }), " ", column.name);
  fill($("columns"), state.columns.map(box));
}

async function copyTable() {
  const shown = state.columns.filter((column) => column.show);
  const rows = visibleRows();
  const text = [shown.map((column) => column.name), ...rows.map((run) => shown.map((column) => cell(column, run)))].map((row) => row.join("\t")).join("\n").replaceAll("\u2212", "-"); // other programs read that as a sign
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.body.appendChild(el("textarea", {}, text));
    area.select();
    document.execCommand("copy"); // where a page from disk may not use the other way
    area.remove();
  }
  $("copied").textContent = `${rows.length} rows copied`;
}

// --- the gallery ----------------------------------------------------------------------------------------------

function drawGallery() {
  const [which, place] = [$("prompt").value[0], Number($("prompt").value.slice(1))];
  const axis = $("along").value;
  if (!$("prompt").value) return;
  const pruned = group.runs.filter((run) => run.kind !== "dense");
  const stops = [...new Set([0, ...pruned.map((run) => run.axes[axis])])].sort((a, b) => a - b);
  $("slider").max = stops.length - 1;
  const at = stops[Math.min(Number($("slider").value), stops.length - 1)];
  $("at").textContent = `${at.toFixed(1)}\u00a0%`;
  $("slider").setAttribute("aria-valuetext", $("at").textContent);
  const card = (name, run) => {
    const hold = el("button", { class: "hold", type: "button", "aria-label": `${name}; hold to see the dense model's` }, picture(run, which, place));
    const swap = (one) => () => fill(hold, picture(one, which, place));
    hold.addEventListener("pointerdown", swap(dense() || run));
    for (const end of ["pointerup", "pointerleave", "pointercancel", "blur"]) hold.addEventListener(end, swap(run));
    hold.addEventListener("keydown", (event) => event.key === " " && (event.preventDefault(), swap(dense() || run)()));
    hold.addEventListener("keyup", (event) => event.key === " " && swap(run)());
    hold.addEventListener("contextmenu", (event) => event.pointerType === "touch" && event.preventDefault()); // it would end the hold
    const words = run === null ? "no run" : run.kind === "dense" ? "dense" : share(run, axis);
    return el("figure", { class: "card" }, hold, el("figcaption", {}, el("b", {}, name), name === words ? null : ` ${words}`));
  };
  const cards = series.filter((name) => !state.off.has(name)).map((name) => {
    const below = pruned.filter((run) => run.series === name && run.axes[axis] <= at).sort((a, b) => b.axes[axis] - a.axes[axis]);
    return card(name, below[0] || dense());
  });
  const scroll = [scrollX, scrollY];
  fill($("cards"), (dense() ? [card("dense", dense())] : []), ...cards);
  scrollTo(...scroll);
}

// --- which prompts break --------------------------------------------------------------------------------------

function losses(run, key) {
  const [own, other] = [run.prompts[key], dense().prompts[key]];
  return Array.from(own, (value, place) => other[place] - value);
}

function drawPrompts() {
  const runs = group.runs.filter((run) => run.prompts && run.kind !== "dense").sort((a, b) => a.rank - b.rank);
  $("prompts").hidden = !(group.prompts && runs.length);
  if ($("prompts").hidden) return;
  const first = () => runs.find((run) => run.lost === null || run.lost > group.safe) || runs[0]; // where it begins to break, or the sparsest
  if (!runs.includes(group.runs[state.broken])) state.broken = group.runs.indexOf(first());
  const run = group.runs[state.broken];
  const by = [["scores", "CLIP score lost"], ["right", "the examiner's verdict"]].filter(([key]) => run.prompts[key] && dense().prompts[key]);
  if (!by.length) return ($("prompts").hidden = true);
  if (!by.some(([key]) => key === state.order)) state.order = by[0][0];
  const labels = group.prompts.labels;
  options($("broken"), runs.map((one) => [group.runs.indexOf(one), one.name]), state.broken);
  options($("order"), by, state.order);
  options($("about"), [["", "all prompts"], ...labels.map(([about, value, n], i) => [i, `${about}: ${value} (${n})`])], state.about);
  drawCategories(run);
  $("how").textContent = group.prompts.how;
  const lost = losses(run, state.order), scores = run.prompts.scores && dense().prompts.scores ? losses(run, "scores") : lost;
  const places = lost.map((_, place) => place).filter((place) => state.about === "" || group.prompts.of[place].includes(Number(state.about)));
  places.sort((a, b) => lost[b] - lost[a] || scores[b] - scores[a]);
  const words = (place) => {
    const said = run.prompts.scores ? [`CLIP score ${[dense(), run].map((one) => round(one.prompts.scores[place], "clip_score")).join(" \u2192 ")}`] : [];
    const verdict = (one) => (one.prompts.right[place] === "1" ? "right" : "wrong");
    if (run.prompts.right && dense().prompts.right) said.push(`examiner: ${verdict(dense())} \u2192 ${verdict(run)}`);
    return said.flatMap((line) => [line, el("br")]);
  };
  fill($("pairs"), places.slice(0, state.count).map((place) => pair(run, "c", place, el("b", {}, group.prompts.captions[place]), el("br"), ...words(place))));
  $("more").hidden = places.length <= state.count;
}

function drawCategories(run) {
  const key = state.order === "right" ? "broke" : "lost", format = key === "broke" ? percent : (value) => round(value, "clip_score");
  const means = run.prompts[key];
  const rows = group.prompts.labels.map(([about, value, n], i) => ({ i, about, value, n, mean: means[i] })).sort((a, b) => b.mean[0] - a.mean[0]);
  const most = Math.max(0.001, ...rows.map((row) => row.mean[2]));
  const bar = ([mean, low, high]) => {
    const made = el("div", { class: "bar", "aria-hidden": "true" }, el("i"), el("b"));
    const at = (value) => `${(100 * Math.max(0, value)) / most}%`;
    made.children[0].style.width = at(mean);
    made.children[1].style.left = at(low);
    made.children[1].style.width = `calc(${at(high)} - ${at(low)})`;
    return made;
  };
  const choose = (i) => () => { state.about = state.about === String(i) ? "" : String(i); state.count = STEP; drawPrompts(); };
  const row = ({ i, about, value, n, mean }) => el("tr", { class: state.about === String(i) ? "chosen" : null },
    el("td", {}, `${about}: `, el("button", { type: "button", "aria-pressed": String(state.about === String(i)), click: choose(i) }, value)), el("td", {}, String(n)),
    el("td", {}, format(mean[0])), el("td", {}, `[${format(mean[1])}, ${format(mean[2])}]`), el("td", {}, bar(mean)));
  const head = ["prompts about", "n", key === "broke" ? "share broken" : "mean loss", "95 % interval"];
  fill($("categories"), el("table", {}, el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col" }, text)), el("td"))), el("tbody", {}, rows.map(row))));
}

// --- all of it ------------------------------------------------------------------------------------------------

function drawGroup(number) {
  group = data.groups[number];
  series = [...new Set(group.runs.filter((run) => run.kind !== "dense").map((run) => run.series))];
  state = { off: new Set(), measure: group.measures[0]?.key, axis: "zeros", sort: { key: "rank", way: 1 }, chosen: null, broken: null, order: "scores", about: "", count: STEP };
  state.columns = columns();
  $("title").textContent = data.groups.length > 1 ? "" : `${group.runs.length} runs of ${group.title}`;
  $("ranked").textContent = group.runs.every((run) => run.lost === null) ? "Ranked by FID, the lowest first."
    : `Ranked: first the runs that surely lost at most ${percent(group.safe)} of the dense CLIP score (worse end of the 95\u00a0% interval), the sparsest of them first; then the others, what lost least first.`;
  options($("measure"), group.measures.map((one) => [one.key, label(one)]), state.measure);
  for (const id of ["axis", "along"]) options($(id), Object.entries(group.axes), id === "axis" ? state.axis : "own");
  const captions = group.prompts && dense()?.link ? group.prompts.captions.map((text, place) => [`c${place}`, text]) : [];
  options($("prompt"), [...group.samples.map((text, place) => [`s${place}`, text]), ...captions], "s0");
  $("gallery").hidden = !$("prompt").value;
  $("slider").value = 0;
  document.querySelectorAll(".of-group").forEach((one, i) => { one.hidden = i !== number; });
  drawBest();
  drawLegend();
  if (state.measure) drawChart();
  drawColumns();
  drawTable();
  drawGallery();
  $("slider").value = Math.ceil(Number($("slider").max) * 0.7);
  drawGallery();
  drawPrompts();
}

options($("group"), data.groups.map((one, i) => [i, `${one.title} (${one.runs.length} runs)`]), 0);
$("group").parentElement.hidden = data.groups.length < 2;
$("group").addEventListener("change", (event) => drawGroup(Number(event.target.value)));
$("theme").addEventListener("change", (event) => { document.documentElement.dataset.theme = event.target.value; });
$("measure").addEventListener("change", (event) => { state.measure = event.target.value; drawChart(); });
$("axis").addEventListener("change", (event) => { state.axis = event.target.value; drawChart(); });
$("filter").addEventListener("input", drawTable);
$("copy").addEventListener("click", copyTable);
for (const id of ["prompt", "along", "slider"]) $(id).addEventListener("input", drawGallery);
$("broken").addEventListener("change", (event) => { state.broken = Number(event.target.value); state.count = STEP; drawPrompts(); });
$("order").addEventListener("change", (event) => { state.order = event.target.value; state.count = STEP; drawPrompts(); });
$("about").addEventListener("change", (event) => { state.about = event.target.value; state.count = STEP; drawPrompts(); });
$("run").addEventListener("click", (event) => event.target === $("run") && $("run").close()); // beside it
for (const kind of ["click", "focusin"]) document.addEventListener(kind, (event) => { if (!$("menu").contains(event.target)) $("menu").open = false; });
$("menu").addEventListener("keydown", (event) => { if (event.key === "Escape") { $("menu").open = false; $("menu").firstElementChild.focus(); } });
$("more").addEventListener("click", () => { state.count += STEP; drawPrompts(); });
document.addEventListener("load", (event) => { // pictures of few pixels are enlarged as they are
  if (event.target.naturalWidth && event.target.naturalWidth <= 128) document.documentElement.classList.add("small-pictures");
}, true);
drawGroup(0);
