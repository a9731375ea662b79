"""LitServe as its documentation writes a server for images: a form with a file, decoded in the worker, batches."""

import litserve
from network import arguments, network, preparation


class Classifier(litserve.LitAPI):
    """The network behind LitServe's API."""

    def setup(self, device):
        self.prepare = preparation(ARGS.runtime)
        self.run = network(ARGS.model, ARGS.runtime, ARGS.precision, ARGS.threads)

    def decode_request(self, request):
        return self.prepare(request["file"].file.read())

    def batch(self, inputs):
        return inputs

    def predict(self, batch):
        return self.run(batch)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return {"classes": output}


ARGS = arguments()
if __name__ == "__main__":
    api = Classifier(max_batch_size=ARGS.batch, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=ARGS.workers, fast_queue=True)
    server.run(host="127.0.0.1", port=ARGS.port, generate_client_file=False, log_level="warning")
