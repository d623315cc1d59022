import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np

from valora_jax.engine.batch import SCORE_ROWS, BatchLayout
from valora_jax.engine.buckets import Bucket

BUCKETS = st.builds(
    Bucket,
    tokens=st.integers(1, 9),
    decodes=st.integers(1, 4),
    chunks=st.sampled_from([0, 3]),
    rows=st.integers(1, 4),
)


def random_bits(fields: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Fills every field with noise, and returns copies."""
    rng = np.random.default_rng(seed)
    for field in fields.values():
        if field.dtype == np.float32:
            field[...] = rng.normal(size=field.shape)
        else:
            field[...] = rng.integers(-(2**31), 2**31, field.shape)
    return {name: field.copy() for name, field in fields.items()}


def check_round_trip(layout: BatchLayout, seed: int) -> None:
    packed, fields = layout.buffer()
    assert (packed.dtype, packed.shape) == (np.int32, (layout.size,))
    assert not packed.any()
    assert {name: field.shape for name, field in fields.items()} == layout.shapes
    want = random_bits(fields, seed)
    with jax.disable_jit():
        got = layout.unpack(jax.numpy.asarray(packed))
    assert got.keys() == want.keys()
    for name, field in want.items():
        assert got[name].dtype == field.dtype
        np.testing.assert_array_equal(got[name], field, err_msg=name)


@hypothesis.settings(max_examples=25)
@hypothesis.given(bucket=BUCKETS, seed=st.integers(0, 9))
def test_a_steps_fields_come_out_of_the_buffer_as_they_went_in(bucket, seed):
    layout = BatchLayout.of(bucket, request_pages=6)
    check_round_trip(layout, seed)
    assert ("chunk_page" in layout.shapes) == bool(bucket.chunks)
    assert layout.shapes["decode_page"] == (bucket.decodes, 6)


def test_so_do_those_of_scores_and_of_images():
    check_round_trip(BatchLayout.of_scores(), 1)
    check_round_trip(BatchLayout.of_images(3, vision_tokens=5), 2)
    assert BatchLayout.of_scores().shapes["target"] == (SCORE_ROWS,)


def test_a_buffer_begins_with_how_its_rows_are_sampled():
    step = BatchLayout.of(Bucket(tokens=9, decodes=2, chunks=3, rows=5), request_pages=2)
    rows = BatchLayout.of_rows(5)
    check_round_trip(rows, 3)
    packed, fields = step.buffer()
    want = random_bits({name: fields[name] for name in rows.shapes}, seed=4)
    got = rows.unpack(jax.numpy.asarray(packed[: rows.size]))
    for name, field in want.items():
        np.testing.assert_array_equal(got[name], field, err_msg=name)


def test_unpacking_is_traced_into_slices_without_a_gather():
    layout = BatchLayout.of(Bucket(tokens=4, decodes=2, chunks=3, rows=2), request_pages=2)
    packed, fields = layout.buffer()
    want = random_bits(fields, 0)
    got = jax.jit(layout.unpack)(packed)
    for name, field in want.items():
        np.testing.assert_array_equal(got[name], field, err_msg=name)
