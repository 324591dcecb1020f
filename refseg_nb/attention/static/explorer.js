// The attention explorer: one ES module without dependencies. `render` is called by anywidget, or by the host code of an exported page;
// `explore`, at the end, makes an explorer of plain arrays in any page, without Python.

const SQUARE = Float32Array.from({ length: 256 }, (_, i) => (i / 255) ** 2);
const KINDS = { raw: "raw attention", rollout: "attention rollout", relevance: "gradient relevance" };
const DIRECTIONS = { "reads": "pixels reading words", "looks": "what it looks at", "is looked at": "who looks at it" };
const SCALES = { percentile: "98th percentile", log: "logarithm", linear: "linear" };
const DECADES = 3;  // of the logarithmic scale
const ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"];
const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

const fine = v => (v >= .0995 ? `${(100 * v).toFixed(0)} %` : v > 0 ? `${(100 * v).toPrecision(2)} %` : "0 %");

export const percent = v => v >= .0995 ? `${(100 * v).toFixed(0)} %` : v >= .0005 ? `${(100 * v).toFixed(1)} %` : v > 0 ? "< 0.1 %" : "0 %";

function bytes(value) {
  return value instanceof ArrayBuffer ? new Uint8Array(value) : new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
}

function floats(value) {
  const raw = bytes(value), view = new DataView(raw.buffer, raw.byteOffset, raw.byteLength);
  return Float32Array.from({ length: raw.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

// A layer or a head by its number from 0, as people count
export const nth = (i, what) => (i < ORDINALS.length ? `${ORDINALS[i]} ${what}` : `${what} ${i + 1}`);

// ---- numbers ---------------------------------------------------------------------------------------------------------

// A block holds [layers * heads, queries, keys] as a byte each: the square of code / 255, times the largest value of its row.
function block(packed) {
  if (!packed || packed.top) return packed ?? null;
  const scales = bytes(packed.scales), view = new DataView(scales.buffer, scales.byteOffset, scales.byteLength);
  const top = Float32Array.from({ length: scales.length / 2 }, (_, i) => 2 ** (view.getUint16(2 * i, true) / 1024 - 48));
  return { codes: bytes(packed.codes), top, queries: packed.shape[1], keys: packed.shape[2] };
}

function unpackLevel(packed) {
  const [h, w] = packed.grid, [ph, pw] = packed.pool ?? packed.grid;
  const of = Uint16Array.from({ length: h * w }, (_, i) => Math.floor(Math.floor(i / w) * ph / h) * pw + Math.floor((i % w) * pw / w));
  const size = new Float32Array(ph * pw);
  for (const cell of of) size[cell] += 1;
  const each = parts => Object.fromEntries(Object.entries(parts).map(([tokens, values]) => [tokens, floats(values)]));
  const steps = packed.steps && { width: packed.steps.width, logSums: each(packed.steps.log_sums), lengths: each(packed.steps.lengths), bias: packed.steps.bias && each(packed.steps.bias) };
  return { ...packed, of, size, steps, pp: block(packed.pp), pw: block(packed.pw), wp: block(packed.wp), ww: block(packed.ww) };
}

// out[i] += weight * row (or column) of a block
function addRow(out, b, map, query, weight) {
  const start = (map * b.queries + query) * b.keys, top = weight * b.top[map * b.queries + query];
  for (let k = 0; k < b.keys; k++) out[k] += top * SQUARE[b.codes[start + k]];
}

function addColumn(out, b, map, key, weight) {
  for (let q = 0, row = map * b.queries; q < b.queries; q++, row++) out[q] += weight * b.top[row] * SQUARE[b.codes[row * b.keys + key]];
}

// What a token has with every pixel and every word, in one head: {pixels, words}, each null where the model has no such attention.
function oneHead(level, map, token, looks, wordCount) {
  const n = level.of.length, add = looks ? addRow : addColumn;
  const toWords = token.word === undefined ? (looks ? level.pw : level.wp) : level.ww;
  const toPixels = token.word === undefined ? level.pp : (looks ? level.wp : level.pw);
  const words = toWords && new Float32Array(wordCount), pixels = toPixels && new Float32Array(n);
  if (token.word !== undefined) {
    if (words) add(words, toWords, map, token.word, 1);
    if (pixels) add(pixels, toPixels, map, token.word, 1);
    return { pixels, words };
  }
  if (words) for (const [cell, weight] of token.cells) add(words, toWords, map, cell, weight);
  if (pixels) {
    const pooled = new Float32Array(level.size.length), weights = new Map();
    for (const [cell, weight] of token.cells) weights.set(level.of[cell], (weights.get(level.of[cell]) ?? 0) + weight);
    for (const [cell, weight] of weights) add(pooled, toPixels, map, cell, looks ? weight : weight / level.size[cell]);
    for (let i = 0; i < n; i++) pixels[i] = looks ? pooled[level.of[i]] / level.size[level.of[i]] : pooled[level.of[i]];
  }
  return { pixels, words };
}

// How one head made the weights of one query: for each key the score (ln weight + the query's log-sum, known to +- error), the weight,
// the length of its value, and its share of all lengths that are added. A weight whose byte is 0 gives an upper bound of the score.
function stepsOf(level, map, token) {
  const { width, logSums, lengths } = level.steps, maps = level.layers * level.heads, word = token.word !== undefined, query = word ? token.word : token.cells[0][0];
  const [h, w] = level.grid, table = level.steps.bias, at = map * (2 * h - 1) * (2 * w - 1);
  // what a pixel's scores had added: a number for the offset of the two pixels, one for words
  const added = (part, k) => (!table || word ? 0 : part === "words" ? table.words[map]
    : table.relative[at + (Math.floor(query / w) - Math.floor(k / w) + h - 1) * (2 * w - 1) + query % w - k % w + w - 1]);
  const sums = logSums[word ? "words" : "pixels"], logSum = sums[map * sums.length / maps + query], keys = [];
  for (const [part, b] of [["pixels", word ? level.wp : level.pp], ["words", word ? level.ww : level.pw]]) {
    if (!b) continue;
    const row = map * b.queries + query;
    for (let k = 0; k < b.keys; k++) {
      const code = b.codes[row * b.keys + k], bias = added(part, k), score = Math.log(b.top[row] * (Math.max(code, .5) / 255) ** 2) + logSum - bias;
      keys.push({ part, key: k, score, bias, error: code ? 2 * Math.log(code / (code - .5)) : Infinity, weight: b.top[row] * SQUARE[code], length: lengths[part][map * b.keys + k] });
    }
  }
  const top = Math.max(...keys.map(k => k.weight)), all = keys.reduce((sum, k) => sum + k.weight * k.length, 0) || 1;
  for (const k of keys) { k.exp = k.weight / top; k.added = k.weight * k.length / all; }
  return { width, keys, biased: Boolean(table), sum: keys.reduce((sum, k) => sum + k.exp, 0) };
}

const signed = v => `${v < 0 ? "−" : "+"}${Math.abs(v).toFixed(2)}`;

// A number with as many digits as its error leaves, two at the most
const digits = (v, error) => {
  const text = v.toFixed(clamp(Math.floor(-Math.log10(2 * error)), 0, 2));
  return `${error > .6 ? "≈ " : ""}${+text ? text.replace("-", "−") : "0"}`;
};

// Relevance has rows of any sum: each number becomes its share of the row
function shareOut(view) {
  const sum = total(view.pixels) + total(view.words) || 1;
  for (const part of [view.pixels, view.words]) if (part) for (let i = 0; i < part.length; i++) part[i] /= sum;
}

// The mean and the largest over heads
function combine(views) {
  const found = { mean: { pixels: null, words: null }, max: { pixels: null, words: null } };
  for (const part of ["pixels", "words"]) {
    if (!views[0][part]) continue;
    const n = views[0][part].length, mean = found.mean[part] = new Float32Array(n), max = found.max[part] = new Float32Array(n);
    for (const view of views) for (let i = 0, values = view[part]; i < n; i++) {
      mean[i] += values[i] / views.length;
      if (values[i] > max[i]) max[i] = values[i];
    }
  }
  return found;
}

const total = a => { let s = 0; if (a) for (const v of a) s += v; return s; };
const largest = a => { let s = 0; if (a) for (const v of a) if (v > s) s = v; return s; };

// The value at which the light is full. One bright cell must not darken all others: the percentile leaves out the brightest 2 %, one at least.
export function fullAt(values, scale) {
  const top = largest(values), n = values?.length ?? 0;
  if (scale !== "percentile" || n < 8) return top;
  return Float32Array.from(values).sort()[n - 1 - Math.max(1, Math.floor(.02 * n))] || top;
}

// How bright a value is, from 0 to 1
export const light = (v, top, scale) => (!(v > 0) ? 0 : scale === "log" ? clamp(1 + Math.log10(v / top) / DECADES, 0, 1) : Math.min(v / top, 1));

// Shares of a sum: what the words get among themselves, however little all of them get together
const shares = values => { const sum = total(values); return values && Array.from(values, v => (sum ? v / sum : 0)); };

// ---- plain arrays ----------------------------------------------------------------------------------------------------

// Floats as the bytes of `block`: the same numbers that Python's pack_rows keeps
function packRows(weights, maps, [q0, q1], [k0, k1], queries, keys) {
  const Q = q1 - q0, K = k1 - k0, codes = new Uint8Array(maps * Q * K), top = new Float32Array(maps * Q);
  for (let m = 0, row = 0; m < maps; m++) for (let q = q0; q < q1; q++, row++) {
    const from = (m * queries + q) * keys;
    let most = 0;
    for (let k = k0; k < k1; k++) most = Math.max(most, weights[from + k]);
    if (!most) continue;
    top[row] = 2 ** (Math.ceil((Math.log2(Math.max(most, 2 ** -48)) + 48) * 1024) / 1024 - 48);
    for (let k = k0; k < k1; k++) codes[row * K + k - k0] = Math.round(255 * Math.sqrt(clamp(weights[from + k] / top[row], 0, 1)));
  }
  return { codes, top, queries: Q, keys: K };
}

// One level of plain arrays: {name, grid: [H, W], layers, heads, queries, keys, weights: flat [layer, head, query, key]}
function packLevel({ name, grid, layers, heads, queries = "both", keys = "both", weights }, wordCount) {
  const n = grid[0] * grid[1], size = of => (of === "both" ? n + wordCount : of === "words" ? wordCount : n);
  const expected = layers * heads * size(queries) * size(keys);
  if (weights.length !== expected) throw new Error(`level ${name}: ${weights.length} weights, but ${layers} layers x ${heads} heads x ${size(queries)} queries x ${size(keys)} keys are ${expected}`);
  const part = (of, tokens) => (of === "both" ? (tokens === "pixels" ? [0, n] : [n, n + wordCount]) : of === tokens ? [0, size(of)] : null);
  const packed = { name: String(name), grid: [...grid], layers, heads, keys, pool: null, steps: null };
  for (const [block, rows, columns] of [["pp", "pixels", "pixels"], ["pw", "pixels", "words"], ["wp", "words", "pixels"], ["ww", "words", "words"]]) {
    const q = part(queries, rows), k = part(keys, columns);
    packed[block] = q && k ? packRows(weights, layers * heads, q, k, size(queries), size(keys)) : null;
  }
  return packed;
}

// Attention rollout of a level, as Python's `rollout`: `residual` is the share of itself that a token keeps in each layer
function rolledLevel(level, wordCount, residual) {
  const n = level.grid[0] * level.grid[1] + wordCount, out = new Float32Array(level.layers * n * n);
  let rolled = null;
  for (let l = 0; l < level.layers; l++) {
    const a = new Float32Array(n * n), next = new Float32Array(n * n);
    for (let h = 0; h < level.heads; h++) for (let i = 0, from = (l * level.heads + h) * n * n; i < n * n; i++) a[i] += level.weights[from + i] * (1 - residual) / level.heads;
    for (let i = 0; i < n; i++) a[i * n + i] += residual;
    if (!rolled) next.set(a);
    else for (let i = 0; i < n; i++) for (let m = 0; m < n; m++) for (let j = 0, w = a[i * n + m]; j < n; j++) next[i * n + j] += w * rolled[m * n + j];
    out.set(rolled = next, l * n * n);
  }
  return { ...level, heads: 1, weights: out };
}

// The border of a mask {data, width, height} as closed lines x0, y0, x1, y1, … in units of the width and the height
export function outline({ data, width, height }) {
  const inside = (r, c) => r >= 0 && c >= 0 && r < height && c < width && Boolean(data[r * width + c]), next = new Map();
  const edge = (r0, c0, r1, c1) => { const from = r0 * (width + 1) + c0, to = r1 * (width + 1) + c1; next.has(from) ? next.get(from).push(to) : next.set(from, [to]); };
  for (let r = 0; r < height; r++) for (let c = 0; c < width; c++) if (inside(r, c)) {  // the mask on the right hand of each edge
    if (!inside(r - 1, c)) edge(r, c, r, c + 1);
    if (!inside(r, c + 1)) edge(r, c + 1, r + 1, c + 1);
    if (!inside(r + 1, c)) edge(r + 1, c + 1, r + 1, c);
    if (!inside(r, c - 1)) edge(r + 1, c, r, c);
  }
  const lines = [];
  while (next.size) {
    const [start] = next.keys(), line = [];
    let here = start;
    do {
      line.push((here % (width + 1)) / width, Math.floor(here / (width + 1)) / height);
      const ends = next.get(here), to = ends.pop();
      if (!ends.length) next.delete(here);
      here = to;
    } while (here !== start);
    lines.push(line);
  }
  return lines;
}

function packMask(mask, grids) {
  if (!mask) return null;
  const { data, width, height } = mask, cover = {};
  if (data.length !== width * height) throw new Error(`a mask of ${width} x ${height} pixels has ${width * height} entries, not ${data.length}`);
  for (const [h, w] of grids) cover[`${h}x${w}`] = Array.from({ length: h * w }, (_, i) => {
    const y = Math.floor(i / w), x = i % w, r0 = Math.floor(y * height / h), r1 = Math.ceil((y + 1) * height / h), c0 = Math.floor(x * width / w), c1 = Math.ceil((x + 1) * width / w);
    let sum = 0;
    for (let r = r0; r < r1; r++) for (let c = c0; c < c1; c++) sum += data[r * width + c] ? 1 : 0;
    return sum / ((r1 - r0) * (c1 - c0));
  });
  return { outline: outline(mask), cover, area: data.reduce((sum, v) => sum + (v ? 1 : 0), 0) / data.length };
}

// An answer of plain arrays as a panel. `attention` is a list of levels (see packLevel), or {raw: […], rollout: […], relevance: […]}; with `residual`,
// the share of itself that a token keeps in a layer, rollout is computed here. `mask` and `truth` are {data, width, height}.
export function packAnswer({ phrase, words, unknown = [], title = "", note, score, mask = null, truth = null, attention, residual = null }) {
  const kinds = Array.isArray(attention) ? { raw: attention } : { ...attention };
  if (!kinds.raw?.length) throw new Error("an answer needs attention: a list of levels");
  const square = level => (level.queries ?? "both") === "both" && (level.keys ?? "both") === "both" && level.grid[0] * level.grid[1] <= 400;
  if (residual !== null && !kinds.rollout && kinds.raw.every(square)) kinds.rollout = kinds.raw.map(level => rolledLevel(level, words.length, residual));
  const grids = kinds.raw.map(level => level.grid);
  return {
    title, phrase: phrase ?? words.join(" "), words, unknown, note: note ?? (score === undefined || score === null ? "" : `score ${score.toFixed(2)}`),
    kinds: Object.fromEntries(Object.entries(kinds).map(([kind, levels]) => [kind, levels.map(level => packLevel(level, words.length))])),
    masks: { predicted: packMask(mask, grids), truth: packMask(truth, grids) },
  };
}

// ---- elements --------------------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  if (element.matches("button, input, select, summary, [tabindex]")) element.setAttribute("data-lm-suppress-shortcuts", "true");
  element.append(...children);
  return element;
}

function picker(label, options, value, onpick) {
  const select = make("select", { onchange: () => onpick(select.value) }, ...Object.entries(options).map(([v, text]) => make("option", { value: v }, text)));
  select.value = value;
  return { select, field: make("label", { class: "field" }, make("span", {}, label), select) };
}

// ---- the widget ------------------------------------------------------------------------------------------------------

export function render({ model, el }) {
  const root = make("section", { class: "refseg-explorer", "aria-label": "Attention explorer", "data-lm-suppress-shortcuts": "true" });
  const S = { hover: null, locked: null, cursor: null, anchor: null, pair: null, boxing: false, smooth: false, shared: false, alpha: .7, readout: "", busy: false, turn: 0, own: null, tour: null };
  const inks = new Uint32Array(256), veils = new Uint32Array(256), images = new WeakMap();
  let panels = [], palette = null, colours = [], picture = null, dark = false, pending = 0, speakLater = 0;

  // JupyterLab listens for single keys on the page: nothing typed in here may reach it (saving may)
  root.addEventListener("keydown", event => {
    if (!((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s")) event.stopPropagation();
    if (event.key === "Escape" && event.target.tagName !== "INPUT" && event.target.tagName !== "SELECT") lock(null);
  });

  const pick = name => model.get(name);
  const put = (name, value) => { model.set(name, value); model.save_changes(); schedule(); };
  // the phrase can be changed by a kernel, or by the page's own `segment`, an async function from a phrase to an answer of plain arrays
  const editable = () => Boolean(pick("live")) || typeof pick("segment") === "function";

  // -- controls
  const input = make("input", { type: "text", spellcheck: "false", autocomplete: "off", enterkeyhint: "go" });
  const ask = make("button", { type: "submit", class: "primary" }, "Segment");
  const keep = make("button", { type: "button", title: "Keep the new answer alone: the next edit is compared with it", onclick: () => (pick("live") ? model.send({ do: "keep" }) : keepHere()) }, "Keep the new one");
  const guide = make("button", { type: "button", class: "guide", onclick: () => startTour() }, "One-minute tour");
  const status = make("p", { class: "status", role: "status" });
  const field = make("label", { class: "field grow" }, make("span", {}, "Phrase"), input), fixed = make("p", { class: "grow fixed" });
  const form = make("form", { class: "phrase" }, field, fixed, ask, keep, guide);
  form.addEventListener("submit", event => {
    event.preventDefault();
    const phrase = input.value.trim();
    if (!editable() || (phrase === pick("phrase") && (pick("live") || !pick("error")))) return;
    S.busy = true;
    if (pick("live")) put("phrase", phrase);
    else answerHere(phrase);
  });
  const kind = picker("Show", KINDS, "raw", v => put("kind", v));
  const direction = picker("Direction", DIRECTIONS, "reads", v => put("direction", v));
  const scale = picker("Scale of the light", SCALES, "percentile", v => put("scale", v));
  const toggle = (text, title, flip) => {
    const button = make("button", { type: "button", "aria-pressed": "false", title, onclick: () => { button.setAttribute("aria-pressed", String(flip())); schedule(); } }, text);
    return button;
  };
  const smooth = toggle("Smooth", "Interpolate between the cells' centres", () => (S.smooth = !S.smooth));
  const shared = toggle("Same scale everywhere", "One scale for all maps, instead of one for each", () => (S.shared = !S.shared));
  const boxing = toggle("a box", "Drag a box: the mean over its pixels. With a mouse, dragging always makes a box; on the keyboard, shift and arrows", () => (S.boxing = !S.boxing));
  const ofMask = make("button", { type: "button", title: "The mean over the pixels of the answer", onclick: () => lock({ panel: 0, mask: "predicted" }) }, "the answer");
  const ofTruth = make("button", { type: "button", title: "The mean over the pixels of the true mask", onclick: () => lock({ panel: panels.find(panel => panel.masks.truth)?.index ?? 0, mask: "truth" }) }, "the true mask");
  const unlock = make("button", { type: "button", title: "Unlock, and point again (Esc)", onclick: () => lock(null) }, "Unlock");
  const alpha = make("input", { type: "range", min: "0", max: "95", value: "70", oninput: () => { S.alpha = alpha.value / 100; schedule(); } });
  const controls = make("div", { class: "controls" }, kind.field, direction.field, scale.field,
    make("label", { class: "field" }, make("span", {}, "Shade"), alpha),
    make("div", { class: "field", role: "group", "aria-label": "Look from" }, make("span", {}, "Look from"), make("div", { class: "buttons" }, ofMask, ofTruth, boxing)),
    make("div", { class: "field" }, make("span", { "aria-hidden": "true" }, "View"), make("div", { class: "buttons" }, smooth, shared, unlock)));
  const holder = make("div", { class: "panels" });
  const live = make("p", { class: "hidden", "aria-live": "polite" });
  const glossary = make("details", { class: "glossary" }, make("summary", {}, "Level, layer, head: what are they?"), make("dl", {},
    ...[["level", "one of the feature maps that the model reads the phrase into; names and grids are the model's"], ["layer", "how often the tokens, pixels and words, have exchanged information by then; the first layer comes first"],
      ["head", "each layer attends several times side by side, and each time is a head with weights of its own"], ["light", "the share of a pixel: the picture is lit where the weight is, and its colours stay"]].flatMap(([t, d]) => [make("dt", {}, t), make("dd", {}, d)])));
  const caveat = make("p", { class: "caveat" }, "Attention shows where weights went, not why the answer is what it is. Chapter 14 measures how far the one tells about the other.");
  const tour = { text: make("p", { "aria-live": "polite" }), count: make("span", { class: "count" }), next: make("button", { type: "button", class: "primary", onclick: () => nextStep() }, "Next"), end: make("button", { type: "button", onclick: () => endTour() }, "End") };
  tour.bar = make("div", { class: "tour", role: "region", "aria-label": "Guided tour", hidden: true }, tour.count, tour.text, make("div", { class: "buttons" }, tour.next, tour.end));
  root.append(form, status, tour.bar, holder, controls, glossary, caveat, live);
  el.append(root);

  // -- state
  const kindOf = panel => panel.kinds[pick("kind")] ? pick("kind") : Object.keys(panel.kinds)[0];
  const levelsOf = panel => panel.kinds[kindOf(panel)];
  function selected(panel) {
    const levels = levelsOf(panel), l = Math.max(0, levels.findIndex(level => String(level.name) === pick("level")));
    const level = levels[l], layer = clamp(pick("layer") < 0 ? level.layers + pick("layer") : pick("layer"), 0, level.layers - 1);
    const head = pick("head"), known = head === "mean" || head === "max" || (Number.isInteger(+head) && +head >= 0 && +head < level.heads);
    return { l, level, layer, head: known ? head : "mean" };
  }

  function lock(what) {
    if (what && JSON.stringify(what) === JSON.stringify(S.locked)) what = null;
    S.locked = what; S.hover = null; S.readout = "";
    if (what?.word === undefined) S.pair = null;
    model.set("locked", what); model.save_changes();
    schedule(true);
  }

  function select(level, layer, head) {
    model.set("level", level); model.set("layer", layer); model.set("head", head); model.save_changes();
    schedule();
  }

  // -- answers of the page's own model
  async function answerHere(phrase) {
    const turn = ++S.turn;
    schedule();
    try {
      const answers = [await pick("segment")(phrase)].flat();
      if (turn !== S.turn) return;  // a later phrase was asked for
      const fresh = answers.map(answer => withTruth(packAnswer({ phrase, ...answer }))), data = pick("data"), [old] = data.panels;
      S.name ??= old.title.replace(/: (before|after)$/, "");
      const beside = (panel, when) => ({ ...panel, title: [S.name, when].filter(Boolean).join(": ") });
      S.busy = false; S.pair = null;
      model.set("error", ""); model.set("locked", null); model.set("phrase", phrase); model.set("can_keep", fresh.length === 1);
      model.set("data", { ...data, panels: fresh.length > 1 ? fresh : [beside(old, "before"), beside(fresh[0], "after")] });
    } catch (error) {
      if (turn !== S.turn) return;
      S.busy = false;
      model.set("error", String(error?.message ?? error));
    }
    model.save_changes();
    schedule(true);
  }

  // The true mask is drawn only under the phrase that it belongs to
  function withTruth(panel) {
    const same = words => words.join(" ").toLowerCase() === panel.words.join(" ").toLowerCase();
    if (panel.masks.truth || !S.own || S.own.url !== pick("data").image.url || !same(S.own.words)) return panel;
    return { ...panel, masks: { ...panel.masks, truth: S.own.mask } };
  }

  function keepHere() {
    const data = pick("data");
    model.set("locked", null); model.set("can_keep", false);
    model.set("data", { ...data, panels: [{ ...data.panels[data.panels.length - 1], title: S.name ?? "" }] });
    model.save_changes();
  }

  const masks = { predicted: "the answer", truth: "the true mask" };

  const keysOf = (panel, level) => (level.keys !== "words" ? level.of.length : 0) + (level.keys !== "pixels" ? panel.words.length : 0);

  // The token that a panel shows: {cells: [[cell, weight]], name} or {word, name} or null; `what` may come from the other panel
  function resolve(panel, what, level) {
    const [h, w] = level.grid;
    what ??= { panel: panel.index, mask: "predicted" };
    if (what.word !== undefined) {
      const from = panels[what.panel] ?? panel, text = from.words[what.word];
      const word = panel.words[what.word] === text ? what.word : panel.words.indexOf(text);
      return word < 0 ? null : { word, name: `“${text}”` };
    }
    if (what.mask) {
      const cover = panel.masks[what.mask]?.cover[`${h}x${w}`], sum = total(cover);
      if (!sum) return { cells: Array.from({ length: h * w }, (_, i) => [i, 1 / (h * w)]), name: "all pixels (the mean)" };
      return { cells: Array.from(cover, (v, i) => [i, v / sum]).filter(([, v]) => v), name: `${masks[what.mask]} (the mean over its pixels)` };
    }
    const [gh, gw] = what.grid, scaled = (v, from, to) => Math.floor((v + .5) * to / from);
    if (what.pixel) {
      const [r, c] = [scaled(what.pixel[0], gh, h), scaled(what.pixel[1], gw, w)];
      return { cells: [[r * w + c, 1]], at: [r, c, r + 1, c + 1], name: `pixel row ${r}, column ${c}` };
    }
    const [r0, c0, r1, c1] = what.box.map((v, i) => (i % 2 ? v * w / gw : v * h / gh)).map((v, i) => (i < 2 ? Math.floor(v) : Math.ceil(v)));
    const cells = [];
    for (let r = r0; r < r1; r++) for (let c = c0; c < c1; c++) cells.push([r * w + c, 1 / ((r1 - r0) * (c1 - c0))]);
    return { cells, at: [r0, c0, r1, c1], name: `box of rows ${r0}–${r1 - 1}, columns ${c0}–${c1 - 1} (the mean)` };
  }

  // -- building
  function build() {
    const data = pick("data");
    palette = data.palette ? bytes(data.palette) : Uint8Array.from({ length: 768 }, (_, k) => {
      const at = Math.floor(k / 3) / 255 * 8, i = Math.min(7, Math.floor(at)), [a, b] = [VIRIDIS[i][k % 3], VIRIDIS[i + 1][k % 3]];
      return Math.round(a + (b - a) * (at - i));
    });
    for (let i = 0; i < 256; i++) inks[i] = (palette[3 * i] | palette[3 * i + 1] << 8 | palette[3 * i + 2] << 16 | 255 << 24) >>> 0;
    colours = Array.from({ length: 256 }, (_, i) => `rgb(${palette[3 * i]},${palette[3 * i + 1]},${palette[3 * i + 2]})`);
    const own = data.panels.find(panel => panel.masks.truth);
    if (own) S.own = { url: data.image.url, words: own.words, mask: own.masks.truth };
    const image = new Image();
    image.onload = () => {
      picture = image;
      const small = make("canvas", { width: 16, height: 16 }), g = small.getContext("2d", { willReadFrequently: true });
      g.drawImage(image, 0, 0, 16, 16);
      const d = g.getImageData(0, 0, 16, 16).data;
      let sum = 0;
      for (let i = 0; i < d.length; i += 4) sum += (.299 * d[i] + .587 * d[i + 1] + .114 * d[i + 2]) / 256;
      dark = sum < 56;  // a dark picture is veiled by white, since black would not show
      for (let i = 0; i < 256; i++) veils[i] = ((255 - i) << 24 | (dark ? 0xffffff : 0x000000)) >>> 0;
      schedule();
    };
    image.src = data.image.url;
    S.hover = S.cursor = S.anchor = S.pair = null;
    if (S.tour?.steps && S.tour.at + 1 < S.tour.steps.length) { S.tour = null; tour.bar.hidden = true; spot(null); }  // it was about other words
    for (const panel of panels) panel.observer.disconnect();
    panels = data.panels.map((packed, index) => buildPanel(packed, index, data.image));
    holder.replaceChildren(...panels.map(panel => panel.element));
    holder.classList.toggle("two", panels.length > 1);
    const kinds = new Set(panels.flatMap(panel => Object.keys(panel.kinds)));
    for (const option of kind.select.options) option.hidden = option.disabled = !kinds.has(option.value);
    ofTruth.hidden = !panels.some(panel => panel.masks.truth);
    ofMask.hidden = !panels.some(panel => panel.masks.predicted);
    input.value = pick("phrase");
    schedule();
  }

  function buildPanel(packed, index, image) {
    const panel = { ...packed, index, kinds: {}, atlasOf: null };
    for (const [name, levels] of Object.entries(packed.kinds)) panel.kinds[name] = levels.map(unpackLevel);
    panel.words = packed.words;
    panel.chips = packed.words.map((word, i) => {
      const unknown = packed.unknown.includes(i), value = make("span", { class: "value" }), all = make("span", { class: "all" });
      const chip = make("button", {
        type: "button", class: unknown ? "word unknown" : "word", "aria-pressed": "false", title: unknown ? "The model does not know this word: it read <unk>" : null,
        onclick: () => lock({ panel: index, word: i }), onpointerenter: event => event.pointerType !== "touch" && point({ panel: index, word: i }), onpointerleave: leave,
        onfocus: () => chip.matches(":focus-visible") && point({ panel: index, word: i }, true), onblur: leave,
      }, make("span", { class: "text" }, word), value, all);
      return { chip, value, all };
    });
    panel.canvas = make("canvas", { "aria-hidden": "true" });
    panel.stage = make("div", {
      class: "stage", tabindex: "0", role: "application", "aria-roledescription": "attention map", "aria-describedby": `${uid}-help-${index}`,
      "aria-label": `Picture, ${packed.title || "the answer"}: “${packed.phrase}”`, style: `aspect-ratio: ${image.width} / ${image.height}; max-width: ${Math.round(560 * image.width / image.height)}px`,
    }, panel.canvas);
    panel.help = make("p", { class: "hidden", id: `${uid}-help-${index}` }, "Arrow keys move over the pixels, shift and arrows make a box, Enter locks, Escape unlocks.");
    panel.bar = make("canvas", { class: "bar", width: "256", height: "1", "aria-hidden": "true" });
    panel.ticks = make("div", { class: "ticks" }); panel.unit = make("p", { class: "unit" }); panel.among = make("p", { class: "unit among" }); panel.now = make("p", { class: "now" });
    panel.says = make("p", { class: "says" }); panel.inside = make("p", { class: "inside" }); panel.readout = make("p", { class: "readout" });
    panel.legend = make("p", { class: "legend" });
    for (const [name, text] of [["predicted", "the answer"], ["truth", "the true mask"]]) if (packed.masks[name]) panel.legend.append(make("span", { class: `key ${name}` }), make("span", {}, text));
    panel.atlas = make("div", { class: "atlas", role: "radiogroup", "aria-label": "Level, layer and head" });
    panel.matrix = makeMatrix(panel);
    panel.rows = make("tbody");
    const table = make("details", {}, make("summary", {}, "Table of the words"), make("table", {}, make("thead", {}, make("tr", {}, ...["word", "share among words", "share of all"].map(text => make("th", { scope: "col" }, text)))), panel.rows));
    const head = make("header", {}, make("p", { class: "title" }, packed.title || "Attention"), make("p", { class: "note" }, packed.note));
    if (panel.kinds.raw?.some(level => level.steps)) panel.made = makeSteps();
    panel.element = make("article", { class: "panel", "aria-label": packed.title || "Attention" }, head, make("div", { class: "words", role: "group", "aria-label": "Words of the phrase" }, ...panel.chips.map(c => c.chip)), panel.among,
      make("div", { class: "left" }, panel.stage, panel.help, panel.legend, make("div", { class: "scale" }, panel.bar, panel.ticks, panel.unit), panel.readout),
      make("div", { class: "right" }, panel.now, panel.says, panel.inside, make("div", { class: "maps" }, panel.matrix.element, panel.atlas), table), ...(panel.made ? [panel.made.element] : []));
    listen(panel);
    panel.observer = new ResizeObserver(() => schedule());
    panel.observer.observe(panel.stage);
    return panel;
  }

  // The table of the steps; it stands only under models that bring what it needs
  function makeSteps() {
    const why = make("p", { class: "why" }), walk = make("p", { class: "walk" }), root = make("sup", {}), plus = make("span", {}, "+ mask"), words = make("tbody"), pixels = make("tbody"), foot = make("tfoot");
    const heads = ["key", "q·k", ["÷\u00a0√", root, " =\u00a0s"], [plus], "exp (s\u00a0−\u00a0max)", "÷\u00a0sum =\u00a0weight", "× length", "adds"].map(text => make("th", { scope: "col" }, ...[text].flat()));
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), words, pixels, foot);
    const scroll = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Steps from q·k to what each key adds" }, table);
    const note = make("p", { class: "unit" }, "The scores s are recovered from the weights and one number a row, s = ln weight + ln Σ exp s, with as many digits as the stored bytes leave. "
      + "Adds: weight × length of the key's value behind the output's matrix, as a share of all lengths (Kobayashi et al., 2020). Long values may still cancel each other.");
    const found = make("div", {}, walk, scroll, note);
    const element = make("details", { class: "made" }, make("summary", {}, "How these weights are made"), why, found);
    return { element, why, walk, root, plus, words, pixels, foot, found };
  }

  // What is shown, in words
  const whereWords = (level, layer, levels) => [levels.length > 1 && `level ${level.name}`, level.layers > 1 ? nth(layer, "layer") : levels.length > 1 ? null : "one layer"].filter(Boolean).join(", ");
  const headWords = (level, head) => (level.heads === 1 ? "one head" : head === "mean" ? `mean of ${level.heads} heads` : head === "max" ? "strongest head" : nth(+head, "head"));

  // The word-to-word part of Figure 7: each row is a word that looks, its shares among the words
  function makeMatrix(panel) {
    const words = panel.words, body = make("tbody"), cells = [], text = make("p", { class: "unit" }), T = words.length;
    const focusOn = k => { for (const [i, cell] of cells.entries()) cell.tabIndex = i === k ? 0 : -1; cells[k].focus(); };
    words.forEach((word, i) => {
      const row = make("tr", {}, make("th", { scope: "row" }, word));
      words.forEach((_, j) => {
        const mine = () => (pick("direction") === "looks" ? i : j);  // the word that looks, or the one that is looked at
        const cell = make("td", {
          tabindex: i + j ? "-1" : "0",
          onclick: () => {
            const word = mine(), again = S.locked?.word === word && S.locked.panel === panel.index && !(S.pair?.[0] === i && S.pair[1] === j);
            S.pair = [i, j, panel.index];
            if (again) schedule(true); else lock({ panel: panel.index, word });
          },
          onpointerenter: event => { if (event.pointerType !== "touch" && !S.locked) { S.pair = [i, j, panel.index]; point({ panel: panel.index, word: mine() }); } }, onpointerleave: () => { if (!S.locked) S.pair = null; leave(); },
          onfocus: () => { if (cell.matches(":focus-visible") && !S.locked) { S.pair = [i, j, panel.index]; point({ panel: panel.index, word: mine() }, true); } }, onblur: leave,
        });
        cells.push(cell);
        row.append(cell);
      });
      body.append(row);
    });
    const table = make("table", { role: "grid", "aria-label": "Word to word: each row is a word that looks, each column a word that is looked at" },
      make("thead", {}, make("tr", {}, make("td", {}, "looks at →"), ...words.map(word => make("th", { scope: "col" }, make("span", {}, word))))), body);
    body.addEventListener("keydown", event => {
      const now = cells.indexOf(event.target.closest("td")), step = { ArrowUp: -T, ArrowDown: T, ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (now < 0 || (step === undefined && event.key !== "Enter" && event.key !== " ")) return;
      event.preventDefault();
      if (step === undefined) cells[now].click();
      else if (now + step >= 0 && now + step < T * T && (Math.abs(step) === T || Math.floor((now + step) / T) === Math.floor(now / T))) focusOn(now + step);
    });
    const element = make("div", { class: "matrix" }, make("p", { class: "caption" }, "Word to word, % among the words"), make("div", { class: "scroll" }, table), text);
    return { element, cells, text, of: null };
  }

  // The numbers of the matrix, [T][T]: what each word has for each, and among the words
  function matrixOf(panel) {
    const { l, level, layer, head } = selected(panel), key = `${kindOf(panel)}/${l}/${layer}/${head}`;
    if (!level.ww) return null;
    if (panel.matrixAt !== key) {
      panel.matrixAt = key;
      panel.matrixRows = panel.words.map((_, word) => {
        const views = Array.from({ length: level.heads }, (_, h) => oneHead(level, layer * level.heads + h, { word }, true, panel.words.length));
        if (kindOf(panel) === "relevance") for (const view of views) shareOut(view);
        const view = +head >= 0 ? views[+head] : combine(views)[head];
        return { all: Array.from(view.words), among: shares(view.words) };
      });
    }
    return panel.matrixRows;
  }

  function paintMatrix(panel) {
    const rows = matrixOf(panel), { matrix, words } = panel, T = words.length;
    matrix.element.hidden = !rows || T < 2;
    if (!rows || T < 2) { matrix.of = null; return; }
    const word = panel.token?.word, down = !panel.looks;
    if (matrix.of !== rows) {
      const top = Math.max(...rows.flatMap(row => row.among)) || 1;
      matrix.of = rows;
      rows.forEach((row, i) => row.among.forEach((v, j) => {
        const cell = matrix.cells[i * T + j], c = Math.round(255 * v / top);
        cell.textContent = (100 * v).toFixed(0);
        cell.style.background = colours[c]; cell.style.color = luminance(c) > .18 ? "#000" : "#fff";
        cell.setAttribute("aria-label", `${cell.textContent} %: “${words[i]}” looks at “${words[j]}”`);
      }));
    }
    const pair = S.pair?.[2] === panel.index && word === S.pair[down ? 1 : 0] ? S.pair : null;
    matrix.cells.forEach((cell, k) => {
      cell.classList.toggle("here", word !== undefined && (down ? k % T : Math.floor(k / T)) === word);
      cell.setAttribute("aria-selected", String(Boolean(pair && k === pair[0] * T + pair[1])));
    });
    matrix.text.textContent = pair ? `“${words[pair[0]]}” looks at “${words[pair[1]]}”: ${percent(rows[pair[0]].among[pair[1]])} of what it gives to words, ${percent(rows[pair[0]].all[pair[1]])} of all.`
      : word !== undefined && !down ? `“${words[word]}” gives ${percent(total(rows[word].all))} of its weight to words.` : "Each row is a word that looks, each column a word that is looked at. Click a cell to lock its word.";
  }

  // One small map for each level and layer (rows), and head (columns), and the mean and the largest over heads
  function buildAtlas(panel) {
    const levels = levelsOf(panel);
    panel.atlasOf = levels; panel.cells = [];
    const heads = Math.max(...levels.map(level => level.heads));
    const columns = heads > 1 ? ["mean", "max", ...Array.from({ length: heads }, (_, i) => String(i))] : ["0"];
    const short = c => (c === "mean" ? "mean" : c === "max" ? "max" : +c < 3 ? ["1st", "2nd", "3rd"][c] : `${+c + 1}th`);
    panel.atlas.style.setProperty("--columns", columns.length);
    panel.atlas.replaceChildren(make("span", { class: "corner", "aria-hidden": "true" }, heads > 1 ? "heads:" : ""),
      ...columns.map(c => make("span", { class: "column", "aria-hidden": "true" }, heads > 1 ? short(c) : "")));
    levels.forEach((level, l) => {
      for (let layer = 0; layer < level.layers; layer++) {
        const where = whereWords(level, layer, levels);
        panel.atlas.append(make("span", { class: "row", "aria-hidden": "true" }, where));
        for (const head of columns) {
          if (+head >= level.heads) { panel.atlas.append(make("span")); continue; }
          const canvas = make("canvas", { width: level.grid[1], height: level.grid[0] }), name = `${where}, ${headWords(level, head)}`;
          const cell = make("button", { type: "button", role: "radio", "aria-label": name, title: name, onclick: () => select(String(level.name), layer, head) }, canvas);
          panel.cells.push({ cell, canvas, l, layer, head, context: canvas.getContext("2d") });
          panel.atlas.append(cell);
        }
      }
    });
    panel.columns = columns.length;
  }

  // -- pointing
  function point(what, speak = false) {
    if (S.locked) { schedule(); return; }
    S.hover = what; schedule(speak);
  }
  function leave() { S.hover = null; S.readout = ""; schedule(); }

  function cellAt(panel, event) {
    const [h, w] = selected(panel).level.grid, box = panel.canvas.getBoundingClientRect();
    return [clamp(Math.floor((event.clientY - box.top) / box.height * h), 0, h - 1), clamp(Math.floor((event.clientX - box.left) / box.width * w), 0, w - 1)];
  }

  const boxOf = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]) + 1, Math.max(a[1], b[1]) + 1];

  function listen(panel) {
    const { stage, index } = panel, grid = () => selected(panel).level.grid;
    let down = null, dragged = false;
    stage.addEventListener("pointerdown", event => {
      if (event.button) return;
      down = cellAt(panel, event); dragged = false;
      if (event.pointerType === "mouse" || S.boxing) { try { stage.setPointerCapture(event.pointerId); } catch { /* a made-up event has no pointer */ } }
    });
    stage.addEventListener("pointermove", event => {
      const at = cellAt(panel, event);
      if (down && (event.pointerType === "mouse" || S.boxing) && (at[0] !== down[0] || at[1] !== down[1])) dragged = true;
      if (dragged) { S.locked = null; S.hover = { panel: index, box: boxOf(down, at), grid: grid() }; schedule(); return; }
      if (S.locked) { S.readout = at; schedule(); return; }
      if (S.hover?.pixel && S.hover.panel === index && S.hover.pixel[0] === at[0] && S.hover.pixel[1] === at[1]) return;
      point({ panel: index, pixel: at, grid: grid() });
    });
    stage.addEventListener("pointerup", event => {
      if (!down) return;
      const at = cellAt(panel, event);
      if (dragged) lock({ panel: index, box: boxOf(down, at), grid: grid() });
      else lock({ panel: index, pixel: at, grid: grid() });
      S.cursor = at; down = null; dragged = false;
    });
    stage.addEventListener("pointercancel", () => { down = null; dragged = false; });
    stage.addEventListener("pointerleave", () => { if (!dragged) leave(); });
    stage.addEventListener("blur", () => { S.anchor = null; leave(); });
    stage.addEventListener("keydown", event => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key], [h, w] = grid();
      if (step) {
        event.preventDefault();
        const old = S.cursor ? [clamp(S.cursor[0], 0, h - 1), clamp(S.cursor[1], 0, w - 1)] : null;
        S.cursor = old ? [clamp(old[0] + step[0], 0, h - 1), clamp(old[1] + step[1], 0, w - 1)] : [h >> 1, w >> 1];
        S.anchor = event.shiftKey ? S.anchor ?? old ?? S.cursor : null;
        if (S.locked) { S.locked = null; model.set("locked", null); model.save_changes(); }
        point(S.anchor ? { panel: index, box: boxOf(S.anchor, S.cursor), grid: [h, w] } : { panel: index, pixel: S.cursor, grid: [h, w] }, true);
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        S.cursor ??= [h >> 1, w >> 1];
        lock(S.anchor ? { panel: index, box: boxOf(S.anchor, S.cursor), grid: [h, w] } : { panel: index, pixel: S.cursor, grid: [h, w] });
        S.anchor = null;
      }
    });
    panel.atlas.addEventListener("keydown", event => {
      const now = panel.cells.findIndex(c => c.cell === event.target.closest("button"));
      const step = { ArrowUp: -panel.columns, ArrowDown: panel.columns, ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step === undefined || now < 0) return;
      event.preventDefault();
      const next = panel.cells[clamp(now + step, 0, panel.cells.length - 1)];
      next.cell.focus(); next.cell.click();
    });
  }

  // -- drawing
  function schedule(speak = false) {
    if (speak) speakLater = 1;
    pending ||= requestAnimationFrame(() => { pending = 0; draw(); });
  }

  // A map as colours, or with `veil` as a shade that is thin where the weight is, so that the picture keeps its colours
  function heat(context, values, h, w, top, veil = false) {
    const image = images.get(context) ?? context.createImageData(w, h), out = new Uint32Array(image.data.buffer), by = pick("scale"), table = veil ? veils : inks;
    images.set(context, image);
    for (let i = 0; i < h * w; i++) out[i] = table[Math.round(255 * light(values[i], top, by))];
    context.putImageData(image, 0, 0);
  }

  const scratch = make("canvas"), scratchContext = scratch.getContext("2d");

  function draw() {
    const start = performance.now();
    for (const panel of panels) look(panel);
    const top = S.shared ? Math.max(...panels.flatMap(p => [...p.views.values()].map(v => fullAt(v.pixels, pick("scale"))))) : 0;
    for (const panel of panels) paint(panel, top);
    kind.select.value = kindOf(panels[0]); direction.select.value = pick("direction"); scale.select.value = pick("scale");
    ofMask.setAttribute("aria-pressed", String(S.locked?.mask === "predicted")); ofTruth.setAttribute("aria-pressed", String(S.locked?.mask === "truth"));
    unlock.disabled = !S.locked;
    const open = editable();
    field.hidden = ask.hidden = !open; fixed.hidden = open;
    fixed.textContent = `“${pick("phrase")}”`;
    keep.hidden = !(open && pick("can_keep"));
    status.textContent = S.busy ? "segmenting …" : pick("error") || (open ? "" : "This page holds no model, so its phrase is fixed; in a notebook it can be changed. Everything else works here.");
    status.classList.toggle("bad", Boolean(pick("error")) && !S.busy);
    tellTour();
    if (speakLater) { speakLater = 0; clearTimeout(live.timer); live.timer = setTimeout(() => { live.textContent = spoken(panels[(S.hover ?? S.locked)?.panel ?? 0]); }, 150); }
    root.drawMilliseconds = performance.now() - start;
  }

  // Every head's view of the token, the mean and the largest over heads
  function look(panel) {
    const levels = levelsOf(panel), now = selected(panel), what = S.hover ?? S.locked;
    if (panel.atlasOf !== levels) buildAtlas(panel);
    panel.views = new Map(); panel.token = resolve(panel, what, now.level); panel.flipped = false;
    if (!panel.token) return;
    let looks = pick("direction") === "reads" ? panel.token.word === undefined : pick("direction") === "looks";
    const has = (level, looks) => panel.token.word === undefined ? (looks ? level.pw || level.pp : level.wp || level.pp) : (looks ? level.wp || level.ww : level.pw || level.ww);
    if (!has(now.level, looks) && has(now.level, !looks)) { looks = !looks; panel.flipped = true; }
    panel.looks = looks;
    levels.forEach((level, l) => {
      const token = resolve(panel, what, level);
      for (let layer = 0; layer < level.layers; layer++) {
        const views = [];
        for (let head = 0; head < level.heads; head++) views.push(oneHead(level, layer * level.heads + head, token, looks, panel.words.length));
        if (kindOf(panel) === "relevance") for (const view of views) shareOut(view);
        views.forEach((view, head) => panel.views.set(`${l}/${layer}/${head}`, view));
        const { mean, max } = level.heads > 1 ? combine(views) : { mean: views[0], max: views[0] };
        panel.views.set(`${l}/${layer}/mean`, mean).set(`${l}/${layer}/max`, max);
      }
    });
  }

  function paint(panel, shared) {
    const { l, level, layer, head } = selected(panel), [h, w] = level.grid;
    const view = panel.views.get(`${l}/${layer}/${head}`) ?? { pixels: null, words: null };
    const by = pick("scale"), top = shared || fullAt(view.pixels, by) || 1, one = level.heads === 1;
    panel.top98 = top;
    panel.steps = panel.made?.element.open ? follow(panel) : null;
    paintStage(panel, view, level, top);
    // the middle of the words' scale is the even share: a word that gets less than that is not bright
    // (a column has no sum to be a share of: there each word's own weight stands alone)
    const rows = panel.looks || kindOf(panel) === "relevance", among = rows ? shares(view.words) : view.words && Array.from(view.words);
    const wordTop = Math.max(largest(among), rows ? 2 / panel.words.length : 1e-12), word = panel.token?.word, both = Boolean(rows && view.words && view.pixels);
    panel.chips.forEach(({ chip, value, all }, i) => {
      const v = among ? among[i] : null, c = v === null ? null : clamp(Math.round(255 * v / wordTop), 0, 255);
      chip.style.background = c === null ? "" : colours[c];
      chip.style.color = c === null ? "" : (luminance(c) > .18 ? "#000" : "#fff");
      value.textContent = v === null ? "–" : percent(v);
      all.textContent = both ? `${percent(view.words[i])} of all` : "";
      chip.classList.toggle("here", word === i);
      chip.setAttribute("aria-pressed", String(Boolean(S.locked && word === i && S.locked.word !== undefined)));
    });
    for (const c of panel.cells) {
      const small = panel.views.get(`${c.l}/${c.layer}/${c.head}`), on = c.l === l && c.layer === layer && (c.head === head || one);
      const [ch, cw] = levelsOf(panel)[c.l].grid;
      if (small?.pixels) heat(c.context, small.pixels, ch, cw, shared || fullAt(small.pixels, by) || 1);
      else if (small?.words) { const strip = small.words, m = largest(strip) || 1; for (let i = 0; i < strip.length; i++) { c.context.fillStyle = colours[Math.round(255 * strip[i] / m)]; c.context.fillRect(i * cw / strip.length, 0, cw / strip.length + 1, ch); } }
      else c.context.clearRect(0, 0, cw, ch);
      if (c.on !== on) { c.on = on; c.cell.setAttribute("aria-checked", String(on)); c.cell.tabIndex = on ? 0 : -1; }
    }
    paintScale(panel, view, level, top);
    paintMatrix(panel);
    tell(panel, view, level, layer, head);
    if (panel.steps) tellSteps(panel, level);
  }

  // The steps of what is shown, its largest pixels first; or, in `missing`, what has to be chosen before there are any
  function follow(panel) {
    const { level, layer, head } = selected(panel), { token, looks } = panel, single = token && (token.word !== undefined || token.cells.length === 1), missing = [];
    if (kindOf(panel) !== "raw") missing.push("raw attention");
    if (level.heads > 1 && !(+head >= 0)) missing.push("one head, in the grid of small maps");
    if (!single) missing.push("one pixel or one word");
    if (token && !looks) missing.push(`the direction “${DIRECTIONS.looks}”`);
    if (missing.length) return { missing: `One query of one head's raw attention has steps; means, maxima and columns have none. Still to choose: ${missing.join("; ")}.` };
    if (!level.steps) return { missing: "How the weights of this level were made is not known." };
    if (level.pool && token.word === undefined) return { missing: `Pixel to pixel is kept at ${level.pool[0]} × ${level.pool[1]} here, and a cell of it has no product of its own. Words have: point at one.` };
    const steps = stepsOf(level, layer * level.heads + (+head || 0), token), pixels = steps.keys.filter(k => k.part === "pixels").sort((a, b) => b.weight - a.weight);
    return { ...steps, words: steps.keys.filter(k => k.part === "words"), pixels: pixels.slice(0, 6), rest: pixels.slice(6) };
  }

  function tellSteps(panel, level) {
    const { steps, made } = panel, column = level.grid[1];
    const name = (k, short) => (k.part === "words" ? `“${panel.words[k.key]}”` : `row ${Math.floor(k.key / column)}, ${short ? "col" : "column"} ${k.key % column}`);
    made.why.hidden = !steps.missing; made.found.hidden = Boolean(steps.missing);
    if (steps.missing) { made.why.textContent = steps.missing; return; }
    const scale = Math.sqrt(steps.width), score = (k, by) => (k.error < Infinity ? digits(by * k.score, by * k.error) : `< ${digits(by * k.score, .5)}`);
    const most = part => Math.max(...[...steps.words, ...steps.pixels].map(k => k[part])) || 1, tops = { weight: most("weight"), added: most("added") };
    const share = (k, part) => make("td", { class: "share", style: `--share: ${(100 * k[part] / tops[part]).toFixed(1)}%` }, percent(k[part]));
    const row = (k, i) => make("tr", {}, make("th", { scope: "row" }, ...(k.part === "pixels" ? [make("span", { class: "mark" }, String(i + 1)), name(k, true)] : [name(k)])),
      ...[score(k, scale), score(k, 1), k.bias ? signed(k.bias) : "0", k.exp >= .0005 ? k.exp.toFixed(3) : "< 0.001"].map(text => make("td", {}, text)), share(k, "weight"), make("td", {}, k.length.toFixed(1)), share(k, "added"));
    const totals = (text, keys, exp) => make("tr", {}, make("th", { scope: "row" }, text), make("td"), make("td"), make("td"), make("td", {}, exp.toFixed(exp < 1 ? 3 : 2)),
      make("td", {}, percent(total(keys.map(k => k.weight)))), make("td"), make("td", {}, percent(total(keys.map(k => k.added)))));
    made.root.textContent = String(steps.width);
    made.plus.textContent = steps.biased ? "+ bias" : "+ mask";
    made.words.replaceChildren(...steps.words.map(row));
    made.pixels.replaceChildren(...steps.pixels.map(row), ...(steps.rest.length ? [totals(`${steps.rest.length} other pixels`, steps.rest, total(steps.rest.map(k => k.exp)))] : []));
    made.foot.replaceChildren(totals(`all ${steps.keys.length} keys`, steps.keys, steps.sum));
    const best = steps.keys.reduce((a, b) => (b.weight > a.weight ? b : a));
    made.walk.textContent = `From ${panel.token.name}, the largest weight, on ${name(best)}: q·k = ${score(best, scale)}; divided by √${steps.width} = ${scale.toFixed(2)}, s = ${score(best, 1)}. `
      + `No key here is padding: the mask adds 0 (padding gets −∞ and is left out). ${steps.biased ? `The learned bias adds ${signed(best.bias)}. ` : ""}exp(s − max) = 1, and all ${steps.keys.length} sum to ${steps.sum.toFixed(2)}: weight ${percent(best.weight)}. `
      + `Its value is ${best.length.toFixed(1)} long, so it adds ${percent(best.added)} of all lengths.`;
  }

  const linear = v => (v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4);
  const luminance = c => .2126 * linear(palette[3 * c]) + .7152 * linear(palette[3 * c + 1]) + .0722 * linear(palette[3 * c + 2]);

  function paintStage(panel, view, level, top) {
    const { canvas, stage } = panel, [h, w] = level.grid, ratio = window.devicePixelRatio || 1;
    const width = Math.round(stage.clientWidth * ratio), height = Math.round(stage.clientHeight * ratio);
    if (!width) return;
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; panel.paths = null; }
    const g = canvas.getContext("2d");
    g.imageSmoothingEnabled = true; g.clearRect(0, 0, width, height);
    if (picture) g.drawImage(picture, 0, 0, width, height);
    if (view.pixels) {
      if (scratch.width !== w || scratch.height !== h) { scratch.width = w; scratch.height = h; images.delete(scratchContext); }
      heat(scratchContext, view.pixels, h, w, top, true);  // opacity carries the weight
      g.imageSmoothingEnabled = S.smooth; g.imageSmoothingQuality = "high"; g.globalAlpha = S.alpha;
      g.drawImage(scratch, 0, 0, width, height);
      g.globalAlpha = 1;
    }
    panel.paths ??= Object.fromEntries(Object.entries(panel.masks).filter(([, m]) => m).map(([name, mask]) => {
      const path = new Path2D();
      for (const line of mask.outline) { for (let i = 0; i < line.length; i += 2) path[i ? "lineTo" : "moveTo"](line[i] * width, line[i + 1] * height); path.closePath(); }
      return [name, path];
    }));
    for (const [name, colour, dash] of [["predicted", "#fff", []], ["truth", "#ffb454", [7 * ratio, 5 * ratio]]]) {
      if (!panel.paths[name]) continue;
      g.setLineDash([]); g.lineWidth = 3.6 * ratio; g.strokeStyle = "rgba(0,0,0,.55)"; g.stroke(panel.paths[name]);
      g.setLineDash(dash); g.lineWidth = 1.8 * ratio; g.strokeStyle = colour; g.stroke(panel.paths[name]);
    }
    g.setLineDash([]);
    const at = panel.token?.at;
    if (at) {
      const [r0, c0, r1, c1] = at, rect = [c0 * width / w, r0 * height / h, (c1 - c0) * width / w, (r1 - r0) * height / h];
      g.lineWidth = 4 * ratio; g.strokeStyle = "rgba(0,0,0,.8)"; g.strokeRect(...rect);
      g.lineWidth = 2 * ratio; g.strokeStyle = S.locked && !S.hover ? "#ff5c8a" : "#fff"; g.strokeRect(...rect);
    }
    if (panel.steps?.pixels) {  // the numbers of the table's pixels
      g.font = `700 ${clamp(.55 * height / h, 10 * ratio, 18 * ratio)}px system-ui, sans-serif`; g.textAlign = "center"; g.textBaseline = "middle"; g.lineJoin = "round";
      g.lineWidth = 3 * ratio; g.strokeStyle = "#000"; g.fillStyle = "#fff";
      panel.steps.pixels.forEach(({ key }, i) => {
        const at = [(key % w + .5) * width / w, (Math.floor(key / w) + .5) * height / h];
        g.strokeText(String(i + 1), ...at); g.fillText(String(i + 1), ...at);
      });
    }
  }

  function paintScale(panel, view, level, top) {
    const by = pick("scale"), key = `${S.alpha}/${dark}`;
    if (panel.barOf !== key) {
      const g = panel.bar.getContext("2d");
      panel.barOf = key;
      for (let i = 0; i < 256; i++) {
        g.fillStyle = dark ? "#4a4f57" : "#f2eee4"; g.fillRect(i, 0, 1, 1);
        g.fillStyle = `rgba(${dark ? "255,255,255" : "0,0,0"},${S.alpha * (1 - i / 255)})`; g.fillRect(i, 0, 1, 1);
      }
    }
    if (!panel.marks) {
      panel.marks = [0, .5, 1].map(v => make("span", { style: `left: ${100 * v}%` }));
      panel.even = make("span", { class: "even" });
      panel.ticks.append(...panel.marks, panel.even);
    }
    const most = largest(view.pixels), values = by === "log" ? [10 ** -DECADES, 10 ** (-DECADES / 2), 1] : [0, .5, 1];
    panel.marks.forEach((mark, i) => { mark.textContent = view.pixels ? (i === 2 && most > 1.001 * top ? "≥ " : i === 0 && by === "log" ? "≤ " : "") + fine(top * values[i]) : ""; });
    const count = keysOf(panel, level), even = light(1 / count, top, by);
    panel.even.hidden = !(view.pixels && panel.looks && even < 1 && even > .02);
    panel.even.style.left = `${100 * even}%`; panel.even.title = `${percent(1 / count)}: every token gets the same`;
    panel.scaleWords = { percentile: `linear up to the 98th percentile, brighter cells are cut (the largest is ${percent(most)})`, log: "logarithmic, three powers of ten", linear: "linear up to the largest" }[by];
  }

  function tell(panel, view, level, layer, head) {
    const { token, looks } = panel, T = panel.words.length, n = level.of.length, name = kindOf(panel);
    const kinds = levelsOf(panel);
    panel.now.textContent = `Shown: ${KINDS[name]}, ${whereWords(level, layer, kinds)}${level.heads > 1 ? `, ${headWords(level, head)}` : ""} (${level.grid[0]} × ${level.grid[1]} pixels)`;
    panel.among.textContent = !view.words || !token ? "" : looks || name === "relevance" ? `Large: the share among the ${T} words${view.pixels ? "; small: the share of all tokens, pixels and words" : ""}.`
      : `What each word itself gives to ${token.name}.`;
    if (!token) { panel.says.textContent = "This word is not in this phrase."; panel.inside.textContent = panel.readout.textContent = panel.unit.textContent = ""; panel.rows.replaceChildren(); return; }
    const toWords = total(view.words), toPixels = total(view.pixels), sum = toWords + toPixels;
    const over = level.keys === "both" ? `${n} pixels and ${T} words` : level.keys === "words" ? `${T} words` : `${n} pixels`;
    const parts = [view.words && `words ${(100 * toWords).toFixed(1)} %`, view.pixels && `pixels ${(100 * toPixels).toFixed(1)} %`].filter(Boolean).join(" + ");
    let text;
    if (looks) {
      text = `From ${token.name}. `;
      if (name === "relevance") text += `Relevance for the answer, as a share of its row: ${parts}.`;
      else if (head === "max" && level.heads > 1) text += `The largest weight over ${level.heads} heads; such maxima sum to ${percent(sum)}, not to 100 %.`;
      else text += `${name === "raw" ? "Softmax" : "Rollout"} over ${over}: ${parts} = ${(100 * sum).toFixed(0)} %.`;
    } else text = `To ${token.name}: what every other token gives it. ${name === "relevance" ? "As a share of its column." : `Each number is from another row's softmax over ${over}, so they have no fixed sum (here ${sum.toFixed(2)}).`}`;
    if (name !== pick("kind")) text += ` There is no ${KINDS[pick("kind")]} of this answer.`;
    if (panel.flipped) text += " This model has no attention in the chosen direction.";
    if (level.pool && view.pixels && token.word === undefined) text += ` Pixel to pixel is kept at ${level.pool[0]} × ${level.pool[1]}.`;
    if (S.locked && !S.hover) text += " Locked.";
    panel.says.textContent = text;
    panel.unit.textContent = view.pixels ? `Light: ${name === "relevance" ? "each pixel's share of the relevance" : looks ? "the weight on each pixel" : "the weight from each pixel"}; ${panel.scaleWords}${panel.even.hidden ? "" : "; the mark: every token gets the same"}.`
      : "No light: this model has no such attention over pixels.";
    const key = level.grid.join("x"), lines = [];
    for (const [which, label] of [["predicted", "the answer"], ["truth", "the true mask"]]) {
      const mask = panel.masks[which];
      if (!mask?.cover[key] || !toPixels) continue;
      let share = 0;
      mask.cover[key].forEach((v, i) => { share += v * view.pixels[i]; });
      lines.push(`${percent(share / toPixels)} inside ${label} (${percent(mask.area)} of the image)`);
    }
    panel.inside.textContent = lines.length ? `Of the light, ${lines.join("; ")}.` : "";
    panel.readout.textContent = S.locked && S.readout && view.pixels ? `Row ${S.readout[0]}, column ${S.readout[1]}: ${percent(view.pixels[S.readout[0] * level.grid[1] + S.readout[1]] ?? 0)}` : "";
    panel.top = view.words ? [...view.words].map((v, i) => [v, i]).sort((a, b) => b[0] - a[0]) : [];
    if (panel.element.querySelector("details").open || !panel.rows.childElementCount) {
      panel.rows.replaceChildren(...panel.top.slice(0, 12).map(([v, i]) => make("tr", {}, make("th", { scope: "row" }, panel.words[i]), make("td", {}, percent(v / (toWords || 1))), make("td", {}, percent(v)))));
    }
  }

  const spoken = panel => panel?.token ? `${panel.token.name}: ${panel.top.slice(0, 3).map(([v, i]) => `${panel.words[i]} ${percent(v / (total(panel.top.map(([v]) => v)) || 1))} among words`).join(", ") || "no words"}${S.locked ? ", locked" : ""}` : "unlocked";

  // -- the tour: each step says something about one part; where `act` is given, the reader does it, or Next does it for them
  const COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gray"];
  const SMALL = new Set("a an the of on in to at is it and with that which from by for left right next near".split(" "));
  function tellingWord(panel) {
    const colour = panel.words.findIndex(word => COLOURS.includes(word.toLowerCase()));
    if (colour >= 0) return colour;
    const lengths = panel.words.map(word => (SMALL.has(word.toLowerCase()) ? 0 : word.length));
    return lengths.indexOf(Math.max(...lengths));
  }

  // Of all levels, layers, and both directions: where the light of a word lies most on the answer
  function bestView(panel, word) {
    let best = null;
    for (const level of panel.kinds.raw) {
      const cover = panel.masks.predicted?.cover[level.grid.join("x")];
      if (!cover || !total(cover)) continue;
      for (const direction of ["reads", "looks"]) for (let layer = 0; layer < level.layers; layer++) {
        const views = Array.from({ length: level.heads }, (_, h) => oneHead(level, layer * level.heads + h, { word }, direction === "looks", panel.words.length));
        const { pixels } = level.heads > 1 ? combine(views).mean : views[0];
        const inside = pixels ? cover.reduce((sum, v, k) => sum + v * pixels[k], 0) / (total(pixels) || 1) : 0;
        if (inside > (best?.inside ?? 0)) best = { inside, direction, level: String(level.name), layer, head: "mean" };
      }
    }
    return best;
  }

  function tourSteps() {
    const panel = () => panels[0], i = tellingWord(panel()), word = panel().words[i], viewed = () => { const { l, layer, head } = selected(panel()); return panel().views.get(`${l}/${layer}/${head}`); };
    const best = bestView(panel(), i);
    const steps = [{ at: () => panel().stage, text: () => `This is what the model answers to “${panel().phrase}”: the white outline.${panel().masks.truth ? " The dashed one is the true mask." : ""}` }];
    steps.push({
      at: () => panel().chips[i].chip, text: () => `Your turn: lock the word “${word}” by clicking it.`, button: "Do it for me",
      enter: () => { if (best) { put("direction", best.direction); put("kind", "raw"); select(best.level, best.layer, best.head); } },
      done: () => S.locked?.word === i && S.locked.panel === 0, act: () => lock({ panel: 0, word: i }),
    });
    steps.push({
      at: () => panel().stage, text: () => {
        const level = selected(panel()).level, mask = panel().masks.predicted, cover = mask?.cover[level.grid.join("x")], pixels = viewed()?.pixels;
        const inside = cover && pixels ? ` ${percent(cover.reduce((sum, v, k) => sum + v * pixels[k], 0) / (total(pixels) || 1))} of the light lies inside the answer, which covers ${percent(mask.area)} of the picture.` : "";
        return pixels ? `The picture is lit ${panel().looks ? `where “${word}” looks` : `where pixels read “${word}”`}, and keeps its colours.${inside}` : `Here “${word}” looks only at words: no light.`;
      },
    });
    if (selected(panel()).level.ww && panel().words.length > 1) steps.push({
      at: () => panel().matrix.element, text: () => {
        const row = matrixOf(panel())?.[i].among ?? [0], most = row.indexOf(Math.max(...row));
        return `Words look at words, too. In the row of “${word}”, “${panel().words[most]}” gets most: ${percent(row[most])} of what it gives to words. Every cell can be clicked.`;
      },
    });
    steps.push({
      at: () => panel().stage, text: () => "Your turn: click a pixel inside the outline. The words then show what that pixel reads.", button: "Do it for me",
      done: () => Boolean(S.locked?.pixel), act: () => {
        const { grid } = selected(panel()).level, cover = panel().masks.predicted?.cover[grid.join("x")] ?? [], best = Math.max(0, cover.indexOf(Math.max(...cover)));
        lock({ panel: 0, pixel: [Math.floor(best / grid[1]), best % grid[1]], grid: [...grid] });
      },
    });
    if (panel().cells.length > 1) {
      const now = () => { const { l, layer, head } = selected(panel()); return `${l}/${layer}/${head}`; }, before = { at: null };
      steps.push({
        at: () => panel().atlas, enter: () => { before.at = now(); }, text: () => `Your turn: the small maps are the same view in every level, layer and head.${best ? ` The tour began in the one whose light for “${word}” lies most on the answer; not all do.` : ""} Click another one.`, button: "Do it for me",
        done: () => before.at !== null && now() !== before.at, act: () => { const other = panel().cells.filter(c => `${c.l}/${c.layer}/${c.head}` !== before.at).pop(); other.cell.click(); },
      });
    }
    steps.push({ at: () => (editable() ? form : controls), text: () => `${editable() ? "Now change a word of the phrase and press Enter: the two answers stand side by side." : "Below the picture are other views: rollout, relevance, who looks at what."} Esc unlocks. And remember: attention shows where weights went, not why.` });
    return steps;
  }

  const spot = element => { for (const marked of root.querySelectorAll(".spot")) marked.classList.remove("spot"); element?.classList.add("spot"); };
  function startTour() {
    S.tour = { steps: null, at: 0, shown: -1 };
    lock(null);
    S.tour.steps = tourSteps();
    schedule();
  }
  function endTour() { S.tour = null; tour.bar.hidden = true; guide.hidden = false; spot(null); guide.focus(); schedule(); }
  function nextStep() {
    const { steps, at } = S.tour, step = steps[at];
    if (step.act && !step.done()) { step.act(); return; }
    if (at + 1 === steps.length) { endTour(); return; }
    S.tour.at += 1;
    schedule();
  }
  function tellTour() {
    guide.hidden = Boolean(S.tour);
    if (!S.tour?.steps) return;
    let step = S.tour.steps[S.tour.at];
    if (S.tour.shown === S.tour.at && step.act && step.done() && S.tour.at + 1 < S.tour.steps.length) step = S.tour.steps[S.tour.at += 1];
    tour.bar.hidden = false;
    if (S.tour.shown !== S.tour.at) {
      S.tour.shown = S.tour.at;
      step.enter?.();
      spot(step.at());
      step.at().scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
      if (S.tour.at === 0) tour.next.focus({ preventScroll: true });
    }
    const text = step.text(), last = S.tour.at + 1 === S.tour.steps.length;
    if (tour.text.textContent !== text) tour.text.textContent = text;
    tour.count.textContent = `${S.tour.at + 1} of ${S.tour.steps.length}`;
    tour.next.textContent = step.act && !step.done() ? step.button : last ? "Done" : "Next";
  }
  holder.addEventListener("toggle", () => schedule(), true);

  const changed = { data: build, answered: () => { S.busy = false; schedule(true); }, phrase: () => { input.value = pick("phrase"); schedule(); }, locked: () => { S.locked = pick("locked"); S.hover = null; schedule(); } };
  for (const name of ["kind", "direction", "scale", "level", "layer", "head", "error", "live", "can_keep", "segment"]) changed[name] = () => schedule();
  for (const [name, react] of Object.entries(changed)) model.on(`change:${name}`, react);
  root.shown = () => panels.map(panel => {  // the numbers behind the view, for tests and the curious
    const { l, layer, head } = selected(panel), view = panel.views.get(`${l}/${layer}/${head}`) ?? {};
    return {
      from: panel.token?.name ?? null, pixels: view.pixels && Array.from(view.pixels), words: view.words && Array.from(view.words), among: shares(view.words), top: panel.top98,
      matrix: matrixOf(panel)?.map(row => row.all) ?? null, steps: panel.made && follow(panel),
    };
  });
  S.locked = pick("locked");
  build();
  return () => {
    for (const [name, react] of Object.entries(changed)) model.off(`change:${name}`, react);
    for (const panel of panels) panel.observer.disconnect();
    cancelAnimationFrame(pending);
  };
}

