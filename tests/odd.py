"""Pictures and masks as people have them, made on the spot: odd metadata around good pixels, masks of many kinds."""

import io
import random
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TAGS = [0x1, 0x100, 0x103, 0x10E, 0x10F, 0x111, 0x112, 0x117, 0x11A, 0x11B, 0x128, 0x132, 0x14A, 0x201, 0x2BC, 0x829A]
TAGS += [0x8769, 0x8825, 0x9286, 0x927C, 0xA005]  # of EXIF
SEGMENTS = [b"JFIF\0", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0", b"ICC_PROFILE\0\1\1", b"MPF\0II*\0\x08\0\0\0", b"Adobe"]
SEGMENTS += [b"Photoshop 3.0\x008BIM", b"http://ns.adobe.com/xap/1.0/\0", b""]  # how a JPEG's begin
CHUNKS = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"sRGB", b"cHRM", b"pHYs", b"tIME", b"acTL", b"caBX"]
TURN = (0x112, 3, 1, struct.pack("<HH", 6, 0))  # an EXIF entry: a quarter clockwise


def photo(width=32, height=24, seed=0) -> Image.Image:
    """A smooth picture of random colours, RGB."""
    small = np.random.default_rng(seed).integers(8, 248, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def region(width=32, height=24) -> np.ndarray:
    """HxW bool: a rectangle that every turn would move."""
    mask = np.zeros((height, width), bool)
    mask[height // 8 : height // 2, width // 8 : width * 5 // 8] = True
    return mask


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def layers(colours, alpha: np.ndarray) -> Image.Image:
    """RGBA of HxWx3 colours (or one for all) and an HxW bool or uint8 alpha."""
    alpha = alpha.astype(np.uint8) * 255 if alpha.dtype == bool else alpha
    return Image.fromarray(np.dstack([np.broadcast_to(colours, (*alpha.shape, 3)), alpha]).astype(np.uint8))


def exif(*entries, order="<", tail=b"") -> bytes:
    """An EXIF block of raw entries (tag, type, count, four bytes)."""
    body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    head = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + head + struct.pack(order + "IH", 8, len(entries)) + body + bytes(4) + tail


def segment(number: int, data: bytes) -> bytes:
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(data) + 2) + data


def jpeg_with(*segments: bytes, image=None) -> bytes:
    data = encoded(image or photo(), "JPEG", quality=95)
    return data[:2] + b"".join(segments) + data[2:]


def chunk(name: bytes, data: bytes, damage: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ damage)


def png_with(*chunks: bytes, image=None) -> bytes:
    data = encoded(image or photo())
    return data[:33] + b"".join(chunks) + data[33:]


def tiff_with(*entries, image=None) -> bytes:
    """A plain RGB TIFF with raw entries more."""
    image = image or photo()
    data, (width, height) = image.tobytes(), image.size
    own = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 1, 8), (262, 3, 1, 2), (273, 4, 1, 0), (277, 3, 1, 3)]
    own += [(278, 3, 1, height), (279, 4, 1, len(data))]
    entries = sorted([*((*e[:3], struct.pack("<I", e[3])) for e in own), *entries], key=lambda e: e[0])
    start = 14 + 12 * len(entries)
    entries = [(273, 4, 1, struct.pack("<I", start)) if e[:3] == (273, 4, 1) else e for e in entries]
    body = b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + data


def random_exif(draw: random.Random, order: str = "<") -> list:
    """Up to five entries of random tags, types, counts and values."""
    entries = [(0x112, 3, 1, struct.pack(order + "HH", draw.choice([1, 3, 6, 8]), 0))] if draw.random() < 0.5 else []
    for _ in range(draw.randint(0, 5)):
        value = draw.randbytes(4) if draw.random() < 0.6 else struct.pack(order + "I", draw.choice([8, 26, 40, 999]))
        entries.append((draw.choice(TAGS), draw.randint(0, 13), draw.choice([0, 1, 1, 2, 4, 1000]), value))
    return entries


def odd_picture(seed: int, side: int = 24) -> tuple[str, bytes]:
    """(name, file) of a square picture whose pixels are whole, with random EXIF, segments, chunks or profiles."""
    draw, image = random.Random(seed), photo(side, side, seed % 7)
    kind, order = draw.choice(["jpg", "png", "tif", "webp"]), draw.choice("<>")
    block = exif(*random_exif(draw, order), order=order, tail=draw.randbytes(40))
    block = draw.choice([block, block[:20], b"Exif\0\0no tiff header", draw.randbytes(30)])
    profile = draw.choice([SRGB, SRGB * 2, SRGB[:200], b"abc"])
    if kind == "jpg":
        parts = [segment(1, block), segment(2, b"ICC_PROFILE\0\1" + bytes([draw.choice([1, 1, 2])]) + profile)]
        parts += [segment(draw.choice([0, 1, 2, 13, 14]), draw.choice(SEGMENTS) + draw.randbytes(12)) for _ in "12"]
        return f"odd{seed}.jpg", jpeg_with(*draw.sample(parts, draw.randint(1, 4)), image=image)
    if kind == "png":
        texts = [b"", b"x\0\0", b"x\0\0" + zlib.compress(bytes(1_500_000)), draw.randbytes(9)]
        parts = [chunk(b"eXIf", block[6:]), chunk(b"iCCP", b"x\0\0" + zlib.compress(profile))]
        parts += [chunk(draw.choice(CHUNKS), draw.choice(texts), draw.choice([0, 0, 1])) for _ in "12"]
        return f"odd{seed}.png", png_with(*draw.sample(parts, draw.randint(1, 4)), image=image)
    if kind == "webp":
        return f"odd{seed}.webp", encoded(image, "WEBP", lossless=True, exif=block, icc_profile=profile)
    own = {256, 257, 273, 0x103, 0x117}
    return f"odd{seed}.tif", tiff_with(*(e for e in random_exif(draw) if e[0] not in own), image=image)
