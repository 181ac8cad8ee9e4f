// NF4 and double quantization (QLoRA, arXiv:2305.14314), and what bitsandbytes 0.50 does otherwise (config.compat).
// All arithmetic is float32: Math.fround rounds the result of every operation.

import { matmul, transpose } from "./matrices.mjs";

const f32 = Math.fround;
const CPU = "bnb-cpu";
const CUDA = "bnb-cuda";
const ZERO = 7; // the code of 0
const SMALLEST = f32(1e-38);

// ---- codes and constants -------------------------------------------------------------------------------------------

/** The parts of a weight: packed, and absmax or what double quantization makes of it. */
export function encode({ weight, codebook, nested_map: nestedMap }, config) {
  const { block, compat } = config;
  const boundaries = middles(codebook.data);
  if (compat === CUDA) moveToLiterals(boundaries);
  const codeOf = (v) => (Number.isNaN(v) ? 0 : countBelow(boundaries, v)); // NaN: a block of zeros on CUDA
  const { scaled, absmax } = inBlocks(Float32Array.from(weight.data), block, compat, true);
  const codes = Array.from(scaled, codeOf);
  if (codes.length % 2) codes.push(codeOf(Number.isNaN(scaled.at(-1)) ? NaN : 0));
  const packed = Uint8Array.from({ length: codes.length / 2 }, (_, i) => (codes[2 * i] << 4) | codes[2 * i + 1]);
  const constants = config.double_quant ? encodeConstants(absmax, nestedMap, config) : { absmax: vector(absmax) };
  return { packed: vector(packed), ...constants };
}

function encodeConstants(absmax, nestedMap, { nested_block: block, compat }) {
  const offset = f32(absmax.reduce((a, b) => a + b) / absmax.length); // a sum in float64
  const { scaled, absmax: outer } = inBlocks(absmax.map((a) => a - offset), block, compat, false);
  const codeOf = codesIn8Bits(nestedMap.data, compat);
  return {
    offset: { shape: [], data: Float32Array.of(offset) },
    nested_codes: vector(Uint8Array.from(scaled, codeOf)),
    nested_absmax: vector(outer),
  };
}

/** The values divided by their block's largest magnitude, and these; NaN where bitsandbytes divides zeros by zero. */
function inBlocks(values, block, compat, fourBits) {
  const absmax = new Float32Array(Math.ceil(values.length / block));
  const scaled = values.map((v, i) => {
    const part = values.subarray(i - (i % block), i - (i % block) + block);
    let top = part.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    const divided = compat === CPU && fourBits && part.length < block;
    if (divided) top = Math.max(top, SMALLEST);
    absmax[Math.floor(i / block)] = top;
    if (top === 0) return compat === CUDA || (compat === CPU && !fourBits) ? NaN : 0;
    return divided ? v / top : v * f32(1 / top);
  });
  return { scaled, absmax };
}

const middles = (levels) => Float32Array.from(levels.slice(1), (level, i) => f32(levels[i] + level) / 2);

/** The number of boundaries below v: a value on a boundary takes the lower level. */
const countBelow = (boundaries, v) => boundaries.reduce((count, b) => count + (b < v), 0);

/** The kernel's boundaries are decimals, four of which are the float32 before or after the middle. */
function moveToLiterals(boundaries) {
  const bits = new Int32Array(boundaries.buffer); // one bit more is the next number away from 0
  for (const [i, step] of [[0, 1], [8, 1], [12, -1], [14, -1]]) bits[i] += step;
}

/** The function from values of -1 .. 1 to their codes in a map of 256 levels. */
function codesIn8Bits(levels, compat) {
  const boundaries = middles(levels);
  const nearest = (v) => countBelow(boundaries, v);
  if (compat === CPU) {
    const bin = (v) => Math.trunc(f32(f32(f32(v + 1) * 0.5) * 65535 + 0.5)); // one rounding: a fused multiply-add
    return (v) => (Number.isNaN(v) ? 0 : nearest(f32(-1 + f32((2 * bin(v)) / 65535))));
  }
  const even = (code, v) => (v === boundaries[code] && code % 2 ? code + 1 : code);
  return compat === CUDA ? (v) => (Number.isNaN(v) ? 0 : even(nearest(v), v)) : nearest;
}

