"""The pieces <0x00> to <0xFF> that sentencepiece falls back to for characters it does not know."""

BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_BYTES = {piece: byte for byte, piece in enumerate(BYTE_PIECES)}


def byte_of_piece(piece: str) -> int | None:
    """The byte that a piece stands for, or None for a piece of text."""
    return _BYTES.get(piece)
