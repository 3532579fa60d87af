"""The page's ornament: contour lines of a hill that belongs to one subject, drawn from its fingerprint."""

__all__ = ["contours"]

import hashlib

import numpy as np

_LINES, _POINTS, _WAVES = 15, 72, 5
_WIDTH, _HEIGHT = 640.0, 300.0


def contours(fingerprint: str) -> str:
    """An SVG of nested closed curves; the same fingerprint gives the same hill.

    Curve k has radius r_k(t) = k (1 + sum_j a_j(k) cos(j t + p_j)), with the a_j growing slowly with k, so that
    neighbouring curves do not cross.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:8]))
    angle = np.linspace(0, 2 * np.pi, _POINTS, endpoint=False)
    waves = np.arange(1, _WAVES + 1)
    phase, weight = rng.uniform(0, 2 * np.pi, _WAVES), rng.uniform(0.3, 1, _WAVES) / waves
    shape = np.cos(waves * angle[:, None] + phase) @ weight
    drift = rng.uniform(-1, 1, 2)
    paths = []
    for line in range(1, _LINES + 1):
        share = line / _LINES
        radius = share * (1 + 0.26 * share * shape)
        x = _WIDTH * (0.55 + 0.05 * drift[0] * share + 0.52 * radius * np.cos(angle))
        y = _HEIGHT * (0.5 + 0.08 * drift[1] * share + 0.62 * radius * np.sin(angle))
        points = " ".join(f"{a:.0f},{b:.0f}" for a, b in zip(x, y, strict=True))
        paths.append(f'<polygon points="{points}"{" class=index" if line % 5 == 0 else ""}/>')
    return (
        f'<svg class="terrain" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" preserveAspectRatio="xMidYMid slice" '
        f'aria-hidden="true">{"".join(paths)}</svg>'
    )
