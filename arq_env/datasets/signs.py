"""Signs: 32x32 RGB traffic signs, rendered procedurally, so that everything runs without a download.

Ten classes that share shapes and colours, seen in random pose, light, blur and clutter, partly hidden. Only additions,
products, quotients, square roots and comparisons are used: those are rounded alike on every processor, so a
seed gives the same bytes everywhere.
"""

import numpy as np

from arq_env.datasets.cache import cache_folder, read_arrays, write_arrays

SIZES = {"train": 20_000, "test": 2_000}
#: Change it with anything that changes a pixel: it names the cached file.
VERSION = 1
SIZE = 32
SHAPE = (3, SIZE, SIZE)
CHUNK = 500  # images rendered at a time, which bounds the memory

RED, WHITE, BLUE, BLACK = (0.75, 0.08, 0.10), (0.92, 0.92, 0.90), (0.08, 0.25, 0.70), (0.08, 0.08, 0.08)


# Shapes and pictograms are functions of sign coordinates u (right) and v (down), arrays in about [-1, 1]: the signed
# distance to the edge, positive inside.
def _disc(u, v):
    return 1 - np.sqrt(u * u + v * v)


def _octagon(u, v):
    a, b = np.abs(u), np.abs(v)
    return 0.95 - np.maximum(np.maximum(a, b), (a + b) * np.float32(0.70710678))


def _triangle(u, v):
    return np.minimum(0.62 - v, 0.5 * v + 0.62 - 0.8660254 * np.abs(u))


def _triangle_down(u, v):
    return _triangle(u, -v)


def _box(u, v, x, y, half_width, half_height):
    return np.minimum(half_width - np.abs(u - x), half_height - np.abs(v - y))


def _union(*parts):
    out = parts[0]
    for part in parts[1:]:
        out = np.maximum(out, part)
    return out


def _three_bars(u, v):
    return _union(*(_box(u, v, x, 0, 0.11, 0.34) for x in (-0.45, 0, 0.45)))


def _bar(u, v):
    return _box(u, v, 0, 0, 0.62, 0.17)


def _digits(u, v):
    ring = 0.13 - np.abs(np.sqrt((u - 0.28) * (u - 0.28) + v * v) - 0.2)
    return _union(ring, _box(u, v, -0.28, 0, 0.10, 0.36))


def _slash(u, v):
    return _box((u + v) * 0.70710678, (u - v) * 0.70710678, 0, 0, 0.13, 0.62)


def _exclamation(u, v):
    return _union(_box(u, v, 0, -0.1, 0.09, 0.26), _box(u, v, 0, 0.34, 0.09, 0.08))


def _cross(u, v):
    return _union(_box(u, v, 0, 0.12, 0.09, 0.34), _box(u, v, 0, 0.12, 0.32, 0.09))


def _arrow_up(u, v):
    head = np.minimum(v + 0.62, 0.05 - v) - 0.7 * np.abs(u)
    return _union(_box(u, v, 0, 0.2, 0.12, 0.42), np.minimum(head, 0.05 - v))


def _arrow_right(u, v):
    return _arrow_up(v, -u)


#: name: (shape, rim, field, pictogram, its colour)
SIGNS = {
    "stop": (_octagon, WHITE, RED, _three_bars, WHITE),
    "no entry": (_disc, RED, RED, _bar, WHITE),
    "no vehicles": (_disc, RED, WHITE, None, BLACK),
    "speed limit": (_disc, RED, WHITE, _digits, BLACK),
    "no turning": (_disc, RED, WHITE, _slash, BLACK),
    "yield": (_triangle_down, RED, WHITE, None, BLACK),
    "danger": (_triangle, RED, WHITE, _exclamation, BLACK),
    "crossroads": (_triangle, RED, WHITE, _cross, BLACK),
    "straight ahead": (_disc, WHITE, BLUE, _arrow_up, WHITE),
    "turn right": (_disc, WHITE, BLUE, _arrow_right, WHITE),
}
CLASSES = tuple(SIGNS)


def load_arrays() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return ``{"train": (images, labels), "test": (images, labels)}``, rendered once into :func:`cache_folder`.

    images: uint8 [n, 32, 32, 3]; labels: int64 [n].

    :raises ArqError: when the cached file cannot be written or read
    """
    path = cache_folder() / f"signs-{VERSION}.npz"
    if not path.exists():
        write_arrays(path, {split: render(n, seed) for seed, (split, n) in enumerate(SIZES.items())})
    return read_arrays(path)


def render(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Render ``n`` signs, the classes equally often and in random order.

    :return: images uint8 [n, 32, 32, 3], labels int64 [n]
    """
    rng = np.random.default_rng([VERSION, seed])
    labels = rng.permutation(np.arange(n) % len(SIGNS))
    images = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for start in range(0, n, CHUNK):
        chosen = labels[start : start + CHUNK]
        canvas = _background(len(chosen), rng)
        canvas = _paint_signs(canvas, chosen, rng)
        canvas = _occlude(canvas, rng)
        canvas = _blur(_light(canvas, rng), rng)
        images[start : start + CHUNK] = np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)
    return images, labels.astype(np.int64)


def _uniform(rng, low, high, *shape):
    """Draws that broadcast over pixels: [n, 1, 1] or [n, 1, 1, 3]."""
    return rng.uniform(low, high, shape).astype(np.float32)


def _pixels():
    """Pixel centres x [1, 1, SIZE] and y [1, SIZE, 1]."""
    centres = np.arange(SIZE, dtype=np.float32) + 0.5
    return centres[None, None, :], centres[None, :, None]


