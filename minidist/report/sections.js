// The sections of the page but the timeline. Each shows itself if the trace has something for it.

const PARTS = ["compute", "hidden", "exposed", "idle"];
const KINDS = ["forward", "backward", "recompute", "update"];

function shown(id) {
  const section = document.getElementById(id);
  section.hidden = false;
  return section;
}

function showFacts({ facts, notes, nanoseconds }) {
  const all = [...facts, ["length", inTime(nanoseconds)]];
  document
    .getElementById("facts")
    .append(...all.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  if (notes.length) shown("notes").append(...notes.map((note) => element("li", {}, note)));
}

/** A table of the main numbers. A cell's data-value is the trace's own number: nanoseconds, bytes, messages. */
function showNumbers({ numbers }) {
  const cell = (value, words, small) =>
    element("td", { "data-value": value }, words, small ? element("small", {}, small) : null);
  const hasMemory = numbers.some(({ memory }) => memory !== null);
  const titles = ["rank", "steps", "one step", ...PARTS, "sent", "messages", ...(hasMemory ? ["memory"] : [])];
  const row = (of, name, kind) =>
    element(
      "tr",
      { class: kind, "data-rank": of.rank },
      element("th", { scope: "row" }, name),
      cell(of.steps, of.steps ? inCount(of.steps) : "–"),
      cell(of.step, inTime(of.step), of.steps ? null : "whole run"),
      ...PARTS.map((part) => cell(of[part], inTime(of[part]), inShare(of.step ? of[part] / of.step : 0))),
      cell(of.bytes, inBytes(of.bytes)),
      cell(of.messages, inCount(of.messages)),
      hasMemory ? cell(of.memory ?? 0, of.memory === null ? "–" : inBytes(of.memory)) : null,
    );
  const rows = numbers.map((of) => row(of, `${of.rank}`, ""));
  // Ranks that train have steps of one kind; servers have none, and would spoil a mean.
  const train = numbers.filter(({ steps }) => steps > 0);
  if (train.length > 1) {
    const all = { rank: "all", steps: Math.max(...train.map(({ steps }) => steps)) };
    for (const name of ["step", ...PARTS]) all[name] = mean(train.map((of) => of[name]));
    for (const name of ["bytes", "messages"]) all[name] = sum(numbers.map((of) => of[name]));
    all.memory = hasMemory ? Math.max(...numbers.map(({ memory }) => memory ?? 0)) : null;
    rows.push(row(all, "all", "all"));
  }
  const section = shown("numbers");
  section.querySelector(".under").hidden = train.length < 2;
  section
    .querySelector(".scroll")
    .append(
      element(
        "table",
        {},
        element("thead", {}, element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title)))),
        element("tbody", {}, ...rows),
      ),
    );
}

function showCurves({ curves }) {
  const names = Object.keys(curves);
  if (!names.length) return;
  const host = shown("curves").querySelector(".grid");
  for (const name of names) {
    const [, xs, ys] = curves[name];
    const share = /accuracy/.test(name) && ys.every((y) => y <= 1);
    const low = share ? Math.max(0, Math.floor(Math.min(...ys) * 20 - 0.2) / 20) : undefined;
    lineChart(host, {
      name,
      xs,
      ys,
      xWords: "training step",
      yWords: share ? (y) => `${Number((100 * y).toFixed(2))} %` : (y) => three(y),
      range: share ? [low, Math.min(1, Math.ceil(Math.max(...ys) * 100) / 100)] : undefined,
    });
  }
}

