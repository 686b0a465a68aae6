"""Convert a trained network to other programs' files, or their weights to a file that this program uses.

python launch/convert.py runs/RUN --to onnx --output model.onnx
python launch/convert.py runs/RUN --to bundle --output my_bundle               a MONAI bundle
python launch/convert.py weights.pth --from monai --output imported.pt --model.name unet \\
    --data.modalities flair,t1,t1c,t2 --data.release brats2018

A run is given by its folder (the best weights are taken) or by a weights file, which also holds its options. Weights of
MONAI or self-attention-cv do not: give crops, spacing, modalities, label coding, and widths other than the published
ones by the options of `launch/train.py`, or in a YAML file.

    safetensors         the weights, and everything else of a weights file as metadata; `load_trained` reads it
    torch_export        a `.pt2` archive of `torch.export`, to be run without this program
    onnx                the same for ONNX Runtime and others
    monai               state dict of MONAI's class
    self_attention_cv   state dict of self-attention-cv's class
    bundle              a MONAI bundle
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  # before any other import

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine.ranks.command import run_command

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from engine.config import Config
    from engine.trained import TrainedNetwork

ENDINGS: dict[str, tuple[str, ...]] = {
    "onnx": (".onnx",),
    "torch_export": (".pt2",),
    "safetensors": (".safetensors",),
    "monai": (".pt", ".pth"),
    "self_attention_cv": (".pt", ".pth"),
    "bundle": ("",),
}
PACKAGES = ("monai", "self_attention_cv")


def main(args: list[str] | None = None) -> int:
    """Parse the command line and convert.

    Returns:
        exit status: 0, 2 for a user's mistake, 75 or 130 when stopped.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> None:
        config, options = parse(args)
        if options.to:
            export(options.source, options.to, options.output, options.overwrite)
        else:
            import_(options.source, options["from"], config, options.output, options.overwrite)

    return run_command(work, lambda: "nothing was written", alone=True)


def parse(args: list[str] | None) -> tuple[Config, Namespace]:
    """Read the command line; refuse options that contradict each other and an output whose name ends wrongly."""
    from engine.config import Config, make_parser
    from engine.parser import build

    parser = make_parser("Convert a trained network to other programs' files, or their weights to ours.")
    imported = "--from PACKAGE [--config FILE] [--group.option VALUE ...]"
    parser.usage = f"%(prog)s SOURCE (--to FORMAT | {imported}) --output PATH"
    parser.add_argument("source", type=Path, help="A run's folder or a weights file; with --from, its state dict.")
    parser.add_argument("--to", choices=list(ENDINGS), help="What to convert a trained network to.")
    parser.add_argument("--from", choices=list(PACKAGES), help="Which package the state dict is of.")
    parser.add_argument("--output", type=Path, required=True, help="File to write; the folder of a bundle.")
    parser.add_argument("--overwrite", action="store_true", help="Replace what is at --output.")
    namespace = parser.parse_args(args)
    if bool(namespace.to) == bool(namespace["from"]):
        raise ValueError(f"give either --to ({', '.join(ENDINGS)}) or --from ({', '.join(PACKAGES)})")
    endings, output = ENDINGS[namespace.to or "monai"], namespace.output
    if output.suffix not in endings and namespace.to != "bundle":
        raise ValueError(f"--output {output} must end in {' or '.join(endings)}")
    return build(Config, dict(namespace.items())), namespace


def export(source: Path, target: str, output: Path, overwrite: bool) -> None:
    """Write a trained network in another format and print what was written."""
    from engine.export.bundle import WEIGHTS, write_bundle
    from engine.export.packages import find_reference, reference_class, reference_weights
    from engine.export.programs import save_onnx, save_torch_export, trace
    from engine.trained import load_trained
    from engine.weights_file import WeightsFile, write_archive

    trained = load_trained(source)
    _check_output(output, output / WEIGHTS if target == "bundle" else output, overwrite, trained.path)
    said = []
    if target == "safetensors":
        WeightsFile.read(trained.path).write(output, trained.metadata())
    elif target == "bundle":
        write_bundle(output, trained)
        said.append("MONAI runs it: docs/README.md in it says how")
    elif target in PACKAGES:
        name, arguments = reference_class(trained, find_reference(trained.config.model.name, target))
        write_archive(reference_weights(trained), output)
        said.append(f"its class: {name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")
    else:
        save = save_onnx if target == "onnx" else save_torch_export
        difference = save(output, trained, trace(trained))
        said.append(f"run on noise, it differs by at most {difference:.1e} from the network's logits")
    size = sum(path.stat().st_size for path in [output, *output.rglob("*")] if path.is_file())
    print("\n".join([f"{output}: {target} of {_summary(trained)}, {size / 1e6:.1f} MB", *said]))


def import_(source: Path, package: str, config: Config, output: Path, overwrite: bool) -> None:
    """Write a weights file from another package's weights and print what it was taken for."""
    from engine.export.packages import import_weights, read_state_dict
    from engine.trained import load_trained
    from pipelines.layouts.labels import coding_for_release, tutorial_coding
    from pipelines.layouts.names import canonical_modalities

    data = config.data
    _check_output(output, output, overwrite, source)
    if data.modalities is None or data.release is None:
        raise ValueError(
            "a state dict does not say what its channels and labels are: give --data.modalities, in the network's "
            "order, and --data.release"
        )
    coding = coding_for_release(data.release)
    coding = tutorial_coding(coding) if data.regions == "tutorial" else coding
    file = import_weights(read_state_dict(source), package, config, canonical_modalities(data.modalities), coding)
    file.write(output)
    print(f"{output}: {_summary(load_trained(output))}; labels of {coding.release}")


def _check_output(output: Path, weights: Path, overwrite: bool, source: Path) -> None:
    """Refuse to write over what must stay, and make the folder that `output` is in.

    `weights` is `output`, or the file with the weights in a bundle's folder; `source` is the file that is read.
    """
    if os.path.lexists(output) and not overwrite:
        raise ValueError(f"{output} already exists: choose another --output, or give --overwrite")
    if weights.is_dir():
        raise ValueError(f"{weights} is a folder, and must be a file: choose another --output")
    if weights.exists() and weights.samefile(source):
        raise ValueError(f"{weights} is the source itself, which would be lost: choose another --output")
    folders = weights.resolve().parents if weights.exists() else ()
    if any(folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file() for folder in folders):
        raise ValueError(
            f"{weights} is a run's own file, which evaluation or --resume may need: choose another --output"
        )
    output.parent.mkdir(parents=True, exist_ok=True)


def _summary(trained: TrainedNetwork) -> str:
    data = trained.config.data
    spacing = " x ".join(f"{size:g}" for size in data.spacing_mm)
    crop = " x ".join(map(str, data.crop_size_voxels))
    return f"{trained.config.model.name}, {', '.join(trained.modalities)}, windows of {crop} voxels at {spacing} mm"


if __name__ == "__main__":
    sys.exit(main())
