"""The LoRA operator in NumPy, float64: shares nothing with what it judges."""

import numpy as np


def lora_matmul(y_TE, x_TD, parts, *, adapter_T, merged: int = -1, layer: int) -> np.ndarray:
    """Row by row, from each row's adapter itself; see `api.lora_matmul` for the other shapes."""
    out_TE = np.array(y_TE, np.float64)
    for part in parts:
        pool, E = part.pool, part.pool.b_RE.shape[1]
        page_SW, pages_S = np.asarray(pool.page_SW), np.asarray(pool.pages_S)
        a_LPrD, b_LPrE = (
            np.asarray(rows, np.float64).reshape(pool.scale_LS.shape[0], -1, 16, rows.shape[1])
            for rows in (pool.a_RD, pool.b_RE)
        )
        for t, adapter in enumerate(np.asarray(adapter_T)):
            branches = [] if adapter == merged else [(adapter, 1), (merged, -1)]
            for slot, sign in branches:
                for page in page_SW[slot, : pages_S[slot]] if slot >= 0 else ():
                    h_r = a_LPrD[layer, page] @ np.asarray(x_TD[t], np.float64)
                    delta_E = float(pool.scale_LS[layer, slot]) * (h_r @ b_LPrE[layer, page])
                    out_TE[t, part.column : part.column + E] += sign * delta_E
    return out_TE
