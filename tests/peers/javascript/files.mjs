// An adapter as the tensors of adapter_model.safetensors, with the names that PEFT has for them.

const NAMES = { A: "lora_A.weight", B: "lora_B.weight", m: "lora_magnitude_vector", gain: "ia3_l" };

/** From tensors named <layer>.<letter>; whole layers, and biases, are trained under their own names. */
export function save(given, { targets, feedforward = [] }) {
  const file = {};
  for (const [name, { shape, data }] of Object.entries(given)) {
    const [layer, letter] = name.split(/\.(?=[^.]*$)/); // at the last dot
    const own = targets.includes(layer) ? `base_layer.${letter}` : letter;
    const column = feedforward.includes(layer) ? [1, data.length] : [data.length, 1];
    const tensor = { shape: letter === "gain" ? column : shape, data };
    file[`file.base_model.model.${layer}.${NAMES[letter] ?? own}`] = tensor;
  }
  return { ...file, count: { shape: [], data: Int32Array.of(Object.keys(file).length) } };
}
