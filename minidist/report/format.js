// Numbers with their units, columns back from their packed form, and elements from their parts.

const three = (number) => Number(number.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 3 });

function scaled(number, units, step = 1000) {
  let i = 0;
  while (Math.abs(number) >= step * 0.9995 && i + 1 < units.length) {
    number /= step;
    i += 1;
  }
  return `${three(number)} ${units[i]}`;
}

const inTime = (nanoseconds) => scaled(nanoseconds, ["ns", "µs", "ms", "s"]);
const inBytes = (bytes) => scaled(bytes, ["B", "kB", "MB", "GB", "TB"]);
const inCount = (number) => number.toLocaleString("en");
const inShare = (share) => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;

/** Base64 of gzip of JSON, as an object. */
async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** What `columns.differences` has made of numbers. */
function added(differences) {
  const numbers = new Float64Array(differences.length);
  let sum = 0;
  for (let i = 0; i < numbers.length; i += 1) numbers[i] = sum += differences[i];
  return numbers;
}

/** An element: attributes by name, a style as an object, then children: elements and texts. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  decorate(made, attributes);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  decorate(made, attributes);
  made.append(...children);
  return made;
}

function decorate(made, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") for (const [property, text] of Object.entries(value)) made.style.setProperty(property, text);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const mean = (numbers) => (numbers.length ? sum(numbers) / numbers.length : 0);
