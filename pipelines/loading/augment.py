"""Extra augmentations of the training crops, each as MONAI defines it and off by default: the published chain has none.

In the order of the pipeline, which is nnU-Net's (spatial, noise, blur, multiplicative brightness, gamma):

    affine       rotation and scaling about the centre of the crop: MONAI's RandAffine
    (z-score)
    noise        x + std * normal: RandGaussianNoise
    blur         separable Gaussian: RandGaussianSmooth
    bias field   x * exp(Legendre polynomial of degree 3): RandBiasField
    gamma        ((x - min) / range) ^ gamma * range + min, over all channels: RandAdjustContrast
    dropout      whole modalities become zero, never all of them
    (jitter)

The affine comes before the z-score, so that the statistics are those of the voxels the network sees. The others come
after it, because their ranges are in units of the z-score, and before the jitter, which ends the published chain.

Background is exactly zero before the affine and in a z-scored crop. The bias field and the dropout keep it zero. The
affine and the blur mix it with the head at the rim; the affine fills with zeros from outside the crop. Noise changes it
like any other voxel, and gamma moves it to another value: zero is the mean there, not the minimum.

Each augmentation is inside an `if` of the pipeline (DALI's conditionals), so that samples it does not fire for cost
nothing and keep their bits; one that is off adds no operator at all. Random numbers are drawn in Python only, from the
generator of the sample: a run that resumes could not restore DALI's own random state. The functions of nodes run on a
CPU and a GPU alike, and only in pipelines with `enable_conditionals`.

Axes. Volumes are (X, Y, Z, C), DALI's layout DHWC; X, Y, Z are the axes of RAS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.basics.lazy import Lazy
from pipelines.basics.option_values import check_fields, number
from pipelines.loading.sampling import Size

fn, dali_math, types = (Lazy(f"nvidia.dali.{name}") for name in ("fn", "math", "types"))

# Each augmentation and its inputs to the pipeline, in the order of pipeline and draws.
INPUTS = {
    "affine": ("affine_matrix",),
    "noise": ("noise_values", "noise_std"),
    "blur": ("blur_x", "blur_y", "blur_z"),
    "bias_field": ("bias_field_factor",),
    "gamma": ("gamma",),
    "dropout": ("dropout_kept",),
}

BIAS_DEGREE = 3
# (i, j, k) of each coefficient: the degrees along X, Y and Z, in MONAI's order.
BIAS_TERMS = [
    (i, j, k)
    for i in range(BIAS_DEGREE + 1)
    for j in range(BIAS_DEGREE + 1 - i)
    for k in range(BIAS_DEGREE + 1 - i - j)
]

NOISE_OFFSETS = 2**20  # places where a sample's noise may begin in the table
NOISE_KEY = 20  # of the table: the same in every run

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Augment:
    """Extra augmentations of the training crops: a probability of 0 is off, the other options are ranges.

    Raises:
        ValueError: a probability outside 0 to 1, a range that is empty or makes no sense.
    """

    affine_prob: float = number(0.0, least=0, most=1)
    """Probability of a random rotation and scaling of image and label about the centre of the crop."""
    affine_rotate_range_degrees: Triple = number((15.0, 15.0, 15.0), least=0, most=180)
    """Largest rotation about X, Y and Z, either way; of the voxel grid, as in MONAI, not of millimetres."""
    affine_scale_range: Triple = number((0.2, 0.2, 0.2), least=0, below=1)
    """Scaling along X, Y and Z by 1 - range to 1 + range, independently; above 1 the head shrinks, as in MONAI."""
    noise_prob: float = number(0.0, least=0, most=1)
    """Probability of Gaussian noise."""
    noise_std: float = number(0.1, above=0, most=1000)
    """Largest standard deviation of the noise; that of a sample is uniform from 0 to this."""
    blur_prob: float = number(0.0, least=0, most=1)
    """Probability of a Gaussian blur."""
    blur_sigma_range_voxels: tuple[float, float] = number((0.5, 1.0), above=0, most=100, rising=True)
    """Range of the standard deviation of the blur, drawn for each axis independently."""
    bias_field_prob: float = number(0.0, least=0, most=1)
    """Probability of a smooth bias field, the same for all modalities."""
    bias_field_coeff_range: tuple[float, float] = number((0.0, 0.1), least=-3, most=3, rising=True)
    """Range of the 20 coefficients of its logarithm, a Legendre polynomial of degree 3."""
    gamma_prob: float = number(0.0, least=0, most=1)
    """Probability of a gamma curve, which keeps the image's minimum and maximum."""
    gamma_range: tuple[float, float] = number((0.7, 1.5), above=0, most=100, rising=True)
    """Range of its exponent."""
    dropout_prob: float = number(0.0, least=0, most=1)
    """Probability that a modality is set to zero, for each by itself; at least one is kept."""

    def __post_init__(self) -> None:
        check_fields(self, "--data.augment.")


