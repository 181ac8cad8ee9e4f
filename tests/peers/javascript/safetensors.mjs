// Files of tensors (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON header,
// little-endian; the header, {name: {dtype, shape, data_offsets: [begin, end]}}; then the data, row by row.
// A tensor here is {shape, data}, where data is a typed array: typed arrays are little-endian wherever Node runs.

import { readFileSync, writeFileSync } from "node:fs";

const ARRAYS = {
  F64: Float64Array, F32: Float32Array, I64: BigInt64Array, I32: Int32Array, I16: Int16Array, I8: Int8Array,
  U64: BigUint64Array, U32: Uint32Array, U16: Uint16Array, U8: Uint8Array, BOOL: Uint8Array,
};

export const sizeOf = (shape) => shape.reduce((a, b) => a * b, 1);

/** The tensors of a file by name. Throws an Error of one line where it is broken. */
export function readTensors(path) {
  const file = readFileSync(path);
  const fail = (problem) => {
    throw new Error(`${path}: ${problem}`);
  };
  if (file.length < 8) fail(`${file.length} bytes, a safetensors file has at least 8`);
  const start = 8 + Number(file.readBigUInt64LE(0));
  if (start > file.length) fail(`the header should end at byte ${start}, the file does at ${file.length}`);
  let header;
  try {
    header = JSON.parse(file.toString("utf-8", 8, start));
  } catch {
    fail("the header is no JSON");
  }
  delete header.__metadata__;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(header)) {
    const Numbers = ARRAYS[dtype] ?? fail(`${name} has the dtype ${dtype}, which is not read here`);
    const [begin, end] = offsets;
    if (end - begin !== sizeOf(shape) * Numbers.BYTES_PER_ELEMENT) {
      fail(`${name} has ${end - begin} bytes, which is not what ${dtype} [${shape}] takes`);
    }
    if (start + end > file.length) fail(`${name} should end at byte ${start + end}, the file does at ${file.length}`);
    const bytes = file.subarray(start + begin, start + end);
    tensors[name] = { shape, data: new Numbers(new Uint8Array(bytes).buffer) }; // a copy: aligned for its type
  }
  return tensors;
}

/** Writes tensors by name, the widest numbers first, so that all begin at a multiple of their size. */
export function writeTensors(path, tensors) {
  const width = ([, { data }]) => data.BYTES_PER_ELEMENT;
  const entries = Object.entries(tensors).sort((a, b) => width(b) - width(a));
  const header = {};
  let end = 0;
  for (const [name, { shape, data }] of entries) {
    const dtype = Object.keys(ARRAYS).find((key) => ARRAYS[key] === data.constructor);
    header[name] = { dtype, shape, data_offsets: [end, (end += data.byteLength)] };
  }
  let text = JSON.stringify(header);
  text += " ".repeat(-Buffer.byteLength(text) & 7); // the data begin at a multiple of 8
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(Buffer.byteLength(text)));
  const bytes = entries.map(([, { data }]) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  writeFileSync(path, Buffer.concat([length, Buffer.from(text), ...bytes]));
}
