// What one does with the timeline: move, zoom, choose. With a mouse, fingers or keys.

Object.assign(Timeline.prototype, {
  listen() {
    this.fingers = new Map();
    this.section.querySelector(".bar").addEventListener("click", ({ target }) => {
      const acts = {
        in: () => this.zoom(0.5),
        out: () => this.zoom(2),
        fit: () => this.look(0, this.length),
        before: () => this.showStep((this.step ?? 0) - 1),
        after: () => this.showStep((this.step ?? -1) + 1),
      };
      acts[target.dataset.do]?.();
    });
    this.input.addEventListener("change", () => {
      const wanted = this.leader.numbers.indexOf(Number(this.input.value));
      this.showStep(wanted < 0 ? this.step : wanted);
    });
    this.input.closest(".group").hidden = !this.leader.numbers.length;
    const on = (name, act, options) => this.canvas.addEventListener(name, (event) => act.call(this, event), options);
    on("wheel", this.wheel, { passive: false });
    on("pointerdown", this.down);
    on("pointermove", this.move);
    on("pointerup", this.up);
    on("pointercancel", this.up);
    on("pointerleave", () => this.fingers.size || this.unpoint());
    on("keydown", this.pressed);
    on("focus", () => this.canvas.matches(":focus-visible") && this.chooseLane(1));
    on("blur", this.unpoint);
    this.overview.addEventListener("pointerdown", (event) => this.overviewAt(event));
    this.overview.addEventListener("pointermove", (event) => event.buttons && this.overviewAt(event));
  },

  /** The page scrolls, unless the timeline has been clicked or Ctrl is held. */
  wheel(event) {
    if (document.activeElement !== this.canvas && !event.ctrlKey && !event.metaKey) {
      const hint = document.getElementById("hint");
      hint.classList.add("shown");
      clearTimeout(this.hinting);
      this.hinting = setTimeout(() => hint.classList.remove("shown"), 1200);
      return;
    }
    event.preventDefault();
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) this.pan(event.deltaX / this.width);
    else this.zoom(Math.exp(Math.min(Math.max(event.deltaY, -240), 240) / 300), this.shareAt(event));
  },

  shareAt(event) {
    return (event.clientX - this.canvas.getBoundingClientRect().left - this.left) / this.width;
  },

  down(event) {
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.fingers.set(event.pointerId, event.clientX);
  },

  move(event) {
    const before = this.fingers.get(event.pointerId);
    if (before === undefined) {
      this.point(event);
      return;
    }
    const [from, to] = this.view;
    if (this.fingers.size === 1) {
      this.pan((before - event.clientX) / this.width);
    } else {
      // Two fingers: what is between them grows as they part.
      const other = [...this.fingers].find(([id]) => id !== event.pointerId)[1];
      const [was, is] = [Math.abs(before - other), Math.abs(event.clientX - other)];
      if (was > 8 && is > 8) this.zoom(was / is, this.shareAt({ clientX: (event.clientX + other) / 2 }));
    }
    if (from !== this.view[0] || to !== this.view[1]) this.moved = true;
    this.fingers.set(event.pointerId, event.clientX);
  },

  up(event) {
    this.fingers.delete(event.pointerId);
    if (!this.moved) this.point(event);
    this.moved = this.fingers.size > 0 && this.moved;
  },

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const acts = {
      ArrowLeft: () => this.pan(-0.2),
      ArrowRight: () => this.pan(0.2),
      "+": () => this.zoom(0.5),
      "=": () => this.zoom(0.5),
      "-": () => this.zoom(2),
      0: () => this.look(0, this.length),
      Home: () => this.look(0, this.length),
      ArrowDown: () => this.chooseLane(1),
      ArrowUp: () => this.chooseLane(-1),
      n: () => this.chooseNext(1),
      p: () => this.chooseNext(-1),
      Escape: () => this.unpoint(),
    };
    const act = acts[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    act();
  },

  overviewAt(event) {
    const box = this.overview.getBoundingClientRect();
    const time = ((event.clientX - box.left) / box.width) * this.length;
    const half = (this.view[1] - this.view[0]) / 2;
    this.look(time - half, time + half);
  },

  // -- the tooltip -------------------------------------------------------------------------------------------------

  /** Tell what is under the pointer: a mark, a message's arrow, or what is in a lane. */
  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const [from, to] = this.view;
    const time = from + ((x - this.left) / this.width) * (to - from);
    const pixel = (to - from) / this.width;
    const mark = this.marks.find(
      ([rank, at]) => Math.abs(this.toX(at) - x) < 6 && Math.abs(this.rows[rank].top - 2 - y) < 7,
    );
    if (mark) {
      const [rank, at, label, words] = mark;
      this.tell([`${label} ${words}`, `rank ${this.ranks[rank]}, at ${inPlace(at, to - from)}`], x, y);
      return;
    }
    const message = this.messageAt(x, y);
    if (message >= 0) {
      const { sent, lengths, codes, table } = this.messages;
      const [sender, receiver, group, tag, nbytes] = table[codes[message]];
      const words = `${inBytes(nbytes)}, ${inTime(lengths[message])} on its way`;
      const when = `sent at ${inPlace(sent[message], to - from)}, group ${group}, tag ${tag}`;
      this.tell([`message from rank ${sender} to rank ${receiver}`, words, when], x, y);
      return;
    }
    for (const lanes of this.boxes) {
      if (x < this.left || y < lanes.y - 1 || y > lanes.y + lanes.height + 1) continue;
      // Waits are drawn over computing.
      for (const lane of [...lanes.lanes].reverse()) {
        const i = lane.at(time, pixel);
        if (i >= 0) {
          this.choose({ box: lanes, lane, i }, x, y);
          return;
        }
      }
    }
    this.unpoint();
  },

  /** The message whose arrow passes within four pixels. -1: none. */
  messageAt(x, y) {
    if (!this.arrows) return -1;
    const { sent, longest } = this.messages;
    const [from, to] = this.view;
    for (let i = above(sent, from - longest); i < above(sent, to); i += 1) {
      const { x0, y0, x1, y1 } = this.arrow(i);
      const [dx, dy] = [x1 - x0, y1 - y0];
      const along = Math.min(Math.max(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy || 1), 0), 1);
      if (Math.hypot(x0 + along * dx - x, y0 + along * dy - y) < 4) return i;
    }
    return -1;
  },

  choose(chosen, x, y) {
    const { lane, i } = chosen;
    this.chosen = chosen;
    const rank = this.ranks[lane.rank] ?? lane.rank;
    const from = inPlace(lane.starts[i], this.view[1] - this.view[0]);
    const when = `rank ${rank}, from ${from}, for ${inTime(lane.ends[i] - lane.starts[i])}`;
    this.draw();
    this.tell([...lane.what(i), when], x, y);
  },

  tell([head, ...lines], x, y) {
    this.tip.replaceChildren(element("b", {}, head), ...lines.filter(Boolean).map((line) => element("span", {}, line)));
    this.tip.hidden = false;
    const [width, height] = [this.tip.offsetWidth, this.tip.offsetHeight];
    const room = this.canvas.clientWidth;
    this.tip.style.left = `${Math.max(0, Math.min(x + 14, room - width))}px`;
    this.tip.style.top = `${y - height - 12 > -40 ? y - height - 12 : y + 18}px`;
  },

  hide() {
    this.chosen = null;
    this.tip.hidden = true;
  },

  unpoint() {
    if (!this.chosen && this.tip.hidden) return;
    this.hide();
    this.draw();
  },

  // -- keys ----------------------------------------------------------------------------------------------------------

  /** All lanes from top to bottom, each with its box. */
  everyLane() {
    return this.boxes
      .flatMap((box) => box.lanes.map((lane) => ({ box, lane })))
      .filter(({ lane }) => lane.starts.length);
  },

  chooseLane(by) {
    const every = this.everyLane();
    const now = this.chosen ? every.findIndex(({ lane }) => lane === this.chosen.lane) : by > 0 ? -1 : every.length;
    const next = every[Math.min(Math.max(now + by, 0), every.length - 1)];
    const middle = (this.view[0] + this.view[1]) / 2;
    const i = Math.min(
      above(next.lane.reach, this.chosen ? this.chosen.lane.starts[this.chosen.i] : middle),
      next.lane.starts.length - 1,
    );
    this.chooseByKey(next.lane, i);
  },

  chooseNext(by) {
    if (!this.chosen) {
      this.chooseLane(1);
      return;
    }
    const { lane, i } = this.chosen;
    this.chooseByKey(lane, Math.min(Math.max(i + by, 0), lane.starts.length - 1));
  },

  chooseByKey(lane, i) {
    const [from, to] = this.view;
    const middle = (lane.starts[i] + lane.ends[i]) / 2;
    if (middle < from || middle > to) {
      this.look(middle - (to - from) / 2, middle + (to - from) / 2);
      this.draw();
    }
    const box = this.boxes.find(({ lanes }) => lanes.includes(lane));
    const x = Math.min(Math.max(this.toX(middle), this.left), this.left + this.width);
    this.choose({ box, lane, i }, x, box.y);
    document.getElementById("said").textContent = [...this.tip.children]
      .map(({ textContent }) => textContent)
      .join(". ");
  },
});