// ---- without Python --------------------------------------------------------------------------------------------------

// anywidget's model interface over a plain object, for pages without a kernel
export function localModel(state) {
  const reacts = {};
  return {
    get: name => state[name],
    set(name, value) {
      if (state[name] === value) return;
      state[name] = value;
      for (const react of reacts[`change:${name}`] ?? []) react();
    },
    save_changes() {}, send() {},
    on(event, react) { (reacts[event] ??= new Set()).add(react); },
    off(event, react) { reacts[event]?.delete(react); },
  };
}

// An explorer of plain arrays in any page: image is {url, width, height}, answer is what `packAnswer` takes. With `segment`, an async function
// from a phrase to such an answer, the phrase can be edited. `show` replaces the answer, and the image where one is given.
export function explore(el, { image, answer, segment = null, ...traits }) {
  const first = packAnswer(answer), levels = first.kinds.raw;
  const model = localModel({
    live: false, can_keep: false, error: "", answered: 0, locked: null, kind: "raw", direction: "reads", scale: "percentile", level: levels[levels.length >> 1].name, layer: 0, head: "mean",
    segment, ...traits, phrase: first.phrase, data: { image, panels: [first] },
  });
  const close = render({ model, el });
  function show({ image = model.get("data").image, answer }) {
    const panel = packAnswer(answer), lock = model.get("locked");
    if (lock && (lock.panel || lock.word >= panel.words.length)) model.set("locked", null);
    model.set("can_keep", false); model.set("error", ""); model.set("phrase", panel.phrase);
    model.set("data", { image, panels: [panel] });
  }
  return { model, show, close };
}

const uid = `refseg-${Math.random().toString(36).slice(2, 9)}`;

export default { render };
