// IA³ (arXiv:2205.05638): gain f(x), or f(gain x) at layers of the feed-forward part.

import { frozen } from "./lora.mjs";
import { matmul, multiply, sumOfRows, transpose } from "./matrices.mjs";

export const ia3 = (given, { feedforward }) => (feedforward ? atInputs(given) : atOutputs(given));

function atOutputs({ x, weight, bias, gain, g }) {
  const h = frozen(x, weight, bias);
  return {
    y: multiply(h, gain),
    "grad.x": matmul(multiply(g, gain), weight),
    "grad.gain": sumOfRows(multiply(g, h)),
    "merged.weight": multiply(weight, transpose(gain)),
    ...(bias && { "merged.bias": multiply(bias, gain) }),
  };
}

function atInputs({ x, weight, bias, gain, g }) {
  const gx = matmul(g, weight);
  return {
    y: frozen(multiply(x, gain), weight, bias),
    "grad.x": multiply(gx, gain),
    "grad.gain": sumOfRows(multiply(gx, x)),
    "merged.weight": multiply(weight, gain),
  };
}
