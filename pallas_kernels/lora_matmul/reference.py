"""The LoRA operator in NumPy, float64: shares nothing with what it judges."""

import numpy as np


def lora_matmul(y_TE, x_TD, pool, *, active, adapter_T, layer: int) -> np.ndarray:
    """Row by row, page by page; see `api.lora_matmul` for shapes."""
    out_TE = np.array(y_TE, np.float64)
    a_LPrD, b_LPrE = (
        np.asarray(rows, np.float64).reshape(pool.scale_LS.shape[0], -1, 16, rows.shape[1])
        for rows in (pool.a_RD, pool.b_RE)
    )
    for t, adapter in enumerate(np.asarray(adapter_T)):
        for page, owner in zip(
            np.asarray(active.page_P)[: int(active.count)],
            np.asarray(active.owner_P)[: int(active.count)],
            strict=True,
        ):
            if owner == adapter:
                h_r = a_LPrD[layer, page] @ np.asarray(x_TD[t], np.float64)
                out_TE[t] += float(pool.scale_LS[layer, owner]) * (h_r @ b_LPrE[layer, page])
    return out_TE
