"""Trained networks for other programs: MONAI bundles, safetensors, TorchScript, ONNX, the reference packages."""
