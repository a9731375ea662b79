// Run the original ESRGAN-slim in TensorFlow.js: node reference_esrgan.mjs MODEL_FOLDER INPUT.json OUTPUT.json
//
// Needs `npm install @tensorflow/tfjs` in a folder of its own, with this file copied there. INPUT.json holds
// {height, width, pixels}: RGB in 0..255, row by row. OUTPUT.json gets the same fields for the result, not rounded.
import * as tf from "@tensorflow/tfjs";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const [folder, inputFile, outputFile] = process.argv.slice(2);
const model = JSON.parse(readFileSync(join(folder, "model.json"), "utf8"));
const [group] = model.weightsManifest;
const bytes = Buffer.concat(group.paths.map((path) => readFileSync(join(folder, path))));
await tf.setBackend("cpu");
const network = await tf.loadLayersModel(
  tf.io.fromMemory({
    modelTopology: model.modelTopology,
    weightSpecs: group.weights,
    weightData: bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength),
  }),
);
const { height, width, pixels } = JSON.parse(readFileSync(inputFile, "utf8"));
const output = network.predict(tf.tensor4d(pixels, [1, height, width, 3]));
const [, outputHeight, outputWidth] = output.shape;
writeFileSync(
  outputFile,
  JSON.stringify({ height: outputHeight, width: outputWidth, pixels: Array.from(output.dataSync()) }),
);
