"""The one place where compressed bytes are opened: zstandard under a hard cap.

In: bytes from anybody, and the most the caller is willing to hold. Out: the content of exactly
one zstandard frame (RFC 8878), or a CodecError. Memory stays at the cap plus a constant; a frame
that is cut short can cost twice the cap until it is refused (measured).

Never: trusts a size it has not compared with the cap, decodes frames that do not state their
size, skips over bytes, uses dictionaries, or vouches for the content (callers that need
integrity carry a checksum of their own).

Why a wrapper: python-zstandard 0.25 ignores `max_output_size` once the frame declares a size
(32 KiB became 1 GiB under a 1 MiB limit). So the declared size is read first and refused beyond
the cap. What remains is decoded in one pass straight into a buffer of that size: libzstd stops at
its end, whatever the blocks hold, and a whole frame needs no window. This is tighter than
streaming, where a window of the sender's choice always comes on top of the output.
"""

from __future__ import annotations

import zstandard

from swarm.errors import CodecError, FrameTooLarge

DEFAULT_LEVEL = 3
_MAGIC = b"\x28\xb5\x2f\xfd"
_MIN_WINDOW_BYTES = 1024
"""The smallest window a frame can declare (RFC 8878, 3.1.1.1.2)."""
_MAX_EMPTY_FRAME_BYTES = 32
"""Header, one empty block and a checksum take at most 25."""


def compress(data: bytes | memoryview, level: int = DEFAULT_LEVEL) -> bytes:
    """One zstandard frame of `data` that declares its size and carries no checksum."""
    # Contexts are cheap to make and not thread-safe to share.
    return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(data)


def decompress(data: bytes | memoryview, *, limit_bytes: int) -> bytes:
    """The content of `data`, which must be one whole zstandard frame and nothing else.

    Raises FrameTooLarge if the frame declares more than `limit_bytes`, or a window beyond it;
    CodecError if it is no frame, does not declare its size, is cut short, holds more or less than
    it declares, or is followed by anything.
    """
    if bytes(data[:4]) != _MAGIC:
        raise CodecError("compressed data does not start with a zstandard frame")
    try:
        header = zstandard.get_frame_parameters(data)
        if header.content_size == zstandard.CONTENTSIZE_UNKNOWN:
            raise CodecError("a compressed frame does not declare its size")
        if header.content_size > limit_bytes:
            raise FrameTooLarge(
                f"a compressed frame declares {header.content_size} bytes where at most {limit_bytes} are allowed"
            )
        window_cap_bytes = max(limit_bytes, _MIN_WINDOW_BYTES)
        if header.window_size > window_cap_bytes:
            raise FrameTooLarge(
                f"a compressed frame asks for a window of {header.window_size} bytes "
                f"where at most {window_cap_bytes} are allowed"
            )
        decompressor = zstandard.ZstdDecompressor(max_window_size=window_cap_bytes)
        if header.content_size == 0:
            return _decompress_empty(decompressor, data)
        content = decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"compressed data is damaged, cut short or has something after it: {error}") from error
    if len(content) != header.content_size:
        raise CodecError(f"a compressed frame declares {header.content_size} bytes and holds {len(content)}")
    return content


def _decompress_empty(decompressor: zstandard.ZstdDecompressor, data: bytes | memoryview) -> bytes:
    """A frame that declares nothing; the one-shot call would answer b"" without looking at the rest."""
    if len(data) > _MAX_EMPTY_FRAME_BYTES:
        raise CodecError("a compressed frame declares 0 bytes and holds more, or has something after it")
    # So few bytes hold at most seven blocks of 128 KiB: a constant, though decompressobj has no cap.
    stream = decompressor.decompressobj()
    if stream.decompress(data) or not stream.eof or stream.unused_data:
        raise CodecError("a compressed frame declares 0 bytes and is cut short, holds more or has something after it")
    return b""
