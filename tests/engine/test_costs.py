import dataclasses
import random

import pytest

from valora_jax.engine.costs import StepCosts, StepLoad, StepTimes
from valora_jax.lora.mode import Mode

# A CPU with a small model: everything takes longer, in other proportions.
SLOW = StepTimes(
    step_ms=40.0,
    decode_ms=1.5,
    prompt_token_ms=0.4,
    lora_ms=3.0,
    prompt_lora_ms=10.0,
    page_ms=1.0,
    token_page_ms=0.01,
    mixture_ms=4.0,
)


def load_of(
    *,
    decodes: int = 0,
    prompt_tokens: int = 0,
    images: int = 0,
    adapters: int = 0,
    mode: Mode = Mode.UNMERGED,
) -> StepLoad:
    """A step of rank-64 adapters whose requests share them evenly."""
    return StepLoad(
        bucket=(decodes, prompt_tokens),
        mode=mode,
        decodes=decodes,
        prompt_tokens=prompt_tokens,
        images=images,
        pages=4.0 * adapters,
        token_pages=4.0 * (decodes + prompt_tokens) if adapters else 0.0,
    )


def taught(times: StepTimes, *, steps: int, lora_always: bool = False, noise: float = 0.03):
    """Costs that saw steps of a device, and the source of their randomness."""
    costs, rng = StepCosts(), random.Random(0)
    for _ in range(steps):
        decodes = rng.randint(1, 16)
        load = load_of(
            decodes=decodes,
            prompt_tokens=rng.choice([0, 0, 0, 64, 500]),
            adapters=rng.randint(1 if lora_always else 0, decodes),
        )
        costs.observe(load, times.of(load) * rng.gauss(1, noise))
    return costs


@pytest.mark.parametrize(
    ("sizes", "measured_ms"),
    [
        (dict(decodes=8), 6.23),
        (dict(decodes=32), 10.0),
        (dict(decodes=8, adapters=1), 6.67),
        (dict(decodes=8, adapters=8), 7.43),
        (dict(decodes=32, adapters=32), 14.2),
        (dict(prompt_tokens=4096), 71.1),
    ],
)
def test_the_first_guess_is_an_h100_with_a_7b_model(sizes, measured_ms):
    load = load_of(**sizes)
    assert StepCosts().estimate_ms(load) == pytest.approx(measured_ms, rel=0.03)


def test_what_images_take_is_learnt():
    costs = StepCosts()
    for _ in range(100):
        for images in range(4):
            load = load_of(decodes=4, prompt_tokens=1280, images=images)
            costs.observe(load, 30.0 + 5.0 * images)
    for images in range(4):
        load = load_of(decodes=4, prompt_tokens=1280, images=images)
        assert costs.estimate_ms(load) == pytest.approx(30.0 + 5.0 * images, rel=0.02)


def test_another_device_is_learnt_from_its_steps():
    costs = taught(SLOW, steps=300)
    for load in [
        load_of(decodes=3),
        load_of(decodes=12, adapters=5),
        load_of(decodes=4, prompt_tokens=500, adapters=2),
    ]:
        assert costs.estimate_ms(load) == pytest.approx(SLOW.of(load), rel=0.1)


def test_a_mode_that_never_ran_is_estimated_from_the_others():
    costs = taught(SLOW, steps=300, lora_always=True)
    merged = load_of(decodes=8, mode=Mode.MERGED)
    unmerged = load_of(decodes=8, adapters=8)
    assert costs.estimate_ms(merged) < 0.8 * costs.estimate_ms(unmerged)


def test_what_the_line_misses_is_corrected_for_the_mode_and_bucket_where_it_is_missed():
    costs = taught(SLOW, steps=300)
    odd, usual = load_of(decodes=16, adapters=1), load_of(decodes=15, adapters=1)
    for _ in range(100):
        costs.observe(odd, 1.3 * SLOW.of(odd))
        costs.observe(usual, SLOW.of(usual))
    assert costs.estimate_ms(odd) == pytest.approx(1.3 * SLOW.of(odd), rel=0.05)
    assert costs.estimate_ms(usual) == pytest.approx(SLOW.of(usual), rel=0.05)


def test_one_slow_step_changes_little():
    costs, load = taught(SLOW, steps=300), load_of(decodes=8, adapters=4)
    before = costs.estimate_ms(load)
    costs.observe(load, 100 * before)
    assert costs.estimate_ms(load) < 1.1 * before


def test_a_mode_that_looked_bad_once_is_tried_again_some_day():
    costs = taught(SLOW, steps=300)
    mixture = load_of(decodes=8, adapters=4, mode=Mode.MIXTURE)
    for _ in range(10):
        costs.observe(mixture, 1.4 * SLOW.of(mixture))
    blamed = costs.estimate_ms(mixture)
    for _ in range(3000):
        load = load_of(decodes=8, adapters=4)
        costs.observe(load, SLOW.of(load))
    assert blamed > 1.15 * SLOW.of(mixture)
    assert costs.estimate_ms(mixture) == pytest.approx(SLOW.of(mixture), rel=0.05)


