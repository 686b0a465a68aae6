"""Extra augmentations: parity with MONAI for the same draws, on small volumes of odd sizes, and the draws themselves.

Every pipeline runs a batch of two. Where only one of them fires, the other must keep its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from nvidia.dali import fn

from pipelines.loading import augment as module
from pipelines.loading.augment import (
    BIAS_TERMS,
    INPUTS,
    Augment,
    AugmentDraw,
    apply_intensity,
    apply_spatial,
    bias_field_factor,
    draw_augment,
    input_names,
    noise_values,
    pipeline_inputs,
)
from pipelines.loading.dali import build_pipeline
from pipelines.loading.sampling import generator

SIZE = (23, 17, 11)
CHANNELS = 3
NOTHING = AugmentDraw()

# Of the image's range. All are rounding in float32; the affine's is that of MONAI's coordinates (in [-1, 1], float32).
TOLERANCES = {"affine": 2e-5, "noise": 1e-7, "blur": 5e-7, "bias_field": 5e-7, "gamma": 1e-6, "dropout": 0.0}
OPERATORS = {"affine": b"WarpAffine", "noise": b"ArithmeticGenericOp", "blur": b"Filter", "gamma": b"reductions__Min"}

COEFFICIENTS = tuple(np.random.default_rng(3).uniform(-0.1, 0.2, len(BIAS_TERMS)).tolist())
DRAWS: dict[str, list[Any]] = {
    "affine": [((14.0, -7.0, 11.0), (0.9, 1.15, 1.05)), ((-30.0, 30.0, 60.0), (1.2, 0.8, 1.0))],
    "noise": [(0.08, 0), (-0.1, 123_457)],
    "blur": [(0.25, 0.5, 1.0), (1.5, 0.7, 1.1)],
    "bias_field": [COEFFICIENTS, COEFFICIENTS[::-1]],
    "gamma": [0.7, 4.5],
    "dropout": [(True, False, False), (False, True, True)],
}


def on(prob: float, names: Iterable[str] = INPUTS, **ranges: Any) -> Augment:
    """The named augmentations with one probability."""
    settings: dict[str, Any] = {f"{name}_prob": prob for name in names} | ranges
    return Augment(**settings)


def volumes() -> tuple[np.ndarray, np.ndarray]:
    """Z-scored noise with a background of zeros (2, X, Y, Z, C), and random labels (2, X, Y, Z, 1)."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, *SIZE, CHANNELS)).astype(np.float32)
    image[:, :4] = 0
    return image, rng.integers(0, 4, (2, *SIZE, 1)).astype(np.uint8)


def define(source: Callable[[], tuple], augment: Augment, device: str) -> tuple:
    names = input_names(augment)
    image, label, *nodes = fn.external_source(source, num_outputs=2 + len(names), layout=["DHWC", "DHWC"])
    if device == "gpu":
        image, label = image.gpu(), label.gpu()
    inputs = dict(zip(names, nodes))
    image, label = apply_spatial(image, label, augment, inputs)
    return apply_intensity(image, augment, inputs), label


def build(
    augment: Augment,
    draws: Sequence[AugmentDraw],
    device: str = "cpu",
    threads: int = 1,
    pair: tuple[np.ndarray, np.ndarray] | None = None,
) -> Any:
    image, label = pair or volumes()
    x, y, z, channels = image.shape[1:]
    batch = (image, label, *pipeline_inputs(augment, draws, (x, y, z), channels).values())
    where = torch.device("cuda", 0) if device == "gpu" else torch.device("cpu")
    return build_pipeline(define, where, lambda: batch, augment, batch_size=2, threads=threads)


def run(*args: Any, **kwargs: Any) -> list[np.ndarray]:
    """Image and label of a batch, that of `volumes` unless told; arguments as of `build`."""
    image, label = build(*args, **kwargs).run()
    assert image.layout() == label.layout() == "DHWC"
    return [np.array(out.as_cpu().as_tensor()) for out in (image, label)]


def monai_transform(name: str, draw: Any) -> Callable[..., Any]:
    """MONAI's transform with its draws set to those of `draw`."""
    if name == "affine":
        angles, scale = np.deg2rad(draw[0]).tolist(), draw[1]
        return mt.Affine(rotate_params=angles, scale_params=scale, padding_mode="zeros", image_only=True)
    if name == "noise":
        noise = mt.RandGaussianNoise(prob=1.0)
        noise.noise = draw[0] * noise_values(draw[1], (*SIZE, CHANNELS)).transpose(3, 0, 1, 2)
        noise._do_transform = True
        return lambda image: noise(image, randomize=False)
    if name == "blur":
        return mt.GaussianSmooth(draw)
    if name == "bias_field":
        bias = mt.RandBiasField(prob=1.0)
        bias._coeff, bias._do_transform = list(draw), True
        return lambda image: bias(image, randomize=False)
    if name == "gamma":
        return mt.AdjustContrast(draw)
    return lambda image: image * np.logical_not(draw)[:, None, None, None]


