// The attention explorer: one ES module without dependencies. `render` is called by anywidget, or by the host code of an exported page.

const SQUARE = Float32Array.from({ length: 256 }, (_, i) => (i / 255) ** 2);
const KINDS = { raw: "raw attention", rollout: "attention rollout", relevance: "gradient relevance" };
const DIRECTIONS = { "looks": "what it looks at", "is looked at": "who looks at it" };
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

export const percent = v => v >= .0995 ? `${(100 * v).toFixed(0)} %` : v >= .0005 ? `${(100 * v).toFixed(1)} %` : v > 0 ? "< 0.1 %" : "0 %";

function bytes(value) {
  return value instanceof ArrayBuffer ? new Uint8Array(value) : new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
}

function floats(value) {
  const raw = bytes(value), view = new DataView(raw.buffer, raw.byteOffset, raw.byteLength);
  return Float32Array.from({ length: raw.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

// ---- numbers ---------------------------------------------------------------------------------------------------------

// A block holds [layers * heads, queries, keys] as a byte each: the square of code / 255, times the largest value of its row.
function block(packed) {
  if (!packed) return null;
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
  const S = { hover: null, locked: null, cursor: null, anchor: null, boxing: false, smooth: false, shared: false, alpha: .8, readout: "", busy: false };
  const inks = new Uint32Array(256), veiled = new Uint32Array(256), images = new WeakMap();
  let panels = [], palette = null, colours = [], picture = null, grey = null, pending = 0, speakLater = 0;

  // JupyterLab listens for single keys on the page: nothing typed in here may reach it (saving may)
  root.addEventListener("keydown", event => {
    if (!((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s")) event.stopPropagation();
    if (event.key === "Escape" && event.target.tagName !== "INPUT" && event.target.tagName !== "SELECT") lock(null);
  });

  const pick = name => model.get(name);
  const put = (name, value) => { model.set(name, value); model.save_changes(); schedule(); };

  // -- controls
  const input = make("input", { type: "text", spellcheck: "false", autocomplete: "off" });
  const ask = make("button", { type: "submit", class: "primary" }, "Segment");
  const keep = make("button", { type: "button", onclick: () => model.send({ do: "keep" }) }, "Keep the new one");
  const status = make("p", { class: "status", role: "status" });
  const form = make("form", { class: "phrase" }, make("label", { class: "field grow" }, make("span", {}, "Phrase"), input), ask, keep);
  form.addEventListener("submit", event => {
    event.preventDefault();
    if (!pick("live")) return;
    if (input.value.trim() === pick("phrase")) return;
    S.busy = true;
    put("phrase", input.value.trim());
  });
  const kind = picker("Show", KINDS, "raw", v => put("kind", v));
  const direction = picker("Direction", DIRECTIONS, "looks", v => put("direction", v));
  const scale = picker("Colour scale", { own: "one for each map", shared: "one for all maps" }, "own", v => { S.shared = v === "shared"; schedule(); });
  const toggle = (text, title, flip) => {
    const button = make("button", { type: "button", "aria-pressed": "false", title, onclick: () => { button.setAttribute("aria-pressed", String(flip())); schedule(); } }, text);
    return button;
  };
  const smooth = toggle("Smooth", "Interpolate between the cells' centres", () => (S.smooth = !S.smooth));
  const boxing = toggle("Box", "Drag a box: the mean over its pixels. With a mouse, dragging always makes a box; on the keyboard, shift and arrows", () => (S.boxing = !S.boxing));
  const ofMask = make("button", { type: "button", title: "The mean over the pixels of the answer", onclick: () => lock({ panel: 0, mask: "predicted" }) }, "Answer");
  const ofTruth = make("button", { type: "button", title: "The mean over the pixels of the true mask", onclick: () => lock({ panel: 0, mask: "truth" }) }, "Truth");
  const free = make("button", { type: "button", title: "Free the lock (Esc)", onclick: () => lock(null) }, "Free");
  const alpha = make("input", { type: "range", min: "0", max: "100", value: "80", oninput: () => { S.alpha = alpha.value / 100; schedule(); } });
  const controls = make("div", { class: "controls" }, kind.field, direction.field, scale.field,
    make("label", { class: "field" }, make("span", {}, "Map over image"), alpha),
    make("div", { class: "field", role: "group", "aria-label": "Pixels to look from" }, make("span", {}, "Mean over"), make("div", { class: "buttons" }, ofMask, ofTruth, boxing)),
    make("div", { class: "field" }, make("span", { "aria-hidden": "true" }, " "), make("div", { class: "buttons" }, smooth, free)));
  const holder = make("div", { class: "panels" });
  const live = make("p", { class: "hidden", "aria-live": "polite" });
  const caveat = make("p", { class: "caveat" }, "Attention shows where weights went, not why the answer is what it is. Chapter 14 measures how far the one tells about the other.");
  root.append(form, status, controls, holder, caveat, live);
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
    model.set("locked", what); model.save_changes();
    schedule(true);
  }

  function select(level, layer, head) {
    model.set("level", level); model.set("layer", layer); model.set("head", head); model.save_changes();
    schedule();
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
    palette = bytes(data.palette);
    for (let i = 0; i < 256; i++) {
      const colour = palette[3 * i] | palette[3 * i + 1] << 8 | palette[3 * i + 2] << 16;
      inks[i] = (colour | 255 << 24) >>> 0; veiled[i] = (colour | Math.round(255 * (.45 + .55 * Math.sqrt(i / 255))) << 24) >>> 0;
    }
    colours = Array.from({ length: 256 }, (_, i) => `rgb(${palette[3 * i]},${palette[3 * i + 1]},${palette[3 * i + 2]})`);
    const image = new Image();
    image.onload = () => {
      picture = image; grey = make("canvas"); grey.width = image.naturalWidth; grey.height = image.naturalHeight;
      const g = grey.getContext("2d"); g.drawImage(image, 0, 0);
      const pixels = g.getImageData(0, 0, grey.width, grey.height), d = pixels.data;
      for (let i = 0; i < d.length; i += 4) d[i] = d[i + 1] = d[i + 2] = .299 * d[i] + .587 * d[i + 1] + .114 * d[i + 2];
      g.putImageData(pixels, 0, 0);
      schedule();
    };
    image.src = data.image.url;
    S.hover = S.cursor = S.anchor = null;
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
      const unknown = packed.unknown.includes(i), value = make("span", { class: "value" });
      const chip = make("button", {
        type: "button", class: unknown ? "word unknown" : "word", "aria-pressed": "false", title: unknown ? "The model does not know this word: it read <unk>" : null,
        onclick: () => lock({ panel: index, word: i }), onpointerenter: event => event.pointerType !== "touch" && point({ panel: index, word: i }), onpointerleave: leave,
        onfocus: () => chip.matches(":focus-visible") && point({ panel: index, word: i }, true), onblur: leave,
      }, make("span", { class: "text" }, word), value);
      return { chip, value };
    });
    panel.canvas = make("canvas", { "aria-hidden": "true" });
    panel.stage = make("div", {
      class: "stage", tabindex: "0", role: "application", "aria-roledescription": "attention map", "aria-describedby": `${uid}-help-${index}`,
      "aria-label": `Picture, ${packed.title || "the answer"}: “${packed.phrase}”`, style: `aspect-ratio: ${image.width} / ${image.height}`,
    }, panel.canvas);
    panel.help = make("p", { class: "hidden", id: `${uid}-help-${index}` }, "Arrow keys move over the pixels, shift and arrows make a box, Enter locks, Escape frees.");
    panel.bar = make("canvas", { class: "bar", width: "256", height: "1", "aria-hidden": "true" });
    panel.ticks = make("div", { class: "ticks" }); panel.unit = make("p", { class: "unit" });
    panel.says = make("p", { class: "says" }); panel.inside = make("p", { class: "inside" }); panel.readout = make("p", { class: "readout" });
    panel.legend = make("p", { class: "legend" });
    for (const [name, text] of [["predicted", "the answer"], ["truth", "the true mask"]]) if (packed.masks[name]) panel.legend.append(make("span", { class: `key ${name}` }), make("span", {}, text));
    panel.atlas = make("div", { class: "atlas", role: "radiogroup", "aria-label": "Level, layer and head" });
    panel.rows = make("tbody");
    const table = make("details", {}, make("summary", {}, "Numbers"), make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "word"), make("th", { scope: "col" }, "share"))), panel.rows));
    const head = make("header", {}, make("p", { class: "title" }, packed.title || "Attention"), make("p", { class: "note" }, packed.note));
    if (panel.kinds.raw?.some(level => level.steps)) panel.made = makeSteps();
    panel.element = make("article", { class: "panel", "aria-label": packed.title || "Attention" }, head, make("div", { class: "words", role: "group", "aria-label": "Words of the phrase" }, ...panel.chips.map(c => c.chip)),
      make("div", { class: "left" }, panel.stage, panel.help, make("div", { class: "scale" }, panel.bar, panel.ticks, panel.unit), panel.legend),
      make("div", { class: "right" }, panel.says, panel.inside, panel.readout, panel.atlas, table), ...(panel.made ? [panel.made.element] : []));
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

  // One small map for each level and layer (rows), and head (columns), and the mean and the largest over heads
  function buildAtlas(panel) {
    const levels = levelsOf(panel);
    panel.atlasOf = levels; panel.cells = [];
    const heads = Math.max(...levels.map(level => level.heads));
    const columns = heads > 1 ? ["mean", "max", ...Array.from({ length: heads }, (_, i) => String(i))] : ["0"];
    panel.atlas.style.setProperty("--columns", columns.length);
    panel.atlas.replaceChildren(make("span", { class: "corner", "aria-hidden": "true" }, heads > 1 ? "level · layer" : ""),
      ...columns.map(c => make("span", { class: "column", "aria-hidden": "true" }, heads > 1 ? (c === "mean" || c === "max" ? c : `head ${c}`) : "")));
    levels.forEach((level, l) => {
      for (let layer = 0; layer < level.layers; layer++) {
        panel.atlas.append(make("span", { class: "row", "aria-hidden": "true" }, `${level.name} · ${layer}`));
        for (const head of columns) {
          if (+head >= level.heads) { panel.atlas.append(make("span")); continue; }
          const canvas = make("canvas", { width: level.grid[1], height: level.grid[0] });
          const cell = make("button", {
            type: "button", role: "radio", "aria-label": `level ${level.name}, layer ${layer}, ${+head >= 0 ? `head ${head}` : `${head} over heads`}`,
            onclick: () => select(String(level.name), layer, head),
          }, canvas);
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
      const now = panel.cells.findIndex(c => c.cell === document.activeElement);
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

  // Colours of a map; with `veil` small values are also more transparent, so that the image stays visible under them
  function heat(context, values, h, w, top, veil = false) {
    const image = images.get(context) ?? context.createImageData(w, h), out = new Uint32Array(image.data.buffer), scale = 255 / top;
    images.set(context, image);
    for (let i = 0; i < h * w; i++) {
      const code = Math.min(255, Math.round(values[i] * scale));
      out[i] = veil ? veiled[code] : inks[code];
    }
    context.putImageData(image, 0, 0);
  }

  const scratch = make("canvas"), scratchContext = scratch.getContext("2d");

  function draw() {
    const start = performance.now();
    for (const panel of panels) look(panel);
    const over = part => S.shared ? Math.max(...panels.flatMap(p => [...p.views.values()].map(v => largest(v[part])))) : 0;
    const shared = over("pixels"), sharedWords = over("words");
    for (const panel of panels) paint(panel, shared, sharedWords);
    kind.select.value = kindOf(panels[0]); direction.select.value = pick("direction");
    ofMask.setAttribute("aria-pressed", String(S.locked?.mask === "predicted")); ofTruth.setAttribute("aria-pressed", String(S.locked?.mask === "truth"));
    free.disabled = !S.locked;
    const isLive = pick("live");
    input.readOnly = ask.disabled = !isLive;
    ask.title = isLive ? "" : "There is no kernel behind this page: open it in JupyterLab to change the phrase";
    keep.hidden = !(isLive && pick("can_keep"));
    status.textContent = S.busy ? "segmenting …" : pick("error") || (isLive ? "" : "Editing the phrase needs a model and a running kernel; everything else works here.");
    status.classList.toggle("bad", Boolean(pick("error")) && !S.busy);
    if (speakLater) { speakLater = 0; clearTimeout(live.timer); live.timer = setTimeout(() => { live.textContent = spoken(panels[(S.hover ?? S.locked)?.panel ?? 0]); }, 150); }
    root.drawMilliseconds = performance.now() - start;
  }

  // Every head's view of the token, the mean and the largest over heads
  function look(panel) {
    const levels = levelsOf(panel), now = selected(panel), what = S.hover ?? S.locked;
    if (panel.atlasOf !== levels) buildAtlas(panel);
    panel.views = new Map(); panel.token = resolve(panel, what, now.level); panel.flipped = false;
    if (!panel.token) return;
    let looks = pick("direction") === "looks";
    const has = (level, looks) => panel.token.word === undefined ? (looks ? level.pw || level.pp : level.wp || level.pp) : (looks ? level.wp || level.ww : level.pw || level.ww);
    if (!has(now.level, looks) && has(now.level, !looks)) { looks = !looks; panel.flipped = true; }
    panel.looks = looks;
    levels.forEach((level, l) => {
      const token = resolve(panel, what, level);
      for (let layer = 0; layer < level.layers; layer++) {
        const views = [];
        for (let head = 0; head < level.heads; head++) views.push(oneHead(level, layer * level.heads + head, token, looks, panel.words.length));
        if (kindOf(panel) === "relevance") for (const view of views) {
          const sum = total(view.pixels) + total(view.words) || 1;
          for (const part of [view.pixels, view.words]) if (part) for (let i = 0; i < part.length; i++) part[i] /= sum;
        }
        views.forEach((view, head) => panel.views.set(`${l}/${layer}/${head}`, view));
        const { mean, max } = level.heads > 1 ? combine(views) : { mean: views[0], max: views[0] };
        panel.views.set(`${l}/${layer}/mean`, mean).set(`${l}/${layer}/max`, max);
      }
    });
  }

  function paint(panel, shared, sharedWords) {
    const { l, level, layer, head } = selected(panel), [h, w] = level.grid;
    const view = panel.views.get(`${l}/${layer}/${head}`) ?? { pixels: null, words: null };
    const top = shared || largest(view.pixels) || 1, one = level.heads === 1;
    panel.steps = panel.made?.element.open ? follow(panel) : null;
    paintStage(panel, view, level, top);
    const wordTop = sharedWords || Math.max(largest(view.words), panel.looks ? 1 / keysOf(panel, level) : 1e-12);  // a word that gets less than its even share is not bright
    const word = panel.token?.word;
    panel.chips.forEach(({ chip, value }, i) => {
      const v = view.words ? view.words[i] : null, c = v === null ? null : clamp(Math.round(255 * v / wordTop), 0, 255);
      chip.style.background = c === null ? "" : colours[c];
      chip.style.color = c === null ? "" : (luminance(c) > .18 ? "#000" : "#fff");
      value.textContent = v === null ? "–" : percent(v);
      chip.classList.toggle("here", word === i);
      chip.setAttribute("aria-pressed", String(Boolean(S.locked && word === i && S.locked.word !== undefined)));
    });
    for (const c of panel.cells) {
      const small = panel.views.get(`${c.l}/${c.layer}/${c.head}`), on = c.l === l && c.layer === layer && (c.head === head || one);
      const [ch, cw] = levelsOf(panel)[c.l].grid;
      if (small?.pixels) heat(c.context, small.pixels, ch, cw, shared || largest(small.pixels) || 1);
      else if (small?.words) { const strip = small.words, m = largest(strip) || 1; for (let i = 0; i < strip.length; i++) { c.context.fillStyle = colours[Math.round(255 * strip[i] / m)]; c.context.fillRect(i * cw / strip.length, 0, cw / strip.length + 1, ch); } }
      else c.context.clearRect(0, 0, cw, ch);
      if (c.on !== on) { c.on = on; c.cell.setAttribute("aria-checked", String(on)); c.cell.tabIndex = on ? 0 : -1; }
    }
    paintScale(panel, view, level, top);
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
    if (picture) g.drawImage(view.pixels && S.alpha > 0 ? grey : picture, 0, 0, width, height);
    if (view.pixels) {
      if (scratch.width !== w || scratch.height !== h) { scratch.width = w; scratch.height = h; images.delete(scratchContext); }
      heat(scratchContext, view.pixels, h, w, top, true);
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
    if (!panel.barDone) {
      const g = panel.bar.getContext("2d");
      for (let i = 0; i < 256; i++) { g.fillStyle = colours[i]; g.fillRect(i, 0, 1, 1); }
      panel.barDone = true;
      panel.marks = [0, .5, 1].map(v => make("span", { style: `left: ${100 * v}%` }));
      panel.even = make("span", { class: "even", title: "every key alike" });
      panel.ticks.append(...panel.marks, panel.even);
    }
    panel.marks.forEach((mark, i) => { mark.textContent = view.pixels ? percent(top * i / 2) : ""; });
    const count = keysOf(panel, level), even = 1 / count / top;
    panel.even.hidden = !(view.pixels && panel.looks && even < 1 && even > .02);
    panel.even.style.left = `${100 * even}%`; panel.even.title = `${percent(1 / count)}: every key alike`;
  }

  function tell(panel, view, level, layer, head) {
    const { token, looks } = panel, T = panel.words.length, n = level.of.length, name = kindOf(panel);
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
    if (panel.flipped) text += " This model has no attention in the chosen direction.";
    if (level.pool && view.pixels && token.word === undefined) text += ` Pixel to pixel is kept at ${level.pool[0]} × ${level.pool[1]}.`;
    if (S.locked && !S.hover) text += " Locked.";
    panel.says.textContent = text;
    panel.unit.textContent = view.pixels ? (name === "relevance" ? "share of relevance, each pixel" : looks ? "weight on each pixel" : "weight from each pixel") + (panel.even.hidden ? "" : "; the mark: if all keys were alike") : "no map: this model has no such attention over pixels";
    const key = level.grid.join("x"), lines = [];
    for (const [which, label] of [["predicted", "the answer"], ["truth", "the true mask"]]) {
      const mask = panel.masks[which];
      if (!mask || !toPixels) continue;
      let share = 0;
      mask.cover[key].forEach((v, i) => { share += v * view.pixels[i]; });
      lines.push(`${percent(share / toPixels)} inside ${label} (${percent(mask.area)} of the image)`);
    }
    panel.inside.textContent = lines.length ? `Of the map, ${lines.join("; ")}.` : "";
    panel.readout.textContent = S.locked && S.readout && view.pixels ? `Row ${S.readout[0]}, column ${S.readout[1]}: ${percent(view.pixels[S.readout[0] * level.grid[1] + S.readout[1]] ?? 0)}` : "";
    panel.top = view.words ? [...view.words].map((v, i) => [v, i]).sort((a, b) => b[0] - a[0]) : [];
    if (panel.element.querySelector("details").open || !panel.rows.childElementCount) {
      panel.rows.replaceChildren(...panel.top.slice(0, 12).map(([v, i]) => make("tr", {}, make("th", { scope: "row" }, panel.words[i]), make("td", {}, percent(v)))));
    }
  }

  const spoken = panel => panel?.token ? `${panel.token.name}: ${panel.top.slice(0, 3).map(([v, i]) => `${panel.words[i]} ${percent(v)}`).join(", ") || "no words"}${S.locked ? ", locked" : ""}` : "free";
  holder.addEventListener("toggle", () => schedule(), true);

  const changed = { data: build, answered: () => { S.busy = false; schedule(true); }, phrase: () => { input.value = pick("phrase"); schedule(); }, locked: () => { S.locked = pick("locked"); S.hover = null; schedule(); } };
  for (const name of ["kind", "direction", "level", "layer", "head", "error", "live", "can_keep"]) changed[name] = () => schedule();
  for (const [name, react] of Object.entries(changed)) model.on(`change:${name}`, react);
  root.shown = () => panels.map(panel => {  // the numbers behind the view, for tests and the curious
    const { l, layer, head } = selected(panel), view = panel.views.get(`${l}/${layer}/${head}`) ?? {};
    return { from: panel.token?.name ?? null, pixels: view.pixels && Array.from(view.pixels), words: view.words && Array.from(view.words), steps: panel.made && follow(panel) };
  });
  S.locked = pick("locked");
  build();
  return () => {
    for (const [name, react] of Object.entries(changed)) model.off(`change:${name}`, react);
    for (const panel of panels) panel.observer.disconnect();
    cancelAnimationFrame(pending);
  };
}

const uid = `refseg-${Math.random().toString(36).slice(2, 9)}`;

export default { render };
