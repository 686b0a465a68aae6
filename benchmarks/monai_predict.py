"""Prediction as a user of MONAI writes it: the program beside which `bench_predict` runs `launch/predict.py`.

    python -m benchmarks.monai_predict --run runs/RUN --input SCAN.nii.gz ... --output FOLDER --workers 2

The tutorial's transforms in its order, MONAI's DataLoader, `sliding_window_inference` over windows that
`NormalizeIntensity` z-scores one by one, `Invertd` back to the file's grid, the label map, `SaveImaged`. The weights
are the run's. The network is MONAI's own for `unetr_monai` and `unet`; for `unetr`, which MONAI does not have, it is
this program's module in plain PyTorch, without a kernel of ours. On a GPU it computes under autocast where the run was
trained so, and probabilities are inverted there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, decollate_batch
from monai.inferers.utils import sliding_window_inference
from monai.transforms import (
    Activationsd,
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    NormalizeIntensity,
    Orientationd,
    SaveImaged,
    Spacingd,
)

from engine.export.bundle_steps import RegionsToLabelsd
from engine.export.packages import reference_class, reference_weights
from engine.inference import compose_labels
from engine.precision import LOW_PRECISION
from engine.sliding_window import OVERLAP, WINDOWS_AT_ONCE
from engine.trained import TrainedNetwork, load_trained
from kernels import dispatch
from models import NETWORKS
from pipelines.layouts.labels import REGIONS


def plain_network(trained: TrainedNetwork) -> torch.nn.Module:
    """The run's weights in MONAI's class, or in ours where MONAI has none."""
    reference = NETWORKS[trained.config.model.name].reference
    if reference is None or reference.package != "monai":
        return trained.network
    target, arguments = reference_class(trained, reference)
    network = ConfigParser({"network": {"_target_": target, **arguments}}).get_parsed_content("network")
    network.load_state_dict(reference_weights(trained))
    return network.eval()


def zscored(network: Callable[[torch.Tensor], torch.Tensor], windows: torch.Tensor) -> torch.Tensor:
    """Logits of windows (N, C, X, Y, Z), each z-scored by its non-zero voxels."""
    normalise = NormalizeIntensity(nonzero=True, channel_wise=True)
    return network(torch.stack([torch.as_tensor(normalise(window)) for window in windows])).float()


def before(trained: TrainedNetwork) -> Compose:
    """From a 4D file to (C, X, Y, Z) as in training."""
    return Compose(
        [
            LoadImaged(keys="image"),
            EnsureChannelFirstd(keys="image"),
            Spacingd(keys="image", pixdim=trained.config.data.spacing_mm, mode="bilinear"),
            Orientationd(keys="image", axcodes="RAS", labels=None),
        ]
    )


def after(trained: TrainedNetwork, transforms: Compose, output: Path) -> Compose:
    """From logits under "pred" to a label map on the file's grid, saved by the name of its scan."""
    values = compose_labels(np.eye(len(REGIONS), dtype=bool), trained.coding).tolist()
    return Compose(
        [
            Activationsd(keys="pred", sigmoid=True),
            Invertd(keys="pred", transform=transforms, orig_keys="image", nearest_interp=False),
            RegionsToLabelsd(values),  # above one half
            SaveImaged(
                keys="pred", output_dir=output, output_postfix="", output_dtype=np.uint8, resample=False,
                separate_folder=False, print_log=False,
            ),
        ]
    )  # fmt: skip


@torch.no_grad()
def predict(run: Path, files: Sequence[Path], output: Path, workers: int, device: torch.device) -> None:
    """Segment 4D files that hold the run's modalities in its order."""
    trained = load_trained(run, "cpu")
    dispatch.use("reference", device)
    network = plain_network(trained).to(device)
    window, precision = trained.config.data.crop_size_voxels, trained.config.train.precision
    lowered: Any = nullcontext()
    if device.type == "cuda" and precision in LOW_PRECISION:
        lowered = torch.autocast("cuda", LOW_PRECISION[precision])
    transforms = before(trained)
    loader = DataLoader(Dataset([{"image": str(path)} for path in files], transforms), num_workers=workers)
    finish = after(trained, transforms, output)
    print(f"segmenting {len(files)} cases", file=sys.stderr, flush=True)
    for batch in loader:
        image = batch["image"].to(device)
        with lowered:
            batch["pred"] = sliding_window_inference(
                image, window, WINDOWS_AT_ONCE, partial(zscored, network), overlap=OVERLAP, mode="gaussian"
            )
        for case in decollate_batch(batch):
            finish(case)


def main(args: list[str] | None = None) -> int:
    """Parse the command line and predict."""
    parser = argparse.ArgumentParser(description="Predict with MONAI alone.")
    parser.add_argument("--run", type=Path, required=True, help="A run's folder or a weights file.")
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="4D files, modalities in the run's order.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for the label maps.")
    parser.add_argument("--workers", type=int, default=2, help="Of the DataLoader.")
    options = parser.parse_args(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predict(options.run, options.input, options.output, options.workers, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
