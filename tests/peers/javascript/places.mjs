// Where a method's case is: from the case's tensors, as matrices, to {y, merged, alone, restored}, as far as it asks.

import { dora } from "./dora.mjs";
import { ia3 } from "./ia3.mjs";
import { embedding, linear } from "./layers.mjs";
import { lora, loraOfEmbedding } from "./lora.mjs";
import { add, scale, transpose } from "./matrices.mjs";

export class NotImplemented extends Error {}

const METHODS = { lora, dora, ia3 };

const methodOf = (name) => {
  if (METHODS[name]) return METHODS[name];
  throw new NotImplemented(`no method ${name}`);
};

export const places = {
  linear: ({ name, config }, t) => computed(methodOf(name)(t, config), linear(t), t),

  /** A linear layer whose weight is (in, out). */
  conv1d(vector, t) {
    const { y, merged } = places.linear(vector, { ...t, weight: transpose(t.weight) });
    return { y, merged: { ...merged, weight: transpose(merged.weight) } };
  },

  embedding({ name, config }, t) {
    if (name !== "lora") throw new NotImplemented(`no ${name} at an embedding`);
    return computed(loraOfEmbedding(t, config), embedding(t), t);
  },

  /** Two methods, the second around the first. */
  two({ config }, t) {
    const [first, second] = ["first", "second"].map((each) => {
      const { weight, bias } = t;
      return methodOf(config[each].method)({ weight, bias, ...tensorsOf(t, each) }, config[each]);
    });
    const f = linear(t);
    const around = (layer) => second.around(first.around(layer));
    const merged = (layer) => second.merged(first.merged(layer));
    const alone = { first: first.around(f)(t.x).y, second: second.around(f)(t.x).y };
    return { ...computed({ around, merged }, f, t), alone };
  },

  /** Merged, and taken apart again: the frozen weight was kept. */
  restored(vector, t) {
    const found = places[vector.config.conv1d ? "conv1d" : "linear"](vector, t);
    return { ...found, restored: { weight: t.weight, bias: t.bias } };
  },

  /** Several adapters of one method put together with weights. */
  combined({ name, config }, t) {
    const { weights, ...adapters } = config;
    const all = Object.keys(adapters).map((each) => tensorsOf(t, each));
    if (name === "ia3") {
      const gain = all.map((tensors, i) => scale(tensors.gain, weights[i])).reduce(add);
      return computed(ia3({ gain }, adapters.first), linear(t), t);
    }
    if (name !== "lora") throw new NotImplemented(`no ${name} put together`);
    const loras = Object.values(adapters).map((c, i) => lora(all[i], { ...c, alpha: c.alpha * weights[i] }));
    const around = (f) => loras.reduce((layer, each) => each.around(layer), f);
    const merged = (layer) => loras.reduce((before, each) => each.merged(before), layer);
    return computed({ around, merged }, linear(t), t);
  },
};

/** What a method makes of a layer f; the gradients too, where there is one, g, that comes in. */
function computed(method, f, t) {
  const input = t.x ?? t.ids;
  const { y, backward } = method.around(f)(input);
  if (t.g) input.grad = backward(t.g);
  return { y, merged: method.merged({ weight: t.weight, bias: t.bias }) };
}

/** The tensors first.A, first.B, ... as A, B, ... */
function tensorsOf(t, adapter) {
  const own = Object.entries(t).filter(([name]) => name.startsWith(`${adapter}.`));
  return Object.fromEntries(own.map(([name, tensor]) => [name.slice(adapter.length + 1), tensor]));
}
