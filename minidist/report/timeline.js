// The timeline: a canvas with a row for each rank, its overview, and all one can do with them.

class Timeline {
  constructor({ timeline, ranks, nanoseconds }) {
    this.section = shown("timeline");
    this.length = Math.max(nanoseconds, 1);
    this.ranks = ranks;
    this.lanes = ranks.map((rank) => lanesOf(rank, timeline.lanes[rank], timeline));
    this.steps = timeline.lanes.map(({ steps: [starts, lengths, numbers] }) => ({
      starts: added(starts),
      lengths,
      numbers,
    }));
    this.leader = this.steps.find(({ numbers }) => numbers.length) ?? this.steps[0]; // whose steps are on the axis
    this.marks = timeline.lanes.flatMap(({ marks }, rank) => marks.map((mark) => [rank, ...mark]));
    const [sent, lengths, codes] = timeline.messages;
    this.messages = { sent: added(sent), lengths, codes, table: timeline.wire };
    this.messages.longest = lengths.reduce((most, length) => Math.max(most, length), 0);
    this.messages.ends = this.messages.sent.map((start, i) => start + lengths[i]);

    [this.canvas, this.overview, this.tip] = ["lanes", "overview", "tip"].map((id) => document.getElementById(id));
    this.input = document.getElementById("step");
    this.chosen = null; // { lane, i }: what the tooltip is about
    const present = ["forward", "backward", "update", "recompute"].filter((kind) =>
      timeline.computing.some(([k]) => k === kind),
    );
    const kinds = new Set(
      timeline.operations.map(([kind]) => (kind === "send" || kind === "receive" ? "message" : "collective")),
    );
    key(this.section.querySelector(".key"), [
      ...present.map((kind) => [kind, kind]),
      ["waiting: exposed", "exposed"],
      ["waiting: idle", "idle"],
      ...(kinds.has("collective") ? [["collective on its way", "collective"]] : []),
      ...(kinds.has("message") ? [["send or receive on its way", "message"]] : []),
    ]);

    this.view = [0, this.length];
    this.recolour();
    this.listen();
    const middle = this.leader.numbers.length >> 1;
    if (this.leader.numbers.length > 2) this.showStep(middle);
    else this.look(0, this.length);
    new ResizeObserver(() => this.draw()).observe(this.section);
  }

  // -- what is in sight ------------------------------------------------------------------------------------------

  look(from, to) {
    const width = Math.min(Math.max(to - from, 200), this.length * 1.04);
    const begin = Math.min(Math.max(from - (width - (to - from)) / 2, -0.02 * this.length), this.length * 1.02 - width);
    this.view = [begin, begin + width];
    this.hide();
    if (!this.pending) {
      this.pending = requestAnimationFrame(() => {
        this.pending = 0;
        this.draw();
      });
    }
  }

  /** factor < 1: nearer. The time at the place `at` (a share of the width) stays where it is. */
  zoom(factor, at = 0.5) {
    const [from, to] = this.view;
    const fixed = from + at * (to - from);
    this.look(fixed - (fixed - from) * factor, fixed + (to - fixed) * factor);
  }

  pan(share) {
    const [from, to] = this.view;
    const by = share * (to - from);
    this.look(from + by, to + by);
  }

  /** The i-th training step, with a little around it. */
  showStep(i) {
    const { starts, lengths, numbers } = this.leader;
    if (!numbers.length) return;
    this.step = Math.min(Math.max(i, 0), numbers.length - 1);
    this.input.value = numbers[this.step];
    const [start, length] = [starts[this.step], lengths[this.step]];
    this.look(start - 0.06 * length, start + 1.12 * length);
  }

  // -- drawing ---------------------------------------------------------------------------------------------------

  /** Colours as the page's style has them now. */
  recolour() {
    const probe = element("i");
    this.section.append(probe);
    const resolved = (name) => {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color;
    };
    const names = ["forward", "backward", "update", "recompute", "exposed", "idle", "collective", "message", "label"];
    this.colours = Object.fromEntries(names.map((name) => [name, resolved(name)]));
    this.colours.label2 = resolved("line");
    const [onColour, ink] = [resolved("on-colour"), resolved("ink")];
    this.ink = Object.fromEntries(names.map((name) => [name, onColour]));
    Object.assign(this.ink, { idle: ink, label: ink, label2: ink, collective: resolved("on-pale") });
    this.other = {
      ink,
      soft: resolved("soft"),
      line: resolved("line"),
      faint: resolved("faint"),
      arrow: resolved("arrow"),
      card: resolved("card"),
      accent: resolved("accent"),
    };
    probe.remove();
  }