function showBreakdown({ numbers, breakdown }) {
  const train = numbers.filter(({ steps }) => steps > 0);
  const rows = train.length ? train : numbers;
  const section = shown("breakdown");
  const entries = PARTS.map((part) => [part, part]);
  key(section.querySelector(".key"), entries);
  const most = Math.max(...numbers.filter(({ steps }) => steps || !train.length).map(({ step }) => step));
  for (const of of numbers) {
    const length = of.steps ? most : of.step; // a server's whole run has nothing to be compared with
    const words = PARTS.map((part) => `${part} ${inTime(of[part])}`).join(", ");
    barRow(section.querySelector(".bars"), {
      name: `rank ${of.rank}`,
      words: of.steps ? null : "whole run",
      pieces: PARTS.map((part) => ({ name: part, value: of[part], colour: part })),
      most: length || 1,
      amount: inTime(of.step),
      inWords: inTime,
      shares: true,
      label: `rank ${of.rank}: ${words}`,
    });
  }
  // Step by step, of the rank chosen.
  const choice = section.querySelector("select");
  const chart = section.querySelector(".chart");
  const having = rows.filter(({ steps }) => steps > 1).map(({ rank }) => rank);
  if (!having.length) {
    for (const each of [section.querySelector("h3"), choice.parentElement, chart]) each.hidden = true;
    return;
  }
  const count = Math.min(...having.map((rank) => breakdown[rank].step.length));
  if (having.length > 1) choice.append(element("option", { value: "mean" }, "all ranks, in the mean"));
  choice.append(...having.map((rank) => element("option", { value: rank }, `rank ${rank}`)));
  const show = () => {
    const ranks = choice.value === "mean" ? having : [Number(choice.value)];
    const steps = choice.value === "mean" ? count : breakdown[ranks[0]].step.length;
    const values = (part) =>
      Array.from({ length: steps }, (_, i) => mean(ranks.map((rank) => breakdown[rank][part][i])));
    const inner = element("div");
    chart.replaceChildren(inner);
    stackedColumns(inner, {
      xs: breakdown[ranks[0]].step.slice(0, steps),
      parts: PARTS.map((part) => ({ name: part, colour: part, values: values(part) })),
      xWords: "training step",
      yWords: inTime,
      label: "Length of each training step, and its parts",
    });
  };
  choice.addEventListener("change", show);
  show();
}

function showLabels({ labels }) {
  if (!labels.length) return;
  const host = shown("labels").querySelector(".bars");
  const most = Math.max(...labels.map(({ nanoseconds }) => Math.max(...nanoseconds)));
  for (const { label, words, nanoseconds } of labels) {
    const there = nanoseconds.filter((time) => time > 0);
    const value = mean(there);
    barRow(host, {
      name: label,
      words,
      pieces: [{ name: label, value, colour: "compute" }],
      most: most || 1,
      range: there.length > 1 ? [Math.min(...there), Math.max(...there)] : null,
      amount: inTime(value),
      inWords: () => "",
      label: `${label} ${words}: ${inTime(value)} in the mean over ${there.length} ranks`,
    });
  }
}

function showLayers({ layers }) {
  if (!layers.length) return;
  const section = shown("layers");
  const kinds = KINDS.filter((kind) => layers.some((layer) => layer.kinds[kind]));
  key(
    section.querySelector(".key"),
    kinds.map((kind) => [kind, kind]),
  );
  const total = ({ kinds: times }) => sum(Object.values(times));
  const bars = (host, rows) => {
    const most = Math.max(...rows.map(total));
    for (const row of rows) {
      const name = /^\d/.test(row.layer) ? `layer ${row.layer}` : row.layer || "outside of layers";
      barRow(host, {
        name,
        pieces: kinds.map((kind) => ({ name: kind, value: row.kinds[kind] ?? 0, colour: kind })),
        most,
        amount: inTime(total(row)),
        inWords: inTime,
        label: `${name}: ${kinds.map((kind) => `${kind} ${inTime(row.kinds[kind] ?? 0)}`).join(", ")}`,
      });
    }
  };
  // Of many, first the layers that they are parts of: block1 of block1.attention.
  const [whole, all] = section.querySelectorAll(".bars");
  const details = all.closest("details");
  const outer = new Map();
  for (const { layer, kinds: times } of layers) {
    const name = layer.split(".")[0];
    if (!outer.has(name)) outer.set(name, { layer: name, kinds: {} });
    const sums = outer.get(name).kinds;
    for (const [kind, time] of Object.entries(times)) sums[kind] = (sums[kind] ?? 0) + time;
  }
  details.hidden = layers.length <= 14 || outer.size === layers.length;
  bars(whole, details.hidden ? layers : [...outer.values()]);
  if (!details.hidden) {
    details.querySelector("summary").textContent = `All ${layers.length} layers`;
    bars(all, layers);
  }
}

