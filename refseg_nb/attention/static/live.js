// The live page: a scene, a phrase, the mask at every keystroke. One ES module without dependencies; what it needs (scenes, the
// model's two graphs, ONNX Runtime, the explorer) lies in the page itself or in scripts beside it, so that it also works from a file.

// ---- words: what `Vocabulary.tokens` and `Segmenter.read` do ----------------------------------------------------------

// Python's white space, which is not JavaScript's \s
const SPACE = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+";
const white = new RegExp(SPACE, "gu");
const REPLACED = [[/'/g, " ' "], [/"/g, ""], [/\./g, " . "], [/<br \/>/g, " "], [/,/g, " , "], [/\(/g, " ( "], [/\)/g, " ) "],
  [/!/g, " ! "], [/\?/g, " ? "], [/;/g, " "], [/:/g, " "], [white, " "]];
const split = text => text.split(white).filter(Boolean);

export function tokenize(text, lettersOnly = false) {
  text = text.toLowerCase();
  if (lettersOnly) return text.split(/[^\p{L}\p{N}_]+/u).filter(token => /^\p{L}+$/u.test(token));
  for (const [pattern, replacement] of REPLACED) text = text.replace(pattern, replacement);
  return split(text);
}

export class Vocabulary {
  constructor({ words, letters_only: lettersOnly, raw, max_words: most }) {
    Object.assign(this, { lettersOnly, raw, most });
    this.numbers = new Map(words.map((word, i) => [word, i + 2]));  // 0 fills up, 1 is an unknown word
  }
  tokens(text) { return tokenize(text, this.lettersOnly); }
  knows(word) { return this.numbers.has(word); }
  read(phrase) {
    const sayable = text => /[\p{L}\p{N}]/u.test(text);
    if (this.raw) return sayable(phrase) ? split(phrase) : [];
    return this.tokens(phrase).filter(word => this.knows(word) || sayable(word));
  }
  encode(words) { return this.tokens(words.join(" ")).slice(0, this.most).map(word => this.numbers.get(word) ?? 1); }
}

// ---- masks ------------------------------------------------------------------------------------------------------------

// What PyTorch's `interpolate` does to a square map (bilinear, align_corners=False)
export function resize(values, from, to) {
  const out = new Float32Array(to * to), low = new Int32Array(to), high = new Int32Array(to), part = new Float32Array(to);
  for (let i = 0; i < to; i++) {
    const at = Math.max(0, (i + .5) * from / to - .5);
    low[i] = Math.floor(at); high[i] = Math.min(low[i] + 1, from - 1); part[i] = at - low[i];
  }
  for (let y = 0; y < to; y++) for (let x = 0; x < to; x++) {
    const top = values[low[y] * from + low[x]] * (1 - part[x]) + values[low[y] * from + high[x]] * part[x];
    const bottom = values[high[y] * from + low[x]] * (1 - part[x]) + values[high[y] * from + high[x]] * part[x];
    out[y * to + x] = top * (1 - part[y]) + bottom * part[y];
  }
  return out;
}

const TURNS = { 1: ["LT"], 2: ["TR"], 3: ["LR"], 4: ["RB"], 5: ["LT", "RB"], 6: ["TB"], 7: ["LB"], 8: ["BL"], 9: ["BT"], 10: ["TR", "BL"], 11: ["BR"], 12: ["RL"], 13: ["RT"], 14: ["TL"] };

// Closed lines where a square map crosses a level (marching squares), each x0, y0, x1, y1, ... in shares of the side
export function contour(values, side, level) {
  const w = side + 2, at = (x, y) => (x && y && x <= side && y <= side ? values[(y - 1) * side + x - 1] : 0), next = new Map();
  const edge = { T: (x, y) => 2 * (y * w + x), B: (x, y) => 2 * ((y + 1) * w + x), L: (x, y) => 2 * (y * w + x) + 1, R: (x, y) => 2 * (y * w + x + 1) + 1 };
  for (let y = 0; y < w - 1; y++) for (let x = 0; x < w - 1; x++) {
    const kind = (at(x, y) > level) | (at(x + 1, y) > level) << 1 | (at(x + 1, y + 1) > level) << 2 | (at(x, y + 1) > level) << 3;
    for (const [from, to] of TURNS[kind] ?? []) next.set(edge[from](x, y), edge[to](x, y));
  }
  const point = key => {
    const x = (key >> 1) % w, y = Math.floor((key >> 1) / w), [dx, dy] = key % 2 ? [0, 1] : [1, 0], a = at(x, y), share = (level - a) / (at(x + dx, y + dy) - a);
    return [x + dx * share, y + dy * share].map(v => Math.min(Math.max((v - .5) / side, 0), 1));
  };
  const lines = [];
  while (next.size) {
    const line = [], [start] = next.keys();
    for (let key = start; next.has(key);) { const to = next.get(key); next.delete(key); line.push(...point(key)); key = to; }
    lines.push(line);
  }
  return lines;
}

