// DoRA (arXiv:2402.09353): y = f(x) - x weightᵀ + m / norms · x Vᵀ, V = weight + s B A, norms those of V's rows.
// In the backward pass norms are constants (section 4.3). Shapes as in lora.mjs; m and norms are (out,).

import { dropped, frozen, scaling } from "./lora.mjs";
import { add, divide, map, matmul, multiply, scale, subtract, sumOfRows, transpose } from "./matrices.mjs";

export function dora({ x, weight, bias, A, B, m, keep, g }, config) {
  const s = scaling(config);
  const V = add(weight, scale(matmul(B, A), s));
  const norms = map(Math.sqrt, sumOfRows(transpose(multiply(V, V))));
  const factors = divide(m, norms);
  const xd = dropped(x, keep, config.dropout);
  const z = matmul(xd, transpose(V));
  const gz = multiply(g, factors);
  const gV = matmul(transpose(gz), xd);
  const gx = subtract(matmul(gz, V), matmul(g, weight));
  return {
    y: add(frozen(x, weight, bias), subtract(multiply(z, factors), matmul(xd, transpose(weight)))),
    "grad.x": add(matmul(g, weight), dropped(gx, keep, config.dropout)),
    "grad.A": scale(matmul(transpose(B), gV), s),
    "grad.B": scale(matmul(gV, transpose(A)), s),
    "grad.m": divide(sumOfRows(multiply(g, z)), norms),
    "merged.weight": multiply(V, transpose(factors)),
  };
}