function showTraffic({ traffic: { bytes, messages }, ranks }) {
  const most = Math.max(...bytes.flat());
  if (!most && !messages.flat().some(Boolean)) return;
  const many = ranks.length > 16;
  const cell = (from, to) => {
    const [nbytes, count] = [bytes[from][to], messages[from][to]];
    if (!count) return element("td", { class: "none", "data-value": 0 }, from === to || many ? "" : "–");
    const share = nbytes / most;
    const words = `rank ${from} to rank ${to}: ${inBytes(nbytes)} in ${inCount(count)} messages`;
    const inside = many ? [] : [inBytes(nbytes), element("small", {}, `${inCount(count)} msg.`)];
    const attributes = { "data-value": nbytes, class: share > 0.45 ? "strong" : "", style: { "--share": share } };
    return element("td", { ...attributes, title: words, "aria-label": words }, ...inside);
  };
  const total = (from) => element("td", { class: "sum" }, inBytes(sum(bytes[from])));
  const head = ["from \\ to", ...ranks, ...(many ? [] : ["in all"])];
  shown("traffic")
    .querySelector(".scroll")
    .append(
      element(
        "table",
        { class: many ? "matrix many" : "matrix" },
        element("thead", {}, element("tr", {}, ...head.map((title) => element("th", { scope: "col" }, `${title}`)))),
        element(
          "tbody",
          {},
          ...ranks.map((from) =>
            element(
              "tr",
              {},
              element("th", { scope: "row" }, many ? `${from}` : `rank ${from}`),
              ...ranks.map((to) => cell(from, to)),
              many ? null : total(from),
            ),
          ),
        ),
      ),
    );
}

function showMemory({ memory, ranks }) {
  const kinds = Object.keys(memory).filter((kind) => kind !== "process");
  const process = memory.process;
  if (!kinds.length && !process) return;
  const section = shown("memory");
  const colours = ["forward", "backward", "update", "collective", "message", "recompute"];
  const colour = Object.fromEntries(kinds.map((kind, i) => [kind, colours[i % colours.length]]));
  key(
    section.querySelector(".key"),
    kinds.map((kind) => [kind, colour[kind]]),
  );
  if (process) colour.process = "recompute";
  const list = kinds.length ? kinds : ["process"];
  const total = (rank) => sum(list.map((kind) => memory[kind][rank]));
  const most = Math.max(...ranks.map(total)) || 1;
  for (const rank of ranks) {
    const words = list.map((kind) => `${kind} ${inBytes(memory[kind][rank])}`).join(", ");
    barRow(section.querySelector(".bars"), {
      name: `rank ${rank}`,
      words: process && kinds.length ? `whole process ${inBytes(process[rank])}` : null,
      pieces: list.map((kind) => ({ name: kind, value: memory[kind][rank], colour: colour[kind] })),
      most,
      amount: inBytes(total(rank)),
      inWords: inBytes,
      label: `rank ${rank}: ${words}`,
    });
  }
}