  /** Where each lane is: boxes from top to bottom. */
  layout(width) {
    const many = this.ranks.length > 8;
    const heights = many ? { labels: 0, program: 16, way: 9, gap: 7 } : { labels: 17, program: 26, way: 16, gap: 15 };
    const left = width < 520 ? 26 : 64;
    const boxes = [];
    let y = 40;
    this.rows = this.lanes.map((lanes, rank) => {
      const row = { rank, top: y };
      if (heights.labels) boxes.push({ lanes: [lanes.labels], y, height: heights.labels - 2 });
      y += heights.labels;
      boxes.push({ lanes: [lanes.computing, lanes.exposed, lanes.idle], y, height: heights.program });
      y += heights.program + 2;
      row.way = y + heights.way / 2;
      const count = Math.max(lanes.operations.length, 1);
      lanes.operations.forEach((lane, i) => {
        boxes.push({
          lanes: [lane],
          y: y + (i * heights.way) / count,
          height: heights.way / count - (count > 1 ? 1 : 0),
        });
      });
      y += heights.way;
      row.bottom = y;
      y += heights.gap;
      return row;
    });
    this.boxes = boxes.map((box) => ({ ...box, x: left, width: width - left }));
    return { left, height: y - heights.gap + 8 };
  }

  draw() {
    const width = this.canvas.clientWidth;
    if (!width) return;
    const { left, height } = this.layout(width);
    const context = sharp(this.canvas, width, height);
    [this.left, this.width] = [left, width - left];
    this.drawAxis(context, height);
    for (const box of this.boxes) {
      context.fillStyle = this.other.faint;
      context.fillRect(box.x, box.y, box.width, box.height);
      context.font = `${box.height < 14 ? 10 : 11.5}px ${getComputedStyle(document.body).fontFamily}`;
      context.textBaseline = "middle";
      const [from, to] = this.view;
      const texts = box.height >= 11;
      drawLanes(context, box.lanes, { ...box, from, to, colours: this.colours, texts, ink: this.ink });
    }
    this.drawNames(context, width);
    this.arrows = this.drawMessages(context);
    this.drawMarks(context, height);
    if (this.chosen) this.drawChosen(context);
    this.drawOverview();
    const [from, to] = this.view;
    const words = `${inTime(to - from)} in sight, from ${inPlace(Math.max(from, 0), to - from)}`;
    document.getElementById("window").textContent = words;
    Object.assign(this.canvas.dataset, { from: Math.round(from), to: Math.round(to), arrows: this.arrows });
  }

  toX(time) {
    return this.left + ((time - this.view[0]) / (this.view[1] - this.view[0])) * this.width;
  }

