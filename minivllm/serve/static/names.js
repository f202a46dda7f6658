// Short names and colors for requests, whose real ids are long.

// Okabe and Ito's palette, which color-blind readers can tell apart, with two additions. [fill, text on it]
const COLORS = [
  ["#0072b2", "#fff"], ["#e69f00", "#1b1b1b"], ["#009e73", "#fff"], ["#cc79a7", "#1b1b1b"],
  ["#56b4e9", "#1b1b1b"], ["#d55e00", "#fff"], ["#7f62b8", "#fff"], ["#c9bb2c", "#1b1b1b"],
];

export class RequestNames {
  constructor() {
    this.numbers = new Map();
    this.mine = new Set();
  }

  /** Requests are numbered from 1 as they are first seen; beyond eight, colors come again and the number tells. */
  number(id) {
    if (!this.numbers.has(id)) this.numbers.set(id, this.numbers.size + 1);
    return this.numbers.get(id);
  }

  color(id) {
    return COLORS[(this.number(id) - 1) % COLORS.length];
  }

  /** The request whose id has this part is the reader's own. */
  claim(part) {
    this.mine.add(part);
  }

  isMine(id) {
    for (const part of this.mine) if (id.includes(part)) return true;
    return false;
  }

  /** A decision's sentence with numbers in place of ids. */
  shorten(sentence) {
    return sentence.replace(/\brequest (\S+)/g, (words, id) => (this.numbers.has(id) ? `request ${this.numbers.get(id)}` : words));
  }
}
