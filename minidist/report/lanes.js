// The lanes of the timeline: their items in order, which of them are in sight, and how they are drawn at any zoom.

/** Items of one lane: start, end (Float64Array, ordered by start), colour (index), what(i) for the tooltip, text(i). */
class Lane {
  constructor({ rank, name, starts, lengths, colours, palette, what, text }) {
    Object.assign(this, { rank, name, starts, colours, palette, what, text });
    this.ends = starts.map((start, i) => start + lengths[i]);
    // The greatest end so far: it never falls, so that the first item in sight can be found by halving.
    this.reach = new Float64Array(this.ends.length);
    let most = -Infinity;
    for (let i = 0; i < this.ends.length; i += 1) this.reach[i] = most = Math.max(most, this.ends[i]);
  }

  /** The item at a time: of nested ones the innermost. -1: none. */
  at(time, slack = 0) {
    let found = -1;
    for (let i = above(this.reach, time - slack); i < this.starts.length && this.starts[i] <= time + slack; i += 1) {
      if (this.ends[i] >= time - slack) found = i;
    }
    return found;
  }
}

/** The place of the first of ordered numbers that is greater than a limit. */
function above(numbers, limit) {
  let low = 0;
  let high = numbers.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] > limit) high = middle;
    else low = middle + 1;
  }
  return low;
}

/**
 * Draw the items of lanes that share a box, between from and to (times), the later lanes over the earlier. Items wider
 * than two pixels are drawn as they are; of the others every column of pixels shows how much of it each colour covers,
 * so that nothing short is lost.
 */
function drawLanes(context, lanes, { x, y, width, height, from, to, colours, texts, ink }) {
  const scale = width / (to - from);
  const cover = new Map(); // colour: share of each column
  for (const lane of lanes) {
    const wide = []; // items that have room for a text
    for (let i = above(lane.reach, from); i < lane.starts.length && lane.starts[i] < to; i += 1) {
      const begin = Math.max((lane.starts[i] - from) * scale, 0);
      const end = Math.min((lane.ends[i] - from) * scale, width);
      const colour = lane.palette[lane.colours[i]];
      if (end - begin >= 2) {
        context.fillStyle = colours[colour];
        context.fillRect(x + begin, y, end - begin - (end - begin > 4 ? 0.75 : 0), height);
        if (texts && end - begin > 26) wide.push(i);
      } else {
        if (!cover.has(colour)) cover.set(colour, new Float32Array(Math.ceil(width) + 1));
        const shares = cover.get(colour);
        for (let column = Math.floor(begin); column <= end; column += 1) {
          shares[column] += Math.max(Math.min(end, column + 1) - Math.max(begin, column), 0.02);
        }
      }
    }
    for (const i of wide) {
      const [begin, end] = roomForText(lane, i, Math.max(lane.starts[i], from), Math.min(lane.ends[i], to), 40 / scale);
      const place = [x + (begin - from) * scale + 4, y, (end - begin) * scale - 8, height];
      write(context, lane.text(i), ...place, ink[lane.palette[lane.colours[i]]]);
    }
  }
  drawCover(context, cover, x, y, height, colours);
}

/** The first part of an item that no item inside of it covers, and that is not too short. */
function roomForText(lane, i, begin, end, shortest) {
  for (let j = i + 1; j < lane.starts.length && lane.starts[j] < end; j += 1) {
    if (lane.starts[j] - begin >= shortest) return [begin, lane.starts[j]];
    begin = Math.max(begin, lane.ends[j]);
  }
  return [begin, end];
}

function drawCover(context, cover, x, y, height, colours) {
  if (!cover.size) return;
  const below = new Float32Array(cover.values().next().value.length);
  const total = new Float32Array(below.length);
  for (const shares of cover.values()) shares.forEach((share, column) => (total[column] += share));
  for (const [colour, shares] of cover) {
    context.fillStyle = colours[colour];
    for (let column = 0; column < shares.length; column += 1) {
      if (shares[column] === 0) continue;
      const part = (shares[column] / Math.max(total[column], 1)) * height;
      const tall = Math.max(part, 0.75);
      context.fillRect(x + column, y + height - below[column] - tall, 1, tall);
      below[column] += part;
    }
  }
}

