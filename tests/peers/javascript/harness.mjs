// A program under test of `refpeft conform "node harness.mjs"`: JSON lines on stdin and stdout (see README.md).

import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { save } from "./files.mjs";
import { asRows } from "./matrices.mjs";
import * as nf4 from "./nf4.mjs";
import { NotImplemented, places } from "./places.mjs";
import { readTensors, sizeOf, writeTensors } from "./safetensors.mjs";

// ---- what is implemented -------------------------------------------------------------------------------------------

function outputsOf(vector, given) {
  const { kind, name, at, config } = vector;
  if (kind === "method" && places[at]) return ofMethod(vector, given);
  if (["lora", "dora", "ia3"].includes(name) && at === "save") return save(given, config);
  if (kind === "quantizer" && name === "nf4" && nf4[at]) return nf4[at](given, config);
  throw new NotImplemented(`no ${kind} ${name}${at ? ` at ${at}` : ""}`);
}

/** The outputs that a case asks for. Methods compute with matrices; outputs have the shapes of what they belong to. */
function ofMethod(vector, given) {
  const t = {};
  for (const [name, tensor] of Object.entries(given)) t[name] = name === "ids" ? tensor : asRows(tensor);
  const found = places[vector.at](vector, t);
  const tokens = given.ids?.shape ?? given.x.shape.slice(0, -1);
  const outputs = {};
  for (const output of Object.keys(vector.checks)) {
    const [what, ...rest] = output.split(".");
    const of = rest.join(".");
    const { data } = what === "grad" ? t[of].grad : of ? found[what][of] : found[what];
    const perToken = what === "y" || what === "alone";
    outputs[output] = { shape: perToken ? [...tokens, data.length / sizeOf(tokens)] : given[of].shape, data };
  }
  return outputs;
}

// ---- the protocol --------------------------------------------------------------------------------------------------

const MEMBERS = "id kind name at level comment flags spec config inputs checks tensors source".split(" ");

function run({ case: path, dtype, out }) {
  const vector = JSON.parse(readFileSync(path, "utf-8"));
  const unknown = Object.keys(vector).find((member) => !MEMBERS.includes(member));
  if (unknown) throw new Error(`${path}: ${unknown} is no member of a case of this format`);
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
