"""CRC-32 and deflate by ISA-L or, where that is not installed, by zlib, which takes 20 times as long."""

try:
    from isal.isal_zlib import compress, crc32
except ImportError:
    from zlib import compress, crc32

__all__ = ["compress", "crc32"]
