"""gRPC's server side over `vision_service.http2`, on one event loop, with the interface of `grpc.aio.server`."""
