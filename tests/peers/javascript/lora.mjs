// LoRA (arXiv:2106.09685): y = f(x) + s B A x, with f(x) = x weightᵀ + bias frozen.
// Rows of x are tokens; weight is (out, in), A (r, in), B (out, r). g is the gradient that comes in.

import { add, map, matmul, matrix, scale, take, transpose } from "./matrices.mjs";

export const scaling = ({ alpha, r, rslora }) => alpha / (rslora ? Math.sqrt(r) : r);

/** What x, or its gradient, is behind dropout with the mask `keep`; without a mask itself. */
export const dropped = (x, keep, rate) => (keep ? map((v, k) => (v * k) / (1 - rate), x, keep) : x);

export const frozen = (x, weight, bias) => {
  const y = matmul(x, transpose(weight));
  return bias ? add(y, bias) : y;
};

export function lora({ x, weight, bias, A, B, keep, g }, config) {
  const s = scaling(config);
  const xd = dropped(x, keep, config.dropout);
  const u = matmul(xd, transpose(A));
  const gu = scale(matmul(g, B), s);
  return {
    y: add(frozen(x, weight, bias), scale(matmul(u, transpose(B)), s)),
    "grad.x": add(matmul(g, weight), dropped(matmul(gu, A), keep, config.dropout)),
    "grad.A": matmul(transpose(gu), xd),
    "grad.B": scale(matmul(transpose(g), u), s),
    "merged.weight": add(weight, scale(matmul(B, A), s)),
  };
}

/** An embedding: y = weight[ids] + s (B A)ᵀ[ids]; weight is (vocab, dim), A (r, vocab), B (dim, r). */
export function loraEmbedding({ ids, weight, A, B, g }, config) {
  const s = scaling(config);
  const u = take(transpose(A), ids.data);
  const gu = scale(matmul(g, B), s);
  const gradA = matrix(...A.shape, new A.data.constructor(A.data.length));
  ids.data.forEach((id, row) => {
    for (let k = 0; k < A.shape[0]; k++) gradA.data[k * A.shape[1] + id] += gu.data[row * A.shape[0] + k];
  });
  return {
    y: add(take(weight, ids.data), scale(matmul(u, transpose(B)), s)),
    "grad.A": gradA,
    "grad.B": scale(matmul(transpose(g), u), s),
    "merged.weight": add(weight, scale(transpose(matmul(B, A)), s)),
  };
}
