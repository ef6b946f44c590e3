"""The wire: generated messages (`v1`), tensor framing, bounded decompression, signed gRPC."""
