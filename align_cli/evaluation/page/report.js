"use strict";
(() => {
  const PER_PAGE = 24, SMALL = 128, NONE = "\u2013", MINUS = "\u2212";
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const base = data.arms.indexOf(data.baseline);
  const state = { metric: 0, arm: Math.max(0, data.arms.findIndex((name) => name !== data.baseline)), order: "file", group: "", words: [], page: 0 };
  let view = [];
  document.documentElement.classList.add("scripted");

  /** An element with attributes and children; texts become text nodes, never markup. */
  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key in element && typeof value !== "string") element[key] = value;
      else element.setAttribute(key, value);
    }
    element.append(...children.flat().filter((child) => child !== null));
    return element;
  }

  function number(value, metric, sign = false) {
    if (value === null) return NONE;
    const text = Math.abs(value).toLocaleString("en-US", { minimumFractionDigits: data.decimals[metric], maximumFractionDigits: data.decimals[metric] });
    return (value < 0 ? MINUS : sign && value > 0 ? "+" : "") + text;
  }

  const score = (item, arm, metric) => (item.scores[metric] ? item.scores[metric][arm] : null);
  function gain(item, arm, metric) {
    const after = score(item, arm, metric), before = base < 0 ? null : score(item, base, metric);
    return arm === base || after === null || before === null ? null : after - before;
  }
  function change(value) {
    return value === null || value === 0 ? "" : value > 0 ? "gain" : "loss";
  }

  // Order, filter, page

  const ORDERS = {
    file: ["prompt order", null],
    gain: ["largest gain first", (item) => gain(item, state.arm, state.metric), -1],
    loss: ["largest loss first", (item) => gain(item, state.arm, state.metric), 1],
    high: ["highest score first", (item) => score(item, state.arm, state.metric), -1],
    low: ["lowest score first", (item) => score(item, state.arm, state.metric), 1],
  };

  function select() {
    const [key, value] = state.group ? JSON.parse(state.group) : [];
    const found = [];
    for (const [i, item] of data.items.entries()) {
      if (key !== undefined && item.groups[key] !== value) continue;
      if (state.words.length) {
        item.text ??= `${item.id} ${item.prompt}`.toLowerCase();
        if (!state.words.every((word) => item.text.includes(word))) continue;
      }
      found.push(i);
    }
    const [, rank, direction] = ORDERS[state.order];
    if (!rank) return found;
    const values = new Map(found.map((i) => [i, rank(data.items[i])]));
    return found.sort((a, b) => {
      const x = values.get(a), y = values.get(b);
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return direction * (x - y) || a - b;
    });
  }

  function update(page = 0) {
    view = select();
    show(page);
  }

  function show(page) {
    const pages = Math.max(1, Math.ceil(view.length / PER_PAGE));
    state.page = Math.min(pages - 1, Math.max(0, page));
    const start = state.page * PER_PAGE, part = view.slice(start, start + PER_PAGE);
    $("grid").replaceChildren(...part.map((i, place) => make("li", {}, card(i, start + place))));
    const first = $("grid").querySelector(".open");
    if (first) first.tabIndex = 0;
    const sorted = state.order === "file" ? "in prompt order" : `${ORDERS[state.order][0]}: ${data.metrics[state.metric]}, ${data.arms[state.arm]}`;
    $("status").textContent = view.length ? `${(start + 1).toLocaleString("en-US")} to ${(start + part.length).toLocaleString("en-US")} of ${view.length.toLocaleString("en-US")}, ${sorted}` : "Nothing matches.";
    $("page").textContent = `page ${state.page + 1} of ${pages}`;
    $("previous").disabled = state.page === 0;
    $("next").disabled = state.page === pages - 1;
  }

  // Pictures

  /** The pictures of an item, one per arm: text until somebody looks. null: not in this file. */
  function pictures(i) {
    const block = $(`pictures-${i}`);
    return block && block.textContent.split("\n");
  }

  function shots(i) {
    const item = data.items[i], held = pictures(i);
    return make("div", { class: "shots" }, data.arms.map((arm, a) => {
      const metric = state.metric, delta = gain(item, a, metric);
      let picture;
      if (held && held[a]) {
        picture = make("img", { alt: `${arm}, item ${item.id}`, decoding: "async", src: `data:${data.type};base64,${held[a]}` });
        picture.addEventListener("load", () => picture.classList.toggle("pixels", Math.max(picture.naturalWidth, picture.naturalHeight) <= SMALL));
      } else {
        picture = make("div", { class: "missing" }, held || !item.files[a] ? "missing" : `not in this file: ${item.files[a]}`);
      }
      const numbers = make("span", { class: "num" }, number(score(item, a, metric), metric));
      if (delta !== null) numbers.append(" ", make("span", { class: change(delta) }, `(${number(delta, metric, true)})`));
      return make("figure", {}, picture, make("figcaption", {}, make("span", {}, arm), numbers));
    }));
  }

  function meta(item) {
    return [item.id, data.several ? `picture ${item.k + 1}` : null, ...Object.values(item.groups), item.seed === null ? null : `seed ${item.seed}`].filter(Boolean).join(" \u00b7 ");
  }

  function card(i, place) {
    const item = data.items[i];
    const open = make("button", { type: "button", class: "open", tabIndex: -1, "data-item": String(i), title: item.prompt.length > 400 ? "" : item.prompt }, make("span", { class: "clamp" }, item.prompt || "(empty prompt)"));
    open.addEventListener("click", () => look(place));
    return make("article", { class: "card" }, make("h3", {}, open), shots(i), make("p", { class: "meta" }, meta(item)));
  }

  // One item, large

  function look(place) {
    const i = view[place], item = data.items[i], viewer = $("viewer");
    const rows = data.metrics.map((name, m) => make("tr", {},
      make("th", { scope: "row" }, name, data.trained.some((arm) => arm[m]) ? make("span", { class: "mark" }, "trained on") : ""),
      data.arms.map((_, a) => {
        const delta = gain(item, a, m), cell = make("td", { class: "num" }, number(score(item, a, m), m));
        if (delta !== null) cell.append(" ", make("span", { class: change(delta) }, `(${number(delta, m, true)})`));
        return cell;
      })));
    const head = make("tr", {}, make("th", { scope: "col" }, "Scorer"), data.arms.map((arm) => make("th", { scope: "col", class: "num" }, arm)));
    const button = (text, id, to) => {
      const made = make("button", { type: "button", id, disabled: to === null ? false : to < 0 || to >= view.length }, text);
      made.addEventListener("click", () => (to === null ? viewer.close() : look(to)));
      return made;
    };
    const held = document.activeElement && document.activeElement.id;
    viewer.dataset.place = place;
    viewer.replaceChildren(
      make("div", { class: "bar" }, button("Previous", "viewer-previous", place - 1), button("Next", "viewer-next", place + 1), button("Close", "viewer-close", null)),
      make("h2", { id: "viewer-title", tabIndex: 0 }, item.prompt || "(empty prompt)"),
      shots(i),
      make("p", { class: "meta small" }, meta(item)),
      make("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Scores" }, make("table", {}, make("thead", {}, head), make("tbody", {}, rows))),
      make("p", { class: "small" }, `Files: ${item.files.map((file) => file ?? NONE).join(", ")}`));
    if (!viewer.open) viewer.showModal();
    const next = held && held.startsWith("viewer-") && !$(held)?.disabled ? $(held) : null;
    (next ?? $("viewer-close")).focus();
  }

  $("viewer").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const to = Number($("viewer").dataset.place) + step;
    if (step && to >= 0 && to < view.length) { event.preventDefault(); look(to); }
  });
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  $("viewer").addEventListener("close", () => {
    const place = Number($("viewer").dataset.place), page = Math.floor(place / PER_PAGE);
    if (page !== state.page) show(page);
    focusCard(place - page * PER_PAGE);
  });

  // Keys in the grid: one card at a time is in the tab order

  const cards = () => [...$("grid").querySelectorAll(".open")];
  function focusCard(place) {
    const all = cards(), card = all[Math.min(all.length - 1, Math.max(0, place))];
    if (!card) return;
    for (const other of all) other.tabIndex = other === card ? 0 : -1;
    card.focus();
  }
  function turn(pages, place) {
    const before = state.page;
    show(before + pages);
    if (state.page !== before) focusCard(place);
  }

  $("grid").addEventListener("keydown", (event) => {
    const all = cards(), here = all.indexOf(document.activeElement);
    if (here < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const top = (card) => card.closest("li").offsetTop;
    const columns = Math.max(1, all.filter((card) => top(card) === top(all[0])).length);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (step) {
      const to = here + step;
      if (to >= 0 && to < all.length) focusCard(to);
      else if (to >= all.length && state.page < Math.ceil(view.length / PER_PAGE) - 1) turn(1, 0);
      else if (to < 0 && state.page > 0) turn(-1, PER_PAGE - 1);
      else return;
    } else if (event.key === "Home") focusCard(0);
    else if (event.key === "End") focusCard(all.length - 1);
    else if (event.key === "PageDown") turn(1, 0);
    else if (event.key === "PageUp") turn(-1, 0);
    else return;
    event.preventDefault();
  });

  // Controls

  function fill(id, entries, change) {
    const box = $(id);
    if (!box) return;
    box.replaceChildren(...entries.map(([value, text]) => make("option", { value: String(value) }, text)));
    box.addEventListener("change", () => { change(box.value); update(); });
  }

  const groups = new Map();
  for (const item of data.items) {
    for (const [key, value] of Object.entries(item.groups)) groups.set(JSON.stringify([key, value]), `${key}: ${value}`);
  }
  const paired = base >= 0 && data.arms.length > 1;
  fill("metric", data.metrics.map((name, m) => [m, data.trained.some((arm) => arm[m]) ? `${name} (trained on)` : name]), (value) => { state.metric = Number(value); });
  fill("arm", data.arms.map((name, a) => [a, name]).filter(([a]) => !paired || a !== base), (value) => { state.arm = Number(value); });
  fill("order", Object.entries(ORDERS).filter(([key]) => paired || !["gain", "loss"].includes(key)).map(([key, [text]]) => [key, text]), (value) => { state.order = value; });
  fill("group", [["", "all"], ...groups], (value) => { state.group = value; });
  if ($("arm")) $("arm").value = String(state.arm);
  let waiting;
  $("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean); update(); }, 120);
  });
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  $("previous").addEventListener("click", () => show(state.page - 1));
  $("next").addEventListener("click", () => show(state.page + 1));
  $("grid").style.setProperty("--columns", String(Math.min(data.arms.length, 4)));
  $("grid").style.setProperty("--narrow", String(Math.min(data.arms.length, 2)));
  $("viewer").style.setProperty("--columns", String(data.arms.length));
  $("grid").style.setProperty("--card", `${Math.max(17, 9.5 * Math.min(data.arms.length, 4))}rem`);
  update();

  // Charts: one scorer at a time

  const charts = [...document.querySelectorAll(".chart")], pick = $("chart-metric");
  function chart() { for (const figure of charts) figure.hidden = figure.dataset.metric !== pick.value; }
  if (pick) { pick.addEventListener("change", chart); chart(); }

  // Light and dark: as the system says, until somebody says otherwise

  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)"), KEY = "t2ialign-theme";
  const stored = (value) => {
    try { return value === undefined ? localStorage.getItem(KEY) : localStorage.setItem(KEY, value); } catch { return null; }
  };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  function theme() {
    $("theme").textContent = isDark() ? "Light" : "Dark";
    $("theme").setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  }
  if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
  $("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(root.dataset.theme);
    theme();
  });
  dark.addEventListener("change", theme);
  theme();

  // Copying, printing

  $("copy").addEventListener("click", async () => {
    const code = $($("copy").dataset.copies);
    getSelection().selectAllChildren(code);
    try {
      await navigator.clipboard.writeText(code.textContent);
      $("copy").textContent = "Copied";
    } catch {
      $("copy").textContent = "Selected";
    }
  });
  const folded = [];
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not([open])")) { part.open = true; folded.push(part); }
  });
  addEventListener("afterprint", () => { while (folded.length) folded.pop().open = false; });
})();
