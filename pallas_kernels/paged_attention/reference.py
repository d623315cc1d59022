"""Rotary and paged attention in NumPy, float64, one request and one head at a time."""

import numpy as np


def rotate(x_TNH, angle_Th) -> np.ndarray:
    """Turns the halves of each head by the token's angles."""
    sin_T1h, cos_T1h = (f(np.float64(angle_Th))[:, None] for f in (np.sin, np.cos))
    low, high = np.split(np.float64(x_TNH), 2, axis=-1)
    return np.concatenate([low * cos_T1h - high * sin_T1h, high * cos_T1h + low * sin_T1h], axis=-1)


def attend(q_TNH, k_SKH, v_SKH) -> np.ndarray:
    """Causal attention of a request's last T tokens over all its S tokens."""
    (T, N, H), (S, K, _) = q_TNH.shape, k_SKH.shape
    out_TNH = np.zeros(q_TNH.shape)
    for t in range(T):
        seen = S - T + t + 1
        for n in range(N):
            k_SH, v_SH = (np.float64(x[:seen, n * K // N]) for x in (k_SKH, v_SKH))
            scores_S = np.dot(k_SH, np.float64(q_TNH[t, n])) / H**0.5
            weights_S = np.exp(scores_S - scores_S.max())
            out_TNH[t, n] = weights_S @ v_SH / weights_S.sum()
    return out_TNH
