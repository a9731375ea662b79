"""Mosec as its documentation writes a server for images: processes that prepare, a process that runs batches."""

import os
import sys

from mosec import Server, Worker
from network import arguments, network, preparation

ARGS = arguments()


class Prepare(Worker):
    """Decodes and resizes one image."""

    def __init__(self):
        self.prepare = preparation(ARGS.runtime)

    def deserialize(self, data):
        return data  # the body is the JPEG itself

    def forward(self, data):
        return self.prepare(data)


class Infer(Worker):
    """Runs the network on a batch."""

    def __init__(self):
        self.run = network(ARGS.model, ARGS.runtime, ARGS.precision, ARGS.threads)

    def forward(self, data):
        return [{"classes": classes} for classes in self.run(data)]


if __name__ == "__main__":
    # Its own options come from the command line or from the environment; the command line is ours. Its workers are new
    # interpreters that find neither, which is why `arguments` leaves ours in the environment.
    sys.argv = sys.argv[:1]
    os.environ |= {"MOSEC_PORT": str(ARGS.port), "MOSEC_ADDRESS": "127.0.0.1", "MOSEC_TIMEOUT": "30000"}
    server = Server()
    server.append_worker(Prepare, num=2)
    server.append_worker(Infer, num=ARGS.workers, max_batch_size=ARGS.batch, max_wait_time=5)
    server.run()
