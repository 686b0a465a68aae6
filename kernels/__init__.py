"""The operations that dominate a training step, a file each: equation, PyTorch reference, kernels, public function."""
