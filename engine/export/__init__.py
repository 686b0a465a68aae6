"""Trained networks for other programs: MONAI bundles, torch.export, ONNX, and the reference packages."""
