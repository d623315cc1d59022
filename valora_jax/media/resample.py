"""A window of a resized image, bit for bit what Pillow's `resize` would hold there.

`resize_window(x, (H, W), (top, left, h, w)) == resize(x, (W, H))[top:top+h, left:left+w]`, at the
cost of the window: a 1 x 100,000 picture resized to 336 pixels of width would be 34 GB. Follows
Pillow's `Resample.c` (13.0; earlier ones differ in the order of the passes): weights in 22-bit
fixed point, each pass rounded to 8 bits. H, W rows and columns; h, w those of the window; n input
pixels that it reads; C channels.
"""

import numpy as np

_PRECISION_BITS = 32 - 8 - 2  # Pillow's: 8 for the pixel, 2 for overshoot and sign


def resize_window(
    pixels_HWC: np.ndarray,
    size_HW: tuple[int, int],
    window: tuple[int, int, int, int],
) -> np.ndarray:
    """Resizes with Pillow's bicubic filter and returns one window of the result.

    Args:
      pixels_HWC: `[H, W, C]` uint8.
      size_HW: height and width of the whole resized image, never built.
      window: top, left, height and width inside the resized image; not checked.

    Returns:
      `[height, width, C]` uint8.
    """
    top, left, height, width = window
    rows_hn, first_row = _weights(pixels_HWC.shape[0], size_HW[0], top, height)
    columns_wn, first_column = _weights(pixels_HWC.shape[1], size_HW[1], left, width)
    x_HWC = pixels_HWC[
        first_row : first_row + rows_hn.shape[1],
        first_column : first_column + columns_wn.shape[1],
    ]
    shrinks_by_rows = pixels_HWC.shape[0] - size_HW[0]
    shrinks_by_columns = pixels_HWC.shape[1] - size_HW[1]
    if shrinks_by_rows > max(0, 2 * shrinks_by_columns):  # Pillow's rule; each pass rounds
        x_hWC = _round_to_8_bits(np.einsum("hn,nWC->hWC", rows_hn, x_HWC, optimize=True))
        return _round_to_8_bits(np.einsum("wn,hnC->hwC", columns_wn, x_hWC, optimize=True))
    x_HwC = _round_to_8_bits(np.einsum("wn,HnC->HwC", columns_wn, x_HWC, optimize=True))
    return _round_to_8_bits(np.einsum("hn,nwC->hwC", rows_hn, x_HwC, optimize=True))


def _weights(n_in: int, n_out: int, start: int, count: int) -> tuple[np.ndarray, int]:
    """Fixed-point weights `[count, n]` of outputs start.. over inputs first..; and first.

    float64 holds the products exactly (22 + 8 bits and some thousand terms), and so takes BLAS.
    """
    scale = n_in / n_out
    stretch = max(scale, 1.0)  # antialiasing: the filter widens when the image shrinks
    support = 2.0 * stretch
    center_h = (np.arange(start, start + count) + 0.5) * scale
    # int() truncates towards zero in C; the clip makes that and floor the same.
    low_h = np.maximum(np.trunc(center_h - support + 0.5), 0).astype(np.int64)
    high_h = np.minimum(np.trunc(center_h + support + 0.5), n_in).astype(np.int64)
    first, last = int(low_h.min()), int(high_h.max())
    at_n = np.arange(first, last)
    weights_hn = _bicubic((at_n + (0.5 - center_h)[:, None]) * (1.0 / stretch))
    weights_hn[(at_n < low_h[:, None]) | (at_n >= high_h[:, None])] = 0
    # Summed one after the other, as C does: np.sum adds in pairs and may differ in the last bit.
    weights_hn /= np.add.accumulate(weights_hn, axis=1)[:, -1:]
    fixed_hn = weights_hn * 2**_PRECISION_BITS
    return np.trunc(fixed_hn + np.where(fixed_hn < 0, -0.5, 0.5)), first


def _bicubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _round_to_8_bits(fixed: np.ndarray) -> np.ndarray:
    rounded = np.floor((fixed + 2 ** (_PRECISION_BITS - 1)) / 2**_PRECISION_BITS)
    return np.clip(rounded, 0, 255).astype(np.uint8)
