// LoRA (arXiv:2106.09685): y = f(x) + s B A x. A is (r, in), B (out, r).

import { dropped } from "./layers.mjs";
import { add, matmul, matrix, scale, take, transpose } from "./matrices.mjs";

export const scaling = ({ alpha, r, rslora }) => alpha / (rslora ? Math.sqrt(r) : r);

export function lora({ A, B, keep }, config) {
  const s = scaling(config);
  const around = (f) => (x) => {
    const inner = f(x);
    const xd = dropped(x, keep, config.dropout);
    const u = matmul(xd, transpose(A));
    const backward = (g) => {
      const gu = scale(matmul(g, B), s);
      A.grad = matmul(transpose(gu), xd);
      B.grad = scale(matmul(transpose(g), u), s);
      return add(inner.backward(g), dropped(matmul(gu, A), keep, config.dropout));
    };
    return { y: add(inner.y, scale(matmul(u, transpose(B)), s)), backward };
  };
  const merged = ({ weight, bias }) => ({ weight: add(weight, scale(matmul(B, A), s)), bias });
  return { around, merged };
}

/** At an embedding: y = f(ids) + s (B A)ᵀ[ids]. A is (r, vocab), B (dim, r). */
export function loraOfEmbedding({ A, B }, config) {
  const s = scaling(config);
  const around = (f) => (ids) => {
    const u = take(transpose(A), ids.data);
    const backward = (g) => {
      const gu = scale(matmul(g, B), s);
      A.grad = transpose(addedAt(ids.data, gu, A.shape[1]));
      B.grad = scale(matmul(transpose(g), u), s);
    };
    return { y: add(f(ids).y, scale(matmul(u, transpose(B)), s)), backward };
  };
  const merged = ({ weight }) => ({ weight: add(weight, scale(transpose(matmul(B, A)), s)) });
  return { around, merged };
}

/** A matrix whose row ids[i] is the sum of these rows i of a. */
function addedAt(ids, a, rows) {
  const columns = a.shape[1];
  const out = matrix(rows, columns, new a.data.constructor(rows * columns));
  ids.forEach((id, i) => {
    for (let j = 0; j < columns; j++) out.data[id * columns + j] += a.data[i * columns + j];
  });
  return out;
}