# ---------- draws


@dataclass(frozen=True)
class AugmentDraw:
    """The random choices for one sample; None where an augmentation is off or did not fire.

    Attributes:
        affine: rotation in degrees about the axes and factor of scaling along them.
        noise: standard deviation, negative for the table's noise mirrored, and first place in the table.
        blur: standard deviation along each axis, in voxels.
        bias_field: the coefficients of `BIAS_TERMS`.
        gamma: the exponent.
        dropout: whether each channel is set to zero.
    """

    affine: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    noise: tuple[float, int] | None = None
    blur: tuple[float, ...] | None = None
    bias_field: tuple[float, ...] | None = None
    gamma: float | None = None
    dropout: tuple[bool, ...] | None = None


def draw_augment(rng: np.random.Generator, augment: Augment, channels: int) -> AugmentDraw:
    """Draw everything for one sample.

    An augmentation that is off draws nothing from `rng`; one that is on always draws the same number of times.

    Args:
        rng: the generator of the sample.
        augment: what is on, and its ranges.
        channels: of the image.
    """

    def uniform(prob: float, low: Sequence[float], high: Sequence[float]) -> tuple[float, ...] | None:
        if not prob:
            return None
        fires, *shares = rng.random(1 + len(low))
        return tuple(a + (b - a) * float(share) for a, b, share in zip(low, high, shares)) if fires < prob else None

    reach = (*augment.affine_rotate_range_degrees, *augment.affine_scale_range)
    affine = uniform(augment.affine_prob, [-a for a in reach], reach)
    noise = uniform(augment.noise_prob, (0, -1, 0), (augment.noise_std, 1, NOISE_OFFSETS))
    blur = uniform(augment.blur_prob, *([sigma] * 3 for sigma in augment.blur_sigma_range_voxels))
    bias_field = uniform(augment.bias_field_prob, *([c] * len(BIAS_TERMS) for c in augment.bias_field_coeff_range))
    gamma = uniform(augment.gamma_prob, *([g] for g in augment.gamma_range))
    dropout = rng.random(channels) if augment.dropout_prob else np.ones(channels)
    dropped = (dropout < augment.dropout_prob) & (dropout < dropout.max())  # if all would be dropped, one is kept
    return AugmentDraw(
        affine=None if affine is None else (affine[:3], tuple(1 + s for s in affine[3:])),
        noise=None if noise is None else (math.copysign(noise[0], noise[1]), int(noise[2])),
        blur=blur,
        bias_field=bias_field,
        gamma=None if gamma is None else gamma[0],
        dropout=tuple(dropped.tolist()) if dropped.any() else None,
    )


# ---------- inputs of the pipeline