def expect(name: str, draw: Any, volume_XYZC: np.ndarray, **how: Any) -> np.ndarray:
    return np.asarray(monai_transform(name, draw)(volume_XYZC.transpose(3, 0, 1, 2).copy(), **how)).transpose(
        1, 2, 3, 0
    )


def assert_close(image: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert np.abs(image - expected).max() <= tolerance * np.ptp(expected)


# ---------- parity


@pytest.mark.parametrize("fires", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
@pytest.mark.parametrize("name", INPUTS)
def test_images_are_monais_and_samples_that_do_not_fire_keep_their_bits(name: str, fires: tuple[int, ...]) -> None:
    draws = [AugmentDraw(**{name: draw}) if b in fires else NOTHING for b, draw in enumerate(DRAWS[name])]
    images, labels = volumes()
    out, out_labels = run(on(0.5, [name]), draws)
    for b in range(2):
        if b in fires:
            assert_close(out[b], expect(name, DRAWS[name][b], images[b]), TOLERANCES[name])
            assert np.abs(out[b] - images[b]).max() > 0.05
        else:
            np.testing.assert_array_equal(out[b], images[b])
        if name != "affine" or b not in fires:
            np.testing.assert_array_equal(out_labels[b], labels[b])


def test_labels_are_warped_as_monai_warps_them() -> None:
    _, labels = volumes()
    rng = np.random.default_rng(7)
    augment = Augment(affine_prob=1.0, affine_rotate_range_degrees=(30.0, 30.0, 30.0))
    mismatches = voxels = 0
    for _ in range(5):
        draws = [draw_augment(rng, augment, CHANNELS) for _ in range(2)]
        _, out = run(augment, draws)
        for b, draw in enumerate(draws):
            expected = expect("affine", draw.affine, labels[b].astype(np.float32), mode="nearest")
            mismatches += int((out[b] != expected).sum())
            voxels += out[b].size
    # A voxel differs only where its source lies within float32's rounding of the middle between two, one in 500,000.
    assert mismatches <= 5e-5 * voxels


def test_image_and_label_move_together() -> None:
    quarter_turn = AugmentDraw(affine=((0.0, 0.0, 90.0), (1.0, 1.0, 1.0)))
    label = np.zeros((2, 15, 15, 9, 1), np.uint8)
    label[:, 2, 4, 6] = 1
    pair = (label.astype(np.float32), label)
    image, label = run(on(1.0, ["affine"]), [quarter_turn, NOTHING], pair=pair)
    assert np.argwhere(label[..., 0]).tolist() == [[0, 4, 12, 6], [1, 2, 4, 6]]
    np.testing.assert_allclose(image, label, atol=1e-5)


def test_all_together_are_monais_transforms_in_their_order() -> None:
    draws = [AugmentDraw(**{name: values[b] for name, values in DRAWS.items()}) for b in range(2)]
    draws[1] = AugmentDraw(blur=DRAWS["blur"][1], gamma=0.7)
    images, _ = volumes()
    out, _ = run(on(0.5), draws)
    for b, draw in enumerate(draws):
        expected = images[b]
        for name in ("affine", "noise", "blur", "bias_field", "gamma", "dropout"):
            if getattr(draw, name) is not None:
                expected = expect(name, getattr(draw, name), expected)
        assert_close(out[b], expected, 2e-5)


def test_background_stays_zero_where_it_is_said_to() -> None:
    images, _ = volumes()
    zero = images == 0
    for name, values in DRAWS.items():
        out, _ = run(on(1.0, [name]), [AugmentDraw(**{name: draw}) for draw in values])
        if name in ("bias_field", "dropout"):
            assert not out[zero].any()
        elif name == "gamma":
            assert np.abs(out[zero]).min() > 0.1
        elif name == "noise":
            assert (out[zero] != 0).mean() > 0.99


def test_a_crop_outside_the_affines_reach_is_zero() -> None:
    draw = AugmentDraw(affine=((0.0, 0.0, 0.0), (2.0, 2.0, 2.0)))
    out, label = run(Augment(affine_prob=1.0), [draw, draw])
    assert not out[:, :5].any()  # a scale of 2 halves the head
    assert not label[:, :5].any()
    assert out[:, 9:14, 5:12, 3:8].any()


def test_bias_field_of_one_voxel_and_of_a_whole_crop() -> None:
    for size in ((1, 2, 3), (128, 128, 64)):
        expected = mt.RandBiasField()._generate_random_field(size, 3, list(COEFFICIENTS))
        np.testing.assert_allclose(bias_field_factor(COEFFICIENTS, size)[..., 0], np.exp(expected), rtol=2e-6)


# ---------- the pipeline


def test_with_everything_off_the_pipeline_is_unchanged() -> None:
    image, label = object(), object()
    assert input_names(Augment()) == []
    assert pipeline_inputs(Augment(), [NOTHING], SIZE, CHANNELS) == {}
    assert apply_spatial(image, label, Augment(), {}) == (image, label)
    assert apply_intensity(image, Augment(), {}) is image
    plain = build(Augment(), [NOTHING, NOTHING]).serialize()
    assert not any(operator in plain for operator in (*OPERATORS.values(), b"_conditional__Split"))


@pytest.mark.parametrize("name", OPERATORS)
def test_only_what_is_on_adds_its_operators_and_inputs(name: str) -> None:
    augment = on(0.5, [name])
    assert input_names(augment) == [f"{name}_fires", *INPUTS[name]]
    alone = build(augment, [NOTHING, NOTHING]).serialize()
    assert OPERATORS[name] in alone
    others = {op for op in OPERATORS.values() if op != OPERATORS[name] and op != b"ArithmeticGenericOp"}
    assert not any(operator in alone for operator in others)


def test_same_draws_give_the_same_bits_in_any_place_and_with_any_number_of_threads() -> None:
    augment = on(0.5, dropout_prob=0.2)
    rng = generator(0, 0, 0)
    for _ in range(3):
        draws = [draw_augment(rng, augment, CHANNELS) for _ in range(2)]
        first, again = run(augment, draws), run(augment, draws, threads=2)
        for a, b in zip(first, again):
            np.testing.assert_array_equal(a, b)
        alone = run(augment, [draws[0], NOTHING])
        np.testing.assert_array_equal(alone[0][0], first[0][0])


@pytest.mark.gpu
def test_the_gpu_gives_what_the_cpu_gives() -> None:
    draws = [AugmentDraw(**{name: values[b] for name, values in DRAWS.items()}) for b in range(2)]
    for batch in (draws, [draws[0], NOTHING], [NOTHING, NOTHING]):
        cpu, gpu = run(on(0.5), batch), run(on(0.5), batch, "gpu")
        assert_close(gpu[0], cpu[0], 2e-5)
        assert (gpu[1] != cpu[1]).mean() <= 1e-4


# ---------- draws


def many(augment: Augment, n: int = 4000) -> list[AugmentDraw]:
    return [draw_augment(generator(0, 1, position), augment, 4) for position in range(n)]


def test_draws_have_their_probabilities_and_ranges() -> None:
    augment = on(0.3, affine_rotate_range_degrees=(10.0, 0.0, 30.0))
    draws = many(augment)
    fired = np.array([[getattr(d, name) is not None for name in INPUTS] for d in draws], float)
    expected = [0.3] * 5 + [1 - 0.7**4]  # dropout is for each of four channels
    np.testing.assert_allclose(fired.mean(0), expected, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(fired.T), np.eye(len(INPUTS)), atol=0.06)

    def values(name: str) -> np.ndarray:
        drawn = [getattr(d, name) for d in draws if getattr(d, name) is not None]
        return np.array(drawn, float).reshape(len(drawn), -1)

    ranges = {
        "affine": [(-10, 10), (0, 0), (-30, 30), (0.8, 1.2), (0.8, 1.2), (0.8, 1.2)],
        "noise": [(-0.1, 0.1), (0, module.NOISE_OFFSETS)],
        "blur": [(0.5, 1.0)] * 3,
        "bias_field": [(0.0, 0.1)] * len(BIAS_TERMS),
        "gamma": [(0.7, 1.5)],
    }
    for name, bounds in ranges.items():
        low, high = np.array(bounds, float).T
        drawn = values(name)
        assert (drawn >= low).all() and (drawn <= high).all()
        np.testing.assert_allclose(drawn.mean(0), (low + high) / 2, atol=1e-9 + 0.05 * (high - low).max())
        np.testing.assert_allclose(np.ptp(drawn, axis=0), high - low, rtol=0.02)
        np.testing.assert_allclose(drawn.std(0), (high - low) / 12**0.5, rtol=0.06)  # uniform
        free = drawn[:, high > low]
        correlation = np.corrcoef(free.T).reshape(free.shape[1], -1)
        np.testing.assert_allclose(correlation, np.eye(free.shape[1]), atol=0.13)


@pytest.mark.parametrize("name", INPUTS)
def test_number_of_draws_does_not_depend_on_what_fires(name: str) -> None:
    used = set()
    for prob in (1e-12, 0.5, 1.0):
        rng = generator(0, 0, 0)
        draw_augment(rng, on(prob, [name]), 4)
        used.add(rng.random())
    assert len(used) == 1


def test_what_is_off_takes_no_draws() -> None:
    rng = generator(0, 0, 0)
    assert draw_augment(rng, Augment(), 4) == NOTHING
    assert rng.random() == generator(0, 0, 0).random()
    gamma = draw_augment(generator(0, 0, 0), Augment(gamma_prob=1.0), 4).gamma
    _, share = generator(0, 0, 0).random(2)
    assert gamma == pytest.approx(0.7 + 0.8 * share)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_dropout_never_takes_all_modalities_and_may_take_any(channels: int) -> None:
    for prob in (0.5, 1.0):
        augment = Augment(dropout_prob=prob)
        draws = [draw_augment(generator(0, 0, position), augment, channels).dropout for position in range(1000)]
        dropped = np.array([[False] * channels if d is None else d for d in draws])
        assert not dropped.all(1).any()
        if channels > 1:
            # Each is as likely as any other: prob, less its share of the times that one had to be spared.
            expected = prob - prob**channels / channels
            np.testing.assert_allclose(dropped.mean(0), expected, atol=0.05)


def test_noise_is_standard_normal_and_independent_between_channels_voxels_and_samples() -> None:
    shape = (64, 48, 32, 4)
    a, b = noise_values(0, shape).astype(np.float64), noise_values(77_777, shape).astype(np.float64)
    for noise in (a, b):
        n = noise.size
        assert abs(noise.mean()) < 4 / n**0.5
        assert abs(noise.std() - 1) < 4 / (2 * n) ** 0.5
        assert abs((noise**4).mean() - 3) < 4 * (96 / n) ** 0.5
        chance = 4.5 / (n / 4) ** 0.5
        channels = np.corrcoef(noise.reshape(-1, 4).T) - np.eye(4)
        assert np.abs(channels).max() < chance
        for axis in range(4):
            neighbours = np.corrcoef(np.delete(noise, 0, axis).ravel(), np.delete(noise, -1, axis).ravel())
            assert abs(neighbours[0, 1]) < chance
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4.5 / a.size**0.5


# ---------- settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"noise_prob": -0.1}, r"--data.augment.noise_prob -0.1 must be at least 0"),
        ({"dropout_prob": 1.5}, r"dropout_prob 1.5 must be at most 1"),
        ({"gamma_prob": float("nan")}, r"gamma_prob nan must be finite"),
        ({"blur_prob": None}, r"blur_prob null must be a number"),
        (
            {"affine_rotate_range_degrees": (0.0, 200.0, 0.0)},
            r"affine_rotate_range_degrees \(0.0, 200.0, 0.0\) must be 3 numbers, each at least 0 and at most 180",
        ),
        ({"affine_scale_range": (0.1, 1.0, 0.1)}, r"\(0.1, 1.0, 0.1\) must be 3 numbers, each at least 0 and below 1"),
        ({"noise_std": 0.0}, r"noise_std 0.0 must be above 0"),
        ({"blur_sigma_range_voxels": (0.0, 1.0)}, r"blur_sigma_range_voxels \(0.0, 1.0\) must be .*, each above 0"),
        ({"bias_field_coeff_range": (0.1, 0.0)}, r"\(0.1, 0.0\) must be .*, none smaller than the one before"),
        ({"bias_field_coeff_range": (0.0, float("inf"))}, r"\(0.0, inf\) must be 2 numbers, each at least -3"),
        ({"gamma_range": (1.5, 0.7)}, r"gamma_range \(1.5, 0.7\) must be .*, written as 0.7,1.5"),
        ({"noise_prob": 2, "gamma_prob": -1}, r"(?s)2 options can't be used:.*noise_prob 2 .*gamma_prob -1 "),
    ],
)
def test_senseless_settings_are_refused_with_value_rule_and_remedy(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**setting)
