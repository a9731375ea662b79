"""Photos in; classes, boxes, masks and images out, over gRPC or in process."""

__version__ = "0.1.0"
