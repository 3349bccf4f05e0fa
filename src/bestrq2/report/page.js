"use strict";
(() => {
  const tip = document.getElementById("tip");

  /**
   * Shows `content` (text or an element) beside the point (x, y) of the window, inside the window. Screen readers read
   * it aloud unless `silent`, for elements that tell their value themselves.
   */
  function showTip(content, x, y, silent = false) {
    tip.setAttribute("aria-live", silent ? "off" : "polite");
    tip.replaceChildren(content);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = x + 14 + box.width > width - 8 ? x - 14 - box.width : x + 14;
    const top = y + 14 + box.height > window.innerHeight - 8 ? y - 14 - box.height : y + 14;
    tip.style.transform = `translate(${Math.max(8, Math.min(left, width - box.width - 8))}px, ${Math.max(8, top)}px)`;
  }
  function hideTip() { tip.hidden = true; }

  /** Plays a sound; a pause before it began is no error. */
  function start(audio) { Promise.resolve(audio.play()).catch(() => {}); }

  // Anything with data-tip: point at it, tap it or focus it.
  for (const kind of ["pointermove", "pointerdown"]) {
    document.addEventListener(kind, (event) => {
      const owner = event.target.closest && event.target.closest("[data-tip]");
      if (owner) showTip(owner.dataset.tip, event.clientX, event.clientY);
      else if (!event.target.closest || !event.target.closest(".curve .area")) hideTip();
    });
  }
  document.addEventListener("focusin", (event) => {
    const owner = event.target.closest("[data-tip]");
    if (!owner || !owner.matches(":focus-visible")) return;
    const box = owner.getBoundingClientRect();
    showTip(owner.dataset.tip, box.left + box.width / 2, box.bottom);
  });
  document.addEventListener("focusout", hideTip);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  window.addEventListener("scroll", hideTip, { passive: true });

  // Curves: the values nearest to the pointer, or at the place of a slider that arrow keys move.
  const narrow = "\u202f";
  function valueText(value, unit) {
    if (unit === "percent") return (100 * value).toFixed(1) + narrow + "%";
    if (unit === "count") return value.toLocaleString("en", { maximumFractionDigits: 1 });
    const size = Math.abs(value);
    if (size > 0 && size < 0.001) return value.toExponential(2).replace(/-/g, "−");
    const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : size >= 0.1 || size === 0 ? 3 : 5;
    return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");
  }
  function nearest(places, place) {
    let low = 0, high = places.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (places[middle] <= place) low = middle; else high = middle;
    }
    return Math.abs(places[low] - place) <= Math.abs(places[high] - place) ? low : high;
  }
  for (const area of document.querySelectorAll(".curve .area")) {
    const data = JSON.parse(area.querySelector("script").textContent);
    const cursor = area.querySelector(".cursor");
    const places = [...new Set(data.series.flatMap((series) => series.x))].sort((a, b) => a - b);
    let current = null;
    function atPlace(place) {
      const title = data.pointer.replace("{}", place.toLocaleString("en", { maximumFractionDigits: 2 }));
      const readings = data.series.map((series) => {
        if (place < series.x[0] || place > series.x[series.x.length - 1]) return "–";
        const index = nearest(series.x, place), text = (values) => valueText(values[index], data.unit);
        const range = series.low && series.low[index] < series.high[index];
        return text(series.y) + (range ? ` (${text(series.low)} to ${text(series.high)})` : "");
      });
      area.setAttribute("aria-valuenow", place);
      area.setAttribute("aria-valuetext", [title, ...data.series.map((one, i) => `${one.label} ${readings[i]}`)].join("; "));
      return [title, readings];
    }
    area.setAttribute("role", "slider");
    area.setAttribute("aria-valuemin", data.low);
    area.setAttribute("aria-valuemax", data.high);
    area.tabIndex = 0;
    atPlace(places[places.length - 1]);
    function read(place, y) {
      current = place;
      const [title, readings] = atPlace(place);
      const share = (place - data.low) / (data.high - data.low);
      const box = area.getBoundingClientRect();
      cursor.hidden = false;
      cursor.style.left = `${100 * share}%`;
      const table = document.createElement("table");
      const head = table.insertRow().insertCell();
      head.textContent = title;
      head.colSpan = 2;
      data.series.forEach((series, index) => {
        const row = table.insertRow();
        const stroke = document.createElement("i");
        stroke.className = series.dashed ? "stroke dashed" : "stroke";
        stroke.style.borderColor = series.colour;
        row.insertCell().append(stroke, series.label);
        row.insertCell().textContent = readings[index];
      });
      showTip(table, box.left + share * box.width, y, true);
    }
    function point(event) {
      const box = area.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      read(places[nearest(places, data.low + share * (data.high - data.low))], event.clientY);
    }
    function leave() { cursor.hidden = true; current = null; hideTip(); }
    area.addEventListener("pointermove", point);
    area.addEventListener("pointerdown", point);
    area.addEventListener("pointerleave", leave);
    area.addEventListener("blur", leave);
    area.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, Home: -Infinity, End: Infinity }[event.key];
      if (!move) return;
      event.preventDefault();
      const stride = Math.max(1, Math.round(places.length / 40));
      const from = current === null ? (move > 0 ? -stride : places.length) : nearest(places, current);
      const next = Math.min(places.length - 1, Math.max(0, from + move * stride));
      read(places[next], area.getBoundingClientRect().top + 20);
    });
  }

  // Map: colour and shape by domain, task, or the labels of one task.
  const SHAPES = [
    "M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0-11 0",
    "M-4.8-4.8h9.6v9.6h-9.6z",
    "M0-6.2L5.8 4.6h-11.6z",
    "M0-6.8L5.4 0L0 6.8L-5.4 0z",
    "M-1.9-6h3.8v4.1h4.1v3.8h-4.1v4.1h-3.8v-4.1h-4.1v-3.8h4.1z",
  ];
  const COLOURS = 8;
  const mapData = document.getElementById("map-data");
  if (mapData) drawMap(JSON.parse(mapData.textContent));

  function drawMap({ points, colours, sounds }) {
    const marks = [...document.querySelectorAll("#map .point")];
    const choice = document.getElementById("map-colour");
    const legend = document.getElementById("map-legend");
    for (const part of document.querySelectorAll("#map .needs-js")) part.hidden = false;
    choice.closest("label").hidden = choice.options.length < 2;
    choice.addEventListener("change", recolour);
    if (legend) {
      recolour();
      legend.setAttribute("role", "toolbar");
      legend.setAttribute("aria-orientation", "vertical");
      legend.setAttribute("aria-label", "Groups, to show one alone");
      // One tab stop for all groups: arrow keys go on from there.
      legend.addEventListener("keydown", (event) => {
        const sibling = { ArrowUp: "previousElementSibling", ArrowDown: "nextElementSibling" }[event.key];
        if (!sibling) return;
        event.preventDefault();
        const next = document.activeElement[sibling];
        if (!next) return;
        document.activeElement.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    }
    hearMap(points, sounds, marks);

    function groupOf(option) {
      if (option.value === "domain") return (point) => point.domain;
      if (option.value === "task") return (point) => `${point.domain} · ${point.task.replace(`${point.domain}/`, "")}`;
      const { domain, task } = option.dataset;
      return (point) => (point.domain === domain && point.task === task ? point.label : null);
    }
    function recolour() {
      const option = choice.selectedOptions[0];
      const groups = points.map(groupOf(option));
      const names = [...new Set(groups.filter((name) => name !== null))];
      if (option.value === "label") names.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
      const look = new Map(names.map((name, index) => [name, {
        fill: option.value === "domain" ? colours[name] : `var(--c${index % COLOURS})`,
        shape: SHAPES[(option.value === "domain" ? index : Math.floor(index / COLOURS)) % SHAPES.length],
      }]));
      marks.forEach((mark, index) => {
        const seen = look.get(groups[index]);
        mark.style.fill = seen ? seen.fill : "var(--muted)";
        mark.setAttribute("d", seen ? seen.shape : SHAPES[0]);
        mark.classList.toggle("off", !seen);
      });
      legend.replaceChildren(...names.map((name) => legendButton(name, look.get(name), groups)));
      legend.firstElementChild.tabIndex = 0;
    }
    function legendButton(name, look, groups) {
      const button = document.createElement("button");
      button.type = "button";
      button.tabIndex = -1;
      button.setAttribute("aria-pressed", "false");
      const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      picture.setAttribute("viewBox", "-8 -8 16 16");
      const shape = document.createElementNS("http://www.w3.org/2000/svg", "path");
      shape.setAttribute("d", look.shape);
      shape.style.fill = look.fill;
      picture.append(shape);
      const count = document.createElement("small");
      count.textContent = groups.filter((group) => group === name).length;
      button.append(picture, name, count);
      button.addEventListener("click", () => {
        const alone = button.getAttribute("aria-pressed") !== "true";
        for (const other of legend.children) other.setAttribute("aria-pressed", "false");
        button.setAttribute("aria-pressed", String(alone));
        marks.forEach((mark, index) => mark.classList.toggle("off", alone ? groups[index] !== name : groups[index] === null));
      });
      return button;
    }
  }

  /** A list of points: arrow keys go to the next one in their direction, Enter and clicks play. */
  function hearMap(points, sounds, marks) {
    const list = document.querySelector("#map svg"), audio = document.querySelector("#map audio");
    const now = document.querySelector("#map .playing-now");
    list.setAttribute("role", "listbox");
    list.tabIndex = 0;
    let current = -1;
    marks.forEach((mark, index) => {
      mark.id = `point-${index}`;
      mark.setAttribute("role", "option");
      mark.setAttribute("aria-selected", "false");
      mark.setAttribute("aria-label", mark.dataset.tip.trim().replace("\n", ", "));
    });
    const seen = () => points.map((_, index) => index).filter((index) => !marks[index].classList.contains("off"));

    function choose(index) {
      if (index === undefined) return;
      if (current >= 0) marks[current].setAttribute("aria-selected", "false");
      current = index;
      const mark = marks[index], box = mark.getBoundingClientRect();
      mark.setAttribute("aria-selected", "true");
      list.setAttribute("aria-activedescendant", mark.id);
      mark.parentNode.append(mark);  // above its neighbours
      showTip(mark.dataset.tip, box.right, box.bottom, true);
    }
    /** The nearest point within 45° of a direction; those farther off it count as farther away. */
    function neighbour([right, down]) {
      const from = points[current];
      let best, least = Infinity;
      for (const index of seen()) {
        const x = points[index].x - from.x, y = points[index].y - from.y;
        const along = x * right + y * down, across = Math.abs(x * down) + Math.abs(y * right);
        if (index !== current && along > 0 && across <= along && along + 2 * across < least) {
          least = along + 2 * across;
          best = index;
        }
      }
      return best;
    }
    function play(index) {
      const { sound } = points[index];
      if (sound < 0) return;
      const again = audio.dataset.point === String(index);
      if (again && !audio.paused) { audio.pause(); return; }
      if (!again) audio.src = sounds[sound] || document.getElementById(`sound-${sound}`).src;
      audio.dataset.point = index;
      now.hidden = false;
      now.textContent = `♪ ${marks[index].getAttribute("aria-label")}`;
      start(audio);
    }
    audio.addEventListener("play", () => marks[audio.dataset.point].classList.add("playing"));
    for (const end of ["pause", "ended", "emptied"]) {
      audio.addEventListener(end, () => { for (const mark of marks) mark.classList.remove("playing"); });
    }
    list.addEventListener("focus", () => { if (current < 0 && list.matches(":focus-visible")) choose(seen()[0]); });
    list.addEventListener("click", (event) => {
      const box = list.getBoundingClientRect(), scale = list.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      const far = (index) => Math.hypot(points[index].x - x, points[index].y - y);
      const nearest = seen().reduce((best, index) => (far(index) < far(best) ? index : best));
      if (far(nearest) > 12 * Math.max(1, scale)) return;
      choose(nearest);
      play(nearest);
    });
    list.addEventListener("keydown", (event) => {
      const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      const shown = seen(), end = { Home: shown[0], End: shown[shown.length - 1] }[event.key];
      if (direction || end !== undefined) choose(direction && current >= 0 ? neighbour(direction) : end ?? shown[0]);
      else if ((event.key === "Enter" || event.key === " ") && current >= 0) play(current);
      else return;
      event.preventDefault();
    });
  }

  // Players: one sounds at a time; the outline shows where it is and can be clicked.
  document.addEventListener("play", (event) => {
    for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
  }, true);
  for (const player of document.querySelectorAll(".player")) {
    const audio = player.querySelector("audio"), button = player.querySelector("button");
    const outline = player.querySelector(".outline"), line = outline.querySelector("i");
    if (audio.dataset.sound) audio.src = document.getElementById(audio.dataset.sound).src;
    audio.hidden = true;
    button.hidden = false;
    const name = button.getAttribute("aria-label"), sign = button.firstElementChild;
    button.addEventListener("click", () => (audio.paused ? start(audio) : audio.pause()));
    outline.addEventListener("click", (event) => {
      const box = outline.getBoundingClientRect();
      const seek = () => { audio.currentTime = (audio.duration || 0) * (event.clientX - box.left) / box.width; };
      if (audio.readyState) seek(); else audio.addEventListener("loadedmetadata", seek, { once: true });
      start(audio);
    });
    function follow() {
      line.style.left = `${100 * audio.currentTime / (audio.duration || 1)}%`;
      if (!audio.paused) requestAnimationFrame(follow);
    }
    audio.addEventListener("play", () => {
      player.classList.add("playing");
      sign.textContent = "❚❚";
      button.setAttribute("aria-label", name.replace("Play", "Pause"));
      follow();
    });
    for (const end of ["pause", "ended"]) {
      audio.addEventListener(end, () => {
        player.classList.remove("playing");
        sign.textContent = "▶";
        button.setAttribute("aria-label", name);
      });
    }
  }
  // A printed page shows what is folded away, but for the grids of codes, which are too wide for paper.
  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = !part.querySelector(".codes");
  });
})();
