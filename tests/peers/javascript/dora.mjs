// DoRA (arXiv:2402.09353): y = f(x) - x weightᵀ + m / norms · x Vᵀ, V = weight + s B A, norms those of V's rows.
// In the backward pass norms are constants (section 4.3). m and norms are (out,), A and B as in lora.mjs.

import { dropped } from "./layers.mjs";
import { scaling } from "./lora.mjs";
import { add, divide, map, matmul, multiply, scale, subtract, sumOfRows, transpose } from "./matrices.mjs";

export function dora({ weight, A, B, m, keep }, config) {
  const s = scaling(config);
  const V = add(weight, scale(matmul(B, A), s));
  const norms = map(Math.sqrt, sumOfRows(transpose(multiply(V, V))));
  const factors = divide(m, norms);
  const around = (f) => (x) => {
    const inner = f(x);
    const xd = dropped(x, keep, config.dropout);
    const z = matmul(xd, transpose(V));
    const backward = (g) => {
      const gz = multiply(g, factors);
      const gV = matmul(transpose(gz), xd);
      A.grad = scale(matmul(transpose(B), gV), s);
      B.grad = scale(matmul(gV, transpose(A)), s);
      m.grad = divide(sumOfRows(multiply(g, z)), norms);
      const gx = subtract(matmul(gz, V), matmul(g, weight));
      return add(inner.backward(g), dropped(gx, keep, config.dropout));
    };
    return { y: add(inner.y, subtract(multiply(z, factors), matmul(xd, transpose(weight)))), backward };
  };
  const added = subtract(multiply(V, transpose(factors)), weight);
  const merged = (layer) => ({ weight: add(layer.weight, added), bias: layer.bias });
  return { around, merged };
}