def test_lora_never_makes_a_step_quicker():
    free = dataclasses.replace(SLOW, lora_ms=0.0, page_ms=0.0, token_page_ms=0.0)
    costs = taught(free, steps=300, noise=0.2)
    for adapters in range(1, 9):
        with_lora = costs.estimate_ms(load_of(decodes=8, adapters=adapters, mode=Mode.MIXTURE))
        assert with_lora >= costs.estimate_ms(load_of(decodes=8, mode=Mode.MERGED))


def test_merges_are_measured():
    costs = StepCosts(merge_ms=10.0)
    for _ in range(20):
        costs.observe_merge(63.5)
    assert costs.merge_ms == pytest.approx(63.5, rel=0.01)


def test_what_one_mode_shows_of_a_bucket_holds_for_the_others():
    costs = taught(SLOW, steps=300)
    for _ in range(100):
        load = load_of(decodes=16, adapters=4)
        costs.observe(load, 1.3 * SLOW.of(load))
    for mode in Mode:
        load = load_of(decodes=16, adapters=4, mode=mode)
        assert costs.estimate_ms(load) == pytest.approx(1.3 * SLOW.of(load), rel=0.05)


def test_steps_that_all_use_lora_are_not_laid_on_lora():
    """Nothing would ever be merged if what the base takes less were believed to be LoRA's."""
    guess = StepTimes()
    quicker = dataclasses.replace(guess, prompt_token_ms=0.75 * guess.prompt_token_ms)
    costs, rng = StepCosts(), random.Random(0)
    for _ in range(500):
        load = load_of(
            decodes=rng.randint(8, 16), prompt_tokens=rng.choice([0, 0, 0, 700]), adapters=6
        )
        costs.observe(load, quicker.of(load) * rng.gauss(1, 0.03))
    for prompt_tokens in (0, 700):
        load = load_of(decodes=12, prompt_tokens=prompt_tokens, adapters=6)
        merged = load_of(decodes=12, prompt_tokens=prompt_tokens, mode=Mode.MERGED)
        saved_ms = costs.estimate_ms(load) - costs.estimate_ms(merged)
        assert saved_ms == pytest.approx(quicker.of(load) - quicker.of(merged), rel=0.3)


@pytest.mark.parametrize(("merged", "known"), [(0.1, 0.2), (0.0, 0.8)])
def test_a_shape_off_the_line_does_not_hide_what_lora_takes(merged, known):
    """As on an H100, where steps of more than 32 rows have other kernels."""
    costs, times, rng = StepCosts(), StepTimes(), random.Random(0)
    for _ in range(1000):
        large = rng.random() < 0.1
        decodes = rng.randint(40, 60) if large else rng.randint(4, 28)
        mode, adapters = Mode.UNMERGED, min(decodes // 2, 16)
        if rng.random() < merged:
            mode, adapters = Mode.MERGED, 0
        load = load_of(decodes=decodes, adapters=adapters, mode=mode)
        load = dataclasses.replace(load, bucket=1 << (decodes - 1).bit_length())
        costs.observe(load, times.of(load) * (1.2 if large else 1.0) * rng.gauss(1, 0.02))
    unmerged = dataclasses.replace(load_of(decodes=8, adapters=4), bucket=8)
    saved_ms = costs.estimate_ms(unmerged) - costs.estimate_ms(
        dataclasses.replace(load_of(decodes=8, mode=Mode.MERGED), bucket=8)
    )
    lora_ms = times.lora_ms + 16 * times.page_ms
    assert saved_ms == pytest.approx(lora_ms, rel=known)


@pytest.mark.parametrize(("ms", "then_ms"), [(12.0, 10.6), (900.0, 13.0), (0.0, 8.5)])
def test_one_odd_merge_says_little_about_the_next(ms, then_ms):
    costs = StepCosts(merge_ms=10.0)
    costs.observe_merge(ms)
    assert costs.merge_ms == pytest.approx(then_ms)


def test_the_line_does_not_follow_the_load_of_the_last_steps():
    """Each compiled shape is off the line by some per cent; only one is seen at last."""
    rng, costs = random.Random(0), StepCosts()
    off = {16: 1.06, 64: 0.97}

    def teach(decodes: int) -> None:
        load = dataclasses.replace(load_of(decodes=decodes), bucket=16 if decodes <= 16 else 64)
        costs.observe(load, off[load.bucket] * StepTimes().of(load) * rng.gauss(1, 0.01))

    for _ in range(1000):
        teach(rng.randint(1, 64))
    for _ in range(500):
        teach(rng.randint(50, 64))
    calm = dataclasses.replace(load_of(decodes=10), bucket=16)
    assert costs.estimate_ms(calm) == pytest.approx(off[16] * StepTimes().of(calm), rel=0.03)
