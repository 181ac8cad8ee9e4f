// A program under test of `refpeft conform "node harness.mjs"`: JSON lines on stdin and stdout (see README.md).

import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { dora } from "./dora.mjs";
import { ia3 } from "./ia3.mjs";
import { lora, loraEmbedding } from "./lora.mjs";
import { asRows, transpose } from "./matrices.mjs";
import * as nf4 from "./nf4.mjs";
import { readTensors, sizeOf, writeTensors } from "./safetensors.mjs";

class NotImplemented extends Error {}

// ---- what is implemented -------------------------------------------------------------------------------------------

const PLACES = { lora: { linear: lora, conv1d: lora, embedding: loraEmbedding } };
PLACES.dora = { linear: dora, conv1d: dora };
PLACES.ia3 = { linear: ia3, conv1d: ia3 };

function outputsOf({ kind, name, at, config }, given) {
  if (kind === "method" && PLACES[name]?.[at]) return atOneLayer(PLACES[name][at], at === "conv1d", given, config);
  if (kind === "quantizer" && name === "nf4" && nf4[at]) return nf4[at](given, config);
  throw new NotImplemented(`no ${kind} ${name}${at ? ` at ${at}` : ""}`);
}

/** A method on matrices. Outputs have the shapes of the inputs that they belong to; a conv1d's weight is (in, out). */
function atOneLayer(method, transposed, given, config) {
  const matrices = {};
  for (const [name, tensor] of Object.entries(given)) matrices[name] = name === "ids" ? tensor : asRows(tensor);
  if (transposed) matrices.weight = transpose(matrices.weight);
  const outputs = method(matrices, config);
  if (transposed) outputs["merged.weight"] = transpose(outputs["merged.weight"]);
  for (const [name, tensor] of Object.entries(outputs)) {
    tensor.shape = given[name === "y" ? "g" : name.replace(/^(grad|merged)\./, "")].shape;
  }
  return outputs;
}

// ---- the protocol --------------------------------------------------------------------------------------------------

function run({ case: path, dtype, out }) {
  const vector = JSON.parse(readFileSync(path, "utf-8"));
  const tensors = readTensors(path.replace(/[^/\\]*$/, vector.tensors));
  const given = {};
  for (const name of vector.inputs) {
    const tensor = tensors[`in.${name}`];
    if (!tensor) throw new Error(`${vector.tensors} has no in.${name}`);
    const widen = dtype === "float64" && tensor.data instanceof Float32Array;
    given[name] = widen ? { shape: tensor.shape, data: Float64Array.from(tensor.data) } : tensor;
  }
  const outputs = outputsOf(vector, given);
  for (const [name, { shape, data }] of Object.entries(outputs)) {
    if (sizeOf(shape) !== data.length) throw new Error(`${name} has ${data.length} numbers for the shape [${shape}]`);
  }
  writeTensors(out, outputs);
}

function answer(request) {
  if (request.cmd === "start") return { protocol: 1, name: "javascript", version: "1", dtypes: ["float64", "float32"] };
  try {
    run(request);
    return { seq: request.seq, status: "ok" };
  } catch (error) {
    const message = error.message.replaceAll("\n", " ");
    if (error instanceof NotImplemented) return { seq: request.seq, status: "not implemented", reason: message };
    return { seq: request.seq, status: "error", message };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  if (request.cmd === "stop") break;
  process.stdout.write(`${JSON.stringify(answer(request))}\n`);
}
