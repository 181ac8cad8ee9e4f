// A layer is a function of x, whose rows are tokens, that gives {y, backward}. backward(g), with the gradient of y,
// gives that of x, and leaves those of trained tensors as their `grad`.
//
// A method is a function of its tensors and config that gives {around, merged}: around(f) is the layer that it makes of
// a layer f, merged({weight, bias}) the weight and bias of one linear layer that computes the same.

import { add, map, matmul, take, transpose } from "./matrices.mjs";

/** f(x) = x weightᵀ + bias, frozen; weight is (out, in). */
export const linear = ({ weight, bias }) => (x) => {
  const y = matmul(x, transpose(weight));
  return { y: bias ? add(y, bias) : y, backward: (g) => matmul(g, weight) };
};

/** f(ids) = weight[ids], frozen; weight is (vocab, dim). */
export const embedding = ({ weight }) => (ids) => ({ y: take(weight, ids.data), backward: () => null });

/** x, or a gradient of it, behind dropout with the mask `keep`; without a mask x itself. */
export const dropped = (x, keep, rate) => (keep ? map((v, k) => (v * k) / (1 - rate), x, keep) : x);
