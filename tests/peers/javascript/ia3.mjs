// IA³ (arXiv:2205.05638): gain f(x), or f(gain x) at layers of the feed-forward part.

import { multiply, sumOfRows, transpose } from "./matrices.mjs";

export const ia3 = ({ gain }, { feedforward }) => (feedforward ? ofInputs(gain) : ofOutputs(gain));

function ofOutputs(gain) {
  const around = (f) => (x) => {
    const inner = f(x);
    const backward = (g) => {
      gain.grad = sumOfRows(multiply(g, inner.y));
      return inner.backward(multiply(g, gain));
    };
    return { y: multiply(inner.y, gain), backward };
  };
  const merged = ({ weight, bias }) => ({
    weight: multiply(weight, transpose(gain)),
    bias: bias && multiply(bias, gain),
  });
  return { around, merged };
}

function ofInputs(gain) {
  const around = (f) => (x) => {
    const inner = f(multiply(x, gain));
    const backward = (g) => {
      const gx = inner.backward(g);
      gain.grad = sumOfRows(multiply(gx, x));
      return multiply(gx, gain);
    };
    return { y: inner.y, backward };
  };
  const merged = ({ weight, bias }) => ({ weight: multiply(weight, gain), bias });
  return { around, merged };
}