/** As much of a text as fits. */
function write(context, text, x, y, width, height, ink) {
  if (!text || width < 14) return;
  context.fillStyle = ink;
  let fitting = text;
  if (context.measureText(text).width > width) {
    const letters = Math.floor((text.length * width) / context.measureText(text).width) - 1;
    if (letters < 2) return;
    fitting = `${text.slice(0, letters)}…`;
  }
  context.fillText(fitting, x, y + height / 2 + 0.5);
}

const WORDS = { exposed: "waiting: communication exposed", idle: "waiting: idle, another rank is late" };

/** All lanes of a rank, of the page's data. */
function lanesOf(rank, columns, tables) {
  const lanes = {};
  {
    const [starts, lengths, codes] = columns.labels;
    const depth = columns.labels[3];
    lanes.labels = new Lane({
      rank,
      name: "numbered steps",
      starts: added(starts),
      lengths,
      colours: depth.map((deep) => deep % 2),
      palette: ["label", "label2"],
      text: (i) => tables.labels[codes[i]],
      what: (i) => [tables.labels[codes[i]], "a numbered step"],
    });
  }
  // What the program did: computing, and over it the waits.
  {
    const kinds = ["forward", "backward", "update", "recompute"];
    const [starts, lengths, codes] = columns.computing;
    lanes.computing = new Lane({
      rank,
      name: "program",
      starts: added(starts),
      lengths,
      colours: codes.map((code) => Math.max(kinds.indexOf(tables.computing[code][0]), 0)),
      palette: kinds,
      text: (i) => tables.computing[codes[i]][1] || tables.computing[codes[i]][0],
      what: (i) => {
        const [kind, layer, label] = tables.computing[codes[i]];
        return [`${kind} ${layer}`.trim(), label];
      },
    });
  }
  for (const part of ["exposed", "idle"]) {
    const [starts, lengths] = columns[part];
    const colours = new Uint8Array(lengths.length);
    const [text, what] = [() => (part === "idle" ? "idle" : "waits"), () => [WORDS[part], ""]];
    lanes[part] = new Lane({
      rank,
      name: "program",
      starts: added(starts),
      lengths,
      colours,
      palette: [part],
      text,
      what,
    });
  }
  lanes.operations = operationLanes(rank, columns.operations, tables.operations);
  return lanes;
}

/** Operations overlap: up to three lanes, each taking what begins when the one before is taken. */
function operationLanes(rank, [differences, lengths, codes, finished], table) {
  const starts = added(differences);
  const lanes = [];
  const busy = [];
  for (let i = 0; i < starts.length; i += 1) {
    let lane = busy.findIndex((end) => end <= starts[i]);
    if (lane < 0) lane = busy.length < 3 ? busy.length : 2;
    busy[lane] = Math.max(busy[lane] ?? 0, starts[i] + lengths[i]);
    (lanes[lane] ??= []).push(i);
  }
  return lanes.map((items) => {
    const row = (i) => table[codes[items[i]]];
    return new Lane({
      rank,
      name: "on its way",
      starts: Float64Array.from(items, (i) => starts[i]),
      lengths: items.map((i) => lengths[i]),
      colours: items.map((i) => (["send", "receive"].includes(table[codes[i]][0]) ? 1 : 0)),
      palette: ["collective", "message"],
      text: (i) => row(i)[0],
      what: (i) => {
        const [kind, group, peer, nbytes, dtype, tag, label] = row(i);
        const message = kind === "send" || kind === "receive";
        const with_ = peer === null ? "" : message ? `, rank ${peer} of its group` : `, root ${peer}`;
        const end = finished[items[i]] ? "" : ", never finished";
        return [
          `${kind}${with_}`,
          `${inBytes(nbytes)} of ${dtype}, group ${group}${message ? `, tag ${tag}` : ""}${end}`,
          label,
        ];
      },
    });
  });
}
