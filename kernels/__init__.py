"""The operations that dominate a training step, one file each: equation, plain PyTorch reference, public function."""
