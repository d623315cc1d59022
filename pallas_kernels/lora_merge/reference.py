"""Merging in NumPy, float64: shares nothing with what it judges."""

import numpy as np


def lora_merge(base_DE, parts, *, layer: int, slot: int) -> np.ndarray:
    """Page by page, not rounded; see `api.lora_merge` for shapes."""
    out_DE = np.array(base_DE, np.float64)
    for part in parts:
        pool = part.pool
        a_LPrD, b_LPrE = (
            np.asarray(rows, np.float64).reshape(pool.scale_LS.shape[0], -1, 16, rows.shape[1])
            for rows in (pool.a_RD, pool.b_RE)
        )
        stop = part.column + pool.b_RE.shape[1]
        for page in np.asarray(pool.page_SW)[slot, : int(pool.pages_S[slot])]:
            update_DE = a_LPrD[layer, page].T @ b_LPrE[layer, page]
            out_DE[:, part.column : stop] += float(pool.scale_LS[layer, slot]) * update_DE
    return out_DE