// ---- attention, packed as the explorer reads it -----------------------------------------------------------------------

const bytesOf = array => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

export function packRows(a, maps, queries, keys) {
  const codes = new Uint8Array(a.length), scales = new Uint16Array(maps * queries);
  for (let row = 0; row < scales.length; row++) {
    let top = 0;
    for (let k = row * keys; k < (row + 1) * keys; k++) if (a[k] > top) top = a[k];
    scales[row] = Math.min(Math.max(Math.ceil((Math.log2(Math.max(top, 2 ** -48)) + 48) * 1024), 0), 65535);
    const unit = 2 ** (scales[row] / 1024 - 48);
    if (top > 0) for (let k = row * keys; k < (row + 1) * keys; k++) codes[k] = Math.round(255 * Math.sqrt(Math.min(a[k] / unit, 1)));
  }
  return { codes, scales: bytesOf(scales), shape: [maps, queries, keys] };
}

const held = (level, axis, tokens, n, t) => (level[axis] === "both" ? (tokens === "pixels" ? [0, n] : [n, n + t]) : level[axis] === tokens ? [0, tokens === "pixels" ? n : t] : null);

// One level for the explorer: `level` as the page's description has it, `outputs` by name, T words
export function packLevel(level, outputs, words) {
  const [h, w] = level.grid, n = h * w, maps = level.layers * level.heads, all = outputs[`attention_${level.name}`].data;
  const count = axis => (level[axis] === "both" ? n + words : level[axis] === "pixels" ? n : words), K = count("keys"), Q = count("queries");
  const block = (queries, keys) => {
    const rows = held(level, "queries", queries, n, words), columns = held(level, "keys", keys, n, words);
    if (!rows || !columns) return null;
    const width = columns[1] - columns[0], height = rows[1] - rows[0], out = new Float32Array(maps * height * width);
    for (let m = 0, to = 0; m < maps; m++) for (let q = rows[0]; q < rows[1]; q++, to += width) out.set(all.subarray((m * Q + q) * K + columns[0], (m * Q + q) * K + columns[1]), to);
    return packRows(out, maps, height, width);
  };
  const parts = (name, axis) => Object.fromEntries(["pixels", "words"].flatMap(tokens => {
    const part = held(level, axis, tokens, n, words);
    if (!part) return [];
    const from = outputs[`${name}_${level.name}`].data, out = new Float32Array(maps * (part[1] - part[0])), size = count(axis);
    for (let m = 0; m < maps; m++) out.set(from.subarray(m * size + part[0], m * size + part[1]), m * (part[1] - part[0]));
    return [[tokens, bytesOf(out)]];
  }));
  const steps = level.steps ? { width: level.width, log_sums: parts("log_sums", "queries"), lengths: parts("lengths", "keys") } : null;
  if (steps && level.bias) steps.bias = { relative: bytesOf(new Float32Array(level.bias.relative.flat(3))), words: bytesOf(new Float32Array(level.bias.words.flat())) };
  return {
    name: level.name, grid: level.grid, layers: level.layers, heads: level.heads, keys: level.keys, pool: null, steps,
    pp: block("pixels", "pixels"), pw: block("pixels", "words"), wp: block("words", "pixels"), ww: block("words", "words"),
  };
}

