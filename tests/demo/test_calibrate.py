import numpy as np
from PIL import Image

from valora_jax.demo import calibrate, vit

RNG = np.random.default_rng(1)


def test_a_projected_patch_is_the_convolution_at_its_place():
    image_HWC = RNG.standard_normal((vit.IMAGE_SIZE, vit.IMAGE_SIZE, 3)).astype(np.float32)
    kernel = RNG.standard_normal((vit.WIDTH, 3, vit.PATCH, vit.PATCH)).astype(np.float32)
    got = calibrate.project(kernel, image_HWC)
    row, column = 2, 5
    patch = image_HWC[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
    want_D = np.einsum("dchw,hwc->d", kernel, patch)
    np.testing.assert_allclose(got[row * vit.SIDE + column], want_D, rtol=1e-3, atol=1e-3)


def test_the_two_channels_that_move_together_carry_the_anchor():
    tokens_XD = RNG.standard_normal((200, 6))
    tokens_XD[:, 4] = tokens_XD[:, 1] + 0.01 * RNG.standard_normal(200)
    assert set(calibrate.cheapest_channels(tokens_XD)) == {1, 4}


def test_the_fit_undoes_the_norm_for_tokens_of_any_spread():
    tokens_XD = RNG.standard_normal((400, 384)) * RNG.uniform(0.03, 0.2, (400, 1))
    result = calibrate.fit(tokens_XD)
    assert result.relative_error < 0.12  # random tokens have two channels' worth less to give


def test_pixels_are_the_middle_square_normalised(tmp_path):
    path = tmp_path / "grey.png"
    Image.new("L", (500, 300), 255).save(path)
    got = calibrate.pixels(path)
    assert got.shape == (224, 224, 3)
    np.testing.assert_allclose(got[0, 0], (1 - np.array(vit.IMAGE_MEAN)) / vit.IMAGE_STD, rtol=1e-5)