def pipeline_inputs(
    augment: Augment, draws: Sequence[AugmentDraw], crop_size: Size, channels: int
) -> dict[str, list[NDArray]]:
    """The inputs of the pipeline for a batch of draws: one array per sample for each name.

    Only augmentations that are on have inputs, and their names and order depend on `augment` alone. None has a layout.
    Where an augmentation does not fire, its arrays are placeholders.

    Args:
        augment: what is on.
        draws: of the batch, from `draw_augment`.
        crop_size: (X, Y, Z) in voxels.
        channels: of the image.

    Returns:
        `<name>_fires`, () bool, for each augmentation that is on, and after it
        affine_matrix (3, 4) float32; noise_values (X, Y, Z, C) and noise_std () float32; blur_x, blur_y (K, 1) and
        blur_z (1, K) float32; bias_field_factor (X, Y, Z, 1) float32; gamma () float32; dropout_kept (C,) float32.
    """
    inputs: dict[str, list[NDArray]] = {}

    def add(name: str, arrays: Callable[[Any], tuple], *placeholder: Any) -> None:
        if getattr(augment, f"{name}_prob"):
            drawn = [getattr(draw, name) for draw in draws]
            inputs[f"{name}_fires"] = [np.array(value is not None) for value in drawn]
            batch = [placeholder if value is None else arrays(value) for value in drawn]
            for i, input_name in enumerate(INPUTS[name]):
                inputs[input_name] = [np.asarray(sample[i], np.float32) for sample in batch]

    voxel, window = np.zeros((1, 1, 1, 1)), np.ones((1, 1))
    add("affine", lambda v: (affine_matrix(v[0], v[1], crop_size),), np.eye(3, 4))
    add("noise", lambda v: (noise_values(v[1], (*crop_size, channels)), v[0]), voxel, 0)
    add("blur", blur_windows, window, window, window)
    add("bias_field", lambda v: (bias_field_factor(v, crop_size),), voxel)
    add("gamma", lambda v: (v,), 1)
    add("dropout", lambda v: (np.logical_not(v),), np.ones(channels))
    return inputs


def input_names(augment: Augment) -> list[str]:
    """Names of the inputs of the pipeline, in the order of `pipeline_inputs`; empty if nothing is on."""
    return list(pipeline_inputs(augment, [], (1, 1, 1), 1))


def affine_matrix(rotate_degrees: Sequence[float], scale: Sequence[float], crop_size: Size) -> NDArray[np.float64]:
    """(3, 4) matrix from output to input for DALI's warp: Rx Ry Rz S about the centre of the crop, as in MONAI.

    DALI counts from the corner of the first voxel, and lists the axes from the last to the first.
    """
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rotate_degrees)):
        turn = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    matrix = matrix @ np.diag(scale)
    centre = np.divide(crop_size, 2)
    offset = centre - matrix @ centre
    return np.column_stack([matrix[::-1, ::-1], offset[::-1]])


@lru_cache(maxsize=1)
def noise_table(length: int) -> NDArray[np.float32]:
    """Standard normal draws, the same ones always; 0.1 s and 21 MB, once, for crops of 128 x 128 x 64 x 4."""
    rng = np.random.Generator(np.random.Philox(key=NOISE_KEY))
    return rng.standard_normal(length, np.float32)


def noise_values(offset: int, shape: tuple[int, int, int, int]) -> NDArray[np.float32]:
    """A crop's worth of standard normal draws: a view of the table, from `offset` on; nothing is computed.

    The table is longer than the crop, so no value comes twice in a sample: voxels and channels are independent. Two
    samples see stretches shifted against each other, and so are uncorrelated voxel by voxel, unless their offsets are
    the same (one pair in 2^20).
    """
    size = math.prod(shape)
    return noise_table(size + NOISE_OFFSETS)[offset : offset + size].reshape(shape)


def blur_windows(sigma: Sequence[float]) -> tuple[NDArray, NDArray, NDArray]:
    """Windows along X (K, 1), Y (K, 1) and Z (1, K): the Gaussian integrated over each voxel, cut at 4 sigma.

    Like MONAI's, they are not normalised: their sums are within 6e-5 of 1.
    """
    windows = []
    for s in sigma:
        tail = int(max(4 * s, 0.5) + 0.5)
        integral = [0.5 * math.erf(edge / (s * math.sqrt(2))) for edge in np.arange(-tail - 0.5, tail + 1)]
        windows.append(np.diff(integral)[:, None])
    return windows[0], windows[1], windows[2].T