// Share of each cell of a grid that a mask covers (its sides are multiples of the grid's, or windows overlap as in PyTorch)
function cover(mask, side, [h, w]) {
  const windows = size => Array.from({ length: size }, (_, i) => [Math.floor(i * side / size), Math.ceil((i + 1) * side / size)]);
  return windows(h).flatMap(([top, bottom]) => windows(w).map(([left, right]) => {
    let sum = 0;
    for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) sum += mask[y * side + x];
    return sum / ((bottom - top) * (right - left));
  }));
}

// ---- what lies in the page or beside it -------------------------------------------------------------------------------

const fromBase64 = text => Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), c => c.charCodeAt(0));
const gunzip = async bytes => new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
const pause = () => new Promise(done => setTimeout(done));

class Assets {
  constructor(about, base, heard) { Object.assign(this, { about, base, heard, got: 0, due: 0 }); globalThis.refsegAssets ??= {}; }
  // From here on the progress bar counts these
  expect(...names) { this.due += names.reduce((sum, name) => sum + this.about[name].bytes, 0); }
  async get(name) {
    const { bytes, parts } = this.about[name], inside = document.querySelector(`script[data-refseg-asset="${name}"]`);
    let text = inside?.textContent ?? "";
    if (inside) { inside.remove(); this.heard(this.got += bytes, this.due); await pause(); }
    else for (let part = 0; part < parts; part++) { text += await this.script(name, part); this.heard(this.got += bytes / parts, this.due); }
    return gunzip(fromBase64(text));
  }
  async text(name) { return new TextDecoder().decode(await this.get(name)); }
  // A script beside the page: unlike `fetch` it may also be read by a page that was opened from a file
  script(name, part) {
    const key = `${name}-${part}`;
    return new Promise((done, fail) => {
      const script = Object.assign(document.createElement("script"), { src: `${this.base}${key}.js` });
      script.onload = () => { const text = globalThis.refsegAssets[key]; delete globalThis.refsegAssets[key]; script.remove(); done(text); };
      script.onerror = () => fail(new Error(`${key}.js is not beside this page`));
      document.head.append(script);
    });
  }
}

async function imported(source) {
  const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  try { return await import(address); } finally { URL.revokeObjectURL(address); }
}

// ---- the model --------------------------------------------------------------------------------------------------------

class Model {
  constructor(about) { Object.assign(this, { about, words: new Vocabulary(about.vocabulary), device: "CPU" }); }

  async load(assets, tell) {
    const gpu = await graphicsCard(), runtime = gpu ? "gpu" : "cpu";
    assets.expect(`ort-${runtime}`, `ort-${runtime}-wasm`, "encoder", "phrase");
    const ort = await imported(await assets.text(`ort-${runtime}`));
    Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary: await assets.get(`ort-${runtime}-wasm`) });
    ort.env.logLevel = "error";
    this.graphs = [await assets.get("encoder"), await assets.get("phrase")];
    tell("Starting the model …");
    await pause();
    this.Tensor = ort.Tensor;
    this.open = provider => Promise.all(this.graphs.map(graph => ort.InferenceSession.create(graph, { executionProviders: [provider], graphOptimizationLevel: "all" })));
    this.sessions = await this.open("wasm");
    this.gpu = gpu;
  }

  // Use the graphics card if it gives the same mask, faster
  async tryGraphicsCard(pixels, phrase) {
    if (!this.gpu) return;
    const timed = async () => { let best = Infinity, answer; for (let i = 0; i < 4; i++) { answer = await this.answer(await this.encode(pixels), phrase); best = Math.min(best, answer.milliseconds); } return [best, answer]; };
    const cpu = this.sessions, [slow, right] = await timed();
    try {
      this.sessions = await this.open("webgpu");
      const [fast, answer] = await timed(), differs = answer.mask.reduce((n, v, i) => n + (v !== right.mask[i]), 0);
      if (fast < slow && differs <= .002 * answer.mask.length) { this.device = "WebGPU"; return; }
    } catch { /* the browser promises more than it has */ }
    this.sessions = cpu;
  }

  async encode(pixels) {
    const { image_size: s } = this.about, planes = new Uint8Array(3 * s * s);
    for (let i = 0; i < s * s; i++) for (let c = 0; c < 3; c++) planes[c * s * s + i] = pixels[3 * i + c];
    return this.sessions[0].run({ images: new this.Tensor("uint8", planes, [1, 3, s, s]) });
  }

  async answer(features, phrase) {
    const start = performance.now(), words = this.words.read(phrase), ids = this.words.encode(words);
    if (!words.length) return null;
    const given = new this.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
    const outputs = await this.sessions[1].run({ words: given, ...features });
    const { image_size: size, threshold } = this.about, side = outputs.logits.dims[1], soft = outputs.logits.data.map(v => 1 / (1 + Math.exp(-v)));
    const probability = resize(soft, side, size), mask = Uint8Array.from(probability, p => p > threshold);
    let area = 0, sum = 0;
    mask.forEach((v, i) => { if (v) { area += 1; sum += probability[i]; } });
    const read = words.slice(0, this.about.vocabulary.max_words), unknown = [...new Set(words)].filter(word => !this.words.knows(word));
    return { phrase, words: read, unknown, all: words.length, outputs, soft, side, probability, mask, area: area / mask.length, score: area ? sum / area : 0, milliseconds: performance.now() - start };
  }
}

