"""Convert a trained network to other programs' files, or their weights to a file that this program uses.

python launch/convert.py runs/RUN --to onnx --output model.onnx
python launch/convert.py runs/RUN --to bundle --output my_bundle               a MONAI bundle
python launch/convert.py weights.pth --from monai --output imported.pt --model.name unet \\
    --data.modalities flair,t1,t1c,t2 --data.release brats2018

A run is given by its folder (of which the best weights are taken) or by a weights file, and knows all that belongs to
it. Weights of MONAI or self-attention-cv know nothing but themselves: widths that are not the reference's own, crops,
spacing, modalities and label coding are told by the options of `launch/train.py`, or by a YAML file of them.
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  before the imports below, which take seconds

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import jsonargparse

from engine.archive import write_archive
from engine.checkpoint import load_weights, save_weights
from engine.config import Config, make_parser
from engine.export.bundle import WEIGHTS, write_bundle
from engine.export.interchange import (
    check_output,
    describe,
    import_weights,
    read_state_dict,
    reference_class,
    reference_weights,
    save_onnx,
    save_safetensors,
    save_torch_export,
    trace,
)
from engine.parser import build
from engine.ranks.command import run_command
from engine.trained import Trained, load_trained
from models.convert import PACKAGES
from pipelines.labels import coding_for_release, tutorial_coding
from pipelines.layouts.names import canonical_modalities

Target = Literal["onnx", "torch_export", "safetensors", "monai", "self_attention_cv", "bundle"]
Package = Literal["monai", "self_attention_cv"]
ENDINGS: dict[str, tuple[str, ...]] = {
    "onnx": (".onnx",),
    "torch_export": (".pt2",),
    "safetensors": (".safetensors",),
    "monai": (".pt", ".pth"),
    "self_attention_cv": (".pt", ".pth"),
    "bundle": ("",),
}


def main(args: list[str] | None = None) -> int:
    """Parse the command line and convert.

    Returns:
        exit status: 0, 2 for a user's mistake, 75 or 130 when stopped.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(lambda: convert(args), lambda: "nothing was written", alone=True)


def convert(args: list[str] | None) -> None:
    """What the command line asks for."""
    config, options = parse(args)
    if options.to:
        export(options.source, options.to, options.output, options.overwrite)
    else:
        import_(options.source, options["from"], config, options.output, options.overwrite)


def parse(args: list[str] | None) -> tuple[Config, jsonargparse.Namespace]:
    """Read the command line.

    Raises:
        ValueError: an option that there is not or that refuses its value, options that contradict each other, or an
            output whose name does not end as its format's.
    """
    parser = make_parser("Convert a trained network to other programs' files, or their weights to ours.")
    parser.usage = (
        "%(prog)s SOURCE (--to FORMAT | --from PACKAGE [--config FILE] [--group.option VALUE ...]) --output PATH"
    )
    parser.add_argument("source", type=Path, help="A run's folder or a weights file; with --from, its state dict.")
    parser.add_argument("--to", type=Target | None, help="What to convert a trained network to.")
    parser.add_argument("--from", type=Package | None, help="Which package the state dict is of.")
    parser.add_argument("--output", type=Path, required=True, help="File to write; the folder of a bundle.")
    parser.add_argument("--overwrite", action="store_true", help="Replace what is at --output.")
    namespace = parser.parse_args(args)
    if bool(namespace.to) == bool(namespace["from"]):
        raise ValueError(f"give either --to ({', '.join(get_args(Target))}) or --from ({', '.join(get_args(Package))})")
    endings, output = ENDINGS[namespace.to or "monai"], namespace.output
    if output.suffix not in endings and namespace.to != "bundle":
        raise ValueError(f"--output {output} must end in {' or '.join(endings)}")
    return build(Config, dict(namespace.items())), namespace


def export(source: Path, target: Target, output: Path, overwrite: bool) -> None:
    """Write a trained network in another format and print what was written."""
    trained = load_trained(source)
    check_output(output, output / WEIGHTS if target == "bundle" else output, overwrite, trained.path)
    said = []
    if target == "safetensors":
        save_safetensors(output, load_weights(trained.path), describe(trained))
    elif target == "bundle":
        write_bundle(output, trained)
        said.append("MONAI runs it: docs/README.md in it says how")
    elif target in PACKAGES.values():
        write_archive(reference_weights(trained, target), output)
        said.append(f"its class: {_call(*reference_class(trained))}")
    else:
        save: Callable[..., float] = save_onnx if target == "onnx" else save_torch_export
        difference = save(output, trained, trace(trained))
        said.append(f"run on noise, it differs by at most {difference:.1e} from the network's logits")
    size = sum(path.stat().st_size for path in [output, *output.rglob("*")] if path.is_file())
    print("\n".join([f"{output}: {target} of {_summary(trained)}, {size / 1e6:.1f} MB", *said]))


def import_(source: Path, package: Package, config: Config, output: Path, overwrite: bool) -> None:
    """Write a weights file from another package's weights and print what it was taken for."""
    data = config.data
    check_output(output, output, overwrite, source)
    if data.modalities is None or data.release is None:
        raise ValueError(
            "a state dict does not say what its channels and labels are: give --data.modalities, in the network's "
            "order, and --data.release"
        )
    coding = coding_for_release(data.release)
    coding = tutorial_coding(coding) if data.regions == "tutorial" else coding
    content = import_weights(read_state_dict(source), package, config, canonical_modalities(data.modalities), coding)
    save_weights(output, content)
    print(f"{output}: {_summary(load_trained(output))}; labels of {coding.release}")


def _summary(trained: Trained) -> str:
    data = trained.config.data
    spacing = " x ".join(f"{size:g}" for size in data.spacing_mm)
    crop = " x ".join(map(str, data.crop_size_voxels))
    return f"{trained.config.model.name}, {', '.join(trained.modalities)}, windows of {crop} voxels at {spacing} mm"


def _call(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


if __name__ == "__main__":
    sys.exit(main())
