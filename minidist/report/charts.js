// Charts that know nothing of traces: lines, columns, and rows of bars.

/** Draw in `host` as wide as it is, and again whenever that changes. draw(width) -> an element. */
function responsive(host, draw) {
  let width = 0;
  const redraw = () => {
    const now = Math.floor(host.clientWidth);
    if (now > 0 && now !== width) {
      width = now;
      host.replaceChildren(draw(width));
    }
  };
  new ResizeObserver(redraw).observe(host);
  redraw();
}

/** Round numbers from low to high, about so many. */
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((times) => times * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step || 0); // no -0
  return found;
}

/** A frame with axes. Returns the svg, and functions from numbers to places in it. */
function frame({ width, height, x, y, xWords, yWords, label, left = 52, bottom = 40 }) {
  const right = 12;
  const top = 10;
  const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const toX = (value) => left + ((value - x[0]) / (x[1] - x[0] || 1)) * (width - left - right);
  const toY = (value) => height - bottom - ((value - y[0]) / (y[1] - y[0] || 1)) * (height - bottom - top);
  for (const value of ticks(y[0], y[1], 4)) {
    svg.append(
      drawn("line", { class: "rule", x1: left, x2: width - right, y1: toY(value), y2: toY(value) }),
      drawn("text", { x: left - 8, y: toY(value) + 4, "text-anchor": "end" }, yWords(value)),
    );
  }
  for (const value of ticks(x[0], x[1], width / 110)) {
    svg.append(drawn("text", { x: toX(value), y: height - bottom + 18, "text-anchor": "middle" }, inCount(value)));
  }
  svg.append(drawn("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, xWords));
  return { svg, toX, toY };
}

/** A line through points, and its value where one points at it. */
function lineChart(host, { name, xs, ys, xWords, yWords, range }) {
  const note = element("span", {}, ` ${yWords(ys.at(-1))} at the end`);
  const figure = element("figure", {}, element("figcaption", {}, name, note), element("div"));
  host.append(figure);
  const low = range?.[0] ?? Math.min(0, ...ys);
  const high = range?.[1] ?? ys.reduce((most, y) => Math.max(most, y), 0);
  responsive(figure.lastChild, (width) => {
    const label = `${name}: ${yWords(ys[0])} at first, ${yWords(ys.at(-1))} at the end, against ${xWords}s`;
    const x = [Math.min(xs[0], 0), xs.at(-1)];
    const { svg, toX, toY } = frame({ width, height: 230, x, y: [low, high], xWords, yWords, label });
    const points = thinned(xs, ys, width).map(([a, b]) => `${toX(a).toFixed(1)},${toY(b).toFixed(1)}`);
    svg.append(drawn("polyline", { class: "curve", points: points.join(" ") }));
    if (points.length < 60) {
      for (const point of points) {
        const [cx, cy] = point.split(",");
        svg.append(drawn("circle", { class: "dot", cx, cy, r: 2.8 }));
      }
    }
    const dot = drawn("circle", { class: "dot", r: 4, visibility: "hidden" });
    svg.append(dot);
    svg.addEventListener("pointermove", (event) => {
      const at = event.clientX - svg.getBoundingClientRect().left;
      let nearest = 0;
      xs.forEach((value, i) => {
        if (Math.abs(toX(value) - at) < Math.abs(toX(xs[nearest]) - at)) nearest = i;
      });
      decorate(dot, { cx: toX(xs[nearest]), cy: toY(ys[nearest]), visibility: "visible" });
      note.textContent = ` ${yWords(ys[nearest])} at ${xWords} ${inCount(xs[nearest])}`;
    });
    svg.addEventListener("pointerleave", () => {
      dot.setAttribute("visibility", "hidden");
      note.textContent = ` ${yWords(ys.at(-1))} at the end`;
    });
    return svg;
  });
}

/** No more points than can be told apart: of each stretch of them the least and the greatest. */
function thinned(xs, ys, width) {
  if (xs.length <= 2 * width) return xs.map((x, i) => [x, ys[i]]);
  const found = [];
  const size = Math.ceil(xs.length / width);
  for (let begin = 0; begin < xs.length; begin += size) {
    const end = Math.min(begin + size, xs.length);
    let least = begin;
    let most = begin;
    for (let i = begin; i < end; i += 1) {
      if (ys[i] < ys[least]) least = i;
      if (ys[i] > ys[most]) most = i;
    }
    for (const i of [Math.min(least, most), Math.max(least, most)]) found.push([xs[i], ys[i]]);
  }
  return found;
}

/** Columns of parts on top of one another: xs, and for each part its name and values. */
function stackedColumns(host, { xs, parts, xWords, yWords, label }) {
  responsive(host, (width) => {
    // As many columns as there is room for, each the mean of some neighbours.
    const size = Math.max(1, Math.ceil((xs.length * 3) / (width - 64)));
    const columns = [];
    for (let begin = 0; begin < xs.length; begin += size) {
      const values = parts.map(({ values }) => mean(values.slice(begin, begin + size)));
      columns.push({ first: xs[begin], last: xs[Math.min(begin + size, xs.length) - 1], values });
    }
    const high = columns.reduce((most, { values }) => Math.max(most, sum(values)), 0);
    const x = [xs[0] - 0.5, xs.at(-1) + 0.5];
    const { svg, toX, toY } = frame({ width, height: 210, x, y: [0, high], xWords, yWords, label, left: 64 });
    for (const { first, last, values } of columns) {
      const [from, to] = [toX(first - 0.5), toX(last + 0.5)];
      const gap = to - from > 4 ? 1 : 0;
      const words = parts.map(({ name }, i) => `${name} ${yWords(values[i])}`).join(", ");
      const name = first === last ? `${xWords} ${first}` : `${xWords}s ${first} to ${last}, mean`;
      const group = drawn("g", {}, drawn("title", {}, `${name}: ${words}`));
      let below = 0;
      parts.forEach(({ colour }, i) => {
        const height = toY(below) - toY(below + values[i]);
        below += values[i];
        const place = { x: from, y: toY(below), width: Math.max(to - from - gap, 0.5), height };
        if (height > 0) group.append(drawn("rect", { ...place, style: { fill: `var(--${colour})` } }));
      });
      svg.append(group);
    }
    return svg;
  });
}

/** One row of bars: a name, pieces along a track as long as `most`, and an amount in words. */
function barRow(host, { name, words, pieces, most, amount, range, inWords, shares, label }) {
  const track = element("div", { class: "track", role: "img", "aria-label": label });
  const total = sum(pieces.map(({ value }) => value));
  for (const { name: piece, value, colour } of pieces) {
    if (value <= 0) continue;
    const room = value / most;
    const text = room > 0.07 ? [inWords(value)] : [];
    if (shares && room > 0.14) text.push(element("span", { class: "share" }, ` · ${inShare(value / total)}`));
    const style = { width: `${(100 * value) / most}%`, background: `var(--${colour})` };
    track.append(element("div", { class: `piece ${colour}`, style, title: `${piece}: ${inWords(value)}` }, ...text));
  }
  if (range) {
    const style = { left: `${(100 * range[0]) / most}%`, width: `${(100 * (range[1] - range[0])) / most}%` };
    track.append(element("div", { class: "range", style }));
  }
  const head = element("div", { class: "name" }, name, words ? element("small", {}, words) : null);
  host.append(element("div", { class: "row" }, head, track, element("div", { class: "amount" }, amount)));
}

/** What the colours mean: [name, colour]. */
function key(host, entries) {
  host.replaceChildren(
    ...entries.map(([name, colour]) =>
      element("span", {}, element("i", { style: { background: `var(--${colour})` } }), name),
    ),
  );
}