def bias_field_factor(coefficients: Sequence[float], crop_size: Size) -> NDArray[np.float32]:
    """exp of the Legendre polynomial over [-1, 1]^3, as (X, Y, Z, 1).

    The polynomial is contracted axis by axis: 4 products per voxel. In numpy a crop of 128 x 128 x 64 takes 2.4 ms and
    its copy 4 ms; the same from planes in DALI's arithmetic took 13 ms and more (one core).
    """
    table = np.zeros((BIAS_DEGREE + 1,) * 3, np.float32)
    for term, coefficient in zip(BIAS_TERMS, coefficients, strict=True):
        table[term] = coefficient
    x, y, z = (np.polynomial.legendre.legvander(np.linspace(-1, 1, n), BIAS_DEGREE) for n in crop_size)
    planes = np.einsum("ijk,yj,zk->iyz", table, y, z, optimize=True)
    field = x.astype(np.float32) @ planes.reshape(BIAS_DEGREE + 1, -1).astype(np.float32)
    return np.exp(field, out=field).reshape(*crop_size, 1)


# ---------- pipeline


def apply_spatial(image: Any, label: Any, augment: Augment, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """The part of the pipeline before the z-score: one warp for image (linear) and label (nearest), zeros outside.

    Args:
        image, label: DHWC nodes, CPU or GPU.
        augment: what is on.
        inputs: the CPU nodes of `pipeline_inputs`, by name.
    """
    if augment.affine_prob:
        fires, matrix = inputs["affine_fires"], inputs["affine_matrix"]
        image, label = where(fires, warp, image, matrix), where(fires, warp_nearest, label, matrix)
    return image, label


def apply_intensity(image: Any, augment: Augment, inputs: dict[str, Any]) -> Any:
    """The part of the pipeline between z-score and jitter. Arguments as of `apply_spatial`."""
    operations: dict[str, Callable[..., Any]] = {
        "noise": add_noise,
        "blur": blur,
        "bias_field": multiply,
        "gamma": adjust_contrast,
        "dropout": multiply,
    }
    for name, operation in operations.items():
        if getattr(augment, f"{name}_prob"):
            image = where(inputs[f"{name}_fires"], operation, image, *(inputs[i] for i in INPUTS[name]))
    return image


def where(fires: Any, operation: Callable[..., Any], image: Any, *inputs: Any) -> Any:
    """`operation(image, *inputs)` for the samples that it fires for; only their inputs go to a GPU."""
    if fires:
        image = operation(image, *(node.gpu() if image.device == "gpu" else node for node in inputs))
    return image


def warp(image: Any, matrix: Any) -> Any:
    """Linear interpolation through `affine_matrix`, zeros outside."""
    return fn.warp_affine(image, matrix, fill_value=0)


def warp_nearest(label: Any, matrix: Any) -> Any:
    """Nearest neighbour through `affine_matrix`, zeros outside."""
    return fn.warp_affine(label, matrix, fill_value=0, interp_type=types.INTERP_NN)


def add_noise(image: Any, values: Any, std: Any) -> Any:
    """x + std * values."""
    return image + std * values


def multiply(image: Any, factor: Any) -> Any:
    """x * factor, which broadcasts."""
    return image * factor


def blur(image: Any, window_x: Any, window_y: Any, window_z: Any) -> Any:
    """Three passes of a window, with zeros outside the crop as in MONAI: its rim fades.

    `fn.gaussian_blur` samples the Gaussian (at sigma 0.5 that is 0.79 in the middle, not 0.68) and takes six times as
    long on a CPU. `fn.filter` knows two axes there: Y and Z are filtered in frames, X with Y and Z as one axis.
    """
    shape = image.shape()
    image = fn.reshape(image, layout="FHWC")
    image = fn.filter(image, window_y, border="constant")
    image = fn.filter(image, window_z, border="constant")
    image = fn.reshape(image, rel_shape=[1, -1, 1], src_dims=[0, 1, 3], layout="HWC")
    image = fn.filter(image, window_x, border="constant")
    return fn.reshape(image, shape=shape, layout="DHWC")


def adjust_contrast(image: Any, gamma: Any) -> Any:
    """((x - min) / range) ^ gamma * range + min, minimum and range those of all channels together."""
    low = fn.reductions.min(image)
    spread = fn.reductions.max(image) - low
    return dali_math.fpow((image - low) / (spread + np.float32(1e-7)), gamma) * spread + low