  drawNames(context) {
    context.font = `13px ${getComputedStyle(document.body).fontFamily}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.fillStyle = this.other.soft;
    for (const { rank, top, bottom } of this.rows) {
      const name = this.left < 60 ? `${this.ranks[rank]}` : `rank ${this.ranks[rank]}`;
      context.fillText(name, this.left - 8, (top + bottom) / 2 + 4);
    }
    context.textAlign = "left";
  }

  /** Times, and above them the training steps. */
  drawAxis(context, height) {
    const [from, to] = this.view;
    context.font = `11.5px ${getComputedStyle(document.body).fontFamily}`;
    context.textBaseline = "middle";
    context.textAlign = "center";
    for (const time of ticks(Math.max(from, 0), Math.min(to, this.length), this.width / 110)) {
      const x = this.toX(time);
      context.fillStyle = this.other.line;
      context.fillRect(x, 34, 1, height - 34);
      context.fillStyle = this.other.soft;
      const words = inPlace(time, to - from);
      const half = context.measureText(words).width / 2;
      if (x - half > this.left - 4 && x + half < this.left + this.width) context.fillText(words, x, 26);
    }
    const { starts, lengths, numbers } = this.leader;
    const seen = above(starts, to) - above(starts, from);
    const every = seen * 60 > this.width ? ticks(0, seen, this.width / 60)[1] : 1;
    for (let i = Math.max(above(starts, from) - 1, 0); i < starts.length && starts[i] < to; i += 1) {
      if (numbers[i] % every) continue;
      const [begin, end] = [Math.max(this.toX(starts[i]), this.left), this.toX(starts[i] + lengths[i])];
      context.fillStyle = this.other.line;
      context.fillRect(begin, 2, 1, 14);
      const room = Math.min(end, this.left + this.width) - begin;
      const words = every > 1 || room < 60 ? `${numbers[i]}` : `step ${numbers[i]}`;
      context.fillStyle = this.other.soft;
      context.textAlign = "left";
      if (room > context.measureText(words).width + 6 || every > 1) context.fillText(words, begin + 5, 9);
    }
    context.textAlign = "left";
  }

  /** Arrows of the messages in sight, if they are few enough to be told apart. */
  drawMessages(context) {
    const { sent, ends, longest } = this.messages;
    const [from, to] = this.view;
    const [first, last] = [above(sent, from - longest), above(sent, to)];
    const room = this.width / 4;
    const seen = [];
    for (let i = first; i < last && seen.length <= room; i += 1) if (ends[i] >= from) seen.push(i);
    if (seen.length > room) return 0;
    context.save();
    context.beginPath();
    context.rect(this.left, 34, this.width, 1e5);
    context.clip();
    context.strokeStyle = context.fillStyle = this.other.arrow;
    context.lineWidth = 1;
    for (const i of seen) {
      const { x0, y0, x1, y1 } = this.arrow(i);
      const length = Math.hypot(x1 - x0, y1 - y0) || 1;
      const [dx, dy] = [(x1 - x0) / length, (y1 - y0) / length];
      context.globalAlpha = 0.55;
      context.beginPath();
      context.moveTo(x0, y0);
      context.lineTo(x1 - 5 * dx, y1 - 5 * dy);
      context.stroke();
      context.globalAlpha = 0.8;
      context.beginPath();
      context.moveTo(x1, y1);
      context.lineTo(x1 - 7 * dx - 3 * dy, y1 - 7 * dy + 3 * dx);
      context.lineTo(x1 - 7 * dx + 3 * dy, y1 - 7 * dy - 3 * dx);
      context.fill();
    }
    context.restore();
    return seen.length;
  }

  arrow(i) {
    const { sent, ends, codes, table } = this.messages;
    const [sender, receiver] = table[codes[i]];
    return { x0: this.toX(sent[i]), y0: this.rows[sender].way, x1: this.toX(ends[i]), y1: this.rows[receiver].way };
  }

  drawMarks(context) {
    context.fillStyle = this.other.accent;
    for (const [rank, time] of this.marks) {
      const x = this.toX(time);
      if (x < this.left || x > this.left + this.width) continue;
      const { top } = this.rows[rank];
      context.beginPath();
      context.moveTo(x - 4, top - 5);
      context.lineTo(x + 4, top - 5);
      context.lineTo(x, top + 2);
      context.fill();
    }
  }

  drawChosen(context) {
    const { box, lane, i } = this.chosen;
    if (!lane) return;
    const [begin, end] = [
      Math.max(this.toX(lane.starts[i]), this.left),
      Math.min(this.toX(lane.ends[i]), this.left + this.width),
    ];
    context.strokeStyle = this.other.ink;
    context.lineWidth = 1.5;
    context.strokeRect(begin, box.y - 0.5, Math.max(end - begin, 2), box.height + 1);
  }

  drawOverview() {
    const width = this.overview.clientWidth;
    const height = this.overview.clientHeight;
    // What does not change with the view is drawn once for each width and colours.
    const now = `${width} ${this.other.ink} ${this.other.card}`;
    if (this.drawnFor !== now) {
      this.drawnFor = now;
      this.whole = document.createElement("canvas");
      const context = sharp(this.whole, width, height);
      const tall = height / this.ranks.length;
      this.lanes.forEach(({ computing, exposed, idle }, i) => {
        const box = { x: 0, y: i * tall, width, height: Math.max(tall - 1, 0.5), from: 0, to: this.length };
        context.fillStyle = this.other.faint;
        context.fillRect(0, box.y, width, box.height);
        drawLanes(context, [computing, exposed, idle], { ...box, colours: this.colours });
      });
    }
    const context = sharp(this.overview, width, height);
    context.drawImage(this.whole, 0, 0, width, height);
    const [begin, end] = this.view.map((time) => Math.min(Math.max(time / this.length, 0), 1) * width);
    context.fillStyle = this.other.card;
    context.globalAlpha = 0.45;
    context.fillRect(0, 0, begin, height);
    context.fillRect(end, 0, width - end, height);
    context.globalAlpha = 1;
    context.strokeStyle = this.other.ink;
    context.lineWidth = 1.5;
    context.strokeRect(begin - 0.5, 0.75, Math.max(end - begin, 3), height - 1.5);
  }
}

/** A canvas's context, as fine as the screen. */
function sharp(canvas, width, height) {
  const fine = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * fine);
  canvas.height = Math.round(height * fine);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(fine, fine);
  return context;
}

/** A time on the axis, with as many digits as the window needs. */
function inPlace(time, window_) {
  const [unit, name] = time < 1e3 ? [1, "ns"] : time < 1e6 ? [1e3, "µs"] : time < 1e9 ? [1e6, "ms"] : [1e9, "s"];
  const digits = Math.max(0, Math.ceil(-Math.log10(window_ / 10 / unit) - 0.001));
  return `${(time / unit).toLocaleString("en", { maximumFractionDigits: Math.min(digits, 9) })} ${name}`;
}
