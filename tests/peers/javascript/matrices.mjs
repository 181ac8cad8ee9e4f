// A matrix is {shape: [rows, columns], data}, its data row by row in a Float64Array or a Float32Array. Storing a number
// in one of these rounds it, so that the same code computes in either precision. A vector is a matrix of one row.

export const matrix = (rows, columns, data) => ({ shape: [rows, columns], data });

/** The same numbers as a matrix whose rows are the last axis. */
export function asRows({ shape, data }) {
  const columns = shape.at(-1);
  return matrix(data.length / columns, columns, data);
}

/** f of the elements of a; of several matrices, where those of one row or one column are used again and again. */
export function map(f, a, ...others) {
  const [rows, columns] = a.shape;
  const at = ({ shape, data }, i, j) => data[(shape[0] === 1 ? 0 : i) * shape[1] + (shape[1] === 1 ? 0 : j)];
  const out = matrix(rows, columns, new a.data.constructor(a.data.length));
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      out.data[i * columns + j] = f(at(a, i, j), ...others.map((other) => at(other, i, j)));
    }
  }
  return out;
}

export const add = (a, b) => map((x, y) => x + y, a, b);
export const subtract = (a, b) => map((x, y) => x - y, a, b);
export const multiply = (a, b) => map((x, y) => x * y, a, b);
export const divide = (a, b) => map((x, y) => x / y, a, b);
export const scale = (a, factor) => map((x) => x * factor, a);

export function transpose({ shape: [rows, columns], data }) {
  return matrix(columns, rows, data.map((_, i) => data[(i % rows) * columns + Math.floor(i / rows)]));
}

export function matmul(a, b) {
  const [rows, inner] = a.shape;
  const columns = b.shape[1];
  if (inner !== b.shape[0]) throw new Error(`a matrix [${a.shape}] times one of [${b.shape}]`);
  const out = matrix(rows, columns, new a.data.constructor(rows * columns));
  for (let i = 0; i < rows; i++) {
    for (let k = 0; k < inner; k++) {
      for (let j = 0; j < columns; j++) {
        out.data[i * columns + j] += a.data[i * inner + k] * b.data[k * columns + j];
      }
    }
  }
  return out;
}

/** The sums over the rows: a vector with an element for each column. */
export function sumOfRows(a) {
  const ones = matrix(1, a.shape[0], new a.data.constructor(a.shape[0]).fill(1));
  return matmul(ones, a);
}

/** The rows of a with these numbers. */
export function take(a, ids) {
  const columns = a.shape[1];
  const data = new a.data.constructor(ids.length * columns);
  ids.forEach((id, i) => data.set(a.data.subarray(id * columns, (id + 1) * columns), i * columns));
  return matrix(ids.length, columns, data);
}
