"use strict";
// The page's data is only ever put on it as text (textContent), never as markup: it came from models and prompts.
(() => {
  const report = JSON.parse(document.getElementById("data").textContent);
  const { sequences, files, regimes, metrics, parameters } = report;
  // What is worked out here from the alternatives of each token; charted as the others are.
  const PROBABILITY = { field: "probability", name: "probability", unit: "", description: "Probability of the token before temperature and filters, where it is known." };
  const charted = [...metrics, ...parameters, PROBABILITY];
  const PAGE = 2000; // tokens shown at a time
  const PROMPT = 20000; // characters of a prompt that are shown
  const FLOOR = 1e-3; // where logarithmic axes begin; what is smaller stands at their edge
  // A plane's axes run by one of these. Square roots leave room both for the corner of the sure and for the few that are lost.
  const SCALES = { root: Math.sqrt, log: (value) => Math.log10(Math.max(value, FLOOR)), linear: (value) => value };
  const TICKS = { root: [0, 0.1, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000], log: [0.001, 0.01, 0.1, 1, 10, 100, 1000] };
  const SYMBOLS = ["circle", "diamond", "triangle-up", "x", "square", "circle-open"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const state = { view: "one", first: report.opening, compare: files.length > 1 ? "auto" : "", tint: "regime", scale: "root", shown: new Set(["entropy", "varentropy", "attention_entropy"]) };
  const byId = (id) => document.getElementById(id);
  const number = new Intl.NumberFormat("en");

  // --- small helpers -------------------------------------------------------------------------------------------------

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in element) element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  // Control characters and marks that change the direction of what follows are shown by their code points instead.
  const SIGNS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/;
  const codePoint = (character) => "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

  /** The nodes that show a piece of text; `broken`: line breaks also break the line. */
  function visible(text, broken = false) {
    if (text === "") return [make("span", { className: "sign nothing" })];
    if (!SIGNS.test(text) && !text.includes("\n")) return [text];
    const nodes = [];
    for (const part of text.split(/(\n|[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff])/)) {
      if (part === "\n") nodes.push(make("span", { className: "sign newline" }), ...(broken ? ["\n"] : []));
      else if (SIGNS.test(part)) nodes.push(make("span", { className: "sign", textContent: codePoint(part) }));
      else if (part) nodes.push(part);
    }
    return nodes;
  }

  const plain = (text) => text.replace(/\s+/g, " ");
  const isNumber = (value) => value !== null && value !== undefined;
  const shownNumber = (value) => {
    if (!isNumber(value)) return "–";
    if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(1);
    return String(Number(value.toPrecision(4)));
  };
  const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(share * 100).toFixed(1)} %`);
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (regime) => (dark.matches ? regimes[regime].dark : regimes[regime].light);

  /** `share` of one #rrggbb on another. */
  function mixed(top, bottom, share) {
    const channel = (text, place) => parseInt(text.slice(place, place + 2), 16);
    const parts = [1, 3, 5].map((place) => Math.round(channel(top, place) * share + channel(bottom, place) * (1 - share)));
    return `rgb(${parts.join(",")})`;
  }

  // --- packed data, as report.py's _columns writes it ------------------------------------------------------------------

  // What is packed stands behind this script, all but the first sequence, so that this begins while the rest is being read.
  const behind = new Promise((read) => document.addEventListener("DOMContentLoaded", read)).then(() => byId("packed").textContent);
  async function inflated([begin, end]) {
    const text = begin === end ? report.first : (await behind).slice(begin, end);
    const bytes = Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
  }

  /** Reads columns of `bytes` one after the other. */
  class Columns {
    constructor(bytes) { this.bytes = bytes; this.at = 0; }

    json() {
      const begin = this.at + 4;
      this.at = begin + new DataView(this.bytes.buffer).getUint32(this.at, true);
      return JSON.parse(new TextDecoder().decode(this.bytes.subarray(begin, this.at)));
    }

    /** `count` integers of `size` bytes, whose first bytes come first. */
    integers(count, size, signed = false) {
      const values = Array(count);
      const from = this.at;
      this.at += count * size;
      for (let place = 0; place < count; place++) {
        const last = this.bytes[from + (size - 1) * count + place];
        let value = signed && last > 127 ? last - 256 : last;
        for (let part = size - 2; part >= 0; part--) value = value * 256 + this.bytes[from + part * count + place];
        values[place] = value;
      }
      return values;
    }

    numbers(count) {
      const digits = this.integers(count, 2, true);
      const powers = this.integers(count, 2, true);
      return digits.map((value, place) => {
        const power = powers[place];
        if (power === -32768) return null;
        // Powers of ten up to 22 are exact, so this rounds as reading the number would.
        return power >= -22 && power <= 0 ? value / 10 ** -power : Number(`${value}e${power}`);
      });
    }
  }

  const vocabularies = report.vocabularies.map(async (range) => (await inflated(range)).json()); // texts of tokens by their ids

  async function read(sequence) {
    const columns = new Columns(new Uint8Array(await (await inflated(sequence.packed)).arrayBuffer()));
    const data = columns.json();
    const { records } = sequence;
    data.ids = columns.integers(sequence.tokens, 8, true);
    const kinds = columns.integers(records, 1);
    data.regimes = kinds.map((kind) => kind % 10);
    data.forced = new Set(kinds.flatMap((kind, token) => (kind > 9 ? [token] : [])));
    const counts = columns.integers(records, 4);
    for (const { field } of [...metrics, ...parameters]) data[field] = columns.numbers(records);
    const total = sum(counts);
    const [ids, shares] = [columns.integers(total, 8, true), columns.numbers(total)];
    let end = 0;
    const ends = counts.map((count) => (end += count));
    let vocabulary = {};
    data.complete = vocabularies[sequence.vocabulary].then((texts) => { vocabulary = texts; });
    /** A token's alternatives: [id, text, probability]. */
    data.alternatives = (token) => ids.slice(ends[token] - counts[token], ends[token]).map((id, place) =>
      [id, data.alternativeTexts[id] ?? vocabulary[id] ?? `id ${id}`, shares[ends[token] - counts[token] + place]]);
    // The probability of each token before temperature and filters if it is among its alternatives, or was recorded; otherwise it
    // is at most that of the least probable of the alternatives, which is its bound. Neither where there are none.
    data.probability = Array(records).fill(null);
    data.bound = Array(records).fill(null);
    for (let token = 0; token < records; token++) {
      const begin = ends[token] - counts[token];
      let bound = null;
      for (let other = begin; other < ends[token]; other++) {
        if (ids[other] === data.ids[token]) data.probability[token] = shares[other];
        if (isNumber(shares[other])) bound = Math.min(bound ?? 1, shares[other]);
      }
      if (data.probability[token] === null && isNumber(data.logprob[token])) data.probability[token] = Math.exp(data.logprob[token]);
      if (data.probability[token] === null) data.bound[token] = bound;
    }
    return data;
  }

  const unpacked = new Map(); // the few sequences looked at last
  function tokensOf(place) {
    if (!unpacked.has(place)) {
      if (unpacked.size > 7) unpacked.delete(unpacked.keys().next().value);
      unpacked.set(place, read(sequences[place]));
    }
    return unpacked.get(place);
  }

  function shareBar(element, counts) {
    const total = sum(counts) || 1;
    let end = 0;
    let stops = "";
    regimes.forEach(({ name }, place) => {
      const begin = end;
      end += (counts[place] / total) * 100;
      stops += `, var(--${name}) ${begin}% ${end}%`;
    });
    if (end) element.style.background = `linear-gradient(to right${stops})`;
    element.setAttribute("aria-label", regimes.map(({ name }, place) => `${name} ${percent(counts[place] / total)}`).join(", "));
    return element;
  }

  const together = (chosen) => regimes.map((_, regime) => sum(chosen.map((sequence) => sequence.counts[regime])));
  // A sequence's number is named where its request has several.
  const several = new Set(sequences.filter((sequence) => sequence.index > 0).map((sequence) => `${sequence.file} ${sequence.id}`));
  const nameOf = (sequence) => sequence.title + (several.has(`${sequence.file} ${sequence.id}`) ? ` #${sequence.index}` : "") + (sequence.lost ? ` · branch ${sequence.branch}` : "");
  // Branches that were given up for another repeat what they share with the answer, so figures over all leave them out.
  const answers = sequences.filter((sequence) => !sequence.lost);

  // --- details of a token --------------------------------------------------------------------------------------------

  const details = byId("details");

  function showDetails(pane, token, box) {
    const { data } = pane;
    const known = token < data.regimes.length;
    const forced = pane.forced.has(token);
    const head = make("header", {}, make("bdi", {}, ...visible(data.texts[token] ?? "")), make("span", { textContent: `token ${number.format(token + 1)} · id ${data.ids[token]}` }));
    details.replaceChildren(head);
    if (!known) {
      details.append(make("p", { textContent: "No record: it came after the server's cap." }));
    } else {
      const regime = regimes[data.regimes[token]];
      const kind = make("span", {}, make("b", { className: `tinted ${regime.name}`, textContent: regime.name }), ` ${regime.meaning}`);
      if (forced) kind.append(" · ", make("b", { className: "forced HELV", textContent: "forced" }), " clarification");
      const lists = [metrics, parameters].map((group) => make("dl", {}, ...group.flatMap(({ field, name, unit }) => {
        const value = shownNumber(data[field][token]);
        return [make("dt", { textContent: name }), make("dd", { textContent: unit && value !== "–" ? `${value} ${unit}` : value })];
      })));
      details.append(make("p", { className: "why" }, kind, make("span", { textContent: drawnFrom(data, token) })), make("div", { className: "values" }, ...lists));
      const alternatives = data.alternatives(token);
      if (alternatives.length) {
        const rows = make("ol");
        for (const [id, text, share] of alternatives) {
          const bar = make("i");
          bar.style.width = `${(share ?? 0) * 100}%`;
          rows.append(make("li", { className: id === data.ids[token] ? "drawn" : "" }, make("bdi", {}, ...visible(text)), bar, make("span", { textContent: isNumber(share) ? percent(share) : "–" })));
        }
        details.append(make("h3", { textContent: "Most probable" }), rows);
      }
    }
    details.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = details;
    const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
    const below = box.bottom + 8;
    const top = below + height > innerHeight && box.top - height - 8 > 0 ? box.top - height - 8 : below;
    details.style.left = `${left + scrollX}px`;
    details.style.top = `${top + scrollY}px`;
  }

  /** How probable the token was, in words. */
  function drawnFrom(data, token) {
    if (isNumber(data.probability[token])) return `probability ${percent(data.probability[token])}`;
    if (isNumber(data.bound[token])) return `probability below the smallest shown (${percent(data.bound[token])})`;
    return "probability not recorded";
  }

  const hideDetails = () => { details.hidden = true; };

  // --- a sequence: its text, its plane, its metrics ------------------------------------------------------------------

  class Pane {
    constructor() {
      this.title = make("h2");
      this.chips = make("div", { className: "chips" });
      this.bar = make("div", { className: "bar", role: "img" });
      this.prompt = make("div");
      this.scores = make("dl", { className: "scores", "aria-label": "Scores of the answer" });
      this.text = make("div", { className: "text", role: "listbox", "aria-label": "Tokens", "aria-orientation": "horizontal" });
      this.previous = make("button", { type: "button", textContent: "‹ previous" });
      this.next = make("button", { type: "button", textContent: "next ›" });
      this.range = make("span");
      this.pages = make("div", { className: "pages" }, this.previous, this.range, this.next);
      this.plane = make("div", { className: "chart plane", role: "img" });
      this.lines = make("div", { className: "chart along", role: "img" });
      this.toggles = make("div", { className: "toggles", role: "group", "aria-label": "Metrics along the sequence" });
      this.element = make("section", { className: "pane" }, make("div", { className: "head" }, this.title, this.chips, this.bar, this.scores, this.prompt), this.text, this.pages,
        make("div", { className: "charts" }, make("div", {}, make("h3", { textContent: "Entropy × varentropy" }), this.plane),
          make("div", {}, make("h3", { textContent: "Along the sequence" }), this.toggles, this.lines)));
      this.previous.onclick = () => this.turn(this.page - 1);
      this.next.onclick = () => this.turn(this.page + 1);
      this.text.onkeydown = (event) => this.key(event);
      this.text.onpointerover = (event) => this.pointed(event.target.closest("bdi"));
      this.text.onpointerleave = () => this.pointed(null);
      this.text.onclick = (event) => event.target.closest("bdi")?.focus({ preventScroll: true });
      this.text.addEventListener("focusin", (event) => this.focused(event.target.closest("bdi")));
      this.text.addEventListener("focusout", () => { hideDetails(); this.mark(null); });
    }

    async show(place) {
      this.sequence = sequences[place];
      this.data = await tokensOf(place);
      this.forced = this.data.forced;
      this.differs = -1;
      this.page = 0;
      this.current = 0;
      return this;
    }

    get start() { return this.page * PAGE; }
    get stop() { return Math.min(this.data.texts.length, this.start + PAGE); }
    /** The tokens on the page that have records. */
    get places() { return Array.from({ length: Math.max(0, Math.min(this.stop, this.data.regimes.length) - this.start) }, (_, i) => this.start + i); }

    drawHead() {
      const { sequence } = this;
      this.title.replaceChildren(make("bdi", {}, ...visible(nameOf(sequence))));
      const facts = [
        files.length > 1 ? files[sequence.file] : null,
        sequence.model,
        [sequence.sampler, sequence.preset, sequence.fidelity].filter(Boolean).join(", "),
        sequence.promptTokens ? `${number.format(sequence.promptTokens)} + ${number.format(sequence.tokens)} tokens` : `${number.format(sequence.tokens)} tokens`,
        sequence.finish && `ended: ${sequence.finish}`,
        isNumber(sequence.entropy) ? `mean entropy ${shownNumber(sequence.entropy)} bits` : null,
        sequence.forced ? `${number.format(sequence.forced)} forced` : null,
        sequence.tokens > sequence.records ? `${number.format(sequence.tokens - sequence.records)} without a record` : null,
        this.differs >= 0 ? `differs from token ${number.format(this.differs + 1)} on` : null,
      ];
      this.chips.replaceChildren(make("bdi", { className: "id" }, ...visible(sequence.id)), ...facts.filter(Boolean).map((fact) => make("bdi", {}, ...visible(String(fact)))));
      shareBar(this.bar, sequence.counts);
      this.scores.replaceChildren(...report.scores.filter(({ field }) => field in sequence.scores).map(({ field, name, unit, description }) =>
        make("div", { title: description }, make("dt", { textContent: name }), make("dd", { textContent: [shownNumber(sequence.scores[field]), unit].filter(Boolean).join(" ") }))));
      const { prompt } = this.data;
      if (prompt) {
        const text = make("div", { className: "prompt", tabIndex: 0, role: "region", "aria-label": "Prompt", dir: "auto" }, ...visible(prompt.slice(0, PROMPT), true));
        if (prompt.length > PROMPT) text.append(make("span", { className: "sign", textContent: ` … ${number.format(prompt.length - PROMPT)} more characters in the file` }));
        this.prompt.replaceChildren(make("h3", { textContent: "Prompt" }), text, make("h3", { textContent: "Answer" }));
      }
      this.element.setAttribute("aria-label", plain(nameOf(sequence)));
    }

    drawText() {
      const { data } = this;
      const highest = state.highest || 1;
      const nodes = [];
      for (let token = this.start; token < this.stop; token++) {
        const piece = make("bdi", { role: "option", tabIndex: token === this.current ? 0 : -1 }, ...visible(data.texts[token] ?? "", true));
        piece.dataset.token = token;
        const regime = data.regimes[token];
        piece.className = regime === undefined ? "unknown" : `tinted ${regimes[regime].name}`;
        if (this.forced.has(token)) piece.classList.add("forced");
        if (token === this.differs) piece.classList.add("differs");
        if (isNumber(data.entropy[token])) piece.style.setProperty("--e", Math.min(1, data.entropy[token] / highest).toFixed(3));
        const probability = data.probability[token] ?? data.bound[token];
        if (isNumber(probability)) piece.style.setProperty("--u", (1 - probability).toFixed(3));
        if (isNumber(data.bound[token])) piece.classList.add("below");
        nodes.push(piece);
      }
      this.text.replaceChildren(...nodes);
      // Every token is isolated, so their order is the container's: that of most of the letters.
      const all = data.texts.slice(this.start, this.stop).join("");
      const rightToLeft = (all.match(/[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/g) ?? []).length;
      this.text.dir = rightToLeft * 2 > (all.match(/\p{L}/gu) ?? []).length ? "rtl" : "ltr";
      this.text.className = `text by-${state.tint}`;
      this.pages.hidden = data.texts.length <= PAGE;
      this.pages.style.display = this.pages.hidden ? "none" : "";
      this.range.textContent = `tokens ${number.format(this.start + 1)}–${number.format(this.stop)} of ${number.format(data.texts.length)}, here and below`;
      this.previous.disabled = this.page === 0;
      this.next.disabled = this.stop >= data.texts.length;
    }

    turn(page) {
      this.page = Math.max(0, Math.min(page, Math.ceil(this.data.texts.length / PAGE) - 1));
      this.current = this.start;
      this.text.scrollTop = 0;
      this.drawText();
      this.drawCharts();
    }

    // --- linking ---

    piece(token) { return this.text.querySelector(`bdi[data-token="${token}"]`); }

    pointed(piece) {
      if (piece) this.look(Number(piece.dataset.token), piece);
      else if (this.text.contains(document.activeElement)) this.focused(document.activeElement.closest("bdi"));
      else { hideDetails(); this.mark(null); }
    }

    focused(piece) {
      if (!piece) return;
      const token = Number(piece.dataset.token);
      const before = this.piece(this.current);
      if (before) { before.tabIndex = -1; before.removeAttribute("aria-selected"); before.removeAttribute("aria-describedby"); }
      this.current = token;
      piece.tabIndex = 0;
      piece.setAttribute("aria-selected", "true");
      piece.setAttribute("aria-describedby", "details");
      this.look(token, piece);
    }

    look(token, piece, box = null) {
      this.mark(token);
      // Of a token that is broken over lines, its larger part.
      const parts = box ? [box] : [...piece.getClientRects()].sort((a, b) => b.width - a.width);
      showDetails(this, token, parts[0] ?? piece.getBoundingClientRect());
    }

    /** Mark a token in the text, on the plane and along the sequence; null: none. */
    mark(token) {
      if (this.marked === token) return;
      this.text.querySelector("bdi.here")?.classList.remove("here");
      this.marked = token;
      if (token !== null) this.piece(token)?.classList.add("here");
      if (this.waiting) return;
      this.waiting = requestAnimationFrame(() => {
        this.waiting = null;
        const place = this.marked;
        if (!this.plane.data || !this.lines.data) return;
        const there = place !== null && place < this.data.regimes.length;
        const dot = `shapes[${this.plane.layout.shapes.length - 1}]`;
        const measured = there && isNumber(this.data.entropy[place]) && isNumber(this.data.varentropy[place]);
        Plotly.relayout(this.plane, { [`${dot}.visible`]: measured, ...(measured ? { [`${dot}.xanchor`]: this.onAxis(this.data.entropy[place]), [`${dot}.yanchor`]: this.onAxis(this.data.varentropy[place]) } : {}) });
        const at = "shapes[0]";
        Plotly.relayout(this.lines, { [`${at}.visible`]: there, ...(there ? { [`${at}.x0`]: place + 1, [`${at}.x1`]: place + 1 } : {}) });
      });
    }

    key(event) {
      const last = this.data.texts.length - 1;
      const forward = this.text.dir === "rtl" ? "ArrowLeft" : "ArrowRight";
      const backward = this.text.dir === "rtl" ? "ArrowRight" : "ArrowLeft";
      let token = this.current;
      if (event.key === forward) token += 1;
      else if (event.key === backward) token -= 1;
      else if (event.key === "ArrowDown") token = this.inNextLine(1);
      else if (event.key === "ArrowUp") token = this.inNextLine(-1);
      else if (event.key === "Home") token = 0;
      else if (event.key === "End") token = last;
      else if (event.key === "PageDown") token += PAGE;
      else if (event.key === "PageUp") token -= PAGE;
      else if (event.key === "Escape") { hideDetails(); this.mark(null); return; }
      else return;
      event.preventDefault();
      this.goTo(Math.max(0, Math.min(token, last)));
    }

    goTo(token) {
      if (token < this.start || token >= this.stop) this.turn(Math.floor(token / PAGE));
      const piece = this.piece(token);
      piece.scrollIntoView({ block: "nearest" });
      piece.focus({ preventScroll: true });
    }

    /** The token above or below the current one. */
    inNextLine(step) {
      const from = this.piece(this.current).getBoundingClientRect();
      let [best, distance, line] = [this.current, Infinity, null];
      for (let token = this.current + step; token >= this.start && token < this.stop; token += step) {
        const box = this.piece(token).getBoundingClientRect();
        if (Math.abs(box.top - from.top) < from.height / 2) continue;
        line ??= box.top;
        if (Math.abs(box.top - line) > from.height / 2) break;
        const off = Math.abs(box.left - from.left);
        if (off < distance) [best, distance] = [token, off];
      }
      return best;
    }

    // --- charts ---

    onAxis(value) { return SCALES[state.scale](value); }

    drawCharts() { this.drawPlane(); this.drawToggles(); this.drawLines(); this.marked = undefined; }

    drawPlane() {
      const { data } = this;
      const card = variable("--card");
      const borders = report.borders[this.sequence.borders];
      const on = (value) => this.onAxis(value);
      const [right, top] = [on(state.extent.entropy), on(state.extent.varentropy)];
      const low = on(0) - 0.02 * (right - on(0));
      const bottom = on(0) - 0.02 * (top - on(0));
      const tintOf = (name) => colour(regimes.findIndex((regime) => regime.name === name));
      const region = (name, from, to, above, below, textposition) => {
        const [x0, x1] = [from === null ? low : on(from), to === null ? right : Math.min(on(to), right)];
        const [y0, y1] = [above === null ? bottom : on(above), below === null ? top : Math.min(on(below), top)];
        const tint = tintOf(name);
        return {
          type: "rect", layer: "below", x0, x1, y0, y1, visible: x1 > x0 && y1 > y0, fillcolor: mixed(tint, card, dark.matches ? 0.2 : 0.13),
          line: { color: mixed(tint, card, 0.55), width: 1 }, label: { text: textposition ? name : "", textposition, font: { size: 11, color: tint }, padding: 6 },
        };
      };
      const shapes = [];
      const annotations = [];
      if (borders) { // a saved response doesn't tell them
        const { lelv, helv, lehv, hehv } = borders;
        // The first match wins, so it is painted last.
        shapes.push(
          region("HEHV", hehv.entropy_above, null, hehv.varentropy_above, null, "top right"),
          region("LEHV", null, lehv.entropy_below, lehv.varentropy_above, null, "top left"),
          region("HELV", helv.entropy_above, null, null, helv.varentropy_below, "bottom right"),
          region("LELV", null, lelv.entropy_below, null, lelv.varentropy_below, undefined),
        );
        // Beside its corner, which is small and full of dots.
        annotations.push({ text: "LELV", x: on(lelv.entropy_below), y: on(lelv.varentropy_below), xanchor: "left", yanchor: "bottom", showarrow: false, font: { size: 11, color: tintOf("LELV") } });
      }
      shapes.push(
        {
          type: "circle", xsizemode: "pixel", ysizemode: "pixel", xanchor: 1, yanchor: 1, x0: -8, x1: 8, y0: -8, y1: 8,
          line: { color: variable("--ink"), width: 2.5 }, visible: false,
        },
      );
      const traces = regimes.map((regime, place) => {
        const tokens = this.places.filter((token) => data.regimes[token] === place && isNumber(data.entropy[token]) && isNumber(data.varentropy[token]));
        return {
          type: "scatter", mode: "markers", name: regime.name, x: tokens.map((token) => this.onAxis(data.entropy[token])),
          y: tokens.map((token) => this.onAxis(data.varentropy[token])), customdata: tokens, hoverinfo: "none",
          marker: { color: colour(place), symbol: SYMBOLS[place], size: 7, opacity: 0.8, line: { width: 0.6, color: card } },
        };
      });
      const axis = (title, begin, end) => {
        const ticks = (TICKS[state.scale] ?? []).filter((value) => on(value) <= end);
        const spaced = ticks.filter((value, place) => place === 0 || state.scale === "log" || on(value) - on(ticks[place - 1]) > (end - begin) * 0.035);
        return { ...this.axis(), title: { text: title, standoff: 8 }, range: [begin, end], ...(ticks.length ? { tickvals: spaced.map(on), ticktext: spaced.map(String) } : {}) };
      };
      const adaptive = tintOf("ADAPTIVE");
      this.draw(this.plane, traces, {
        ...this.layout(410), margin: { l: 54, r: 14, t: 8, b: 42 }, shapes, annotations, hovermode: "closest", plot_bgcolor: mixed(adaptive, card, 0.05),
        xaxis: axis("entropy, bits", low, right), yaxis: axis("varentropy, bits²", bottom, top),
      });
      this.plane.setAttribute("aria-label", `Entropy and varentropy of ${this.places.length} tokens, with the borders of the regimes`);
    }

    drawToggles() {
      this.toggles.replaceChildren(...charted.map(({ field, name, description }) => {
        const button = make("button", { type: "button", textContent: name, title: description, "aria-pressed": state.shown.has(field) });
        button.onclick = () => {
          if (state.shown.has(field)) { if (state.shown.size > 1) state.shown.delete(field); } else state.shown.add(field);
          for (const pane of panes) { pane.drawToggles(); pane.drawLines(); }
          [...this.toggles.children].find((other) => other.textContent === name).focus();
        };
        return button;
      }));
    }

    drawLines() {
      const { data, places } = this;
      const rows = charted.filter(({ field }) => state.shown.has(field));
      const layout = {
        ...this.layout(Math.max(300, 40 + rows.length * 92)), margin: { l: 46, r: 14, t: 18, b: 44 }, hovermode: "x", annotations: [],
        shapes: [{ type: "line", xref: "x", yref: "paper", x0: 1, x1: 1, y0: 0, y1: 1, line: { color: variable("--ink"), width: 1.5 }, visible: false }],
      };
      const gap = rows.length > 1 ? 0.26 / rows.length : 0;
      const height = (1 - gap * (rows.length - 1)) / rows.length;
      const x = places.map((token) => token + 1);
      const colours = places.map((token) => colour(data.regimes[token]));
      const symbols = places.map((token) => SYMBOLS[data.regimes[token]]);
      const traces = rows.map(({ field, name, unit }, row) => {
        const top = 1 - row * (height + gap);
        const suffix = row ? row + 1 : "";
        layout[`yaxis${suffix}`] = { ...this.axis(), domain: [Math.max(0, top - height), top], rangemode: "tozero", nticks: 4, fixedrange: true, exponentformat: "none" };
        layout.annotations.push({ text: unit ? `${name}, ${unit}` : name, xref: "paper", yref: "paper", x: 0, y: top, xanchor: "left", yanchor: "bottom", showarrow: false, font: { size: 11, color: variable("--soft") } });
        return {
          type: "scatter", mode: "lines+markers", x, y: places.map((token) => data[field][token]), yaxis: `y${suffix}`, customdata: places, hoverinfo: "none",
          line: { color: variable("--soft"), width: 0.8 }, marker: { color: colours, symbol: symbols, size: places.length > 400 ? 3.5 : 5.5, opacity: 0.95 },
        };
      });
      layout.xaxis = { ...this.axis(), title: { text: "token", standoff: 10 }, anchor: rows.length > 1 ? `y${rows.length}` : "y", range: [this.start + 0.2, this.start + Math.max(2, places.length) + 0.8] };
      this.draw(this.lines, traces, layout);
      this.lines.setAttribute("aria-label", `${rows.map((row) => row.name).join(", ")} of each token along the sequence`);
      this.marked = undefined;
    }

    axis() {
      const line = variable("--line");
      return { gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line, automargin: false, ticklabeloverflow: "allow" };
    }

    layout(height) {
      return {
        height, autosize: true, showlegend: false, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: variable("--sans"), size: 12, color: variable("--soft") }, dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      };
    }

    draw(chart, traces, layout) {
      const first = !chart.data;
      chart.style.height = `${layout.height}px`; // fixed, so that what is measured in drawing doesn't lay out the rest of the page
      Plotly.react(chart, traces, layout, { displayModeBar: false, responsive: true });
      if (!first) return;
      const at = (event) => {
        const { clientX: x, clientY: y } = event.event;
        return { left: x + 12, top: y - 6, bottom: y + 6 };
      };
      chart.on("plotly_hover", (event) => {
        const token = event.points[0].customdata;
        this.piece(token)?.scrollIntoView({ block: "nearest", container: "nearest" });
        this.look(token, null, at(event));
      });
      chart.on("plotly_unhover", () => this.pointed(null));
      chart.on("plotly_click", (event) => this.goTo(event.points[0].customdata));
    }
  }

  // --- the page ------------------------------------------------------------------------------------------------------

  let panes = [];
  let turn = 0;

  /** Do two sequences answer the same prompt? Not known where a prompt left no hash. */
  const samePrompt = (one, other) => sequences[one].prompt !== null && sequences[one].prompt === sequences[other].prompt;

  /** The sequence that is compared with the first; -1: none. */
  function second() {
    if (state.compare === "") return -1;
    if (state.compare !== "auto") return Number(state.compare);
    const { file, index } = sequences[state.first];
    const same = sequences.map((_, place) => place).filter((place) => samePrompt(place, state.first) && sequences[place].file !== file && !sequences[place].lost);
    return same.find((place) => sequences[place].index === index) ?? same[0] ?? -1;
  }

  async function update() {
    const mine = ++turn;
    delete document.documentElement.dataset.ready;
    const other = second();
    const places = other >= 0 && other !== state.first ? [state.first, other] : [state.first];
    const shown = await Promise.all(places.map((place) => new Pane().show(place)));
    if (mine !== turn) return; // something else was chosen meanwhile
    hideDetails();
    for (const chart of panes.flatMap((pane) => [pane.plane, pane.lines])) if (chart.data) Plotly.purge(chart);
    panes = shown;
    if (panes.length === 2 && samePrompt(...places)) {
      const [left, right] = panes.map((pane) => pane.data.ids);
      const place = left.findIndex((token, i) => token !== right[i]);
      const differs = place >= 0 ? place : left.length < right.length ? left.length : -1;
      for (const pane of panes) pane.differs = differs;
    }
    measure();
    byId("panes").replaceChildren(...panes.map((pane) => pane.element));
    byId("panes").className = `panes ${panes.length === 1 ? "wide" : "two"}`;
    for (const pane of panes) { pane.drawHead(); pane.drawText(); }
    drawTree();
    drawLegend();
    drawCompare(other);
    await new Promise((painted) => requestAnimationFrame(() => setTimeout(painted)));
    if (mine !== turn) return;
    drawCharts();
    await Promise.all(panes.map((pane) => pane.data.complete));
    document.documentElement.dataset.ready = Math.round(performance.now());
  }

  /** What the sequences beside each other share: the plane's size and the scale of the tint. */
  function measure() {
    const largest = (field) => panes.reduce((most, pane) => pane.data[field].reduce((high, value) => Math.max(high, value ?? 0), most), 0);
    const border = (field) => Math.max(0, ...panes.flatMap((pane) => Object.values(report.borders[pane.sequence.borders] ?? {})).flatMap((part) => Object.entries(part)).filter(([name]) => name.startsWith(`${field}_`)).map(([, value]) => value));
    state.extent = { entropy: Math.max(0.1, largest("entropy") * 1.15, border("entropy") * 1.6), varentropy: Math.max(0.1, largest("varentropy") * 1.3, border("varentropy") * 1.8) };
    state.highest = Math.max(1, Math.ceil(largest("entropy")));
  }

  /** The charting library lies in the page as a text, so that what is to be read comes first. Its hash is in the page's policy. */
  function loadCharting() {
    const source = byId("plotly");
    if (!source) return;
    document.head.append(make("script", { textContent: source.textContent }));
    source.remove();
  }

  /** Of what is seen: a chart takes its size from the page. */
  function drawCharts() {
    loadCharting();
    if (state.view === "all") {
      drawHistograms();
    } else {
      for (const pane of panes) pane.drawCharts();
      drawShares();
    }
  }

  function drawShares() {
    const rows = panes.map((pane, place) => [panes.length === 1 ? "shown above" : place ? "right" : "left", pane.sequence.counts]);
    if (answers.length > 1) {
      if (files.length > 1) files.forEach((_, file) => rows.push([`all of file ${file + 1}`, together(answers.filter((sequence) => sequence.file === file))]));
      else rows.push([`all ${number.format(answers.length)}`, together(answers)]);
    }
    rows.reverse();
    const card = variable("--card");
    const traces = regimes.map((regime, place) => {
      const shares = rows.map(([, counts]) => counts[place] / (sum(counts) || 1));
      return {
        type: "bar", orientation: "h", name: regime.name, y: rows.map(([name]) => name), x: shares.map((share) => share * 100),
        text: shares.map((share) => (share >= 0.05 ? `${regime.name} ${percent(share)}` : "")), textposition: "inside", insidetextanchor: "middle", textangle: 0, constraintext: "inside",
        insidetextfont: { color: dark.matches ? "#131417" : "#ffffff" },
        customdata: rows.map(([, counts]) => [percent(counts[place] / (sum(counts) || 1)), number.format(counts[place])]),
        hovertemplate: `${regime.name}: %{customdata[0]}, %{customdata[1]} tokens<extra></extra>`, marker: { color: colour(place), line: { color: card, width: 1 } },
      };
    });
    const [pane] = panes;
    const layout = pane.layout(46 + rows.length * 34);
    byId("shares").style.height = `${layout.height}px`;
    Plotly.react(byId("shares"), traces, {
      ...layout, dragmode: false, barmode: "stack", bargap: 0.25, uniformtext: { minsize: 10, mode: "hide" }, margin: { l: 88, r: 24, t: 4, b: 26 },
      xaxis: { ...pane.axis(), range: [0, 100], ticksuffix: " %", fixedrange: true }, yaxis: { ...pane.axis(), fixedrange: true, ticks: "" },
    }, { displayModeBar: false, responsive: true });
  }

  // --- the branches of an answer that forked ---------------------------------------------------------------------------

  /** The answer that a sequence is a branch of: its branches, and where the lines of those are that have one. */
  function treeOf({ answer }) {
    const places = new Map();
    let branches = [];
    sequences.forEach((sequence, place) => {
      if (sequence.answer !== answer) return;
      places.set(sequence.branch, place);
      branches = sequence.forks ?? branches;
    });
    return { branches, places };
  }

  /** Branches with their parents: below each those that parted from it, the last first, so that no line crosses another. */
  function inRows(branches, parent = null) {
    const children = branches.filter((branch) => branch.parent === parent).sort((a, b) => b.position - a.position || b.id - a.id);
    return children.flatMap((branch) => [branch, ...inRows(branches, branch.id)]);
  }

  function drawTree() {
    const { branches, places } = treeOf(sequences[state.first]);
    byId("tree").hidden = branches.length < 2;
    const rows = inRows(branches);
    const rowOf = new Map(rows.map(({ id }, row) => [id, row]));
    const end = Math.max(1, ...branches.map(({ position, tokens }) => position + tokens));
    byId("branches").replaceChildren(...rows.map((branch, row) => {
      const place = places.get(branch.id);
      const line = make("i", { className: "line" });
      line.style.left = `${(branch.position / end) * 100}%`;
      line.style.width = `${(branch.tokens / end) * 100}%`;
      const stem = branch.parent === null ? null : make("i", { className: "stem" });
      if (stem) {
        stem.style.left = line.style.left;
        stem.style.setProperty("--rows", row - rowOf.get(branch.parent));
      }
      const parted = branch.parent === null ? "" : sequences[place]?.parted || `id ${branch.token}`;
      const facts = [
        `${number.format(branch.tokens)} ${branch.tokens === 1 ? "token" : "tokens"}`,
        isNumber(branch.score) ? `score ${shownNumber(branch.score)}` : null,
        branch.chosen ? "the answer" : branch.pruned_at === null ? "ran to its end" : `given up at ${number.format(branch.pruned_at)}`,
      ].filter(Boolean).join(" · ");
      const label = make("span", { className: "facts" }, parted && make("bdi", {}, ...visible(parted)), ` ${facts}`);
      const link = place === undefined ? make("span") : make("a", { href: `#s${place + 1}t${branch.position + 1}` });
      link.className = `branch${branch.chosen ? " chosen" : ""}`;
      if (place === state.first) link.setAttribute("aria-current", "true");
      // An address that is there already changes nothing by itself.
      link.onclick = () => { if (link.hash === location.hash) route(); };
      link.append(make("span", { className: "track" }, stem, line), label);
      return link;
    }));
  }

  // Arrow keys go from branch to branch, as they go from token to token.
  byId("branches").onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const links = [...byId("branches").querySelectorAll("a")];
    const target = links[links.indexOf(document.activeElement) + (step ?? 0)];
    if (step === undefined || !target) return;
    event.preventDefault();
    target.focus();
  };

  function drawLegend() {
    const parts = regimes.map((regime) => make("span", {}, make("b", { className: `tinted ${regime.name}`, textContent: regime.name }), regime.meaning));
    parts.push(make("span", {}, make("b", { className: "forced HELV", textContent: "forced" }), "clarification"));
    const scale = [make("span", { textContent: "0 bits" }), make("span", { className: "scale" }), make("span", { textContent: `${state.highest} bits of entropy` })];
    byId("legend").className = `legend by-${state.tint}`;
    const probable = [
      make("span", { textContent: "probability 1" }), make("span", { className: "scale" }), make("span", { textContent: "0" }),
      make("span", {}, make("b", { className: "below", textContent: "dotted" }), "below the smallest shown, not among the alternatives"),
    ];
    byId("legend").replaceChildren(...{ regime: parts, entropy: scale, probability: probable }[state.tint]);
  }

  function drawCompare(other) {
    const select = byId("compare");
    const option = (place) => {
      const sequence = sequences[place];
      return make("option", { value: String(place), textContent: plain((files.length > 1 ? `${files[sequence.file]}: ` : "") + nameOf(sequence)) });
    };
    const { answer } = sequences[state.first];
    const others = sequences.map((_, place) => place).filter((place) => place !== state.first && (!sequences[place].lost || sequences[place].answer === answer));
    const same = others.filter((place) => samePrompt(place, state.first));
    const different = others.filter((place) => !samePrompt(place, state.first));
    const nothing = files.length > 1 ? [make("option", { value: "auto", textContent: "the same prompt in another file" })] : [];
    select.replaceChildren(make("option", { value: "", textContent: "nothing" }), ...nothing,
      ...(same.length ? [make("optgroup", { label: "same prompt" }, ...same.map(option))] : []),
      ...(different.length ? [make("optgroup", { label: "other prompts" }, ...different.map(option))] : []));
    select.value = state.compare === "auto" ? "auto" : other >= 0 && other !== state.first ? String(other) : "";
  }

  // --- all sequences together ----------------------------------------------------------------------------------------

  const fileColours = () => [variable("--accent"), variable("--heat"), ...regimes.map((_, place) => colour(place))];
  const headings = (...names) => make("thead", {}, make("tr", {}, ...names.map(([name, className]) => make("th", { scope: "col", className: className ?? "", textContent: name }))));

  function drawRegimeTable() {
    const all = files.map((_, file) => answers.filter((sequence) => sequence.file === file));
    const cells = (chosen, count, fill) => {
      const share = count / (sum(chosen.map((sequence) => sequence.records)) || 1);
      const bar = make("i");
      bar.style.width = `${share * 100}%`;
      if (count) bar.style.background = `var(--${fill})`;
      return [make("td", { className: "number", textContent: number.format(count) }), make("td", { className: "number", textContent: percent(share) }), make("td", { className: "share" }, bar)];
    };
    const rows = regimes.map((regime, place) => make("tr", {},
      make("th", { scope: "row" }, make("b", { className: `tinted ${regime.name}`, textContent: regime.name }), regime.meaning),
      ...all.flatMap((chosen) => cells(chosen, together(chosen)[place], regime.name))));
    rows.push(make("tr", {}, make("th", { scope: "row" }, make("b", { className: "forced HELV", textContent: "forced" }), "clarification"),
      ...all.flatMap((chosen) => cells(chosen, sum(chosen.map((sequence) => sequence.forced)), "HELV"))));
    const head = headings(["regime"], ...files.flatMap(() => [["tokens", "number"], ["share", "number"], [""]]));
    if (files.length > 1) {
      const names = files.map((name) => make("th", { scope: "colgroup", colSpan: 3 }, make("bdi", {}, ...visible(name))));
      head.prepend(make("tr", {}, make("td"), ...names));
    }
    byId("regimes").replaceChildren(head, make("tbody", {}, ...rows));
  }

  function drawUncertain() {
    const rows = report.uncertain.map(({ sequence, token, regime, entropy, varentropy, text, before, behind }) => {
      const shown = make("b", { className: `tinted ${regimes[regime].name}` }, make("bdi", {}, ...visible(text)));
      const link = make("a", { href: `#s${sequence + 1}t${token + 1}` }, before && make("bdi", {}, ...visible(before)), shown, behind && make("bdi", {}, ...visible(behind)));
      return make("tr", {}, make("td", { className: "number", textContent: shownNumber(entropy) }), make("td", { className: "number", textContent: shownNumber(varentropy) }),
        make("td", {}, make("b", { className: `tinted ${regimes[regime].name}`, textContent: regimes[regime].name })), make("td", { className: "context" }, link),
        make("td", { className: "title" }, make("bdi", {}, ...visible(nameOf(sequences[sequence])))));
    });
    if (!rows.length) rows.push(make("tr", {}, make("td", { colSpan: 5, textContent: "No token has an entropy above 0." })));
    byId("uncertain").replaceChildren(headings(["entropy, bits", "number"], ["varentropy, bits²", "number"], ["regime"], ["token"], ["sequence"]), make("tbody", {}, ...rows));
  }

  function drawHistograms() {
    const card = variable("--card");
    const colours = fileColours();
    byId("files").replaceChildren(...(files.length > 1 ? files.map((name, file) => {
      const key = make("span", { className: "key" });
      key.style.background = colours[file % colours.length];
      return make("span", {}, key, make("bdi", {}, ...visible(name)));
    }) : []));
    if (!report.histograms.length) byId("histograms").replaceChildren(make("p", { className: "empty", textContent: "Nothing was measured." }));
    // All are placed before any is drawn: a chart takes its width from the page.
    if (!byId("histograms").firstChild) {
      byId("histograms").append(...report.histograms.map(({ field, means }) => {
        const { name, unit } = metrics.find((metric) => metric.field === field);
        const heading = `${name[0].toUpperCase()}${name.slice(1)}, mean ${means.map(shownNumber).join(" and ")} ${unit}`;
        const chart = make("div", { id: `histogram-${field}`, className: "chart", role: "img", "aria-label": `Histogram. ${heading}` });
        return make("div", {}, make("h3", { textContent: heading }), chart);
      }));
    }
    for (const { field, top, counts } of report.histograms) {
      const { name, unit } = metrics.find((metric) => metric.field === field);
      const end = Math.sqrt(top);
      const width = end / counts[0].length;
      let least = 1;
      const traces = counts.map((file, at) => {
        const total = sum(file) || 1;
        const shares = file.map((count) => (count / total) * 100);
        least = Math.min(least, ...shares.filter((share) => share > 0));
        const tint = colours[at % colours.length];
        // Bars of several files would hide each other.
        const form = counts.length > 1
          ? { type: "scatter", mode: "lines", line: { color: tint, width: 2, shape: "hvh", dash: at ? "dash" : "solid" } }
          : { type: "bar", width, marker: { color: tint, line: { color: card, width: 0.5 } } };
        return {
          ...form, x: file.map((_, bin) => (bin + 0.5) * width), y: shares.map((share) => share || null), name: plain(files[at]),
          customdata: file.map((count, bin) => [shownNumber((bin * width) ** 2), shownNumber(((bin + 1) * width) ** 2), number.format(count), percent(count / total)]),
          hovertemplate: `%{customdata[0]} to %{customdata[1]} ${unit}: %{customdata[2]} tokens, %{customdata[3]}<extra></extra>`,
        };
      });
      const borders = [...new Set(report.borders.flatMap((parts) => Object.values(parts)).flatMap((part) => Object.entries(part)).filter(([border]) => border.startsWith(`${field}_`)).map(([, value]) => value))];
      const ticks = TICKS.root.filter((value) => value <= top).filter((value, i, all) => i === 0 || Math.sqrt(value) - Math.sqrt(all[i - 1]) > end * 0.07);
      const powers = [-5, -4, -3, -2, -1, 0, 1, 2].filter((power) => power >= Math.floor(Math.log10(least)));
      const chart = byId(`histogram-${field}`);
      const [pane] = panes;
      const layout = {
        ...pane.layout(230), dragmode: false, bargap: 0, margin: { l: 52, r: 10, t: 8, b: 40 },
        shapes: borders.filter((value) => value <= top).map((value) => ({ type: "line", xref: "x", yref: "paper", x0: Math.sqrt(value), x1: Math.sqrt(value), y0: 0, y1: 1, line: { color: variable("--soft"), width: 1, dash: "dot" } })),
        xaxis: { ...pane.axis(), title: { text: `${name}, ${unit}`, standoff: 8 }, range: [0, end], tickvals: ticks.map(Math.sqrt), ticktext: ticks.map(String), fixedrange: true },
        yaxis: { ...pane.axis(), type: "log", range: [Math.log10(least) - 0.3, 2.1], tickvals: powers.map((power) => 10 ** power), ticktext: powers.map((power) => `${10 ** power} %`), fixedrange: true },
      };
      chart.style.height = `${layout.height}px`;
      Plotly.react(chart, traces, layout, { displayModeBar: false, responsive: true });
    }
  }

  /** Show what the address names: #all, #one, or a token of a sequence as #s2t34. Anything else is left to the browser. */
  async function route() {
    const found = /^#s(\d+)(?:t(\d+))?$/.exec(location.hash);
    const place = found ? Number(found[1]) - 1 : -1;
    if (location.hash === "#all") state.view = "all";
    else if (location.hash === "#one" || sequences[place]) state.view = "one";
    for (const view of ["one", "all"]) {
      byId(`view-${view}`).hidden = view !== state.view;
      const link = document.querySelector(`.views a[href="#${view}"]`);
      if (view === state.view) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    hideDetails();
    if (state.view === "all" && !byId("regimes").firstChild) { drawRegimeTable(); drawUncertain(); }
    if (sequences[place]) { state.first = place; markChosen(); await update(); }
    else if (panes.length) drawCharts();
    if (found?.[2] && panes[0]?.sequence === sequences[place]) panes[0].goTo(Math.max(0, Math.min(Number(found[2]), sequences[place].tokens) - 1));
  }

  // --- the list ------------------------------------------------------------------------------------------------------

  const list = byId("sequences");
  let listed = [];
  const blank = make("li", { role: "option" }, make("div", { className: "name" }, make("bdi"), make("span")), make("bdi", { className: "snippet" }), make("div", { className: "bar", role: "img" }));
  const made = new Map(); // a sequence's entry in the list
  let chosen = null; // of these

  /** Thousands of these are made before anything is seen: copies of one, filled in. */
  function itemOf(place) {
    let item = made.get(place);
    if (item) return item;
    const sequence = sequences[place];
    item = blank.cloneNode(true);
    item.id = `sequence-${place}`;
    const [head, snippet, bar] = item.children;
    head.firstChild.append(...visible(nameOf(sequence)));
    head.lastChild.textContent = number.format(sequence.tokens);
    snippet.append(...visible(plain(sequence.snippet)));
    shareBar(bar, sequence.counts);
    made.set(place, item);
    return item;
  }

  function drawList() {
    const wanted = byId("filter").value.toLowerCase();
    const order = byId("order").value;
    listed = sequences.map((_, place) => place).filter((place) => !sequences[place].lost && `${nameOf(sequences[place])} ${sequences[place].snippet} ${sequences[place].id}`.toLowerCase().includes(wanted));
    const sortedBy = (place) => sequences[place][order] ?? sequences[place].scores[order] ?? -Infinity;
    if (order !== "file") listed.sort((a, b) => sortedBy(b) - sortedBy(a) || 0);
    const items = [];
    let file = -1;
    for (const place of listed) {
      const sequence = sequences[place];
      if (files.length > 1 && order === "file" && sequence.file !== file) {
        file = sequence.file;
        items.push(make("li", { className: "file", role: "presentation" }, make("bdi", {}, ...visible(`${file + 1} · ${files[file]}`))));
      }
      items.push(itemOf(place));
    }
    if (!listed.length) items.push(make("li", { className: "empty", textContent: "No sequence matches." }));
    list.replaceChildren(...items);
    markChosen();
  }

  function markChosen() {
    chosen?.removeAttribute("aria-selected");
    chosen = made.get(state.first);
    const item = listed.includes(state.first) ? chosen : null;
    if (!item) { list.removeAttribute("aria-activedescendant"); return; }
    item.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", item.id);
    requestAnimationFrame(() => { // with the frame's own layout, not one before it
      const [box, frame] = [item.getBoundingClientRect(), list.getBoundingClientRect()];
      if (box.top < frame.top + 30) list.scrollTop -= frame.top + 30 - box.top;
      else if (box.bottom > frame.bottom) list.scrollTop += box.bottom - frame.bottom;
    });
  }

  function choose(place) {
    if (place === state.first) return;
    state.first = place;
    markChosen();
    update();
  }

  list.onclick = (event) => {
    const item = event.target.closest("[role=option]");
    if (item) choose(Number(item.id.slice("sequence-".length)));
  };
  list.onkeydown = (event) => {
    const at = listed.indexOf(state.first);
    const target = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: listed.length - 1, PageDown: at + 10, PageUp: at - 10 }[event.key];
    if (target === undefined || !listed.length) return;
    event.preventDefault();
    choose(listed[Math.max(0, Math.min(target, listed.length - 1))]);
  };
  const told = report.scores.filter(({ field }) => sequences.some(({ scores }) => field in scores));
  byId("order").append(make("optgroup", { label: "highest first" }, ...told.map(({ field, name }) => make("option", { value: field, textContent: name }))));
  byId("filter").oninput = drawList;
  byId("order").onchange = drawList;
  byId("compare").onchange = (event) => { state.compare = event.target.value; update(); };
  for (const input of document.querySelectorAll("input[name=tint]")) {
    input.onchange = () => {
      state.tint = input.value;
      for (const pane of panes) pane.text.className = `text by-${state.tint}`;
      drawLegend();
    };
  }
  for (const input of document.querySelectorAll("input[name=scale]")) {
    input.onchange = () => { state.scale = input.value; for (const pane of panes) { pane.drawPlane(); pane.marked = undefined; } };
  }
  dark.addEventListener("change", drawCharts);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideDetails(); });

  const tokens = sum(answers.map((sequence) => sequence.tokens));
  const lost = sequences.length - answers.length;
  const counted = (count, one, many) => `${number.format(count)} ${count === 1 ? one : many}`;
  byId("summary").replaceChildren(...visible(`${files.join(" · ")} — ${counted(answers.length, "sequence", "sequences")}, ${counted(tokens, "token", "tokens")}${lost ? `, ${counted(lost, "branch", "branches")} beside them` : ""}`));
  const leftOut = files.flatMap((name, file) => report.leftOut[file] ? [`${counted(report.leftOut[file], "line", "lines")} of ${name}`] : []);
  if (leftOut.length) byId("left-out").replaceChildren(...visible(`Left out, because they aren't traces: ${leftOut.join(", ")}.`));
  byId("left-out").hidden = !leftOut.length;
  shareBar(byId("all-shares"), together(answers));
  tokensOf(state.first); // unpacked while the list is made
  drawList();
  addEventListener("hashchange", route);
  route();
  if (!turn) update();
})();
