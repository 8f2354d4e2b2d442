// Runs the model in a separate thread: with one thread each, onnxruntime-web needs no special headers.
let session, ort;

self.onmessage = async ({ data }) => {
  try {
    if (data.model) {
      ort = await import(data.runtime);
      ort.env.wasm.numThreads = 1;
      ort.env.wasm.wasmBinary = data.wasm;
      session = await ort.InferenceSession.create(new Uint8Array(data.model));
      self.postMessage({ id: data.id });
    } else {
      const began = performance.now();
      const image = new ort.Tensor("uint8", data.pixels, [1, data.height, data.width, 3]);
      const { logits, influence } = await session.run({ image });
      const map = influence && { values: influence.data, rows: influence.dims[1], columns: influence.dims[2] };
      self.postMessage({ id: data.id, logits: logits.data, map, milliseconds: performance.now() - began });
    }
  } catch (error) {
    self.postMessage({ id: data.id, error: String(error && error.message || error) });
  }
};
