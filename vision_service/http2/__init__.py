"""HTTP/2 without TLS, as a server: frames, header fields, flow control, limits. Knows nothing of gRPC or of models."""
