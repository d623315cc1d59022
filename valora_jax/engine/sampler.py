"""Chooses the next token of each row on the device: penalties, temperature, filters, one draw.

Everything that only some requests want runs under a condition, so that a batch pays for what its
rows want. A batch of greedy rows needs no condition at all: on a GPU each one waits for the host.
S sampled rows, V vocabulary rows, R state rows (one a running request, and a last one that padding
uses), X banned tokens a row, K the most log-probabilities.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from valora_jax.engine.sampling_params import MAX_LOGPROBS

MAX_BANNED = 16
_NEVER = -jnp.inf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplerState:
    """What the device remembers of each running request between steps.

    Attributes:
      last_token_R: `[R]` int32, so that the next step need not wait for the host.
      output_count_RV: `[R, V]` int32, how often each token was generated; right only for
        requests with penalties, for which the runner sets it.
      in_prompt_RV: `[R, V]` bool, tokens of the prompt; likewise.
    """

    last_token_R: jax.Array
    output_count_RV: jax.Array
    in_prompt_RV: jax.Array

    @classmethod
    def empty(cls, *, max_requests: int, vocab_rows: int) -> "SamplerState":
        shape_RV = (max_requests + 1, vocab_rows)
        return cls(
            last_token_R=jnp.zeros(shape_RV[0], jnp.int32),
            output_count_RV=jnp.zeros(shape_RV, jnp.int32),
            in_prompt_RV=jnp.zeros(shape_RV, bool),
        )

    def with_counts(
        self, row: jax.Array, output_count_V: jax.Array, in_prompt_V: jax.Array
    ) -> "SamplerState":
        """Replaces what is known of one request's tokens."""
        return dataclasses.replace(
            self,
            output_count_RV=self.output_count_RV.at[row].set(output_count_V),
            in_prompt_RV=self.in_prompt_RV.at[row].set(in_prompt_V),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Logprobs:
    """Of the taken and of the likeliest tokens; zeros where no row wants any.

    Of the model itself, before penalties and temperature, as in vLLM.
    """

    logprob_S: jax.Array
    rank_S: jax.Array
    top_token_SK: jax.Array
    top_logprob_SK: jax.Array

    @classmethod
    def zeros(cls, rows: int) -> "Logprobs":
        return cls(
            logprob_S=jnp.zeros(rows, jnp.float32),
            rank_S=jnp.zeros(rows, jnp.int32),
            top_token_SK=jnp.zeros((rows, MAX_LOGPROBS), jnp.int32),
            top_logprob_SK=jnp.zeros((rows, MAX_LOGPROBS), jnp.float32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What a step hands to the host.

    Attributes:
      token_S: int32.
      logprobs: None from `sample_likeliest`: each array is a copy more for the host to ask for.
    """

    token_S: jax.Array
    logprobs: Logprobs | None = None

    def is_ready(self) -> bool:
        """Whether the step has ended."""
        return self.token_S.is_ready()  # pyright: ignore[reportAttributeAccessIssue]

    def to_numpy(self) -> "Sampled":
        """The same as NumPy arrays; waits for the step."""
        return jax.tree.map(np.asarray, self)


def sample(
    logits_SV: jax.Array, state: SamplerState, rows: Mapping[str, jax.Array]
) -> tuple[Sampled, SamplerState]:
    """Samples one token a row and remembers it.

    Args:
      logits_SV: float32.
      state: see there.
      rows: per-row settings by the names in `engine.batch`: `state_row`, `temperature` (0 is
        greedy), `top_k` (0 keeps all), `top_p`, `min_p`, the three penalties, `banned` (`[S, X]`,
        vocabulary size where unused), `seed`, `step` (tokens generated so far), and the scalar
        `wants_logprobs`.
    """
    row_S = rows["state_row"]
    chosen_SV = _penalised(logits_SV, state, rows)
    chosen_SV = _where_any(
        (rows["banned"] < logits_SV.shape[1]).any(), lambda x: _banned(x, rows["banned"]), chosen_SV
    )
    token_S = jax.lax.cond(
        (rows["temperature"] > 0).any(),
        lambda x: _draw(x, rows),
        _likeliest,
        chosen_SV,
    )
    state = SamplerState(
        last_token_R=state.last_token_R.at[row_S].set(token_S),
        output_count_RV=state.output_count_RV.at[row_S, token_S].add(1),
        in_prompt_RV=state.in_prompt_RV,
    )
    sampled = jax.lax.cond(
        rows["wants_logprobs"] > 0,
        lambda: token_logprobs(logits_SV, token_S),
        lambda: Sampled(token_S=token_S, logprobs=Logprobs.zeros(len(token_S))),
    )
    return sampled, state


def wants_only_likeliest(rows: Mapping[str, np.ndarray], *, vocab_rows: int) -> bool:
    """Whether `sample_likeliest` does for these rows what `sample` would, padding included."""
    return bool(
        (rows["temperature"] == 0).all()
        and (rows["banned"] == vocab_rows).all()
        and (rows["presence_penalty"] == 0).all()
        and (rows["frequency_penalty"] == 0).all()
        and (rows["repetition_penalty"] == 1).all()
        and rows["wants_logprobs"] == 0
    )


def sample_likeliest(
    logits_SV: jax.Array, state: SamplerState, row_S: jax.Array
) -> tuple[Sampled, SamplerState]:
    """Takes each row's likeliest token, and remembers it for the next step alone."""
    token_S = _likeliest(logits_SV)
    last_token_R = state.last_token_R.at[row_S].set(token_S)
    return Sampled(token_S=token_S), dataclasses.replace(state, last_token_R=last_token_R)


def token_logprobs(logits_SV: jax.Array, token_S: jax.Array) -> Sampled:
    """The given tokens with their log-probabilities and ranks, and the K likeliest."""
    logprob_SV = jax.nn.log_softmax(logits_SV)
    logprob_S = jnp.take_along_axis(logprob_SV, token_S[:, None], axis=-1)[:, 0]
    # A vocabulary smaller than K fills up with its least likely token.
    top_logprob_SK, top_token_SK = jax.lax.top_k(logprob_SV, min(MAX_LOGPROBS, logits_SV.shape[1]))
    pad = ((0, 0), (0, MAX_LOGPROBS - top_token_SK.shape[1]))
    logprobs = Logprobs(
        logprob_S=logprob_S,
        rank_S=1 + (logprob_SV > logprob_S[:, None]).sum(-1, dtype=jnp.int32),
        top_token_SK=jnp.pad(top_token_SK, pad, "edge"),
        top_logprob_SK=jnp.pad(top_logprob_SK, pad, "edge"),
    )
    return Sampled(token_S=token_S, logprobs=logprobs)


def _likeliest(logits_SV):
    """The first of each row's largest logits. On a CPU an argmax of 16 rows took 1.7 ms, a maximum
    and a search for it 0.3."""
    V = logits_SV.shape[1]
    is_top_SV = logits_SV == logits_SV.max(-1, keepdims=True)
    # A row of NaN, which equals nothing, must name a token as well.
    return jnp.where(is_top_SV, jnp.arange(V, dtype=jnp.int32), V - 1).min(-1)


def _where_any(condition, change, x):
    return jax.lax.cond(condition, change, lambda x: x, x)


def _penalised(logits_SV, state: SamplerState, rows):
    presence_S, frequency_S, repetition_S = (
        rows[f"{name}_penalty"][:, None] for name in ("presence", "frequency", "repetition")
    )

    def penalise(logits_SV):
        count_SV = state.output_count_RV[rows["state_row"]]
        seen_SV = (count_SV > 0) | state.in_prompt_RV[rows["state_row"]]
        repeated_SV = jnp.where(logits_SV > 0, logits_SV / repetition_S, logits_SV * repetition_S)
        logits_SV = jnp.where(seen_SV, repeated_SV, logits_SV)
        return logits_SV - frequency_S * count_SV - presence_S * (count_SV > 0)

    wanted = ((presence_S != 0) | (frequency_S != 0) | (repetition_S != 1)).any()
    return _where_any(wanted, penalise, logits_SV)


def _banned(logits_SV, banned_SX):
    row_S1 = jnp.arange(logits_SV.shape[0])[:, None]
    return logits_SV.at[row_S1, banned_SX].set(_NEVER, mode="drop")


def _draw(logits_SV, rows):
    """Gumbel noise and an argmax: a draw from the softmax. Greedy rows stay greedy."""
    greedy_S1 = (rows["temperature"] == 0)[:, None]
    scaled_SV = logits_SV / jnp.where(greedy_S1, 1.0, rows["temperature"][:, None])
    filters = (rows["top_k"] > 0) | (rows["top_p"] < 1) | (rows["min_p"] > 0)
    scaled_SV = _where_any(filters.any(), lambda x: _filtered(x, rows), scaled_SV)

    def row_noise(seed, step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.gumbel(key, logits_SV.shape[1:], jnp.float32)

    noise_SV = jax.vmap(row_noise)(rows["seed"], rows["step"])
    return _likeliest(jnp.where(greedy_S1, logits_SV, scaled_SV + noise_SV))


def _filtered(logits_SV, rows):
    """Keeps the tokens that top-k, then top-p, then min-p admit.

    Each keeps what reaches a threshold, found by bisection over the ordered bits of float32: a
    full sort of the vocabulary took a CPU three times as long. Ties at a threshold all stay.
    """
    V = logits_SV.shape[1]
    top_k_S = jnp.where(rows["top_k"] > 0, jnp.minimum(rows["top_k"], V), V)
    logits_SV = _keep_from_threshold(logits_SV, lambda keep_SV: keep_SV.sum(-1) >= top_k_S)
    prob_SV = jax.nn.softmax(logits_SV)
    # 1 keeps all: rounding must not decide whether a sum reaches it.
    target_S = jnp.where(rows["top_p"] < 1, rows["top_p"], 2.0)
    logits_SV = _keep_from_threshold(
        logits_SV, lambda keep_SV: jnp.where(keep_SV, prob_SV, 0).sum(-1) >= target_S
    )
    floor_S = logits_SV.max(-1) + jnp.log(rows["min_p"])  # log(0) keeps all
    return jnp.where(logits_SV >= floor_S[:, None], logits_SV, _NEVER)


def _keep_from_threshold(logits_SV, enough):
    """Drops what is below the highest threshold from which on there is `enough`."""
    bits_SV = jax.lax.bitcast_convert_type(logits_SV, jnp.int32)
    # Negative floats order backwards as integers; this maps all to one increasing order.
    order_SV = jnp.where(bits_SV < 0, bits_SV ^ 0x7FFFFFFF, bits_SV)
    low_S = jnp.full(logits_SV.shape[0], jnp.iinfo(jnp.int32).min)
    high_S = jnp.full(logits_SV.shape[0], jnp.iinfo(jnp.int32).max)

    def halve(_, bounds):
        low_S, high_S = bounds
        middle_S = (low_S >> 1) + (high_S >> 1) + (low_S & high_S & 1)
        ok_S = enough(order_SV >= middle_S[:, None])
        return jnp.where(ok_S, middle_S, low_S), jnp.where(ok_S, high_S, middle_S)

    low_S, _ = jax.lax.fori_loop(0, 32, halve, (low_S, high_S))
    return jnp.where(order_SV >= low_S[:, None], logits_SV, _NEVER)