async function graphicsCard() {
  try { return "Suspending" in WebAssembly && Boolean(await navigator.gpu?.requestAdapter()); } catch { return false; }
}

// ---- the page ---------------------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

const where = (mask, size) => {
  let n = 0, x = 0, y = 0;
  mask.forEach((v, i) => { if (v) { n += 1; x += i % size; y += Math.floor(i / size); } });
  const part = (v, low, high) => (v / n / size < .36 ? low : v / n / size > .64 ? high : "");
  return [part(y, "upper", "lower"), part(x, "left", "right")].filter(Boolean).join(" ") || "middle";
};

export async function start(root) {
  const find = name => root.querySelector(`[data-part="${name}"]`);
  const about = JSON.parse(find("about").textContent), model = new Model(about), size = about.image_size;
  const [sceneCanvas, maskCanvas, input, status, spoken, bar, loading, told] = ["scene", "mask", "phrase", "status", "spoken", "bar", "loading", "told"].map(find);
  const S = { index: -1, phrase: "", features: null, answer: null, truth: null, wanted: null, busy: false, touched: false };
  const mega = bytes => (bytes / 1e6).toFixed(1);
  const assets = new Assets(about.assets, root.dataset.base ?? "", (got, due) => { bar.max = due; bar.value = got; told.textContent = `Loading the model: ${mega(got)} of ${mega(due)} MB`; });

  // -- scenes
  let shapes = [], scenes = [], pixels = null;
  async function loadScenes() {
    assets.expect("scenes", "pixels");
    const data = JSON.parse(await assets.text("scenes"));
    shapes = data.shapes.map(path => new Path2D(path));
    scenes = data.scenes;
    const showcase = data.showcase.map(item => ({ ...item, index: scenes.findIndex(scene => scene.seed === item.seed) }));
    pixels = await assets.get("pixels");
    return showcase;
  }
  // The image that the model sees: bytes, each the difference to the one on its left
  function imageOf(index) {
    const out = pixels.slice(index * 3 * size * size, (index + 1) * 3 * size * size);
    for (let row = 0; row < size; row++) for (let i = 3; i < 3 * size; i++) out[row * 3 * size + i] += out[row * 3 * size + i - 3];
    return out;
  }
  function labelsOf(index) {
    const from = scenes.length * 3 * size * size;
    return pixels.subarray(from + index * size * size, from + (index + 1) * size * size);
  }

  function drawScene(canvas, scene) {
    const g = canvas.getContext("2d"), unit = canvas.width / 1000, ground = g.createLinearGradient(0, 0, 0, 1000);
    const placed = ([shape, ...matrix]) => { const path = new Path2D(); path.addPath(shapes[shape], new DOMMatrix(matrix)); return path; };
    g.setTransform(unit, 0, 0, unit, 0, 0);
    for (const [at, color] of scene.ground) ground.addColorStop(at, color);
    g.fillStyle = ground; g.fillRect(0, 0, 1000, 1000);
    g.lineJoin = "round";
    for (const [color, ...rest] of scene.strokes) {
      const more = typeof rest.at(-1) === "object" ? rest.pop() : {}, path = placed(rest);
      g.save();
      if (more.clip) g.clip(placed(more.clip));
      g.globalAlpha = more.alpha ?? 1; g.fillStyle = g.strokeStyle = color;
      if (more.line) { g.lineWidth = more.line; g.stroke(path); }
      g.fill(path);
      g.restore();
    }
  }

  const line = (lines, scale) => {
    const path = new Path2D();
    for (const points of lines) { for (let i = 0; i < points.length; i += 2) path[i ? "lineTo" : "moveTo"](points[i] * scale, points[i + 1] * scale); path.closePath(); }
    return path;
  };
  function drawMask() {
    const g = maskCanvas.getContext("2d"), side = maskCanvas.width, unit = side / 512;
    g.clearRect(0, 0, side, side);
    g.lineJoin = "round";
    const stroke = (path, width, color, dash = []) => { g.setLineDash(dash.map(v => v * unit)); g.lineWidth = width * unit; g.strokeStyle = color; g.stroke(path); };
    if (S.truth && S.truth.iou < .5) {
      const path = line(S.truth.outline, side);
      stroke(path, 4.5, "rgba(0,0,0,.6)"); stroke(path, 2.5, "#ffd166", [8, 6]);
    }
    if (S.answer?.area) {
      const path = line(S.answer.outline, side);
      g.fillStyle = "rgba(255,45,149,.2)"; g.fill(path);
      stroke(path, 6.5, "#fff"); stroke(path, 4, "#ff2d95");
    }
  }
  function fit() {
    const side = Math.round(sceneCanvas.clientWidth * Math.max(devicePixelRatio || 1, 1));
    if (!side || S.index < 0) return;
    if (sceneCanvas.width !== side) for (const canvas of [sceneCanvas, maskCanvas]) canvas.width = canvas.height = side;
    drawScene(sceneCanvas, scenes[S.index]); drawMask();
  }
  new ResizeObserver(fit).observe(sceneCanvas);

  // -- showing a scene and a phrase
  function setScene(index) {
    if (index === S.index) return;
    S.index = index; S.features = S.answer = S.truth = null;
    const scene = scenes[index];
    sceneCanvas.setAttribute("aria-label", `A drawn scene, number ${scene.seed}. ${scene.words}`);
    find("seed").textContent = scene.seed;
    find("examples").replaceChildren(...scene.phrases.map(({ text }) => chip(text, () => put(text))));
    fit();
  }
  function chip(text, press, more = []) {
    return make("button", { type: "button", class: "chip", "data-phrase": text, onclick: press }, make("span", {}, text), ...more);
  }
  function put(phrase) { input.value = phrase; touch(); ask(phrase); }
  function show(index, phrase) { setScene(index); input.value = phrase; return ask(phrase); }
  function mark() {
    const now = model.words.read(S.phrase).join(" ");
    for (const button of root.querySelectorAll("[data-phrase]")) {
      const here = button.dataset.seed === undefined || +button.dataset.seed === scenes[S.index].seed;
      button.setAttribute("aria-pressed", String(here && model.words.read(button.dataset.phrase).join(" ") === now));
    }
  }

  // The newest phrase is answered; those that were typed in between are left out
  async function ask(phrase) {
    S.phrase = phrase; S.wanted = phrase; mark();
    if (S.busy || !model.sessions) return S.running;
    S.busy = true;
    S.running = (async () => {
      try {
        while (S.wanted !== null) {
          const now = S.wanted, index = S.index;
          S.wanted = null;
          S.features ??= await model.encode(imageOf(index));
          const answer = await model.answer(S.features, now);
          if (index === S.index) receive(answer, now); else S.features = null;
        }
      } catch (error) { fail(error); } finally { S.busy = false; }
    })();
    return S.running;
  }

  function receive(answer, phrase) {
    const scene = scenes[S.index], said = answer && scene.phrases.concat(showcase.filter(item => item.seed === scene.seed)).find(item => model.words.read(item.text).join(" ") === answer.words.join(" "));
    S.answer = answer; S.truth = null;
    if (answer) answer.outline = contour(resize(answer.soft, answer.side, 256), 256, about.threshold);
    if (said) {
      const truth = Uint8Array.from(labelsOf(S.index), v => v === said.referent + 1);
      let both = 0, either = 0;
      truth.forEach((v, i) => { both += v & answer.mask[i]; either += v | answer.mask[i]; });
      S.truth = { mask: truth, iou: both / either, outline: contour(truth, size, .5) };
    }
    drawMask(); tellAnswer(answer, phrase); mark(); later();
  }

  function verdict() {
    if (!S.truth) return null;
    const { iou } = S.truth, [kind, text] = iou >= .5 ? ["right", "right"] : iou < .1 && S.answer.area ? ["wrong", "the wrong object"] : S.answer.area ? ["wrong", "partly right"] : ["wrong", "missed"];
    return make("span", { class: `verdict ${kind}` }, `${kind === "right" ? "✓" : "✗"} ${text}`);
  }
  function tellAnswer(answer, phrase) {
    const parts = [], note = find("note");
    if (!answer) parts.push(phrase.trim() ? "This has no word in it." : "Type what to look for.");
    else if (!answer.area) parts.push(make("strong", {}, "nothing found"));
    else parts.push(make("strong", {}, `score ${answer.score.toFixed(2)}`), make("span", {}, `${(100 * answer.area).toFixed(1)} % of the image`));
    const sure = verdict();
    if (answer && sure) parts.push(sure);
    if (answer) parts.push(make("span", { class: "time" }, `${answer.milliseconds < 9.5 ? answer.milliseconds.toFixed(1) : Math.round(answer.milliseconds)} ms, ${model.device}`));
    status.replaceChildren(...parts);
    const notes = [];
    if (answer?.unknown.length) notes.push(answer.unknown.length === new Set(answer.words).size ? "The model knows none of these words: its answer has nothing to do with them." : `Unknown to the model: ${answer.unknown.map(word => `“${word}”`).join(", ")}.`);
    if (answer && answer.all > answer.words.length) notes.push(`It reads the first ${answer.words.length} words.`);
    if (S.truth && S.truth.iou < .5) notes.push("The dashed line shows what the phrase means.");
    note.textContent = notes.join(" ");
    clearTimeout(S.speak);
    S.speak = setTimeout(() => {
      spoken.textContent = !answer ? "" : `“${answer.phrase}”: ${answer.area ? `marked in the ${where(answer.mask, size)}, score ${answer.score.toFixed(2)}, ${(100 * answer.area).toFixed(1)} percent of the image` : "nothing found"}. ${sure?.textContent.slice(2) ?? ""} ${note.textContent}`;
    }, 700);
  }

  // -- addresses that can be shared: #scene=12&phrase=the red ball
  const addressOf = () => `#scene=${scenes[S.index].seed}&phrase=${encodeURIComponent(S.phrase).replaceAll("%20", "+")}`;
  function touch() { S.touched = true; }
  function remember() {
    if (!S.touched) return;
    try { history.replaceState(null, "", addressOf()); } catch { /* some browsers refuse it for files */ }
  }
  function fromAddress() {
    const given = new URLSearchParams(location.hash.slice(1)), index = scenes.findIndex(scene => String(scene.seed) === given.get("scene"));
    return index < 0 ? null : { index, phrase: given.get("phrase") ?? scenes[index].phrases[0].text };
  }

  // -- the explorer under it, a moment after the last key
  let explorer = null;
  const traits = { data: null, phrase: "", live: true, can_keep: false, error: "", answered: 0, locked: null, kind: "raw", direction: "looks", scale: "percentile", level: "", layer: -1, head: "mean" };
  const reacts = {};
  const host = {
    get: name => traits[name],
    set(name, value, own = false) {
      if (traits[name] === value) return;
      traits[name] = value;
      for (const react of reacts[`change:${name}`] ?? []) react();
      if (name === "phrase" && !own) put(value);  // somebody wrote it into the explorer
    },
    save_changes() {}, send() {}, on(event, react) { (reacts[event] ??= new Set()).add(react); }, off(event, react) { reacts[event]?.delete(react); },
  };
  function later() {
    remember();
    clearTimeout(S.later);
    S.later = setTimeout(() => { if (S.answer && about.levels.length) explain(S.answer).catch(fail); }, 350);
  }
  const packMask = (mask, outline) => mask && { outline, cover: Object.fromEntries(about.levels.map(({ grid }) => [grid.join("x"), cover(mask, size, grid)])), area: mask.reduce((a, b) => a + b, 0) / mask.length };
  function panelOf(answer) {
    const T = answer.words.length;
    return {
      title: about.model, note: status.innerText.split("\n").join(" · "), phrase: answer.phrase, words: answer.words,
      kinds: { raw: about.levels.map(level => packLevel(level, answer.outputs, T)) },
      unknown: answer.words.flatMap((word, i) => (answer.unknown.includes(word) ? [i] : [])),
      masks: { predicted: packMask(answer.mask, answer.outline), truth: S.truth && packMask(S.truth.mask, S.truth.outline) },
    };
  }
  async function explain(answer) {
    const picture = make("canvas"), place = find("explorer");
    picture.width = picture.height = 512;
    drawScene(picture, scenes[S.index]);
    traits.level ||= about.levels[about.levels.length >> 1].name;
    const data = { image: { url: picture.toDataURL("image/png"), width: 512, height: 512 }, palette: fromBase64(about.palette), panels: [panelOf(answer)] };
    if (!explorer) {
      explorer = (await imported(await assets.text("explorer"))).default;
      Object.assign(traits, { data, phrase: answer.phrase });
      place.replaceChildren();
      explorer.render({ model: host, el: place });
      return;
    }
    if (S.answer !== answer) return;
    host.set("locked", null); host.set("phrase", answer.phrase, true); host.set("data", data); host.set("answered", traits.answered + 1);
  }

  function fail(error) { console.error(error); loading.hidden = false; bar.hidden = true; told.textContent = `This page could not start the model (${error.message ?? error}). It needs a current browser.`; }

  // -- begin
  let showcase = [];
  try {
    showcase = await loadScenes();
    const hall = find("showcase"), lucky = showcase.filter(item => !item.broken);
    hall.replaceChildren(...showcase.map(item => {
      const button = chip(item.text, () => { touch(); show(item.index, item.text); }, item.broken ? [make("em", {}, "breaks it")] : []);
      button.dataset.seed = item.seed;
      return button;
    }));
    const first = fromAddress() ?? (({ index, text }) => ({ index, phrase: text }))(lucky[Math.floor(Math.random() * lucky.length)]);
    setScene(first.index);
    input.value = S.phrase = first.phrase;
    input.addEventListener("input", () => { touch(); ask(input.value); });
    find("form").addEventListener("submit", event => { event.preventDefault(); touch(); ask(input.value); });
    find("new").addEventListener("click", () => {
      let index = S.index;
      while (index === S.index && scenes.length > 1) index = Math.floor(Math.random() * scenes.length);
      touch();
      show(index, scenes[index].phrases[0].text);
    });
    find("link").addEventListener("click", async () => {
      const address = location.href.split("#")[0] + addressOf();
      const copied = await Promise.resolve(navigator.clipboard?.writeText(address) ?? Promise.reject()).then(() => true, () => false);
      if (!copied) { location.hash = addressOf(); }
      find("link").lastElementChild.textContent = copied ? "Copied" : "It is in the address bar";
      setTimeout(() => { find("link").lastElementChild.textContent = "Copy link"; }, 2000);
    });
    addEventListener("hashchange", () => { const given = fromAddress(); if (given && (given.index !== S.index || given.phrase !== S.phrase)) show(given.index, given.phrase); });
    await model.load(assets, text => { told.textContent = text; bar.removeAttribute("value"); });
    loading.hidden = true;
    root.dataset.ready = "true";
    await ask(S.phrase);
    await ask(S.phrase);  // the first answer is slow: the browser was still compiling
    await model.tryGraphicsCard(imageOf(S.index), S.phrase);
  } catch (error) { fail(error); }
  return {
    model, packed: () => panelOf(S.answer), tokenize,
    state: () => ({ seed: scenes[S.index].seed, phrase: S.phrase, words: S.answer?.words, mask: S.answer && Array.from(S.answer.mask), score: S.answer?.score, iou: S.truth?.iou, milliseconds: S.answer?.milliseconds, device: model.device }),
    show: (seed, phrase) => show(scenes.findIndex(scene => scene.seed === seed), phrase),
    seeds: () => scenes.map(scene => scene.seed),
    settled: async () => { while (S.busy) await S.running; },
  };
}

for (const root of globalThis.document?.querySelectorAll(".refseg-live") ?? []) root.started = start(root);
