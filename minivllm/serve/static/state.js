// The engine after each step, rebuilt from its flight records. The same rules as `replay` in minivllm/trace.py: a test
// feeds both and compares.

export const VERSION = 1;

const copyOf = (entry) => ({ ...entry, blocks: [...entry.blocks] });

export class EngineState {
  constructor() {
    this.header = { num_blocks: 1, block_size: 16, max_num_seqs: 0, max_num_batched_tokens: 0 };
    this.clear();
  }

  clear() {
    this.step = 0;
    this.requests = new Map(); // resident ones, in the order of their admission
    this.waiting = { count: 0, first: [] };
    this.freeBlocks = 0;
    this.cached = new Set(); // blocks that the prefix cache knows, held or free
    this.last = null; // the newest step's record
  }

  /** Take in one record. Throws an Error for a trace of another version. */
  apply(record) {
    if (record.type === "header") this.applyHeader(record);
    else if (record.type === "keyframe") this.applyKeyframe(record);
    else if (record.type === "step") this.applyStep(record);
  }

  applyHeader(record) {
    checkVersion(record);
    this.header = record;
    this.clear();
  }

  applyKeyframe(record) {
    this.step = record.step;
    this.requests = new Map(Object.entries(record.requests).map(([name, entry]) => [name, copyOf(entry)]));
    this.waiting = record.waiting;
    this.freeBlocks = record.free_blocks;
    this.cached = new Set();
    for (const [first, number] of record.cached ?? []) {
      for (let block = first; block < first + number; block++) this.cached.add(block);
    }
  }

  applyStep(record) {
    for (const name of record.preempted) this.requests.delete(name);
    for (const [name, entry] of Object.entries(record.admitted)) {
      this.requests.delete(name); // a Map keeps the first place of a key, and this is a new admission
      this.requests.set(name, copyOf(entry));
    }
    for (const [name, blocks] of Object.entries(record.new_blocks)) this.requests.get(name).blocks.push(...blocks);
    this.applyCache(record);
    for (const [name, tokens] of Object.entries(record.scheduled)) this.requests.get(name).num_computed_tokens += tokens;
    for (const [name, tokens] of Object.entries(record.sampled)) this.requests.get(name).num_tokens += numTokens(tokens);
    for (const [name, [numComputed, numBlocks]] of Object.entries(record.rewound ?? {})) { // drafts that were wrong
      const request = this.requests.get(name);
      request.num_computed_tokens = numComputed;
      request.blocks.length = numBlocks;
    }
    for (const name of Object.keys(record.finished)) this.requests.delete(name);
    this.step = record.step;
    this.waiting = record.waiting;
    this.freeBlocks = record.free_blocks;
    this.last = record;
  }

  /** A block is forgotten when somebody takes it anew, and known once it is full. */
  applyCache(record) {
    const taken = Object.values(record.new_blocks);
    for (const entry of Object.values(record.admitted)) {
      taken.push(entry.blocks.slice(Math.floor(entry.num_computed_tokens / this.header.block_size)));
    }
    for (const block of taken.flat()) this.cached.delete(block);
    for (const block of record.cached ?? []) this.cached.add(block);
  }

  get numBlocks() {
    return this.header.num_blocks - 1; // block 0 is the null block, which nobody owns
  }

  /** For every block in use [request, index in its table, ...] of all that hold it; more than one means that it is shared. */
  blockOwners() {
    const owners = new Map();
    for (const [name, request] of this.requests) {
      request.blocks.forEach((block, index) => {
        const held = owners.get(block);
        if (held) held.push({ name, index });
        else owners.set(block, [{ name, index }]);
      });
    }
    return owners;
  }

  /** How many slots of a request's block are written. */
  fillOf({ name, index }) {
    const size = this.header.block_size;
    return Math.max(0, Math.min(size, this.requests.get(name).num_computed_tokens - index * size));
  }
}

export function checkVersion(header) {
  if (header.version === VERSION) return;
  throw new Error(`This trace has version ${header.version}, and this page reads version ${VERSION}.`);
}

/** A trace file has the ids of the sampled tokens, the live stream only their number. */
export const numTokens = (sampled) => (typeof sampled === "number" ? sampled : sampled.length);
