"""Ray Serve as its documentation writes a server for images: the request's body, and `serve.batch`."""

import logging
import time

import ray
from network import arguments, network, preparation
from ray import serve
from starlette.requests import Request

ARGS = arguments()


@serve.deployment(max_ongoing_requests=128)
class Classifier:
    """The network in a replica."""

    def __init__(self, model, runtime, precision, threads):
        self.prepare = preparation(runtime)
        self.run = network(model, runtime, precision, threads)

    @serve.batch(max_batch_size=ARGS.batch, batch_wait_timeout_s=0.005)
    async def classify(self, bodies):
        return self.run([self.prepare(body) for body in bodies])

    async def __call__(self, request: Request):
        return {"classes": await self.classify(await request.body())}


if __name__ == "__main__":
    # A cluster of its own, whatever else runs here.
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": ARGS.port}, logging_config={"enable_access_log": False})
    options = {"num_replicas": ARGS.workers, "ray_actor_options": {"num_cpus": 1 / ARGS.workers}}
    serve.run(Classifier.options(**options).bind(ARGS.model, ARGS.runtime, ARGS.precision, ARGS.threads))
    while True:
        time.sleep(3600)