def _over(canvas, coverage, colour):
    """Blend ``colour`` ([n, 1, 1, 3] or [3]) over the canvas [n, SIZE, SIZE, 3] where ``coverage`` [n, SIZE, SIZE] is 1."""
    return canvas + coverage[..., None] * (colour - canvas)


def _coverage(distance, pixels_per_unit):
    """Anti-aliased coverage of a pixel from the signed distance at its centre."""
    return np.clip(distance * pixels_per_unit + np.float32(0.5), 0, 1)


def _background(n, rng):
    """Two colours fading into each other, with rough texture and a clutter of boxes and discs."""
    x, y = _pixels()
    tilt = _uniform(rng, -1, 1, n, 1, 1)
    fade = np.clip((y / SIZE - 0.5) * 2 + tilt * (x / SIZE - 0.5) + 0.5, 0, 1)
    top, bottom = _uniform(rng, 0.15, 0.95, n, 1, 1, 3), _uniform(rng, 0.05, 0.7, n, 1, 1, 3)
    canvas = top + fade[..., None] * (bottom - top)
    texture = _uniform(rng, -0.15, 0.15, n, 8, 8, 3)
    canvas = canvas + texture.repeat(4, axis=1).repeat(4, axis=2)
    for _ in range(5):
        u, v = x - _uniform(rng, 0, SIZE, n, 1, 1), y - _uniform(rng, 0, SIZE, n, 1, 1)
        size = _uniform(rng, 1.5, 6, n, 1, 1)
        box = _box(u, v, 0, 0, size, size * _uniform(rng, 0.4, 2.5, n, 1, 1))
        distance = np.where(rng.random((n, 1, 1)) < 0.5, box, size - np.sqrt(u * u + v * v))
        canvas = _over(canvas, _coverage(distance, 1), _uniform(rng, 0.05, 0.95, n, 1, 1, 3))
    return canvas


def _paint_signs(canvas, labels, rng):
    """Each label's sign at its own place, size, rotation and foreshortening."""
    n = len(labels)
    x, y = _pixels()
    radius = _uniform(rng, 8, 14, n, 1, 1)
    half = _uniform(rng, -0.13, 0.13, n, 1, 1)  # tangent of half the rotation: up to 15 degrees either way
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    x = x - _uniform(rng, 12, 20, n, 1, 1)
    y = y - _uniform(rng, 12, 20, n, 1, 1)
    u = (cosine * x + sine * y) / (radius * _uniform(rng, 0.65, 1, n, 1, 1))
    v = (cosine * y - sine * x) / radius
    u = u + v * _uniform(rng, -0.15, 0.15, n, 1, 1)
    fading = _uniform(rng, 0.5, 1, n, 1, 1, 1)  # bleached paint: towards grey
    grey = _uniform(rng, 0.3, 0.6, n, 1, 1, 1)
    out = canvas.copy()
    for label, (shape, rim, field, pictogram, ink) in enumerate(SIGNS.values()):
        at = labels == label
        distance = shape(u[at], v[at])
        layers = [(distance, rim), (distance - np.float32(0.2), field)]
        if pictogram is not None:
            layers.append((pictogram(u[at], v[at]), ink))
        for edge, colour in layers:
            paint = grey[at] + fading[at] * (np.float32(colour) - grey[at])
            out[at] = _over(out[at], _coverage(edge, radius[at]), paint)
    return out


def _occlude(canvas, rng):
    """A leaf or a post in front of half of the signs."""
    n = len(canvas)
    x, y = _pixels()
    u, v = x - _uniform(rng, 6, 26, n, 1, 1), y - _uniform(rng, 6, 26, n, 1, 1)
    size = _uniform(rng, 2, 5, n, 1, 1)
    post = size * 0.5 - np.abs(u + v * _uniform(rng, -0.5, 0.5, n, 1, 1))
    distance = np.where(rng.random((n, 1, 1)) < 0.5, post, size - np.sqrt(u * u + v * v))
    hidden = _coverage(distance, 1) * (rng.random((n, 1, 1)) < 0.5)
    return _over(canvas, hidden, _uniform(rng, 0.05, 0.6, n, 1, 1, 3))


def _light(canvas, rng):
    """Brightness, a tint, haze, and a shadow that falls across."""
    n = len(canvas)
    x, y = _pixels()
    edge = (x - SIZE / 2) * _uniform(rng, -1, 1, n, 1, 1) + (y - SIZE / 2) * _uniform(rng, -1, 1, n, 1, 1)
    shadow = 1 - _uniform(rng, 0, 0.5, n, 1, 1) * _coverage(edge + _uniform(rng, -8, 8, n, 1, 1), 0.3)
    canvas = canvas * shadow[..., None] * _uniform(rng, 0.5, 1.1, n, 1, 1, 1) * _uniform(rng, 0.9, 1.1, n, 1, 1, 3)
    haze = _uniform(rng, 0, 0.3, n, 1, 1, 1)
    return canvas + haze * (_uniform(rng, 0.4, 0.8, n, 1, 1, 1) - canvas)


def _blur(canvas, rng):
    """A binomial blur of random strength, along each axis by itself."""
    n = len(canvas)
    for axis in (1, 2):
        strength = _uniform(rng, 0, 0.5, n, 1, 1, 1)
        for _ in range(2):
            padded = np.pad(canvas, [(0, 0)] + [(1, 1) if a == axis else (0, 0) for a in (1, 2)] + [(0, 0)], mode="edge")
            before, after = np.split(padded, [2], axis=axis)[1], np.split(padded, [SIZE], axis=axis)[0]
            canvas = canvas + strength * ((before + after) * np.float32(0.5) - canvas)
    return canvas