// ---- values --------------------------------------------------------------------------------------------------------

/** The weight that the parts stand for. */
export function decode(given, { block, nested_block: nestedBlock, double_quant: double, shape, dtype }) {
  const absmax = double ? decodeConstants(given, nestedBlock) : given.absmax.data;
  const { packed, codebook } = given;
  const weight = new Float32Array(shape.reduce((a, b) => a * b, 1)).map((_, i) => {
    const byte = packed.data[i >> 1];
    return codebook.data[i % 2 ? byte & 15 : byte >> 4] * absmax[Math.floor(i / block)];
  });
  return { weight: { shape, data: dtype ? weight.map((v) => rounded(v, dtype)) : weight } };
}

/** A frozen layer: y = x weightᵀ; the gradient of x, where there is one that comes in. */
export function linear({ x, g, ...parts }, { block, shape }) {
  const { weight } = decode(parts, { block, shape });
  const y = matmul(x, transpose(weight));
  return g ? { y, "grad.x": matmul(g, weight) } : { y, weight };
}

function decodeConstants({ offset, nested_codes: codes, nested_absmax: outer, nested_map: levels }, block) {
  const at = (i) => f32(levels.data[codes.data[i]] * outer.data[Math.floor(i / block)]);
  return Float32Array.from(codes.data, (_, i) => f32(at(i) + offset.data[0]));
}

/** v as the nearest number of a narrower type, of two the even one. */
function rounded(v, dtype) {
  const { digits, lowest } = { bfloat16: { digits: 8, lowest: -126 }, float16: { digits: 11, lowest: -14 } }[dtype];
  const exponent = Math.max(Math.floor(Math.log2(Math.abs(v))), lowest);
  const far = 1.5 * 2 ** (52 + exponent - digits + 1); // here float64 numbers are as far apart as v's in the type
  return v === 0 ? v : v + far - far;
}

// ---- files ---------------------------------------------------------------------------------------------------------

/** The tensors of a layer q_proj in a file of transformers with bitsandbytes. */
export function file(given, { block, double_quant: double, nested_block: nestedBlock, shape, dtype }) {
  const { packed, absmax, offset, codebook, nested_codes: codes, nested_absmax: outer, nested_map: nestedMap } = given;
  const state = { quant_type: '"nf4"', blocksize: block, dtype: `"${dtype}"`, shape: `[${shape.join(", ")}]` };
  const tensors = { weight: { shape: [packed.data.length, 1], data: packed.data }, "weight.quant_map": codebook };
  if (double) {
    Object.assign(state, { nested_blocksize: nestedBlock, nested_dtype: '"float32"' });
    state.nested_offset = pythonNumber(offset.data[0]);
    Object.assign(tensors, { "weight.absmax": codes, "weight.nested_absmax": outer });
    tensors["weight.nested_quant_map"] = nestedMap;
  } else {
    tensors["weight.absmax"] = absmax;
  }
  const members = Object.entries(state).map(([key, value]) => `"${key}": ${value}`); // spaces as json.dumps has them
  tensors["weight.quant_state.bitsandbytes__nf4"] = vector(new TextEncoder().encode(`{${members.join(", ")}}`));
  return Object.fromEntries(Object.entries(tensors).map(([name, tensor]) => [`q_proj.${name}`, tensor]));
}

/** A float as Python writes it: 1.0, 1.5e-05. */
function pythonNumber(x) {
  if (x !== 0 && (Math.abs(x) < 1e-4 || Math.abs(x) >= 1e16)) return x.toExponential().replace(/e(.)(\d)$/, "e$10$2");
  return Number.isInteger(x) ? `${x}.0` : `${x}`;
}

const vector = (data) => ({ shape: [data.length], data });
