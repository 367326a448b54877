"""Small files of text with a checksum in their last line, so that no changed or missing byte of them goes unnoticed."""

import google_crc32c

_SEAL = "\ncrc32c {:08x}\n"
_LENGTH = len(_SEAL.format(0))


def seal(body: bytes) -> bytes:
    """The content of a file with this body."""
    return body + _SEAL.format(google_crc32c.value(body)).encode()


def unseal(content: bytes) -> bytes:
    """The body of a file with this content.

    Raises:
        ValueError: it is not what `seal` made.
    """
    body = content[:-_LENGTH]
    if content != seal(body):
        raise ValueError("it is not as it was written: the checksum is another")
    return body