function showPipeline({ pipeline }) {
  if (!pipeline) return;
  const section = shown("pipeline");
  const { name, step, ranks, played, ideal, idle, ideal_idle: least, formula } = pipeline;
  const compared = `, ideally ${inShare(least)} would have, and by the formula for equal stages ${inShare(formula)}`;
  section.querySelector(".lead").textContent =
    `${name}, training step ${step}, the one of median length. Of all ranks’ time ${inShare(idle)} passed ` +
    `without work${ideal ? compared : ""}.`;
  const colour = { Forward: "forward", Backward: "backward", BackwardInput: "backward", BackwardWeight: "update" };
  const letter = { Forward: "f", Backward: "B", BackwardInput: "B", BackwardWeight: "W" };
  const splits = played.flat().some(([kind]) => kind === "BackwardWeight");
  key(section.querySelector(".key"), [
    ["forward of a microbatch", "forward"],
    [splits ? "backward: the input’s part" : "backward", "backward"],
    ...(splits ? [["backward: the weights’ part", "update"]] : []),
  ]);
  const chunks = played.flat().some(([, , chunk]) => chunk > 0);
  const end = (rows) => Math.max(...rows.flat().map(([, , , start, length]) => start + length));
  const most = Math.max(end(played), ideal ? end(ideal) : 0);
  const picture = (rows, words) => (width) => {
    const [left, height, row] = [58, rows.length * 30 + 34, 30];
    const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words });
    const toX = (time) => left + (time / most) * (width - left - 24);
    for (const value of ticks(0, most, width / 120)) {
      svg.append(
        drawn("line", { class: "rule", x1: toX(value), x2: toX(value), y1: 0, y2: rows.length * row }),
        drawn("text", { x: toX(value), y: height - 14, "text-anchor": "middle" }, inTime(value)),
      );
    }
    rows.forEach((actions, i) => {
      svg.append(drawn("text", { x: 0, y: i * row + 18 }, `rank ${ranks[i]}`));
      for (const [kind, micro, chunk, start, length] of actions) {
        const place = { x: toX(start), y: i * row + 2, width: Math.max(toX(start + length) - toX(start) - 1, 0.5) };
        const text = `${letter[kind]}${micro}${chunks ? String.fromCharCode(97 + chunk) : ""}`;
        svg.append(
          drawn(
            "g",
            {},
            drawn("title", {}, `${kind} of microbatch ${micro}${chunks ? `, chunk ${chunk}` : ""}: ${inTime(length)}`),
            drawn("rect", { ...place, height: row - 6, rx: 3, style: { fill: `var(--${colour[kind]})` } }),
            place.width > 7 * text.length + 4
              ? drawn(
                  "text",
                  { class: "inside", x: place.x + place.width / 2, y: i * row + 18, "text-anchor": "middle" },
                  text,
                )
              : "",
          ),
        );
      }
    });
    return svg;
  };
  const [first, second] = section.querySelectorAll(".chart");
  const share = (part) => `${inShare(part)} of the time without work`;
  responsive(first, picture(played, `The schedule as played, ${inTime(end(played))}, ${share(idle)}`));
  if (ideal) responsive(second, picture(ideal, `The ideal schedule, ${inTime(end(ideal))}, ${share(least)}`));
  else section.querySelectorAll("h3")[1].hidden = true;
}

function showStaleness({ staleness }) {
  if (!staleness.length) return;
  const all = sum(staleness.map(([, count]) => count));
  const average = sum(staleness.map(([late, count]) => late * count)) / all;
  const most = Math.max(...staleness.map(([late]) => late));
  const counts = new Map(staleness);
  const section = shown("staleness");
  section
    .querySelector(".lead")
    .append(` ${inCount(all)} updates, in the mean ${three(average)} late, at most ${most}.`);
  stackedColumns(section.querySelector(".chart"), {
    xs: Array.from({ length: most + 1 }, (_, late) => late),
    parts: [
      { name: "gradients", colour: "compute", values: Array.from({ length: most + 1 }, (_, i) => counts.get(i) ?? 0) },
    ],
    xWords: "updates late",
    yWords: inCount,
    label: `Histogram of staleness: ${inCount(all)} updates, in the mean ${three(average)} late`,
  });
}
